"""Scales of quantized weights that are chosen by what a model computes while it reads a text."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from peft_deploy.adapters.formats.peft_writer import ArraySource
from peft_deploy.bundle import Manifest
from peft_deploy.bundle.folder import sha256
from peft_deploy.config.export import BUILTIN, ExportOptions
from peft_deploy.config.precision import CALIBRATED_BITS, Precision
from peft_deploy.environment import require_paddle
from peft_deploy.errors import BundleError, CheckpointError, ConfigError, listed
from peft_deploy.families import EncoderDecoderFamily
from peft_deploy.parity.cases import Text
from peft_deploy.parity.passages import CALIBRATION
from peft_deploy.progress import Progress
from peft_deploy.text import Tokenizer
from peft_deploy.text.tokenizer import TOKENIZER
from peft_deploy.weights import BlockQuantized, Importance, write_safetensors
from peft_deploy.weights.safetensors_file import SafetensorsFile
from peft_deploy.workflows.sources import ExportSource
from peft_deploy.workflows.storage import storage_plan

FILE = "calibration.safetensors"  # in a bundle
MAX_TOKENS, AT_ONCE = 4096, 512
_LEAST = 64  # tokens: fewer say little of what a layer is usually given
_KEY = "calibration"


@dataclass(frozen=True)
class CalibrationText:
    """What a model is to read for its scales to be chosen.

    Args:
        name: of the text.
        sha256: of the text, as hexadecimal digits.
        pieces: of it, each short enough for the model.
    """

    name: str
    sha256: str
    pieces: Sequence[Text]


def read_calibration(source: ExportSource, options: ExportOptions) -> CalibrationText | None:
    """The text that was asked for, None where none was; it needs no Paddle.

    Args:
        source: the model.
        options: of the export.

    Raises:
        ConfigError: there is no tokenizer, or the text cannot be read or is too short.
    """
    if options.calibration is None:
        return None
    text = _read(options.calibration)
    name = BUILTIN if options.calibration == BUILTIN else Path(options.calibration).name
    digest = hashlib.sha256(text.encode()).hexdigest()
    return CalibrationText(name, digest, _texts(source, text))


def calibrated(
    source: ExportSource, text: CalibrationText, precision: Precision, progress: Progress
) -> ExportSource:
    """The model with what its linear layers are given while it reads a text.

    With an adapter that is merged, it is active; those that stay apart are not.

    Args:
        source: the model.
        text: that it reads.
        precision: of the bundle.
        progress: gets phases.

    Raises:
        CheckpointError: activations are not finite.
    """
    require_paddle("calibration")
    from peft_deploy.parity.activations import mean_squares
    from peft_deploy.parity.reference import PaddleReference

    plan = storage_plan(source, precision)
    weights = {
        name
        for name, storage in plan.items()
        if isinstance(storage, BlockQuantized)
        and storage.bits == CALIBRATED_BITS
        and not storage.rows  # a table that is looked up, too
    }
    model = source.load_reference(progress)
    progress.phase("Reading the calibration text")
    reference = PaddleReference(model, source.family, source.config)
    squares = mean_squares(reference, text.pieces, weights)
    bad = sorted(name for name, values in squares.items() if not np.isfinite(values).all())
    if bad:
        raise CheckpointError(f"activations of the model are not finite:\n{listed(bad)}")
    if unseen := sorted(weights - squares.keys()):
        warnings.warn(
            f"{len(unseen)} weights take no part in what the calibration text needs, and are rounded to "
            f"nearest:\n{listed(unseen)}",
            stacklevel=3,
        )
    tokens = sum(map(len, text.pieces))
    return replace(source, importance=Importance(squares, text.name, text.sha256, tokens))


def _read(calibration: str | Path) -> str:
    if calibration == BUILTIN:
        return CALIBRATION
    try:
        return Path(calibration).expanduser().read_text("utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(
            f"the calibration text {calibration} cannot be read: {exc}",
            hint=f"give a UTF-8 text file, or {BUILTIN} for the text that comes with the package",
        ) from exc


def _texts(source: ExportSource, text: str) -> list[Text]:
    """The text in pieces that the model can read."""
    folder = next((path.parent for path in source.companions if path.name == TOKENIZER), None)
    if folder is None:
        raise ConfigError(
            f"calibration reads a text, and the model has no {TOKENIZER}",
            hint="put it into the model's folder, or leave --calibration out",
        )
    ids = np.asarray(Tokenizer.from_folder(folder).encode(text), np.int64)[:MAX_TOKENS]
    if len(ids) < _LEAST:
        raise ConfigError(
            f"the calibration text has {len(ids)} tokens; it takes at least {_LEAST} to say which inputs of a layer "
            "are large"
        )
    size = min(AT_ONCE, source.family.dims(source.config).max_positions)
    return list(_pieces(source, ids, size))


def _pieces(source: ExportSource, ids: npt.NDArray[np.int64], size: int) -> Iterator[Text]:
    for start in range(0, len(ids), size):
        some = ids[start : start + size]
        if not isinstance(source.family, EncoderDecoderFamily):
            yield Text("calibration", some)
            continue
        begin = np.array([source.family.start_token(source.config)], np.int64)
        yield Text("calibration", np.concatenate([begin, some])[:size], source=some)


def write_calibration(folder: Path, importance: Importance) -> None:
    """Keeps in a bundle what its scales were chosen by, so that a check can choose them again.

    Raises:
        OutputError: the file cannot be written.
    """
    facts = json.dumps(calibration_facts(importance), ensure_ascii=False)
    write_safetensors(folder / FILE, ArraySource(importance.squares), {_KEY: facts})


def calibration_facts(importance: Importance) -> dict[str, Any]:
    """What a manifest says of a calibration."""
    return {"text": importance.text, "sha256": importance.sha256, "tokens": importance.tokens}


def with_calibration_of(folder: Path, manifest: Manifest, source: ExportSource) -> ExportSource:
    """The model with what the scales of a bundle were chosen by; itself where they were not chosen so.

    Args:
        folder: the bundle.
        manifest: of the bundle.
        source: what it was made of.

    Raises:
        BundleError: the file is missing, or not the one that the export wrote.
    """
    known = manifest.files.get(FILE)
    if known is None:
        return source
    path = folder / FILE
    try:
        if sha256(path) != known:
            raise BundleError(
                f"{path} is not the file that the export wrote",
                hint="get the bundle again, or export it again",
            )
        file = SafetensorsFile(path)
        facts = json.loads(file.metadata[_KEY])
        squares = {name: np.array(file.read(name), np.float32) for name in file.names()}
        importance = Importance(squares, facts["text"], facts["sha256"], facts["tokens"])
    except (OSError, CheckpointError, KeyError, ValueError, TypeError) as exc:
        raise BundleError(f"{path} cannot be read: {exc}") from exc
    return replace(source, importance=importance)
