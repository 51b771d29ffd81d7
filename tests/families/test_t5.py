"""T5 without a conversion: names, both stand-ins, PaddleNLP's forward, and what is refused."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import numpy_t5
import paddle
import paddlenlp.transformers
import pytest
from model_recipes import load_recipe
from safetensors.numpy import load_file, save_file

from peft_deploy.adapters.formats.paddlenlp import read_adapter
from peft_deploy.base import BaseModel, open_base
from peft_deploy.base.dygraph import build_skeleton, load_model, unique_parameters
from peft_deploy.errors import CheckpointError, UnsupportedModelError
from peft_deploy.families import EncoderDecoderFamily, find_family
from peft_deploy.families.standins.t5 import T5DecoderStandIn, T5EncoderStandIn
from peft_deploy.signature import (
    ATTENTION_MASK,
    ENCODER_ATTENTION_MASK,
    ENCODER_INPUT_IDS,
    INPUT_IDS,
    LOGITS,
    past_names,
)
from peft_deploy.workflows.convert_adapter import convert_adapter

auto_cast = importlib.import_module(
    "paddle.amp.auto_cast"
)  # its package has a function of that name
tiny = load_recipe("tiny")
NAMES = ("t5", "t5-gated")
SILU = {"feed_forward_proj": "gated-silu"}

# What the published files hold, but for keys that change nothing that is computed.
T5_SMALL: dict[str, Any] = {
    "architectures": ["T5ForConditionalGeneration"],
    "d_ff": 2048,
    "d_kv": 64,
    "d_model": 512,
    "decoder_start_token_id": 0,
    "dropout_rate": 0.1,
    "eos_token_id": 1,
    "initializer_factor": 1.0,
    "is_encoder_decoder": True,
    "layer_norm_epsilon": 1e-06,
    "model_type": "t5",
    "n_positions": 512,
    "num_heads": 8,
    "num_layers": 6,
    "output_past": True,
    "pad_token_id": 0,
    "relative_attention_num_buckets": 32,
    "vocab_size": 32128,
}
FLAN_T5_SMALL = {
    **T5_SMALL,
    "d_ff": 1024,
    "feed_forward_proj": "gated-gelu",
    "num_decoder_layers": 8,
    "num_heads": 6,
    "num_layers": 8,
    "relative_attention_max_distance": 128,
    "tie_word_embeddings": False,
}
REFUSED = [
    ({"relative_attention_max_distance": 64}, "relative_attention_max_distance to 64.*128"),
    ({"feed_forward_proj": "gelu"}, "feed_forward_proj to 'gelu'; exported are relu"),
    ({"relative_attention_num_buckets": 2}, "num_buckets to 2; .* 4 to 255"),
    ({"relative_attention_num_buckets": 256}, "num_buckets to 256; .* 4 to 255"),
    ({"num_hidden_layers": 5}, "num_layers to 3 and num_hidden_layers to 5"),
]


@pytest.fixture(scope="module", params=[("t5", {}), ("t5-gated", {}), ("t5-gated", SILU)])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    """In Hugging Face's layout."""
    name, entries = request.param
    folder = tmp_path_factory.mktemp(name)
    return open_base(tiny.make(folder, name, layout="huggingface", **entries))


def tensors(**arrays: Any) -> dict[str, paddle.Tensor]:
    return {name: paddle.to_tensor(np.asarray(array)) for name, array in arrays.items()}


def empty_past(base: BaseModel, rows: int) -> list[paddle.Tensor]:
    dims = base.dims
    shape = (rows, dims.num_kv_heads, 0, dims.head_dim)
    return [paddle.zeros(shape) for _ in past_names(dims.num_layers)]


def run_stand_ins(
    base: BaseModel, model: Any, source: Any, source_mask: Any, ids: Any, mask: Any
) -> np.ndarray[Any, Any]:
    family = base.family
    assert isinstance(family, EncoderDecoderFamily)
    given = [paddle.to_tensor(np.asarray(a)) for a in (source, source_mask, ids, mask)]
    with paddle.no_grad():
        cross = family.encoder_stand_in(model)(*given[:2])
        past = empty_past(base, len(ids))
        logits = family.stand_in(model)(given[2], given[3], given[1], cross, past)[0]
    return np.asarray(logits.numpy())


@pytest.fixture(params=["untouched", "guarded", "left behind"])
def mixed_precision(request: pytest.FixtureRequest) -> Iterator[None]:
    """Paddle's state of mixed precision: none, one that is off, one that a failed guard did not take back."""
    auto_cast._g_amp_state_ = None  # other tests may have left one behind
    with ExitStack() as stack:
        if request.param == "guarded":
            stack.enter_context(paddle.amp.auto_cast(enable=False))
        elif request.param == "left behind":
            with pytest.raises(ValueError, match="level"):
                stack.enter_context(paddle.amp.auto_cast(level="unknown"))
        assert bool(auto_cast.amp_state()) == (request.param != "untouched")
        yield
    auto_cast._g_amp_state_ = None


