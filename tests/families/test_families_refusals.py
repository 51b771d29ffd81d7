"""What a config.json may ask of GPT, OPT and Bloom that would be computed otherwise, or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import paddle
import paddlenlp.transformers
import pytest
from model_recipes import load_recipe

import peft_deploy
from peft_deploy.base import open_base
from peft_deploy.base.dygraph import load_model
from peft_deploy.config.export import ExportOptions
from peft_deploy.errors import CheckpointError, UnsupportedModelError
from peft_deploy.families import find_family

tiny = load_recipe("tiny")
REFUSED = [
    ("gpt", {"layer_norm_eps": 1e-6}, r"layer_norm_eps to 1e-06; .* 1e-05"),
    ("gpt", {"hidden_activation": "relu"}, "hidden_activation to 'relu'; exported are gelu"),
    ("gpt", {"hidden_activation": None, "activation_function": "gelu"}, "'gelu'.*gelu_new"),
    ("gpt", {"hidden_act": "relu"}, "hidden_act to 'relu'"),
    ("gpt", {"tie_word_embeddings": False}, "tie_word_embeddings to False"),
    ("gpt", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
    ("gpt", {"scale_attn_weights": False}, "scale_attn_weights to False"),
    ("gpt", {"add_cross_attention": True}, "add_cross_attention"),
    ("gpt", {"n_embd": 48}, "hidden_size to 40 and n_embd to 48"),
    ("gpt", {"num_attention_heads": 7}, "40 among 7 attention heads"),
    ("opt", {"enable_bias": False}, "enable_bias to False"),
    ("opt", {"layer_norm_elementwise_affine": False}, "layer_norm_elementwise_affine to False"),
    ("opt", {"_remove_final_layer_norm": True}, "_remove_final_layer_norm"),
    ("opt", {"hidden_act": None, "activation_function": "gelu"}, "'gelu'.*gelu_new"),
    ("opt", {"hidden_act": "tanh"}, "hidden_act to 'tanh'; exported are gelu, relu, silu"),
    ("opt", {"activation_function": "gelu_new"}, "hidden_act to 'relu' and activation_function"),
    ("opt", {"do_layer_norm_before": False}, "normalize_before to True and do_layer_norm_before"),
    ("opt", {"word_embed_proj_dim": 20}, "word_embed_proj_dim to 20"),
    ("bloom", {"use_long_sequence_strategies": True}, "use_long_sequence_strategies"),
    ("bloom", {"slow_but_exact": True, "pretraining_tp": 4}, "slow_but_exact"),
    ("bloom", {"n_inner": 100}, "n_inner to 100; .* 160"),
    ("bloom", {"tie_word_embeddings": False}, "tie_word_embeddings to False"),
    ("bloom", {"num_attention_heads": 4}, "n_head to 5 and num_attention_heads to 4"),
]


@pytest.mark.parametrize(("name", "entries", "said"), REFUSED)
def test_what_would_be_computed_otherwise_is_refused(
    name: str, entries: dict[str, Any], said: str
) -> None:
    config = tiny.config_of(name)
    family = find_family(config)
    family.paddle_arguments(config)
    with pytest.raises(UnsupportedModelError, match=said):
        family.paddle_arguments({**config, **entries})


@pytest.mark.parametrize("name", ["gpt", "opt", "bloom"])
def test_sizes_that_are_not_there_are_named(name: str, tmp_path: Path) -> None:
    folder = tiny.make(tmp_path / "base", name)
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace('"hidden_size"', '"hidden"'))
    with pytest.raises(CheckpointError, match="lacks the entry 'hidden_size'"):
        open_base(folder)


def test_an_opt_of_paddlenlp_keeps_its_output_layer_apart() -> None:
    """Hugging Face's ties it unless told otherwise, PaddleNLP's class never does."""
    config = {k: v for k, v in tiny.config_of("opt").items() if k != "tie_word_embeddings"}
    family = find_family(config)
    tied = {"lm_head.decoder_weight": "opt.embeddings.word_embeddings.weight"}
    assert family.tied(config) == family.kept_apart(config) == tied
    assert family.tied({**config, "paddlenlp_version": "3.0.0b4"}) == {}
    assert family.tied({**config, "tie_word_embeddings": False}) == {}


def test_a_tied_opt_shares_one_matrix(tmp_path: Path) -> None:
    base = open_base(tiny.make(tmp_path / "base", "opt", tie_word_embeddings=True))
    model = load_model(base)
    assert model.lm_head.decoder_weight is model.opt.embeddings.word_embeddings.weight
    untied = load_model(open_base(tiny.make(tmp_path / "untied", "opt")))
    assert untied.lm_head.decoder_weight is not untied.opt.embeddings.word_embeddings.weight


def test_a_merged_opt_is_read_by_paddlenlp(tmp_path: Path) -> None:
    """Its class would start an output layer at random that the checkpoint does not hold."""
    base = tiny.make(tmp_path / "base", "opt", layout="huggingface", tie_word_embeddings=True)
    adapter = tiny.make_lora(tmp_path / "adapter", base)
    peft_deploy.merge(
        base, adapter, tmp_path / "out", options=peft_deploy.MergeOptions(to="paddle")
    )
    theirs = paddlenlp.transformers.OPTForCausalLM.from_pretrained(str(tmp_path / "out"))
    theirs.eval()
    ids = paddle.to_tensor([[3, 17, 99, 130, 4]])
    with paddle.no_grad():
        wanted = load_model(open_base(tmp_path / "out"))(ids, use_cache=True)[0].numpy()
        plain = load_model(open_base(base))(ids, use_cache=True)[0].numpy()
        found = theirs(ids, use_cache=True)[0].numpy()
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    assert np.abs(wanted - plain).max() > 0.1


@pytest.mark.convert
def test_an_untied_opt_in_memory_keeps_both(tmp_path: Path) -> None:
    """Its configuration says "tied" by default, which the class does not heed."""
    model = load_model(open_base(tiny.make(tmp_path / "base", "opt")))
    model.config.tie_word_embeddings = True
    result = peft_deploy.export(model, tmp_path / "out", options=ExportOptions())
    assert result.parity is not None and result.parity.passed
