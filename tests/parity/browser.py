"""A headless Chromium, where there is one."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
_CONSOLE = re.compile(r"\[[^\]]*CONSOLE[^\]]*\].*")


def find_browser() -> str:
    """Its path; skips the test, visibly, where there is none."""
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip("no Chromium to open the page in")
    return found


class Browser:
    """Opens pages; keeps its profile in a folder."""

    def __init__(self, path: str, folder: Path) -> None:
        self.path = path
        self.folder = folder

    def _run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [
            *(self.path, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
            *("--disable-dev-shm-usage", "--enable-logging=stderr", "--proxy-server=0.0.0.0:1"),
            f"--user-data-dir={self.folder / 'profile'}",
            *arguments,
        ]
        return subprocess.run(
            command, capture_output=True, text=True, timeout=120, check=True, cwd=self.folder
        )

    def open(self, page: Path) -> tuple[str, list[str]]:
        """The page as the browser understood it, and the lines of its console."""
        done = self._run("--dump-dom", page.as_uri())
        return done.stdout, _CONSOLE.findall(done.stderr)

    def picture(self, page: Path, target: Path, width: int, height: int, *more: str) -> None:
        size = f"--window-size={width},{height}"
        self._run(f"--screenshot={target}", size, *more, page.as_uri())
