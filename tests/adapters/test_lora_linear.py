from __future__ import annotations

import math

import numpy as np
import paddle
import pytest
from paddle import nn

from peft_deploy.adapters.arrays import assign, to_array
from peft_deploy.adapters.lora import LoRALinear
from peft_deploy.errors import AdapterError

IN, OUT, R, ALPHA = 16, 8, 4, 6
SCALING = {"plain": ALPHA / R, "rslora": ALPHA / math.sqrt(R), "pissa": 1.0}
# One rounding of values of about 1, and float32's accumulation.
TOLERANCE = {"float64": 1e-13, "float32": 1e-6, "float16": 1e-3, "bfloat16": 8e-3}


def make(rule: str = "plain", seed: int = 0, **options: object) -> LoRALinear:
    paddle.seed(seed)
    flags = {} if rule == "plain" else {rule: True}
    layer = LoRALinear(IN, OUT, r=R, lora_alpha=ALPHA, **flags, **options)
    if rule == "pissa":
        trained = np.random.default_rng(seed).standard_normal((R, OUT)) * 0.4
        layer.lora_B.set_value(layer.lora_B + paddle.to_tensor(trained.astype("float32")))
    else:
        layer.lora_B.set_value(paddle.randn([R, OUT]) * 0.5)
    layer.bias.set_value(paddle.randn([OUT]))
    return layer


def oracle(layer: LoRALinear, x: np.ndarray, scaling: float) -> np.ndarray:
    """The definition, in float64."""
    W = to_array(layer.weight).astype(np.float64)
    A = to_array(layer.lora_A).astype(np.float64)
    B = to_array(layer.lora_B).astype(np.float64)
    return x @ W + to_array(layer.bias).astype(np.float64) + scaling * (x @ A @ B)


@pytest.fixture
def x() -> np.ndarray:
    return np.random.default_rng(7).standard_normal((2, 3, IN)).astype(np.float32)


def run(layer: nn.Layer, x: np.ndarray) -> np.ndarray:
    return layer(paddle.to_tensor(x)).numpy()


@pytest.mark.parametrize("r", [0, -1, 1.5, None, True])
def test_the_rank_has_to_be_a_positive_integer(r: object) -> None:
    with pytest.raises(ValueError, match="Lora rank r should be a positive integer"):
        LoRALinear(IN, OUT, r=r)


def test_forward_shape_and_what_is_trained() -> None:
    layer = LoRALinear(16, 8, r=4, lora_dropout=0.1, lora_alpha=8)
    output = layer(paddle.randn([2, 4, 16]))
    assert output.shape == [2, 4, 8]
    assert not layer.lora_A.stop_gradient
    assert not layer.lora_B.stop_gradient
    assert layer.weight.stop_gradient
    assert not layer.bias.stop_gradient
    assert layer.lora_A.shape == [16, 4]
    assert layer.lora_B.shape == [4, 8]


def test_a_fresh_layer_computes_what_the_linear_layer_did() -> None:
    linear = nn.Linear(IN, OUT)
    x = paddle.randn([5, IN])
    layer = LoRALinear.wrap(linear, r=R, lora_alpha=ALPHA)
    assert (layer(x) == linear(x)).all()
    assert layer.weight is linear.weight
    assert float(layer.lora_A.abs().max()) > 0


def test_a_starts_within_the_bound_of_kaiming() -> None:
    A = LoRALinear(64, OUT, r=32).lora_A.numpy()
    bound = math.sqrt(6 / ((1 + 5) * 64))
    assert 0.9 * bound < np.abs(A).max() <= bound


