"""The adapters of a session: loaded, used by name, unloaded; alone, together, or one a row of a batch."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

from peft_deploy.bundle.adapter_bank import adapter_slots, bank_capacity
from peft_deploy.bundle.adapter_files import ADAPTER_SUFFIX, adapter_path
from peft_deploy.bundle.manifest import Manifest
from peft_deploy.bundle.slots import Slot
from peft_deploy.errors import AdapterError, ConfigError
from peft_deploy.runtime.active_adapters import slot_values
from peft_deploy.runtime.adapter_bank import AdapterBank, check_capacity
from peft_deploy.runtime.loaded_adapter import LoadedAdapter, read_for_slots
from peft_deploy.runtime.onnx_runner import OnnxRunner

Adapters = str | Sequence[str] | None
RowAdapters = Sequence[str | None] | None


def names_of(adapter: Adapters) -> list[str]:
    """The names of adapters that are to be active in all rows."""
    return [] if adapter is None else [adapter] if isinstance(adapter, str) else list(adapter)


class AdapterShelf:
    """Any number of threads may use it; requests do not wait for adapters that come or go.

    Args:
        folder: of the bundle.
        manifest: of the bundle.
        base: the bundle's graph, nothing in its slots.
    """

    def __init__(self, folder: Path, manifest: Manifest, base: OnnxRunner) -> None:
        self._folder = folder
        self._manifest = manifest
        self._base = base
        self.slots: Mapping[str, Slot] = adapter_slots(base.slots)
        self._loaded: Mapping[str, LoadedAdapter] = {}
        self._bank = self._stack({})
        self._lock = threading.Lock()  # of the two above, which are replaced together
        self._changes = threading.Lock()  # one adapter comes or goes at a time

    @property
    def names(self) -> tuple[str, ...]:
        """Of the adapters that are loaded, in the order in which they came."""
        with self._lock:
            return tuple(self._loaded)

    def load(self, adapter: str | Path, name: str | None) -> str:
        """As :meth:`~peft_deploy.runtime.session.Session.load_adapter`."""
        path = self._find(adapter)
        name = name or path.name.removesuffix(ADAPTER_SUFFIX)
        if name in self.names:
            raise _taken(name)
        read = read_for_slots(
            path,
            name,
            self.slots,
            self._folder,
            str(self._manifest.base.get("fingerprint") or ""),
            "cpu" if self._base.has_bank else self._base.provider,
            self._manifest.context_length,
        )
        with self._changes:
            if name in self._loaded:  # another thread was faster
                raise _taken(name)
            check_capacity(list(self._loaded), bank_capacity(self._manifest.graph), name)
            self._set({**self._loaded, name: read})
        return name

    def unload(self, name: str) -> None:
        """As :meth:`~peft_deploy.runtime.session.Session.unload_adapter`."""
        with self._changes:
            if name not in self._loaded:
                raise _unknown(name, self._loaded)
            self._set({n: a for n, a in self._loaded.items() if n != name})

    def runner(self, adapter: Adapters, adapters: RowAdapters, scale: float) -> OnnxRunner:
        """As :meth:`~peft_deploy.runtime.session.Session.runner`."""
        names = names_of(adapter)
        with self._lock:
            loaded, bank = self._loaded, self._bank
        if adapters is not None:
            if adapter is not None:
                raise ConfigError(
                    "adapter= is for all rows and adapters= for each one, and both were given",
                    hint="leave one of the two out",
                )
            return self._require(bank).runner(list(adapters), scale)
        if not names:
            return self._base
        if missing := [name for name in names if name not in loaded]:
            raise _unknown(missing[0], loaded)
        if bank is None:
            active = [loaded[name] for name in names]
            return self._base.with_slots(slot_values(active, scale, self._base.provider))
        if len(names) > 1:
            raise AdapterError(
                f"{', '.join(names)} cannot be active together: a row of a batch uses one adapter of the bank",
                hint="name one, or one a row: adapters=[…]",
            )
        return bank.runner(names[0], scale)

    def prefix_tokens(self, names: Sequence[str]) -> int:
        """How many tokens of a prefix these adapters put into slots; names that are not loaded count for none."""
        with self._lock:
            loaded = self._loaded
        return sum(loaded[name].prefix_tokens for name in names if name in loaded)

    def _set(self, loaded: Mapping[str, LoadedAdapter]) -> None:
        """What is loaded from now on; called with the lock of changes held."""
        bank = self._stack(loaded)
        with self._lock:
            self._loaded, self._bank = loaded, bank

    def _stack(self, loaded: Mapping[str, LoadedAdapter]) -> AdapterBank | None:
        return AdapterBank(self._base, list(loaded.values())) if self._base.has_bank else None

    def _require(self, bank: AdapterBank | None) -> AdapterBank:
        if bank is None:
            raise AdapterError(
                f"{self._folder} has no bank of adapters, so that all rows of a batch use the same one",
                hint="export it with --adapter-bank N, or use adapter=",
            )
        return bank

    def _find(self, adapter: str | Path) -> Path:
        """The file of an adapter that was named or whose path was given."""
        own = [
            str(a["name"])
            for a in self._manifest.adapters
            if a.get("mode") == "runtime" or a.get("slots") is True
        ]
        if isinstance(adapter, str) and adapter in own:
            return adapter_path(self._folder, adapter)
        path = Path(adapter).expanduser()
        if not path.exists():
            raise AdapterError(
                f"there is no adapter {str(adapter)!r}, neither in {self._folder} nor as a file",
                hint=f"the bundle has {', '.join(own)}" if own else "give an .onnx_adapter file",
            )
        return path


def _taken(name: str) -> AdapterError:
    return AdapterError(
        f"an adapter {name!r} is loaded already", hint="unload it first, or give another name"
    )


def _unknown(name: str, loaded: Mapping[str, LoadedAdapter]) -> AdapterError:
    known = ", ".join(loaded)
    return AdapterError(
        f"no adapter {name!r} is loaded",
        hint=f"there is {known}" if known else "load_adapter() it first",
    )
