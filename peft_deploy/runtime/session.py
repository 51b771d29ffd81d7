"""One graph in memory, adapters that come and go, and requests that each name theirs."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from peft_deploy.bundle.adapter_bank import adapter_slots, bank_capacity
from peft_deploy.bundle.adapter_files import ADAPTER_SUFFIX, adapter_path
from peft_deploy.bundle.manifest import Manifest
from peft_deploy.bundle.prefixes import Prefix
from peft_deploy.bundle.slots import Slot
from peft_deploy.errors import AdapterError, BundleError, ConfigError, ExecutionError
from peft_deploy.runtime.adapter_bank import AdapterBank, check_capacity
from peft_deploy.runtime.caching import initial_cache
from peft_deploy.runtime.encoder_decoder import EncoderDecoderRunner
from peft_deploy.runtime.generation import Generation, GenerationOptions, generate
from peft_deploy.runtime.loaded_adapter import LoadedAdapter, read_for_slots
from peft_deploy.runtime.onnx_runner import OnnxRunner
from peft_deploy.runtime.opening import open_runner
from peft_deploy.runtime.prefix_shelf import AnyPrefix, PrefixShelf
from peft_deploy.runtime.runner import Array
from peft_deploy.signature import INPUT_IDS, GraphSignature

Adapters = str | Sequence[str] | None
RowAdapters = Sequence[str | None] | None


class Session:
    """A bundle's graph under ONNX Runtime with adapters that are loaded, used by name and unloaded.

    Any number of threads may use it. A request holds on to the adapters that it began with: one that is unloaded
    meanwhile is freed when the last request that uses it has ended. Without an adapter a request gets the base
    model, exactly, whatever was used before.

    Of a bundle with a bank of adapters (``export --adapter-bank``), the rows of one batch can use different ones.

    Args:
        bundle: the bundle's folder.
        provider: ``"cpu"`` or ``"cuda"``.
        threads: threads within one operator; None leaves it to onnxruntime (all cores).
        runner: of this bundle, where it is open already; provider and threads are then its own.

    Raises:
        MissingExtraError: onnxruntime is not installed.
        BundleError: the folder is no bundle, or not what its manifest says.
        ExecutionError: the provider is not available, or onnxruntime refuses the model.

    Example:
        >>> session = Session("out")  # doctest: +SKIP
        >>> session.load_adapter("poet")  # doctest: +SKIP
        >>> session.generate([[1, 2, 3]], GenerationOptions(), adapter="poet")  # doctest: +SKIP
    """

    def __init__(
        self,
        bundle: Path | str,
        *,
        provider: str = "cpu",
        threads: int | None = None,
        runner: OnnxRunner | None = None,
    ) -> None:
        self.folder = Path(bundle)
        self.manifest = Manifest.read(self.folder)
        self._base = runner or _open(self.folder, self.manifest, provider, threads)
        self._slots = adapter_slots(self._base.slots)
        self._prefixes = PrefixShelf(self.folder, self.manifest)
        self._loaded: Mapping[str, LoadedAdapter] = {}
        self._bank = self._stack({})
        self._lock = threading.Lock()
        self._changes = threading.Lock()  # one adapter comes or goes at a time, beside requests

    @property
    def signature(self) -> GraphSignature:
        """Inputs and outputs of the graph, slots left out."""
        return self._base.signature

    @property
    def slots(self) -> Mapping[str, Slot]:
        """The graph's slots by name, as the file of one adapter fills them."""
        return self._slots

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the adapters that are loaded, in the order in which they came."""
        with self._lock:
            return tuple(self._loaded)

    @property
    def prefixes(self) -> tuple[str, ...]:
        """Names of the bundle's prefixes, which requests may use without loading them."""
        return self._prefixes.names

    def load_adapter(self, adapter: str | Path, name: str | None = None) -> str:
        """Makes an adapter ready for use; whatever is wrong with it is found here.

        Args:
            adapter: a name from the bundle's manifest, or an ``.onnx_adapter`` file.
            name: what it is to go by; its own name, or the file's, when None.

        Returns:
            The name that requests use.

        Raises:
            AdapterError: there is no such adapter, the name is taken, the file is damaged, for another base model,
                or does not fit the graph's slots, or the bank is full. The session keeps what it had.
        """
        path = self._find(adapter)
        name = name or path.name.removesuffix(ADAPTER_SUFFIX)
        self._check_free(name)
        fingerprint = str(self.manifest.base.get("fingerprint") or "")
        read = read_for_slots(
            path,
            name,
            self._slots,
            self.folder,
            fingerprint,
            "cpu" if self._base.has_bank else self._base.provider,
            self.manifest.context_length,
        )
        with self._changes:
            if name in self._loaded:  # another thread was faster
                raise _taken(name)
            check_capacity(list(self._loaded), bank_capacity(self.manifest.graph), name)
            self._set({**self._loaded, name: read})
        return name

    def unload_adapter(self, name: str) -> None:
        """Forgets an adapter; requests under way keep it until they have ended.

        Raises:
            AdapterError: it is not loaded.
        """
        with self._changes:
            if name not in self._loaded:
                raise self._unknown(name)
            self._set({n: a for n, a in self._loaded.items() if n != name})

    def _set(self, loaded: Mapping[str, LoadedAdapter]) -> None:
        """What is loaded from now on; called with the lock of changes held."""
        bank = self._stack(loaded)
        with self._lock:
            self._loaded, self._bank = loaded, bank

    def _stack(self, loaded: Mapping[str, LoadedAdapter]) -> AdapterBank | None:
        return AdapterBank(self._base, list(loaded.values())) if self._base.has_bank else None

    def runner(
        self, adapter: Adapters = None, *, adapters: RowAdapters = None, scale: float = 1.0
    ) -> OnnxRunner:
        """The graph with these adapters active; keeps them as long as it lives.

        Args:
            adapter: the name of one that is loaded, or several that fill different slots; None for the base model.
            adapters: with a bank, one a row of the batches that the runner is to take, None for a row without.
            scale: multiplies what LoRA adds.

        Raises:
            AdapterError: one is not loaded, two fill the same slots, or rows were given theirs without a bank.
            ConfigError: the scale is not a finite number, or both ``adapter`` and ``adapters`` were given.
        """
        if adapters is not None:
            return self._bank_of(adapter).runner(list(adapters), scale)
        names = [] if adapter is None else [adapter] if isinstance(adapter, str) else list(adapter)
        if not names:
            return self._base
        if self._base.has_bank and len(names) == 1:
            return self._bank_of(None).runner(names[0], scale)
        with self._lock:
            missing = [name for name in names if name not in self._loaded]
            if missing:
                raise self._unknown(missing[0])
            active = [self._loaded[name] for name in names]
        if self._base.has_bank:
            raise AdapterError(
                f"{', '.join(names)} cannot be active together: a row of a batch uses one adapter of the bank",
                hint="name one, or one a row: adapters=[…]",
            )
        _check_disjoint(active)
        values = {slot: value for a in active for slot, value in a.values(scale).items()}
        return self._base.with_slots(values)

    def _bank_of(self, adapter: Adapters) -> AdapterBank:
        """The bank for rows that name their own adapters."""
        if adapter is not None:
            raise ConfigError(
                "adapter= is for all rows and adapters= for each one, and both were given",
                hint="leave one of the two out",
            )
        with self._lock:
            bank = self._bank
        if bank is None:
            raise AdapterError(
                f"{self.folder} has no bank of adapters, so that all rows of a batch use the same one",
                hint="export it with --adapter-bank N, or use adapter=",
            )
        return bank

    def run(
        self,
        feeds: Mapping[str, Array],
        outputs: Sequence[str] | None = None,
        *,
        adapter: Adapters = None,
        adapters: RowAdapters = None,
        prefix: AnyPrefix | None = None,
        scale: float = 1.0,
    ) -> dict[str, Array]:
        """The named outputs (all when None) of one call.

        Args:
            feeds: the graph's inputs; the cache may be left out, and is then empty or the prefix.
            outputs: names of outputs.
            adapter: as for :meth:`runner`.
            adapters: likewise, one a row.
            prefix: the name of one of the bundle's, a file, or cache input → [1, K, P, D]; the mask in ``feeds``
                has to count it, and the positions where the prefix moves them.
            scale: as for :meth:`runner`.

        Raises:
            AdapterError: as :meth:`runner`.
            ExecutionError: the inputs do not fit the signature, or onnxruntime failed.
        """
        found = self._prefixes.find(prefix)
        rows = found.past if isinstance(found, Prefix) else found
        past = [spec.name for spec in self.signature.past]
        if past and not any(name in feeds for name in past):
            arrays = initial_cache(self.signature, len(feeds[INPUT_IDS]), rows)
            feeds = {**feeds, **dict(zip(past, arrays, strict=True))}
        elif prefix is not None:
            raise ExecutionError("a prefix stands in place of the cache, and both were given")
        self.prefix_in_slots(adapter, prefix)
        return self.runner(adapter, adapters=adapters, scale=scale).run(feeds, outputs)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        options: GenerationOptions,
        *,
        adapter: Adapters = None,
        adapters: RowAdapters = None,
        prefix: AnyPrefix | None = None,
        scale: float = 1.0,
    ) -> list[Generation]:
        """What the model says after each prompt of token ids, in one padded batch.

        Args:
            prompts: token ids of each row.
            options: how.
            adapter: as for :meth:`runner`.
            adapters: likewise, one a prompt.
            prefix: what every row begins after: the name of one of the bundle's, a file, or cache input →
                [1, K, P, D].
            scale: as for :meth:`runner`.

        Raises:
            AdapterError: as :meth:`runner`.
            ConfigError, ExecutionError: as :class:`~peft_deploy.runtime.generation.GenerationRun`.
        """
        in_slots = self.prefix_in_slots(adapter, prefix)
        if options.context_length is not None and in_slots:
            options = replace(options, context_length=options.context_length - in_slots)
        runner = self.runner(adapter, adapters=adapters, scale=scale)
        return generate(runner, prompts, options, self._prefixes.find(prefix))

    def prefix_in_slots(self, adapter: Adapters, prefix: AnyPrefix | None = None) -> int:
        """How many tokens of a prefix the adapters put into slots.

        Args:
            adapter: names of adapters that are loaded.
            prefix: that is to be used beside them, if any.

        Raises:
            AdapterError: there is another prefix beside it.
        """
        names = [] if adapter is None else [adapter] if isinstance(adapter, str) else adapter
        with self._lock:
            tokens = sum(self._loaded[n].prefix_tokens for n in names if n in self._loaded)
        if tokens and prefix is not None:
            raise AdapterError(
                f"a prefix was given, and {', '.join(names)} puts one into the graph's slots",
                hint="leave one of the two out",
            )
        return tokens

    def _find(self, adapter: str | Path) -> Path:
        """The file of an adapter that was named or whose path was given."""
        own = [
            str(a["name"])
            for a in self.manifest.adapters
            if a.get("mode") == "runtime" or a.get("slots") is True
        ]
        if isinstance(adapter, str) and adapter in own:
            return adapter_path(self.folder, adapter)
        path = Path(adapter).expanduser()
        if not path.exists():
            raise AdapterError(
                f"there is no adapter {str(adapter)!r}, neither in {self.folder} nor as a file",
                hint=f"the bundle has {', '.join(own)}" if own else "give an .onnx_adapter file",
            )
        return path

    def _check_free(self, name: str) -> None:
        with self._lock:
            if name in self._loaded:
                raise _taken(name)

    def _unknown(self, name: str) -> AdapterError:
        """Called with the lock held."""
        known = ", ".join(self._loaded)
        return AdapterError(
            f"no adapter {name!r} is loaded",
            hint=f"there is {known}" if known else "load_adapter() it first",
        )


