"""Every family, LoRA on all of its linears merged: the bundle equals PaddleNLP's own forward on the whole matrix.

One test a file of models/tiny; a new family or variant needs no more than its config.json there.
"""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest
from model_recipes import load_recipe

import peft_deploy
from peft_deploy.families import find_family
from peft_deploy.parity import ParityReport

tiny = load_recipe("tiny")

MAX_RELATIVE_ERROR = 1e-4
MAX_NODES_PER_LAYER = 65
PATH = re.compile(r"/[\w.]+(/[\w.]+)*")

pytestmark = pytest.mark.convert


@pytest.mark.parametrize("name", tiny.known())
def test_merged_bundle_equals_the_dynamic_graph(name: str, tmp_path: Path) -> None:
    base = tiny.make(tmp_path / "base", name)
    adapter = tiny.make_lora(tmp_path / "adapter", base)

    with warnings.catch_warnings():
        for remark in find_family(tiny.config_of(name)).remarks(tiny.config_of(name)):
            warnings.filterwarnings("ignore", re.escape(remark))
        result = peft_deploy.export(base, tmp_path / "out", adapter=adapter)

    assert result.parity is not None and result.manifest is not None
    assert result.parity.passed
    assert not result.parity.warnings
    assert _worst(result.parity) <= MAX_RELATIVE_ERROR
    operators = result.manifest.graph["operators"]
    assert not {"If", "Loop"} & operators.keys()
    layers = result.manifest.signature.num_layers
    if layers:
        assert sum(operators.values()) / layers <= MAX_NODES_PER_LAYER + 25


def _worst(report: ParityReport) -> float:
    return max(
        output.difference.relative_max for case in report.cases for output in case.outputs.values()
    )
