"""Weights on disk, read one tensor at a time, in one naming scheme whatever the format.

Owns the readers of safetensors and .pdparams files, LoRA's arithmetic on arrays, merging and
conversion while streaming, and the safetensors writer. Needs numpy only; must not import Paddle
or anything that runs a model.
"""

from peft_deploy.weights.block_quantized import BlockQuantized
from peft_deploy.weights.blocks import contiguous, contiguous_blocks
from peft_deploy.weights.canonical import CanonicalTensors
from peft_deploy.weights.cast import CastTensors, cast_array
from peft_deploy.weights.checkpoint import Checkpoint, open_checkpoint
from peft_deploy.weights.fingerprint import fingerprint
from peft_deploy.weights.importance import Importance
from peft_deploy.weights.layout import HuggingFaceTensors
from peft_deploy.weights.lora import LoraPair, lora_delta, merge_weight
from peft_deploy.weights.merged import AdapterTensors, MergedTensors
from peft_deploy.weights.packed import PackedTensors
from peft_deploy.weights.rounding import ROUNDING_LIMIT, RoundingLoss
from peft_deploy.weights.source import DTYPES, FLOATING, Array, TensorInfo, TensorSource
from peft_deploy.weights.storage import (
    DecodedTensors,
    EncodedTensors,
    Storage,
    StoragePlan,
    StoredTensor,
)
from peft_deploy.weights.subset import SubsetTensors
from peft_deploy.weights.tensor_parallel import merge_shards, split_shards
from peft_deploy.weights.writer import write_safetensors

__all__ = [
    "DTYPES",
    "FLOATING",
    "ROUNDING_LIMIT",
    "AdapterTensors",
    "Array",
    "BlockQuantized",
    "CanonicalTensors",
    "CastTensors",
    "Checkpoint",
    "DecodedTensors",
    "EncodedTensors",
    "HuggingFaceTensors",
    "Importance",
    "LoraPair",
    "MergedTensors",
    "PackedTensors",
    "RoundingLoss",
    "Storage",
    "StoragePlan",
    "StoredTensor",
    "SubsetTensors",
    "TensorInfo",
    "TensorSource",
    "cast_array",
    "contiguous",
    "contiguous_blocks",
    "fingerprint",
    "lora_delta",
    "merge_shards",
    "merge_weight",
    "open_checkpoint",
    "split_shards",
    "write_safetensors",
]
