"""Prefixes from their folders into bundles, and what bundles compute behind them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from click.testing import CliRunner
from flows_adapter import adapter_for
from flows_prefix import (
    P,
    prefix_by_paddlenlp,
    prefix_by_peft,
    prefix_by_us,
    tokens_by_forward,
    tokens_by_paddlenlp,
)
from model_recipes import load_recipe

import peft_deploy
from peft_deploy.adapters.formats.onnx_file import read_onnx_file, write_onnx_adapter
from peft_deploy.base import open_base
from peft_deploy.base.dygraph import load_model
from peft_deploy.bundle import Manifest
from peft_deploy.bundle.prefixes import Prefix, prefix_path, read_prefix_file, write_prefix_file
from peft_deploy.cli.generate import generate_command
from peft_deploy.config.export import ExportOptions
from peft_deploy.errors import AdapterError, ConfigError
from peft_deploy.progress import Silent
from peft_deploy.runtime import GenerationOptions, OnnxRunner, Session, load_bundle
from peft_deploy.workflows.check_prefixes import check_prefixes
from peft_deploy.workflows.convert_adapter import convert_adapter
from peft_deploy.workflows.export import ExportResult
from peft_deploy.workflows.sources import from_folders
from peft_deploy.workflows.validate import validate

pytestmark = [pytest.mark.convert, pytest.mark.filterwarnings("ignore:PEFT counts")]

PROMPT = [3, 17, 5, 9, 40, 33]
OTHERS = [[8, 5, 6], [40, 2, 33, 7, 1, 9, 12, 4]]
STEPS = 12
NAMES = ("ours", "theirs", "peft")


@pytest.fixture(scope="module")
def prefixes(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("prefixes")
    projected = {"prefix_projection": True, "prefix_projection_hidden_size": 24, "spread": 0.6}
    ours = prefix_by_us(tiny_llama, root / "ours", **projected)
    theirs = prefix_by_paddlenlp(tiny_llama, root / "theirs")
    return {
        "ours": ours,
        "theirs": theirs,
        "peft": prefix_by_peft(tiny_llama, theirs, root / "peft"),
    }


@pytest.fixture(scope="module")
def exported(
    tiny_llama: Path,
    tiny_adapter: Path,
    prefixes: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> ExportResult:
    """LoRA merged, three prefixes, slots for them; checked."""
    return peft_deploy.export(
        tiny_llama,
        tmp_path_factory.mktemp("bundles") / "prefixed",
        adapter=[f"tuned={tiny_adapter}", *(f"{n}={path}" for n, path in prefixes.items())],
        options=ExportOptions(prefix_slots=True),
    )


@pytest.fixture(scope="module")
def bundle(exported: ExportResult) -> Path:
    return exported.output


def generated(session: Any, steps: int = STEPS, **options: Any) -> list[int]:
    (result,) = session.generate([PROMPT], GenerationOptions(max_new_tokens=steps), **options)
    return list(result.token_ids)


def test_every_prefix_passed_the_gate_as_past_and_in_slots(bundle: Path) -> None:
    parity = Manifest.read(bundle).parity
    assert parity is not None and parity["passed"] and not parity["warnings"]
    titles = {f"prefix {name}{how}" for name in NAMES for how in ("", " in slots")}
    assert set(parity["parts"]) == titles
    for part in parity["parts"].values():
        assert part["passed"] and part["exact"] and not part["warnings"]
        assert part["adapter_effect"]["sensitivity"] < 1e-3
        assert part["generation"]["passed"]


def test_the_manifest_says_what_prefixes_there_are(bundle: Path) -> None:
    manifest = Manifest.read(bundle)
    entries = {entry["name"]: entry for entry in manifest.adapters}
    assert set(entries) == {"tuned", *NAMES}
    assert {entries[name]["tokens"] for name in NAMES} == {P}
    # PaddleNLP's Llama does not move positions, and PEFT's models do.
    assert [entries[name]["position_offset"] for name in NAMES] == [0, 0, P]
    for name in NAMES:
        assert f"prefixes/{name}.safetensors" in manifest.files
        assert f"adapters/{name}.onnx_adapter" in manifest.files


@pytest.mark.parametrize("name", ["ours", "theirs"])
def test_greedy_tokens_are_those_of_paddlenlp_peft(
    name: str, bundle: Path, tiny_llama: Path, tiny_adapter: Path, prefixes: dict[str, Path]
) -> None:
    tuned = peft_deploy.LoRAModel.from_pretrained(
        load_model(open_base(tiny_llama)), tiny_adapter
    ).eval()
    want = tokens_by_paddlenlp(tuned.model, prefixes[name], PROMPT, STEPS)
    session = Session(bundle)
    session.load_adapter(name)
    assert generated(session, prefix=name) == want
    assert generated(session, adapter=name) == want
    assert generated(session) != want


def test_without_a_prefix_every_output_is_the_bundle_s_without_slots(
    bundle: Path, merged_bundle: Path
) -> None:
    session, plain = Session(bundle), OnnxRunner(merged_bundle)
    for name in NAMES:
        session.load_adapter(name)
    feeds = {
        "input_ids": np.array([PROMPT, PROMPT[::-1]]),
        "attention_mask": np.ones((2, len(PROMPT)), np.int64),
        "position_ids": np.tile(np.arange(len(PROMPT)), (2, 1)),
    }
    empty = {s.name: np.zeros((2, 2, 0, 8), np.float32) for s in plain.signature.past}
    want = plain.run({**feeds, **empty})
    for active in (None, "ours", None, "theirs", None):
        got = session.run(feeds, adapter=active)
        same = [np.array_equal(got[n], want[n]) for n in want]
        assert all(same) if active is None else not any(same[:1])


def test_a_ragged_batch_gives_what_each_row_gives_alone(bundle: Path) -> None:
    session = Session(bundle)
    session.load_adapter("ours")
    rows = [PROMPT, *OTHERS]
    for given in ({"prefix": "ours"}, {"adapter": "ours"}, {"prefix": "peft"}):
        alone = [
            session.generate([row], GenerationOptions(max_new_tokens=STEPS), **given)[0].token_ids
            for row in rows
        ]
        for padding in ("left", "right"):
            options = GenerationOptions(max_new_tokens=STEPS, padding=padding)
            together = session.generate(rows, options, **given)
            assert [r.token_ids for r in together] == alone


def test_the_prefix_counts_in_the_context(bundle: Path) -> None:
    length = Manifest.read(bundle).context_length
    assert length is not None
    session, prompt = Session(bundle), [7] * (length - P - 3)
    session.load_adapter("ours")
    options = GenerationOptions(max_new_tokens=20, context_length=length)
    for given in ({"prefix": "ours"}, {"adapter": "ours"}):
        (result,) = session.generate([prompt], options, **given)
        assert (len(result.token_ids), result.finish_reason) == (3, "context")
        with pytest.raises(ConfigError, match="the model can see"):
            session.generate([prompt + [7] * 3], options, **given)


def test_two_prefixes_at_once_are_refused_and_the_session_goes_on(bundle: Path) -> None:
    session = Session(bundle)
    session.load_adapter("ours")
    session.load_adapter("theirs")
    before = generated(session, adapter="ours")
    with pytest.raises(AdapterError, match="puts one into the graph's slots"):
        generated(session, adapter="ours", prefix="theirs")
    with pytest.raises(AdapterError, match="fill the same slots"):
        generated(session, adapter=["ours", "theirs"])
    with pytest.raises(AdapterError, match="there is no prefix 'nobody'"):
        generated(session, prefix="nobody")
    assert generated(session, adapter="ours") == before


def test_lora_and_prefix_together_in_one_file_and_as_two(
    bundle: Path,
    tiny_llama: Path,
    tiny_adapter: Path,
    prefixes: dict[str, Path],
    tmp_path: Path,
) -> None:
    output = tmp_path / "runtime"
    peft_deploy.export(
        tiny_llama,
        output,
        adapter=[f"tuned={tiny_adapter}", f"ours={prefixes['ours']}"],
        options=ExportOptions(adapters="runtime", prefix_slots=True, validate=False),
    )
    files = [read_onnx_file(output / "adapters" / f"{n}.onnx_adapter") for n in ("tuned", "ours")]
    both = {**files[0].tensors, **files[1].tensors}
    write_onnx_adapter(tmp_path / "both.onnx_adapter", both, files[0].model_version)
    session = Session(output)
    for adapter in ("tuned", "ours", tmp_path / "both.onnx_adapter"):
        session.load_adapter(adapter)
    want = generated(Session(bundle), prefix="ours")
    assert generated(session, adapter=["tuned", "ours"]) == want
    assert generated(session, adapter="both") == want
    assert generated(session, adapter="tuned", prefix="ours") == want
    assert want not in (generated(session, adapter="ours"), generated(session, adapter="tuned"))
    runner = session.runner(["tuned", "ours"])
    _check_through_run_options(output, runner, PROMPT)


def _check_through_run_options(bundle: Path, ours: Any, prompt: list[int]) -> None:
    """Plain onnxruntime with the two files as active adapters."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(bundle / "model.onnx", options, ["CPUExecutionProvider"])
    active, kept = ort.RunOptions(), []
    for name in ("tuned", "ours"):
        kept.append(ort.LoraAdapter())
        kept[-1].Load(str(bundle / "adapters" / f"{name}.onnx_adapter"))
        active.add_active_adapter(kept[-1])
    feeds = {
        "input_ids": np.array([prompt]),
        "attention_mask": np.ones((1, len(prompt)), np.int64),
        "position_ids": np.arange(len(prompt))[None],
        **{s.name: np.zeros((1, 2, 0, 8), np.float32) for s in ours.signature.past},
    }
    got = session.run(None, feeds, active)
    for value, want in zip(got, ours.run(feeds).values(), strict=True):
        np.testing.assert_array_equal(value, want)


