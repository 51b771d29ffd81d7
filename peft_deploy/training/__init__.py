"""Fine-tuning: from a JSONL file of examples to an adapter's folder, on PaddleNLP's Trainer.

Owns the reading and tokenizing of examples, the trainer, its checkpoints and their resumption.
Options and examples can be read without Paddle, training needs Paddle and PaddleNLP; everything is
imported when it is first used. Must not import tracing, conversion or anything that handles a
bundle.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from peft_deploy.lazy import lazy_names

if TYPE_CHECKING:
    from peft_deploy.training.encoding import Encoded, encode_records
    from peft_deploy.training.options import TrainOptions
    from peft_deploy.training.records import Chat, Completion, Text, read_records
    from peft_deploy.training.run import TrainResult, train

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

_HOME = {
    "Chat": ".records",
    "Completion": ".records",
    "Encoded": ".encoding",
    "Text": ".records",
    "TrainOptions": ".options",
    "TrainResult": ".run",
    "encode_records": ".encoding",
    "read_records": ".records",
    "train": ".run",
}


__getattr__ = lazy_names(__name__, _HOME)
