"""Adapters apart from the weights: the same numbers from the graph with one active, Paddle, and the merged bundle."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from click.testing import CliRunner, Result
from flows_adapter import adapter_for
from flows_loops import node_names, paddle_loop, plain_loop

import peft_deploy
from peft_deploy.adapters.formats import read_adapter
from peft_deploy.adapters.formats.onnx_file import read_onnx_file, write_onnx_adapter
from peft_deploy.base import open_base
from peft_deploy.base.dygraph import load_model
from peft_deploy.bundle import Manifest
from peft_deploy.bundle.slots import read_slots
from peft_deploy.cli import cli
from peft_deploy.config.export import ExportOptions
from peft_deploy.errors import AdapterError, ConfigError
from peft_deploy.inspection import inspect_bundle
from peft_deploy.runtime import GenerationOptions, Session
from peft_deploy.workflows.convert_adapter import convert_adapter
from peft_deploy.workflows.validate import validate

pytestmark = pytest.mark.convert

PROMPT = [3, 17, 5, 9, 40, 2, 33]
STEPS = 12
ATTENTION = r".*(q|v)_proj"
RUNTIME = ExportOptions(adapters="runtime", validate=False)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


@pytest.fixture(scope="session")
def attention_adapter(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters") / "attention"
    return adapter_for(tiny_llama, folder, rank=2, seed=21, targets=ATTENTION)


@pytest.fixture(scope="session")
def runtime_bundle(
    tiny_llama: Path,
    tiny_adapter: Path,
    attention_adapter: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """With two adapters of different rank, of which one leaves most slots alone."""
    output = tmp_path_factory.mktemp("bundles") / "runtime"
    adapters = [f"tuned={tiny_adapter}", attention_adapter]
    peft_deploy.export(
        tiny_llama, output, adapter=adapters, options=ExportOptions(adapters="runtime")
    )
    return output


@pytest.fixture(scope="session")
def merged_bundles(
    tiny_llama: Path,
    merged_bundle: Path,
    attention_adapter: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Path]:
    output = tmp_path_factory.mktemp("bundles") / "attention-merged"
    options = ExportOptions(validate=False)
    peft_deploy.export(tiny_llama, output, adapter=attention_adapter, options=options)
    return {"tuned": merged_bundle, "attention": output}


@pytest.mark.parametrize("name", ["tuned", "attention"])
def test_three_ways_to_the_same_numbers(
    name: str,
    tiny_llama: Path,
    tiny_adapter: Path,
    attention_adapter: Path,
    runtime_bundle: Path,
    merged_bundles: dict[str, Path],
) -> None:
    model = load_model(open_base(tiny_llama))
    base_tokens, base = paddle_loop(model, PROMPT, STEPS)
    folder = {"tuned": tiny_adapter, "attention": attention_adapter}[name]
    tuned = peft_deploy.LoRAModel.from_pretrained(model, folder).eval()
    want_tokens, want = paddle_loop(tuned, PROMPT, STEPS)
    assert want_tokens != base_tokens
    assert np.abs(want[0] - base[0]).max() > 0.1 * np.abs(base[0]).max()
    file = runtime_bundle / "adapters" / f"{name}.onnx_adapter"
    for tokens, logits in (
        plain_loop(runtime_bundle, PROMPT, STEPS, file),
        plain_loop(merged_bundles[name], PROMPT, STEPS),
    ):
        assert tokens == want_tokens
        np.testing.assert_allclose(logits, want, atol=1e-5 * np.abs(want).max())
    session = Session(runtime_bundle)
    session.load_adapter(name)
    options = GenerationOptions(max_new_tokens=STEPS)
    (ours,) = session.generate([PROMPT], options, adapter=name)
    assert list(ours.token_ids) == want_tokens


def test_off_is_the_base_bundle_to_the_bit(base_bundle: Path, runtime_bundle: Path) -> None:
    want_tokens, want = plain_loop(base_bundle, PROMPT, STEPS)
    got_tokens, got = plain_loop(runtime_bundle, PROMPT, STEPS)
    assert got_tokens == want_tokens
    np.testing.assert_array_equal(got, want)


def test_the_graph_is_the_base_graph_and_what_slots_need(
    base_bundle: Path, runtime_bundle: Path
) -> None:
    base, slotted = node_names(base_bundle), node_names(runtime_bundle)
    added = [node for node in slotted if node not in base]
    assert [node for node in slotted if node in base] == base
    # A, B and a sum for each of two layers' o and down; q, k and v share an A, as gate and up do.
    assert len(added) == 2 * (2 * 3 + (2 + 2 * 3) + (2 + 2 * 2))
    assert sorted(node for node in added if "layers.0/self_attn/q_proj" in node[0]) == [
        ("/model/layers.0/self_attn/q_proj+k_proj+v_proj/lora_A/MatMul", "MatMul"),
        ("/model/layers.0/self_attn/q_proj+k_proj+v_proj/lora_A/Split", "Split"),
        ("/model/layers.0/self_attn/q_proj/lora/Add", "Add"),
        ("/model/layers.0/self_attn/q_proj/lora_B/MatMul", "MatMul"),
    ]
    data = [bundle / "model.onnx.data" for bundle in (base_bundle, runtime_bundle)]
    assert data[0].read_bytes() == data[1].read_bytes()


def test_what_the_manifest_says(runtime_bundle: Path) -> None:
    manifest = Manifest.read(runtime_bundle)
    assert [(a["name"], a["mode"], a["rank"]) for a in manifest.adapters] == [
        ("tuned", "runtime", 5),
        ("attention", "runtime", 2),
    ]
    slots = manifest.graph["lora_slots"]
    assert (len(slots["targets"]), slots["rank"], slots["dtype"]) == (14, None, "float32")
    assert slots["names"] == list(read_slots(runtime_bundle / "model.onnx"))
    assert slots["names"][0] == "model.layers.0.self_attn.q_proj+k_proj+v_proj.lora_A.weight"
    assert {"adapters/tuned.onnx_adapter", "adapters/attention.onnx_adapter"} < set(manifest.files)
    assert manifest.parity is not None and manifest.parity["passed"] is True
    assert set(manifest.parity["parts"]) == {"adapter tuned", "adapter attention"}
    for part in manifest.parity["parts"].values():
        assert part["passed"] is True
        assert part["adapter_effect"]["sensitivity"] < 1e-3
    assert "adapters off again" in {case["name"] for case in manifest.parity["cases"]}


def test_inspect_shows_adapters_and_slots(runtime_bundle: Path, tmp_path: Path) -> None:
    shown = run("inspect", runtime_bundle, "--verify")
    assert shown.exit_code == 0, shown.stderr
    text = " ".join((shown.stdout + shown.stderr).split())
    assert "tuned: lora of rank 5, scaling 2, kept apart, for 14 modules" in text
    assert "LoRA of any rank on 14 linear layers, float32" in text
    bundle = shutil.copytree(runtime_bundle, tmp_path / "bundle")
    manifest = json.loads((bundle / "peft_deploy.json").read_text("utf-8"))
    manifest["graph"]["lora_slots"]["names"].pop()
    (bundle / "peft_deploy.json").write_text(json.dumps(manifest), "utf-8")
    assert inspect_bundle(runtime_bundle, verify=True).problems == ()
    assert inspect_bundle(bundle, verify=True).problems == (
        "the slot model.layers.1.mlp.down_proj.lora_B.weight is in the graph and not in the manifest",
    )


def test_each_adapter_is_checked_by_itself(
    runtime_bundle: Path, tiny_llama: Path, tiny_adapter: Path, tmp_path: Path
) -> None:
    """One that is one per cent too strong fails, and nothing else does."""
    bundle = shutil.copytree(runtime_bundle, tmp_path / "bundle")
    file = read_onnx_file(bundle / "adapters" / "tuned.onnx_adapter")
    strong = {n: a * np.float32(1.01) if "lora_B" in n else a for n, a in file.tensors.items()}
    write_onnx_adapter(file.path, strong, file.model_version)
    report = validate(bundle, tiny_llama, adapter=f"tuned={tiny_adapter}")
    assert report.passed_alone and not report.passed
    (part,) = report.parts.values()
    assert not any(case.passed for case in part.cases)


def test_only_the_bundles_own_adapters_are_validated(
    runtime_bundle: Path, tiny_llama: Path, tiny_adapter: Path, attention_adapter: Path
) -> None:
    report = validate(runtime_bundle, tiny_llama, adapter=attention_adapter)
    assert report.passed and list(report.parts) == ["adapter attention"]
    with pytest.raises(AdapterError, match="keeps no adapter poet; it has tuned, attention"):
        validate(runtime_bundle, tiny_llama, adapter=f"poet={tiny_adapter}")
    with pytest.raises(AdapterError, match="adapter tuned has the fingerprint"):
        validate(runtime_bundle, tiny_llama, adapter=f"tuned={attention_adapter}")


def test_a_later_adapter_is_converted_for_the_bundle(
    runtime_bundle: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    folder = adapter_for(
        tiny_llama, tmp_path / "later", rank=9, seed=33, targets=r".*(down|k)_proj"
    )
    file = tmp_path / "later.onnx_adapter"
    result = run("adapter", "convert", folder, file, "--to", "onnx", "--for", runtime_bundle)
    assert result.exit_code == 0, result.stderr
    session = Session(runtime_bundle)
    assert session.load_adapter(file) == "later"
    (ours,) = session.generate([PROMPT], GenerationOptions(max_new_tokens=STEPS), adapter="later")
    model = load_model(open_base(tiny_llama))
    tuned = peft_deploy.LoRAModel.from_pretrained(model, folder).eval()
    assert list(ours.token_ids) == paddle_loop(tuned, PROMPT, STEPS)[0]


def test_slots_beside_those_of_the_adapters(
    tiny_llama: Path, attention_adapter: Path, tmp_path: Path
) -> None:
    """On the head, whose result is an output of the graph."""
    bundle = tmp_path / "bundle"
    options = ExportOptions(adapters="runtime", slots="lm_head", validate=False)
    peft_deploy.export(tiny_llama, bundle, adapter=attention_adapter, options=options)
    modules = {name.rpartition(".lora_")[0] for name in read_slots(bundle / "model.onnx")}
    assert modules == {"lm_head"} | {
        f"model.layers.{i}.self_attn.{linears}"
        for i in (0, 1)
        for linears in ("q_proj", "v_proj", "q_proj+v_proj")
    }
    head = adapter_for(tiny_llama, tmp_path / "head", rank=3, targets="lm_head")
    convert_adapter(head, tmp_path / "head.onnx_adapter", to="onnx", bundle=bundle)
    model = load_model(open_base(tiny_llama))
    base_tokens, base = paddle_loop(model, PROMPT, STEPS)
    assert plain_loop(bundle, PROMPT, STEPS)[0] == base_tokens
    (pair,) = read_adapter(head).pairs.values()
    weight = model.lm_head.weight  # PaddleNLP's head takes no LoRA layer
    weight.set_value(weight.numpy() + 2 * (pair.A @ pair.B))
    want_tokens, want = paddle_loop(model, PROMPT, STEPS)
    got_tokens, got = plain_loop(bundle, PROMPT, STEPS, tmp_path / "head.onnx_adapter")
    assert got_tokens == want_tokens
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())
    assert np.abs(want[0] - base[0]).max() > 1


def test_files_for_other_graphs_are_fitted(
    tiny_llama: Path, attention_adapter: Path, runtime_bundle: Path, tmp_path: Path
) -> None:
    """From one of no graph at all, and from one whose graph has slots on these layers only."""
    narrow = tmp_path / "narrow"
    peft_deploy.export(tiny_llama, narrow, adapter=attention_adapter, options=RUNTIME)
    convert_adapter(attention_adapter, tmp_path / "own.onnx_adapter", to="onnx", base=tiny_llama)
    own = read_onnx_file(runtime_bundle / "adapters" / "attention.onnx_adapter")
    session = Session(runtime_bundle)
    session.load_adapter("attention")
    feeds = {
        "input_ids": np.array([PROMPT]),
        "attention_mask": np.ones((1, len(PROMPT)), np.int64),
        "position_ids": np.arange(len(PROMPT))[None],
    }
    want = session.run(feeds, ["logits"], adapter="attention")["logits"]
    for name, source in (
        ("a", tmp_path / "own.onnx_adapter"),
        ("b", narrow / "adapters" / "attention.onnx_adapter"),
    ):
        assert read_onnx_file(source).tensors.keys() != own.tensors.keys()
        session.load_adapter(source, name)
        np.testing.assert_array_equal(session.run(feeds, ["logits"], adapter=name)["logits"], want)
        fitted = tmp_path / f"{name}.onnx_adapter"
        shown = run("adapter", "convert", source, fitted, "--to", "onnx", "--for", runtime_bundle)
        assert shown.exit_code == 0, shown.stderr
        assert fitted.read_bytes() == own.path.read_bytes()
    shown = run("adapter", "convert", fitted, tmp_path / "c", "--to", "onnx", "--base", tiny_llama)
    assert shown.exit_code == 3
    assert "is in the format onnx already" in shown.stderr and "--for BUNDLE" in shown.stderr


def test_slots_of_one_rank(
    tiny_llama: Path,
    tiny_adapter: Path,
    attention_adapter: Path,
    runtime_bundle: Path,
    tmp_path: Path,
) -> None:
    output = tmp_path / "fixed"
    options = ExportOptions(adapters="runtime", slots="all-linear", slot_rank=6, validate=False)
    peft_deploy.export(tiny_llama, output, adapter=attention_adapter, options=options)
    slots = read_slots(output / "model.onnx")
    open_slots = read_slots(runtime_bundle / "model.onnx")
    assert list(slots) == [name for name in open_slots if not name.endswith("ranks")]
    widths = {name: slot.dims[1] for name, slot in slots.items() if "lora_A" in name}
    assert widths == {name: 6 * (name.count("+") + 1) for name in widths}
    graph = ir.load(output / "model.onnx").graph
    places = {(t.location, t.offset) for n in slots if (t := graph.initializers[n].const_value)}
    assert len(places) == 1  # all of them hold the same zeros
    file = Path("adapters") / "attention.onnx_adapter"
    for adapter in (None, file):
        with_any, with_fixed = (
            plain_loop(bundle, PROMPT, STEPS, adapter and bundle / adapter)
            for bundle in (runtime_bundle, output)
        )
        assert with_fixed[0] == with_any[0]
        np.testing.assert_allclose(
            with_fixed[1], with_any[1], atol=1e-5 * np.abs(with_any[1]).max()
        )
    tight = ExportOptions(adapters="runtime", slot_rank=4, validate=False)
    with pytest.raises(AdapterError, match="has rank 5, and slots of rank 4"):
        peft_deploy.export(tiny_llama, tmp_path / "out", adapter=tiny_adapter, options=tight)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fixed"]


def test_a_lora_model_in_memory(
    tiny_llama: Path, tiny_adapter: Path, runtime_bundle: Path, tmp_path: Path
) -> None:
    model = peft_deploy.LoRAModel.from_pretrained(load_model(open_base(tiny_llama)), tiny_adapter)
    model.merge()
    before = {name: value.numpy().copy() for name, value in model.state_dict().items()}
    options = ExportOptions(adapters="runtime")
    result = peft_deploy.export(model, tmp_path / "out", tokenizer=tiny_llama, options=options)
    assert result.parity is not None and result.parity.passed
    assert list(result.parity.parts) == ["adapter default"]
    ours, theirs = Manifest.read(tmp_path / "out"), Manifest.read(runtime_bundle)
    assert ours.files["model.onnx.data"] == theirs.files["model.onnx.data"]
    for folder, name in ((tmp_path / "out", "default"), (runtime_bundle, "tuned")):
        tensors = read_onnx_file(folder / "adapters" / f"{name}.onnx_adapter").tensors
        if name == "default":
            first = tensors
    assert first.keys() == tensors.keys()
    assert all(np.array_equal(first[key], tensors[key]) for key in first)
    assert model.merged
    for name, value in model.state_dict().items():
        np.testing.assert_array_equal(value.numpy(), before[name])


def test_what_slots_cannot_hold_is_refused_by_name(tiny_llama: Path, tmp_path: Path) -> None:
    config = peft_deploy.LoRAConfig(
        r=3, target_modules=["q_proj"], trainable_modules=["llama.norm"]
    )
    model = peft_deploy.LoRAModel(load_model(open_base(tiny_llama)), config)
    model.save_pretrained(tmp_path / "norm")
    with pytest.raises(
        AdapterError, match=r"replaces whole parameters.*\n  llama\.norm"
    ) as caught:
        peft_deploy.export(
            tiny_llama, tmp_path / "out", adapter=tmp_path / "norm", options=RUNTIME
        )
    assert "--merge" in str(caught.value.hint)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--slots", "all-linear"], "kept apart from the weights"),
        (["--adapters", "runtime", "--merge"], "give one of the two"),
        (["--adapters", "runtime", "--slot-rank", 0], "at least 1"),
        (["--adapters", "runtime", "--slots", "(q_proj", "--dry-run"], "valid regular expression"),
        (["--adapters", "runtime", "--format", "paddle"], "static format does not have"),
        ([], "--adapters runtime"),
    ],
)
def test_options_that_contradict_each_other(
    options: list[object], message: str, tiny_llama: Path, tiny_adapter: Path, tmp_path: Path
) -> None:
    words = ("export", "--base", tiny_llama, "--adapter", tiny_adapter, "--output", tmp_path / "o")
    result = run(*words, *options)
    assert result.exit_code == 2
    assert message in result.stderr.replace("\n", " ")


def test_two_adapters_need_names_and_slots(
    tiny_llama: Path, tiny_adapter: Path, tmp_path: Path
) -> None:
    twice = [f"a={tiny_adapter}", f"a={tiny_adapter}"]
    with pytest.raises(ConfigError, match="two adapters are called 'a'"):
        peft_deploy.export(tiny_llama, tmp_path / "out", adapter=twice, options=RUNTIME)
    with pytest.raises(ConfigError, match="2 LoRA adapters were given") as caught:
        peft_deploy.export(tiny_llama, tmp_path / "out", adapter=twice)
    assert "--adapters runtime" in str(caught.value.hint)


def test_a_dry_run_says_what_is_kept(tiny_llama: Path, tiny_adapter: Path, tmp_path: Path) -> None:
    words = ("export", "--base", tiny_llama, "--adapter", f"poet={tiny_adapter}", "--adapters")
    result = run(*words, "runtime", "--output", tmp_path / "out", "--dry-run", "--json")
    assert result.exit_code == 0, result.stderr
    plan = json.loads(result.stdout)["plan"]
    assert any("adapter poet, kept apart from the weights" in line for line in plan)
    assert any(line.startswith("slots for adapters on ") for line in plan)
    result = run(
        *words, "runtime", "--output", tmp_path / "out", "--dry-run", "--slots", ".*gatt_proj"
    )
    assert result.exit_code == 2
    assert "gate_proj" in result.stderr
    assert not (tmp_path / "out").exists()
