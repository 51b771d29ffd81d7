"""Hugging Face's checkpoints of GPT-2, OPT and BLOOM: config.json files as published, names, and what they compute."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy_transformers
import paddle
import pytest
from model_recipes import load_recipe
from published import check_names, check_published
from safetensors.numpy import load_file, save_file

from peft_deploy.base import open_base
from peft_deploy.base.dygraph import load_model
from peft_deploy.errors import CheckpointError
from peft_deploy.families import find_family, known_architectures

tiny = load_recipe("tiny")
IDS = np.array([3, 17, 99, 130, 4, 4, 60, 8, 21])

# What the published files hold, but for keys that change nothing that is computed.
OPT_350M = {
    "_remove_final_layer_norm": False,
    "activation_dropout": 0.0,
    "activation_function": "relu",
    "architectures": ["OPTForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 2,
    "do_layer_norm_before": False,
    "dropout": 0.1,
    "eos_token_id": 2,
    "ffn_dim": 4096,
    "hidden_size": 1024,
    "init_std": 0.02,
    "layerdrop": 0.0,
    "max_position_embeddings": 2048,
    "model_type": "opt",
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "pad_token_id": 1,
    "prefix": "</s>",
    "vocab_size": 50272,
    "word_embed_proj_dim": 512,
}
BLOOM_560M = {
    "apply_residual_connection_post_layernorm": False,
    "architectures": ["BloomForCausalLM"],
    "attention_dropout": 0.0,
    "attention_softmax_in_fp32": True,
    "bias_dropout_fusion": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_dropout": 0.0,
    "layer_norm_epsilon": 1e-05,
    "masked_softmax_fusion": True,
    "model_type": "bloom",
    "n_embed": 1024,
    "n_inner": None,
    "n_layer": 24,
    "num_attention_heads": 16,
    "offset_alibi": 100,
    "pad_token_id": 3,
    "pretraining_tp": 1,
    "seq_length": 2048,
    "slow_but_exact": False,
    "vocab_size": 250880,
}
GPT2 = {
    "activation_function": "gelu_new",
    "architectures": ["GPT2LMHeadModel"],
    "attn_pdrop": 0.1,
    "bos_token_id": 50256,
    "embd_pdrop": 0.1,
    "eos_token_id": 50256,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "model_type": "gpt2",
    "n_ctx": 1024,
    "n_embd": 768,
    "n_head": 12,
    "n_layer": 12,
    "n_positions": 1024,
    "resid_pdrop": 0.1,
    "vocab_size": 50257,
}


@pytest.mark.parametrize(
    ("config", "sizes", "arguments"),
    [
        (
            OPT_350M,
            (24, 1024, 16, 16, 64, 50272, 2048),
            {"normalize_before": False, "word_embed_proj_dim": 512, "intermediate_size": 4096},
        ),
        (
            BLOOM_560M,
            (24, 1024, 16, 16, 64, 250880, 2048),
            {"n_head": 16, "hidden_size": 1024, "bos_token_id": 1, "pad_token_id": 3},
        ),
        (
            GPT2,
            (12, 768, 12, 12, 64, 50257, 1024),
            {"intermediate_size": 3072, "hidden_activation": "gelu", "fuse_attention_qkv": False},
        ),
    ],
)
def test_published_configurations(
    config: dict[str, Any], sizes: tuple[int, ...], arguments: dict[str, Any]
) -> None:
    check_published(config, sizes, arguments)


@pytest.mark.parametrize(
    "name", [n for n in tiny.known() if n.startswith(("gpt", "opt", "bloom"))]
)
def test_the_map_names_every_parameter(name: str) -> None:
    check_names(tiny.config_of(name))


def as_gpt2(folder: Path, *, bare: bool) -> Path:
    """A folder in PaddleNLP's layout, turned into what transformers writes."""
    weights = load_file(folder / "model.safetensors")
    family = find_family(GPT2)
    config = family.huggingface_config(json.loads((folder / "config.json").read_text()))
    names = family.names(config)
    made = {}
    for name, array in weights.items():
        if "q_proj" in name:
            parts = [weights[name.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            layer = name.split(".")[3]
            fused = f"transformer.h.{layer}.attn.c_attn.{name.rpartition('.')[2]}"
            made[fused] = np.concatenate(parts, -1)
        elif "k_proj" not in name and "v_proj" not in name:
            made[names.to_huggingface(name).name] = array
    for i in range(config["n_layer"]):
        made[f"transformer.h.{i}.attn.bias"] = np.tri(4, dtype=np.float32)[None, None]
        made[f"transformer.h.{i}.attn.masked_bias"] = np.array(-1e4, np.float32)
    made = {n.removeprefix("transformer.") if bare else n: a for n, a in made.items()}
    target = folder.parent / f"gpt2-{bare}"
    target.mkdir()
    (target / "config.json").write_text(json.dumps(config))
    save_file(made, target / "model.safetensors", {"format": "pt"})
    return target


def compare(
    paddlenlp: Path,
    huggingface: Path,
    oracle: Callable[..., np.ndarray],
    *,
    prefix: str = "",
    **written: Any,
) -> None:
    """Both layouts are the same model, and it computes what the papers say."""
    ours, theirs = open_base(paddlenlp), open_base(huggingface)
    assert (ours.tensors.layout, theirs.tensors.layout) == ("paddlenlp", "huggingface")
    assert ours.fingerprint == theirs.fingerprint
    for name in ours.tensors.names():
        np.testing.assert_array_equal(theirs.tensors.read(name), ours.tensors.read(name))
    config = json.loads((huggingface / "config.json").read_text())
    assert written.items() <= config.items()
    weights = load_file(huggingface / "model.safetensors")
    weights = {prefix + name: array.astype(np.float64) for name, array in weights.items()}
    with paddle.no_grad():
        found = load_model(theirs)(paddle.to_tensor(IDS[None]), use_cache=True)[0].numpy()[0]
    wanted = oracle(weights, config, IDS)
    assert wanted.std() > 0.5
    np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("bare", [False, True])
def test_gpt2(tmp_path: Path, bare: bool) -> None:
    base = tiny.make(tmp_path / "pd", "gpt")
    prefix = "transformer." if bare else ""
    compare(base, as_gpt2(base, bare=bare), numpy_transformers.gpt2, prefix=prefix)


@pytest.mark.parametrize(
    ("name", "tied"), [("opt", False), ("opt", True), ("opt-post-norm-projected", True)]
)
def test_opt(tmp_path: Path, name: str, tied: bool) -> None:
    base = tiny.make(tmp_path / "pd", name, tie_word_embeddings=tied)
    theirs = tiny.make(tmp_path / "hf", name, layout="huggingface", tie_word_embeddings=tied)
    compare(base, theirs, numpy_transformers.opt, tie_word_embeddings=tied, model_type="opt")


@pytest.mark.parametrize("name", ["bloom", "bloom-post-norm-residual"])
def test_bloom(tmp_path: Path, name: str) -> None:
    base = tiny.make(tmp_path / "pd", name)
    theirs = tiny.make(tmp_path / "hf", name, layout="huggingface")
    compare(base, theirs, numpy_transformers.bloom, n_head=tiny.config_of(name)["n_head"])


def test_gpt2_weights_with_other_blocks(tmp_path: Path) -> None:
    base = as_gpt2(tiny.make(tmp_path / "pd", "gpt"), bare=False)
    weights = load_file(base / "model.safetensors")
    name = "transformer.h.1.attn.c_attn.weight"
    weights[name] = weights[name][:, :-1]
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        CheckpointError, match=r"c_attn.weight has shape \[40, 119\].* 3 equal blocks"
    ):
        open_base(base).tensors.names()
    weights[name] = weights[name][:, :-2]
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"q_proj\.weight: "):
        load_model(open_base(base))


def test_a_fused_projection_takes_no_gpt2_checkpoint(tmp_path: Path) -> None:
    """PaddleNLP's has the three parts head by head, Hugging Face's one after the other."""
    base = as_gpt2(tiny.make(tmp_path / "pd", "gpt"), bare=False)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "fuse_attention_qkv": True}))
    with pytest.raises(CheckpointError, match=r"qkv_proj(.|\n)*c_attn"):
        open_base(base).check_names()


@pytest.mark.parametrize("architecture", known_architectures())
def test_an_architecture_alone_has_names(architecture: str) -> None:
    """By them ``inspect`` recognizes weights that lie without a config.json."""
    config = {"architectures": [architecture]}
    paddle_names = [rule.paddle for rule in find_family(config).names(config).rules]
    assert any("{i}" in name for name in paddle_names)
