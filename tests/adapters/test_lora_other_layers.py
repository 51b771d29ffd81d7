from __future__ import annotations

import numpy as np
import paddle
import pytest
from paddle import nn

from peft_deploy.adapters.arrays import to_array
from peft_deploy.adapters.lora import LoRAConv2D, LoRAEmbedding, LoRALayer, LoRAMergedLinear

R, ALPHA = 3, 5
SCALING = ALPHA / R
HEADS, HEAD_DIM, INPUTS = 2, 4, 10

CONVOLUTIONS = {
    "plain": {},
    "one by one": {"kernel_size": 1},
    "stride": {"stride": 2},
    "padding": {"padding": [1, 2]},
    "same": {"padding": "SAME"},
    "dilation": {"dilation": 2, "padding": 1},
    "groups": {"groups": 2},
    "depthwise": {"groups": 4},
    "groups, stride, dilation": {"groups": 2, "stride": [2, 1], "dilation": [1, 2], "padding": 2},
    "reflect": {"padding": 1, "padding_mode": "reflect"},
    "circular, dilation": {"padding": 2, "padding_mode": "circular", "dilation": 2},
    "oblong": {"kernel_size": (2, 3)},
    "no bias": {"bias_attr": False},
}


def fill(layer: LoRALayer) -> LoRALayer:
    for matrix in (layer.lora_A, layer.lora_B):
        matrix.set_value(paddle.randn(matrix.shape, matrix.dtype) * 0.5)
    return layer


def conv(**options: object) -> LoRAConv2D:
    options = {"kernel_size": 3, **options}
    return fill(LoRAConv2D(4, 8, r=R, lora_alpha=ALPHA, **options))


def fused(enable: list[bool], **options: object) -> LoRAMergedLinear:
    outputs = HEADS * len(enable) * HEAD_DIM
    return fill(
        LoRAMergedLinear(
            INPUTS, outputs, HEAD_DIM, r=R, lora_alpha=ALPHA, enable_lora=enable, **options
        )
    )


def fused_delta(layer: LoRAMergedLinear) -> np.ndarray:
    """The definition, head by head and part by part, in float64."""
    A, B = to_array(layer.lora_A).astype(np.float64), to_array(layer.lora_B).astype(np.float64)
    parts, n = len(layer.enable_lora), sum(layer.enable_lora)
    delta = np.zeros((INPUTS, HEADS * parts * HEAD_DIM))
    for head in range(HEADS):
        k = 0
        for part, enabled in enumerate(layer.enable_lora):
            if not enabled:
                continue
            block = A[:, k * R : (k + 1) * R] @ B[:, (head * n + k) * HEAD_DIM :][:, :HEAD_DIM]
            column = (head * parts + part) * HEAD_DIM
            delta[:, column : column + HEAD_DIM] = SCALING * block
            k += 1
    return delta


def check(layer: LoRALayer, x: paddle.Tensor, delta: np.ndarray, apply) -> None:
    """Unmerged, merged and the oracle agree; the branch matters; merging can be undone to the bit."""
    weight = layer.weight.numpy()
    expected, base = apply(weight.astype(np.float64) + delta), apply(weight.astype(np.float64))
    assert np.abs(expected - base).max() > 0.3
    np.testing.assert_allclose(layer(x).numpy(), expected, atol=2e-5)
    np.testing.assert_allclose(layer.get_delta_weight().numpy(), delta, atol=1e-5)
    layer.disable_lora = True
    np.testing.assert_allclose(layer(x).numpy(), base, atol=2e-5)
    layer.disable_lora = False
    layer.merge()
    np.testing.assert_allclose(layer.weight.numpy(), weight + delta, atol=1e-5)
    np.testing.assert_allclose(layer(x).numpy(), expected, atol=2e-5)
    layer.unmerge()
    assert layer.weight.numpy().tobytes() == weight.tobytes()


@pytest.mark.parametrize(
    "enable",
    [[True, False, True], [True, True, True], [False, True], [True], [False, False, True]],
)
@pytest.mark.parametrize("shape", [(5,), (2, 5), (2, 1, 5)])
def test_fused_projection(enable: list[bool], shape: tuple[int, ...]) -> None:
    layer = fused(enable)
    layer.train()
    x = paddle.randn([*shape, INPUTS])
    bias = layer.bias.numpy()
    check(layer, x, fused_delta(layer), lambda W: x.numpy() @ W + bias)


def test_fused_projection_leaves_the_other_parts_alone() -> None:
    layer = fused([True, False, True])
    delta = layer.get_delta_weight().numpy().reshape(INPUTS, HEADS, 3, HEAD_DIM)
    assert not delta[:, :, 1].any()
    assert (np.abs(delta[:, :, [0, 2]]).max(axis=(0, 3)) > 0.1).all()


