"""The prefix snippets of the specification, on a tiny model with grouped heads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import paddle
import pytest
from prefix_tiny import tiny

from peft_deploy import PrefixConfig, PrefixModel, PrefixModelForCausalLM


@pytest.mark.parametrize("prefix_projection", [False, True])
def test_the_snippets_of_prefix_tuning(
    prefix_projection: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = model = tiny("llama")
    prefix_config = PrefixConfig(
        num_prefix_tokens=8,
        num_attention_heads=model.config.n_head,
        num_hidden_layers=model.config.n_layer,
        hidden_size=model.config.hidden_size,
        prefix_projection=prefix_projection,
        prefix_projection_hidden_size=model.config.hidden_size,
    )
    model = PrefixModelForCausalLM(model=model, prefix_config=prefix_config)
    model.mark_only_prefix_as_trainable()
    model.print_trainable_parameters()
    assert "Trainable parameters" in capsys.readouterr().out
    for parameter in model.prefix_encoder.parameters():
        parameter.set_value(paddle.randn(parameter.shape) * 0.5)
    model.eval()
    ids = paddle.to_tensor([[3, 5, 7, 9]])
    plain, tuned = base(ids)[0].numpy(), model(ids)[0].numpy()
    assert np.abs(tuned - plain).max() > 0.01

    prefix_path = str(tmp_path / "prefix_path")
    model.save_pretrained(prefix_path)

    config = PrefixConfig.from_pretrained(prefix_path)
    assert config.num_prefix_tokens == 8
    model = PrefixModelForCausalLM.from_pretrained(base, prefix_path)
    model.eval()
    np.testing.assert_allclose(model(ids)[0].numpy(), tuned, atol=1e-6)
    assert PrefixModel is PrefixModelForCausalLM
