"""What a user says about a model that no family knows: its inputs, its outputs, and what to try it with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft_deploy.config.json_file import read_object
from peft_deploy.errors import ConfigError
from peft_deploy.signature import BATCH, TensorSpec

INTEGERS = ("int64", "int32", "int16", "int8", "uint8")
DTYPES = ("float32", *INTEGERS, "bool")
BATCH_SIZES = (1, 3)
OTHER_SIZES = (1, 5, 12)  # one, odd and even
_FORM = (
    '{"inputs": [{"name": "ids", "dtype": "int64", "dims": ["batch", "sequence"], "range": [0, 131]}], '
    '"outputs": ["logits"]}'
)


@dataclass(frozen=True)
class LayerSignature:
    """The inputs and outputs of any layer.

    Args:
        inputs: in the order of the layer's arguments; a dimension that changes is a name, and the same name means
            the same size.
        outputs: names, in the order in which the layer returns them.
        ranges: input → the lowest value and the first one above the highest; needed for integers.
        sizes: name of a dimension → the sizes to try; by default 1 and 3 for ``batch``, 1, 5 and 12 for others.

    Raises:
        ConfigError: a name twice, an unknown element type, an integer input without a range, a range or a size that
            cannot be.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[str, ...]
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    sizes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = [*(spec.name for spec in self.inputs), *self.outputs]
        if not self.inputs or not self.outputs:
            raise ConfigError("a signature needs at least one input and one output")
        if twice := {name for name in names if names.count(name) > 1}:
            raise ConfigError(f"the signature has the name {', '.join(sorted(twice))} twice")
        for spec in self.inputs:
            _check_input(spec, self.ranges.get(spec.name))
        if strange := set(self.ranges) - {spec.name for spec in self.inputs}:
            raise ConfigError(f"a range is given for {', '.join(sorted(strange))}, no input")
        for symbol, sizes in self.sizes.items():
            if symbol not in self.symbols:
                raise ConfigError(
                    f"sizes are given for {symbol!r}, which no input has; "
                    f"its dimensions are {', '.join(self.symbols) or 'all fixed'}"
                )
            if not sizes or any(type(size) is not int or size < 1 for size in sizes):
                raise ConfigError(f"the sizes of {symbol} are {list(sizes)}, not positive numbers")

    @property
    def symbols(self) -> list[str]:
        """The names of all dimensions that change, in order of appearance."""
        return list(dict.fromkeys(d for s in self.inputs for d in s.dims if isinstance(d, str)))

    def sizes_of(self, symbol: str) -> tuple[int, ...]:
        """The sizes to try for a dimension."""
        return self.sizes.get(symbol, BATCH_SIZES if symbol == BATCH else OTHER_SIZES)

    def to_dict(self) -> dict[str, Any]:
        """The contents of the file."""
        ranges = {name: {"range": list(limits)} for name, limits in self.ranges.items()}
        return {
            "inputs": [{**spec.to_dict(), **ranges.get(spec.name, {})} for spec in self.inputs],
            "outputs": list(self.outputs),
            "sizes": {symbol: list(sizes) for symbol, sizes in self.sizes.items()},
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str = "the signature") -> LayerSignature:
        """The inverse of :meth:`to_dict`.

        Args:
            data: ``inputs``, ``outputs`` and, optionally, ``sizes``.
            where: for messages.

        Raises:
            ConfigError: entries missing, unknown, or of another type.
        """
        _check_entries(data, {"inputs", "outputs"}, {"sizes"}, where)
        try:
            specs = [_input(entry, where) for entry in data["inputs"]]
            ranges = {e["name"]: tuple(e["range"]) for e in data["inputs"] if "range" in e}
            sizes = {name: tuple(values) for name, values in data.get("sizes", {}).items()}
            outputs = tuple(data["outputs"])
        except (TypeError, AttributeError, ValueError) as exc:
            raise ConfigError(
                f"{where} has an entry of the wrong type: {exc}", hint=_hint()
            ) from exc
        if isinstance(data["outputs"], str) or not all(isinstance(o, str) and o for o in outputs):
            raise ConfigError(f"{where}: outputs is {data['outputs']!r}, not a list of names")
        return cls(tuple(specs), outputs, ranges, sizes)

    @classmethod
    def read(cls, path: Path) -> LayerSignature:
        """The signature in a JSON file.

        Raises:
            ConfigError: it cannot be read, or says something that cannot be.
        """
        return cls.from_dict(read_object(path, ConfigError), str(path))


def _input(entry: Any, where: str) -> TensorSpec:
    if not isinstance(entry, Mapping):
        raise ConfigError(f"{where}: an input is {entry!r}, not an object", hint=_hint())
    _check_entries(
        entry, {"name", "dtype", "dims"}, {"range"}, f"{where}, input {entry.get('name')}"
    )
    if isinstance(entry["dims"], str):
        raise ConfigError(f"{where}: dims is {entry['dims']!r}, not a list", hint=_hint())
    return TensorSpec.from_dict(dict(entry))


def _check_entries(
    data: Mapping[str, Any], needed: set[str], possible: set[str], where: str
) -> None:
    if missing := needed - set(data):
        raise ConfigError(f"{where} lacks {', '.join(sorted(missing))}", hint=_hint())
    if unknown := set(data) - needed - possible:
        raise ConfigError(
            f"{where} has unknown entries: {', '.join(sorted(unknown))}", hint=_hint()
        )


def _check_input(spec: TensorSpec, limits: tuple[float, float] | None) -> None:
    if not isinstance(spec.name, str) or not spec.name:
        raise ConfigError(f"an input's name is {spec.name!r}, not a text")
    if spec.dtype not in DTYPES:
        raise ConfigError(f"input {spec.name} is {spec.dtype!r}; it can be {', '.join(DTYPES)}")
    for dim in spec.dims:
        if isinstance(dim, str) and dim.isidentifier():
            continue
        if type(dim) is int and dim > 0:
            continue
        raise ConfigError(
            f"input {spec.name} has the dimension {dim!r}; it must be a positive number or a name"
        )
    if limits is None:
        if spec.dtype in INTEGERS:
            raise ConfigError(
                f"input {spec.name} is {spec.dtype} and has no range, so nobody knows what to try it with",
                hint='add "range": [0, N] with N above the highest value, the size of a vocabulary for instance',
            )
        return
    numbers = [type(limit) in (int, float) for limit in limits]
    if spec.dtype == "bool" or len(limits) != 2 or not all(numbers) or not limits[0] < limits[1]:
        raise ConfigError(
            f"input {spec.name} ({spec.dtype}) has the range {list(limits)}; "
            "it must be the lowest value and one above the highest"
        )


def _hint() -> str:
    return f"a signature looks like {_FORM}"
