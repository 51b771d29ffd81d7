"""What a package offers is what its ``__init__`` says it offers."""

from __future__ import annotations

import ast
import importlib
import re
import warnings

import pytest
from source_tree import Module, modules

from peft_deploy.environment import require_paddle

PACKAGES = [module for module in modules() if module.is_package]


def declared(package: Module) -> list[str] | None:
    for node in package.tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(getattr(target, "id", "") == "__all__" for target in targets):
            return list(ast.literal_eval(node.value))  # type: ignore[attr-defined]
    return None


def offered(package: Module) -> set[str]:
    """Public names that the ``__init__`` defines, or takes from its own modules without using them itself."""
    names = set()
    used = {
        node.id
        for node in ast.walk(package.tree)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)
    }
    for node in ast.walk(package.tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(package.name):
            # "import x as x" of a module is there for what it does when it is imported
            names |= {alias.name for alias in node.names if alias.asname is None}
    names -= used
    for node in package.tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
    return {name for name in names if not name.startswith("_")}


def place(name: str) -> tuple[int, str]:
    """Constants, then classes, then functions, each by name: the order that the linter keeps."""
    return (0 if name.isupper() else 1 if re.match("[A-Z]", name) else 2), name


@pytest.mark.parametrize("package", PACKAGES, ids=lambda p: p.name)
def test_all_is_sorted_and_complete(package: Module) -> None:
    names = declared(package)
    assert names is not None, f"{package.path} has no __all__"
    assert names == sorted(names, key=place)
    assert len(names) == len(set(names))
    assert offered(package) <= set(names)


@pytest.mark.parametrize("package", PACKAGES, ids=lambda p: p.name)
def test_everything_in_all_can_be_imported(package: Module) -> None:
    require_paddle("this test")  # some packages need it; then before anything imports Paddle
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PaddleNLP's own, when it is imported here first
        module = importlib.import_module(package.name)
        missing = [name for name in declared(package) or () if not hasattr(module, name)]
    assert missing == []


@pytest.mark.parametrize("package", PACKAGES, ids=lambda p: p.name)
def test_every_package_says_what_it_owns(package: Module) -> None:
    text = ast.get_docstring(package.tree)
    assert text is not None and len(text) > 60
    if package.name.count(".") == 1:  # its place in the layers is a package's own business to say
        assert re.search(r"\b(needs?|imports?|without)\b", text, re.IGNORECASE), text


def test_every_folder_is_a_package() -> None:
    folders = {module.path.parent for module in modules()}
    assert {module.path.parent for module in PACKAGES} == folders
