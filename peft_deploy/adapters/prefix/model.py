"""PrefixModelForCausalLM: a model whose every layer sees trained keys and values first."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import paddle
from paddle import nn

from peft_deploy.adapters.arrays import dtype_name
from peft_deploy.adapters.formats.prefix import read_prefix
from peft_deploy.adapters.prefix.encoder import build_encoder, past_split
from peft_deploy.adapters.prefix.errors import PrefixInputError, UnsupportedPrefixModelError
from peft_deploy.adapters.prefix.generation import generation_view, token_mask
from peft_deploy.adapters.prefix.inputs import PadMask, PrefixInputs, is_empty
from peft_deploy.adapters.prefix.postprocess import (
    Past,
    Postprocess,
    arrange_past,
    imported,
    postprocess_for,
)
from peft_deploy.adapters.prefix.prefix_files import load_into, save_prefix
from peft_deploy.adapters.prefix.sizes import resolve_config
from peft_deploy.adapters.prefix.state import load_state
from peft_deploy.adapters.wrapper import ModelWrapper
from peft_deploy.config import PrefixConfig, PrefixConfigError
from peft_deploy.families import known_past_rules


class PrefixModelForCausalLM(ModelWrapper):
    """A causal language model with P prefix tokens in front of everything it reads.

    The prefix is P keys and values for every layer, made by a small encoder, and given to the model
    as a past; the model itself is not changed. The tokens' positions do not move: what a model
    does with a past and no ``position_ids`` (Llama counts from 0, GPT and Mistral from P) is left
    to it. A class that computes something else than it is given to behind a past that it has not
    computed itself (PaddleNLP's RW, which paddlenlp.peft therefore cannot give a prefix) is put
    right in every call.

    Args:
        model: a causal language model whose ``forward`` takes ``past_key_values`` or ``cache``.
        prefix_config: the prefix's options; copied, and sizes that are None filled in from the
            model.
        postprocess_past_key_value: from the encoder's output [B, P, 2·L, K, D], the keys of all
            layers first, to what the model takes; chosen by the model's type when None.
        pad_attention_mask: ``f(input_ids.shape, P, attention_mask)`` gives the mask [..., P + T]
            with the prefix's columns; they are ones in front when None.

    Raises:
        PrefixConfigError: a size is missing, or contradicts the model; also a ValueError.
        UnsupportedPrefixModelError: the model takes no past, is a pipeline model, or no arrangement
            of the past is known for its type; also a NotImplementedError.

    Example:
        >>> model = PrefixModelForCausalLM(llama, PrefixConfig(num_prefix_tokens=8))
        ... # doctest: +SKIP
        >>> model.prefix_encoder[0].weight.shape  # doctest: +SKIP
        [8, 2048]
    """

    counterpart = ("paddlenlp.peft.prefix", "PrefixModelForCausalLM")

    def __init__(
        self,
        model: nn.Layer,
        prefix_config: PrefixConfig,
        postprocess_past_key_value: Postprocess | None = None,
        pad_attention_mask: PadMask | None = None,
    ) -> None:
        super().__init__()
        _refuse(model, prefix_config)
        self.prefix_config, self.head_dim = resolve_config(prefix_config, model)
        self._inputs = PrefixInputs(model, self.prefix_config.num_prefix_tokens or 0)
        self._split = past_split(self.prefix_config, self.head_dim)
        # Before the model: an OPT claims to have every attribute, which would then be taken for registered.
        self.register_buffer(
            "prefix_tokens",
            paddle.arange(self.prefix_config.num_prefix_tokens, dtype="int64"),
            persistable=False,
        )
        self.model = model
        self.prefix_encoder = build_encoder(self.prefix_config, self.head_dim)
        self.postprocess_past_key_value = postprocess_past_key_value or _postprocess(self._inputs)
        self.pad_attention_mask = pad_attention_mask
        rule = self._inputs.rule
        self._put_right = imported(rule.call) if rule is not None and rule.call else None
        self.base_fingerprint: str | None = None
        self.training = model.training
        (self.prefix_encoder.train if model.training else self.prefix_encoder.eval)()
        self.mark_only_prefix_as_trainable()

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Layer,
        prefix_path: str | os.PathLike[str],
        postprocess_past_key_value: Postprocess | None = None,
        pad_attention_mask: PadMask | None = None,
        *,
        prefix_config: PrefixConfig | None = None,
        variant: str | None = None,
    ) -> PrefixModelForCausalLM:
        """A model with a saved prefix; strict about every key.

        Args:
            model: the base model that the prefix was trained on.
            prefix_path: the folder that :meth:`save_pretrained` or the reference wrote.
            postprocess_past_key_value: as for the class.
            pad_attention_mask: as for the class.
            prefix_config: in place of the folder's ``prefix_config.json``.
            variant: as given to :meth:`save_pretrained`.

        Raises:
            AdapterError: files missing or damaged, or keys missing, unexpected or mis-shaped.
            PrefixConfigError: the configuration is for another model.
        """
        prefix = read_prefix(Path(prefix_path), prefix_config, variant)
        was_frozen = [(p, p.stop_gradient) for p in model.parameters()]
        instance = cls(model, prefix.config, postprocess_past_key_value, pad_attention_mask)
        try:
            load_into(instance, prefix)
        except BaseException:
            for parameter, stop_gradient in was_frozen:
                parameter.stop_gradient = stop_gradient
            raise
        return instance

    def forward(
        self,
        input_ids: paddle.Tensor | None = None,
        attention_mask: paddle.Tensor | None = None,
        position_ids: paddle.Tensor | None = None,
        labels: paddle.Tensor | None = None,
        inputs_embeds: paddle.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """What the model gives for tokens behind the prefix.

        Args:
            input_ids: [B, S].
            attention_mask: a keep-mask of the tokens without the prefix, [B, T], [B, S, T] or
                [B, 1, S, T] with T = S, or T = S + the tokens in a past that is given; None
                attends to everything.
            position_ids: [B, S] of the tokens; not moved by P.
            labels: passed to the model, which then computes a loss.
            inputs_embeds: [B, S, E], in place of ``input_ids`` where the model takes that.
            kwargs: passed to the model. A past that is given (``past_key_values``, ``cache``) is
                one that this model returned: the prefix is in it.

        Raises:
            PrefixInputError: neither tokens nor embeddings, a mask that is no keep-mask or has
                another length, or more tokens than the model has positions; also a ValueError.
        """
        past = kwargs.pop(self._inputs.past_argument, None)
        shape = self._inputs.shape(input_ids, inputs_embeds)
        optional = {
            "input_ids": input_ids,
            "inputs_embeds": inputs_embeds,
            "position_ids": position_ids,
            "labels": labels,
        }
        kwargs.update({name: value for name, value in optional.items() if value is not None})
        kwargs.update(self._with_prefix(shape, attention_mask, past))
        return self._called(**kwargs)

    def generate(self, input_ids: paddle.Tensor | None = None, **kwargs: Any) -> Any:
        """The model's own ``generate`` behind the prefix; the model is not touched meanwhile.

        Args:
            input_ids: [B, S].
            kwargs: as for the model's ``generate``. Without an ``attention_mask``, padding tokens
                are left out of attention, as PaddleNLP decides it: where ``pad_token_id`` occurs
                and is no end token.

        Raises:
            PrefixInputError: no ``input_ids``, ``inputs_embeds``, a mask that is no keep-mask, or
                more tokens than the model has positions; also a ValueError.
        """
        if input_ids is None:
            raise PrefixInputError("input_ids must be provided to generate behind a prefix")
        if kwargs.get("inputs_embeds") is not None:
            raise PrefixInputError("generate() takes input_ids, not inputs_embeds")
        if not hasattr(self.model, "generate"):
            raise UnsupportedPrefixModelError(f"a {type(self.model).__name__} cannot generate")
        if kwargs.get("attention_mask") is None:
            kwargs["attention_mask"] = token_mask(self.model, input_ids, kwargs)
        if kwargs.get("position_ids") is None:
            kwargs.pop("position_ids", None)
            if self._inputs.counts_from_zero:
                tokens = paddle.arange(input_ids.shape[1], dtype="int64")
                kwargs["position_ids"] = tokens.expand(input_ids.shape)
        call = None if self._put_right is None else self._called
        view = generation_view(self.model, self._prepare, call)
        return view.generate(input_ids=input_ids, **kwargs)

    def mark_only_prefix_as_trainable(self) -> None:
        """Freezes the model, and nothing of the prefix's encoder."""
        for parameter in self.model.parameters():
            parameter.stop_gradient = True
        for parameter in self.prefix_encoder.parameters():
            parameter.stop_gradient = False

    def get_trainable_state_dict(self) -> OrderedDict[str, paddle.Tensor]:
        """The encoder's parameters under the names of the file."""
        return OrderedDict(self.prefix_encoder.state_dict())

    def set_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Loads weights of the prefix, of the base model, or both; everything or nothing.

        Args:
            state_dict: tensors or arrays, the encoder's under the names of the file (``0.weight``)
                or of :meth:`state_dict`.
            args: ignored, for the signature of ``nn.Layer``.
            kwargs: ignored, too.

        Returns:
            The names of :meth:`state_dict` that were not given, and an empty list: as ``nn.Layer``
            does.

        Raises:
            AdapterError: unknown names, other shapes, or some but not all of the encoder's tensors.
        """
        return load_state(self, state_dict), []

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        merge_tensor_parallel: bool = True,
        *,
        variant: str | None = None,
        is_main_process: bool | None = None,
        **kwargs: Any,
    ) -> None:
        """Writes the prefix in the reference's format.

        The folder then has ``prefix_model_state.pdparams``, ``prefix_config.json``,
        ``pre_caches.npy`` (keys and values [L, 2, K, P, D], without dropout whatever the mode of
        the model is), and ``peft_deploy_adapter.json`` with where the prefix comes from.

        Args:
            save_directory: made when it is missing.
            merge_tensor_parallel: without effect, as there is a single rank.
            variant: stands before the extension of the weight file.
            is_main_process: whether this process writes; rank 0 when None.
            kwargs: ignored; PaddleNLP's Trainer passes more.

        Raises:
            OutputError: the folder cannot be written.
            AdapterError: NaN or infinity in the prefix.
        """
        main = paddle.distributed.get_rank() == 0 if is_main_process is None else is_main_process
        if main:  # every data-parallel rank holds the same prefix
            save_prefix(self, Path(save_directory), variant)

    def prefix_past(self) -> Past:
        """The prefix's keys and values in the layout of bundles: L pairs of [1, K, P, D]."""
        return arrange_past(self._encoded(1), "BKSD")

    def _get_past_key_values(self, batch_size: int) -> Any:
        """The prefix as the model takes it, for every row of a batch."""
        return self.postprocess_past_key_value(self._encoded(batch_size))

    def _encoded(self, batch_size: int) -> paddle.Tensor:
        """Keys and values of all layers, [B, P, 2·L, K, D], in the model's own type."""
        tokens = self.prefix_tokens.unsqueeze(0).expand([batch_size, -1])
        past = self.prefix_encoder(tokens)  # [B, P, 2·L·K·D]
        own = next(iter(self.model.named_parameters()))[1].dtype
        if dtype_name(self.prefix_encoder[0].weight) != str(own).rpartition(".")[2]:
            past = past.astype(own)
        return past.reshape([-1, *self._split])

    def _with_prefix(
        self, shape: list[int], attention_mask: paddle.Tensor | None, past: Any
    ) -> dict[str, Any]:
        """The past and the mask that the model is called with.

        Args:
            shape: [B, S] of the new tokens.
            attention_mask: without the prefix's columns.
            past: one that this model returned, or nothing.
        """
        own = None if is_empty(past) else past
        self._inputs.check_lengths(own, shape[1], attention_mask)
        result = {}
        if attention_mask is not None:
            result["attention_mask"] = self._inputs.widened(
                attention_mask, shape, self.pad_attention_mask
            )
        result[self._inputs.past_argument] = own or self._get_past_key_values(shape[0])
        return result

    def _called(self, **arguments: Any) -> Any:
        """What the model gives, with the prefix among the arguments."""
        if self._put_right is None:
            return self.model(**arguments)
        return self._put_right(self.model, arguments, self._inputs.num_tokens)

    def _prepare(
        self, prepare: Callable[..., dict[str, Any]], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        """The inputs of one step of generation, behind the prefix."""
        inputs = prepare(*args, **kwargs)
        mask = inputs.get("attention_mask")
        if mask is None:  # GPT drops it
            mask = kwargs.get("attention_mask")
        if self._inputs.counts_from_past and "position_ids" not in kwargs:
            # Counted by the model itself, as in forward(); Mistral would count from 0 here.
            inputs["position_ids"] = None
        past = inputs.pop(self._inputs.past_argument, None)
        if not self._inputs.hands_on_past:
            past = self._inputs.handed_on(inputs, kwargs)
        inputs.update(self._with_prefix(list(inputs["input_ids"].shape), mask, past))
        return inputs


PrefixModel = PrefixModelForCausalLM


def _postprocess(inputs: PrefixInputs) -> Postprocess:
    if inputs.rule is None:
        raise UnsupportedPrefixModelError(
            f"how a {inputs.model_name} takes a past is not known; known are the models of "
            + ", ".join(known_past_rules()),
            hint="give postprocess_past_key_value",
        )
    return postprocess_for(inputs.rule.layout, inputs.rule.cache_class)


def _refuse(model: Any, config: Any) -> None:
    if not isinstance(model, nn.Layer) or not isinstance(config, PrefixConfig):
        raise PrefixConfigError(
            "PrefixModelForCausalLM takes a paddle.nn.Layer and a PrefixConfig, "
            f"not a {type(model).__name__} and a {type(config).__name__}"
        )
    if isinstance(model, paddle.distributed.fleet.meta_parallel.PipelineLayer):
        raise UnsupportedPrefixModelError(
            f"{type(model).__name__} is a pipeline model, which prefix-tuning does not support"
        )
    if isinstance(model, PrefixModelForCausalLM):
        raise PrefixConfigError("the model has a prefix already", hint="wrap its .model")
