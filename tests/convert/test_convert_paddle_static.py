"""Joining a program and its weights in Paddle's format: nothing may take another tensor's place."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from peft_deploy.convert import ParamsFile, StaticProgram, write_program
from peft_deploy.errors import ConversionError
from peft_deploy.weights.pdiparams import read_records


def program(parameters: set[str], **constants: np.ndarray) -> StaticProgram:
    return StaticProgram("{}", frozenset(parameters), {}, constants, {"pd_op.add": 1}, {})


def zeros(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.float32)


def test_tensors_lie_in_the_order_of_their_names(tmp_path: Path) -> None:
    sizes = {"layers.2.w": 3, "layers.10.w": 2, "head": 1}
    with ParamsFile(tmp_path / "model.pdiparams") as file:
        for name in file.ordered(sizes):
            file.add(name, zeros(sizes[name]))
        counts = write_program(
            program(set(sizes), **{"~table.0000": zeros(4)}), file, tmp_path / "model.json"
        )
    assert [r.shape for r in read_records(tmp_path / "model.pdiparams")] == [
        (1,),
        (2,),
        (3,),
        (4,),
    ]
    assert counts == {"pd_op.add": 1}


def test_a_tensor_out_of_order_is_refused(tmp_path: Path) -> None:
    with ParamsFile(tmp_path / "model.pdiparams") as file:
        file.add("b", zeros(1))
        with pytest.raises(ConversionError, match="a cannot follow b"):
            file.add("a", zeros(1))


@pytest.mark.parametrize(
    ("written", "used", "message"),
    [(["a"], {"a", "b"}, "not there:\n  b"), (["a", "b"], {"a"}, "not used:\n  b")],
)
def test_weights_that_are_not_one_to_one_are_refused(
    written: list[str], used: set[str], message: str, tmp_path: Path
) -> None:
    with ParamsFile(tmp_path / "model.pdiparams") as file:
        for name in written:
            file.add(name, zeros(1))
        with pytest.raises(ConversionError, match=message):
            write_program(program(used), file, tmp_path / "model.json")
    assert not (tmp_path / "model.json").exists()
