"""Tiny models of the families that prefixes are tested with, and prefixes far from zero."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import paddle
from adapters_tiny import SIZES, _build
from paddle import nn
from paddlenlp import transformers
from paddlenlp.peft import prefix as reference
from paddlenlp.transformers.opt.modeling import MultiHeadAttention as OPTAttention

from peft_deploy.adapters.arrays import assign
from peft_deploy.adapters.prefix import PrefixConfig, PrefixModelForCausalLM

P = 3
IDS = np.array([[3, 14, 15, 9, 26], [5, 35, 8, 9, 7]], np.int64)
LAYERS = 2
MAX_POSITIONS = 64
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


@dataclass(frozen=True)
class Case:
    """One tiny model and what is known of it from its code, not from the package under test."""

    model: str
    options: dict[str, Any]
    kv_heads: int
    head_dim: int
    layout: str
    postprocess: str  # of the reference
    positions_after_past: bool = False
    hidden_size: int = 32
    argument: str = "past_key_values"
    counts_in_mask: bool = False  # so that position_ids mean nothing to it
    mask_dims: tuple[int, ...] = (2, 3, 4)
    pair: Any = None  # what it wants a layer's key and value in
    takes_a_past: bool = True  # PaddleNLP's own class, one that it has not computed itself


def _rw(kv_heads: int, **options: Any) -> Case:
    """RW, which counts in the mask where no positions are given; paddlenlp.peft cannot use it."""
    sizes = {"n_layer": LAYERS, "n_head": 4, **options}
    return Case(
        "RW",
        sizes,
        kv_heads,
        8,
        "BKSD",
        "none",
        counts_in_mask=True,
        mask_dims=(2,),
        takes_a_past=False,
    )


CASES = {
    "llama": Case("Llama", {"num_key_value_heads": 2}, 2, 8, "BSKD", "llama"),
    "llama-mqa": Case("Llama", {"num_key_value_heads": 1}, 1, 8, "BSKD", "llama"),
    "qwen2": Case("Qwen2", {"num_key_value_heads": 2}, 2, 8, "BSKD", "qwen"),
    "qwen": Case(
        "QWen",
        {"kv_channels": 8, "seq_length": 64, "attn_dropout_prob": 0.0, "emb_dropout_prob": 0.0},
        4,
        8,
        "BSKD",
        "qwen",
    ),
    "gemma": Case("Gemma", {"num_key_value_heads": 2, "head_dim": 16}, 2, 16, "BSKD", "llama"),
    "mistral": Case("Mistral", {"num_key_value_heads": 2}, 2, 8, "BKSD", "mistral", True),
    "bloom": Case(
        "Bloom",
        {"n_layer": LAYERS, "n_head": 4},
        4,
        8,
        "BSKD",
        "bloom",
        argument="cache",
        counts_in_mask=True,
    ),
    "gpt": Case("GPT", NO_DROPOUT, 4, 8, "BSKD", "llama", True),
    "opt": Case(
        "OPT",
        {"word_embed_proj_dim": 32, **NO_DROPOUT},
        4,
        8,
        "BKSD",
        "mistral",
        positions_after_past=True,
        argument="cache",
        counts_in_mask=True,
        mask_dims=(2,),
        pair=OPTAttention.Cache,
    ),
    "chatglm_v2": Case("ChatGLMv2", {}, 2, 8, "SBKD", "chatglm"),
    "rw": _rw(1, multi_query=True, parallel_attn=True),
    "rw-sequential": _rw(4, bias=True),
    "rw-alibi": _rw(4, alibi=True, bias=True),
    "rw-alibi-mqa": _rw(1, alibi=True, multi_query=True, parallel_attn=True),
}
GLM = {
    "num_hidden_layers": LAYERS,
    "vocab_size": SIZES["vocab_size"],
    "hidden_size": SIZES["hidden_size"],
    "ffn_hidden_size": SIZES["intermediate_size"],
    "kv_channels": 8,
    "num_attention_heads": SIZES["num_attention_heads"],
    "multi_query_group_num": 2,
    "seq_length": MAX_POSITIONS,
    "max_sequence_length": MAX_POSITIONS,
}

RW = {key: SIZES[key] for key in ("vocab_size", "hidden_size")}


def tiny(name: str, seed: int = 0, **options: Any) -> nn.Layer:
    case = CASES[name]
    sizes = {"ChatGLMv2": GLM, "RW": RW}.get(case.model, SIZES)
    config = getattr(transformers, f"{case.model}Config")(**{**sizes, **case.options, **options})
    return _build(getattr(transformers, f"{case.model}ForCausalLM"), config, seed)


def fill(model: Any, seed: int = 1) -> None:
    """Random values for the encoder, so large that no prefix is overlooked."""
    generator = np.random.default_rng(seed)
    for parameter in model.prefix_encoder.parameters():
        scale = 1.0 if parameter.ndim == 2 and parameter.shape[0] == P else 0.4
        assign(parameter, (generator.standard_normal(parameter.shape) * scale).astype("float32"))


def prefixed(
    name: str = "llama", base: nn.Layer | None = None, seed: int = 1, **options: Any
) -> PrefixModelForCausalLM:
    """A model in evaluation mode with a random prefix."""
    config = PrefixConfig(**{"num_prefix_tokens": P, **options})
    model = PrefixModelForCausalLM(base or tiny(name), config)
    fill(model, seed)
    return model.eval()


def reference_prefixed(
    name: str, base: nn.Layer | None = None, seed: int = 1, **options: Any
) -> Any:
    """The same by paddlenlp.peft, which has to be told everything."""
    case = CASES[name]
    config = reference.PrefixConfig(
        num_prefix_tokens=P,
        num_attention_heads=4,
        multi_query_group_num=case.kv_heads,
        num_hidden_layers=LAYERS,
        hidden_size=4 * case.head_dim,
        **{"prefix_projection_hidden_size": 24, **options},
    )
    model = reference.PrefixModelForCausalLM(
        base or tiny(name), config, postprocess_past_key_value=reference_postprocess(name)
    )
    fill(model, seed)
    model.eval()
    return model


def reference_postprocess(name: str) -> Any:
    return getattr(reference, f"{CASES[name].postprocess}_postprocess_past_key_value")


def run(model: Any, ids: Any = IDS, **inputs: Any) -> np.ndarray:
    """The logits, [B, S, V]."""
    if ids is not None:
        inputs["input_ids"] = paddle.to_tensor(ids)
    with paddle.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PaddleNLP calls functions that Paddle has deprecated
        result = model(**inputs)
    return (result[0] if isinstance(result, (tuple, list)) else result).numpy()


def prefix_rows(model: Any) -> np.ndarray:
    """Keys and values by hand, [L, 2, K, P, D], in float64 from the encoder's parameters."""
    state = {n: t.numpy().astype(np.float64) for n, t in model.prefix_encoder.state_dict().items()}
    rows = state["0.weight"]
    if "1.weight" in state:
        rows = np.tanh(rows @ state["1.weight"] + state["1.bias"])
        rows = rows @ state["3.weight"] + state["3.bias"]
    head_dim = model.head_dim
    heads = rows.shape[1] // (2 * LAYERS * head_dim)
    return rows.reshape(P, 2, LAYERS, heads, head_dim).transpose(2, 1, 3, 0, 4)


def given_past(name: str, rows: np.ndarray, batch: int) -> dict[str, Any]:
    """The argument of a model's forward that holds these keys and values, [L, 2, K, P, D]."""
    case = CASES[name]
    past = past_of(rows, case.layout, batch)
    return {case.argument: tuple(case.pair(*pair) for pair in past) if case.pair else past}


def past_of(rows: np.ndarray, layout: str, batch: int) -> tuple[Any, ...]:
    """What a model of this layout takes, from [L, 2, K, P, D]."""
    axes = [{"K": 0, "S": 1, "D": 2}[letter] for letter in layout if letter != "B"]
    at = layout.index("B")

    def one(matrix: np.ndarray) -> paddle.Tensor:
        moved = np.expand_dims(matrix.transpose(axes), at)
        return paddle.to_tensor(np.repeat(moved, batch, axis=at).astype("float32"))

    return tuple((one(layer[0]), one(layer[1])) for layer in rows)


def trigger(tokens: int = IDS.shape[1]) -> np.ndarray:
    """A causal keep-mask, [B, S, S]."""
    return np.repeat(np.tril(np.ones((1, tokens, tokens), np.int64)), len(IDS), axis=0)
