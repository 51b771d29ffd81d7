"""Runs in a process of its own: tries things while some packages cannot be imported.

``python blocked_imports.py modules|help PACKAGE…`` prints what happened as JSON.
"""

from __future__ import annotations

import importlib
import importlib.abc
import json
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType


class Blocker(importlib.abc.MetaPathFinder):
    def __init__(self, packages: Sequence[str]) -> None:
        self.packages = set(packages)

    def find_spec(
        self, fullname: str, path: object = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.partition(".")[0] in self.packages:
            raise ModuleNotFoundError(f"No module named {fullname!r}", name=fullname)
        return None


def block(packages: Sequence[str]) -> None:
    sys.meta_path.insert(0, Blocker(packages))


def import_all() -> dict[str, list[str]]:
    """Module → class and text of the error that its import meets."""
    from source_tree import modules

    failures = {}
    for module in modules():
        if module.name.endswith("__main__"):
            continue
        try:
            importlib.import_module(module.name)
        except Exception as exc:
            failures[module.name] = [type(exc).__name__, str(exc)]
    return failures


def help_texts() -> dict[str, list[object]]:
    """Command → exit code and text of its ``--help``; "" is the program itself."""
    from click.testing import CliRunner

    from peft_deploy.cli import cli

    result = CliRunner().invoke(cli, ["--help"])
    texts: dict[str, list[object]] = {"": [result.exit_code, result.output]}
    texts["heavy"] = [name for name in ("numpy", "rich", "onnx_ir") if name in sys.modules]
    with cli.make_context("peft-deploy", [], resilient_parsing=True) as context:
        names = cli.list_commands(context)
    for name in names:
        result = CliRunner().invoke(cli, [name, "--help"])
        texts[name] = [result.exit_code, result.output]
    return texts


if __name__ == "__main__":
    block(sys.argv[2:])
    json.dump(import_all() if sys.argv[1] == "modules" else help_texts(), sys.stdout)
