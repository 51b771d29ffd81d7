"""A bank of adapters from folders to bundle: each row of a batch is that adapter's own merged bundle."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from flows_adapter import adapter_for
from flows_genai import Genai, needs_genai, ours
from model_recipes import load_recipe

import peft_deploy
from peft_deploy.adapters.formats.joint_lora import separate
from peft_deploy.adapters.formats.onnx_file import read_onnx_file, write_onnx_adapter
from peft_deploy.bundle import Manifest
from peft_deploy.bundle.slots import read_slots
from peft_deploy.cli import cli
from peft_deploy.config.export import ExportOptions
from peft_deploy.errors import AdapterError, ConfigError
from peft_deploy.inspection import inspect_bundle
from peft_deploy.runtime import GenerationOptions, OnnxRunner, Session
from peft_deploy.signature import ATTENTION_MASK, INPUT_IDS, POSITION_IDS
from peft_deploy.workflows.validate import validate

pytestmark = pytest.mark.convert

PROMPTS = [[3, 17, 5, 9, 40, 33], [8, 5, 6], [40, 99, 33, 7, 1, 9, 12, 4], [3, 17, 5]]
ROWS: list[str | None] = ["feed_forward", None, "tuned", "attention"]
STEPS = 12
UNCHECKED = ExportOptions(validate=False)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def folders(
    tiny_llama: Path, tiny_adapter: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Three adapters of ranks 5, 2 and 3; two of them leave most layers alone."""
    root = tmp_path_factory.mktemp("adapters")
    attention, feed_forward = r".*(q|v)_proj", r".*(up|down)_proj"
    return {
        "tuned": tiny_adapter,
        "attention": adapter_for(
            tiny_llama, root / "attention", rank=2, seed=21, targets=attention
        ),
        "feed_forward": adapter_for(tiny_llama, root / "ff", rank=3, seed=5, targets=feed_forward),
    }


