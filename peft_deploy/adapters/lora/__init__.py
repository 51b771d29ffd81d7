"""LoRA in the dynamic graph: the layers, and LoRAModel which puts them into a model.

Owns what is computed and trained; needs Paddle. Must not import training, tracing or anything
below; reading and writing of files is in ``adapters.formats``.
"""

from peft_deploy.environment import require_paddle

require_paddle("LoRA in the dynamic graph")

from peft_deploy.adapters.lora.column_parallel import (
    ColumnParallelLoRALinear,
    ColumnParallelLoRAMergedLinear,
)
from peft_deploy.adapters.lora.conv import LoRAConv2D
from peft_deploy.adapters.lora.embedding import LoRAEmbedding
from peft_deploy.adapters.lora.layer import LoRALayer
from peft_deploy.adapters.lora.linear import LoRALinear
from peft_deploy.adapters.lora.merged_linear import LoRAMergedLinear
from peft_deploy.adapters.lora.model import LoRAModel
from peft_deploy.adapters.lora.row_parallel import RowParallelLoRALinear
from peft_deploy.adapters.lora.trainable import mark_only_lora_as_trainable
from peft_deploy.config import LoRAConfig

__all__ = [
    "ColumnParallelLoRALinear",
    "ColumnParallelLoRAMergedLinear",
    "LoRAConfig",
    "LoRAConv2D",
    "LoRAEmbedding",
    "LoRALayer",
    "LoRALinear",
    "LoRAMergedLinear",
    "LoRAModel",
    "RowParallelLoRALinear",
    "mark_only_lora_as_trainable",
]
