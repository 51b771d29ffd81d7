"""The traced program as Paddle's own static format: ``model.json``, and ``model.pdiparams`` with its weights."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from peft_deploy.atomic_folder import disk_errors
from peft_deploy.convert.weight_file import Placement, WeightFile
from peft_deploy.convert.worker import CONSTANTS_FILE, ENCODER_FOLDER, NAMES_FILE, PROGRAM_FILE
from peft_deploy.errors import ConversionError, listed
from peft_deploy.weights import Array, TensorInfo
from peft_deploy.weights.pdiparams import record_head

if TYPE_CHECKING:
    from peft_deploy.trace.program import TracedProgram


class ParamsFile(WeightFile):
    """A ``.pdiparams`` file: see :mod:`peft_deploy.weights.pdiparams`.

    Tensors have to be added in the order of their names, because that is how readers tell them apart.
    """

    def ordered(self, names: Iterable[str]) -> list[str]:
        """Paddle's order: the names sorted as text."""
        return sorted(names)

    def begin(self, info: TensorInfo) -> None:
        """Makes a place for a tensor.

        Raises:
            ConversionError: a tensor whose name comes later is in the file already.
            OutputError: the disk is full, or another reason of the operating system's.
        """
        last = next(reversed(self.placements), "")
        if info.name <= last:
            raise ConversionError(
                f"{info.name} cannot follow {last}: Paddle reads the weights in the order of their names",
                hint="rename the parameter; names of ASCII letters, digits, . and _ are safe",
            )
        self._write(record_head(info.dtype, info.shape))
        self.placements[info.name] = Placement(info.dtype, info.shape, self.end, info.nbytes)


@dataclass(frozen=True)
class StaticProgram:
    """A program without weights.

    Args:
        text: Paddle's JSON.
        parameters: structured names of the parameters that it uses.
        shapes: of all of the model's parameters, by structured name.
        constants: name in the program → tables computed by the stand-in.
        operators: operator → how often it appears.
        versions: package → version in the process that traced it.
        encoder: the program of the encoder, for a model of two graphs.
    """

    text: str
    parameters: frozenset[str]
    shapes: Mapping[str, tuple[int, ...]]
    constants: Mapping[str, Array]
    operators: dict[str, int]
    versions: dict[str, str]
    encoder: StaticProgram | None = None

    @property
    def graphs(self) -> list[StaticProgram]:
        """Itself, and the encoder's where there is one."""
        return [self] if self.encoder is None else [self, self.encoder]

    @classmethod
    def of(cls, traced: TracedProgram, shapes: Mapping[str, tuple[int, ...]]) -> StaticProgram:
        """A program that was traced in this process.

        Args:
            traced: under its own names.
            shapes: of all of the model's weights.
        """
        with tempfile.TemporaryDirectory(prefix="peft-deploy-") as folder:
            traced.save(Path(folder) / PROGRAM_FILE)
            text = (Path(folder) / PROGRAM_FILE).read_text("utf-8")
        operations = Counter(op.name() for op in traced.program.global_block().ops)
        return cls(
            text=text,
            parameters=frozenset(traced.parameters),
            shapes=dict(shapes),
            constants=traced.constants,
            operators=dict(operations),
            versions={"paddlepaddle": version("paddlepaddle")},
        )

    @classmethod
    def read(cls, folder: Path) -> StaticProgram:
        """What :func:`peft_deploy.convert.worker.main` left in ``folder``."""
        names = json.loads((folder / NAMES_FILE).read_text("utf-8"))
        with np.load(folder / CONSTANTS_FILE, allow_pickle=False) as archive:
            constants = {key: archive[key] for key in archive.files}
        return cls(
            text=(folder / PROGRAM_FILE).read_text("utf-8"),
            parameters=frozenset(names["parameters"]),
            shapes={name: tuple(shape) for name, shape in names["shapes"].items()},
            constants=constants,
            operators={name: len(uses) for name, uses in names["operations"].items()},
            versions=names["versions"],
            encoder=cls.read(encoder) if (encoder := folder / ENCODER_FOLDER).is_dir() else None,
        )


def write_program(program: StaticProgram, file: WeightFile, path: Path) -> dict[str, int]:
    """Joins a program with its weights.

    Args:
        program: as it was traced.
        file: holds the model's weights; gets the program's tables.
        path: where the program goes, beside the file.

    Returns:
        Operator → how often it appears.

    Raises:
        ConversionError: the program uses a weight that is not in the file, or leaves one unused: every reader would
            then take one tensor for another.
    """
    for name in file.ordered(program.constants):
        file.add(name, program.constants[name])
    wanted = program.parameters | program.constants.keys()
    missing, unused = wanted - file.placements.keys(), file.placements.keys() - wanted
    if missing or unused:
        raise ConversionError(
            "the traced program does not use the model's weights one to one"
            + (f"; not there:\n{listed(missing)}" if missing else "")
            + (f"; not used:\n{listed(unused)}" if unused else "")
        )
    with disk_errors(file.output):
        path.write_text(program.text, "utf-8")
    return program.operators
