"""Qwen, ChatGLM2 and Falcon: configurations, layouts, what the reference is given, the ends of the tables."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest
from model_recipes import load_recipe
from safetensors.numpy import load_file, save_file

import peft_deploy
from peft_deploy.adapters.prefix import PrefixModelForCausalLM
from peft_deploy.base import open_base
from peft_deploy.base.dygraph import build_skeleton, load_model, unique_parameters
from peft_deploy.config.export import ExportOptions
from peft_deploy.errors import (
    CheckpointError,
    ExecutionError,
    UnsupportedModelError,
)
from peft_deploy.families import find_family
from peft_deploy.parity.play import empty_cache
from peft_deploy.runtime import GenerationOptions, Session
from peft_deploy.runtime.onnx_runner import OnnxRunner

tiny = load_recipe("tiny")
IDS = np.array([[3, 17, 99, 130, 4, 60], [60, 8, 21, 7, 9, 2]])
LENGTH = IDS.shape[1]
ALL = [n for n in tiny.known() if n.startswith(("qwen", "chatglm_v2", "rw")) and "qwen2" not in n]
NO_CHECK = ExportOptions(validate=False)

# What the published files hold, but for keys that change nothing that is computed.
QWEN_7B = {
    "architectures": ["QWenLMHeadModel"],
    "attn_dropout_prob": 0.0,
    "emb_dropout_prob": 0.0,
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 22016,
    "kv_channels": 128,
    "layer_norm_epsilon": 1e-06,
    "max_position_embeddings": 32768,
    "model_type": "qwen",
    "no_bias": True,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "rotary_emb_base": 10000,
    "rotary_pct": 1.0,
    "scale_attn_weights": True,
    "seq_length": 8192,
    "tie_word_embeddings": False,
    "use_cache_quantization": False,
    "use_dynamic_ntk": True,
    "use_flash_attn": "auto",
    "use_logn_attn": True,
    "vocab_size": 151936,
}
CHATGLM2_6B = {
    "add_bias_linear": False,
    "add_qkv_bias": True,
    "apply_query_key_layer_scaling": True,
    "apply_residual_connection_post_layernorm": False,
    "architectures": ["ChatGLMModel"],
    "attention_softmax_in_fp32": True,
    "bias_dropout_fusion": True,
    "eos_token_id": 2,
    "ffn_hidden_size": 13696,
    "fp32_residual_connection": False,
    "hidden_size": 4096,
    "kv_channels": 128,
    "layernorm_epsilon": 1e-05,
    "model_type": "chatglm",
    "multi_query_attention": True,
    "multi_query_group_num": 2,
    "num_attention_heads": 32,
    "num_layers": 28,
    "original_rope": True,
    "pad_token_id": 0,
    "padded_vocab_size": 65024,
    "post_layer_norm": True,
    "rmsnorm": True,
    "seq_length": 32768,
    "tie_word_embeddings": False,
}
FALCON_7B = {
    "alibi": False,
    "apply_residual_connection_post_layernorm": False,
    "architectures": ["FalconForCausalLM"],
    "bias": False,
    "eos_token_id": 11,
    "hidden_size": 4544,
    "layer_norm_epsilon": 1e-05,
    "model_type": "falcon",
    "multi_query": True,
    "new_decoder_architecture": False,
    "num_attention_heads": 71,
    "num_hidden_layers": 32,
    "parallel_attn": True,
    "vocab_size": 65024,
}
FALCON_RW_1B = {
    **FALCON_7B,
    "alibi": True,
    "bias": True,
    "hidden_size": 2048,
    "multi_query": False,
    "num_attention_heads": 32,
    "num_hidden_layers": 24,
    "parallel_attn": False,
    "vocab_size": 50304,
}


@pytest.mark.parametrize(
    ("config", "sizes"),
    [
        # With dynamic NTK positions end where it would begin to change the rotations.
        (QWEN_7B, (32, 4096, 32, 32, 128, 151936, 8192)),
        ({**QWEN_7B, "use_dynamic_ntk": False}, (32, 4096, 32, 32, 128, 151936, 32767)),
        (CHATGLM2_6B, (28, 4096, 32, 2, 128, 65024, 32768)),
        (FALCON_7B, (32, 4544, 71, 1, 64, 65024, 2048)),
        (FALCON_RW_1B, (24, 2048, 32, 32, 64, 50304, 2048)),
    ],
)
def test_published_configurations(config: dict[str, Any], sizes: tuple[int, ...]) -> None:
    family = find_family(config)
    dims = family.dims(config)
    found = (dims.num_layers, dims.hidden_size, dims.num_heads, dims.num_kv_heads)
    assert (*found, dims.head_dim, dims.vocab_size, dims.max_positions) == sizes
    theirs = family.huggingface_config(config)
    assert find_family(theirs) is family
    assert family.dims(theirs) == dims
    assert family.paddle_arguments(theirs) == family.paddle_arguments(config)
    assert family.tied(theirs) == family.tied(config)


@pytest.mark.parametrize(
    ("config", "changed", "said"),
    [
        (QWEN_7B, {"tie_word_embeddings": True}, "tie_word_embeddings"),
        (QWEN_7B, {"use_cache_quantization": True}, "use_cache_quantization"),
        (QWEN_7B, {"fuse_attention_ffn": True}, "fuse_attention_ffn"),
        (QWEN_7B, {"rotary_pct": 0.25}, "rotary_pct to 0.25"),
        (QWEN_7B, {"scale_attn_weights": False}, "scale_attn_weights to False"),
        (QWEN_7B, {"kv_channels": 64}, "kv_channels to 64"),
        (CHATGLM2_6B, {"position_encoding_2d": True}, "that of the first ChatGLM"),
        (CHATGLM2_6B, {"rope_ratio": 50}, "rope_ratio to 50"),
        (CHATGLM2_6B, {"rmsnorm": False}, "rmsnorm to False"),
        (CHATGLM2_6B, {"multi_query_attention": False}, "multi_query_attention to False"),
        (CHATGLM2_6B, {"interleaved_qkv": True}, "interleaved_qkv"),
        (CHATGLM2_6B, {"pre_seq_len": 128}, "pre_seq_len"),
        (CHATGLM2_6B, {"kv_channels": 64}, "kv_channels to 64"),
        (CHATGLM2_6B, {"num_hidden_layers": 27}, "num_hidden_layers to 27 and num_layers to 28"),
        (FALCON_7B, {"new_decoder_architecture": True}, "new_decoder_architecture"),
        (FALCON_7B, {"num_ln_in_parallel_attn": 2}, "num_ln_in_parallel_attn to 2"),
        (FALCON_7B, {"activation": "relu"}, "activation to 'relu'"),
        (FALCON_7B, {"ffn_hidden_size": 999}, "ffn_hidden_size to 999"),
        (FALCON_7B, {"rope_theta": 500000.0}, "rope_theta to 500000.0"),
        (FALCON_7B, {"rope_scaling": {"type": "linear"}}, "rope_scaling"),
        (FALCON_7B, {"rope_parameters": {"rope_theta": 5e5}}, "rope_parameters"),
        (FALCON_7B, {"multi_query": False, "num_kv_heads": 8}, "8 kv heads without multi_query"),
        (FALCON_7B, {"num_attention_heads": 64}, "heads of 71 dimensions"),
        (FALCON_7B, {"apply_residual_connection_post_layernorm": True}, "post_layernorm"),
        (FALCON_RW_1B, {"num_attention_heads": 16, "alibi": True, "hidden_size": 2056}, "2056"),
        (FALCON_RW_1B, {"num_attention_heads": 24, "hidden_size": 2064}, "a power of two"),
    ],
)
def test_what_paddlenlp_would_ignore_is_refused(
    config: dict[str, Any], changed: dict[str, Any], said: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=said):
        find_family(config).paddle_arguments({**config, **changed})


@pytest.mark.parametrize("name", ALL)
def test_the_map_names_every_parameter(name: str) -> None:
    config = tiny.config_of(name)
    family = find_family(config)
    parameters = unique_parameters(build_skeleton(family, config))
    expected = family.names(config).parameters(2) - family.tied(config).keys()
    assert set(parameters) - family.tied(config).keys() == expected


@pytest.mark.parametrize("name", ALL)
def test_both_layouts_are_the_same_model(name: str, tmp_path: Path) -> None:
    own = open_base(tiny.make(tmp_path / "paddlenlp", name))
    theirs = open_base(tiny.make(tmp_path / "huggingface", name, layout="huggingface"))
    assert (own.tensors.layout, theirs.tensors.layout) == ("paddlenlp", "huggingface")
    assert own.fingerprint == theirs.fingerprint
    assert own.dims == theirs.dims


def test_frequencies_that_both_layouts_keep_are_no_weights(tmp_path: Path) -> None:
    for layout, name in (("paddlenlp", "chatglm_v2"), ("huggingface", "transformer")):
        folder = tiny.make(tmp_path / layout, "chatglm_v2", layout=layout)
        tensors = load_file(folder / "model.safetensors")
        tensors[f"{name}.rotary_pos_emb.inv_freq"] = np.ones(3, np.float32)
        save_file(tensors, folder / "model.safetensors")
        base = open_base(folder)
        base.check_names()
        assert not any("inv_freq" in found for found in base.tensors.names())


def test_falcon_with_other_sizes_than_its_weights_have(tmp_path: Path) -> None:
    folder = tiny.make(tmp_path, "rw")
    tensors = load_file(folder / "model.safetensors")
    name = "transformer.h.0.self_attention.query_key_value.weight"
    tensors[name] = np.zeros((48, 70), np.float32)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"shape \[48, 70\]; 50 rows or 50 columns"):
        _ = open_base(folder).tensors


def test_a_tied_falcon_has_one_table(tmp_path: Path) -> None:
    """transformers ties the head unless told otherwise, and leaves it out of its files."""
    folder = tiny.make(tmp_path, "rw-sequential", layout="huggingface")
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    model = load_model(open_base(folder))
    assert model.lm_head.weight is model.transformer.word_embeddings.weight


def feeds_of(signature: Any, **given: Any) -> dict[str, np.ndarray]:
    cache = empty_cache(signature, len(given["input_ids"]))
    arrays = {name: np.asarray(value, np.int64) for name, value in given.items()}
    arrays |= {s.name: a for s, a in zip(signature.past, cache.values(), strict=True)}
    return {name: arrays[name] for name in signature.input_names}


def plain(signature: Any, ids: np.ndarray = IDS) -> dict[str, np.ndarray]:
    places = np.arange(ids.shape[1])[None].repeat(len(ids), 0)
    return feeds_of(
        signature, input_ids=ids, attention_mask=np.ones_like(ids), position_ids=places
    )


@pytest.mark.parametrize("name", ALL)
def test_the_reference_is_paddlenlps_own_forward(name: str, tmp_path: Path) -> None:
    """What is put right for padding and caches leaves a plain text alone, bit for bit."""
    base = open_base(tiny.make(tmp_path, name))
    model, signature = load_model(base), base.family.signature(base.config)
    with paddle.no_grad():
        own = model(paddle.to_tensor(IDS), use_cache=True, return_dict=False)[0].numpy()
        tensors = {n: paddle.to_tensor(a) for n, a in plain(signature).items()}
        given = base.family.run_eagerly(model, tensors, signature)["logits"].numpy()
        after = model(paddle.to_tensor(IDS), use_cache=True, return_dict=False)[0].numpy()
    np.testing.assert_array_equal(given, own)
    np.testing.assert_array_equal(after, own)


def test_paddlenlps_falcon_forgets_positions_with_a_cache(tmp_path: Path) -> None:
    """Why its calls are put right: a newer PaddleNLP may have mended it."""
    base = open_base(tiny.make(tmp_path, "rw"))
    model = load_model(base)
    ids = paddle.to_tensor(IDS)
    with paddle.no_grad():
        whole = model(ids, use_cache=True, return_dict=False)[0]
        past = model(ids[:, :-1], use_cache=True, return_dict=False)[1]
        last = model(ids[:, -1:], past_key_values=past, attention_mask=paddle.ones(IDS.shape))
        assert float((last[0][:, 0] - whole[:, -1]).abs().max()) > 0.1
        with pytest.raises(
            ValueError, match=r"(?i)broadcast"
        ):  # two new tokens: a mask for 10 in the cache
            model(ids[:, -2:], past_key_values=past, attention_mask=paddle.ones([2, 7]))


def test_paddlenlps_falcon_takes_no_prefix(tmp_path: Path) -> None:
    """It fails, unless the prefix happens to be as long as a head is wide; what it saved is of use here."""
    from paddlenlp.peft import prefix as reference

    base = open_base(tiny.make(tmp_path / "base", "rw-sequential"))
    sizes = {"num_prefix_tokens": 3, "num_attention_heads": 5, "num_hidden_layers": 2}

    def flat(past: paddle.Tensor) -> list[tuple[paddle.Tensor, ...]]:
        layers = past.transpose([2, 0, 3, 1, 4]).reshape([4, -1, 3, 10])
        return list(zip(layers[:2], layers[2:], strict=True))

    theirs = reference.PrefixModelForCausalLM(
        load_model(base),
        reference.PrefixConfig(**sizes, hidden_size=50, prefix_projection=False),
        postprocess_past_key_value=flat,
    )
    theirs.eval()
    ids = paddle.to_tensor(IDS)
    with pytest.raises(ValueError, match=r"(?i)broadcast"):
        theirs(ids, attention_mask=paddle.ones_like(ids))
    theirs.save_pretrained(tmp_path / "prefix")
    ours = PrefixModelForCausalLM.from_pretrained(load_model(base), tmp_path / "prefix").eval()
    with paddle.no_grad():
        behind, plain = ours(ids)[0], ours.model(ids)[0]
    assert float((behind - plain).abs().max()) > 1e-2


def _of_model(base: Path, prefix: Path) -> list[int]:
    """Greedy tokens of the prefix model's own ``generate``."""
    model = PrefixModelForCausalLM.from_pretrained(load_model(open_base(base)), prefix).eval()
    options = {"decode_strategy": "greedy_search", "eos_token_id": 1000, "pad_token_id": 0}
    tokens, _ = model.generate(paddle.to_tensor(IDS[:1]), max_length=8, **options)
    return [int(token) for token in tokens[0]]


