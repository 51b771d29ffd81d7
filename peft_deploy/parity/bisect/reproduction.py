"""A folder that shows a finding on its own, with onnxruntime and numpy alone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from peft_deploy.atomic_folder import AtomicFolder, FolderKind, disk_errors
from peft_deploy.parity.bisect.exposed import ExposedGraph
from peft_deploy.parity.bisect.finding import Finding

if TYPE_CHECKING:
    import onnx_ir as ir

SCRIPT = "run.py"
MODEL = "model.onnx"
WEIGHTS = "model.onnx.data"  # only where the weights do not fit into the model's file
VALUES = "values.npz"
MAX_INLINE_BYTES = (
    1 << 30
)  # of weights in the model's file; protobuf takes 2 GiB, and not a byte more
_KIND = FolderKind("reproduction", SCRIPT)

_TEXT = """from pathlib import Path

import numpy as np
import onnxruntime as ort

here = Path(__file__).parent
values = np.load(here / "values.npz")
session = ort.InferenceSession(here / "model.onnx", providers=["CPUExecutionProvider"])
feeds = {node.name: values[f"input_{i}"] for i, node in enumerate(session.get_inputs())}
(actual,) = session.run(None, feeds)
error = np.where(values["counts"], np.abs(actual - values["expected"]), 0)
place = np.unravel_index(error.argmax(), error.shape)
print(f"at {tuple(map(int, place))}: {actual[place]}, expected {values['expected'][place]}, off by {error.max()}")
"""


def write_reproduction(output: Path, bundle: Path, finding: Finding) -> Path:
    """Writes the suspected operators as a model, their inputs, what they should make of them, and a script.

    Of the bundle's weights, only those of these operators are read.

    Args:
        output: the folder; an older reproduction is replaced.
        bundle: that the finding is from.
        finding: what was found.

    Returns:
        The folder.

    Raises:
        OutputError: it cannot be written, or holds something else.
    """
    model = _part(ExposedGraph(bundle), finding)
    arrays = {f"input_{i}": array for i, array in enumerate(finding.inputs.values())}
    with AtomicFolder(output, _KIND, force=True) as folder:
        with disk_errors(output):
            _save(model, folder.path)
            np.savez(
                folder.path / VALUES, expected=finding.expected, counts=finding.counts, **arrays
            )
        folder.write_text(SCRIPT, f'"""{_first_line(finding)}"""\n\n{_TEXT}')
        folder.commit()
    return output


def _save(model: ir.Model, folder: Path) -> None:
    import onnx_ir as ir

    tensors = [value.const_value for value in model.graph.initializers.values()]
    size = sum(tensor.nbytes for tensor in tensors if tensor is not None)
    beside = WEIGHTS if size > MAX_INLINE_BYTES else None
    ir.save(model, folder / MODEL, external_data=beside)


def _part(graph: ExposedGraph, finding: Finding) -> ir.Model:
    """The suspected operators as a model of their own, with their weights in it."""
    import onnx_ir as ir

    model, wanted = graph.read(), set(finding.nodes)
    whole = model.graph
    values = {v.name: v for node in whole for v in node.outputs}
    values |= {v.name: v for v in whole.inputs}
    kept = [node for node in whole if node.name in wanted]
    weights = [whole.initializers[name] for name in graph.initializers_of(finding.nodes)]
    result = values[finding.value]
    whole.outputs.clear()
    whole.inputs.clear()
    starts = {name: _start(values[name], array) for name, array in finding.inputs.items()}
    for node in list(whole):
        whole.remove(node)
    for node in kept:
        for i, value in enumerate(node.inputs):
            if value is not None and value.name in starts:
                node.replace_input_with(i, starts[value.name])
    for weight in weights:
        name = str(weight.name)
        whole.initializers.pop(name)
        weight.const_value = ir.Tensor(graph.weight(name), name=name)
    part = ir.Graph(
        list(starts.values()),
        [result],
        nodes=kept,
        initializers=weights,
        opset_imports=dict(model.opset_imports),
        name="reproduction",
    )
    return ir.Model(part, ir_version=model.ir_version)


def _start(value: ir.Value, array: npt.NDArray[Any]) -> ir.Value:
    import onnx_ir as ir

    dtype = ir.DataType.from_numpy(array.dtype)
    return ir.Value(name=value.name, type=ir.TensorType(dtype), shape=ir.Shape(array.shape))


def _first_line(finding: Finding) -> str:
    return f"{finding.place[0].upper()}{finding.place[1:]}, which is wrong in a bundle."
