"""Writes all forms of a report into a folder."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peft_deploy.errors import OutputError
from peft_deploy.parity.report import ParityReport
from peft_deploy.parity.reports.junit import junit
from peft_deploy.parity.reports.markdown import markdown
from peft_deploy.parity.reports.page import page
from peft_deploy.parity.reports.subject import Subject

JSON = "report.json"
MARKDOWN = "report.md"
JUNIT = "junit.xml"
HTML = "report.html"

FORMAT = "peft-deploy parity report"

Writer = Callable[[ParityReport, Subject], str]


def write_reports(folder: Path, report: ParityReport, subject: Subject) -> list[Path]:
    """Writes ``report.json``, ``report.md``, ``junit.xml`` and ``report.html``.

    Each of them replaces an older one at once, when it is complete; nothing else in the folder is
    touched.

    Args:
        folder: made when it is not there.
        report: what was found.
        subject: what it is about.

    Returns:
        The files.

    Raises:
        OutputError: the folder cannot be written.
    """
    forms: dict[str, Writer] = {JSON: _json, MARKDOWN: markdown, JUNIT: junit, HTML: page}
    texts = {name: form(report, subject) for name, form in forms.items()}
    check_report_folder(folder)
    return [_write(folder / name, text) for name, text in texts.items()]


def check_report_folder(folder: Path) -> None:
    """Makes a folder for reports, so that one that cannot be is known before the work.

    Raises:
        OutputError: it cannot be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise OutputError(
            f"the folder {folder} for the report cannot be made: {exc.strerror or exc}",
            hint="name a folder; the report is several files",
        ) from exc
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OutputError(f"the folder {folder} for the report cannot be written to")


def _write(path: Path, text: str) -> Path:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, "utf-8")
        temporary.replace(path)
    except OSError as exc:
        temporary.unlink(missing_ok=True)
        raise OutputError(f"the report {path} cannot be written: {exc.strerror}") from exc
    return path


def _json(report: ParityReport, subject: Subject) -> str:
    data: dict[str, Any] = {
        "format": FORMAT,
        **report.to_dict(full=True),
        "subject": subject.to_dict(),
    }
    return json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
