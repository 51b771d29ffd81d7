"""A plain Paddle loop, recomputation and accumulated gradients, for both kinds of adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from peft_deploy.adapters.lora import LoRAModel
from peft_deploy.adapters.prefix import PrefixModelForCausalLM
from peft_deploy.base import open_base
from peft_deploy.base.dygraph import load_model
from peft_deploy.config import LoRAConfig, PrefixConfig

pytestmark = pytest.mark.filterwarnings(r"ignore:[\s\S]*swiglu")

IDS = (np.arange(4 * 8).reshape(4, 8) * 7) % 60 + 3  # [B, S]
METHODS = ("lora", "prefix")


def wrapped(method: str, folder: Path) -> Any:
    """A model whose adapter is far from zero, in training mode."""
    import paddle

    base = load_model(open_base(folder))
    paddle.seed(3)
    if method == "prefix":
        config = PrefixConfig(num_prefix_tokens=4, prefix_projection=True)
        model: Any = PrefixModelForCausalLM(base, config)
    else:
        model = LoRAModel(
            base, LoRAConfig(r=4, lora_alpha=8, target_modules=["q_proj", "up_proj"])
        )
    generator = np.random.default_rng(5)
    for parameter in model.get_trainable_state_dict().values():
        noise = generator.standard_normal(parameter.shape).astype("float32")
        parameter.set_value(parameter + paddle.to_tensor(0.2 * noise))
    return model.train()


def loop(model: Any, steps: int = 1, parts: int = 1) -> list[float]:
    """Gradient descent by hand, each step's batch in equal parts; the losses."""
    import paddle
    import paddle.nn.functional as F

    trained = [p for p in model.parameters() if not p.stop_gradient]
    optimizer = paddle.optimizer.SGD(0.2, parameters=trained)
    losses = []
    for _ in range(steps):
        total = 0.0
        for rows in np.split(IDS, parts):
            ids = paddle.to_tensor(rows)
            logits = model(ids)  # [B, S, V]
            logits = logits[0] if isinstance(logits, (tuple, list)) else logits
            loss = F.cross_entropy(logits[:, :-1], ids[:, 1:]) / parts
            loss.backward()
            total += float(loss)
        optimizer.step()
        optimizer.clear_grad()
        losses.append(total)
    return losses


def values(tensors: dict[str, Any]) -> dict[str, np.ndarray]:
    return {name: tensor.numpy().copy() for name, tensor in tensors.items()}


def assert_same(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        np.testing.assert_allclose(found[name], array, rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("method", METHODS)
def test_a_plain_loop_changes_the_adapter_and_nothing_else(method: str, tiny_llama: Path) -> None:
    model = wrapped(method, tiny_llama)
    everything = values(dict(model.named_parameters()))
    adapter = {id(t) for t in model.get_trainable_state_dict().values()}
    losses = loop(model, steps=12)
    assert losses[-1] < 0.9 * losses[0]
    for name, parameter in model.named_parameters():
        moved = np.abs(parameter.numpy() - everything[name]).max()
        assert (moved > 1e-4) if id(parameter) in adapter else (moved == 0), name
    assert len(adapter) == sum(not p.stop_gradient for p in model.parameters())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("how", ["recompute", "parts"])
def test_recomputation_and_accumulation_give_the_same_weights(
    method: str, how: str, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, other = wrapped(method, tiny_llama), wrapped(method, tiny_llama)
    start = values(plain.get_trainable_state_dict())
    calls = []
    if how == "recompute":
        layer = type(other.model.llama.layers[0])
        forward = layer.forward
        monkeypatch.setattr(
            layer, "forward", lambda self, *a, **k: calls.append(1) or forward(self, *a, **k)
        )
        other.model.recompute_enable()
    loop(other, steps=2, parts=2 if how == "parts" else 1)
    ran = len(calls)
    monkeypatch.undo()
    loop(plain, steps=2)
    if how == "recompute":
        # The first layer has frozen inputs, so PaddleNLP keeps its activations.
        assert ran == 2 * (2 * len(other.model.llama.layers) - 1)
    wanted = values(plain.get_trainable_state_dict())
    assert_same(values(other.get_trainable_state_dict()), wanted)
    assert all(np.abs(wanted[name] - start[name]).max() > 1e-4 for name in start)