def test_validate_holds_every_prefix_against_its_model(
    bundle: Path, tiny_llama: Path, tiny_adapter: Path, prefixes: dict[str, Path], tmp_path: Path
) -> None:
    adapters = [f"tuned={tiny_adapter}", *(f"{n}={path}" for n, path in prefixes.items())]
    other = prefix_by_us(tiny_llama, tmp_path / "other")
    for given, message in (
        (adapters[:-1], "has the prefix peft, which was not given"),
        ([*adapters, f"more={other}"], "has no prefix more"),
        ([*adapters[:-1], f"peft={other}"], "the one that was given has"),
        (
            [f"more={other}"],
            r"(?s)has no prefix more.*the adapter tuned merged.*prefix ours, which.*prefix peft, which",
        ),
    ):
        with pytest.raises(AdapterError, match=message):
            validate(bundle, tiny_llama, adapter=given)


def test_a_bundle_whose_prefix_is_a_little_off_fails(
    exported: ExportResult,
    tiny_llama: Path,
    tiny_adapter: Path,
    prefixes: dict[str, Path],
    tmp_path: Path,
) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(exported.output, folder)
    (folder / "adapters" / "ours.onnx_adapter").unlink()
    manifest = Manifest.read(folder)
    fingerprint = manifest.base["fingerprint"]
    path = prefix_path(folder, "ours")
    true = read_prefix_file(path, manifest.signature, fingerprint)
    past = {name: array * np.float32(1.001) for name, array in true.past.items()}
    write_prefix_file(path, Prefix("ours", past), fingerprint)
    source = from_folders(tiny_llama, [f"tuned={tiny_adapter}", f"ours={prefixes['ours']}"])
    assert exported.parity is not None and exported.parity.passed
    report = check_prefixes(exported.parity, folder, source.load_reference(Silent()), source)
    assert report.passed_alone and not report.passed
    assert [name for name, part in report.parts.items() if not part.passed] == ["prefix ours"]
    assert "Parity failed with prefix ours" in report.summary()


