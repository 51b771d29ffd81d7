"""Run by two processes: saves a LoRA model that is spread over both, and reads it again."""

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

from peft_deploy.adapters import read_adapter  # noqa: E402
from peft_deploy.adapters.lora import LoRAConfig, LoRAModel  # noqa: E402


class Block(nn.Layer):
    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(tensor_parallel_degree=2)
        self.up = ColumnParallelLinear(8, 16, has_bias=True, gather_output=False)
        self.down = RowParallelLinear(16, 8, has_bias=True, input_is_parallel=True)


def main(folder: Path) -> None:
    strategy = fleet.DistributedStrategy()
    strategy.hybrid_configs = {"dp_degree": 1, "mp_degree": 2, "pp_degree": 1}
    fleet.init(is_collective=True, strategy=strategy)
    rank = paddle.distributed.get_rank()
    model = LoRAModel(Block(), LoRAConfig(r=3, target_modules=["up", "down"]))
    rng = np.random.default_rng(5)
    state = model.get_trainable_state_dict()
    same = {n: rng.standard_normal(p.shape).astype("float32") for n, p in state.items()}
    for name, parameter in state.items():
        parameter.set_value(same[name] + (rank if parameter.is_distributed else 0))
    model.save_pretrained(folder)
    paddle.distributed.barrier()
    whole = read_adapter(folder).state
    for name, axis in (("up.lora_B", 1), ("down.lora_A", 0)):
        both = np.concatenate([same[name], same[name] + 1], axis)
        np.testing.assert_array_equal(whole[name], both)
    again = LoRAModel.from_pretrained(Block(), folder).get_trainable_state_dict()
    for name, parameter in again.items():
        np.testing.assert_array_equal(parameter.numpy(), state[name].numpy())
    (folder / f"done-{rank}").write_text("")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