def _of_bundle(folder: Path, way: str) -> list[int]:
    """Greedy tokens behind its prefix p, as a cache or in slots."""
    session = Session(folder)
    if way == "adapter":
        session.load_adapter("p")
    options = GenerationOptions(max_new_tokens=8)
    (result,) = session.generate([IDS[0].tolist()], options, **{way: "p"})
    return list(result.token_ids)


@pytest.mark.convert
@pytest.mark.parametrize("name", ["rw", "rw-alibi"])
def test_a_prefix_on_falcon_goes_into_bundles(name: str, tmp_path: Path) -> None:
    """As a cache and in slots, checked against the model behind the prefix that was trained."""
    base = tiny.make(tmp_path / "base", name)
    prefix = tiny.make_prefix(tmp_path / "prefix", base)
    own = _of_model(base, prefix)
    formats = {"onnx": ExportOptions(prefix_slots=True), "paddle": ExportOptions(format="paddle")}
    for format, options in formats.items():
        out = tmp_path / format
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "ALiBi: PaddleNLP rounds the slopes")
            result = peft_deploy.export(base, out, adapter=f"p={prefix}", options=options)
        assert result.parity is not None and result.parity.passed
        titles = ["prefix p", "prefix p in slots"] if format == "onnx" else ["prefix p"]
        assert sorted(result.parity.parts) == titles
        for part in result.parity.parts.values():
            assert part.passed and not part.warnings
            worst = [o.difference.relative_max for c in part.cases for o in c.outputs.values()]
            assert max(worst) <= 1e-4
    for way in ("prefix", "adapter"):
        assert _of_bundle(tmp_path / "onnx", way) == own


