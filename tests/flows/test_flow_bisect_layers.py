"""Where a bundle goes wrong whose model does not fit into memory."""

from __future__ import annotations

import gc
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from flows_adapter import adapter_for
from flows_faults import with_scaled_weight

import peft_deploy
from peft_deploy.bundle import MODEL
from peft_deploy.config.export import ExportOptions
from peft_deploy.parity.bisect import reproduction
from peft_deploy.parity.report import ParityReport
from peft_deploy.workflows import check_layers
from peft_deploy.workflows.validate import validate

pytestmark = pytest.mark.convert
LAYERS, BAD = 7, 3
FAULTY = f"llama.layers.{BAD}.mlp.down_proj"
WEIGHT = f"model.layers.{BAD}.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def base(make_tiny_llama: Callable[..., Path]) -> Path:
    return make_tiny_llama(num_hidden_layers=LAYERS)


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """On some of the layers only; the faulty one has none."""
    folder = tmp_path_factory.mktemp("adapters") / "tuned"
    return adapter_for(base, folder, targets=r".*layers\.[0156]\..*_proj")


@pytest.fixture(scope="module")
def bundle(base: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundles") / "out"
    options = ExportOptions(validate=False)
    return peft_deploy.export(base, folder, adapter=adapter, options=options).output


@contextmanager
def _counted() -> Iterator[list[tuple[int, int]]]:
    """How many layers are alive, and how many parameters, whenever the reference computes."""
    from peft_deploy.parity.reference import PaddleReference

    def alive() -> list[Any]:
        return [o for o in gc.get_objects() if type(o).__name__ in (layer, "LlamaForCausalLM")]

    layer = "LlamaDecoderLayer"
    gc.collect()
    before = {id(o) for o in alive()}  # those of other tests
    found: list[tuple[int, int]] = []
    compute = PaddleReference._compute

    def counting(self: PaddleReference, *args: Any) -> Any:
        ours = [o for o in alive() if id(o) not in before]
        sizes = {id(p): p.size for o in ours for p in o.parameters()}
        layers = sum(type(o).__name__ == layer for o in ours)
        found.append((layers, sum(sizes.values())))
        return compute(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PaddleReference, "_compute", counting)
        yield found


def _place(report: ParityReport) -> dict[str, Any]:
    """All that is said of the place, and of its values up to their last digits."""
    assert report.finding is not None, report.warnings
    found = report.finding.to_dict()
    numbers = {key: found.pop(key) for key in ("expected", "actual")}
    for key in ("relative_max", "limit"):
        found.pop(key)
    return {**found, **{key: pytest.approx(value, rel=1e-4) for key, value in numbers.items()}}


def test_both_ways_find_the_same_place_and_one_layer_is_in_memory_at_a_time(
    bundle: Path, base: Path, adapter: Path, tmp_path: Path
) -> None:
    broken = with_scaled_weight(bundle, tmp_path / "broken", WEIGHT)
    with _counted() as whole_counts:
        whole = validate(broken, base, adapter=adapter, layers="all", bisect=tmp_path / "whole")
    with _counted() as all_counts:
        some = validate(broken, base, adapter=adapter, layers=1, bisect=tmp_path / "some")
    assert some.finding is not None and some.layers is not None
    assert some.layers.indices == (0,)  # it is not the faulty one
    assert _place(some) == _place(whole)
    assert some.finding.module == FAULTY and some.finding.layer == f"llama.layers.{BAD}"
    assert [w.name for w in some.finding.weights] == [WEIGHT]
    # The check itself holds a model of one layer, too, and its copy in float64.
    assert max(layers for layers, _ in all_counts) <= 2
    assert max(layers for layers, _ in whole_counts) >= 2 * LAYERS
    assert len(all_counts) > 3 * LAYERS
    per_layer = _sizes(base)
    bound = 2 * (per_layer["layer"] + per_layer["around"] + per_layer["adapter"])
    assert max(size for _, size in all_counts) <= bound
    assert max(size for _, size in whole_counts) > 2 * LAYERS * per_layer["layer"]
    # Both folders show it.
    for name in ("whole", "some"):
        assert _off(tmp_path / name) == pytest.approx(some.finding.difference.max_abs, rel=1e-3)


def _sizes(base: Path) -> dict[str, int]:
    """Parameters of a layer, of what is around the layers, and the most that an adapter adds to a layer."""
    config = json.loads((base / "config.json").read_text())
    from safetensors.numpy import load_file

    tensors = {n: a for path in base.glob("*.safetensors") for n, a in load_file(path).items()}
    inside = {n: a for n, a in tensors.items() if ".layers.0." in n}
    around = {n: a for n, a in tensors.items() if ".layers." not in n}
    ranks = sum(5 * sum(a.shape) for a in inside.values() if a.ndim == 2)
    assert config["num_hidden_layers"] == LAYERS and inside and around
    layer, outside = (sum(a.size for a in group.values()) for group in (inside, around))
    return {"layer": layer, "around": outside, "adapter": ranks}


def _off(folder: Path) -> float:
    code = f"import runpy; runpy.run_path({str(folder / 'run.py')!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    return float(done.stdout.rpartition(" off by ")[2])


def test_a_model_that_does_not_fit_is_searched_layer_by_layer(
    bundle: Path, base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here the fault is in the graph: two layers have each other's caches."""
    broken = tmp_path / "broken"
    shutil.copytree(bundle, broken)
    model = ir.load(broken / MODEL)
    names = [f"present.{layer}.value" for layer in (BAD, BAD + 1)]
    outputs = [next(v for v in model.graph.outputs if v.name == name) for name in names]
    outputs[0].name, outputs[1].name = "waiting", names[0]
    outputs[0].name = names[1]
    ir.save(model, broken / MODEL)
    monkeypatch.setattr(check_layers, "available_memory", lambda: 1 << 20)
    with pytest.warns(UserWarning, match=f"2 of its {LAYERS} layers are computed"):
        report = validate(broken, base, adapter=adapter, bisect=tmp_path / "found")
    assert report.finding is not None and report.finding.what == "graph output"
    assert report.finding.module in names and len(report.finding.nodes) == 1, str(report.finding)
    assert _off(tmp_path / "found") > 0


def test_a_bundle_in_16_bits(base: Path, adapter: Path, tmp_path: Path) -> None:
    options = ExportOptions(validate=False, precision="fp16")
    good = peft_deploy.export(base, tmp_path / "out", adapter=adapter, options=options).output
    broken = with_scaled_weight(good, tmp_path / "broken", WEIGHT, factor=1.5, dtype=np.float16)
    report = validate(broken, base, adapter=adapter, layers=1, bisect=tmp_path / "found")
    assert report.finding is not None and report.finding.module == FAULTY, report.warnings


def test_a_good_bundle_is_not_searched(
    bundle: Path, base: Path, adapter: Path, tmp_path: Path
) -> None:
    report = validate(bundle, base, adapter=adapter, layers=2, bisect=tmp_path / "found")
    assert report.passed and report.finding is None and not (tmp_path / "found").exists()


def test_only_the_weights_that_are_needed_leave_a_large_file(
    bundle: Path, base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bundle's weights begin behind 3 GiB of nothing; those of the part lie beside it where they are large."""
    broken = with_scaled_weight(bundle, tmp_path / "broken", WEIGHT)
    _move_weights(broken, 3 << 30)
    monkeypatch.setattr(reproduction, "MAX_INLINE_BYTES", 1 << 8)
    report = validate(broken, base, adapter=adapter, layers=1, bisect=tmp_path / "found")
    assert report.finding is not None and report.finding.module == FAULTY, report.warnings
    files = {path.name: path.stat().st_size for path in (tmp_path / "found").iterdir()}
    assert files.keys() == {"model.onnx", "model.onnx.data", "run.py", "values.npz"}
    weight = ir.load(bundle / MODEL).graph.initializers[WEIGHT].const_value
    assert weight is not None and weight.nbytes <= files["model.onnx.data"] < weight.nbytes + 65536
    assert _off(tmp_path / "found") == pytest.approx(report.finding.difference.max_abs, rel=1e-3)


def _move_weights(bundle: Path, by: int) -> None:
    """Puts a hole before all weights in the external data of a bundle."""
    model = ir.load(bundle / MODEL)
    moved = bundle / "moved"
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor):
            data = bundle / tensor.location
            offset = (tensor.offset or 0) + by
            value.const_value = ir.ExternalTensor(
                tensor.location, offset, tensor.length, tensor.dtype, shape=tensor.shape,
                name=tensor.name, base_dir=str(bundle),
            )  # fmt: skip
    with data.open("rb") as old, moved.open("wb") as new:
        new.seek(by)
        shutil.copyfileobj(old, new)
    moved.replace(data)
    (bundle / MODEL).write_bytes(ir.to_proto(model).SerializeToString())
