from __future__ import annotations

from peft_deploy.environment import require_paddle

require_paddle("these tests")  # before any of them imports Paddle, whose import warns

import paddle  # noqa: E402
import pytest  # noqa: E402


@pytest.fixture(autouse=True)
def seeded() -> None:
    paddle.seed(20)
