"""Weights on disk, read one tensor at a time, in one naming scheme whatever the format.

Owns the readers of safetensors and .pdparams files, LoRA's arithmetic on arrays, merging while
streaming and the safetensors writer. Needs numpy only; must not import Paddle or anything that
runs a model.
"""

from peft_deploy.weights.canonical import CanonicalTensors
from peft_deploy.weights.checkpoint import Checkpoint, open_checkpoint
from peft_deploy.weights.fingerprint import fingerprint
from peft_deploy.weights.source import DTYPES, FLOATING, Array, TensorInfo, TensorSource

__all__ = [
    "DTYPES",
    "FLOATING",
    "Array",
    "CanonicalTensors",
    "Checkpoint",
    "TensorInfo",
    "TensorSource",
    "fingerprint",
    "open_checkpoint",
]
