"""A tiny model, an adapter on all of its linear layers, and the bundles made of them."""

from __future__ import annotations

from pathlib import Path

import pytest
from flows_adapter import adapter_for

import peft_deploy
from peft_deploy.config.export import ExportOptions


@pytest.fixture(scope="session")
def tiny_adapter(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return adapter_for(tiny_llama, tmp_path_factory.mktemp("adapters") / "tuned")


@pytest.fixture(scope="session")
def base_bundle(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("bundles") / "base"
    peft_deploy.export(tiny_llama, output, options=ExportOptions(validate=False))
    return output


@pytest.fixture(scope="session")
def merged_bundle(
    tiny_llama: Path, tiny_adapter: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    output = tmp_path_factory.mktemp("bundles") / "merged"
    peft_deploy.export(tiny_llama, output, adapter=tiny_adapter)
    return output


@pytest.fixture(scope="session")
def recorded(
    tiny_llama: Path, tiny_adapter: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A bundle that holds what its reference said; beside it lie its report and the cases."""
    folder = tmp_path_factory.mktemp("recorded")
    (folder / "cases.txt").write_text("the lamp had burned all night\nand\n")
    options = ExportOptions(
        record_reference=True, cases=folder / "cases.txt", report=folder / "report"
    )
    peft_deploy.export(tiny_llama, folder / "out", adapter=tiny_adapter, options=options)
    return folder / "out"