def test_fused_projection_merges_by_mode() -> None:
    layer = fused([True, False])
    layer.train()
    assert not layer.merged
    assert layer.eval() is layer
    assert layer.merged
    layer.train()
    assert not layer.merged
    other = fused([True, False], merge_weights=False)
    assert not other.eval().merged


def test_fused_projection_state_can_be_saved_and_loaded(tmp_path) -> None:
    layer, other = fused([True, False]), fused([True, False])
    x = paddle.randn([2, 4, INPUTS])
    paddle.save(layer.state_dict(), str(tmp_path / "x"))
    other.set_state_dict(paddle.load(str(tmp_path / "x")))
    np.testing.assert_array_equal(other(x).numpy(), layer(x).numpy())


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"enable_lora": [1, 0]}, TypeError),
        ({"enable_lora": True}, TypeError),
        ({"enable_lora": []}, TypeError),
        ({"enable_lora": [False, False]}, ValueError),
        ({"enable_lora": [True] * 5}, ValueError),
        ({"enable_lora": [True, False], "head_dim": 3}, ValueError),
        ({"enable_lora": [True, False], "r": 0}, ValueError),
    ],
)
def test_fused_projection_refuses(options: dict, error: type) -> None:
    with pytest.raises(error):
        LoRAMergedLinear(
            **{"in_features": 4, "out_features": 16, "head_dim": 4, "r": 2, **options}
        )


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolution(name: str) -> None:
    layer = conv(**CONVOLUTIONS[name])
    x = paddle.randn([2, 4, 9, 8])
    A, B = layer.lora_A.numpy().astype(np.float64), layer.lora_B.numpy().astype(np.float64)
    delta = SCALING * np.einsum("or,rikl->oikl", B[:, :, 0, 0], A)
    plain = nn.Conv2D(4, 8, **{"kernel_size": 3, **CONVOLUTIONS[name]})
    if plain.bias is not None:
        plain.bias.set_value(layer.bias)

    def apply(W: np.ndarray) -> np.ndarray:
        plain.weight.set_value(W.astype(np.float32))
        return plain(x).numpy()

    check(layer, x, delta, apply)


def test_convolution_freezes_its_weight_and_bias() -> None:
    layer = conv()
    assert layer.weight.stop_gradient
    assert layer.bias.stop_gradient
    assert not layer.lora_A.stop_gradient
    layer(paddle.randn([1, 4, 5, 5])).sum().backward()
    assert layer.lora_A.grad is not None
    assert layer.weight.grad is None
    assert "rank=3" in repr(layer)


@pytest.mark.parametrize("padding_idx", [None, 0, 4, -1])
def test_embedding(padding_idx: int | None) -> None:
    layer = LoRAEmbedding(7, 6, r=R, lora_alpha=ALPHA, padding_idx=padding_idx)
    fill(layer)
    ids = paddle.to_tensor([[0, 1, 4], [6, 2, 0]])
    delta = SCALING * layer.lora_A.numpy().astype(np.float64) @ layer.lora_B.numpy()
    if padding_idx is not None:
        delta[padding_idx] = 0
    check(layer, ids, delta, lambda W: W[ids.numpy()])


def test_embedding_trains_its_branch() -> None:
    layer = fill(LoRAEmbedding(7, 6, r=R, rslora=True, lora_plus_scale=4.0))
    assert layer.scaling == pytest.approx(1 / np.sqrt(R))
    assert layer.lora_B.optimize_attr["learning_rate"] == 4.0
    layer(paddle.to_tensor([1, 1, 2])).sum().backward()
    assert layer.weight.grad is None
    touched = np.abs(layer.lora_A.grad.numpy()).max(axis=1) > 0
    np.testing.assert_array_equal(np.flatnonzero(touched), [1, 2])


def test_embedding_with_max_norm_is_refused() -> None:
    with pytest.raises(ValueError, match="max_norm"):
        LoRAEmbedding(7, 6, r=R, max_norm=1.0)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("kind", ["fused", "conv", "embedding"])
def test_l8_l9_merging_in_16_bits_can_be_undone_to_the_bit(kind: str, dtype: str) -> None:
    if kind == "fused":
        layer: LoRALayer = fused([True, False], merge_weights=False)
    elif kind == "conv":
        layer = conv(groups=2)
    else:
        layer = fill(LoRAEmbedding(7, 6, r=R, lora_alpha=ALPHA))
    layer.to(dtype=dtype)
    before = to_array(layer.weight)
    delta = layer.get_delta_weight().astype("float32").numpy()
    layer.merge()
    after = to_array(layer.weight).astype(np.float32)
    np.testing.assert_allclose(after, before.astype(np.float32) + delta, atol=3e-2)
    assert np.abs(delta).max() > 0.2
    layer.unmerge()
    assert to_array(layer.weight).tobytes() == before.tobytes()
