"""Models that tests share.

``tiny_llama``
    A folder with the tiny Llama of models/tiny-llama (Hugging Face layout, float32, untied, with a
    tokenizer), made once a session; do not write into it.
``make_tiny_llama``
    Makes others in a fresh folder: ``make_tiny_llama(layout="paddlenlp", tied=True, seed=1,
    container="sharded-pdparams", dtype="bfloat16", num_hidden_layers=3, …)``.
``tiny_llama_module``
    The maker itself: ``.weights(config, seed)`` are the tensors in float32 under Hugging Face's
    names, ``.config_of(**sizes)`` the configuration, ``.vocabulary()`` the tokens.
``smollm2``
    The folder of SmolLM2-135M-Instruct; its recipe makes it when it is missing. Mark tests that
    use it ``slow``.
``minilm``
    The folder of the sentence encoder all-MiniLM-L6-v2, likewise.
``no_graph_cache``
    Every export traces and converts. Otherwise the processes of one run of tests keep graphs for each other.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
from filelock import FileLock
from model_recipes import load_recipe

from peft_deploy.convert.graph_cache import CACHE_VARIABLE


@pytest.fixture(scope="session", autouse=True)
def _graphs_of_this_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    base = tmp_path_factory.getbasetemp()
    run = base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv(CACHE_VARIABLE, str(run / "cache"))
        yield


@pytest.fixture
def no_graph_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, "")


@pytest.fixture(scope="session")
def tiny_llama_module() -> ModuleType:
    return load_recipe("tiny-llama")


@pytest.fixture(scope="session")
def make_tiny_llama(
    tiny_llama_module: ModuleType, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    def make(**options: object) -> Path:
        folder = tmp_path_factory.mktemp("tiny-llama")
        made: Path = tiny_llama_module.make(folder, **options)
        return made

    return make


@pytest.fixture(scope="session")
def tiny_llama(make_tiny_llama: Callable[..., Path]) -> Path:
    return make_tiny_llama()


@pytest.fixture(scope="session")
def smollm2() -> Path:
    return _made("smollm2-135m")


@pytest.fixture(scope="session")
def minilm() -> Path:
    return _made("minilm")


def _made(name: str) -> Path:
    recipe = load_recipe(name)
    lock = Path(tempfile.gettempdir()) / f"peft-deploy-{name}.lock"
    try:
        with FileLock(lock):  # the tests run in several processes; one of them makes it
            folder: Path = recipe.make()
    except recipe.RecipeError as exc:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"the real model cannot be made here: {exc}")
    return folder
