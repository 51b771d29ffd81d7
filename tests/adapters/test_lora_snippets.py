"""The LoRA snippets of the specification, on tiny models."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import paddle
import pytest
from adapters_tiny import fill_branches, logits, tiny_llama
from paddle import nn
from paddlenlp import transformers

from peft_deploy.adapters.lora import LoRAConfig, LoRAModel, mark_only_lora_as_trainable


class Attention(nn.Layer):
    """A model whose projections have the names of the first snippet."""

    def __init__(self) -> None:
        super().__init__()
        self.query_proj = nn.Linear(8, 8)
        self.key_proj = nn.Linear(8, 8)
        self.value_proj = nn.Linear(8, 8)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        scores = nn.functional.softmax(self.query_proj(x) @ self.key_proj(x).mT, -1)
        return scores @ self.value_proj(x)


def test_the_first_snippet() -> None:
    model = Attention()
    with pytest.warns(DeprecationWarning):
        lora_config = LoRAConfig(
            target_modules=["query_proj", "value_proj"],
            r=8,
            lora_alpha=16,
            merge_weights=True,
        )

    # Create LoRA model
    model = LoRAModel(lora_config, model)

    # Freeze non-LoRA parameters
    mark_only_lora_as_trainable(model)

    trained = {name for name, p in model.named_parameters() if not p.stop_gradient}
    assert trained == {
        f"model.{layer}_proj.lora_{half}" for layer in ("query", "value") for half in "AB"
    }
    fill_branches(model)
    x = paddle.randn([2, 3, 8])
    model.train()
    training = model(x).numpy()
    model.eval()
    assert model.merged
    np.testing.assert_allclose(model(x).numpy(), training, atol=1e-5)


def test_the_snippets_of_training_saving_and_loading(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_llama()
    target_modules = [".*q_proj.*", ".*v_proj.*", ".*k_proj.*"]
    lora_rank = 8
    lora_config = LoRAConfig(
        target_modules=target_modules,
        r=lora_rank,
        lora_alpha=2 * lora_rank,
    )
    model = LoRAModel(model, lora_config)
    model.mark_only_lora_as_trainable()
    model.print_trainable_parameters()
    assert "Trainable parameters:2.5" in capsys.readouterr().out

    fill_branches(model)
    tuned = logits(model)
    lora_path = tmp_path / "lora_path"
    model.save_pretrained(str(lora_path))

    config = LoRAConfig.from_pretrained(str(lora_path))
    assert config == model.lora_config
    model = tiny_llama()
    model = LoRAModel.from_pretrained(model, str(lora_path))
    model.eval()
    np.testing.assert_allclose(logits(model), tuned, atol=1e-6)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("target_modules", "layers"),
    [
        (["q", "v"], 6),  # of the encoder's attention, and of both of the decoder's
        (".*decoder.*(SelfAttention|EncDecAttention).*(q|v)$", 4),
    ],
)
def test_the_patterns_that_the_parameters_of_lora_config_name(
    target_modules: object, layers: int
) -> None:
    paddle.seed(0)
    sizes = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_heads": 2}
    config = transformers.T5Config(**sizes, num_layers=1, dropout_rate=0.0)
    base = transformers.T5ForConditionalGeneration(config)
    base.eval()
    ids = {name: paddle.to_tensor([[3, 5, 7, 9]]) for name in ("input_ids", "decoder_input_ids")}
    before = base(**ids)[0].numpy()
    model = LoRAModel(base, LoRAConfig(r=2, lora_alpha=4, target_modules=target_modules))
    trained = [name for name, p in model.named_parameters() if not p.stop_gradient]
    assert len(trained) == 2 * layers
    assert {name.split(".")[-2] for name in trained} == {"q", "v"}
    fill_branches(model)
    tuned = model(**ids)[0].numpy()
    assert np.abs(tuned - before).max() > 1e-3
    model.merge()
    np.testing.assert_allclose(model(**ids)[0].numpy(), tuned, atol=1e-5)