def _open(folder: Path, manifest: Manifest, provider: str, threads: int | None) -> OnnxRunner:
    runner = open_runner(folder, manifest.signature, provider=provider, threads=threads)
    if isinstance(runner, EncoderDecoderRunner):
        raise BundleError(
            f"{folder} has two graphs, which have no slots for adapters",
            hint="load_bundle() runs it as it is; its adapter is merged into it",
        )
    if not isinstance(runner, OnnxRunner):
        raise BundleError(
            f"{folder} is in Paddle's static format, which has no slots for adapters",
            hint="load_bundle() runs it as it is; export it with --format onnx for adapters",
        )
    return runner


def _taken(name: str) -> AdapterError:
    return AdapterError(
        f"an adapter {name!r} is loaded already", hint="unload it first, or give another name"
    )


def _check_disjoint(active: Sequence[LoadedAdapter]) -> None:
    """Onnxruntime would let one of the two win without a word."""
    owner: dict[str, str] = {}
    for adapter in active:
        both = {owner[slot] for slot in adapter.slots if slot in owner}
        if both:
            raise AdapterError(
                f"the adapters {', '.join(sorted(both))} and {adapter.name} fill the same slots, so they cannot "
                "be active together",
                hint="name one of them",
            )
        owner.update(dict.fromkeys(adapter.slots, adapter.name))
