"""The package's own source as syntax trees, for the tests of this folder."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import peft_deploy

ROOT_NAME = "peft_deploy"
ROOT = Path(peft_deploy.__file__).resolve().parent


@dataclass(frozen=True)
class Module:
    name: str
    path: Path

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.path.read_text("utf-8"), str(self.path))

    @property
    def is_package(self) -> bool:
        return self.path.name == "__init__.py"

    @property
    def layer(self) -> str:
        """The part of the name that decides the layer: "weights" of peft_deploy.weights.lora."""
        return self.name.split(".")[1] if "." in self.name else ""

    def where(self, node: ast.AST) -> str:
        return f"{self.path.relative_to(ROOT.parent)}:{getattr(node, 'lineno', 1)}"


def modules() -> list[Module]:
    found = []
    for path in sorted(ROOT.rglob("*.py")):
        parts = list(path.relative_to(ROOT.parent).with_suffix("").parts)
        if parts[-1] == "__init__":
            parts.pop()
        found.append(Module(".".join(parts), path))
    return found


def imports(module: Module, known: set[str]) -> Iterator[tuple[str, ast.AST]]:
    """Every module of the package that this one imports, wherever in the file.

    A string that is exactly the name of a module counts, too: that is how they are imported late.
    """
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.partition(".")[0] == ROOT_NAME:
                    yield alias.name, node
        elif isinstance(node, ast.ImportFrom):
            source = node.module or ""
            if node.level:
                yield f"{'.' * node.level}{source}", node
            elif source.partition(".")[0] == ROOT_NAME:
                for alias in node.names:
                    if alias.name == "__version__":  # the one thing that the root itself holds
                        continue
                    inner = f"{source}.{alias.name}"
                    yield (inner if inner in known else source), node
        elif isinstance(node, ast.Constant) and node.value in known and "." in str(node.value):
            yield str(node.value), node


def texts(module: Module) -> Iterator[ast.Constant]:
    """Every string that is not a docstring."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(module.tree)
        if isinstance(node, documented) and node.body and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(module.tree):
        if (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and id(node) not in docstrings
        ):
            yield node
