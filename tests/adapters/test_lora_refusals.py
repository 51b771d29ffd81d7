"""What LoRA refuses by name, and that there is one way to merge whatever the path to it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from adapters_tiny import fill_branches, tiny_llama
from paddle import nn
from paddle.nn.initializer import Constant

from peft_deploy.adapters import read_adapter
from peft_deploy.adapters.arrays import to_array
from peft_deploy.adapters.lora import LoRAConfig, LoRAModel
from peft_deploy.errors import AdapterError
from peft_deploy.weights.source import Array, TensorInfo

TARGETS = ["q_proj", ".*v_proj.*", "mlp.down_proj"]
RULES = {"plain": {}, "rslora": {"rslora": True}, "pissa": {"pissa": True}}
SPACING = {"float16": 2.0**-10, "bfloat16": 2.0**-7}


class InMemory:
    """A base model's tensors."""

    def __init__(self, tensors: dict[str, Array]) -> None:
        self.tensors = tensors

    def names(self) -> list[str]:
        return list(self.tensors)

    def info(self, name: str) -> TensorInfo:
        return TensorInfo(name, self.tensors[name].dtype.name, self.tensors[name].shape)

    def read(self, name: str) -> Array:
        return self.tensors[name]


class QuantizationLinear(nn.Layer):
    """What a quantized base model has in place of a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.quant_weight = self.create_parameter([4, 4])


def test_l11_a_quantized_layer_is_refused_by_name() -> None:
    net = nn.Sequential(QuantizationLinear(), nn.Linear(4, 4))
    with pytest.raises(ValueError, match="0 is a QuantizationLinear"):
        LoRAModel(net, LoRAConfig(r=2, target_modules=["0", "1"]))
    assert type(net[1]) is nn.Linear


def test_l11_an_integer_weight_is_refused_by_name() -> None:
    linear = nn.Linear(4, 4)
    linear.weight = linear.create_parameter([4, 4], dtype="int8", default_initializer=Constant(1))
    with pytest.raises(ValueError, match="int8"):
        LoRAModel(nn.Sequential(linear), LoRAConfig(r=2, target_modules=["0"]))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("rule", RULES)
def test_l10_every_way_to_merge_gives_the_same_bits(rule: str, dtype: str, tmp_path: Path) -> None:
    """Merging in memory, and merging the files, tensor by tensor."""
    base = tiny_llama()
    base.to(dtype=dtype)
    before = {name: to_array(p) for name, p in base.named_parameters()}
    model = LoRAModel(
        base, LoRAConfig(r=4, lora_alpha=6, target_modules=TARGETS, dtype=dtype, **RULES[rule])
    )
    fill_branches(model)
    model.save_pretrained(tmp_path)
    model.merge()
    merged = read_adapter(tmp_path).merge_into(InMemory(before))
    changed = [name for name in before if merged.read(name).tobytes() != before[name].tobytes()]
    assert len(changed) == 6  # three layers of two blocks
    own = {name: to_array(p) for name, p in model.model.named_parameters()}
    for name in changed:
        far = np.abs(own[name].astype(np.float64) - before[name].astype(np.float64)).max()
        assert far > 0.1
        assert merged.read(name).dtype == own[name].dtype
        if rule == "pissa" and dtype != "float32":
            # what PiSSA leaves of a weight is itself rounded where the model holds it
            slack = SPACING[dtype] * np.abs(own[name].astype(np.float64)).max()
            np.testing.assert_allclose(
                merged.read(name).astype(np.float64), own[name].astype(np.float64), atol=slack
            )
        else:
            np.testing.assert_array_equal(merged.read(name), own[name])


@pytest.mark.parametrize("name", ["get_lora_model", "add_lora_split_mapping", "save_to_aistudio"])
def test_methods_of_the_reference_that_are_not_there(name: str) -> None:
    model = LoRAModel(tiny_llama(), LoRAConfig(target_modules=TARGETS))
    with pytest.raises(AdapterError, match=f"LoRAModel.{name} of paddlenlp.peft") as caught:
        getattr(model, name)
    assert caught.value.hint


def test_the_file_format_of_lora_ga() -> None:
    model = LoRAModel(tiny_llama(), LoRAConfig(target_modules=TARGETS))
    with pytest.raises(AdapterError, match="LoRA-GA"):
        model.get_trainable_state_dict(concat_init_lora=True)
