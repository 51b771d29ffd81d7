"""A reference that is larger than memory: one layer after the other, each in a model of its own.

A layer takes what the one before it gives. So a model with one layer computes what that layer computes in the whole
one, when it is handed the output of the layer before in place of its own embeddings: PaddleNLP's own code, mask,
positions and cache included. Of every pass only the outputs of layers are kept; what goes on inside of one is
computed again, from the output before it, when somebody asks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy.typing as npt

from peft_deploy.errors import ExecutionError
from peft_deploy.parity.bisect.taps import OUTPUT, Key, Readings, Tapped, Taps, modules_of
from peft_deploy.progress import Progress
from peft_deploy.runtime.runner import Array, Runner
from peft_deploy.signature import GraphSignature, past_names, present_names

Hidden = Sequence[npt.NDArray[Any]]  # what a layer gave, once for each time that it was called
Load = Callable[[int], Any]


@dataclass(frozen=True)
class Stack:
    """Where a model has its layers.

    Args:
        num_layers: L.
        path: of the list of layers, with a dot behind it.
    """

    num_layers: int
    path: str

    def own(self, module: str) -> str | None:
        """The path inside of a layer: empty for the layer itself, None for what is in none."""
        index, _, rest = module.removeprefix(self.path).partition(".")
        return rest if module.startswith(self.path) and index.isdigit() else None

    def index(self, module: str) -> int:
        """The layer that a module is in."""
        return int(module.removeprefix(self.path).partition(".")[0])

    def at(self, module: str, index: int) -> str:
        """The same module in another layer; unchanged where it is in none."""
        own = self.own(module)
        return module if own is None else f"{self.path}{index}.{own}".rstrip(".")


class LayeredReference:
    """A reference of which one layer is in memory at a time, and that knows what its modules gave.

    Args:
        load: index → the reference of a model that has only this layer, and what is around the layers.
        stack: the layers.
        whole_signature: element type → the signature of the whole model's graph in it.
        progress: gets a phase counted in layers for every pass.
        dtype: of its parameters.
        written: what a layer's output becomes before the next one reads it.

    Attributes:
        values: of the last call.
    """

    values: Readings

    def __init__(
        self,
        load: Load,
        stack: Stack,
        whole_signature: Callable[[str], GraphSignature],
        progress: Progress,
        *,
        dtype: str = "float32",
        written: Callable[[Array], Array] | None = None,
    ) -> None:
        self._load = load
        self.stack = stack
        self._whole_signature = whole_signature
        self._signature = whole_signature(dtype)
        self._progress = progress
        self._dtype = dtype
        self._written = written
        self.values = {}

    @property
    def signature(self) -> GraphSignature:
        """Of the whole model's graph."""
        return self._signature

    @cached_property
    def paths(self) -> list[str]:
        """Paths of all modules of the whole model, as PaddleNLP has them."""
        one = [path for path, _ in modules_of(self._load(0).model)]
        layers = range(self.stack.num_layers)
        inside = [
            self.stack.at(p, i) for i in layers for p in one if self.stack.own(p) is not None
        ]
        return [*(path for path in one if self.stack.own(path) is None), *inside]

    def run(
        self, feeds: Mapping[str, Array], outputs: Sequence[str] | None = None
    ) -> dict[str, Array]:
        """The named outputs (all when None), layer by layer.

        Raises:
            ExecutionError: a layer does not take what the one before it gives.
        """
        count = self.stack.num_layers
        self._progress.phase("Running the reference, layer by layer", count, "layers")
        before: list[Hidden | None] = [None]
        kept: dict[Key, npt.NDArray[Any]] = {}
        results: dict[str, Array] = {}
        for index in range(count):
            made, values, given = self._run_layer(index, feeds, before[-1])
            results |= made
            before.append(given)
            output = (self.stack.at(f"{self.stack.path}0", index), OUTPUT)
            kept[output] = values[output]
            self._progress.advance(1, output[0])
        # Modules around the layers give what they give in the whole model only where the last layer stands.
        kept |= {key: value for key, value in values.items() if self.stack.own(key[0]) is None}
        self.values = _LayeredReadings(self, dict(feeds), before, kept)
        return {
            n: results[n] for n in (self._signature.output_names if outputs is None else outputs)
        }

    def inside(
        self, index: int, feeds: Mapping[str, Array], before: Hidden | None
    ) -> dict[Key, npt.NDArray[Any]]:
        """What the modules of one layer were given and returned, by their paths in the whole model.

        Args:
            index: of the layer.
            feeds: of the whole model.
            before: what the layer before it gave; None for the first.
        """
        return self._run_layer(index, feeds, before)[1]

    def exact(self) -> LayeredReference | None:
        """The same in float64; None when one layer would take too much memory."""
        if self._load(0).exact() is None:
            return None
        return LayeredReference(
            lambda index: self._load(index).in_float64(),
            self.stack,
            self._whole_signature,
            self._progress,
            dtype="float64",
        )

    def rounded(self, dtype: str, peaks: MutableMapping[str, float]) -> LayeredReference:
        """The same with what every module takes and gives rounded to a 16-bit type.

        Args:
            dtype: ``float16`` or ``bfloat16``.
            peaks: module of a model with one layer → the largest magnitude so far.
        """
        from peft_deploy.parity.reference import there_and_back

        return LayeredReference(
            lambda index: self._load(index).rounded(dtype, peaks),
            self.stack,
            self._whole_signature,
            self._progress,
            dtype=self._dtype,
            written=lambda array: there_and_back(array, dtype),
        )

    def without_adapters(self) -> None:
        """What the adapter changes is not measured layer by layer."""

    def _run_layer(
        self, index: int, feeds: Mapping[str, Array], before: Hidden | None
    ) -> tuple[dict[str, Array], dict[Key, npt.NDArray[Any]], Hidden]:
        """Outputs of the graph, what every module gave, and what the layer gave."""
        count = self.stack.num_layers
        ends = slice(2 * index, 2 * index + 2)
        past = dict(zip(past_names(count)[ends], past_names(1), strict=True))
        present = dict(zip(present_names(1), present_names(count)[ends], strict=True))
        caches = set(past_names(count)) - past.keys()
        given = {past.get(name, name): a for name, a in feeds.items() if name not in caches}
        one: Any = self._load(index)
        taps, layer = Taps(one), dict(modules_of(one.model))[f"{self.stack.path}0"]
        with _between(layer, before) as taken:
            results = taps.run(given)
        values = {(self.stack.at(path, index), what): v for (path, what), v in taps.values.items()}
        after = [array if self._written is None else self._written(array) for array in taken]
        return {present.get(n, n): a for n, a in results.items()}, values, after


