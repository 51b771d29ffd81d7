"""What every model around a model has in common, whatever the adapter's method is. Needs Paddle."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

from paddle import nn

from peft_deploy.errors import AdapterError

if TYPE_CHECKING:
    from typing_extensions import Self


class ModelWrapper(nn.Layer):  # type: ignore[misc]
    """A model with an adapter; what it has not itself, the model in it has.

    Attributes:
        model: the base model.
        counterpart: module and name of PaddleNLP's class of the same purpose.
        refused: methods that PaddleNLP's class has and this one has not, with what to do instead.
    """

    model: nn.Layer
    counterpart: ClassVar[tuple[str, str]]
    refused: ClassVar[Mapping[str, str]] = MappingProxyType({})

    def train(self, mode: bool = True) -> Self:
        """Training mode."""
        super().train(mode)
        return self

    def eval(self) -> Self:
        """Evaluation mode."""
        super().eval()
        return self

    def print_trainable_parameters(self) -> None:
        """Prints how many of the parameters of model and adapter are trained."""
        parameters = {id(p): p for p in self.parameters()}.values()
        trainable = sum(p.size for p in parameters if not p.stop_gradient)
        total = sum(p.size for p in parameters)
        share = trainable / total if total else 0.0
        # The one thing here that prints: the specification's name for it promises that.
        print(  # noqa: T201
            f"Frozen parameters: {total - trainable:.2e} || "
            f"Trainable parameters:{trainable:.2e} || "
            f"Total parameters:{total:.2e}|| Trainable:{share:.2%}"
        )

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        """PaddleNLP's own class once that is loaded, for ``isinstance``.

        Its Trainer asks this way whether to save the adapter only, and how to load it again.
        """
        module, name = self.counterpart
        return getattr(sys.modules.get(module), name, type(self))

    def __getattr__(self, name: str) -> Any:
        """What this wrapper has not, the model has: ``generate``, ``config``, ``to_static``."""
        if name in type(self).refused:
            raise AdapterError(
                f"{type(self).__name__}.{name} of paddlenlp.peft is not supported",
                hint=type(self).refused[name],
            )
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":  # not there yet: while being copied
                raise
            return getattr(self.model, name)