@pytest.mark.parametrize("name", ["qwen", "qwen-logn-biased", "chatglm_v2"])
def test_a_prefix_of_paddlenlps_is_one_of_ours(name: str, tmp_path: Path) -> None:
    """The prefix counts among the tokens of log-n attention, and moves no positions."""
    from paddlenlp.peft import prefix as reference

    base = open_base(tiny.make(tmp_path / "base", name))
    dims = base.dims
    options = {
        "num_prefix_tokens": 3,
        "num_attention_heads": dims.num_heads,
        "multi_query_group_num": dims.num_kv_heads,
        "num_hidden_layers": dims.num_layers,
        "hidden_size": dims.hidden_size,
    }
    post = getattr(
        reference, f"{'chatglm' if 'glm' in name else 'qwen'}_postprocess_past_key_value"
    )
    theirs = reference.PrefixModelForCausalLM(
        load_model(base), reference.PrefixConfig(**options), postprocess_past_key_value=post
    )
    weight = next(iter(theirs.prefix_encoder.parameters()))
    weight.set_value(paddle.randn(weight.shape, dtype="float32"))
    theirs.eval()
    theirs.save_pretrained(tmp_path / "prefix")
    ours = PrefixModelForCausalLM.from_pretrained(load_model(base), tmp_path / "prefix")
    ours.eval()
    ids = paddle.to_tensor(IDS)
    with paddle.no_grad():
        calls = [
            model(ids, attention_mask=paddle.ones_like(ids), return_dict=True).logits.numpy()
            for model in (theirs, ours, ours.model)
        ]
        keys = [tensor for pair in ours.prefix_past() for tensor in pair]
        feeds = plain(base.family.signature(base.config))
        past = [spec.name for spec in base.family.signature(base.config).past]
        tensors = {n: paddle.to_tensor(a) for n, a in feeds.items()}
        tensors |= {n: t.expand([2, -1, -1, -1]) for n, t in zip(past, keys, strict=True)}
        tensors["attention_mask"] = paddle.ones([2, LENGTH + 3], dtype="int64")
        signature = base.family.signature(base.config)
        eager = base.family.run_eagerly(ours.model, tensors, signature)["logits"].numpy()
        stand_in = base.family.stand_in(ours.model)
        arguments = [tensors[n] for n in signature.input_names]
        traced = stand_in(*arguments[:3], arguments[3:])[0].numpy()
    np.testing.assert_array_equal(calls[0], calls[1])
    np.testing.assert_array_equal(calls[0], eager)
    np.testing.assert_allclose(traced, eager, atol=1e-5 * np.abs(eager).max())
    assert np.abs(calls[0] - calls[2]).max() > 0.3


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], OnnxRunner]:
    made: dict[str, OnnxRunner] = {}

    def make(name: str) -> OnnxRunner:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            base = tiny.make(folder / "base", name)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "ALiBi: PaddleNLP rounds")
                peft_deploy.export(base, folder / "out", options=NO_CHECK)
            made[name] = OnnxRunner(folder / "out")
        return made[name]

    return make


