"""A folder that shows a finding on its own, with onnxruntime and numpy alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from peft_deploy.atomic_folder import AtomicFolder, FolderKind, disk_errors
from peft_deploy.parity.bisect.exposed import ExposedGraph
from peft_deploy.parity.bisect.finding import Finding

SCRIPT = "run.py"
MODEL = "model.onnx"
VALUES = "values.npz"
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

    Args:
        output: the folder; an older reproduction is replaced.
        bundle: that the finding is from.
        finding: what was found.

    Returns:
        The folder.

    Raises:
        OutputError: it cannot be written, or holds something else.
    """
    import onnx_ir as ir

    model = ExposedGraph(bundle).part(finding.nodes, finding.inputs, finding.value)
    arrays = {f"input_{i}": array for i, array in enumerate(finding.inputs.values())}
    with AtomicFolder(output, _KIND, force=True) as folder:
        with disk_errors(output):
            ir.save(model, folder.path / MODEL)
            np.savez(
                folder.path / VALUES, expected=finding.expected, counts=finding.counts, **arrays
            )
        folder.write_text(SCRIPT, f'"""{_first_line(finding)}"""\n\n{_TEXT}')
        folder.commit()
    return output


def _first_line(finding: Finding) -> str:
    return f"{finding.place[0].upper()}{finding.place[1:]}, which is wrong in a bundle."
