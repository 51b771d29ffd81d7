"""Random inputs for a layer of which nothing is known but its signature."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from peft_deploy.config.layer_signature import INTEGERS, LayerSignature
from peft_deploy.errors import ParityError
from peft_deploy.runtime.runner import Array
from peft_deploy.signature import BATCH, GraphSignature, TensorSpec


@dataclass(frozen=True, eq=False)
class LayerCase:
    """One set of inputs.

    Args:
        name: the sizes, in words.
        group: the line of the report that it counts in.
        sizes: name of a dimension → its size.
        feeds: input → array.
    """

    name: str
    group: str
    sizes: Mapping[str, int]
    feeds: Mapping[str, Array]


def draw_cases(signature: LayerSignature, seed: int = 0) -> tuple[LayerCase, ...]:
    """Inputs of every batch size with every other size; other dimensions change together, no two alike.

    Args:
        signature: what to draw.
        seed: of the numbers.
    """
    rng = np.random.default_rng(seed)
    others = [symbol for symbol in signature.symbols if symbol != BATCH]
    rounds = max((len(signature.sizes_of(symbol)) for symbol in others), default=1)
    if not signature.symbols:
        rounds = 2
    cases = []
    for batch in signature.sizes_of(BATCH) if BATCH in signature.symbols else (None,):
        for turn in range(rounds):
            sizes = {} if batch is None else {BATCH: batch}
            for shift, symbol in enumerate(others):
                choice = signature.sizes_of(symbol)
                sizes[symbol] = choice[(turn + shift) % len(choice)]
            name = ", ".join(f"{symbol} {size}" for symbol, size in sizes.items())
            group = name.partition(",")[0] if name else "fixed sizes"
            feeds = {
                s.name: _draw(rng, s, signature.ranges.get(s.name), sizes)
                for s in signature.inputs
            }
            cases.append(LayerCase(name or f"draw {turn + 1}", group, sizes, feeds))
    return tuple(cases)


def _draw(
    rng: np.random.Generator,
    spec: TensorSpec,
    limits: tuple[float, float] | None,
    sizes: Mapping[str, int],
) -> Array:
    shape = [sizes[dim] if isinstance(dim, str) else dim for dim in spec.dims]
    if spec.dtype == "bool":
        return rng.integers(0, 2, shape).astype(np.bool_)
    if spec.dtype in INTEGERS:
        assert limits is not None  # the signature was checked
        low, high = limits
        return rng.integers(int(np.ceil(low)), int(np.ceil(high)), shape).astype(spec.dtype)
    if limits is not None:
        return rng.uniform(*limits, shape).astype(spec.dtype)
    return rng.standard_normal(shape).astype(spec.dtype)


def name_dimensions(
    traced: GraphSignature,
    signature: LayerSignature,
    cases: Sequence[LayerCase],
    shapes: Sequence[Mapping[str, tuple[int, ...]]],
) -> GraphSignature:
    """The signature with the outputs' dimensions called after those of the inputs that they follow.

    Args:
        traced: the outputs' dimensions as Paddle infers them.
        signature: names the inputs' dimensions.
        cases: what was tried.
        shapes: the layer's outputs in each case, output → shape.

    Raises:
        ParityError: the layer gave something else than the program promises.
    """
    outputs = []
    for spec in traced.outputs:
        seen = [shape[spec.name] for shape in shapes]
        for shape in seen:
            if len(shape) != len(spec.dims) or any(
                isinstance(d, int) and d != n for d, n in zip(spec.dims, shape, strict=True)
            ):
                raise ParityError(
                    f"the layer gives {spec.name} {list(shape)}, its traced program {list(spec.dims)}",
                    hint="does its forward take another way for other sizes, or for other values?",
                )
        dims = tuple(
            dim
            if isinstance(dim, int)
            else _named([s[axis] for s in seen], signature, cases) or dim
            for axis, dim in enumerate(spec.dims)
        )
        outputs.append(replace(spec, dims=dims))
    return replace(traced, outputs=tuple(outputs))


def _named(sizes: list[int], signature: LayerSignature, cases: Sequence[LayerCase]) -> str | None:
    """A dimension of the inputs, or a sum of two, that had these sizes in all cases."""
    symbols = signature.symbols
    for symbol in symbols:
        if sizes == [case.sizes[symbol] for case in cases]:
            return symbol
    for first in symbols:
        for second in symbols:
            if sizes == [case.sizes[first] + case.sizes[second] for case in cases]:
                return f"{first}+{second}"
    return None
