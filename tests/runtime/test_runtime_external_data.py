from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import tiny_graph
from onnx import TensorProto, helper

from peft_deploy.errors import BundleError
from peft_deploy.runtime import OnnxRunner, check_external_data
from peft_deploy.runtime.external_data import external_locations


def external(location: str, name: str = "w") -> onnx.TensorProto:
    """A tensor of three floats whose data lies in another file."""
    tensor = TensorProto(name=name, dims=[3], data_type=TensorProto.FLOAT)
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", "0"), ("length", "12")):
        tensor.external_data.add(key=key, value=value)
    return tensor


def adder(tensor: onnx.TensorProto) -> onnx.ModelProto:
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, [3]) for n in "xy")
    node = helper.make_node("Add", ["x", "w"], ["y"])
    return model_of([node], [tensor], x, y)


def model_of(nodes, tensors, *ends: onnx.ValueInfoProto) -> onnx.ModelProto:
    graph = helper.make_graph(nodes, "g", list(ends[:1]), list(ends[1:]), tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def write(path: Path, model: onnx.ModelProto) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(model.SerializeToString())
    return path


def test_weights_beside_the_model_are_found_and_used(tmp_path: Path) -> None:
    np.array([1, 2, 3], "<f4").tofile(tmp_path / "weights.bin")
    path = write(tmp_path / "model.onnx", adder(external("weights.bin")))
    assert check_external_data(path) == {(tmp_path / "weights.bin").resolve()}
    y = OnnxRunner(path).run({"x": np.ones(3, np.float32)})["y"]
    np.testing.assert_array_equal(y, [2, 3, 4])


@pytest.mark.parametrize("way", ["absolute", "parent", "link", "folder link", "drive"])
def test_weights_outside_the_folder_are_refused(tmp_path: Path, way: str) -> None:
    secret = tmp_path / "secret.bin"
    np.array([1, 2, 3], "<f4").tofile(secret)
    folder = tmp_path / "bundle"
    folder.mkdir()
    (folder / "link.bin").symlink_to(secret)
    (folder / "up").symlink_to(tmp_path)
    location = {
        "absolute": str(secret),
        "parent": "../secret.bin",
        "link": "link.bin",
        "folder link": "up/secret.bin",
        "drive": "C:secret.bin",
    }[way]
    path = write(folder / "model.onnx", adder(external(location)))
    with pytest.raises(BundleError, match="outside its folder"):
        OnnxRunner(path)


def test_missing_weights_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "model.onnx", adder(external("gone.bin")))
    with pytest.raises(BundleError, match=r"'gone\.bin', which is not there"):
        OnnxRunner(path)


def test_references_are_found_wherever_a_tensor_can_hide(tmp_path: Path) -> None:
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, [3]) for n in "xy")
    constant = helper.make_node("Constant", [], ["c"], value=external("attribute.bin"))
    sub = helper.make_graph([constant], "sub", [], [y], [external("subgraph.bin")])
    nested = helper.make_node("If", ["x"], ["y"], then_branch=sub, else_branch=sub)
    listed = helper.make_node("Many", ["x"], ["y"], tensors=[external("list.bin")], domain="d")
    graphs = helper.make_node("Many", ["x"], ["y"], graphs=[helper.make_graph([], "e", [], [])])
    graphs.attribute[0].graphs[0].initializer.append(external("graph-list.bin"))
    model = model_of([nested, listed, graphs], [external("plain.bin")], x, y)
    sparse = onnx.SparseTensorProto(
        values=external("sparse-values.bin"), indices=external("sparse-indices.bin")
    )
    model.graph.sparse_initializer.append(sparse)
    function = model.functions.add(name="f", domain="d")
    function.node.append(helper.make_node("Constant", [], ["c"], value=external("function.bin")))
    model.training_info.add().algorithm.initializer.append(external("training.bin"))
    path = write(tmp_path / "model.onnx", model)
    names = (
        "attribute subgraph list graph-list plain sparse-values sparse-indices function training"
    )
    assert external_locations(path) == {f"{name}.bin" for name in names.split()}


def test_a_model_with_everything_inside_refers_to_nothing(
    tmp_path: Path, weights: dict[str, np.ndarray]
) -> None:
    path = write(tmp_path / "model.onnx", tiny_graph.make_model(weights))
    assert check_external_data(path) == set()


def test_every_cut_of_a_model_is_an_error_or_harmless(tmp_path: Path) -> None:
    whole = adder(external("weights.bin")).SerializeToString()
    path = tmp_path / "model.onnx"
    refused = 0
    for length in range(1, len(whole)):
        path.write_bytes(whole[:length])
        try:
            assert external_locations(path) <= {"weights.bin"}
        except BundleError:
            refused += 1
    assert refused > len(whole) // 2
