"""What the converter's process hands back."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from peft_deploy.convert.onnx_ir_log import quiet_onnx_ir
from peft_deploy.convert.worker import CONSTANTS_FILE, ENCODER_FOLDER, GRAPH_FILE, NAMES_FILE


@dataclass(frozen=True)
class ConvertedGraph:
    """A graph without weights.

    Args:
        model: the ONNX model as Paddle2ONNX wrote it; weights are dangling inputs of its nodes.
        parameters: dangling name → PaddleNLP's structured parameter name.
        shapes: of all of the model's parameters, by structured name.
        constants: dangling name → tables computed by the stand-in.
        operations: PIR operator name → its uses in program order, each with ``module`` (path) and ``shapes``
            (of its results; -1 for a dimension that changes from call to call, None for no tensor).
        versions: package → version in the converter's process.
        encoder: the graph of the encoder, for a model of two graphs.
    """

    model: ir.Model
    parameters: dict[str, str]
    shapes: dict[str, tuple[int, ...]]
    constants: dict[str, npt.NDArray[np.generic]]
    operations: dict[str, list[dict[str, Any]]]
    versions: dict[str, str]
    encoder: ConvertedGraph | None = None

    @property
    def graphs(self) -> list[ConvertedGraph]:
        """Itself, and the encoder's where there is one."""
        return [self] if self.encoder is None else [self, self.encoder]

    @classmethod
    def read(cls, folder: Path) -> ConvertedGraph:
        """What :func:`peft_deploy.convert.worker.main` left in ``folder``."""
        names = json.loads((folder / NAMES_FILE).read_text("utf-8"))
        with np.load(folder / CONSTANTS_FILE, allow_pickle=False) as archive:
            constants = {key: archive[key] for key in archive.files}
        with quiet_onnx_ir():  # it warns of every dangling name
            model = ir.load(folder / GRAPH_FILE)
        return cls(
            model=model,
            parameters=names["parameters"],
            shapes={name: tuple(shape) for name, shape in names["shapes"].items()},
            constants=constants,
            operations=names["operations"],
            versions=names["versions"],
            encoder=cls.read(encoder) if (encoder := folder / ENCODER_FOLDER).is_dir() else None,
        )
