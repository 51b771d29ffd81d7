"""What a check covers beyond its usual cases, and what is kept of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from peft_deploy.config.export import ExportOptions
from peft_deploy.errors import ConfigError
from peft_deploy.parity.cases import CaseMatrix
from peft_deploy.parity.expectation import Expectation
from peft_deploy.parity.gate import CheckOptions
from peft_deploy.parity.generation import Prompt, Scores
from peft_deploy.parity.own_cases import check_own_prompts, read_own_prompts, with_own_texts
from peft_deploy.parity.recording import Recording, check_size
from peft_deploy.parity.reports import check_report_folder
from peft_deploy.signature import LOGITS, GraphSignature
from peft_deploy.text import Tokenizer
from peft_deploy.text.tokenizer import TOKENIZER
from peft_deploy.workflows.sources import ExportSource


@dataclass(frozen=True)
class CheckExtras:
    """Goes with a check through the bundle and its parts.

    Args:
        own: the user's own prompts.
        record: keep what the reference says.
        bounded: whether what is kept is to be written, and so must not be large.
        recordings: what was kept, in the order of the checks.
        bisect: a folder for the part of the graph that is at fault, should a check fail.
    """

    own: Sequence[Prompt] = ()
    record: bool = False
    bounded: bool = True
    recordings: list[Recording] = field(default_factory=list)
    bisect: Path | None = None

    def added(
        self,
        matrix: CaseMatrix,
        prompts: Sequence[Prompt],
        signature: GraphSignature,
        max_positions: int,
        options: CheckOptions,
    ) -> tuple[CaseMatrix, list[Prompt]]:
        """Matrix and prompts with the user's own.

        Args:
            matrix: the usual one.
            prompts: likewise.
            signature: of the graph.
            max_positions: that a text can have.
            options: of the check.

        Raises:
            ConfigError: a prompt does not fit the model, the model continues no prompts, or what is to be kept
                would be too large.
        """
        own = list(self.own)
        if own:
            if not prompts:
                raise ConfigError("the cases are prompts, which only a decoder can continue")
            vocab_size = next(s.dims[-1] for s in signature.outputs if s.name == LOGITS)
            assert isinstance(vocab_size, int)  # build_matrix has looked
            check_own_prompts(
                self.own,
                vocab_size=vocab_size,
                max_positions=max_positions,
                new_tokens=options.new_tokens,
            )
            own = self._read_first(prompts)
            matrix = with_own_texts(matrix, own)
        if self.record and self.bounded:
            check_size(signature, matrix.texts)
        return matrix, [*prompts, *own]

    def _read_first(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """The user's own prompts, as the model takes the usual ones: to be continued, or to be read by an encoder."""
        if prompts[0].source is None:
            return list(self.own)
        return [replace(prompt, ids=prompts[0].ids, source=prompt.ids) for prompt in self.own]

    def keep(
        self,
        expectation: Expectation,
        prompts: Sequence[Prompt],
        scores: Sequence[Scores],
        options: CheckOptions,
    ) -> None:
        """Keeps what the reference said, if it is to be kept."""
        if self.record:
            self.recordings.append(Recording("", expectation, prompts, tuple(scores), options))


def plan_extras(options: ExportOptions, source: ExportSource) -> CheckExtras:
    """What an export's check has to cover; what is wrong with it is to be known before the work.

    Args:
        options: of the export.
        source: the model.

    Raises:
        ConfigError: the cases cannot be used.
        OutputError: the report's folder cannot be written to.
    """
    if options.report is not None:
        check_report_folder(options.report)
    tokenizers = [path.parent for path in source.companions if path.name == TOKENIZER]
    own = [] if options.cases is None else read_cases(options.cases, *tokenizers)
    dims = source.family.dims(source.config)
    check_own_prompts(
        own, vocab_size=dims.vocab_size, max_positions=dims.max_positions, new_tokens=1
    )
    return CheckExtras(own, options.record_reference)


def read_cases(path: Path, folder: Path | None = None) -> list[Prompt]:
    """The prompts of a user's file.

    Args:
        path: the file.
        folder: where the tokenizer may be.

    Raises:
        ConfigError: see :func:`~peft_deploy.parity.own_cases.read_own_prompts`.
    """
    if folder is None or not (folder / TOKENIZER).is_file():
        return read_own_prompts(path, None)
    return read_own_prompts(path, Tokenizer.from_folder(folder).encode)