@pytest.mark.usefixtures("mixed_precision")
def test_all_sides_compute_what_the_paper_says(base: BaseModel) -> None:
    """Texts so long that every bucket of every distance is in use."""
    weights = {
        n: a.astype(np.float64) for n, a in load_file(base.path / "model.safetensors").items()
    }
    rng = np.random.default_rng(1)
    source, ids = (rng.integers(0, base.dims.vocab_size, n) for n in (150, 141))
    want = numpy_t5.t5(weights, {**base.config}, source, ids)
    model = load_model(base)
    ones = [np.ones((1, n), np.int64) for n in (150, 141)]
    ours = run_stand_ins(base, model, source[None], ones[0], ids[None], ones[1])[0]
    feeds = tensors(
        **{
            ENCODER_INPUT_IDS: source[None],
            ENCODER_ATTENTION_MASK: ones[0],
            INPUT_IDS: ids[None],
            ATTENTION_MASK: ones[1],
        }
    )
    feeds |= dict(zip(past_names(base.dims.num_layers), empty_past(base, 1), strict=True))
    signature = base.family.whole_signature(base.config)
    with paddle.no_grad():
        theirs = base.family.run_eagerly(model, feeds, signature)[LOGITS].numpy()[0]
    limit = (
        2e-4 * np.abs(want).max()
    )  # float32 against float64, over 140 steps of a sharp attention
    np.testing.assert_allclose(theirs, want, atol=limit, rtol=0)
    np.testing.assert_allclose(ours, want, atol=limit, rtol=0)


@pytest.mark.parametrize("count", [4, 7, 12, 32, 33, 64, 255])
@pytest.mark.parametrize("kind", [T5EncoderStandIn, T5DecoderStandIn])
def test_buckets_of_any_number(kind: type, count: int) -> None:
    config = tiny.config_of("t5", relative_attention_num_buckets=count)
    stand_in = kind(build_skeleton(find_family(config), config), 128)
    both_ways = kind is T5EncoderStandIn
    reach = range(-300, 301 if both_ways else 1)
    kept = [min(max(d, stand_in._first), stand_in._last) - stand_in._first for d in reach]
    want = [numpy_t5.bucket(d, count, both_ways=both_ways) for d in reach]
    assert stand_in._buckets[kept].tolist() == want


def test_padding_anywhere_counts_for_nothing(base: BaseModel) -> None:
    model = load_model(base)
    rng = np.random.default_rng(2)
    source, ids = (rng.integers(0, base.dims.vocab_size, (1, n)) for n in (9, 6))
    alone = run_stand_ins(base, model, source, np.ones((1, 9), int), ids, np.ones((1, 6), int))[0]
    source_mask = np.array([[0, 0, 1, 1, 1, 0, 0, 1, 1, 1, 1, 1, 1, 0]])
    mask = np.array([[0, 1, 1, 0, 0, 0, 1, 1, 0, 1, 1, 0]])
    spread = [rng.integers(0, base.dims.vocab_size, m.shape) for m in (source_mask, mask)]
    spread[0][source_mask == 1], spread[1][mask == 1] = source[0], ids[0]
    padded = run_stand_ins(base, model, spread[0], source_mask, spread[1], mask)[0]
    np.testing.assert_allclose(padded[mask[0] == 1], alone, atol=1e-5 * np.abs(alone).max())


def test_a_source_of_nothing_but_padding_gives_numbers(base: BaseModel) -> None:
    model, ids = load_model(base), np.array([[3, 4], [3, 4]])
    source = np.array([[5, 6, 7], [5, 6, 7]])
    source_mask, ones = np.array([[0, 0, 0], [1, 1, 1]]), np.ones((2, 2), int)
    both = run_stand_ins(base, model, source, source_mask, ids, ones)
    alone = run_stand_ins(base, model, source[1:], source_mask[1:], ids[1:], ones[1:])
    assert np.isfinite(both).all()
    np.testing.assert_allclose(both[1:], alone, atol=1e-5 * np.abs(alone).max())


@pytest.mark.parametrize("name", NAMES)
def test_the_model_is_the_one_that_paddlenlp_loads(name: str, tmp_path: Path) -> None:
    folder = tiny.make(tmp_path, name)
    theirs = paddlenlp.transformers.T5ForConditionalGeneration.from_pretrained(folder)
    theirs.eval()
    ours = load_model(open_base(folder))
    feeds = tensors(input_ids=[[3, 4, 5, 6]], decoder_input_ids=[[0, 9, 8]])
    with paddle.no_grad():
        want, have = (model(**feeds, return_dict=False)[0] for model in (theirs, ours))
    np.testing.assert_array_equal(want.numpy(), have.numpy())


