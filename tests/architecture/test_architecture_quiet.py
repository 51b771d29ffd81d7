"""Importing Paddle and PaddleNLP through this package leaves the user's logging as it was."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import logging
from peft_deploy.environment import require_paddle
before = list(logging.getLogger().handlers), logging.getLogger().level
require_paddle()
import peft_deploy.adapters.lora, peft_deploy.base.dygraph
assert (list(logging.getLogger().handlers), logging.getLogger().level) == before
logging.getLogger("somebody").info("must not be seen")
"""


def test_the_root_logger_is_left_alone() -> None:
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout + result.stderr == ""
