"""Any checkpoint of a family, seen in PaddleNLP's names and layout."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from peft_deploy.errors import CheckpointError, listed
from peft_deploy.families.names import NameMap
from peft_deploy.weights.checkpoint import Checkpoint
from peft_deploy.weights.fingerprint import fingerprint
from peft_deploy.weights.source import Array, TensorInfo

HUGGINGFACE = "huggingface"
PADDLENLP = "paddlenlp"
COMPARED_ROWS = 1024  # of an embedding at a time


@dataclass(frozen=True)
class _Origin:
    """Where a canonical tensor comes from."""

    name: str
    transpose: bool
    block: int = 0
    blocks: int = 1  # of the stored tensor's last axis


class CanonicalTensors:
    """A checkpoint as a :class:`~peft_deploy.weights.source.TensorSource` in PaddleNLP's terms.

    Tensors that carry no weight are left out, and so is a tied parameter: its value is that of the
    parameter whose storage it shares. A name that is not in the map keeps its own name, so that
    :meth:`check` reports it.

    Args:
        checkpoint: the files.
        name_map: the family's names.
        tied: parameter → the one whose storage it shares; empty when nothing is tied.
        expected: all parameters of the model with their shapes; checked when given.

    Attributes:
        layout: ``"huggingface"`` or ``"paddlenlp"``, as the names show.
        tied: as given.

    Raises:
        CheckpointError: the names fit neither layout or both, a tied tensor differs from the one
            that it should equal, or the tensors are not those expected.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        name_map: NameMap,
        tied: Mapping[str, str],
        expected: Mapping[str, tuple[int, ...]] | None = None,
    ) -> None:
        self._checkpoint = checkpoint
        self.tied = dict(tied)
        names = [name for name in checkpoint.names() if not name_map.ignores(name)]
        prefix = _missing_prefix(checkpoint, name_map, names)
        self.layout = HUGGINGFACE if prefix else _layout(checkpoint, name_map, names)
        self._origins: dict[str, _Origin] = {}
        for name in names:
            found = {name: _Origin(name, transpose=False)}
            if self.layout == HUGGINGFACE:
                found = _origins(name_map, prefix, name) or found
            for own, origin in found.items():
                if own in self._origins:
                    raise CheckpointError(
                        f"{checkpoint.path}: {name} and {self._origins[own].name} are both {own}"
                    )
                self._origins[own] = origin
        self._check_forms()
        self._drop_tied()
        if expected is not None:
            self.check(expected)

    def names(self) -> Sequence[str]:
        """PaddleNLP's parameter names, in the order of the files."""
        return list(self._origins)

    def info(self, name: str) -> TensorInfo:
        """Type and shape of one parameter, in PaddleNLP's layout; KeyError if unknown."""
        origin = self._origins[name]
        info = self._checkpoint.info(origin.name)
        shape = info.shape[::-1] if origin.transpose else info.shape
        if origin.blocks > 1:
            shape = (*shape[:-1], shape[-1] // origin.blocks)
        return TensorInfo(name, info.dtype, shape)

    def read(self, name: str) -> Array:
        """One parameter; a transposed view where the checkpoint has it the other way round."""
        origin = self._origins[name]
        data = self._checkpoint.read(origin.name)
        if origin.blocks > 1:
            size = data.shape[-1] // origin.blocks
            return data[..., origin.block * size : (origin.block + 1) * size]
        return data.T if origin.transpose else data

    def renamed(self, names: Mapping[str, str]) -> CanonicalTensors:
        """Some of the tensors under other names.

        Args:
            names: new name → the one that the tensor has here.
        """
        twin = copy.copy(self)
        twin._origins = {new: self._origins[old] for new, old in names.items()}
        return twin

    def fingerprint(self) -> str:
        """Identifies the weights whatever form they are stored in; see :mod:`~.fingerprint`."""
        return fingerprint(self)

    def check(self, expected: Mapping[str, tuple[int, ...]]) -> None:
        """Compares names and shapes with those of the model.

        Args:
            expected: parameter → shape in PaddleNLP's layout; tied parameters may be in it.

        Raises:
            CheckpointError: what is missing, not expected, or of another shape.
        """
        wanted = {name: shape for name, shape in expected.items() if name not in self.tied}
        missing = wanted.keys() - self._origins.keys()
        unexpected = self._origins.keys() - wanted.keys()
        shapes = {name: self.info(name).shape for name in self._origins.keys() & wanted.keys()}
        wrong = [
            f"{name}: {list(shape)}, the model has {list(wanted[name])}"
            for name, shape in shapes.items()
            if shape != tuple(wanted[name])
        ]
        problems = [
            ("missing", missing),
            ("not expected", unexpected),
            ("of another shape", wrong),
        ]
        texts = [f"{what} ({len(lines)}):\n{listed(lines)}" for what, lines in problems if lines]
        if texts:
            raise CheckpointError(
                f"{self._checkpoint.path} does not hold the weights of this model; "
                + "\n".join(texts),
                hint="does config.json belong to these weights?",
            )

    def _check_forms(self) -> None:
        for name, origin in self._origins.items():
            shape = self._checkpoint.info(origin.name).shape
            if origin.blocks > 1 and (not shape or shape[-1] % origin.blocks):
                raise CheckpointError(
                    f"{self._checkpoint.path}: {origin.name} has shape {list(shape)}; "
                    f"its last axis has to hold {origin.blocks} equal blocks, one of them {name}"
                )
            if origin.transpose and len(shape) != 2:
                raise CheckpointError(
                    f"{self._checkpoint.path}: {origin.name} has shape {list(shape)}; "
                    f"as {name} it has to be a matrix"
                )

    def _drop_tied(self) -> None:
        for name, target in self.tied.items():
            if name in self._origins and target in self._origins:
                self._check_equal(name, target)
                del self._origins[name]

    def _check_equal(self, name: str, target: str) -> None:
        """A stored copy of a tied matrix may lie either way round; the numbers must be equal."""
        first, second = self.read(name), self.read(target)
        candidates = [first] if first.shape == second.shape else []
        if first.ndim == 2 and first.T.shape == second.shape:
            candidates.append(first.T)
        if not any(_equal(candidate, second) for candidate in candidates):
            raise CheckpointError(
                f"{self._checkpoint.path}: the config ties {name} to {target}, "
                "but the checkpoint holds different values for the two",
                hint="set tie_word_embeddings to false in config.json if both were trained",
            )


def _origins(name_map: NameMap, prefix: str, name: str) -> dict[str, _Origin]:
    """The parameters in one tensor of a Hugging Face checkpoint; none for an unknown name."""
    mapped = name_map.to_paddle(prefix + name)
    if mapped:
        return {mapped.name: _Origin(name, mapped.transpose)}
    parts = name_map.parts(prefix + name)
    return {part: _Origin(name, False, k, len(parts)) for k, part in enumerate(parts)}


def _equal(first: Array, second: Array) -> bool:
    for start in range(0, max(1, len(second)), COMPARED_ROWS):
        rows = slice(start, start + COMPARED_ROWS)
        if not np.array_equal(first[rows].astype(np.float32), second[rows].astype(np.float32)):
            return False
    return True


def _layout(checkpoint: Checkpoint, name_map: NameMap, names: Sequence[str]) -> str:
    huggingface = [n for n in names if name_map.to_paddle(n) and not name_map.to_huggingface(n)]
    paddlenlp = [n for n in names if name_map.to_huggingface(n) and not name_map.to_paddle(n)]
    if huggingface and paddlenlp:
        raise CheckpointError(
            f"{checkpoint.path} mixes two naming schemes: Hugging Face's, as in "
            f"{_first(huggingface)}, and PaddleNLP's, as in {_first(paddlenlp)}"
        )
    if not huggingface and not paddlenlp:
        if layout := _layout_by_shape(checkpoint, name_map, names):
            return layout
        rule = name_map.rules[0]
        raise CheckpointError(
            f"{checkpoint.path} holds tensors of another kind of model: {_first(names)}; "
            f"names like {rule.huggingface} or {rule.paddle} were expected"
        )
    return HUGGINGFACE if huggingface else PADDLENLP


def _layout_by_shape(
    checkpoint: Checkpoint, name_map: NameMap, names: Sequence[str]
) -> str | None:
    """Which way round a matrix lies whose name is the same in both layouts; None when no such one is there."""
    for name in sorted(name_map.rows.keys() & set(names)):
        shape, rows = checkpoint.info(name).shape, name_map.rows[name]
        if len(shape) != 2 or shape[0] == shape[1] or rows not in shape:
            raise CheckpointError(
                f"{checkpoint.path}: {name} has shape {list(shape)}; {rows} rows or {rows} columns were expected",
                hint="does config.json belong to these weights?",
            )
        return PADDLENLP if shape[0] == rows else HUGGINGFACE
    return None


def _missing_prefix(checkpoint: Checkpoint, name_map: NameMap, names: Sequence[str]) -> str:
    """The prefix that a Hugging Face checkpoint of the bare model lacks; "" if it has all.

    PaddleNLP's bare models lack theirs too, and then the names are the same while the layout is
    not; so torch's own mark in the file has to say which it is.
    """
    if any(name_map.to_paddle(name) or name_map.to_huggingface(name) for name in names):
        return ""
    prefixes = {rule.huggingface.partition(".")[0] + "." for rule in name_map.rules}
    for prefix in sorted(prefixes):
        if names and all(_origins(name_map, prefix, n) for n in names):
            if checkpoint.metadata.get("format") == "pt":
                return prefix
            raise CheckpointError(
                f"{checkpoint.path} holds a base model without its head ({_first(names)}); "
                "such names are the same in Hugging Face's layout and in PaddleNLP's, "
                "and nothing in the file says which of the two it has",
                hint="save the model together with its language-model head",
            )
    return ""


def _first(names: Sequence[str]) -> str:
    return ", ".join(list(names)[:3]) or "none at all"
