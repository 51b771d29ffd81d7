# ruff: noqa: E402 (the environment has to be prepared before Paddle's first import)

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("paddle")
pytest.importorskip("paddlenlp")

from peft_deploy.environment import require_paddle

require_paddle("these tests")

import paddle
from paddle import nn

from peft_deploy.adapters.lora import LoRAModel
from peft_deploy.base import BaseModel, open_base
from peft_deploy.base.dygraph import load_model
from peft_deploy.config import LoRAConfig
from peft_deploy.errors import ExecutionError
from peft_deploy.parity import Prompt, Text, build_matrix, check
from peft_deploy.parity import reference as reference_module
from peft_deploy.parity.play import read_text
from peft_deploy.parity.reference import PaddleReference
from peft_deploy.parity.rounding import rounded_modules
from peft_deploy.signature import LOGITS


def with_adapter(base: BaseModel, dropout: float = 0.0, seed: int = 0) -> LoRAModel:
    """A LoRA model whose B is far from zero."""
    paddle.seed(seed)
    config = LoRAConfig(
        r=4, lora_alpha=8, lora_dropout=dropout, target_modules=["q_proj", "v_proj", "down_proj"]
    )
    model = LoRAModel(load_model(base), config)
    rng = np.random.default_rng(seed)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            values = 0.3 * rng.standard_normal(parameter.shape)
            parameter.set_value(paddle.to_tensor(values.astype("float32")))
    model.eval()
    return model


@pytest.fixture(scope="module")
def base(tiny_llama: Path) -> BaseModel:
    return open_base(tiny_llama)


@pytest.fixture
def model(base: BaseModel) -> LoRAModel:
    return with_adapter(base)


def reference_of(base: BaseModel, model: Any) -> PaddleReference:
    return PaddleReference(model, base.family, base.config)


def state_of(model: Any) -> dict[str, np.ndarray]:
    return {name: tensor.numpy().copy() for name, tensor in model.state_dict().items()}


def test_active_and_merged_agree_in_every_case(base: BaseModel, model: LoRAModel) -> None:
    reference = reference_of(base, model)
    merged = with_adapter(base)
    merged.merge()
    matrix = build_matrix(reference.signature, base.dims.max_positions)
    prompts = [Prompt("a", (5, 6, 7)), Prompt("b", (9, 10, 11, 12, 13))]
    report = check(reference, reference_of(base, merged), matrix, prompts)
    assert report.passed, report.summary()
    assert report.exact and not report.warnings
    assert report.effect is not None and report.effect.sensitivity < 1e-3


def test_another_strength_fails_in_every_case(base: BaseModel, model: LoRAModel) -> None:
    reference = reference_of(base, model)
    wrong = with_adapter(base)
    for name, parameter in wrong.named_parameters():
        if name.endswith("lora_B"):
            parameter.set_value(parameter * 1.01)
    matrix = build_matrix(reference.signature, base.dims.max_positions)
    report = check(reference, reference_of(base, wrong), matrix)
    assert not any(case.passed for case in report.cases)


def test_the_model_is_left_as_it_was(base: BaseModel) -> None:
    model = with_adapter(base, dropout=0.5)
    model.train()
    before, modes = state_of(model), [layer.training for layer in model.sublayers(True)]
    reference = reference_of(base, model)
    text = Text("text", np.arange(3, 20))
    first, second = (read_text(reference, text).logits for _ in range(2))
    assert (first == second).all(), "dropout was active"
    exact, plain = reference.exact(), reference.without_adapters()
    assert exact is not None and plain is not None
    off = read_text(plain, text).logits
    assert np.abs(off - first).max() > 0.1 * np.abs(first).max()
    read_text(exact, text)
    assert [layer.training for layer in model.sublayers(True)] == modes
    after = state_of(model)
    assert set(after) == set(before)
    assert all((after[name] == before[name]).all() for name in before)
    assert (read_text(reference, text).logits == first).all()


def test_without_its_adapter_it_is_the_base(base: BaseModel, model: LoRAModel) -> None:
    text = Text("text", np.arange(3, 20))
    plain = reference_of(base, model).without_adapters()
    assert plain is not None
    bare = reference_of(base, load_model(base))
    assert (read_text(plain, text).logits == read_text(bare, text).logits).all()
    assert bare.without_adapters() is None


