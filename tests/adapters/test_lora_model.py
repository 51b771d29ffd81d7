from __future__ import annotations

import copy

import numpy as np
import paddle
import pytest
from adapters_tiny import IDS, bits, fill_branches, logits, tiny_llama, tiny_model
from paddle import nn

from peft_deploy.adapters.arrays import to_array
from peft_deploy.adapters.lora import (
    LoRAConfig,
    LoRAConv2D,
    LoRAEmbedding,
    LoRALinear,
    LoRAMergedLinear,
    LoRAModel,
    mark_only_lora_as_trainable,
)
from peft_deploy.errors import AdapterError

TARGETS = ["q_proj", ".*v_proj.*", "mlp.down_proj"]
RULES = {"plain": {}, "rslora": {"rslora": True}, "pissa": {"pissa": True}}


class Net(nn.Layer):
    """A model without a config, with one of each kind of layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 12)
        self.inner = nn.Sequential(
            nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 12, bias_attr=False)
        )
        self.conv = nn.Conv2D(1, 2, 3, padding=1)
        self.norm = nn.LayerNorm(12)

    def forward(self, ids: paddle.Tensor) -> paddle.Tensor:
        x = self.norm(self.inner(self.embed(ids)))
        return self.conv(x.unsqueeze(1))


def config(**options: object) -> LoRAConfig:
    return LoRAConfig(**{"target_modules": TARGETS, "r": 4, "lora_alpha": 6, **options})


def wrap(**options: object) -> LoRAModel:
    model = LoRAModel(tiny_llama(), config(**options))
    fill_branches(model)
    return model


def oracle_merge(base: nn.Layer, tuned: LoRAModel) -> nn.Layer:
    """A copy of the base model with A · B added to its weights in float64."""
    merged = copy.deepcopy(base)
    targets = dict(merged.named_sublayers())
    for name, layer in tuned.model.named_sublayers():
        if isinstance(layer, LoRALinear):
            A, B = layer.lora_A.numpy().astype(np.float64), layer.lora_B.numpy()
            sum_ = layer.split_weight().astype(np.float64) + layer.scaling * (A @ B)
            targets[name].weight.set_value(sum_.astype(np.float32))
    return merged


@pytest.mark.parametrize("rule", RULES)
def test_unmerged_merged_and_oracle_agree(rule: str) -> None:
    base = tiny_llama()
    before = logits(base)
    model = wrap(**RULES[rule])
    tuned = logits(model)
    assert np.abs(tuned - before).max() > 0.1
    np.testing.assert_allclose(tuned, logits(oracle_merge(base, model)), atol=1e-5)
    model.merge()
    assert model.merged
    np.testing.assert_allclose(logits(model), tuned, atol=1e-5)


def test_both_orders_of_the_arguments() -> None:
    for arguments in ((tiny_llama(), config()), (config(), tiny_llama())):
        model = LoRAModel(*arguments)
        assert sum(isinstance(layer, LoRALinear) for layer in model.sublayers()) == 6
    with pytest.raises(TypeError, match="a str"):
        LoRAModel(tiny_llama(), "q_proj")


def test_l1_nothing_matches() -> None:
    model = tiny_llama()
    before = bits(model)
    with pytest.raises(ValueError, match="'query_proj'") as caught:
        LoRAModel(model, config(target_modules=["query_proj", "value_proj"]))
    assert "q_proj" in caught.value.hint
    assert bits(model) == before


def test_names_and_expressions_find_the_same_layers() -> None:
    by_name = LoRAModel(tiny_llama(), config(target_modules=["q_proj", "v_proj"]))
    by_regex = LoRAModel(tiny_llama(), config(target_modules=r".*self_attn\.(q|v)_proj"))
    assert list(by_name.get_trainable_state_dict()) == list(by_regex.get_trainable_state_dict())
    assert len(by_name.get_trainable_state_dict()) == 8


def test_no_targets_wrap_nothing() -> None:
    model = LoRAModel(tiny_llama(), LoRAConfig(trainable_modules=["lm_head"]))
    assert list(model.get_trainable_state_dict()) == ["lm_head.weight"]


def test_duplicate_patterns_wrap_once() -> None:
    model = LoRAModel(tiny_llama(), config(target_modules=["q_proj", ".*q_proj.*"]))
    assert len(model.get_trainable_state_dict()) == 4


@pytest.mark.parametrize("target", [".*self_attn", ".*norm.*", "input_layernorm"])
def test_a_target_that_lora_does_not_support(target: str) -> None:
    model = tiny_llama()
    before = bits(model)
    with pytest.raises(ValueError, match="LoRA strategy only supports"):
        LoRAModel(model, config(target_modules=["q_proj", target], pissa=True))
    assert bits(model) == before
    assert not any(isinstance(layer, LoRALinear) for layer in model.sublayers())


def test_a_wrapped_model_cannot_be_wrapped_again() -> None:
    model = wrap()
    expected = logits(model)
    with pytest.raises(AdapterError, match="already"):
        LoRAModel(model, config())
    with pytest.raises(AdapterError, match="already has LoRA layers"):
        LoRAModel(model.model, config(target_modules="k_proj"))
    np.testing.assert_array_equal(logits(model), expected)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("state", ["unmerged", "merged", "disabled", "merged, disabled"])
def test_l5_the_original_model_comes_back_to_the_bit(rule: str, state: str) -> None:
    base = tiny_llama()
    base.lm_head.weight.stop_gradient = True
    before, expected = bits(base), logits(base)
    layers = [id(layer) for layer in base.sublayers()]
    frozen = [p.stop_gradient for p in base.parameters()]
    model = LoRAModel(
        base, config(**RULES[rule], trainable_modules=["norm"], trainable_bias="all")
    )
    fill_branches(model)
    if "merged" in state:
        model.merge()
    if "disabled" in state:
        model.disable_lora()
    restored = model.restore_original_model()
    assert restored is base
    assert [id(layer) for layer in base.sublayers()] == layers
    assert bits(base) == before
    assert [p.stop_gradient for p in base.parameters()] == frozen
    np.testing.assert_array_equal(logits(base), expected)
    with pytest.raises(AdapterError, match="restore_original_model"):
        model.merge()


def test_l6_no_bias_appears() -> None:
    net = nn.Sequential(nn.Linear(4, 3, bias_attr=False), nn.Linear(3, 2))
    names = list(net.state_dict())
    model = LoRAModel(net, LoRAConfig(target_modules=["0", "1"], r=2))
    assert "0.bias" not in model.model.state_dict()
    assert list(model.restore_original_model().state_dict()) == names == list(net.state_dict())
    assert net[0].bias is None


@pytest.mark.parametrize("name", ["bert", "gpt", "qwen2", "bloom"])
def test_other_families_wrap_and_come_back(name: str) -> None:
    base = tiny_model(name)
    expected = logits(base)
    target = {"bert": ["q_proj", "linear1"], "bloom": ["query_key_value", "dense"]}
    model = LoRAModel(base, config(target_modules=target.get(name, ["q_proj", "v_proj"])))
    fill_branches(model)
    tuned = logits(model)
    assert np.abs(tuned - expected).max() > 0.05
    model.merge()
    np.testing.assert_allclose(logits(model), tuned, atol=1e-5)
    np.testing.assert_array_equal(logits(model.restore_original_model()), expected)


@pytest.mark.parametrize("rule", RULES)
def test_l3_disable_means_the_base_model_in_every_state(rule: str) -> None:
    base = tiny_llama()
    expected = logits(base)
    model = LoRAModel(base, config(**RULES[rule], trainable_modules=["llama.norm"]))
    fill_branches(model)
    tuned = logits(model)
    model.merge()
    model.disable_lora()
    np.testing.assert_array_equal(logits(model), expected)
    model.unmerge()
    model.disable_lora()
    np.testing.assert_array_equal(logits(model), expected)
    with pytest.raises(AdapterError, match="disabled"):
        model.merge()
    np.testing.assert_array_equal(logits(model), expected)
    model.enable_lora()
    np.testing.assert_array_equal(logits(model), tuned)


def test_l9_unmerging_a_model_is_bit_exact() -> None:
    model = wrap()
    before = bits(model.model)
    model.merge()
    assert bits(model.model) != before
    model.unmerge()
    assert bits(model.model) == before


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_l8_merging_a_16_bit_model_on_the_cpu(dtype: str) -> None:
    base = tiny_llama()
    base.to(dtype=dtype)
    model = LoRAModel(base, config(dtype=dtype))
    fill_branches(model)
    layer = next(layer for layer in model.sublayers() if isinstance(layer, LoRALinear))
    W, A, B = (to_array(t).astype(np.float64) for t in (layer.weight, layer.lora_A, layer.lora_B))
    before = bits(model.model)
    model.merge()
    step = 2.0**-11 if dtype == "float16" else 2.0**-8
    expected = W + 1.5 * A @ B
    error = np.abs(to_array(layer.weight).astype(np.float64) - expected)
    assert (error <= step * np.abs(expected) + 1e-6).all()
    model.unmerge()
    assert bits(model.model) == before


def test_merging_all_layers_or_none() -> None:
    model = wrap()
    layers = [layer for layer in model.sublayers() if isinstance(layer, LoRALinear)]
    layers[-1].lora_B.set_value(np.full(layers[-1].lora_B.shape, np.inf, np.float32))
    before = bits(model.model)
    with pytest.raises(AdapterError, match=r"layers\.1\.mlp\.down_proj"):
        model.merge()
    assert bits(model.model) == before
    assert not model.merged


def test_a_shared_weight_is_not_merged() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    net[1].weight = net[0].weight
    model = LoRAModel(net, LoRAConfig(target_modules=["0"], r=2))
    fill_branches(model)
    with pytest.raises(AdapterError, match=r"0\.weight = 1\.weight"):
        model.merge()


def test_a_module_that_hangs_in_two_places_is_adapted_in_both() -> None:
    linear = nn.Linear(4, 4)
    net = nn.Sequential(linear, nn.ReLU(), linear)
    model = LoRAModel(net, LoRAConfig(target_modules=["0"], r=2))
    assert net[0] is net[2]
    assert isinstance(net[2], LoRALinear)
    model.restore_original_model()
    assert net[0] is net[2] is linear


def trainable(model: LoRAModel) -> set[str]:
    return {name for name, p in model.model.named_parameters() if not p.stop_gradient}


@pytest.mark.parametrize("bias", [None, "lora", "all"])
def test_what_is_trained_with_each_kind_of_bias(bias: str | None) -> None:
    base = tiny_model("bert")
    options = {"target_modules": [".*q_proj.*", ".*v_proj.*"], "trainable_bias": bias}
    model = LoRAModel(base, config(**options, trainable_modules=["classifier"]))
    names = [name for name, _ in model.model.named_parameters()]
    expected = {n for n in names if "lora_" in n or n.startswith("classifier.")}
    if bias == "lora":
        expected |= {n for n in names if n.endswith(("q_proj.bias", "v_proj.bias"))}
    elif bias == "all":
        expected |= {n for n in names if n.endswith(".bias")}
    assert trainable(model) == expected
    assert set(model.get_trainable_state_dict()) == expected
    fill_branches(model)
    model.train()
    training = logits(model)
    model.eval()
    np.testing.assert_array_equal(logits(model), training)


@pytest.mark.parametrize(
    ("pattern", "count"),
    [
        ("lm_head", 1),
        ("lm_head.weight", 1),
        (".*layernorm.*", 4),
        (r".*layers\.0\..*norm", 2),
        ("llama.norm", 1),
        ("mlp", 6),
    ],
)
def test_trainable_modules_name_modules_or_parameters(pattern: str, count: int) -> None:
    model = LoRAModel(tiny_llama(), config(target_modules=["q_proj"], trainable_modules=[pattern]))
    extra = {name for name in trainable(model) if "lora_" not in name}
    assert len(extra) == count
    single = LoRAModel(tiny_llama(), config(target_modules="q_proj", trainable_modules=pattern))
    assert trainable(single) == trainable(model)


def test_trainable_modules_that_match_nothing() -> None:
    model = tiny_llama()
    with pytest.raises(ValueError, match="trainable_modules: 'lm_haed'") as caught:
        LoRAModel(model, config(trainable_modules=["lm_haed"]))
    assert "lm_head" in caught.value.hint
    assert not any(isinstance(layer, LoRALinear) for layer in model.sublayers())


def test_pissa_cannot_train_a_weight_that_it_has_split() -> None:
    with pytest.raises(ValueError, match="PiSSA has split"):
        LoRAModel(tiny_llama(), config(pissa=True, trainable_modules=["q_proj"]))


def test_a_trained_weight_under_an_adapter() -> None:
    model = wrap(target_modules=["q_proj"], trainable_modules=["q_proj"])
    expected = {k: t.numpy() for k, t in model.get_trainable_state_dict().items()}
    assert "llama.layers.0.self_attn.q_proj.weight" in expected
    tuned = logits(model)
    model.merge()
    np.testing.assert_allclose(logits(model), tuned, atol=1e-5)
    for change in (lambda: None, model.disable_lora):
        change()
        state = model.get_trainable_state_dict()
        assert state.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_array_equal(state[name].numpy(), value)
    np.testing.assert_array_equal(logits(model), logits(tiny_llama()))


def test_marking_as_a_function_and_as_a_method() -> None:
    model = wrap()
    expected = trainable(model)
    for mark in (lambda: mark_only_lora_as_trainable(model), model.mark_only_lora_as_trainable):
        for parameter in model.parameters():
            parameter.stop_gradient = False
        mark()
        assert trainable(model) == expected
    bare = nn.Sequential(nn.Linear(4, 4), LoRALinear(4, 4, r=2))
    mark_only_lora_as_trainable(bare, "lora")
    trained = {name for name, p in bare.named_parameters() if not p.stop_gradient}
    assert trained == {"1.lora_A", "1.lora_B", "1.bias"}


@pytest.mark.filterwarnings("ignore")
def test_training_changes_the_adapter_and_nothing_else() -> None:
    model = wrap(trainable_modules=["llama.norm"])
    model.train()
    before = {name: p.numpy() for name, p in model.model.named_parameters()}
    optimizer = paddle.optimizer.AdamW(0.05, parameters=model.parameters())
    loss = model(paddle.to_tensor(IDS), labels=paddle.to_tensor(IDS))[0]
    loss.backward()
    optimizer.step()
    changed = {n for n, p in model.model.named_parameters() if (p.numpy() != before[n]).any()}
    assert changed == set(model.get_trainable_state_dict()) == trainable(model)


@pytest.mark.filterwarnings("ignore")
def test_generate_and_config_are_the_model_s() -> None:
    model = wrap()
    assert model.config is model.model.config
    inputs = {"input_ids": paddle.to_tensor(IDS), "attention_mask": paddle.ones([2, 5], "int64")}
    ids, _ = model.generate(**inputs, max_new_tokens=3)
    assert ids.shape == [2, 3]
    assert ids[:, 0].tolist() == logits(model)[:, -1].argmax(-1).tolist()
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = model.no_such_thing


def test_modes_return_the_model() -> None:
    model = wrap(lora_dropout=0.5)
    assert model.train() is model
    assert all(layer.training for layer in model.sublayers())
    assert model.eval() is model
    assert not any(layer.training for layer in model.sublayers())


def test_merge_weights_warns_and_follows_the_mode() -> None:
    with pytest.warns(DeprecationWarning, match="merge_weights"):
        model = wrap(merge_weights=True)
    model.train()
    tuned = logits(model)
    model.eval()
    assert model.merged
    np.testing.assert_allclose(logits(model), tuned, atol=1e-5)
    model.train()
    assert not model.merged
    model.disable_lora()
    model.eval()
    assert not model.merged


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("merged", [False, True])
def test_a_deep_copy_is_independent(rule: str, merged: bool) -> None:
    model = wrap(**RULES[rule], trainable_modules=["llama.norm"])
    base = logits(tiny_llama())
    if merged:
        model.merge()
    expected = logits(model)
    other = copy.deepcopy(model)
    np.testing.assert_array_equal(logits(other), expected)
    fill_branches(other, seed=5)
    other.unmerge()
    assert np.abs(logits(other) - expected).max() > 0.05
    np.testing.assert_array_equal(logits(model), expected)
    np.testing.assert_array_equal(logits(other.restore_original_model()), base)
    np.testing.assert_array_equal(logits(model), expected)
    np.testing.assert_array_equal(logits(model.restore_original_model()), base)


def test_printed_counts(capsys: pytest.CaptureFixture[str]) -> None:
    model = LoRAModel(
        nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 30)), LoRAConfig(target_modules="0", r=2)
    )
    assert model.print_trainable_parameters() is None
    assert capsys.readouterr().out == (
        "Frozen parameters: 4.40e+02 || Trainable parameters:4.00e+01 || "
        "Total parameters:4.80e+02|| Trainable:8.33%\n"
    )


def test_any_layer_without_a_config() -> None:
    paddle.seed(3)
    net = Net()
    net.eval()
    ids = paddle.to_tensor([[1, 5, 9, 2]])
    before = net(ids).numpy()
    model = LoRAModel(net, LoRAConfig(target_modules=["embed", "inner.0", "2", "conv"], r=3))
    kinds = {type(layer) for layer in model.sublayers()}
    assert {LoRALinear, LoRAConv2D, LoRAEmbedding} <= kinds
    np.testing.assert_array_equal(model(ids).numpy(), before)
    fill_branches(model)
    tuned = model(ids).numpy()
    assert np.abs(tuned - before).max() > 0.1
    model.merge()
    np.testing.assert_allclose(model(ids).numpy(), tuned, atol=1e-5)
    np.testing.assert_array_equal(model.restore_original_model()(ids).numpy(), before)


def test_fused_targets() -> None:
    base = tiny_model("bloom")
    expected = logits(base)
    model = LoRAModel(
        base,
        config(
            target_modules=["query_key_value", "dense_h_to_4h"],
            enable_lora_list=[[True, False, True], None],
            head_dim=8,
        ),
    )
    kinds = [type(layer) for layer in model.sublayers()]
    assert kinds.count(LoRAMergedLinear) == kinds.count(LoRALinear) == 2
    fill_branches(model)
    tuned = logits(model)
    assert np.abs(tuned - expected).max() > 0.05
    model.merge()
    np.testing.assert_allclose(logits(model), tuned, atol=1e-5)


@pytest.mark.parametrize("option", ["rslora", "pissa"])
@pytest.mark.parametrize("kind", ["conv", "fused"])
def test_scaling_that_the_reference_ignores_is_refused(option: str, kind: str) -> None:
    options: dict = {"target_modules": "conv"}
    if kind == "fused":
        options = {"target_modules": "inner.0", "enable_lora_list": [True, False], "head_dim": 4}
    with pytest.raises(ValueError, match=option):
        LoRAModel(Net(), LoRAConfig(r=2, **{option: True}, **options))


class Doubled(nn.Linear):
    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        return 2 * super().forward(x)


def test_a_layer_with_a_forward_of_its_own_is_refused() -> None:
    with pytest.raises(ValueError, match="Doubled is a Linear with a forward of its own"):
        LoRAModel(nn.Sequential(Doubled(4, 4)), LoRAConfig(target_modules="0"))
    patched = nn.Sequential(nn.Linear(4, 4))
    patched[0].forward = lambda x: x
    with pytest.raises(ValueError, match="forward of its own"):
        LoRAModel(patched, LoRAConfig(target_modules="0"))


def test_hooks_of_a_layer_come_along() -> None:
    net, seen = nn.Sequential(nn.Linear(4, 4)), []
    net[0].register_forward_post_hook(lambda layer, inputs, output: seen.append(type(layer)))
    LoRAModel(net, LoRAConfig(target_modules="0"))(paddle.randn([1, 4]))
    assert seen == [LoRALinear]


def test_the_configuration_given_is_not_changed() -> None:
    given = config()
    model = LoRAModel(tiny_llama(), given)
    assert given.dtype is None
    assert model.lora_config.dtype == "float32"
    assert model.lora_config.tensor_parallel_degree == model.config.tensor_parallel_degree
    assert isinstance(model.lora_config, LoRAConfig)