@pytest.fixture(scope="module")
def bank(
    tiny_llama: Path, folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    output = tmp_path_factory.mktemp("bundles") / "bank"
    words = [
        word for name, folder in folders.items() for word in ("--adapter", f"{name}={folder}")
    ]
    result = run(
        "export", "--base", tiny_llama, *words, "--adapter-bank", 4, "--output", output
    )  # with its check
    assert result.exit_code == 0, result.stderr
    return output


@pytest.fixture(scope="module")
def merged(
    tiny_llama: Path,
    base_bundle: Path,
    merged_bundle: Path,
    folders: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str | None, Path]:
    found: dict[str | None, Path] = {None: base_bundle, "tuned": merged_bundle}
    for name in ("attention", "feed_forward"):
        found[name] = tmp_path_factory.mktemp("merged") / name
        peft_deploy.export(tiny_llama, found[name], adapter=folders[name], options=UNCHECKED)
    return found


def _loaded(bundle: Path) -> Session:
    session = Session(bundle)
    for entry in session.manifest.adapters:
        session.load_adapter(entry["name"])
    return session


def test_four_rows_are_four_merged_bundles(bank: Path, merged: dict[str | None, Path]) -> None:
    session, options = _loaded(bank), GenerationOptions(max_new_tokens=STEPS)
    want = [
        Session(merged[name]).generate([prompt], options)[0].token_ids
        for name, prompt in zip(ROWS, PROMPTS, strict=True)
    ]
    found = session.generate(PROMPTS, options, adapters=ROWS)
    assert [result.token_ids for result in found] == want
    same = _feeds(session, [PROMPTS[0]] * len(ROWS))
    rows = session.run(same, ["logits"], adapters=ROWS)["logits"]
    for row, name in zip(rows, ROWS, strict=True):
        runner = OnnxRunner(merged[name])
        alone = runner.run(_feeds(runner, PROMPTS[:1]), ["logits"])["logits"][0]
        np.testing.assert_allclose(row, alone, atol=2e-5 * np.abs(alone).max())
    assert all(np.abs(a - b).max() > 1 for i, a in enumerate(rows) for b in rows[:i])


def test_what_the_bundle_holds(bank: Path, base_bundle: Path) -> None:
    manifest = Manifest.read(bank)
    assert manifest.signature.input_names[-1] == "adapter_ids"
    assert manifest.graph["adapter_bank"] == {
        "capacity": 4,
        "file": "adapter_bank.onnx_adapter",
        "ids": {"tuned": 1, "attention": 2, "feed_forward": 3},
    }
    slots = read_slots(bank / "model.onnx")
    assert manifest.graph["lora_slots"]["names"] == list(slots)
    joint = "model.layers.0.self_attn.q_proj+k_proj+v_proj"
    assert slots[f"{joint}.lora_A.bank"].dims == ("adapters", 48, f"{joint}.rank")
    assert (bank / "model.onnx.data").read_bytes() == (
        base_bundle / "model.onnx.data"
    ).read_bytes()
    stacked = read_onnx_file(bank / "adapter_bank.onnx_adapter")
    single = read_onnx_file(bank / "adapters" / "attention.onnx_adapter")
    assert stacked.model_version == single.model_version
    entry = {
        name.replace(".bank", ".weight"): array if name.endswith("ranks") else array[2]
        for name, array in stacked.tensors.items()
    }
    own = separate(entry, "the bank")
    for name, array in separate(single.tensors, "the adapter").items():
        np.testing.assert_array_equal(own[name][: array.shape[0], : array.shape[1]], array)
    parity = manifest.parity
    assert parity is not None and parity["passed"] is True
    assert set(parity["parts"]) == {"adapter tuned", "adapter attention", "adapter feed_forward"}
    names = {case["name"] for case in parity["cases"]}
    assert {"an adapter of its own for each row", "adapters off again"} <= names
    shown = run("inspect", bank, "--verify")
    assert "a bank of 4 adapters, one a row" in " ".join(
        shown.stdout.split() + shown.stderr.split()
    )
    assert inspect_bundle(bank, verify=True).problems == ()


def test_each_adapter_is_checked_by_itself(
    bank: Path, tiny_llama: Path, folders: dict[str, Path], tmp_path: Path
) -> None:
    """One that is one per cent too strong fails, and the rows of a batch still agree with it alone."""
    bundle = shutil.copytree(bank, tmp_path / "bundle")
    file = read_onnx_file(bundle / "adapters" / "attention.onnx_adapter")
    strong = {n: a * np.float32(1.01) if "lora_B" in n else a for n, a in file.tensors.items()}
    write_onnx_adapter(file.path, strong, file.model_version)
    report = validate(bundle, tiny_llama, adapter=f"attention={folders['attention']}")
    assert report.passed_alone and not report.passed
    assert [title for title, part in report.parts.items() if not part.passed] == [
        "adapter attention"
    ]


def test_the_stacked_file_is_no_adapter(bank: Path) -> None:
    file = bank / "adapter_bank.onnx_adapter"
    with pytest.raises(AdapterError, match="holds all adapters of a bank at once"):
        Session(bank).load_adapter(file)
    shown = run("inspect", file)
    assert shown.exit_code == 3
    assert "all adapters of a bank" in " ".join(shown.stderr.split())


def test_a_bank_is_not_bisected(bank: Path, tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a bank of adapters cannot be bisected"):
        validate(bank, tiny_llama, bisect=tmp_path / "found")


@needs_genai
def test_genai_takes_ids_and_the_stacked_file(bank: Path) -> None:
    genai, session = Genai(bank), _loaded(bank)
    genai.load(bank / "adapter_bank.onnx_adapter")
    ids = {None: 0, **Manifest.read(bank).graph["adapter_bank"]["ids"]}
    for rows in (ROWS, ["tuned", "tuned", None, "feed_forward"]):
        numbers = {"adapter_ids": np.array([ids[name] for name in rows])}
        found = genai.tokens(PROMPTS, STEPS, "adapter_bank", inputs=numbers)
        assert found == ours(session, PROMPTS, STEPS, genai.ends, adapters=rows)
    none = genai.tokens(PROMPTS, STEPS, inputs={"adapter_ids": np.zeros(4, np.int64)})
    assert none == ours(session, PROMPTS, STEPS, genai.ends)


def test_a_later_adapter_is_converted_for_the_bank(
    bank: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    folder = adapter_for(
        tiny_llama, tmp_path / "later", rank=9, seed=33, targets=r".*(down|k)_proj"
    )
    file = tmp_path / "later.onnx_adapter"
    result = run("adapter", "convert", folder, file, "--to", "onnx", "--for", bank)
    assert result.exit_code == 0, result.stderr
    peft_deploy.export(tiny_llama, tmp_path / "merged", adapter=folder, options=UNCHECKED)
    options, session = GenerationOptions(max_new_tokens=STEPS), _loaded(bank)
    session.load_adapter(file)
    found = session.generate(PROMPTS[:2], options, adapters=["later", "tuned"])
    want = Session(tmp_path / "merged").generate(PROMPTS[:1], options)
    assert found[0].token_ids == want[0].token_ids
    with pytest.raises(AdapterError, match="holds 4 adapters at most"):
        session.load_adapter(file, "one more")


@pytest.mark.parametrize("name", ["bert-classification", "qwen"])
def test_other_families(name: str, tmp_path: Path) -> None:
    """A classifier, whose pooler gets one vector a row; Qwen, whose batch only a number follows."""
    tiny = load_recipe("tiny")
    base = tiny.make(tmp_path / "base", name)
    folders = [tiny.make_lora(tmp_path / f"a{r}", base, rank=r, seed=r) for r in (2, 5, 3)]
    slots = ".*" if name.startswith("bert") else None
    options = ExportOptions(adapter_bank=3, slots=slots)
    result = peft_deploy.export(base, tmp_path / "bank", adapter=folders, options=options)
    assert result.parity is not None and result.parity.passed
    options = ExportOptions(adapters="runtime", slots=slots, validate=False)
    peft_deploy.export(base, tmp_path / "single", adapter=folders, options=options)
    session, single = _loaded(tmp_path / "bank"), _loaded(tmp_path / "single")
    rows = ["a5", None, "a2", "a3"]
    feeds = _feeds(session, np.random.default_rng(6).integers(3, 90, (4, 11)).tolist())
    found = session.run(feeds, ["logits"], adapters=rows)["logits"]
    for index, row in enumerate(rows):
        want = single.run(feeds, ["logits"], adapter=row)["logits"]
        np.testing.assert_allclose(found[index], want[index], atol=2e-5 * np.abs(want).max())
        others = np.delete(found - want, index, axis=0)
        assert (np.abs(others).max(axis=tuple(range(1, others.ndim))) > 0.01).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--adapter-bank", 0], "at least 1"),
        (["--adapter-bank", 3, "--merge"], "give one of the two"),
        (["--adapter-bank", 3, "--slot-rank", 8], "leave --slot-rank out"),
        (["--adapter-bank", 3, "--prefix-slots"], "leave --prefix-slots out"),
        (["--adapter-bank", 3, "--format", "paddle"], "static format does not have"),
        (["--adapter-bank", 3, "--signature", "s.json"], "--adapter-bank needs to know the model"),
        (["--adapter-bank", 1], "2 adapters were given (a, b) for a bank of 1"),
    ],
)
def test_options_that_contradict_each_other(
    options: list[object], message: str, tiny_llama: Path, tiny_adapter: Path, tmp_path: Path
) -> None:
    adapters = ("--adapter", f"a={tiny_adapter}", "--adapter", f"b={tiny_adapter}")
    result = run("export", "--base", tiny_llama, *adapters, "--output", tmp_path / "o", *options)
    assert result.exit_code == 2, result.stderr
    assert message in " ".join(result.stderr.split())
    assert not (tmp_path / "o").exists()


def test_bench_measures_off_on_and_merged(bank: Path, merged_bundle: Path) -> None:
    sizes = ("--prompt-tokens", 4, "--new-tokens", 2, "--rounds", 1, "--threads", 1)
    result = run("bench", bank, merged_bundle, *sizes, "--json")
    assert result.exit_code == 0, result.stderr
    lanes = [lane["name"] for lane in json.loads(result.stdout)["lanes"]]
    adapters = ["bank + tuned", "bank + attention", "bank + feed_forward"]
    assert lanes == ["bank", *adapters, "merged"]


def _feeds(runner: Session | OnnxRunner, rows: Sequence[Sequence[int]]) -> dict[str, np.ndarray]:
    """Rows of one length, and an empty cache where there is one."""
    feeds = {}
    for spec in runner.signature.inputs:
        length = len(rows[0])
        sizes = {"batch": len(rows), "sequence": length, "past+sequence": length, "past": 0}
        shape = [sizes[dim] if isinstance(dim, str) else dim for dim in spec.dims]
        feeds[spec.name] = np.zeros(shape, spec.dtype)
    feeds[INPUT_IDS] = np.array(rows)
    feeds[ATTENTION_MASK] += 1
    if POSITION_IDS in feeds:
        feeds[POSITION_IDS] += np.arange(len(rows[0]))
    return feeds


def test_a_bank_on_weights_in_blocks_passes_its_check(
    tiny_llama: Path, folders: dict[str, Path], tmp_path: Path
) -> None:
    options = ExportOptions(adapter_bank=2, precision="int4")
    pair = [f"{name}={folders[name]}" for name in ("tuned", "attention")]
    peft_deploy.export(tiny_llama, tmp_path / "out", adapter=pair, options=options)
    manifest = Manifest.read(tmp_path / "out")
    assert manifest.graph["operators"]["MatMulNBits"] == 9  # four of each layer, and the head
    assert manifest.parity is not None and manifest.parity["passed"] is True
    assert {"adapter tuned", "adapter attention"} <= manifest.parity["parts"].keys()
