"""Rules about what may be written where."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import pytest
from source_tree import ROOT, Module, modules, texts

from peft_deploy.families import find_family, known_architectures

CACHE_NAME = re.compile(r"\b(past_key_values|present)\.")
# Families that PaddleNLP knows, registered here or not: nothing outside families/ may ask for one.
MODEL_TYPES = frozenset(
    """
    bert bloom chatglm chatglm_v2 deepseek_v2 ernie gemma glm gpt gptj llama mistral mixtral opt
    qwen qwen2 qwen2_moe qwen3 roberta rw t5 yuan
    """.split()  # noqa: SIM905 (twenty quoted names read worse)
)
COMPARING_METHODS = {"startswith", "endswith", "find", "index", "count", "removeprefix"}


def cache_names(module: Module) -> list[str]:
    return [module.where(text) for text in texts(module) if CACHE_NAME.search(text.value)]


def prints(module: Module) -> list[str]:
    """Calls of print but for those in methods named after it: PaddleNLP's API has some."""
    allowed = {
        id(inner)
        for node in ast.walk(module.tree)
        if isinstance(node, ast.FunctionDef) and node.name.startswith("print_")
        for inner in ast.walk(node)
    }
    return [
        module.where(node)
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Call)
        and getattr(node.func, "id", "") == "print"
        and id(node) not in allowed
    ]


def exits(module: Module) -> list[str]:
    """Calls of sys.exit but for those under ``if __name__ == "__main__"``."""
    allowed = {
        id(inner)
        for node in module.tree.body
        if isinstance(node, ast.If) and "__name__" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    return [
        module.where(node)
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) in ("sys.exit", "exit", "quit", "os._exit")
        and id(node) not in allowed
    ]


def family_conditions(module: Module) -> list[str]:
    types = MODEL_TYPES | {find_family({"architectures": [a]}).model_type for a in architectures()}
    names = types | set(architectures())
    return [
        f"{module.where(node)}: {ast.unparse(node)}"
        for node in ast.walk(module.tree)
        if any(names_a_family(text, names) for text in compared_texts(node))
    ]


def architectures() -> list[str]:
    return known_architectures()


def compared_texts(node: ast.AST) -> Iterator[str]:
    asked: list[ast.AST] = []
    if isinstance(node, ast.Compare):
        asked = [node.left, *node.comparators]
    elif isinstance(node, ast.MatchValue):
        asked = [node.value]
    elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") in COMPARING_METHODS:
        asked = list(node.args)
    for part in asked:
        for inner in ast.walk(part):
            if isinstance(inner, ast.Constant) and isinstance(inner.value, str):
                yield inner.value


def names_a_family(text: str, names: set[str]) -> bool:
    return text in names or any(part in names for part in re.split(r"[./-]", text.lower()))


def test_only_the_signature_spells_cache_names() -> None:
    found = [w for m in modules() if m.name != "peft_deploy.signature" for w in cache_names(m)]
    assert found == []
    signature = next(m for m in modules() if m.name == "peft_deploy.signature")
    assert len(cache_names(signature)) == 4  # the search finds them where they are


def test_library_code_does_not_print() -> None:
    assert [where for module in modules() for where in prints(module)] == []


def test_only_the_command_line_ends_the_program() -> None:
    assert [w for m in modules() if m.layer != "cli" for w in exits(m)] == []


def test_no_family_in_a_condition_outside_families() -> None:
    assert [w for m in modules() if m.layer != "families" for w in family_conditions(m)] == []


@pytest.mark.parametrize(
    ("rule", "source"),
    [
        (cache_names, "name = 'past_key_values.0.key'"),
        (cache_names, "name = f'present.{i}.value'"),
        (prints, "def f():\n    print('x')"),
        (exits, "import sys\nsys.exit(2)"),
        (family_conditions, "if config['model_type'] == 'llama': pass"),
        (family_conditions, "ok = model_type in ('gpt', 'opt')"),
        (family_conditions, "ok = 'llama' in name"),
        (family_conditions, "ok = name.startswith('llama.layers')"),
        (family_conditions, "ok = 'LlamaForCausalLM' in architectures"),
        (family_conditions, "match kind:\n    case 'qwen2':\n        pass"),
    ],
)
def test_each_rule_finds_what_it_forbids(rule: object, source: str) -> None:
    assert callable(rule)
    assert len(rule(_module(source))) == 1


@pytest.mark.parametrize(
    ("rule", "source"),
    [
        (cache_names, "'''A docstring about past_key_values.0.key.'''"),
        (cache_names, "model(past_key_values=cache)"),
        (prints, "console.print('x')"),
        (prints, "def print_trainable_parameters(self):\n    print('x')"),
        (exits, "import sys\nif __name__ == '__main__':\n    sys.exit(0)"),
        (family_conditions, "CONFIG = {'model_type': 'llama'}"),
        (family_conditions, "if option == 'optimal': pass"),
    ],
)
def test_each_rule_lets_the_rest_be(rule: object, source: str) -> None:
    assert callable(rule)
    assert rule(_module(source)) == []


def _module(source: str) -> Module:
    module = Module("peft_deploy.weights.not_there", ROOT / "weights" / "not_there.py")
    module.__dict__["tree"] = ast.parse(source)
    return module