def test_a_merged_model_is_merged_again_afterwards(base: BaseModel, model: LoRAModel) -> None:
    text = Text("text", np.arange(3, 20))
    model.merge()
    reference = reference_of(base, model)
    first = read_text(reference, text).logits
    plain = reference.without_adapters()
    assert plain is not None
    read_text(plain, text)
    assert model.merged
    assert (read_text(reference, text).logits == first).all()


def test_float64_is_nearer_to_the_truth(base: BaseModel, model: LoRAModel) -> None:
    reference = reference_of(base, model)
    exact = reference.exact()
    assert exact is not None and exact.dtype == "float64"
    assert {spec.dtype for spec in exact.signature.past} == {"float64"}
    text = Text("text", np.arange(3, 40))
    rough, fine = read_text(reference, text).logits, read_text(exact, text).logits
    error = np.abs(rough - fine).max() / np.abs(fine).max()
    assert 1e-8 < error < 1e-5


def test_a_large_model_has_no_float64_copy(
    base: BaseModel, model: LoRAModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = reference_of(base, model)
    monkeypatch.setattr(reference_module, "MAX_EXACT_BYTES", 1000)
    assert reference.exact() is None
    monkeypatch.undo()
    monkeypatch.setattr(reference_module, "available_memory", lambda: 1000)
    assert reference.exact() is None


def test_high_positions_read_the_models_own_table(base: BaseModel, model: LoRAModel) -> None:
    """In layer 0 a key depends on its token and its position alone; so a few tokens at the end of the
    table must have the keys that the same tokens have at the end of a full-length text.
    """
    reference = reference_of(base, model)
    positions = base.dims.max_positions
    ids = np.random.default_rng(0).integers(0, base.dims.vocab_size, positions)
    full = read_text(reference, Text("full", ids)).values["present.0.key"]
    end = read_text(reference, Text("end", ids[-5:], start=positions - 5)).values["present.0.key"]
    np.testing.assert_allclose(end, full[:, :, -5:], atol=2e-6)
    shifted = read_text(reference, Text("end", ids[-5:], start=positions - 6))
    assert np.abs(shifted.values["present.0.key"] - end).max() > 1e-2


def test_outputs_can_be_chosen_and_inputs_are_checked(base: BaseModel, model: LoRAModel) -> None:
    reference = reference_of(base, model)
    dims = base.dims
    ids = np.ones((2, 3), np.int64)
    past = {
        spec.name: np.zeros((2, dims.num_kv_heads, 0, dims.head_dim), np.float32)
        for spec in reference.signature.past
    }
    feeds = {
        "input_ids": ids,
        "attention_mask": ids,
        "position_ids": np.arange(3)[None] * ids,
        **past,
    }
    outputs = reference.run(feeds, [LOGITS, "present.1.value"])
    assert {k: v.shape for k, v in outputs.items()} == {
        LOGITS: (2, 3, dims.vocab_size),
        "present.1.value": (2, dims.num_kv_heads, 3, dims.head_dim),
    }
    with pytest.raises(ExecutionError, match="attention_mask"):
        reference.run({**feeds, "attention_mask": ids[:, :2]})


class Third(nn.Layer):
    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        self.taken = x
        return x / 3


class Residual(nn.Layer):
    def __init__(self) -> None:
        super().__init__()
        self.third = Third()

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        return x + self.third(x + x / 3)


def test_in_16_bits_what_modules_take_and_give_is_rounded() -> None:
    model, peaks = Residual(), dict[str, float]()
    x = np.linspace(0.1, 8, 50, dtype=np.float32)
    plain = model(paddle.to_tensor(x)).numpy()
    with rounded_modules(model, "float16", peaks):
        given = model(paddle.to_tensor(x)).numpy()
    taken = model.third.taken.numpy()  # a sum, which no module has given
    for values in (taken, given):
        assert (values == values.astype(np.float16)).all() and values.dtype == np.float32
    assert 1e-5 < np.abs(given - plain).max() < 1e-2
    assert peaks["third"] == pytest.approx(8 * 4 / 3, rel=1e-3)
    model(paddle.to_tensor(x))
    assert (model.third.taken.numpy() != taken).any(), "it is rounded behind the block, too"
