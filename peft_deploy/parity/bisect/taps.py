"""What goes into PaddleNLP's modules and comes out of them, read by hooks.

The numbers are those of PaddleNLP's own code, module by module, and know nothing of the graph.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from peft_deploy.runtime.runner import Array, Runner
from peft_deploy.signature import GraphSignature

OUTPUT, INPUT = "output", "input"
GRAPH = "graph output"  # what no module gives, and the graph does

Key = tuple[str, str]  # module path, OUTPUT or INPUT


class Readings(Protocol):
    """What modules were given and returned in a call."""

    def get(self, key: Key, /) -> npt.NDArray[Any] | None:
        """The value of (module path, ``"output"`` or ``"input"``); None where there is none."""
        ...


class Tapped(Runner, Protocol):
    """A runner that knows what its model's modules were given and returned in the last call."""

    @property
    def paths(self) -> list[str]:
        """Paths of all modules, as PaddleNLP has them."""
        ...

    @property
    def values(self) -> Readings:
        """Of the last call."""
        ...


def modules_of(model: Any) -> list[tuple[str, Any]]:
    """Path and module of everything in PaddleNLP's model, which a LoRA or prefix model keeps as its ``model``."""
    while type(model).__module__.startswith("peft_deploy."):
        model = model.model
    return list(model.named_sublayers())


class Taps:
    """A runner that keeps what every module of its model was given and returned in the last call.

    Args:
        runner: runs the model, and holds it as ``model``.

    Attributes:
        values: (module path, ``"output"`` or ``"input"``) → array.
    """

    values: dict[Key, npt.NDArray[Any]]

    def __init__(self, runner: Any) -> None:
        self._runner: Runner = runner
        self._model = runner.model
        self.values = {}

    @property
    def signature(self) -> GraphSignature:
        """The runner's."""
        return self._runner.signature

    @property
    def paths(self) -> list[str]:
        """Paths of all modules, as PaddleNLP has them."""
        return [path for path, _ in modules_of(self._model)]

    def run(
        self, feeds: Mapping[str, Array], outputs: Sequence[str] | None = None
    ) -> dict[str, Array]:
        """The runner's outputs."""
        self.values = {}
        with self._hooked():
            return self._runner.run(feeds, outputs)

    @contextmanager
    def _hooked(self) -> Iterator[None]:
        handles = []
        for path, module in modules_of(self._model):

            def keep(_module: Any, inputs: Any, output: Any, path: str = path) -> None:
                self._keep((path, OUTPUT), output)
                if len(inputs) > 0:
                    self._keep((path, INPUT), inputs[0])

            handles.append(module.register_forward_post_hook(keep))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _keep(self, key: Key, value: Any) -> None:
        first = value[0] if isinstance(value, (tuple, list)) and value else value
        if hasattr(first, "numpy"):
            array = first.numpy()
            if array.dtype.kind == "f":
                self.values[key] = np.array(array)
