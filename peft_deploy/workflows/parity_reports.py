"""The reports of a check, as files for people and for CI systems."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from peft_deploy.bundle import Manifest
from peft_deploy.parity.report import ParityReport
from peft_deploy.parity.reports import Subject, write_reports
from peft_deploy.text import Tokenizer
from peft_deploy.text.tokenizer import TOKENIZER


def save_reports(
    folder: str | Path, bundle: str | Path, report: ParityReport, *, name: str | None = None
) -> list[Path]:
    """Writes ``report.json``, ``report.md``, ``junit.xml`` and ``report.html``.

    Args:
        folder: where to; made when it is not there.
        bundle: the folder of the bundle that was checked.
        report: what was found.
        name: of the bundle, for titles; its folder's when None.

    Returns:
        The files.

    Raises:
        BundleError: the bundle's manifest cannot be read.
        OutputError: the folder cannot be written.

    Example:
        >>> import peft_deploy
        >>> report = peft_deploy.validate("bundle/", "base/")  # doctest: +SKIP
        >>> save_reports("reports/", "bundle/", report)  # doctest: +SKIP
    """
    path = Path(bundle).expanduser()
    return write_reports(
        Path(folder).expanduser(), report, _subject(path, name or path.resolve().name)
    )


def _subject(bundle: Path, name: str) -> Subject:
    has_tokenizer = (bundle / TOKENIZER).is_file()
    tokenizer = Tokenizer.from_folder(bundle) if has_tokenizer else None

    def decode(ids: Sequence[int]) -> str:
        assert tokenizer is not None
        return tokenizer.decode(ids, skip_special=False)

    return Subject.of(name, Manifest.read(bundle), decode if tokenizer else None)
