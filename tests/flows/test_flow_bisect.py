"""Faults put into a good bundle, and where the search finds them."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import numpy_helper

import peft_deploy
from peft_deploy.cli.validate import validate_command
from peft_deploy.config.export import ExportOptions
from peft_deploy.errors import ConfigError
from peft_deploy.parity import Expectation, ParityReport, check_expectation
from peft_deploy.parity.bisect import locate
from peft_deploy.parity.reference import PaddleReference
from peft_deploy.progress import Silent
from peft_deploy.runtime import OnnxRunner
from peft_deploy.workflows.bisect import with_finding
from peft_deploy.workflows.check_bundle import check_bundle
from peft_deploy.workflows.check_extras import CheckExtras
from peft_deploy.workflows.sources import ExportSource, from_folders
from peft_deploy.workflows.validate import validate

pytestmark = pytest.mark.convert

Fault = Callable[[onnx.ModelProto], None]


def weight(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Fault:
    def apply(model: onnx.ModelProto) -> None:
        tensor = next(t for t in model.graph.initializer if t.name == name)
        array = numpy_helper.to_array(tensor)
        changed = np.ascontiguousarray(change(array)).astype(array.dtype)
        assert not np.array_equal(changed, array)
        tensor.CopyFrom(numpy_helper.from_array(changed, name))

    return apply


def operator(name: str, kind: str) -> Fault:
    def apply(model: onnx.ModelProto) -> None:
        next(n for n in model.graph.node if n.name == name).op_type = kind

    return apply


def swapped_inputs(one: str, other: str) -> Fault:
    """Two nodes get each other's second input."""

    def apply(model: onnx.ModelProto) -> None:
        a, b = (next(n for n in model.graph.node if n.name == name) for name in (one, other))
        a.input[1], b.input[1] = b.input[1], a.input[1]

    return apply


def swapped_caches(model: onnx.ModelProto) -> None:
    names = ("present.0.key", "present.1.key")
    for node in model.graph.node:
        for values in (node.input, node.output):
            for i, value in enumerate(values):
                if value in names:
                    values[i] = f"{value}.inner"
    for inner, name in zip(names, reversed(names), strict=True):
        model.graph.node.append(
            onnx.helper.make_node("Identity", [f"{inner}.inner"], [name], f"/{name}")
        )


@dataclass(frozen=True)
class Wanted:
    """Where a fault has to be found.

    Args:
        module: that it names.
        what: of it.
        nodes: the most that it may suspect.
        suspect: one that has to be among them.
        note: what it says of a weight.
    """

    module: str
    what: str
    nodes: int
    suspect: str
    note: str = ""


LAYER = "llama.layers.1"
FAULTS: dict[str, tuple[Fault, Wanted]] = {
    "weight scaled by 1.01": (
        weight("model.layers.1.self_attn.q_proj.weight", lambda w: 1.01 * w),
        Wanted(
            f"{LAYER}.self_attn.q_proj",
            "output",
            1,
            "/model/layers.1/self_attn/q_proj/MatMul",
            "is off by",
        ),
    ),
    "square weight transposed": (
        weight("model.layers.1.self_attn.o_proj.weight", np.transpose),
        Wanted(
            f"{LAYER}.self_attn.o_proj",
            "output",
            1,
            "/model/layers.1/self_attn/o_proj/MatMul",
            "transposed",
        ),
    ),
    "one weight in half precision": (
        weight("model.layers.1.mlp.down_proj.weight", lambda w: w.astype(np.float16)),
        Wanted(
            f"{LAYER}.mlp.down_proj",
            "output",
            1,
            "/model/layers.1/mlp/down_proj/MatMul",
            "is off by",
        ),
    ),
    "epsilon of all norms": (
        weight("constant.7", lambda epsilon: 10 * epsilon),
        Wanted(
            "llama.layers.0.input_layernorm", "output", 7, "/model/layers.0/input_layernorm/Add"
        ),
    ),
    "another activation": (
        operator("/model/layers.1/mlp/Sigmoid", "Tanh"),
        Wanted(f"{LAYER}.mlp.down_proj", "input", 3, "/model/layers.1/mlp/Sigmoid"),
    ),
    "gate and up swapped": (
        swapped_inputs(
            "/model/layers.1/mlp/gate_proj/MatMul", "/model/layers.1/mlp/up_proj/MatMul"
        ),
        Wanted(f"{LAYER}.mlp.gate_proj", "output", 1, "/model/layers.1/mlp/gate_proj/MatMul"),
    ),
    "mask off by one": (
        operator("/model/LessOrEqual", "Less"),
        Wanted("llama.layers.0.self_attn.o_proj", "input", 50, "/model/LessOrEqual"),
    ),
    "positions off by one": (
        weight("table.0", lambda table: np.roll(table, 1, 0)),
        Wanted("present.0.key", "graph output", 16, "/model/Gather"),
    ),
    "caches swapped between layers": (
        swapped_caches,
        # The layers are good, so what they use is not suspected.
        Wanted("present.1.key", "graph output", 1, "/present.1.key"),
    ),
    "last norm": (
        weight("model.norm.weight", lambda w: 1.001 * w),
        Wanted("llama.norm", "output", 7, "/model/norm/Mul_2", "is off by"),
    ),
    "head": (
        weight("lm_head.weight", lambda w: 1.001 * w),
        Wanted("logits", "graph output", 1, "/lm_head/MatMul", "is off by"),
    ),
    "embedding": (
        weight("model.embed_tokens.weight", lambda w: 1.001 * w),
        Wanted("llama.embed_tokens", "output", 1, "/model/embed_tokens/Gather", "is off by"),
    ),
}


