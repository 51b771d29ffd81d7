"""Which models can be trained here."""

from __future__ import annotations

from pathlib import Path

import pytest
from model_recipes import load_recipe

from peft_deploy.environment import require_paddle
from peft_deploy.errors import ConfigError

require_paddle("these tests")

from peft_deploy.training import TrainOptions, train  # noqa: E402

tiny = load_recipe("tiny")


@pytest.mark.parametrize("name", ["t5", "bert-classification"])
def test_a_model_that_continues_no_texts_is_refused(name: str, tmp_path: Path) -> None:
    base = tiny.make(tmp_path / "base", name)
    data, output = tmp_path / "data.jsonl", tmp_path / "out"
    data.write_text('{"text": "a text of some words"}\n', "utf-8")
    with pytest.raises(ConfigError, match=tiny.config_of(name)["architectures"][0]):
        train(TrainOptions(base=str(base), data=data, output=output))
    assert not output.exists() or not any(output.iterdir())
