"""One graph in memory, adapters that come and go, and requests that each name theirs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from peft_deploy.bundle.manifest import Manifest
from peft_deploy.bundle.prefixes import Prefix
from peft_deploy.bundle.slots import Slot
from peft_deploy.errors import AdapterError, BundleError, ExecutionError
from peft_deploy.runtime.adapter_shelf import Adapters, AdapterShelf, RowAdapters, names_of
from peft_deploy.runtime.caching import initial_cache
from peft_deploy.runtime.encoder_decoder import EncoderDecoderRunner
from peft_deploy.runtime.generation import Generation, GenerationOptions, generate
from peft_deploy.runtime.onnx_runner import OnnxRunner
from peft_deploy.runtime.opening import open_runner
from peft_deploy.runtime.prefix_shelf import AnyPrefix, PrefixShelf
from peft_deploy.runtime.runner import Array
from peft_deploy.signature import INPUT_IDS, GraphSignature


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
        self._adapters = AdapterShelf(self.folder, self.manifest, self._base)
        self._prefixes = PrefixShelf(self.folder, self.manifest)

    @property
    def signature(self) -> GraphSignature:
        """Inputs and outputs of the graph, slots left out."""
        return self._base.signature

    @property
    def slots(self) -> Mapping[str, Slot]:
        """The graph's slots by name, as the file of one adapter fills them."""
        return self._adapters.slots

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the adapters that are loaded, in the order in which they came."""
        return self._adapters.names

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
        return self._adapters.load(adapter, name)

    def unload_adapter(self, name: str) -> None:
        """Forgets an adapter; requests under way keep it until they have ended.

        Raises:
            AdapterError: it is not loaded.
        """
        self._adapters.unload(name)

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
        return self._adapters.runner(adapter, adapters, scale)

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
        names = names_of(adapter)
        tokens = self._adapters.prefix_tokens(names)
        if tokens and prefix is not None:
            raise AdapterError(
                f"a prefix was given, and {', '.join(names)} puts one into the graph's slots",
                hint="leave one of the two out",
            )
        return tokens


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
