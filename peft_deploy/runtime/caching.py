"""Runners that keep the cache where they computed it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np

from peft_deploy.errors import ExecutionError, listed
from peft_deploy.runtime.runner import Array, Runner
from peft_deploy.signature import LOGITS, GraphSignature, TensorSpec, present_names
from peft_deploy.weights.source import DTYPES


@dataclass(frozen=True)
class Cache:
    """The keys and values of all tokens so far, in whatever form their runner keeps them.

    Args:
        values: key and value of layer 0, of layer 1, …: [B, K, P, D] each.
        length: P, the tokens in it, a prefix and padding included.
    """

    values: tuple[Any, ...]
    length: int


@runtime_checkable
class CachingRunner(Protocol):
    """A runner whose cache does not have to pass through numpy between two steps."""

    @property
    def signature(self) -> GraphSignature:
        """What goes in and comes out."""
        ...

    def load_cache(self, arrays: Sequence[Array]) -> Cache:
        """A cache with these contents, in signature order."""
        ...

    def step(self, feeds: Mapping[str, Array], cache: Cache) -> tuple[Array, Cache]:
        """Logits [B, S, V] of the new tokens, and the cache grown by them.

        Args:
            feeds: every input but the cache.
            cache: what the last step returned; it is used up.
        """
        ...


class ArrayCaching:
    """The same for a :class:`Runner` that takes and gives numpy arrays.

    Args:
        runner: computes the steps.
    """

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._past = [spec.name for spec in runner.signature.past]
        self._present = present_names(runner.signature.num_layers)

    @property
    def signature(self) -> GraphSignature:
        """The runner's."""
        return self._runner.signature

    def load_cache(self, arrays: Sequence[Array]) -> Cache:
        """A cache of these very arrays."""
        return Cache(tuple(arrays), arrays[0].shape[2])

    def step(self, feeds: Mapping[str, Array], cache: Cache) -> tuple[Array, Cache]:
        """Runs the graph with the cache as ordinary inputs and outputs."""
        past = dict(zip(self._past, cache.values, strict=True))
        results = self._runner.run({**feeds, **past}, [LOGITS, *self._present])
        present = tuple(results[name] for name in self._present)
        return results[LOGITS], Cache(present, present[0].shape[2])


def caching(runner: Runner | CachingRunner) -> CachingRunner:
    """The runner itself where it keeps its cache, else one that carries arrays to and fro."""
    return runner if isinstance(runner, CachingRunner) else ArrayCaching(runner)


def initial_cache(
    signature: GraphSignature, batch: int, prefix: Mapping[str, Array] | None = None
) -> list[Array]:
    """The cache before the first token: empty, or a prefix for every row.

    Args:
        signature: names the cache inputs and their sizes.
        batch: rows B.
        prefix: cache input → [1, K, P, D] or [B, K, P, D], for each of the cache inputs.

    Returns:
        Arrays [B, K, P, D] in signature order, P = 0 without a prefix.

    Raises:
        ExecutionError: the graph has no cache, or the prefix does not fit it.
    """
    if not signature.past:
        raise ExecutionError(
            "the graph has no past_key_values inputs, so it cannot generate token by token",
            hint="only bundles of decoder models generate",
        )
    if prefix is None:
        return [_empty(spec, batch) for spec in signature.past]
    _check_prefix(signature, batch, prefix)
    arrays = [prefix[spec.name] for spec in signature.past]
    return [np.ascontiguousarray(np.broadcast_to(a, (batch, *a.shape[1:]))) for a in arrays]


def _empty(spec: TensorSpec, batch: int) -> Array:
    """No token's keys or values: [B, K, 0, D]."""
    _, heads, _, dim = spec.dims
    if isinstance(heads, str) or isinstance(dim, str):
        raise ExecutionError(
            f"the graph leaves the sizes of {spec.name} open ({list(spec.dims)}); kv heads and "
            f"head "
            "dim must be fixed for a generation to begin with an empty cache"
        )
    return np.zeros((batch, heads, 0, dim), DTYPES[spec.dtype])


def _check_prefix(signature: GraphSignature, batch: int, prefix: Mapping[str, Array]) -> None:
    first = signature.past[0].name
    if odd := set(prefix) ^ {spec.name for spec in signature.past}:
        raise ExecutionError(
            f"a prefix must have exactly the cache inputs; these differ:\n{listed(odd)}"
        )
    for spec in signature.past:
        array = prefix[spec.name]
        _, heads, _, dim = spec.dims
        if (
            array.ndim != 4
            or array.shape[0] not in (1, batch)
            or array.shape[1::2] != (heads, dim)
        ):
            raise ExecutionError(
                f"the prefix's {spec.name} has shape {list(array.shape)}; "
                f"it must be [1, {heads}, length, {dim}]"
            )
        if array.dtype.name != spec.dtype:
            raise ExecutionError(
                f"the prefix's {spec.name} is {array.dtype.name}; it must be {spec.dtype}"
            )
        if array.shape[2] != prefix[first].shape[2]:
            raise ExecutionError(
                f"the prefix's {spec.name} is {array.shape[2]} tokens long; "
                f"{first} is {prefix[first].shape[2]}"
            )