@pytest.mark.convert
@pytest.mark.parametrize("name", ["qwen-logn-biased", "chatglm_v2", "rw", "rw-alibi"])
def test_a_row_of_padding_alone_gives_numbers(
    name: str, bundle: Callable[[str], OnnxRunner]
) -> None:
    runner = bundle(name)
    full = plain(runner.signature)
    half = {**full, "attention_mask": full["attention_mask"] * [[1], [0]]}
    found, whole = runner.run(half), runner.run(full)
    assert all(np.isfinite(array).all() for array in found.values())
    np.testing.assert_allclose(found["logits"][0], whole["logits"][0], atol=1e-5)
    assert np.abs(found["logits"][1] - whole["logits"][1]).max() > 0.1


@pytest.mark.convert
@pytest.mark.parametrize("name", ["qwen-logn-biased", "chatglm_v2", "rw"])
def test_the_table_ends_where_the_model_does(
    name: str, bundle: Callable[[str], OnnxRunner]
) -> None:
    runner = bundle(name)
    limit = find_family(tiny.config_of(name)).dims(tiny.config_of(name)).max_positions
    feeds = plain(runner.signature)
    first = limit - LENGTH
    last = runner.run({**feeds, "position_ids": feeds["position_ids"] + first})
    assert np.isfinite(last["logits"]).all()
    with pytest.raises(ExecutionError, match=rf"\b{limit}\b"):
        runner.run({**feeds, "position_ids": feeds["position_ids"] + first + 1})


