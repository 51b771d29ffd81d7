"""LoRA on a slice of a weight's rows, as tensor-parallel ranks hold it.

Every rank has the rows of A that belong to its rows of the weight, and the whole B. So the product
of what a rank holds is the change of what it holds of the weight, and merging needs no
communication.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import paddle
from paddle.distributed.fleet.layers.mpu import mp_ops
from paddle.distributed.fleet.meta_parallel import RowParallelLinear, get_rng_state_tracker

from peft_deploy.adapters.lora._slices import mark_slice, refuse_parallel
from peft_deploy.adapters.lora.layer import check_rank
from peft_deploy.adapters.lora.linear import (
    LowRankLayer,
    add_branch,
    adopt,
    kaiming_uniform,
    zeros,
)


class RowParallelLoRALinear(LowRankLayer, RowParallelLinear):  # type: ignore[misc]
    """LoRA on a slice of rows: W [in / N, out], A [in / N, R], B [R, out] the same on all N ranks.

    Args:
        in_features: of the whole layer, over all ranks.
        out_features: size of the last axis of the output.
        r: rank R.
        lora_alpha: numerator of the scaling.
        lora_dropout: probability of zeroing an input of the branch while training.
        rslora: rank-stabilized scaling.
        lora_plus_scale: learning rate of B relative to that of A.
        use_quick_lora: accepted; the numbers are the same.
        pissa: not supported.
        use_mora: not supported.
        parallel_kwargs: what fleet's ``RowParallelLinear`` takes.

    Raises:
        LoRAConfigError: the rank is not a positive integer, or an unsupported variant is on.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 0,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        rslora: bool = False,
        lora_plus_scale: float = 1.0,
        use_quick_lora: bool = False,
        pissa: bool = False,
        use_mora: bool = False,
        **parallel_kwargs: Any,
    ) -> None:
        check_rank(r)
        refuse_parallel(pissa, use_mora)
        RowParallelLinear.__init__(self, in_features, out_features, **parallel_kwargs)
        self._begin(r, lora_alpha, lora_dropout, rslora=rslora)
        self._create_branch(lora_plus_scale, self._dtype)

    @classmethod
    def wrap(
        cls,
        linear: RowParallelLinear,
        *,
        r: int,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        rslora: bool = False,
        lora_plus_scale: float = 1.0,
        dtype: str | None = None,
    ) -> RowParallelLoRALinear:
        """A LoRA layer that shares the weight and bias of an existing layer; see the class."""
        layer = cls.__new__(cls)
        adopt(layer, linear)
        layer._begin(r, lora_alpha, lora_dropout, rslora=rslora)
        layer._create_branch(lora_plus_scale, dtype or paddle.get_default_dtype())
        return layer

    def _create_branch(self, lora_plus_scale: float, dtype: str) -> None:
        inputs, outputs = self.weight.shape
        self.name = self._name
        # A's rows differ between the ranks, so they come from the generator that differs, too.
        with get_rng_state_tracker().rng_state() if self.is_mp else nullcontext():
            self.lora_A = self.create_parameter(
                [inputs, self.r],
                dtype=dtype,
                attr=paddle.ParamAttr(initializer=kaiming_uniform()),
            )
        self.lora_B = self.create_parameter(
            [self.r, outputs], dtype=dtype, attr=zeros(lora_plus_scale)
        )
        mark_slice(self.lora_A, self.is_mp, axis=0)

    def forward(self, input: paddle.Tensor) -> paddle.Tensor:
        """[..., in], or [..., in / N] when the input is parallel already → [..., out]."""
        result = RowParallelLinear.forward(self, input)
        if self.disable_lora or self.merged:
            return result
        if self.is_mp and not self.input_is_parallel:
            input = mp_ops._c_split(input, group=self.model_parallel_group)
        h = self.reduce(input)
        if self.is_mp:  # every rank needs the whole x @ A, for the gradient of B to be the same
            h = mp_ops._mp_allreduce(
                h, group=self.model_parallel_group, use_calc_stream=True, use_model_parallel=True
            )
        return add_branch(result, h @ self.lora_B)
