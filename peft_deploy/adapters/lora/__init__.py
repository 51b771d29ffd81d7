"""LoRA in the dynamic graph: the layers, and LoRAModel which puts them into a model.

Owns what is computed and trained; needs Paddle. Must not import training, tracing or anything
below; reading and writing of files is in ``adapters.formats``.
"""

from peft_deploy.environment import require_paddle

require_paddle("LoRA in the dynamic graph")

from peft_deploy.adapters.lora.column_parallel import (  # noqa: E402
    ColumnParallelLoRALinear,
    ColumnParallelLoRAMergedLinear,
)
from peft_deploy.adapters.lora.conv import LoRAConv2D  # noqa: E402
from peft_deploy.adapters.lora.embedding import LoRAEmbedding  # noqa: E402
from peft_deploy.adapters.lora.layer import LoRALayer  # noqa: E402
from peft_deploy.adapters.lora.linear import LoRALinear  # noqa: E402
from peft_deploy.adapters.lora.merged_linear import LoRAMergedLinear  # noqa: E402
from peft_deploy.adapters.lora.model import LoRAModel  # noqa: E402
from peft_deploy.adapters.lora.row_parallel import RowParallelLoRALinear  # noqa: E402
from peft_deploy.adapters.lora.trainable import mark_only_lora_as_trainable  # noqa: E402
from peft_deploy.config import LoRAConfig  # noqa: E402

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
