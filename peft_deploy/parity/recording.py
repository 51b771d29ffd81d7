"""What a reference said, kept in the bundle, so that a check needs neither Paddle nor the base model.

One file for the bundle and one for each of its parts, under ``reference/``. A file holds what every
text of the matrix has to give, once (the cases are arrangements of the texts), the limits, and for
each prompt the tokens that were found right and the logits of their nearest rivals. So its size is
about

    4 bytes x (tokens of all texts) x (vocabulary + 2 x layers x kv heads x head dim)

which is 19 MB for a vocabulary of 49152 with 30 layers of 3 x 64, and 90 MB for a model of 7 B. The
manifest has the hash of every file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from peft_deploy.adapters.formats.peft_writer import ArraySource
from peft_deploy.errors import BundleError, CheckpointError, ConfigError
from peft_deploy.parity.cases import Case, CaseMatrix, Text
from peft_deploy.parity.compare import Difference
from peft_deploy.parity.effect import Effect
from peft_deploy.parity.expectation import Expectation
from peft_deploy.parity.gate import CheckOptions
from peft_deploy.parity.generation import Prompt, Scores
from peft_deploy.parity.play import Results
from peft_deploy.parity.tolerance import Limit
from peft_deploy.signature import GraphSignature
from peft_deploy.weights import write_safetensors
from peft_deploy.weights.safetensors_file import SafetensorsFile

FOLDER = "reference"
SUFFIX = ".safetensors"
MAX_BYTES = 256 * 2**20
FORMAT_VERSION = 1
_KEY = "peft_deploy_reference"
_SCORES = ("ids", "values", "scale", "tokens")

Array = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class Recording:
    """A reference's side of one check.

    Args:
        title: of the part of the report; empty for the bundle itself.
        expectation: what the bundle has to give.
        prompts: that it has to continue.
        scores: what the reference thought of the continuations, one for each prompt.
        options: of the check.
    """

    title: str
    expectation: Expectation
    prompts: Sequence[Prompt]
    scores: Sequence[Scores]
    options: CheckOptions

    def judge(self, prompt: Prompt, tokens: npt.NDArray[np.int64]) -> Scores:
        """What was thought of this prompt's tokens; others than those recorded are not known."""
        return self.scores[list(self.prompts).index(prompt)]


def expected_bytes(signature: GraphSignature, texts: Sequence[Text]) -> int:
    """How large a recording of these texts will be.

    Args:
        signature: of the graph.
        texts: of the matrix.
    """
    widths = [
        int(np.prod([dim for dim in spec.dims if isinstance(dim, int)]))
        for spec in signature.outputs
    ]
    return 4 * sum(map(len, texts)) * sum(widths)


def check_size(signature: GraphSignature, texts: Sequence[Text]) -> None:
    """Passes when a recording of these texts may be kept.

    Raises:
        ConfigError: it would be larger than :data:`MAX_BYTES`.
    """
    size = expected_bytes(signature, texts)
    if size > MAX_BYTES:
        raise ConfigError(
            f"the reference's outputs for {sum(map(len, texts))} tokens take {size / 1e6:,.0f} "
            f"MB; at most {MAX_BYTES / 1e6:,.0f} MB are recorded",
            hint="give fewer or shorter cases, or leave --record-reference out",
        )


def write_recording(path: Path, recording: Recording) -> None:
    """Writes a recording; the file appears whole or not at all.

    Args:
        path: the file, in a folder that exists.
        recording: what to write.

    Raises:
        OutputError: it cannot be written.
    """
    tensors: dict[str, Array] = {}
    for i, text in enumerate(recording.expectation.matrix.texts):
        tensors[f"text.{i}.ids"] = text.ids
        if text.types is not None:
            tensors[f"text.{i}.types"] = text.types
        if text.source is not None:
            tensors[f"text.{i}.source"] = text.source
        for name, values in recording.expectation.known[text].outputs().items():
            tensors[f"text.{i}.{name}"] = values
    for i, case in enumerate(recording.expectation.matrix.cases):
        tensors[f"case.{i}.slots"] = case.slots
    for i, scores in enumerate(recording.scores):
        for part in _SCORES:
            tensors[f"prompt.{i}.{part}"] = getattr(scores, part)
    facts = json.dumps(_facts(recording), ensure_ascii=False)
    write_safetensors(path, ArraySource(tensors), {_KEY: facts})


