"""Text in and out of a model: tokens, special ids, chat templates, padded batches, streamed text.

Owns everything that reads ``tokenizer.json`` and the files beside it. Training and the runtime use
the same class, so that a model is asked with the very tokens it was trained on. Must not import a
model, a graph or Paddle.
"""

from __future__ import annotations

from peft_deploy.text.chat import ChatTemplate, Message
from peft_deploy.text.padding import PaddedBatch, pad_batch, positions
from peft_deploy.text.special_tokens import SpecialTokens
from peft_deploy.text.stream import TextStream
from peft_deploy.text.tokenizer import Tokenizer

__all__ = [
    "ChatTemplate",
    "Message",
    "PaddedBatch",
    "SpecialTokens",
    "TextStream",
    "Tokenizer",
    "pad_batch",
    "positions",
]
