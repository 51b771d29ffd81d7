"""``prefixes/<name>.safetensors``: a prefix as the cache that every text begins after.

Tensors ``past_key_values.{i}.key|value`` [1, K, P, D] in the graph's element type; the header says which base model
the prefix belongs to and where the positions of a text begin behind it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from peft_deploy.adapters.formats.peft_writer import ArraySource
from peft_deploy.errors import AdapterError, CheckpointError, listed
from peft_deploy.signature import (
    PREFIX_OFFSET,
    GraphSignature,
    TensorSpec,
    past_names,
    prefix_names,
)
from peft_deploy.weights.cast import cast_array
from peft_deploy.weights.merged import adapter_fingerprint
from peft_deploy.weights.rounding import NARROW
from peft_deploy.weights.safetensors_file import SafetensorsFile
from peft_deploy.weights.source import Array
from peft_deploy.weights.writer import write_safetensors

PREFIX_FOLDER = "prefixes"
PREFIX_SUFFIX = ".safetensors"
FORMAT = "peft_deploy.prefix"
FORMAT_VERSION = 1

_FORMAT, _VERSION = "format", "format_version"
_BASE, _FINGERPRINT, _OFFSET = "base_fingerprint", "fingerprint", "position_offset"


@dataclass(frozen=True)
class _Header:
    """Fingerprints of the base model and of the prefix, and how far it moves positions."""

    base: str
    fingerprint: str
    offset: int


@dataclass(frozen=True, eq=False)
class Prefix:
    """Keys and values that stand before every text.

    Args:
        name: what it goes by.
        past: cache input → [1, K, P, D], in signature order.
        position_offset: added to the positions of all tokens: 0 where the model was trained with positions that a
            prefix does not move, P where they begin behind it.
    """

    name: str
    past: Mapping[str, Array]
    position_offset: int = 0

    @property
    def num_tokens(self) -> int:
        """P."""
        return int(next(iter(self.past.values())).shape[2])

    @cached_property
    def fingerprint(self) -> str:
        """The sha256 over the names, types, shapes and values of all tensors."""
        return adapter_fingerprint({}, self.past)

    def in_type(self, dtype: str) -> Prefix:
        """The same in another element type; itself when it is of that type.

        Raises:
            CheckpointError: a value is too large for the type.
        """
        past = {name: cast_array(array, dtype, name=name) for name, array in self.past.items()}
        return replace(self, past=past)

    def slots(self, *, positions: bool) -> dict[str, Array]:
        """The same under the names of a graph's prefix slots, as an ``.onnx_adapter`` file holds it.

        Args:
            positions: whether the graph has a slot for the offset, as those with ``position_ids`` do.
        """
        named: dict[str, Array] = dict(
            zip(prefix_names(len(self.past) // 2), self.past.values(), strict=True)
        )
        if positions:
            named[PREFIX_OFFSET] = np.array([self.position_offset], np.int64)
        return named


def prefix_path(bundle: Path, name: str) -> Path:
    """Where a bundle keeps the prefix of that name."""
    return bundle / PREFIX_FOLDER / f"{name}{PREFIX_SUFFIX}"


def write_prefix_file(path: Path, prefix: Prefix, base_fingerprint: str) -> None:
    """Writes a prefix; the file appears whole or not at all.

    Args:
        path: the file, in a folder that exists.
        prefix: what to write.
        base_fingerprint: of the base model that it was trained on.

    Raises:
        OutputError: it cannot be written.
    """
    metadata = {
        _FORMAT: FORMAT,
        _VERSION: str(FORMAT_VERSION),
        _BASE: base_fingerprint,
        _FINGERPRINT: prefix.fingerprint,
        _OFFSET: str(prefix.position_offset),
    }
    write_safetensors(path, ArraySource(prefix.past), metadata)


def read_prefix_file(
    path: Path,
    signature: GraphSignature,
    base_fingerprint: str,
    context_length: int | None = None,
) -> Prefix:
    """Reads a prefix and compares it with the graph that it is for; every value is looked at.

    Args:
        path: the file.
        signature: of the graph.
        base_fingerprint: of the graph's base model.
        context_length: the most tokens that the model can see; None for no limit.

    Raises:
        AdapterError: no such file, a damaged one or of another kind, a prefix of another base model, other layers,
            heads or element type than the graph's, NaN or infinity, or no room for a text behind it.
    """
    header, past = _load(path)
    if header.base != base_fingerprint:
        raise AdapterError(
            f"the prefix {path} is for the base model with fingerprint {header.base[:12]}; "
            f"the bundle's has {base_fingerprint[:12]}",
            hint="export the prefix together with its own base model",
        )
    whole = _unchanged(path, past, header)
    narrow = {spec.dtype for spec in signature.past} & NARROW
    if narrow and all(array.dtype == np.float32 for array in past.values()):
        whole = whole.in_type(narrow.pop())  # made for a bundle of another precision
    check_prefix(whole.past, signature, str(path), context_length)
    return whole


def read_prefix_alone(path: Path) -> tuple[str, Prefix]:
    """Reads a prefix that is compared with no graph.

    Args:
        path: the file.

    Returns:
        The fingerprint of the base model that it is for, and the prefix.

    Raises:
        AdapterError: no such file, a damaged one or of another kind, or layers that do not go together.
    """
    header, past = _load(path)
    shapes = sorted({array.shape for array in past.values()})
    if len(shapes) != 1 or len(shapes[0]) != 4 or set(past) != set(past_names(len(past) // 2)):
        raise AdapterError(
            f"{path} holds no whole prefix: {listed(past)}\nof the shapes {', '.join(map(str, shapes))}"
        )
    return header.base, _unchanged(path, past, header)


def is_prefix_file(path: Path) -> bool:
    """Whether a file is one that :func:`write_prefix_file` writes, by its header."""
    try:
        return SafetensorsFile(path).metadata.get(_FORMAT) == FORMAT
    except (CheckpointError, OSError):
        return False


def _unchanged(path: Path, past: Mapping[str, Array], header: _Header) -> Prefix:
    prefix = Prefix(path.name.removesuffix(PREFIX_SUFFIX), past, header.offset)
    if prefix.fingerprint != header.fingerprint:
        raise AdapterError(
            f"{path} is damaged: its values have the fingerprint {prefix.fingerprint[:12]}, "
            f"its header says {header.fingerprint[:12]}",
            hint="copy the bundle again, or export it again",
        )
    if header.offset not in (0, prefix.num_tokens):
        raise AdapterError(
            f"the header of {path} moves positions by {header.offset}; "
            f"it can be 0 or the prefix's {prefix.num_tokens} tokens"
        )
    return prefix


def check_prefix(
    past: Mapping[str, Array],
    signature: GraphSignature,
    what: str,
    context_length: int | None = None,
) -> None:
    """Passes when a graph can begin after these keys and values.

    Args:
        past: cache input → array.
        signature: of the graph.
        what: the prefix, for messages.
        context_length: the most tokens that the model can see; None for no limit.

    Raises:
        AdapterError: it cannot.
    """
    if not signature.past:
        raise AdapterError(f"the graph has no cache, so it cannot take the prefix {what}")
    names = {spec.name for spec in signature.past}
    if odd := set(past) ^ names:
        layers = len(past) // 2
        raise AdapterError(
            f"the prefix {what} has {layers} layers, the graph {signature.num_layers}; "
            f"these differ:\n{listed(odd)}"
        )
    lengths = {array.shape[2] for array in past.values() if array.ndim == 4}
    wrong = [
        f"{spec.name}: {past[spec.name].dtype.name} {list(past[spec.name].shape)}, "
        f"the graph takes {spec.dtype} {[1, spec.dims[1], 'length', spec.dims[3]]}"
        for spec in signature.past
        if not _fits(past[spec.name], spec)
    ]
    if wrong:
        raise AdapterError(f"the prefix {what} does not fit the graph:\n{listed(wrong)}")
    if len(lengths) > 1 or 0 in lengths:
        raise AdapterError(
            f"the layers of the prefix {what} are of {', '.join(map(str, sorted(lengths)))} tokens; "
            "all must have the same number, at least 1"
        )
    _check_room(lengths.pop(), what, context_length)
    broken = [name for name, array in past.items() if not np.isfinite(array).all()]
    if broken:
        raise AdapterError(f"the prefix {what} holds NaN or infinity in:\n{listed(broken)}")


def check_prefix_tensors(
    tensors: Mapping[str, Array],
    slots: Collection[str],
    what: str,
    context_length: int | None = None,
) -> None:
    """Passes when what an adapter file holds for prefix slots is a whole prefix, or nothing.

    A graph would run with one that some layers lack, and compute nonsense.

    Args:
        tensors: of the file, whose shapes fit the slots.
        slots: names of the graph's slots.
        what: the file, for messages.
        context_length: the most tokens that the model can see; None for no limit.

    Raises:
        AdapterError: it is not.
    """
    wanted = {name for name in prefix_names(len(slots)) if name in slots}
    found = {name: array.shape[2] for name, array in tensors.items() if name in wanted}
    if not found:
        if PREFIX_OFFSET in tensors:
            raise AdapterError(f"{what} moves positions, and holds no prefix")
        return
    if missing := wanted - found.keys():
        raise AdapterError(
            f"{what} holds a prefix for some layers only; missing:\n{listed(missing)}"
        )
    lengths = set(found.values())
    if len(lengths) > 1 or 0 in lengths:
        raise AdapterError(
            f"the layers of the prefix in {what} are of {', '.join(map(str, sorted(lengths)))} tokens; "
            "all must have the same number, at least 1"
        )
    _check_room(lengths.pop(), what, context_length)


def _check_room(tokens: int, what: str, context_length: int | None) -> None:
    if context_length is not None and context_length <= tokens:
        raise AdapterError(
            f"the prefix {what} has {tokens} tokens, which leaves no room for a text: the model can see "
            f"{context_length} tokens, prefix included"
        )


def _fits(array: Array, spec: TensorSpec) -> bool:
    _, heads, _, head_dim = spec.dims
    return (
        array.ndim == 4
        and (array.shape[0], array.shape[1], array.shape[3]) == (1, heads, head_dim)
        and array.dtype.name == spec.dtype
    )


def _load(path: Path) -> tuple[_Header, dict[str, Array]]:
    if not path.is_file():
        raise AdapterError(f"there is no prefix at {path}")
    try:
        file = SafetensorsFile(path)
        arrays = {name: np.array(file.read(name)) for name in sorted(file.names(), key=_in_order)}
    except CheckpointError as exc:
        raise AdapterError(f"the prefix {exc.message}", hint=exc.hint) from exc
    return _read_header(path, file.metadata), arrays


def _read_header(path: Path, metadata: Mapping[str, str]) -> _Header:
    if metadata.get(_FORMAT) != FORMAT:
        raise AdapterError(
            f"{path} is not a bundle's prefix; its header has {_FORMAT} {metadata.get(_FORMAT)!r}",
            hint="give a prefix adapter to peft-deploy export, which writes such files",
        )
    try:
        version, offset = int(metadata[_VERSION]), int(metadata[_OFFSET])
        header = _Header(metadata[_BASE], metadata[_FINGERPRINT], offset)
    except (KeyError, ValueError) as exc:
        raise AdapterError(f"the header of {path} is damaged: {exc}") from exc
    if version > FORMAT_VERSION:
        raise AdapterError(
            f"{path} has {_VERSION} {version}; this release reads up to {FORMAT_VERSION}",
            hint="update peft-deploy",
        )
    return header


def _in_order(name: str) -> tuple[int, str]:
    """By layer; past_key_values.10.key comes after past_key_values.9.value."""
    number = name.split(".")[1] if name.count(".") == 2 else ""
    return int(number) if number.isdecimal() else -1, name
