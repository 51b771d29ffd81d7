"""How GPT, OPT and Bloom count positions: PaddleNLP's own way, padding, the end of the table."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest
from model_recipes import load_recipe

import peft_deploy
from peft_deploy.adapters.prefix import PrefixConfig, PrefixModelForCausalLM
from peft_deploy.base import open_base
from peft_deploy.base.dygraph import load_model
from peft_deploy.config.export import ExportOptions
from peft_deploy.errors import ExecutionError
from peft_deploy.families.standins import alibi_bias, alibi_slopes
from peft_deploy.parity.play import empty_cache
from peft_deploy.runtime.onnx_runner import OnnxRunner

tiny = load_recipe("tiny")
FAMILIES = ["gpt", "opt", "bloom"]
IDS = np.array([[3, 17, 99, 130, 4], [60, 8, 21, 7, 9]])
NO_CHECK = ExportOptions(validate=False)
SLOTS, PADDED = 8, 3  # left-padded to 8


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            peft_deploy.export(tiny.make(folder / "base", name), folder / "out", options=NO_CHECK)
            made[name] = folder / "out"
        return made[name]

    return make


def call(runner: OnnxRunner, **given: Any) -> dict[str, np.ndarray]:
    cache = empty_cache(runner.signature, len(given["input_ids"]))
    pasts = zip(runner.signature.past, cache.values(), strict=True)
    feeds = {name: np.asarray(value, np.int64) for name, value in given.items()}
    feeds = {name: value for name, value in feeds.items() if name in runner.signature.input_names}
    return runner.run({**feeds, **{spec.name: array for spec, array in pasts}})


def left_padded() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    ids = np.concatenate([np.full((2, PADDED), 11), IDS], 1)
    mask = np.repeat((np.arange(SLOTS) >= PADDED)[None], 2, 0).astype(np.int64)
    return ids, mask, np.maximum(np.cumsum(mask, -1) - 1, 0)


@pytest.mark.parametrize("name", ["opt", "opt-post-norm-projected", "bloom"])
def test_paddlenlp_counts_positions_in_the_mask(name: str, tmp_path: Path) -> None:
    """As it comes, without the positions that the reference is given for the comparison with a bundle."""
    base = open_base(tiny.make(tmp_path / "base", name))
    model, signature = load_model(base), base.family.signature(base.config)
    ids, mask, positions = left_padded()
    feeds = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    cache = empty_cache(signature, 2).values()
    feeds |= {spec.name: array for spec, array in zip(signature.past, cache, strict=True)}
    tensors = {n: paddle.to_tensor(feeds[n]) for n in signature.input_names}
    with paddle.no_grad():
        own = model(tensors["input_ids"], attention_mask=tensors["attention_mask"], use_cache=True)
        given = base.family.run_eagerly(model, tensors, signature)["logits"]
        alone = model(paddle.to_tensor(IDS), use_cache=True)[0].numpy()
    np.testing.assert_allclose(own[0].numpy()[:, PADDED:], alone, atol=1e-5)
    np.testing.assert_allclose(given.numpy()[:, PADDED:], alone, atol=1e-5)


def test_the_reference_is_given_other_positions_than_it_would_count(tmp_path: Path) -> None:
    base = open_base(tiny.make(tmp_path / "base", "opt"))
    model, signature = load_model(base), base.family.signature(base.config)
    cache = empty_cache(signature, 2).values()
    feeds = {spec.name: array for spec, array in zip(signature.past, cache, strict=True)}
    feeds |= {"input_ids": IDS, "attention_mask": np.ones_like(IDS)}

    def logits(first: int) -> np.ndarray:
        given = {**feeds, "position_ids": np.arange(first, first + 5)[None].repeat(2, 0)}
        tensors = {n: paddle.to_tensor(a) for n, a in given.items()}
        with paddle.no_grad():
            found: np.ndarray = base.family.run_eagerly(model, tensors, signature)[
                "logits"
            ].numpy()
        return found

    table = model.opt.embeddings.position_embeddings
    with paddle.no_grad():
        counted = model(paddle.to_tensor(IDS), use_cache=True)[0].numpy()
        np.testing.assert_allclose(logits(0), counted, atol=1e-6)
        moved = logits(7)
        table.weight.set_value(paddle.roll(table.weight, -7, axis=0))
        np.testing.assert_allclose(
            model(paddle.to_tensor(IDS), use_cache=True)[0].numpy(), moved, atol=1e-6
        )
    assert np.abs(moved - counted).max() > 0.5


@pytest.mark.parametrize("heads", [1, 2, 3, 5, 8, 12, 14, 16, 40, 71, 112])
def test_alibi_is_paddlenlps_at_real_tokens(heads: int) -> None:
    from paddlenlp.transformers.bloom.modeling import build_alibi_tensor

    mask = np.array([[0, 0, 1, 1, 1, 1, 1], [1, 1, 0, 0, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0]])
    theirs = build_alibi_tensor(paddle.to_tensor(mask).astype("bool"), heads, "float32").numpy()
    ours = alibi_bias(paddle.to_tensor(mask), alibi_slopes(heads)).numpy()
    assert ours.shape == (3, heads, 1, 7)
    real = np.broadcast_to(mask[:, None] == 1, theirs.shape)
    np.testing.assert_allclose(ours[:, :, 0][real], theirs[real], rtol=1e-6)


@pytest.mark.convert
@pytest.mark.parametrize("name", FAMILIES)
def test_a_row_of_padding_alone_gives_numbers(name: str, bundle: Callable[[str], Path]) -> None:
    runner = OnnxRunner(bundle(name))
    ones = np.ones_like(IDS)
    positions = np.arange(5)[None].repeat(2, 0)
    full = call(runner, input_ids=IDS, attention_mask=ones, position_ids=positions)
    half = call(
        runner,
        input_ids=IDS,
        attention_mask=ones * [[1], [0]],
        position_ids=positions * [[1], [0]],
    )
    assert all(np.isfinite(array).all() for array in half.values())
    np.testing.assert_allclose(half["logits"][0], full["logits"][0], atol=1e-5)
    assert np.abs(half["logits"][1] - full["logits"][1]).max() > 0.1


@pytest.mark.convert
@pytest.mark.parametrize("name", ["gpt", "opt"])
def test_the_table_ends_where_the_model_does(name: str, bundle: Callable[[str], Path]) -> None:
    """OPT keeps its table two rows further down; it must not be read past the end for that."""
    runner = OnnxRunner(bundle(name))
    limit = tiny.config_of(name)["max_position_embeddings"]
    given = {"input_ids": IDS[:1], "attention_mask": np.ones((1, 5))}
    last = call(runner, **given, position_ids=np.arange(limit - 5, limit)[None])
    assert np.isfinite(last["logits"]).all()
    with pytest.raises(ExecutionError, match=rf"{limit}; the last .* is {limit - 1}"):
        call(runner, **given, position_ids=np.arange(limit - 4, limit + 1)[None])


@pytest.mark.convert
def test_alibi_goes_on_past_the_trained_length(
    bundle: Callable[[str], Path], tmp_path: Path
) -> None:
    length = tiny.config_of("bloom")["seq_length"] + 30
    ids = np.resize(IDS, (1, length))
    found = call(OnnxRunner(bundle("bloom")), input_ids=ids, attention_mask=np.ones_like(ids))
    model = load_model(open_base(tiny.make(tmp_path / "base", "bloom")))
    with paddle.no_grad():
        wanted = model(paddle.to_tensor(ids), use_cache=True)[0].numpy()
    np.testing.assert_allclose(found["logits"], wanted, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.convert
@pytest.mark.parametrize("name", FAMILIES)
def test_the_files_for_other_runtimes(name: str, bundle: Callable[[str], Path]) -> None:
    """A type that onnxruntime-genai knows, and no input that the graph does not have."""
    folder = bundle(name)
    model = json.loads((folder / "genai_config.json").read_text())["model"]
    assert model["type"] == "decoder"
    inputs = set(model["decoder"]["inputs"].values())
    assert ("position_ids" in inputs) == (name != "bloom")
    runner = OnnxRunner(folder)
    plain = {spec.name for spec in runner.signature.inputs} - {
        s.name for s in runner.signature.past
    }
    assert plain == {n for n in inputs if not n.startswith("past_key_values")}
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == {"gpt": "gpt2"}.get(name, name)


@pytest.mark.convert
def test_behind_a_prefix_opt_counts_on(tmp_path: Path) -> None:
    """Its positions come from the mask, in which a prefix has columns."""
    base = tiny.make(tmp_path / "base", "opt")
    model = PrefixModelForCausalLM(load_model(open_base(base)), PrefixConfig(num_prefix_tokens=3))
    values = np.random.default_rng(2).standard_normal(model.prefix_encoder[0].weight.shape)
    model.prefix_encoder[0].weight.set_value(paddle.to_tensor(values.astype(np.float32)))
    model.eval().save_pretrained(tmp_path / "prefix")
    result = peft_deploy.export(base, tmp_path / "out", adapter=tmp_path / "prefix")
    assert result.parity is not None and result.manifest is not None
    (part,) = result.parity.parts.values()
    assert result.parity.passed and part.passed and not part.warnings
    (entry,) = result.manifest.adapters
    assert (entry["tokens"], entry["position_offset"]) == (3, 3)
