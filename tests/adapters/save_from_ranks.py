"""Run by two processes that fleet makes tensor-parallel ranks: saves an adapter both ways, and
reads either again.

Usage: save_from_ranks.py FOLDER DTYPE
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

from peft_deploy.environment import require_paddle

require_paddle("this script")

import numpy as np  # noqa: E402
import paddle  # noqa: E402
from paddle import nn  # noqa: E402
from paddle.distributed import fleet  # noqa: E402
from paddle.distributed.fleet.meta_parallel import (  # noqa: E402
    ColumnParallelLinear,
    RowParallelLinear,
)

from peft_deploy.adapters.arrays import assign, to_array  # noqa: E402
from peft_deploy.adapters.lora import LoRAConfig, LoRAModel  # noqa: E402


class Block(nn.Layer):
    def __init__(self, ranks: int) -> None:
        super().__init__()
        self.config = SimpleNamespace(tensor_parallel_degree=ranks)
        self.up = ColumnParallelLinear(8, 12, has_bias=True, gather_output=False)
        self.down = RowParallelLinear(12, 8, has_bias=True, input_is_parallel=True)


def main(folder: Path, dtype: str) -> None:
    strategy = fleet.DistributedStrategy()
    strategy.hybrid_configs = {"dp_degree": 1, "mp_degree": 2, "pp_degree": 1}
    fleet.init(is_collective=True, strategy=strategy)
    rank = fleet.get_hybrid_communicate_group().get_model_parallel_rank()
    options = {"target_modules": ["up", "down"], "trainable_bias": "lora", "dtype": dtype}
    model = LoRAModel(Block(ranks=2), LoRAConfig(r=3, **options))
    own, shared = np.random.default_rng(rank), np.random.default_rng(9)
    for parameter in model.parameters():
        if not parameter.stop_gradient:
            generator = own if parameter.is_distributed else shared
            assign(parameter, generator.standard_normal(parameter.shape))
    model.save_pretrained(folder / "whole")
    model.save_pretrained(folder / "ranks", merge_tensor_parallel=False)
    paddle.distributed.barrier()
    for name in ("whole", "ranks"):
        again = LoRAModel.from_pretrained(Block(ranks=2), folder / name)
        read = again.get_trainable_state_dict()
        for key, parameter in model.get_trainable_state_dict().items():
            np.testing.assert_array_equal(to_array(read[key]), to_array(parameter))
    (folder / f"done-{rank}").touch()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
