"""What the preflight says of operators before the converter sees them."""

from __future__ import annotations

from pathlib import Path

import pytest

from peft_deploy.errors import UnsupportedOperatorError
from peft_deploy.trace.preflight import OperatorUse, check_program, find_problems

SUPPORTED = {"matmul_v2", "elementwise_add", "gelu", "layer_norm", "leaky_relu", "fill_constant",
             "full", "builtin_combine", "repeat_interleave", "softmax"}  # fmt: skip


def problems(*uses: OperatorUse) -> list[str]:
    return [str(finding) for finding in find_problems(uses, SUPPORTED)]


def test_renamed_and_structural_operators_pass() -> None:
    names = ["pd_op.matmul", "pd_op.add", "pd_op.data", "builtin.parameter", "builtin.combine",
             "cf.yield", "pd_op.softmax"]  # fmt: skip
    assert problems(*(OperatorUse(name) for name in names)) == []


def test_unsupported_operator_is_named_with_module_line_and_replacement() -> None:
    use = OperatorUse("pd_op.swiglu", "llama.layers.3.mlp", lambda: "modeling.py:687")
    with pytest.raises(UnsupportedOperatorError) as caught:
        check_program([use], SUPPORTED)
    for part in ("pd_op.swiglu", "llama.layers.3.mlp", "modeling.py:687", "silu(gate) * up"):
        assert part in caught.value.message


def test_unknown_operator_names_the_closest_known_one() -> None:
    assert "closest that has is softmax" in problems(OperatorUse("pd_op.softmax_"))[0]


def test_wrong_translations_are_refused_though_registered() -> None:
    assert problems(OperatorUse("pd_op.repeat_interleave"))
    assert problems(OperatorUse("pd_op.gelu", attributes={"approximate": True}))
    assert not problems(OperatorUse("pd_op.gelu", attributes={"approximate": False}))


def test_double_precision_attributes_are_refused_where_they_are_misread() -> None:
    slope = OperatorUse("pd_op.leaky_relu", float64_attributes=("negative_slope",))
    assert "negative_slope" in problems(slope)[0]
    assert not problems(OperatorUse("pd_op.full", float64_attributes=("value",)))


def test_many_findings_are_cut_with_a_count() -> None:
    uses = [OperatorUse("pd_op.swiglu", f"layers.{i}") for i in range(30)]
    with pytest.raises(UnsupportedOperatorError, match="… and 25 more"):
        check_program(uses, SUPPORTED)


def test_a_real_program_gives_module_and_source_line(tmp_path: Path) -> None:
    """Traced by Paddle, with an operator in it that Paddle2ONNX aborts on."""
    pytest.importorskip("paddle")
    from trace_models import UsesSwiglu, trace

    traced = trace(UsesSwiglu())
    traced.save(tmp_path / "program.json")
    uses = traced.operators(tmp_path / "program.json")
    names = {use.name.partition(".")[2] for use in uses} - {"swiglu"}
    with pytest.raises(UnsupportedOperatorError) as caught:
        check_program(uses, names)
    message = caught.value.message
    assert "pd_op.swiglu" in message
    assert "block.0.mlp" in message
    assert "trace_models.py:" in message