def test_a_model_that_moves_positions(tmp_path: Path) -> None:
    """PaddleNLP's Mistral counts a text's positions from P, and keeps its cache in another layout.

    So it is trained, by its forward; PaddleNLP's generation would count from 0, and loses the sliding window once
    there is a cache.
    """
    tiny = load_recipe("tiny")
    base = tiny.make(tmp_path / "base", "mistral")
    folder = prefix_by_paddlenlp(base, tmp_path / "prefix")
    peft_deploy.export(
        base,
        tmp_path / "out",
        adapter=f"p={folder}",
        options=ExportOptions(prefix_slots=True, validate=False),
    )
    (entry,) = Manifest.read(tmp_path / "out").adapters
    assert entry["position_offset"] == P
    want = tokens_by_forward(load_model(open_base(base)), folder, PROMPT, STEPS)
    session = Session(tmp_path / "out")
    session.load_adapter("p")
    assert generated(session, prefix="p") == want
    assert generated(session, adapter="p") == want
    past = read_prefix_file(
        prefix_path(tmp_path / "out", "p"), session.signature, session.manifest.base["fingerprint"]
    ).past
    assert generated(session, prefix=past) != want  # positions not moved


def test_generate_takes_a_prefix_by_name(bundle: Path) -> None:
    def run(*options: str) -> Any:
        arguments = [str(bundle), "--prompt", "the man", "--max-new-tokens", "6", "--json"]
        return CliRunner().invoke(generate_command, [*arguments, *options])

    def text(result: Any) -> str:
        assert result.exit_code == 0, result.output
        (answer,) = json.loads(result.stdout)["results"]
        return str(answer["text"])

    behind = text(run("--prefix", "theirs"))
    assert (
        behind == load_bundle(bundle).generate("the man", max_new_tokens=6, prefix="theirs").text
    )
    assert behind != text(run())
    assert behind == text(run("--adapter", "theirs"))
    refused = run("--prefix", "nobody")
    assert refused.exit_code == AdapterError.exit_code
    assert "there is no prefix 'nobody'" in refused.stderr