@pytest.mark.parametrize("rule", SCALING)
def test_unmerged_merged_and_oracle_agree(rule: str, x: np.ndarray) -> None:
    layer = make(rule)
    expected = oracle(layer, x, SCALING[rule])
    plain = x @ to_array(layer.weight) + to_array(layer.bias)
    assert np.abs(expected - plain).max() > 0.5, "the branch has to matter for this test"
    np.testing.assert_allclose(run(layer, x), expected, rtol=1e-5, atol=1e-5)
    layer.merge()
    assert layer.merged
    np.testing.assert_allclose(run(layer, x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rule", SCALING)
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_l8_merging_in_every_type_is_one_rounding_away_from_float64(rule: str, dtype: str) -> None:
    layer = make(rule)
    layer.to(dtype=dtype)
    A, B, W = (to_array(t).astype(np.float64) for t in (layer.lora_A, layer.lora_B, layer.weight))
    before = to_array(layer.weight)
    expected = W + SCALING[rule] * A @ B
    layer.merge()
    merged = to_array(layer.weight)
    assert merged.dtype == before.dtype
    error = np.abs(merged.astype(np.float64) - expected)
    assert (error <= TOLERANCE[dtype] * np.maximum(1, np.abs(expected))).all()
    assert np.abs(expected - W).max() > 0.2


@pytest.mark.parametrize("rule", SCALING)
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_l9_merge_then_unmerge_is_bit_exact(rule: str, dtype: str) -> None:
    layer = make(rule)
    layer.to(dtype=dtype)
    before = to_array(layer.weight).tobytes()
    for _ in range(3):
        layer.merge()
        layer.merge()
        assert to_array(layer.weight).tobytes() != before
        layer.unmerge()
        layer.unmerge()
        assert to_array(layer.weight).tobytes() == before


def test_training_mode_and_evaluation_mode_agree_without_dropout(x: np.ndarray) -> None:
    layer = make()
    layer.train()
    training, weight = run(layer, x), layer.weight.numpy()
    layer.eval()
    np.testing.assert_array_equal(run(layer, x), training)
    np.testing.assert_array_equal(layer.weight.numpy(), weight)


def test_dropout_is_in_the_branch_only(x: np.ndarray) -> None:
    layer = make(lora_dropout=0.5)
    layer.train()
    base = x @ layer.weight.numpy() + layer.bias.numpy()
    assert np.abs(run(layer, x) - run(layer, x)).max() > 0.1
    layer.disable_lora = True
    np.testing.assert_allclose(run(layer, x), base, rtol=1e-5, atol=1e-5)
    layer.disable_lora = False
    layer.eval()
    np.testing.assert_allclose(run(layer, x), oracle(layer, x, SCALING["plain"]), atol=1e-5)


@pytest.mark.parametrize("rule", SCALING)
def test_save_and_load_a_layer(rule: str, x: np.ndarray, tmp_path) -> None:
    layer = make(rule)
    paddle.save(layer.state_dict(), str(tmp_path / "layer.pdparams"))
    other = make(rule, seed=9)
    assert np.abs(run(other, x) - run(layer, x)).max() > 0.1
    other.set_state_dict(paddle.load(str(tmp_path / "layer.pdparams")))
    np.testing.assert_array_equal(run(other, x), run(layer, x))


@pytest.mark.filterwarnings("ignore:Skip loading")
@pytest.mark.parametrize("r", [4, 8])
def test_a_regular_layer_s_weights_can_be_loaded(r: int, x: np.ndarray) -> None:
    regular = nn.Linear(IN, OUT)
    layer = LoRALinear(IN, OUT, r=r, lora_alpha=8)
    layer.set_state_dict(regular.state_dict())
    np.testing.assert_array_equal(run(layer, x), run(regular, x))
    layer.lora_B.set_value(paddle.ones([r, OUT]))
    assert np.abs(run(layer, x) - run(regular, x)).max() > 0.1


@pytest.mark.parametrize("rule", SCALING)
def test_l3_disabling_is_the_original_layer_in_every_state(rule: str, x: np.ndarray) -> None:
    linear = nn.Linear(IN, OUT)
    original = run(linear, x)
    layer = LoRALinear.wrap(
        linear, r=R, lora_alpha=ALPHA, rslora=rule == "rslora", pissa=rule == "pissa"
    )
    layer.lora_B.set_value(layer.lora_B + paddle.randn([R, OUT]))
    tuned = run(layer, x)
    assert np.abs(tuned - original).max() > 0.5
    for prepare in (layer.unmerge, layer.merge):
        prepare()
        layer.disable_lora = True
        np.testing.assert_array_equal(run(layer, x), original)
        layer.unmerge()
        np.testing.assert_array_equal(run(layer, x), original)
        with pytest.raises(AdapterError, match="disabled"):
            layer.merge()
        layer.disable_lora = False
        np.testing.assert_array_equal(run(layer, x), tuned)


def test_pissa_starts_from_the_best_approximation() -> None:
    linear = nn.Linear(IN, OUT)
    W = linear.weight.numpy().astype(np.float64)
    layer = LoRALinear.wrap(linear, r=R, lora_alpha=ALPHA, pissa=True)
    u, s, v = np.linalg.svd(W, full_matrices=False)
    principal = u[:, :R] * s[:R] @ v[:R]
    np.testing.assert_allclose(layer.lora_A.numpy() @ layer.lora_B.numpy(), principal, atol=1e-6)
    np.testing.assert_allclose(layer.weight.numpy(), W - principal, atol=1e-6)
    assert layer.scaling == 1.0


def test_l7_pissa_does_not_start_again_at_the_first_forward(x: np.ndarray) -> None:
    layer = make("pissa")
    A, B, W = layer.lora_A.numpy(), layer.lora_B.numpy(), layer.weight.numpy()
    first = run(layer, x)
    np.testing.assert_array_equal(layer.lora_A.numpy(), A)
    np.testing.assert_array_equal(layer.lora_B.numpy(), B)
    np.testing.assert_array_equal(layer.weight.numpy(), W)
    layer.merge()
    np.testing.assert_allclose(run(layer, x), first, atol=1e-5)


def test_pissa_of_a_rank_that_the_weight_has_not() -> None:
    with pytest.raises(AdapterError, match="at most 8"):
        LoRALinear(IN, OUT, r=9, pissa=True)


def test_lora_plus_is_the_learning_rate_of_b() -> None:
    layer = LoRALinear(IN, OUT, r=R, lora_plus_scale=16.0)
    assert layer.lora_B.optimize_attr["learning_rate"] == 16.0
    assert layer.lora_A.optimize_attr["learning_rate"] == 1.0


def test_a_step_trains_a_and_b_alone(x: np.ndarray) -> None:
    layer = make()
    weight, A, B = layer.weight.numpy(), layer.lora_A.numpy(), layer.lora_B.numpy()
    optimizer = paddle.optimizer.SGD(0.1, parameters=layer.parameters())
    layer(paddle.to_tensor(x)).square().mean().backward()
    optimizer.step()
    np.testing.assert_array_equal(layer.weight.numpy(), weight)
    assert np.abs(layer.lora_A.numpy() - A).max() > 0
    assert np.abs(layer.lora_B.numpy() - B).max() > 0


def test_delta_weight_of_given_matrices() -> None:
    layer = make()
    expected = SCALING["plain"] * layer.lora_A.numpy() @ layer.lora_B.numpy()
    np.testing.assert_allclose(layer.get_delta_weight().numpy(), expected, atol=1e-5)
    A, B = paddle.randn([IN, R]), paddle.randn([R, OUT])
    given = layer.get_delta_weight(A, B).numpy()
    np.testing.assert_allclose(given, SCALING["plain"] * A.numpy() @ B.numpy(), atol=1e-5)


def test_branch_in_another_type_than_the_weight(x: np.ndarray) -> None:
    linear = nn.Linear(IN, OUT)
    layer = LoRALinear.wrap(linear, r=R, lora_alpha=ALPHA, dtype="float64")
    layer.lora_B.set_value(paddle.randn([R, OUT], dtype="float64"))
    output = layer(paddle.to_tensor(x))
    assert output.dtype == paddle.float32
    np.testing.assert_allclose(output.numpy(), oracle(layer, x, SCALING["plain"]), atol=1e-5)


def test_a_sum_that_is_not_finite_leaves_the_layer_unmerged() -> None:
    layer = make()
    layer.to(dtype="float16")
    assign(layer.lora_A, np.full([IN, R], 6e4))
    assign(layer.lora_B, np.full([R, OUT], 6e4))
    before = to_array(layer.weight).tobytes()
    with pytest.raises(AdapterError, match="not finite in float16"):
        layer.merge()
    assert not layer.merged
    assert to_array(layer.weight).tobytes() == before


def test_a_merged_weight_that_was_changed_from_outside_is_noticed() -> None:
    layer = make()
    layer.merge()
    layer.weight.set_value(layer.weight + 1)
    with pytest.raises(AdapterError, match="changed from outside"):
        layer.unmerge()


def test_no_copy_of_the_weight_is_kept_while_it_is_in_place() -> None:
    layer = make()
    layer.merge()
    layer.unmerge()
    layer.weight.set_value(layer.weight + 1)
    np.testing.assert_array_equal(layer.original_weight(), layer.weight.numpy())
    np.testing.assert_array_equal(layer.split_weight(), layer.weight.numpy())


def test_changing_the_type_while_merged(x: np.ndarray) -> None:
    layer = make()
    original = layer.weight.numpy()
    layer.merge()
    layer.to(dtype="bfloat16")
    layer.unmerge()
    expected = original.astype(to_array(layer.weight).dtype)
    np.testing.assert_array_equal(to_array(layer.weight), expected)


def test_positions_of_the_arguments_are_the_reference_s() -> None:
    layer = LoRALinear(IN, OUT, 4, 9, 0.1, False, True, 2.0, False, False, False)
    assert layer.scaling == pytest.approx(9 / math.sqrt(4))
    assert layer.lora_dropout.p == 0.1
    assert layer.lora_B.optimize_attr["learning_rate"] == 2.0


@pytest.mark.parametrize("variant", ["use_mora", "lora_use_mixer"])
def test_variants_are_refused_by_name(variant: str) -> None:
    with pytest.raises(ValueError, match=variant):
        LoRALinear(IN, OUT, r=R, **{variant: True})


def test_a_layer_without_bias_and_its_description() -> None:
    layer = LoRALinear(IN, OUT, r=R, bias_attr=False)
    assert layer.bias is None
    assert "in_features=16, out_features=8, rank=4" in repr(layer)
    assert layer(paddle.randn([1, IN])).shape == [1, OUT]