class _LayeredReadings:
    """See :class:`~peft_deploy.parity.bisect.taps.Readings`; holds the insides of one layer at a time.

    Args:
        reference: computes them.
        feeds: of the call.
        before: what went into every layer.
        kept: outputs of the layers, and what is around them.
    """

    def __init__(
        self,
        reference: LayeredReference,
        feeds: Mapping[str, Array],
        before: Sequence[Hidden | None],
        kept: Mapping[Key, npt.NDArray[Any]],
    ) -> None:
        self._reference = reference
        self._feeds = feeds
        self._before = before
        self._kept = kept
        self._inside: tuple[int, Mapping[Key, npt.NDArray[Any]]] | None = None

    def get(self, key: Key, /) -> npt.NDArray[Any] | None:
        """The value of (module path, ``"output"`` or ``"input"``); None where there is none."""
        stack = self._reference.stack
        if key in self._kept or stack.own(key[0]) is None:
            return self._kept.get(key)
        index = stack.index(key[0])
        if self._inside is None or self._inside[0] != index:
            self._inside = None  # let go of the layer before the next one is loaded
            values = self._reference.inside(index, self._feeds, self._before[index])
            self._inside = index, values
        return self._inside[1].get(key)


@contextmanager
def _between(layer: Any, before: Hidden | None) -> Iterator[list[npt.NDArray[Any]]]:
    """Hands a layer what another one gave, and gives what it makes of that, call by call.

    Raises:
        ExecutionError: the layer is called in another way than the one before it was.
    """
    import paddle

    waiting = None if before is None else list(before)
    taken: list[npt.NDArray[Any]] = []

    def put(_layer: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if waiting is None:
            return None
        if not inputs or not waiting or list(inputs[0].shape) != list(waiting[0].shape):
            raise ExecutionError(
                f"{type(layer).__name__} does not take what the layer before it gives; "
                "this model cannot be computed layer by layer"
            )
        return (paddle.to_tensor(waiting.pop(0)), *inputs[1:])

    def take(_layer: Any, _inputs: Any, output: Any) -> None:
        first = output[0] if isinstance(output, (tuple, list)) else output
        taken.append(first.numpy())

    handles = [layer.register_forward_pre_hook(put), layer.register_forward_post_hook(take)]
    try:
        yield taken
    finally:
        for handle in handles:
            handle.remove()


def tapped(reference: Runner) -> Tapped:
    """A reference that knows what its modules gave: with hooks, where it does not know by itself."""
    return reference if isinstance(reference, LayeredReference) else Taps(reference)
