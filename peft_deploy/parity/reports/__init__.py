"""A parity report as files: JSON, Markdown, JUnit XML and one HTML page.

Owns their forms. Needs no network to be read and no Paddle to be written; imports the report, the
bundle's manifest and nothing below.
"""

from peft_deploy.parity.reports.subject import Subject
from peft_deploy.parity.reports.writing import (
    HTML,
    JSON,
    JUNIT,
    MARKDOWN,
    check_report_folder,
    write_reports,
)

__all__ = [
    "HTML",
    "JSON",
    "JUNIT",
    "MARKDOWN",
    "Subject",
    "check_report_folder",
    "write_reports",
]
