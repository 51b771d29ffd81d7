"""Random prefixes for base models on disk, and what PaddleNLP's own prefix models say."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from peft_deploy.adapters.formats.peft_prefix import write_peft_prefix
from peft_deploy.adapters.formats.prefix import read_prefix
from peft_deploy.base import open_base
from peft_deploy.base.dygraph import load_model

P = 5
NO_TOKEN = 10_000  # an end token that never comes


def fill(encoder: Any, seed: int, spread: float = 1.0) -> None:
    """Values so large that no prefix is overlooked."""
    import paddle

    rng = np.random.default_rng(seed)
    for parameter in encoder.parameters():
        values = rng.normal(0, spread, parameter.shape).astype("float32")
        parameter.set_value(paddle.to_tensor(values))


def prefix_by_us(base: Path, folder: Path, **options: Any) -> Path:
    """A prefix that this package's model wrote."""
    from peft_deploy import PrefixConfig, PrefixModelForCausalLM

    spread = options.pop("spread", 1.0)
    config = PrefixConfig(num_prefix_tokens=P, **options)
    model = PrefixModelForCausalLM(load_model(open_base(base)), config)
    fill(model.prefix_encoder, 11, spread)
    model.eval()
    model.save_pretrained(folder)
    return folder


def prefix_by_paddlenlp(base: Path, folder: Path, **options: Any) -> Path:
    """A prefix that ``paddlenlp.peft`` wrote."""
    from paddlenlp.peft import PrefixConfig, PrefixModelForCausalLM

    opened = open_base(base)
    dims = opened.dims
    config = PrefixConfig(
        num_prefix_tokens=P,
        num_attention_heads=dims.num_heads,
        multi_query_group_num=dims.num_kv_heads,
        num_hidden_layers=dims.num_layers,
        hidden_size=dims.num_heads * dims.head_dim,
        **options,
    )
    model = load_model(opened)
    arrange = arrangement(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prefixed = PrefixModelForCausalLM(model, config, postprocess_past_key_value=arrange)
    fill(prefixed.prefix_encoder, 12)
    prefixed.eval()
    prefixed.save_pretrained(str(folder))
    return folder


def prefix_by_peft(base: Path, source: Path, folder: Path) -> Path:
    """The numbers of another prefix in Hugging Face PEFT's form."""
    write_peft_prefix(folder, replace(read_prefix(source), provenance=None))
    return folder


def arrangement(model: Any) -> Any:
    """PaddleNLP's function from the encoder's output to a model's past."""
    from paddlenlp.trl.llm_utils import get_prefix_tuning_params

    return get_prefix_tuning_params(model)["postprocess_past_key_value"]


def _by_paddlenlp(model: Any, folder: Path) -> Any:
    from paddlenlp.peft import PrefixModelForCausalLM

    prefixed = PrefixModelForCausalLM.from_pretrained(
        model, str(folder), postprocess_past_key_value=arrangement(model)
    )
    prefixed.eval()
    return prefixed


def tokens_by_forward(model: Any, folder: Path, prompt: list[int], steps: int) -> list[int]:
    """Greedy tokens of ``paddlenlp.peft``'s own prefix model, without a cache but the prefix."""
    import paddle

    ids = list(prompt)
    with paddle.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prefixed = _by_paddlenlp(model, folder)
        for _ in range(steps):
            mask = paddle.ones([1, len(ids)], dtype="int64")
            out = prefixed(input_ids=paddle.to_tensor([ids]), attention_mask=mask)
            logits = out[0] if isinstance(out, tuple | list) else out
            ids.append(int(logits[0, -1].argmax()))
    return ids[len(prompt) :]


def tokens_by_paddlenlp(model: Any, folder: Path, prompt: list[int], steps: int) -> list[int]:
    """Greedy tokens of the same by PaddleNLP's ``generate``."""
    import paddle

    with paddle.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prefixed = _by_paddlenlp(model, folder)
        tokens, _ = prefixed.generate(
            input_ids=paddle.to_tensor([prompt]),
            attention_mask=paddle.ones([1, len(prompt)], dtype="int64"),
            max_length=steps,
            decode_strategy="greedy_search",
            eos_token_id=NO_TOKEN,
            pad_token_id=0,
        )
    return [int(token) for token in tokens[0]]
