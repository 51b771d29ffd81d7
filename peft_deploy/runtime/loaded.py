"""A bundle opened for use: its runner, its tokenizer, and text from prompts."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, overload

from peft_deploy.bundle.manifest import Manifest
from peft_deploy.errors import (
    AdapterError,
    BundleError,
    CheckpointError,
    ConfigError,
    ExecutionError,
)
from peft_deploy.runtime.encoder_decoder import EncoderDecoderRunner
from peft_deploy.runtime.generation import Generation, GenerationOptions
from peft_deploy.runtime.onnx_runner import OnnxRunner
from peft_deploy.runtime.opening import BundleRunner
from peft_deploy.runtime.prefix_shelf import AnyPrefix, PrefixShelf
from peft_deploy.runtime.reading import (
    Floats,
    Prediction,
    TextInput,
    embeddings,
    predictions,
    read_texts,
    require_output,
)
from peft_deploy.runtime.runner import Array
from peft_deploy.runtime.sampling import Sampling
from peft_deploy.runtime.session import Session
from peft_deploy.runtime.text_generation import TextRun, encode_prompts
from peft_deploy.signature import LOGITS, SENTENCE_EMBEDDING
from peft_deploy.text.padding import Side, pad_batch
from peft_deploy.text.special_tokens import MODEL_CONFIG, read_json
from peft_deploy.text.tokenizer import TOKENIZER, Tokenizer


class LoadedBundle:
    """A bundle in memory; made by :func:`load_bundle`.

    Args:
        folder: where it lies.
        manifest: what it says about itself.
        runner: its graph under ONNX Runtime, or Paddle Inference for a bundle in Paddle's format; or both of its
            graphs.
        tokenizer: None when the bundle was made from a model without ``tokenizer.json``.
        context_length: the most tokens that the model can see; None when its configuration does
            not say.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        runner: BundleRunner,
        tokenizer: Tokenizer | None,
        context_length: int | None,
    ) -> None:
        self.folder = folder
        self.manifest = manifest
        self.runner = runner
        self.context_length = context_length
        self._tokenizer = tokenizer
        self._prefixes = PrefixShelf(folder, manifest)
        self._lock = threading.Lock()  # two requests may be the first to name an adapter

    @cached_property
    def session(self) -> Session:
        """The same graph with adapters that are loaded and unloaded.

        Raises:
            BundleError: the bundle is in Paddle's static format, which has no slots for adapters.
        """
        runner = self.runner if isinstance(self.runner, OnnxRunner) else None
        return Session(self.folder, runner=runner)

    def with_adapter(self, adapter: str | Path, *, scale: float = 1.0) -> LoadedBundle:
        """The same bundle with an adapter active in everything that it does; both share the graph.

        Args:
            adapter: as for :meth:`start`.
            scale: multiplies what the adapter adds.

        Raises:
            AdapterError: there is no such adapter, or it does not fit the graph.
        """
        adapted = copy.copy(self)
        adapted.runner = self._runner_with(adapter, scale)
        adapted.context_length = self._context_length(adapter, None)
        return adapted

    @property
    def prefixes(self) -> tuple[str, ...]:
        """Names of the prefixes that the bundle has."""
        return self._prefixes.names

    @property
    def tokenizer(self) -> Tokenizer:
        """The bundle's tokenizer.

        Raises:
            BundleError: the bundle has none.
        """
        if self._tokenizer is None:
            raise BundleError(
                f"{self.folder} has no {TOKENIZER}, so it takes token ids and no text",
                hint=f"put the model's {TOKENIZER} beside the base model and export again",
            )
        return self._tokenizer

    @overload
    def generate(self, prompts: str, **options: Any) -> Generation: ...

    @overload
    def generate(self, prompts: Sequence[str], **options: Any) -> list[Generation]: ...

    def generate(
        self, prompts: str | Sequence[str], **options: Any
    ) -> Generation | list[Generation]:
        """What the model says after one prompt, or after each of several in one padded batch.

        Args:
            prompts: a text, or several.
            options: as for :meth:`start`.

        Returns:
            One result for a text, a list of them for several.
        """
        results = self.start(prompts, **options).results
        return results[0] if isinstance(prompts, str) else results

    def embed(
        self, texts: str | Sequence[str], *, batch_size: int = 32, truncate: bool = False
    ) -> Floats:
        """The sentence embedding of each text.

        Args:
            texts: a text, or several.
            batch_size: texts in one padded batch; padding does not change the result.
            truncate: cut texts that are longer than the model can see, rather than refuse them.

        Returns:
            [N, E], one row a text.

        Raises:
            ConfigError: no text, or one that is too long.
            BundleError: the bundle has no tokenizer.
            ExecutionError: the bundle gives no sentence embeddings, or does not run.

        Example:
            >>> bundle = load_bundle("out")  # doctest: +SKIP
            >>> bundle.embed(["A ship.", "A vessel."]).shape  # doctest: +SKIP
            (2, 384)
        """
        wanted = "sentence embeddings (export --pooling mean|cls)"
        require_output(self.runner.signature, SENTENCE_EMBEDDING, rank=2, wanted=wanted)
        several = [texts] if isinstance(texts, str) else list(texts)
        options: dict[str, Any] = {"batch_size": batch_size, "truncate": truncate}
        return embeddings(self.read(several, outputs=[SENTENCE_EMBEDDING], **options))

    def predict(
        self,
        texts: TextInput | Sequence[TextInput],
        *,
        batch_size: int = 32,
        truncate: bool = False,
    ) -> list[Prediction]:
        """What a classifier says of each text, or of each pair of texts.

        Args:
            texts: a text or a pair (a tuple of two), or several.
            batch_size: texts in one padded batch; padding does not change the result.
            truncate: cut texts that are longer than the model can see, rather than refuse them.

        Raises:
            ConfigError: no text, or one that is too long.
            BundleError: the bundle has no tokenizer.
            ExecutionError: the bundle does not classify texts, or does not run.
        """
        require_output(self.runner.signature, LOGITS, rank=2, wanted="one class a text")
        options: dict[str, Any] = {"batch_size": batch_size, "truncate": truncate}
        with as_bundle_error():
            config = read_json(self.folder / MODEL_CONFIG)
        return predictions(self.read(texts, outputs=[LOGITS], **options), config)

    def read(
        self,
        texts: TextInput | Sequence[TextInput],
        *,
        outputs: Sequence[str] | None = None,
        batch_size: int = 32,
        truncate: bool = False,
    ) -> list[dict[str, Array]]:
        """What an encoder says of each text: output → array, of the text's own tokens, no padding.

        Args:
            texts: a text or a pair (a tuple of two), or several.
            outputs: names of the outputs; all when None.
            batch_size: texts in one padded batch; padding does not change the result.
            truncate: cut texts that are longer than the model can see, rather than refuse them.

        Raises:
            ConfigError: no text, or one that is too long.
            BundleError: the bundle has no tokenizer.
            ExecutionError: the model is no encoder, or the graph does not run.
        """
        several = [texts] if isinstance(texts, str | tuple) else list(texts)
        return read_texts(
            self.runner,
            self.tokenizer,
            several,
            outputs=outputs,
            limit=self.context_length,
            batch_size=batch_size,
            truncate=truncate,
        )

    def start(
        self,
        prompts: str | Sequence[str],
        *,
        chat: bool = False,
        system: str | None = None,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | None = None,
        padding: Side = "left",
        adapter: str | Path | None = None,
        adapters: Sequence[str | Path | None] | None = None,
        scale: float = 1.0,
        prefix: AnyPrefix | None = None,
    ) -> TextRun:
        """A generation to iterate over for the text as it comes.

        Args:
            prompts: a text, or several for one padded batch.
            chat: put the prompts into the model's chat template.
            system: with ``chat``, the system's message.
            max_new_tokens: the most tokens that a prompt may get.
            temperature: 0 takes the most likely token always.
            top_k: draw from the k most likely tokens only; 0 means all.
            top_p: draw from the most likely tokens that together reach p; 1 means all.
            seed: makes the draws repeatable.
            padding: the side on which shorter prompts are filled up.
            adapter: a name from the bundle's manifest, an ``.onnx_adapter`` file, or the name of one
                that :attr:`session` has loaded; it is loaded when it is first used.
            adapters: with a bank, such a name for each prompt, None for one without.
            scale: multiplies what the adapter adds.
            prefix: what every prompt begins after: the name of one of the bundle's prefixes, a file, or cache
                input → [1, K, P, D].

        Raises:
            AdapterError: there is no such adapter, or it does not fit the graph.
            ConfigError: an option outside its range, an empty prompt, or one that is too long.
            BundleError: the bundle has no tokenizer.
            AdapterError: there is no such prefix, or it is damaged or not of this model.
            ExecutionError: the graph does not run, or cannot generate.
        """
        if not self.runner.signature.past:
            raise ExecutionError(
                f"{self.folder} has no cache (past_key_values), so it cannot continue texts",
                hint="an encoder reads them: load_bundle(…).embed, .predict or .read in Python",
            )
        if system is not None and not chat:
            raise ConfigError("a system message needs the chat template", hint="add chat (--chat)")
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        runner = self._runner_with(adapter, scale, adapters)
        sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
        options = GenerationOptions(
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            stop_ids=self.tokenizer.eos_ids,
            pad_id=self.tokenizer.pad_id,
            padding=padding,
            context_length=self._context_length(adapter, prefix),
        )
        rows = encode_prompts(self.tokenizer, texts, chat=chat, system=system)
        if isinstance(runner, EncoderDecoderRunner):
            if prefix is not None:
                raise AdapterError(f"{self.folder} has two graphs, which take no prefix")
            return self._start_behind(runner, rows, options)
        return TextRun(runner, self.tokenizer, rows, options, self._prefixes.find(prefix))

    def _start_behind(
        self, runner: EncoderDecoderRunner, sources: list[list[int]], options: GenerationOptions
    ) -> TextRun:
        """The prompts are what the encoder reads, and every row begins anew."""
        batch = pad_batch(sources, options.pad_id, options.padding)
        reading = runner.reading(batch.input_ids, batch.attention_mask)
        begun = [[runner.start_token_id] for _ in sources]
        return TextRun(reading, self.tokenizer, begun, options, read=batch.lengths.tolist())

    def _context_length(self, adapter: str | Path | None, prefix: AnyPrefix | None) -> int | None:
        """What is left behind a prefix that an adapter puts into slots."""
        if adapter is None or self.context_length is None:
            return self.context_length
        return self.context_length - self.session.prefix_in_slots(str(adapter), prefix)

    def _runner_with(
        self,
        adapter: str | Path | None,
        scale: float,
        adapters: Sequence[str | Path | None] | None = None,
    ) -> BundleRunner:
        if adapters is not None:
            names = [None if one is None else str(one) for one in adapters]
            self._load({str(one): one for one in adapters if one is not None})
            own = None if adapter is None else str(adapter)
            return self.session.runner(own, adapters=names, scale=scale)
        if adapter is None:
            if scale != 1:
                raise ConfigError(f"the scale {scale:g} is that of an adapter, and none was named")
            return self.runner
        self._load({str(adapter): adapter})
        return self.session.runner(str(adapter), scale=scale)

    def _load(self, adapters: Mapping[str, str | Path]) -> None:
        """Loads those that the session does not have yet."""
        with self._lock:
            for name, adapter in adapters.items():
                if name not in self.session.adapters:
                    self.session.load_adapter(adapter, name)


@contextmanager
def as_bundle_error() -> Iterator[None]:
    """A tokenizer or configuration that cannot be read is, inside a bundle, the bundle's fault."""
    try:
        yield
    except CheckpointError as exc:
        raise BundleError(exc.message, hint=exc.hint) from exc
