"""Every family through every way out: the bundles equal PaddleNLP's own forward on the whole matrix.

One model a family, with LoRA on all of its linears merged and at run time, and a prefix where it has one, as ONNX
and in Paddle's format; its variants with LoRA merged. A new family or variant needs no more than its config.json in
models/tiny. What is measured here is what the table in README.md says.
"""

from __future__ import annotations

import functools
import importlib.util
import re
import warnings
from pathlib import Path
from types import ModuleType

import pytest
from fused_counts import COLUMNS, FUSED
from model_recipes import load_recipe

import peft_deploy
from peft_deploy.bundle import Manifest
from peft_deploy.families import EncoderDecoderFamily, find_family

ROOT = Path(__file__).resolve().parents[2]
MAX_RELATIVE_ERROR = 1e-4
MAX_NODES_PER_LAYER = 50  # of two layers that carry what comes before and after them

tiny = load_recipe("tiny")

pytestmark = pytest.mark.convert


def _load_table() -> ModuleType:
    spec = importlib.util.spec_from_file_location("table", ROOT / "tools" / "support_table.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


table = _load_table()
models = table.models()
variants = sorted(set(tiny.known()) - set(models.values()))


@pytest.fixture(scope="session")
def measured(tmp_path_factory: pytest.TempPathFactory) -> functools._lru_cache_wrapper:
    """Family → its cells, each measured once in a session, in which its graphs are looked at as well."""

    @functools.cache
    def measure(family: str) -> object:
        folder = tmp_path_factory.mktemp(family)
        with WithoutRemarks(models[family]):
            cells = table.measure(models[family], folder)
        check_fused(models[family], Manifest.read(folder / "onnx"))
        return cells

    return measure


def check_fused(name: str, manifest: Manifest) -> None:
    """Every fusion fired as often as it should have, and nothing was left plain."""
    graphs = [manifest.graph, *([manifest.encoder.graph] if manifest.encoder else [])]
    assert [tuple(g["fused"][c] for c in COLUMNS) for g in graphs] == FUSED[name]
    for graph in graphs:
        assert not {"plain", "not_fused"} & graph.keys()


class WithoutRemarks(warnings.catch_warnings):
    """A family's own remarks on a model are expected; any other warning stays an error."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self._config = tiny.config_of(name)

    def __enter__(self) -> None:
        super().__enter__()
        for remark in find_family(self._config).remarks(self._config):
            warnings.filterwarnings("ignore", re.escape(remark))


@pytest.mark.parametrize("family", sorted(models))
def test_every_way_out_equals_the_dynamic_graph(
    family: str, measured: functools._lru_cache_wrapper
) -> None:
    cells = measured(family)
    config = tiny.config_of(models[family])
    apart = not isinstance(find_family(config), EncoderDecoderFamily)
    assert {table.MERGED, *([table.RUNTIME] if apart else [])} <= {way for way, _ in cells}
    assert max(cells.values()) <= MAX_RELATIVE_ERROR


@pytest.mark.parametrize("name", variants)
def test_variants_equal_the_dynamic_graph(name: str, tmp_path: Path) -> None:
    base = tiny.make(tmp_path / "base", name)
    adapter = tiny.make_lora(tmp_path / "adapter", base)

    with WithoutRemarks(name):
        result = peft_deploy.export(base, tmp_path / "out", adapter=adapter)

    assert result.parity is not None and result.manifest is not None
    assert result.parity.passed
    assert not result.parity.warnings
    assert table.worst(result.parity) <= MAX_RELATIVE_ERROR
    check_fused(name, result.manifest)
    operators = result.manifest.graph["operators"]
    assert not {"If", "Loop"} & operators.keys()
    layers = find_family(tiny.config_of(name)).dims(tiny.config_of(name)).num_layers
    assert sum(operators.values()) / layers <= MAX_NODES_PER_LAYER


def test_the_readme_says_so(measured: functools._lru_cache_wrapper) -> None:
    found = {family: measured(family) for family in models}
    assert table.disagreements(table.written(), table.render(found)) == []
