"""``.onnx_adapter`` files: written, read, and run by onnxruntime in a graph with slots."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import peft_made as made
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from peft_made import LAYERS, NAMES, QV, lora_tensors, paddle

from peft_deploy.adapters.formats.adapter import Adapter
from peft_deploy.adapters.formats.onnx_adapter import onnx_tensors, read_onnx_adapter
from peft_deploy.adapters.formats.onnx_file import (
    is_onnx_adapter,
    model_version,
    read_onnx_file,
    write_onnx_adapter,
)
from peft_deploy.adapters.formats.peft import read_peft
from peft_deploy.config import LoRAConfig
from peft_deploy.errors import AdapterError, OutputError
from peft_deploy.weights.lora import LoraPair, lora_delta

V0 = "model.layers.0.self_attn.v_proj"
PRINT = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"


@pytest.fixture
def adapter(tmp_path: Path) -> Adapter:
    ranks = {**QV, V0: 5}
    folder = made.write(tmp_path / "peft", lora_tensors(ranks), rank_pattern={V0: 5})
    return read_peft(folder, NAMES)


def graph_with_slots(W: np.ndarray, rank: int | str = "rank") -> bytes:
    """Y = X·W + (X·A)·B, with A and B empty unless an adapter fills them."""
    inner, out = W.shape
    names = [f"{V0}.lora_{half}.weight" for half in "AB"]
    width = rank if isinstance(rank, int) else 0
    shapes = [(inner, width), (width, out)]
    floats = TensorProto.FLOAT
    nodes = [
        helper.make_node("MatMul", ["X", "W"], ["base"]),
        helper.make_node("MatMul", ["X", names[0]], ["XA"]),
        helper.make_node("MatMul", ["XA", names[1]], ["XAB"]),
        helper.make_node("Add", ["base", "XAB"], ["Y"]),
    ]
    inputs = [
        helper.make_tensor_value_info("X", floats, ["n", inner]),
        helper.make_tensor_value_info(names[0], floats, [inner, rank]),
        helper.make_tensor_value_info(names[1], floats, [rank, out]),
    ]
    weights = [numpy_helper.from_array(W, "W")] + [
        numpy_helper.from_array(np.zeros(shape, np.float32), name)
        for name, shape in zip(names, shapes, strict=True)
    ]
    outputs = [helper.make_tensor_value_info("Y", floats, ["n", out])]
    graph = helper.make_graph(nodes, "g", inputs, outputs, weights)
    opset = helper.make_opsetid("", 17)
    return helper.make_model(graph, opset_imports=[opset], ir_version=8).SerializeToString()


def test_onnxruntime_computes_what_the_adapter_means(tmp_path: Path, adapter: Adapter) -> None:
    generator = np.random.default_rng(6)
    W, X = (generator.standard_normal(s).astype(np.float32) for s in ((8, 4), (3, 8)))
    only = Adapter(adapter.path, adapter.config, {}, {paddle(V0): adapter.pairs[paddle(V0)]})
    file = tmp_path / "a.onnx_adapter"
    write_onnx_adapter(file, onnx_tensors(only, NAMES, "float32"), model_version(PRINT))
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(graph_with_slots(W), options, ["CPUExecutionProvider"])
    lora, run = ort.LoraAdapter(), ort.RunOptions()
    lora.Load(str(file))
    run.add_active_adapter(lora)
    tensors = lora_tensors({**QV, V0: 5})
    wanted = X.astype(np.float64) @ (W + made.delta(tensors, V0, 7 / 5))
    np.testing.assert_allclose(session.run(None, {"X": X}, run)[0], wanted, rtol=1e-5, atol=1e-5)
    bare = session.run(None, {"X": X})[0]
    np.testing.assert_allclose(bare, X @ W, rtol=1e-6, atol=1e-6)
    assert np.abs(bare - wanted).max() > 0.1


def test_products_survive_the_file(tmp_path: Path, adapter: Adapter) -> None:
    file = tmp_path / "a.onnx_adapter"
    write_onnx_adapter(file, onnx_tensors(adapter, NAMES, "float32"), 5)
    again = read_onnx_adapter(file, NAMES, num_layers=LAYERS)
    assert again.pairs.keys() == adapter.pairs.keys()
    for module, pair in adapter.pairs.items():
        np.testing.assert_array_equal(again.pairs[module].A, pair.A)
        assert again.pairs[module].scaling == 1
        np.testing.assert_allclose(
            lora_delta(again.pairs[module]), lora_delta(pair), rtol=1e-6, atol=2e-6
        )
    found = read_onnx_file(file)
    assert (found.model_version, found.adapter_version) == (5, 1)
    assert set(found.tensors) == {f"{m}.lora_{h}.weight" for m in QV for h in "AB"}


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(["float32", "float16", "bfloat16"]),
    st.integers(-6, 6),
    st.integers(1, 4),
    st.integers(0, 1000),
)
def test_powers_of_two_lose_no_bit(
    tmp_path_factory: pytest.TempPathFactory, dtype: str, power: int, rank: int, seed: int
) -> None:
    tensors = lora_tensors({V0: rank}, dtype, seed)
    A, B = (tensors[f"{made.PREFIX}{V0}.lora_{h}.weight"].T for h in "AB")
    adapter = Adapter(Path("a"), LoRAConfig(), {}, {paddle(V0): LoraPair(A, B, 2.0**power)})
    file = tmp_path_factory.mktemp("powers") / "a.onnx_adapter"
    write_onnx_adapter(file, onnx_tensors(adapter, NAMES, dtype), 0)
    (again,) = read_onnx_adapter(file, NAMES).pairs.values()
    assert again.A.dtype == again.B.dtype == A.dtype
    np.testing.assert_array_equal(again.A, A)
    np.testing.assert_array_equal(again.B.astype(np.float64), B.astype(np.float64) * 2.0**power)


def test_transposed_arrays_are_written_as_they_are(tmp_path: Path) -> None:
    # onnxruntime reads their copies only when it writes the file
    generator = np.random.default_rng(1)
    tensors = {
        f"model.layers.{i}.mlp.down_proj.lora_{half}.weight": generator.standard_normal((r, c)).T
        for i in range(64)
        for half, r, c in (("A", 2, 12), ("B", 8, 2))
    }
    found = read_onnx_file(write_onnx_adapter(tmp_path / "a", tensors, 1)).tensors
    assert found.keys() == tensors.keys()
    for name, array in tensors.items():
        np.testing.assert_array_equal(found[name], array)


def test_slots_of_one_rank_are_filled_up(adapter: Adapter) -> None:
    tensors = onnx_tensors(adapter, NAMES, "float32", dict.fromkeys(QV, 6))
    narrow = onnx_tensors(adapter, NAMES, "float32")
    for module in QV:
        A, B = (tensors[f"{module}.lora_{half}.weight"] for half in "AB")
        assert A.shape[1] == B.shape[0] == 6
        a, b = (narrow[f"{module}.lora_{half}.weight"] for half in "AB")
        np.testing.assert_array_equal(A @ B, a @ b)
    with pytest.raises(AdapterError, match="has rank 5, its slot takes 4"):
        onnx_tensors(adapter, NAMES, "float32", dict.fromkeys(QV, 4))


NAMINGS = {
    "olive": "model.layers.0.self_attn.v_proj.lora_{}.weight",
    "genai": "model.layers.0.attn.v_proj.lora_{}.MatMul.weight",
    "renamed": "model.layers.0.attn.v_proj.lora_{}.weight",
    "peft": "base_model.model.model.layers.0.self_attn.v_proj.lora_{}.weight",
}


@pytest.mark.parametrize("form", NAMINGS.values(), ids=list(NAMINGS))
def test_names_of_other_tools(tmp_path: Path, form: str) -> None:
    A, B = np.full((8, 2), 3, np.float32), np.full((2, 4), 5, np.float32)
    file = write_onnx_adapter(tmp_path / "a", {form.format("A"): A, form.format("B"): B}, 1)
    pairs = read_onnx_adapter(file, NAMES).pairs
    assert list(pairs) == [paddle(V0)]
    np.testing.assert_array_equal(pairs[paddle(V0)].A, A)
    np.testing.assert_array_equal(pairs[paddle(V0)].B, B)


def _pair(name: str, **shapes: tuple[int, ...]) -> dict[str, np.ndarray]:
    return {name.format(h): np.ones(s, np.float32) for h, s in shapes.items()}


BAD: list[tuple[dict[str, np.ndarray], str]] = [
    (_pair(NAMINGS["olive"], A=(8, 2)), "one half of the pair"),
    (_pair(NAMINGS["olive"], A=(8, 2), B=(3, 4)), "do not fit"),
    (_pair("model.layers.0.gate.lora_{}.weight", A=(8, 2), B=(2, 4)), "does not have"),
    (_pair("prefix.0.{}", A=(8, 2), B=(2, 4)), "no LoRA"),
    (
        _pair(NAMINGS["olive"], A=(8, 2), B=(2, 4)) | _pair(NAMINGS["genai"], A=(8, 2), B=(2, 4)),
        "once only",
    ),
    ({NAMINGS["olive"].format("A"): np.full((8, 2), np.inf, np.float32)}, "NaN or infinity"),
    ({"x.quant.weight": np.ones((8, 2), np.float32)}, "quantized"),
    ({NAMINGS["olive"].format("A"): np.ones((8, 2), np.int64)}, "cannot be read as LoRA"),
]


@pytest.mark.parametrize(("tensors", "message"), BAD, ids=[message for _, message in BAD])
def test_files_that_are_refused(
    tmp_path: Path, tensors: dict[str, np.ndarray], message: str
) -> None:
    file = write_onnx_adapter(tmp_path / "a", tensors, 1)
    with pytest.raises(AdapterError, match=message) as caught:
        read_onnx_adapter(file, NAMES)
    assert caught.value.exit_code == 3


def test_damaged_files(tmp_path: Path, adapter: Adapter) -> None:
    file = tmp_path / "a.onnx_adapter"
    write_onnx_adapter(file, onnx_tensors(adapter, NAMES, "float32"), 1)
    assert is_onnx_adapter(file)
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(AdapterError, match="is damaged: onnxruntime cannot verify it") as caught:
        read_onnx_file(file)
    assert "onnxruntime_src" not in str(caught.value)
    file.write_bytes(b"nothing at all")
    with pytest.raises(AdapterError, match=r"is not an \.onnx_adapter file"):
        read_onnx_file(file)
    with pytest.raises(AdapterError, match="does not exist"):
        read_onnx_file(tmp_path / "b")
    with pytest.raises(AdapterError, match="is a folder") as caught:
        read_onnx_file(tmp_path)
    assert "adapter convert" in str(caught.value.hint)


LIMITS: list[tuple[dict[str, Any], str, str]] = [
    ({"replacements": {"lm_head.weight": np.ones((8, 11), np.float32)}}, "float32", "whole param"),
    ({"config": LoRAConfig(pissa=True)}, "float32", "PiSSA"),
    (
        {"pairs": {"llama.embed_tokens": LoraPair(np.ones((11, 2)), np.ones((2, 8)), 1.0)}},
        "float32",
        "embed",
    ),
    ({"pairs": {"gpt.q": LoraPair(np.ones((8, 2)), np.ones((2, 8)), 1.0)}}, "float32", "no name"),
    (
        {"pairs": {paddle(V0): LoraPair(np.ones((8, 2)), np.ones((2, 4)), 1e6)}},
        "float16",
        "too large",
    ),
]


@pytest.mark.parametrize(("changes", "dtype", "message"), LIMITS, ids=[m for *_, m in LIMITS])
def test_what_slots_cannot_take(
    adapter: Adapter, changes: dict[str, Any], dtype: str, message: str
) -> None:
    from dataclasses import replace

    with pytest.raises(AdapterError, match=message):
        onnx_tensors(replace(adapter, **changes), NAMES, dtype)


def test_nothing_is_left_where_it_cannot_be_written(tmp_path: Path, adapter: Adapter) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError):
        write_onnx_adapter(
            tmp_path / "file" / "a.onnx_adapter", onnx_tensors(adapter, NAMES, "float32"), 1
        )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "peft"]


def test_versions_of_models() -> None:
    assert model_version(PRINT) == 0x1F86D081
    assert model_version("80000000" + PRINT) == 1  # 0 says nothing
