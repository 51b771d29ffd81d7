"""The adapters of a session stacked for one graph, so that each row of a batch can use its own."""

from __future__ import annotations

from collections.abc import Sequence

from peft_deploy.bundle.adapter_bank import stack_adapters
from peft_deploy.errors import AdapterError, ConfigError
from peft_deploy.runtime.loaded_adapter import LoadedAdapter
from peft_deploy.runtime.onnx_runner import OnnxRunner

_NONE = 0  # the id of rows without an adapter


class AdapterBank:
    """All adapters that a session has loaded, in the slots of a bank; never changes.

    A session makes another one when an adapter comes or goes; requests keep the one that they began with.

    Args:
        base: the graph, nothing in its slots.
        adapters: in order; the first one's id is 1.
    """

    def __init__(self, base: OnnxRunner, adapters: Sequence[LoadedAdapter]) -> None:
        self._base = base
        self._ids = {adapter.name: i for i, adapter in enumerate(adapters, 1)}
        self._stacked: LoadedAdapter | None = None
        if adapters:
            stacked = stack_adapters(base.slots, [adapter.tensors for adapter in adapters])
            self._stacked = LoadedAdapter("bank", base.path, stacked, base.provider)

    def runner(self, names: str | Sequence[str | None], scale: float = 1.0) -> OnnxRunner:
        """The graph with these adapters active.

        Args:
            names: one for all rows of any batch, or one a row, None for a row without.
            scale: multiplies what LoRA adds in every row.

        Raises:
            AdapterError: one is not loaded, or multiplied it does not fit its type.
            ConfigError: the scale is not a finite number, or there are no rows.
        """
        if not isinstance(names, str) and not names:
            raise ConfigError(
                "no row of the batch was named an adapter", hint="give one a row; None is none"
            )
        ids = self._id(names) if isinstance(names, str) else [self._id(name) for name in names]
        values = {} if self._stacked is None else self._stacked.values(scale)
        return self._base.with_slots(values, ids)

    def _id(self, name: str | None) -> int:
        if name is None:
            return _NONE
        if name not in self._ids:
            known = ", ".join(self._ids)
            raise AdapterError(
                f"no adapter {name!r} is loaded",
                hint=f"there is {known}" if known else "load_adapter() it first",
            )
        return self._ids[name]


def check_capacity(names: Sequence[str], capacity: int | None, new: str) -> None:
    """Passes when one more adapter fits into the bank.

    Args:
        names: of those in it.
        capacity: of the bank; None when there is none.
        new: name of the one more.

    Raises:
        AdapterError: the bank is full.
    """
    if capacity is not None and len(names) >= capacity:
        raise AdapterError(
            f"the bank holds {capacity} adapters at most, and has {', '.join(names)}; there is no room for {new}",
            hint="unload one of them, or export the bundle with a larger --adapter-bank",
        )