@dataclass(frozen=True, eq=False)
class Side:
    """What was trained."""

    source: ExportSource
    reference: PaddleReference
    expectation: Expectation


def attribute(name: str, key: str, value: float) -> Fault:
    def apply(model: onnx.ModelProto) -> None:
        node = next(n for n in model.graph.node if n.name == name)
        kept = [a for a in node.attribute if a.name != key]
        assert len(kept) == len(node.attribute) - 1
        del node.attribute[:]
        node.attribute.extend([*kept, onnx.helper.make_attribute(key, value)])

    return apply


FUSED_FAULTS: dict[str, tuple[Fault, Wanted]] = {
    "one weight in half precision": FAULTS["one weight in half precision"],
    "epsilon of one norm": (
        attribute("/model/layers.1/input_layernorm/RMSNormalization", "epsilon", 1e-2),
        Wanted(
            f"{LAYER}.input_layernorm",
            "output",
            1,
            "/model/layers.1/input_layernorm/RMSNormalization",
        ),
    ),
    "scale of the scores": (
        attribute("/model/layers.1/self_attn/Attention", "scale", 0.3),
        # Rotary positions and the operator; the mask is the first layer's, too, which is good.
        Wanted(f"{LAYER}.self_attn.o_proj", "input", 3, "/model/layers.1/self_attn/Attention"),
    ),
    "last norm": (
        FAULTS["last norm"][0],
        Wanted("llama.norm", "output", 1, "/model/norm/RMSNormalization", "is off by"),
    ),
    "head": FAULTS["head"],
}


def weak_mask(model: onnx.ModelProto) -> None:
    """Only the second layer gets a mask that hides nothing; the operators that make both are the same."""
    attention = next(
        n for n in model.graph.node if n.name == "/model/layers.1/self_attn/Attention"
    )
    zero = onnx.helper.make_tensor("weakness", onnx.TensorProto.FLOAT, [], [0.0])
    model.graph.initializer.append(zero)
    node = onnx.helper.make_node("Mul", [attention.input[3], "weakness"], ["weak"], "/model/weak")
    model.graph.node.insert(list(model.graph.node).index(attention), node)
    attention.input[3] = "weak"


def test_operators_that_good_layers_use_are_listed_apart(
    trained: Side, merged_bundle: Path, tmp_path: Path
) -> None:
    """The mask's are; what stands between them and the bad layer is not."""
    found = checked(trained, broken(merged_bundle, tmp_path / "broken", weak_mask), tmp_path / "r")
    assert found.finding is not None
    nodes, shared = found.finding.nodes, found.finding.shared
    assert found.finding.layer == LAYER and "/model/weak" in nodes and len(nodes) <= 4
    assert "/model/LessOrEqual" in shared and all("layers" not in name for name in shared)
    assert f"{len(shared)} operator(s) whose results good layers use, too" in str(found.finding)
    assert found.to_dict()["finding"]["shared"] == list(shared)


