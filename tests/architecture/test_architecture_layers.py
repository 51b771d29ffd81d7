"""A module imports from its own package and from those above it, never from below."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from source_tree import ROOT, Module, imports, modules

# From the top down.
LAYERS = (
    "errors",
    "signature",
    "environment",
    "progress",
    "lazy",
    "atomic_folder",
    "diagnosis",
    "config",
    "text",
    "families",
    "weights",
    "base",
    "adapters",
    "training",
    "trace",
    "convert",
    "bundle",
    "runtime",
    "parity",
    "inspection",
    "workflows",
    "testing",
    "cli",
)
# They are the outside of the package: they import from everywhere, and nothing imports from them.
OUTSIDE = ("peft_deploy", "peft_deploy.__main__")


def violations(tree: list[Module]) -> list[str]:
    known = {module.name for module in modules()}
    found = []
    for module in tree:
        if module.name in OUTSIDE:
            continue
        rank = LAYERS.index(module.layer)
        for target, node in imports(module, known):
            layer = target.split(".")[1] if target.startswith("peft_deploy.") else target
            if layer not in LAYERS:
                found.append(f"{module.where(node)} imports {target}, which is no layer")
            elif LAYERS.index(layer) > rank:
                found.append(f"{module.where(node)}: {module.layer} imports {target} from below")
    return found


def test_every_package_has_its_layer() -> None:
    layers = {module.layer for module in modules() if module.name not in OUTSIDE}
    assert layers == set(LAYERS)


def test_nothing_imports_from_below() -> None:
    assert violations(modules()) == []


@pytest.mark.parametrize(
    ("layer", "source"),
    [
        ("weights", "from peft_deploy.runtime import OnnxRunner"),
        ("weights", "def f():\n    from peft_deploy import runtime\n"),
        ("weights", "def f():\n    import peft_deploy.cli.export\n"),
        ("weights", "import importlib\nimportlib.import_module('peft_deploy.workflows')\n"),
        ("weights", "from peft_deploy import export"),
        ("weights", "from . import merged"),
        ("errors", "import peft_deploy.signature"),
    ],
)
def test_the_check_sees_every_way_to_import(tmp_path: Path, layer: str, source: str) -> None:
    path = ROOT / layer / "not_there.py"
    module = Module(f"peft_deploy.{layer}.not_there", path)
    module.__dict__["tree"] = ast.parse(source)
    assert len(violations([module])) == 1


@pytest.mark.parametrize(
    "source",
    [
        "import numpy\nfrom peft_deploy.errors import listed\n",
        "from peft_deploy import errors\nfrom peft_deploy.weights.lora import LoraPair\n",
    ],
)
def test_the_check_lets_what_is_above_pass(source: str) -> None:
    module = Module("peft_deploy.weights.not_there", ROOT / "weights" / "not_there.py")
    module.__dict__["tree"] = ast.parse(source)
    assert violations([module]) == []
