from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny_graph
import tiny_text

from peft_deploy.errors import BundleError, ConfigError
from peft_deploy.runtime import LoadedBundle, load_bundle

PROMPTS = ["The capital of France is", "one two", "über 😀"]


@pytest.fixture(scope="session")
def loaded(bundle: Path) -> LoadedBundle:
    return load_bundle(bundle, threads=1)


@pytest.fixture
def copy(bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle, tmp_path / "copy"))


def expected_ids(weights: dict, ids: list[int], count: int) -> list[int]:
    tokens = tiny_graph.reference_greedy(weights, ids, count)
    stops = [at for at, token in enumerate(tokens) if token == tiny_text.END]
    return tokens[: stops[0] + 1] if stops else tokens


def test_text_comes_out_of_text(loaded: LoadedBundle, weights: dict) -> None:
    ids = loaded.tokenizer.encode(PROMPTS[0])
    result = loaded.generate(PROMPTS[0], max_new_tokens=10)
    tokens = expected_ids(weights, ids, 10)
    assert list(result.token_ids) == tokens
    assert result.text == loaded.tokenizer.decode(tokens)
    assert result.prompt_tokens == len(ids)


@pytest.mark.parametrize("padding", ["left", "right"])
def test_several_prompts_are_one_batch(loaded: LoadedBundle, padding: str) -> None:
    alone = [loaded.generate(prompt, max_new_tokens=9) for prompt in PROMPTS]
    together = loaded.generate(PROMPTS, max_new_tokens=9, padding=padding)
    assert isinstance(together, list)
    assert [r.token_ids for r in together] == [r.token_ids for r in alone]
    assert [r.text for r in together] == [r.text for r in alone]
    assert len({r.prefill_seconds for r in together}) == 1


def test_pieces_of_text_come_as_they_are_made_and_add_up(loaded: LoadedBundle) -> None:
    run = loaded.start(PROMPTS, max_new_tokens=20)
    texts = ["", "", ""]
    pieces = 0
    for piece in run:
        assert piece.text
        texts[piece.row] += piece.text
        pieces += 1
    assert pieces > 10
    assert [result.text for result in run.results] == texts


def test_the_chat_template_is_applied_once(loaded: LoadedBundle, weights: dict) -> None:
    text = (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\none two<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = loaded.tokenizer.encode(text, special=False)
    assert ids[0] == tiny_text.START
    result = loaded.generate("one two", chat=True, system="Be brief.", max_new_tokens=6)
    assert list(result.token_ids) == expected_ids(weights, ids, 6)
    assert result.token_ids != loaded.generate("one two", max_new_tokens=6).token_ids


def test_an_end_token_stops_and_has_no_text(copy: Path, loaded: LoadedBundle) -> None:
    free = loaded.generate(PROMPTS[1], max_new_tokens=8)
    stop = free.token_ids[3]
    assert stop not in free.token_ids[:3]
    path = copy / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": [tiny_text.END, stop]}), "utf-8")
    result = load_bundle(copy).generate(PROMPTS[1], max_new_tokens=8)
    assert result.token_ids == free.token_ids[:4]
    assert result.finish_reason == "stop"
    assert result.text == loaded.tokenizer.decode(free.token_ids[:3])


def test_the_context_length_is_the_models(loaded: LoadedBundle) -> None:
    assert loaded.context_length == tiny_graph.MAX_POSITIONS
    result = loaded.generate(PROMPTS[0], max_new_tokens=1000)
    assert result.finish_reason == "context"
    assert result.prompt_tokens + len(result.token_ids) == tiny_graph.MAX_POSITIONS
    with pytest.raises(ConfigError, match=f"the model can see {tiny_graph.MAX_POSITIONS}"):
        loaded.generate("!" * 100)


def test_a_prefix_goes_before_every_prompt(loaded: LoadedBundle) -> None:
    rng = np.random.default_rng(5)
    shape = (1, tiny_graph.K, 4, tiny_graph.D)
    names = [spec.name for spec in loaded.runner.signature.past]
    prefix = {name: rng.normal(size=shape).astype(np.float32) for name in names}
    alone = [loaded.generate(p, max_new_tokens=6, prefix=prefix).token_ids for p in PROMPTS]
    together = loaded.generate(PROMPTS, max_new_tokens=6, prefix=prefix)
    assert [result.token_ids for result in together] == alone
    without = loaded.generate(PROMPTS, max_new_tokens=6)
    assert all(a != b.token_ids for a, b in zip(alone, without, strict=True))


def test_a_system_message_needs_the_template(loaded: LoadedBundle) -> None:
    with pytest.raises(ConfigError, match="system message needs the chat template"):
        loaded.generate("hello", system="Be brief.")


def test_results_are_ready_for_json(loaded: LoadedBundle) -> None:
    result = loaded.generate("one", max_new_tokens=2)
    data = json.loads(json.dumps(result.to_dict()))
    assert data["token_ids"] == list(result.token_ids)
    assert data["finish_reason"] == "length"
    assert data["tokens_per_second"] > 0
    assert loaded.generate("one", max_new_tokens=1).to_dict()["tokens_per_second"] is None


def test_verification_finds_one_changed_byte(copy: Path) -> None:
    load_bundle(copy, verify=True)
    path = copy / "model.onnx.data"
    data = bytearray(path.read_bytes())
    data[1000] ^= 1
    path.write_bytes(data)
    with pytest.raises(
        BundleError, match=r"not those that its manifest describes:\n  model.onnx.d"
    ):
        load_bundle(copy, verify=True)


def test_missing_files_are_named(copy: Path, tmp_path: Path) -> None:
    (copy / "tokenizer.json").unlink()
    (copy / "model.onnx.data").unlink()
    with pytest.raises(BundleError, match=r"missing:\n  model\.onnx\.data\n  tokenizer\.json"):
        load_bundle(copy)
    with pytest.raises(BundleError, match="is not a bundle"):
        load_bundle(tmp_path / "nothing")


def test_a_manifest_cannot_name_files_elsewhere(copy: Path) -> None:
    path = copy / "peft_deploy.json"
    data = json.loads(path.read_text("utf-8"))
    data["files"]["../other"] = "0" * 64
    path.write_text(json.dumps(data), "utf-8")
    with pytest.raises(BundleError, match=r"names files outside of it:\n  \.\./other"):
        load_bundle(copy)


def test_a_bundle_without_a_tokenizer_still_runs(copy: Path) -> None:
    path = copy / "peft_deploy.json"
    data = json.loads(path.read_text("utf-8"))
    del data["files"]["tokenizer.json"]
    path.write_text(json.dumps(data), "utf-8")
    (copy / "tokenizer.json").unlink()
    loaded = load_bundle(copy)
    assert loaded.runner.signature == tiny_graph.signature()
    with pytest.raises(BundleError, match=r"has no tokenizer\.json, so it takes token ids"):
        loaded.generate("hello")


def test_a_damaged_tokenizer_is_the_bundles_fault(copy: Path) -> None:
    (copy / "tokenizer.json").write_text("{}", "utf-8")
    with pytest.raises(BundleError, match=r"tokenizer\.json cannot be read"):
        load_bundle(copy)
