# ruff: noqa: E402 (the environment has to be prepared before Paddle's first import)

"""Encoders without a conversion: names, stand-ins against PaddleNLP's own forward, what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from model_recipes import load_recipe
from safetensors.numpy import load_file, save_file

pytest.importorskip("paddle")
pytest.importorskip("paddlenlp")

from peft_deploy.base import open_base
from peft_deploy.environment import require_paddle
from peft_deploy.errors import CheckpointError, UnsupportedModelError
from peft_deploy.families import Pooling, find_family

require_paddle("these tests")
import paddle
import paddlenlp.transformers

from peft_deploy.adapters.lora import LoRAModel
from peft_deploy.base.dygraph import load_model
from peft_deploy.config.merge import MergeOptions
from peft_deploy.workflows.merge import merge

tiny = load_recipe("tiny")
NAMES = [name for name in tiny.known() if name.startswith(("bert", "ernie", "roberta"))]
TOLERANCE = 1e-5
S = 11

Arrays = dict[str, npt.NDArray[Any]]
Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def folder(name: str, **options: Any) -> Path:
        made: Path = tiny.make(
            tmp_path / f"{name}-{len(list(tmp_path.iterdir()))}", name, **options
        )
        return made

    return folder


def feeds_for(config: dict[str, Any], lengths: list[int], side: str = "right") -> Arrays:
    """Random rows of so many tokens, padded with the model's padding token."""
    rng = np.random.default_rng(5)
    pad = config["pad_token_id"]
    ids = rng.integers(pad + 1, config["vocab_size"], (len(lengths), S))
    mask = np.zeros_like(ids)
    for row, n in enumerate(lengths):
        mask[row, :n] = 1
    mask = mask[:, ::-1].copy() if side == "left" else mask
    segments = rng.integers(0, min(2, config["type_vocab_size"]), ids.shape)
    return {
        "input_ids": np.where(mask == 1, ids, pad),
        "attention_mask": mask,
        "token_type_ids": segments,
    }


def run_both(
    base_folder: Path, feeds: Arrays, pooling: str | None = None
) -> tuple[Arrays, Arrays]:
    """PaddleNLP's outputs and the stand-in's."""
    base = open_base(base_folder, pooling)
    model = load_model(base)
    signature = base.family.signature(base.config)
    tensors = {name: paddle.to_tensor(feeds[name]) for name in signature.input_names}
    with paddle.no_grad():
        want = base.family.run_eagerly(model, tensors, signature)
        stand_in = base.family.stand_in(model)
        stand_in.eval()
        have = stand_in(*tensors.values())
    names = signature.output_names
    return {n: want[n].numpy() for n in names}, {
        n: t.numpy() for n, t in zip(names, have, strict=True)
    }


@pytest.mark.parametrize("name", NAMES)
def test_the_model_is_the_one_that_paddlenlp_loads(name: str, make: Make) -> None:
    folder = make(name)
    config = tiny.config_of(name)
    if "sentence_pooling" in config:
        config.pop("sentence_pooling")
    theirs = getattr(paddlenlp.transformers, config["architectures"][0]).from_pretrained(folder)
    theirs.eval()
    ours = load_model(open_base(folder))
    feeds = {n: paddle.to_tensor(a) for n, a in feeds_for(config, [S, 4]).items()}
    with paddle.no_grad():
        want, have = theirs(**feeds), ours(**feeds)
    first = [x[0] if isinstance(x, tuple) else x for x in (want, have)]
    np.testing.assert_array_equal(first[0].numpy(), first[1].numpy())


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", NAMES)
def test_the_stand_in_computes_paddlenlps_forward(name: str, side: str, make: Make) -> None:
    feeds = feeds_for(tiny.config_of(name), [S, 4, 1], side)
    want, have = run_both(make(name), feeds)
    keep = feeds["attention_mask"] == 1
    for output, values in want.items():
        pair = [values, have[output]]
        if values.shape[:2] == keep.shape:
            pair = [array[keep] for array in pair]
        np.testing.assert_allclose(pair[1], pair[0], atol=TOLERANCE * np.abs(pair[0]).max())


