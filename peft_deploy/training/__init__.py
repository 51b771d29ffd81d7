"""Fine-tuning: from a JSONL file of examples to an adapter's folder, on PaddleNLP's Trainer.

Owns the reading and tokenizing of examples, the trainer, its checkpoints and their resumption.
Needs Paddle and PaddleNLP; must not import tracing, conversion or anything that handles a bundle.
"""

from __future__ import annotations

from peft_deploy.environment import require_paddle

require_paddle("training")

from peft_deploy.training.encoding import Encoded, encode_records  # noqa: E402
from peft_deploy.training.options import TrainOptions  # noqa: E402
from peft_deploy.training.records import Chat, Completion, Text, read_records  # noqa: E402
from peft_deploy.training.run import TrainResult, train  # noqa: E402

__all__ = [
    "Chat",
    "Completion",
    "Encoded",
    "Text",
    "TrainOptions",
    "TrainResult",
    "encode_records",
    "read_records",
    "train",
]
