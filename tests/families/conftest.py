from __future__ import annotations

from peft_deploy.environment import require_paddle

require_paddle("these tests")  # before any of them imports Paddle, whose import warns