@pytest.fixture(scope="module")
def plain_bundle(
    tiny_llama: Path, tiny_adapter: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The nodes that most faults are put into are those of a graph that is not fused."""
    folder = tmp_path_factory.mktemp("plain") / "out"
    options = ExportOptions(fuse="none", validate=False)
    peft_deploy.export(tiny_llama, folder, adapter=tiny_adapter, options=options)
    return folder


@pytest.fixture(scope="module")
def trained(merged_bundle: Path, tiny_llama: Path, tiny_adapter: Path) -> Side:
    source = from_folders(tiny_llama, tiny_adapter)
    model = source.load_reference(Silent())
    extras = CheckExtras(record=True)
    report = check_bundle(merged_bundle, model, source.family, source.config, extras=extras)
    assert report.passed
    reference = PaddleReference(model, source.family, source.config)
    return Side(source, reference, extras.recordings[0].expectation)


def broken(bundle: Path, folder: Path, fault: Fault) -> Path:
    shutil.copytree(bundle, folder)
    model = onnx.load(str(folder / "model.onnx"))
    fault(model)
    (folder / "model.onnx.data").unlink()
    onnx.save(
        model, str(folder / "model.onnx"), save_as_external_data=True, location="model.onnx.data"
    )
    return folder


def checked(trained: Side, bundle: Path, output: Path) -> ParityReport:
    report = check_expectation(trained.expectation, OnnxRunner(bundle), [], lambda *_: None)  # type: ignore[arg-type, return-value]
    assert not report.passed
    reference, expectation = trained.reference, trained.expectation
    return with_finding(report, bundle, reference, trained.source, expectation, output)


def weights_differ(bundle: Path, other: Path) -> bool:
    return (bundle / "model.onnx.data").read_bytes() != (other / "model.onnx.data").read_bytes()


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found_where_it_is(
    name: str, trained: Side, plain_bundle: Path, tmp_path: Path
) -> None:
    find(*FAULTS[name], trained, plain_bundle, tmp_path)


@pytest.mark.parametrize("name", FUSED_FAULTS)
def test_a_fault_in_a_fused_graph_is_found_where_it_is(
    name: str, trained: Side, merged_bundle: Path, tmp_path: Path
) -> None:
    find(*FUSED_FAULTS[name], trained, merged_bundle, tmp_path)


def find(fault: Fault, wanted: Wanted, trained: Side, bundle: Path, tmp_path: Path) -> None:
    folder = broken(bundle, tmp_path / "broken", fault)
    found = checked(trained, folder, tmp_path / "reproduction").finding
    assert found is not None
    assert (found.module, found.what) == (wanted.module, wanted.what), str(found)
    assert wanted.suspect in found.nodes and len(found.nodes) <= wanted.nodes, found.nodes
    assert not set(found.nodes) & set(found.shared)
    assert [wanted.note in w.note for w in found.weights] == ([True] if wanted.note else [])
    if wanted.what != "graph output" and "layers" in wanted.module:
        assert wanted.module.startswith(f"{found.layer}.")
    # the folder shows the same, with onnxruntime and numpy alone
    script = tmp_path / "reproduction" / "run.py"
    code = [line for line in script.read_text().splitlines() if line.strip()]
    assert len(code) <= 13
    blocked = "import sys; sys.modules['peft_deploy'] = sys.modules['onnx'] = None; "
    done = subprocess.run(
        [sys.executable, "-c", f"{blocked}import runpy; runpy.run_path({str(script)!r})"],
        capture_output=True,
        text=True,
    )
    off = float(done.stdout.rpartition(" off by ")[2])
    assert off == pytest.approx(found.difference.max_abs, rel=1e-3), done.stderr
    assert off > 0


def test_nothing_is_found_in_a_good_bundle(
    trained: Side, merged_bundle: Path, plain_bundle: Path
) -> None:
    """Every module that can be compared is right, in every case of the matrix."""
    names = trained.source.family.names(trained.source.config)
    cases = trained.expectation.matrix.cases
    for bundle in (merged_bundle, plain_bundle):
        assert locate(bundle, trained.reference, trained.expectation, cases, names) is None


def test_the_command_says_where(
    plain_bundle: Path, tiny_llama: Path, tiny_adapter: Path, tmp_path: Path
) -> None:
    fault, wanted = FAULTS["weight scaled by 1.01"]
    folder = broken(plain_bundle, tmp_path / "broken", fault)
    options = ["--base", tiny_llama, "--adapter", tiny_adapter, "--bisect", tmp_path / "found"]
    result = CliRunner().invoke(validate_command, [str(folder), *map(str, options)])
    assert result.exit_code == 7
    text = " ".join(result.stderr.split())
    assert f"right up to the output of {wanted.module} (layer {LAYER})" in text
    assert "model.layers.1.self_attn.q_proj.weight: it is off by up to" in text
    assert sorted(p.name for p in (tmp_path / "found").iterdir()) == [
        "model.onnx",
        "run.py",
        "values.npz",
    ]


def test_a_good_bundle_leaves_no_folder(
    merged_bundle: Path, tiny_llama: Path, tiny_adapter: Path, tmp_path: Path
) -> None:
    report = validate(merged_bundle, tiny_llama, adapter=tiny_adapter, bisect=tmp_path / "found")
    assert report.passed and report.finding is None and not (tmp_path / "found").exists()


def test_a_recorded_reference_has_no_modules(recorded: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="bisect can only be used with the base model"):
        validate(recorded, bisect=tmp_path / "found")


@pytest.mark.parametrize("part", ["q_proj", "v_proj"])
def test_a_fault_in_a_packed_weight_is_found_in_its_part(
    part: str, trained: Side, merged_bundle: Path, tmp_path: Path
) -> None:
    merged = trained.source.merged("float32")
    width = merged.info(f"{LAYER}.self_attn.{part}.weight").shape[1]
    columns = slice(0, width) if part == "q_proj" else slice(-width, None)

    def scaled(array: np.ndarray) -> np.ndarray:
        result = array.copy()
        result[:, columns] *= 1.01
        return result

    packed = "model.layers.1.self_attn.qkv_proj"
    fault = weight(f"{packed}.weight", scaled)
    folder = broken(merged_bundle, tmp_path / "broken", fault)
    found = checked(trained, folder, tmp_path / "reproduction").finding
    assert found is not None
    assert (found.module, found.what) == (f"{LAYER}.self_attn.{part}", "output"), str(found)
    assert "/model/layers.1/self_attn/qkv_proj/MatMul" in found.nodes and len(found.nodes) == 2
    (wrong,) = found.weights
    assert wrong.name == f"model.layers.1.self_attn.{part}.weight"
    assert wrong.note.startswith("it is off by up to")
    assert wrong.note.endswith(f"(columns of {packed}.weight)")