@pytest.mark.convert
def test_a_chatglm_as_the_hub_has_it(bundle: Callable[[str], OnnxRunner], tmp_path: Path) -> None:
    """Its own names of the sizes, torch's layout: the same bundle."""
    base = tiny.make(tmp_path / "base", "chatglm_v2", layout="huggingface")
    config = json.loads((base / "config.json").read_text("utf-8"))
    for key in ("vocab_size", "num_hidden_layers"):  # PaddleNLP's names
        del config[key]
    config |= {"architectures": ["ChatGLMModel"], "eos_token_id": 2, "pad_token_id": 0}
    (base / "config.json").write_text(json.dumps(config), "utf-8")
    peft_deploy.export(base, tmp_path / "out", options=NO_CHECK)
    theirs, own = OnnxRunner(tmp_path / "out"), bundle("chatglm_v2")
    feeds = plain(own.signature)
    for name, array in own.run(feeds).items():
        np.testing.assert_array_equal(theirs.run(feeds)[name], array)
    model = json.loads((tmp_path / "out" / "genai_config.json").read_text("utf-8"))["model"]
    assert (model["type"], model["vocab_size"]) == ("decoder", 131)
    assert (model["eos_token_id"], model["pad_token_id"]) == ([2], 0)


def test_falcons_alibi_is_remarked_on(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="ALiBi: PaddleNLP rounds the slopes"):
        peft_deploy.export(
            tiny.make(tmp_path / "base", "rw-alibi"),
            tmp_path / "out",
            options=ExportOptions(dry_run=True),
        )
    assert find_family(FALCON_7B).remarks(FALCON_7B) == ()