def test_what_cannot_be_a_prefix_of_the_bundle(
    tiny_llama: Path, prefixes: dict[str, Path], make_tiny_llama: Any, tmp_path: Path
) -> None:
    def export(base: Path, *adapters: str, **options: Any) -> None:
        peft_deploy.export(
            base, tmp_path / "out", adapter=list(adapters), options=ExportOptions(**options)
        )

    larger = make_tiny_llama(num_hidden_layers=3)
    with pytest.raises(AdapterError, match="has 2 layers, the graph 3"):
        export(larger, f"p={prefixes['theirs']}", dry_run=True)
    short = make_tiny_llama(max_position_embeddings=P)
    with pytest.raises(AdapterError, match="leaves no room"):
        export(short, f"p={prefixes['theirs']}", dry_run=True)
    with pytest.raises(ConfigError, match="two adapters are called 'p'"):
        export(tiny_llama, f"p={prefixes['theirs']}", f"p={prefixes['ours']}", dry_run=True)
    with pytest.raises(ConfigError, match="which Paddle's static format does not have"):
        export(tiny_llama, format="paddle", prefix_slots=True)
    with pytest.warns(UserWarning, match="is not the base model that the prefix"):
        export(make_tiny_llama(seed=9), f"p={prefixes['ours']}", dry_run=True)
    assert not (tmp_path / "out").exists()


def test_another_prefix_comes_into_the_same_bundle(
    bundle: Path, merged_bundle: Path, tiny_llama: Path, prefixes: dict[str, Path], tmp_path: Path
) -> None:
    """No export: the folder becomes a file that fills the slots, or stands in place of the cache."""
    other = prefix_by_us(tiny_llama, tmp_path / "other", spread=0.8)
    session = Session(bundle)
    for suffix in (".onnx_adapter", ".safetensors"):
        convert_adapter(other, tmp_path / f"new{suffix}", to="onnx", bundle=bundle)
    session.load_adapter(tmp_path / "new.onnx_adapter")
    got = generated(session, adapter="new")
    assert got == generated(session, prefix=tmp_path / "new.safetensors")
    assert got == generated(Session(merged_bundle), prefix=tmp_path / "new.safetensors")
    assert got not in (generated(session), generated(session, prefix="ours"))
    with pytest.raises(AdapterError, match="has no slots"):
        convert_adapter(other, tmp_path / "b.onnx_adapter", to="onnx", bundle=merged_bundle)


def test_slots_without_an_adapter_take_lora_of_others_only_by_name(
    bundle: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    """A graph with prefix slots alone has no slots for LoRA, and says which are missing."""
    lora = adapter_for(tiny_llama, tmp_path / "lora", rank=2)
    file = convert_adapter(lora, tmp_path / "lora.onnx_adapter", to="onnx", base=tiny_llama).output
    with pytest.raises(AdapterError, match="has no slots for these tensors"):
        Session(bundle).load_adapter(file)