@pytest.mark.parametrize("name", NAMES)
def test_padding_on_either_side_counts_for_nothing(name: str, make: Make) -> None:
    folder, config = make(name), tiny.config_of(name)
    right, left = (feeds_for(config, [5], side) for side in ("right", "left"))
    left["input_ids"][:, -5:] = right["input_ids"][:, :5]
    left["token_type_ids"][:, -5:] = right["token_type_ids"][:, :5]
    alone = {key: array[:, :5] for key, array in right.items()}
    _, want = run_both(folder, alone)
    for feeds, place in ((right, slice(0, 5)), (left, slice(S - 5, S))):
        _, have = run_both(folder, feeds)
        for output, values in want.items():
            got = have[output]
            got = got[:, place] if got.shape[1:2] == (S,) else got
            np.testing.assert_allclose(got, values, atol=TOLERANCE * np.abs(values).max())


@pytest.mark.parametrize("name", NAMES)
def test_a_hole_in_the_mask_moves_no_position(name: str, make: Make) -> None:
    feeds = feeds_for(tiny.config_of(name), [S, S])
    feeds["attention_mask"][0, 4:6] = 0
    want, have = run_both(make(name), feeds)
    for output, values in want.items():
        np.testing.assert_allclose(have[output], values, atol=TOLERANCE * np.abs(values).max())


@pytest.mark.parametrize("name", NAMES)
def test_a_row_of_padding_gives_numbers(name: str, make: Make) -> None:
    _, have = run_both(make(name), feeds_for(tiny.config_of(name), [S, 0]))
    assert all(np.isfinite(values).all() for values in have.values())


@pytest.mark.parametrize("name", ["ernie-tokens", "roberta-classification"])
def test_an_unmasked_padding_token_has_no_embedding(name: str, make: Make) -> None:
    config = tiny.config_of(name)
    feeds = feeds_for(config, [S])
    feeds["input_ids"][0, 3] = config["pad_token_id"]
    want, have = run_both(make(name), feeds)
    np.testing.assert_allclose(have["logits"], want["logits"], atol=1e-5)


@pytest.mark.parametrize("mode", ["mean", "cls"])
@pytest.mark.parametrize("normalize", [True, False])
def test_sentence_embeddings(mode: str, normalize: bool, make: Make) -> None:
    pooling = Pooling(mode=mode, normalize=normalize)
    feeds = feeds_for(tiny.config_of("bert-embedding"), [S, 4, 1], "left")
    want, have = run_both(make("bert-embedding"), feeds, pooling)  # type: ignore[arg-type]
    hidden, keep = want["last_hidden_state"], feeds["attention_mask"]
    first = hidden[np.arange(3), keep.argmax(1)]
    mean = (hidden * keep[..., None]).sum(1) / keep.sum(1, keepdims=True)
    by_hand = first if mode == "cls" else mean
    if normalize:
        by_hand /= np.linalg.norm(by_hand, axis=-1, keepdims=True)
    for values in (want, have):
        np.testing.assert_allclose(values["sentence_embedding"], by_hand, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_both_layouts_are_the_same_model(name: str, make: Make) -> None:
    ours, theirs = (open_base(make(name, layout=kind)) for kind in tiny.LAYOUTS)
    assert (ours.tensors.layout, theirs.tensors.layout) == tiny.LAYOUTS
    theirs.check_names()
    assert ours.fingerprint == theirs.fingerprint
    assert ours.dims == theirs.dims
    pair = (base.family.signature(base.config) for base in (ours, theirs))
    assert len(set(pair)) == 1


def test_an_old_checkpoint_without_a_pooler_and_with_a_buffer(make: Make) -> None:
    """As transformers writes a token classifier, with the layer norms named as in TensorFlow."""
    folder = make("ernie-tokens", layout="huggingface")
    base = open_base(folder)
    want = base.fingerprint
    file = folder / "model.safetensors"
    tensors = {
        key.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): array
        for key, array in load_file(file).items()
    }
    pooler = {key: tensors.pop(key) for key in list(tensors) if ".pooler." in key}
    assert len(pooler) == 2
    tensors["ernie.embeddings.position_ids"] = np.arange(40)[None]
    tensors["cls.seq_relationship.weight"] = np.ones((2, 60), np.float32)
    save_file(tensors, file, {"format": "pt"})
    old = open_base(folder)
    old.check_names()
    parameters = dict(load_model(old).named_parameters())
    assert not parameters["ernie.pooler.dense.weight"].numpy().any()
    save_file({**tensors, **pooler}, file, {"format": "pt"})
    assert open_base(folder).fingerprint == want


