"""As much of JSON Schema as the report's schema uses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

TYPES = {
    "object": dict,
    "array": list,
    "string": str,
    "boolean": bool,
    "integer": int,
    "number": (int, float),
}
KNOWN = {
    *("$schema", "$defs", "$ref", "title", "description", "type", "const"),
    *("required", "properties", "additionalProperties", "items"),
}


def violations(
    data: Any, schema: Mapping[str, Any], root: Mapping[str, Any], at: str = "$"
) -> Iterator[str]:
    assert set(schema) <= KNOWN, schema
    if "$ref" in schema:
        name = schema["$ref"].removeprefix("#/$defs/")
        yield from violations(data, root["$defs"][name], root, at)
        return
    if "const" in schema and data != schema["const"]:
        yield f"{at} is {data!r}"
    kinds = schema.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if kinds and not any(is_a(data, kind) for kind in kinds):
        yield f"{at} is {type(data).__name__}, not {kinds}"
    if isinstance(data, dict):
        yield from (f"{at}.{k} is missing" for k in schema.get("required", []) if k not in data)
        for key, value in data.items():
            below = schema.get("properties", {}).get(key, schema.get("additionalProperties"))
            if below is not None:
                yield from violations(value, below, root, f"{at}.{key}")
    if isinstance(data, list) and "items" in schema:
        for i, value in enumerate(data):
            yield from violations(value, schema["items"], root, f"{at}[{i}]")


def is_a(data: Any, kind: str) -> bool:
    if isinstance(data, bool):
        return kind == "boolean"
    return isinstance(data, TYPES[kind])  # type: ignore[arg-type]