@pytest.mark.convert
@pytest.mark.parametrize(("name", "length"), [("rw-alibi", 300), ("qwen-logn-biased", 64)])
def test_texts_longer_than_the_model_was_trained_on(
    name: str, length: int, bundle: Callable[[str], OnnxRunner], tmp_path: Path
) -> None:
    """ALiBi has no end; log-n factors grow beyond the length of the training, here 4."""
    ids = np.random.default_rng(5).integers(0, 131, (1, length))
    runner = bundle(name)
    found = runner.run(plain(runner.signature, ids))["logits"]
    model = load_model(open_base(tiny.make(tmp_path, name)))
    with paddle.no_grad():
        own = model(paddle.to_tensor(ids), use_cache=True, return_dict=False)[0].numpy()
    np.testing.assert_allclose(found, own, atol=1e-5 * np.abs(own).max())


@pytest.mark.parametrize("heads", [1, 2, 4, 8, 16, 32, 64, 128])
def test_falcons_slopes_are_paddlenlps(heads: int) -> None:
    from paddlenlp.transformers.rw.modeling import build_alibi_tensor

    from peft_deploy.families.standins import alibi_bias
    from peft_deploy.families.standins.rw import coarse_slopes

    mask = paddle.to_tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0]])
    theirs = build_alibi_tensor(mask.astype("float32"), heads, "float32").numpy()
    ours = alibi_bias(mask, coarse_slopes(heads)).numpy()
    real = np.broadcast_to(mask.numpy()[:, None] == 1, (2, heads, 7))
    np.testing.assert_array_equal(ours[:, :, 0][real], theirs.reshape([2, heads, 7])[real])