@pytest.mark.parametrize("name", NAMES)
def test_both_layouts_are_the_same_model(name: str, tmp_path: Path) -> None:
    ours = open_base(tiny.make(tmp_path / "a", name))
    theirs = open_base(tiny.make(tmp_path / "b", name, layout="huggingface"))
    for base in (ours, theirs):
        base.check_names()
    assert (ours.tensors.layout, theirs.tensors.layout) == ("paddlenlp", "huggingface")
    assert ours.fingerprint == theirs.fingerprint


def with_copies(folder: Path, change: Callable[[dict[str, Any]], None]) -> BaseModel:
    """A checkpoint as the first releases were written: with every copy of the embeddings."""
    path = tiny.make(folder, "t5", layout="huggingface") / "model.safetensors"
    stored = load_file(path)
    for name in ("encoder.embed_tokens", "decoder.embed_tokens", "lm_head"):
        stored[f"{name}.weight"] = stored["shared.weight"].copy()
    old = "decoder.block.0.layer.{}.relative_attention_bias.weight"
    stored[old.format("1.EncDecAttention")] = stored[old.format("0.SelfAttention")] + 1
    change(stored)
    save_file(stored, path, {"format": "pt"})
    return open_base(folder)


def test_copies_of_the_embeddings_are_read_as_one(tmp_path: Path) -> None:
    copied = with_copies(tmp_path / "copies", lambda stored: None)
    copied.check_names()
    assert copied.fingerprint == open_base(tiny.make(tmp_path / "one", "t5")).fingerprint
    load_model(copied)


@pytest.mark.parametrize("name", ["encoder.embed_tokens", "lm_head"])
def test_a_copy_that_differs_is_refused(name: str, tmp_path: Path) -> None:
    def change(stored: dict[str, Any]) -> None:
        stored[f"{name}.weight"][5, 2] += 1

    with pytest.raises(CheckpointError, match="holds different values"):
        with_copies(tmp_path, change).check_names()


@pytest.mark.parametrize("name", NAMES)
def test_every_weight_is_in_one_of_the_graphs(name: str) -> None:
    config = tiny.config_of(name)
    family = find_family(config)
    assert isinstance(family, EncoderDecoderFamily)
    names = unique_parameters(build_skeleton(family, config))
    both = {n for n in names if family.encoder_uses(n) and family.decoder_uses(n)}
    assert both == {"t5.shared.weight"}
    assert all(family.encoder_uses(n) or family.decoder_uses(n) for n in names)


@pytest.mark.parametrize("config", [T5_SMALL, FLAN_T5_SMALL])
def test_published_configurations(config: dict[str, Any]) -> None:
    family = find_family(config)
    skeleton = build_skeleton(family, config)
    names = family.names(config)
    expected = names.parameters(0) - family.tied(config).keys()
    assert expected == set(unique_parameters(skeleton))
    written = json.loads(json.dumps(family.huggingface_config(config)))
    changed = {k for k, v in config.items() if written.get(k, v) != v}
    assert not changed
    assert family.paddle_arguments(written) == family.paddle_arguments(config)


@pytest.mark.parametrize(("entries", "said"), REFUSED)
def test_what_would_be_computed_otherwise_is_refused(entries: dict[str, Any], said: str) -> None:
    config = tiny.config_of("t5", **entries)
    with pytest.raises(UnsupportedModelError, match=said):
        find_family(config).paddle_arguments(config)


@pytest.mark.parametrize(
    ("entries", "token"),
    [
        ({"decoder_start_token_id": 7, "bos_token_id": 5, "pad_token_id": 3}, 7),
        ({"bos_token_id": 5, "pad_token_id": 3}, 5),
        ({"pad_token_id": 3}, 3),
        ({}, 0),
    ],
)
def test_what_texts_begin_with(entries: dict[str, int], token: int) -> None:
    family = find_family(T5_SMALL)
    assert isinstance(family, EncoderDecoderFamily)
    assert family.start_token(entries) == token


@pytest.mark.parametrize("name", NAMES)
def test_an_adapter_goes_to_peft_and_back(name: str, tmp_path: Path) -> None:
    """Whichever half has more layers."""
    base = tiny.make(tmp_path / "base", name)
    lora = tiny.make_lora(tmp_path / "lora", base)
    convert_adapter(lora, tmp_path / "peft", to="hf", base=base)
    convert_adapter(tmp_path / "peft", tmp_path / "back", to="paddle", base=base)
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text("utf-8"))
    assert {"q", "wo"} <= set(config["target_modules"])
    assert config["task_type"] == "SEQ_2_SEQ_LM"
    want, have = (read_adapter(tmp_path / folder).pairs for folder in ("lora", "back"))
    assert want.keys() == have.keys()
    assert {"t5.encoder.block.1.layer.0.SelfAttention.q"} < want.keys()
    for module, pair in want.items():
        np.testing.assert_array_equal(have[module].A @ have[module].B, pair.A @ pair.B)