def test_what_an_output_needs_must_not_be_missing(make: Make) -> None:
    folder = make("bert-classification")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    del tensors["bert.pooler.dense.bias"]
    save_file(tensors, file, {"format": "np"})
    with pytest.raises(CheckpointError, match=r"bert\.pooler\.dense\.bias"):
        open_base(folder).check_names()


@pytest.mark.parametrize("name", NAMES)
def test_the_bundles_config_describes_the_same_model(name: str) -> None:
    config = tiny.config_of(name)
    family = find_family(config)
    written = family.huggingface_config(config)
    again = find_family(written)
    assert type(again) is type(family)
    assert again.dims(written) == family.dims(config)
    assert again.signature(written) == family.signature(config)
    assert again.paddle_arguments(written) == {
        **family.paddle_arguments(config),
        "layer_norm_eps": written["layer_norm_eps"],
    }


def test_class_names_travel() -> None:
    config = tiny.config_of("bert-classification")
    written = find_family(config).huggingface_config(config)
    assert written["id2label"] == {"0": "bad", "1": "good", "2": "neither"}
    assert written["label2id"] == {"bad": 0, "good": 1, "neither": 2}


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ({"hidden_act": "gelu_new"}, "hidden_act to 'gelu_new'"),
        ({"position_embedding_type": "relative_key"}, "relative_key"),
        ({"is_decoder": True}, "causal attention"),
        ({"fuse": True}, "fused"),
        ({"num_attention_heads": 7}, "7 attention heads"),
    ],
)
def test_what_cannot_be_exported_is_refused(entries: dict[str, Any], said: str) -> None:
    config = tiny.config_of("bert-classification", **entries)
    with pytest.raises(UnsupportedModelError, match=said):
        find_family(config).paddle_arguments(config)


def test_ernie_says_where_it_differs_from_transformers() -> None:
    config = tiny.config_of("ernie-tokens", layer_norm_eps=1e-5)
    remarks = find_family(config).remarks(config)
    assert len(remarks) == 2
    assert "layer_norm_eps to 1e-05" in remarks[0] and "task_id to 1" in remarks[1]
    assert find_family(config).huggingface_config(config)["layer_norm_eps"] == 1e-12


@pytest.mark.parametrize("name", ["bert-classification", "ernie-tokens", "bert-embedding"])
@pytest.mark.parametrize("to", ["paddle", "hf"])
def test_a_merged_checkpoint_is_the_adapted_model(
    name: str, to: str, make: Make, tmp_path: Path
) -> None:
    base = make(name, layout="huggingface" if to == "paddle" else "paddlenlp")
    adapter = tiny.make_lora(tmp_path / "adapter", base)
    merge(base, adapter, tmp_path / "merged", options=MergeOptions(to=to))
    merged = open_base(tmp_path / "merged")
    config = tiny.config_of(name)
    assert merged.family.signature(merged.config) == open_base(base).family.signature(config)
    assert merged.config.get("sentence_pooling") == config.get("sentence_pooling")
    if "id2label" in config:
        assert list(merged.config["id2label"].values()) == list(config["id2label"].values())
    model = LoRAModel.from_pretrained(load_model(open_base(base)), adapter)
    model.eval()
    feeds = {n: paddle.to_tensor(a) for n, a in feeds_for(config, [S, 4]).items()}
    with paddle.no_grad():
        want, have = model(**feeds), load_model(merged)(**feeds)
        first = [x[0] if isinstance(x, tuple) else x for x in (want, have)]
    np.testing.assert_allclose(first[1].numpy(), first[0].numpy(), atol=1e-4)
    if to == "paddle":
        cls = getattr(paddlenlp.transformers, config["architectures"][0])
        theirs = cls.from_pretrained(tmp_path / "merged")
        theirs.eval()
        with paddle.no_grad():
            returned = theirs(**feeds)
        values = returned[0] if isinstance(returned, tuple) else returned
        np.testing.assert_array_equal(values.numpy(), first[1].numpy())


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("bert-embedding", "FEATURE_EXTRACTION"),
        ("bert-classification", "SEQ_CLS"),
        ("ernie-tokens", "TOKEN_CLS"),
        ("roberta-answers", "QUESTION_ANS"),
        ("ernie-masked-lm", None),
        ("llama", "CAUSAL_LM"),
    ],
)
def test_what_peft_calls_the_task(name: str, task: str | None) -> None:
    config = tiny.config_of(name)
    assert find_family(config).peft_task(config) == task