def read_recording(path: Path) -> Recording:
    """Reads what :func:`write_recording` wrote.

    Args:
        path: the file.

    Raises:
        BundleError: it cannot be read, or is of a newer version.
    """
    try:
        file = SafetensorsFile(path)
        facts = json.loads(file.metadata[_KEY])
        if facts["format_version"] > FORMAT_VERSION:
            raise BundleError(
                f"{path} has format_version {facts['format_version']}; this release reads up to "
                f"{FORMAT_VERSION}",
                hint="update peft-deploy",
            )
        tensors = {name: np.array(file.read(name)) for name in file.names()}
        return _recording(facts, tensors)
    except (CheckpointError, KeyError, ValueError, TypeError, IndexError) as exc:
        reason = exc.message if isinstance(exc, CheckpointError) else str(exc)
        raise BundleError(f"the recorded reference {path} is damaged: {reason}") from exc


def _facts(recording: Recording) -> dict[str, Any]:
    """All that is no array."""
    expectation, options = recording.expectation, recording.options
    matrix, effect = expectation.matrix, expectation.effect
    places = {text: i for i, text in enumerate(matrix.texts)}
    return {
        "format_version": FORMAT_VERSION,
        "title": recording.title,
        "texts": [{"name": text.name, "start": text.start} for text in matrix.texts],
        "cases": [_case_facts(case, places) for case in matrix.cases],
        "limits": {name: asdict(limit) for name, limit in expectation.limits.items()},
        "effect": effect and {name: asdict(d) for name, d in effect.differences.items()},
        "exact": expectation.exact,
        "warnings": list(expectation.warnings),
        "prompts": [
            {"text": prompt.text, "ids": list(prompt.ids), "source": prompt.source}
            for prompt in recording.prompts
        ],
        "options": asdict(options),
    }


def _case_facts(case: Case, places: Mapping[Text, int]) -> dict[str, Any]:
    return {
        "name": case.name,
        "group": case.group,
        "texts": [places[text] for text in case.texts],
        "calls": list(case.calls),
        "given": case.given,
        "pad_id": case.pad_id,
    }


def _recording(facts: Mapping[str, Any], tensors: Mapping[str, Array]) -> Recording:
    texts = tuple(
        Text(
            entry["name"],
            tensors[f"text.{i}.ids"],
            entry["start"],
            tensors.get(f"text.{i}.types"),
            tensors.get(f"text.{i}.source"),
        )
        for i, entry in enumerate(facts["texts"])
    )
    cases = tuple(
        Case(
            entry["name"],
            entry["group"],
            tuple(texts[place] for place in entry["texts"]),
            tensors[f"case.{i}.slots"],
            tuple(entry["calls"]),
            entry["given"],
            entry["pad_id"],
        )
        for i, entry in enumerate(facts["cases"])
    )
    limits = {name: Limit(**values) for name, values in facts["limits"].items()}
    effect = facts["effect"] and Effect(
        {name: _difference(values) for name, values in facts["effect"].items()}, limits
    )
    expectation = Expectation(
        matrix=CaseMatrix(texts, cases),
        known={text: _results(tensors, i, limits) for i, text in enumerate(texts)},
        limits=limits,
        effect=effect or None,
        exact=facts["exact"],
        warnings=tuple(facts["warnings"]),
    )
    return Recording(
        title=facts["title"],
        expectation=expectation,
        prompts=[_prompt(entry) for entry in facts["prompts"]],
        scores=[
            Scores(**{part: tensors[f"prompt.{i}.{part}"] for part in _SCORES})
            for i in range(len(facts["prompts"]))
        ],
        options=CheckOptions(**facts["options"]),
    )


def _prompt(entry: Mapping[str, Any]) -> Prompt:
    source = entry.get("source")
    return Prompt(entry["text"], tuple(entry["ids"]), None if source is None else tuple(source))


def _results(tensors: Mapping[str, Array], text: int, names: Mapping[str, Any]) -> Results:
    return Results({name: tensors[f"text.{text}.{name}"] for name in names})


def _difference(values: Mapping[str, Any]) -> Difference:
    lists = {"index": tuple(values["index"]), "histogram": tuple(values["histogram"])}
    return Difference(**{**values, **lists})
