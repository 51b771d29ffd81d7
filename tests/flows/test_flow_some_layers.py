"""The check of some layers, put together to a smaller model."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from flows_adapter import adapter_for
from flows_faults import with_scaled_weight

import peft_deploy
from peft_deploy.bundle import MODEL, Manifest
from peft_deploy.config.export import ExportOptions
from peft_deploy.errors import ConfigError
from peft_deploy.parity.report import CheckedLayers, ParityReport
from peft_deploy.workflows import check_layers
from peft_deploy.workflows.validate import validate

pytestmark = pytest.mark.convert
LAYERS = 5


@pytest.fixture(scope="module")
def base(make_tiny_llama: Callable[..., Path]) -> Path:
    return make_tiny_llama(num_hidden_layers=LAYERS)


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return adapter_for(base, tmp_path_factory.mktemp("adapters") / "tuned")


@pytest.fixture(scope="module")
def bundle(base: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    options, output = ExportOptions(validate_layers=3), tmp_path_factory.mktemp("bundles") / "out"
    result = peft_deploy.export(base, output, adapter=adapter, options=options)
    assert result.parity is not None and result.parity.layers == CheckedLayers((0, 2, 4), LAYERS)
    return result.output


def _failed(report: ParityReport) -> list[str]:
    return [case.name for case in report.cases if not case.passed]


def test_the_manifest_says_which_layers_were_computed_with(bundle: Path) -> None:
    parity = Manifest.read(bundle).parity
    assert parity is not None and parity["passed"]
    assert parity["layers"] == {"checked": [0, 2, 4], "total": LAYERS}
    assert "layers 0, 2, 4 of 5" in parity["summary"]
    assert parity["adapter_effect"]["sensitivity"] < 0.01  # the adapter is active on both sides


def test_a_changed_weight_of_a_layer_that_is_computed_with_is_seen(
    bundle: Path, base: Path, adapter: Path, tmp_path: Path
) -> None:
    broken = with_scaled_weight(bundle, tmp_path / "out", "model.layers.2.mlp.down_proj.weight")
    report = validate(broken, base, adapter=adapter, layers=3)
    assert len(_failed(report)) > 10


def test_a_changed_weight_of_a_layer_that_is_left_out_is_seen_in_the_file(
    bundle: Path, base: Path, adapter: Path, tmp_path: Path
) -> None:
    broken = with_scaled_weight(bundle, tmp_path / "out", "model.layers.3.mlp.down_proj.weight")
    report = validate(broken, base, adapter=adapter, layers=3)
    assert _failed(report) == ["weights, byte by byte"]
    drawn = validate(broken, base, adapter=adapter, layers=4, seed=2)
    assert drawn.layers is not None and len(drawn.layers.indices) == 4
    assert (len(_failed(drawn)) > 10) == (3 in drawn.layers.indices)


def test_a_layer_that_is_left_out_and_wired_otherwise_is_named(
    bundle: Path, base: Path, adapter: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "out"
    shutil.copytree(bundle, broken)
    model = ir.load(broken / MODEL)
    inside = [node for node in model.graph if str(node.name).startswith("/model/layers.3/")]
    last = next(node for node in reversed(inside) if node.op_type == "Add")  # the residual's
    last.replace_input_with(0, last.inputs[1])
    ir.save(model, broken / MODEL)
    report = validate(broken, base, adapter=adapter, layers=2)
    assert _failed(report) == [check_layers.CASE]
    problem = next(case.problem for case in report.cases if case.problem)
    assert (
        problem is not None
        and "1 of 5 layers" in problem
        and "layer 3: /model/layers.3" in problem
    )


def test_a_graph_in_16_bits_is_taken_apart_like_any_other(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    _first_and_last_pass(base, adapter, tmp_path / "out", "fp16")


def _first_and_last_pass(base: Path, adapter: Path, output: Path, precision: str) -> None:
    options = ExportOptions(validate_layers=2, precision=precision)
    result = peft_deploy.export(base, output, adapter=adapter, options=options)
    assert result.parity is not None and result.parity.layers == CheckedLayers((0, 4), LAYERS)


@pytest.fixture
def everything_in_files(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("dygraph", "mapped"):
        monkeypatch.setattr(f"peft_deploy.base.{module}.LEAST", 0)


@pytest.mark.usefixtures("everything_in_files")
def test_int4_passes_with_the_reference_s_weights_in_files(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    _first_and_last_pass(base, adapter, tmp_path / "out", "int4")
    name = "model.layers.4.mlp.down_proj.weight.scales"
    broken = with_scaled_weight(tmp_path / "out", tmp_path / "broken", name)
    assert len(_failed(validate(broken, base, adapter=adapter, layers=2))) > 10


def test_parameters_in_files_compute_and_change_like_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from peft_deploy.environment import require_paddle

    require_paddle("a layer")
    import paddle

    from peft_deploy.adapters.arrays import assign, to_array
    from peft_deploy.base.mapped import fill_mapped, release_after_use, release_pages

    monkeypatch.setattr("peft_deploy.base.mapped.LEAST", 0)
    rng = np.random.default_rng(0)
    values, other = (rng.standard_normal((6, 4)).astype(np.float16) for _ in range(2))
    layer = paddle.nn.Sequential(paddle.nn.Linear(4, 6))
    weight = layer[0].weight
    assert fill_mapped(weight, values.T, "float32")
    release_after_use(layer)
    for wanted in (values.T, other.T):
        assign(weight, wanted)
        for _ in range(2):
            release_pages()
            found = layer(paddle.eye(4)).numpy() - layer[0].bias.numpy()
            np.testing.assert_allclose(found, wanted, rtol=1e-6)
    np.testing.assert_array_equal(to_array(weight), other.T)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.warns(UserWarning, match=r"are kept in memory: .*No space left"):
        assert not fill_mapped(weight, values.T, "float32")
    np.testing.assert_array_equal(to_array(weight), other.T)


def test_without_memory_for_the_whole_model_the_check_says_what_it_does_instead(
    bundle: Path, base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check_layers, "available_memory", lambda: 1 << 20)
    with pytest.warns(UserWarning, match=r"2 of its 5 layers are computed"):
        report = validate(bundle, base, adapter=adapter)
    assert report.passed and report.layers == CheckedLayers((0, 4), LAYERS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        whole = validate(bundle, base, adapter=adapter, layers="all")
    assert whole.passed and whole.layers is None


def test_what_cannot_be_checked_in_layers_is_refused(bundle: Path, base: Path) -> None:
    with pytest.raises(ConfigError, match="at least 1, or all"):
        validate(bundle, base, layers=0)
    with pytest.raises(ConfigError, match="can only be used with the base model"):
        validate(bundle, layers=2)
    with pytest.raises(ConfigError, match="needs the check that --no-validate leaves out"):
        ExportOptions(validate=False, validate_layers=2)
    with pytest.raises(ConfigError, match="records nothing"):
        ExportOptions(record_reference=True, validate_layers=2)
    manifest = replace(Manifest.read(bundle), format="paddle")
    from peft_deploy.workflows.sources import from_folders

    with pytest.raises(ConfigError, match="only ONNX graphs are taken apart"):
        check_layers.plan_layers(2, from_folders(base, None), manifest)
