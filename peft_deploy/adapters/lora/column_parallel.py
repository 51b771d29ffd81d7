"""LoRA on a slice of a weight's columns, as tensor-parallel ranks hold it.

Every rank has the whole A and the columns of B that belong to its columns of the weight. So the
product of what a rank holds is the change of what it holds of the weight, and merging needs no
communication.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import paddle
from paddle.distributed.fleet.layers.mpu import mp_ops
from paddle.distributed.fleet.meta_parallel import ColumnParallelLinear

from peft_deploy.adapters.lora._slices import mark_slice, refuse_parallel
from peft_deploy.adapters.lora.layer import check_rank
from peft_deploy.adapters.lora.linear import (
    LowRankLayer,
    add_branch,
    adopt,
    kaiming_uniform,
    zeros,
)
from peft_deploy.adapters.lora.merged_linear import FusedLayer, check_parts


class ColumnParallelLoRALinear(LowRankLayer, ColumnParallelLinear):  # type: ignore[misc]
    """LoRA on a slice of columns: W [in, out / N], A [in, R] the same on all N ranks, B [R, out /
    N].

    Args:
        in_features: size of the last axis of the input.
        out_features: of the whole layer, over all ranks.
        r: rank R.
        lora_alpha: numerator of the scaling.
        lora_dropout: probability of zeroing an input of the branch while training.
        rslora: rank-stabilized scaling.
        lora_plus_scale: learning rate of B relative to that of A.
        lora_A_weight_attr: how A starts, if not as in :class:`LoRALinear`.
        use_quick_lora: accepted; the numbers are the same.
        pissa: not supported.
        use_mora: not supported.
        parallel_kwargs: what fleet's ``ColumnParallelLinear`` takes.

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
        lora_A_weight_attr: paddle.ParamAttr | None = None,
        use_quick_lora: bool = False,
        pissa: bool = False,
        use_mora: bool = False,
        **parallel_kwargs: Any,
    ) -> None:
        check_rank(r)
        refuse_parallel(pissa, use_mora)
        ColumnParallelLinear.__init__(self, in_features, out_features, **parallel_kwargs)
        self._begin(r, lora_alpha, lora_dropout, rslora=rslora)
        self._create_branch(lora_plus_scale, self._dtype, lora_A_weight_attr)

    @classmethod
    def wrap(
        cls,
        linear: ColumnParallelLinear,
        *,
        r: int,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        rslora: bool = False,
        lora_plus_scale: float = 1.0,
        dtype: str | None = None,
    ) -> ColumnParallelLoRALinear:
        """A LoRA layer that shares the weight and bias of an existing layer; see the class."""
        layer = cls.__new__(cls)
        adopt(layer, linear)
        layer._begin(r, lora_alpha, lora_dropout, rslora=rslora)
        layer._create_branch(lora_plus_scale, dtype or paddle.get_default_dtype())
        return layer

    def _create_branch(
        self, lora_plus_scale: float, dtype: str, attr: paddle.ParamAttr | None = None
    ) -> None:
        inputs, outputs = self.weight.shape
        self.name = self._name
        self.lora_A = self.create_parameter(
            [inputs, self.r],
            dtype=dtype,
            attr=attr or paddle.ParamAttr(initializer=kaiming_uniform()),
        )
        self.lora_B = self.create_parameter(
            [self.r, outputs], dtype=dtype, attr=zeros(lora_plus_scale)
        )
        mark_slice(self.lora_B, self.is_mp, axis=1)

    def forward(self, input: paddle.Tensor) -> paddle.Tensor:
        """[..., in] → [..., out / N], or [..., out] when the layer gathers its output."""
        result = ColumnParallelLinear.forward(self, input)
        if self.disable_lora or self.merged:
            return result
        return add_branch(result, _gather(self, _identity(self, self.reduce(input)) @ self.lora_B))


class ColumnParallelLoRAMergedLinear(FusedLayer, ColumnParallelLinear):  # type: ignore[misc]
    """LoRA on parts of a fused projection, of which this rank holds whole heads.

    A [in, n · R] is the same on all N ranks, B is [R, H / N · n · D].

    Args:
        in_features: size of the last axis of the input.
        out_features: H · parts · D, over all ranks.
        head_dim: D.
        r: rank R of each adapted part.
        lora_alpha: numerator of the scaling.
        lora_dropout: probability of zeroing an input of the branch while training.
        merge_weights: kept as an attribute; the model that holds the layer merges.
        enable_lora: for each part, whether it gets LoRA; at least one has to.
        lora_A_weight_attr: how A starts, if not as in :class:`LoRALinear`.
        parallel_kwargs: what fleet's ``ColumnParallelLinear`` takes.

    Raises:
        LoRAConfigError: no part is adapted, or this rank's slice is no whole number of heads.
        LoRAConfigTypeError: ``enable_lora`` is not a list of booleans; also a TypeError.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        head_dim: int,
        r: int = 0,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        merge_weights: bool = True,
        enable_lora: Sequence[bool] = (False,),
        lora_A_weight_attr: paddle.ParamAttr | None = None,
        **parallel_kwargs: Any,
    ) -> None:
        check_rank(r)
        check_parts(out_features, head_dim, enable_lora)
        ColumnParallelLinear.__init__(self, in_features, out_features, **parallel_kwargs)
        check_parts(self.weight.shape[1], head_dim, enable_lora)
        self._begin(r, lora_alpha, lora_dropout)
        self._create_branch(
            head_dim, enable_lora, merge_weights, 1.0, self._dtype, lora_A_weight_attr
        )
        self.name = self._name
        mark_slice(self.lora_B, self.is_mp, axis=1)

    @classmethod
    def wrap(
        cls,
        linear: ColumnParallelLinear,
        *,
        head_dim: int,
        enable_lora: Sequence[bool],
        r: int,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        lora_plus_scale: float = 1.0,
        dtype: str | None = None,
    ) -> ColumnParallelLoRAMergedLinear:
        """A LoRA layer that shares the weight and bias of an existing layer; see the class."""
        check_parts(linear.weight.shape[1], head_dim, enable_lora)
        layer = cls.__new__(cls)
        adopt(layer, linear)
        layer._begin(r, lora_alpha, lora_dropout)
        layer._create_branch(
            head_dim, enable_lora, False, lora_plus_scale, dtype or paddle.get_default_dtype()
        )
        layer.name = layer._name
        mark_slice(layer.lora_B, layer.is_mp, axis=1)
        return layer

    def forward(self, input: paddle.Tensor) -> paddle.Tensor:
        """[..., in] → [..., out / N], or [..., out] when the layer gathers its output."""
        result = ColumnParallelLinear.forward(self, input)
        if self.disable_lora or self.merged:
            return result
        branch = self.project(_identity(self, self.reduce(input)), self.lora_B)
        return add_branch(result, _gather(self, branch))


def _identity(layer: ColumnParallelLinear, h: paddle.Tensor) -> paddle.Tensor:
    """What is passed in; its gradient is summed over the ranks, each of which sees only its
    columns.
    """
    return mp_ops._c_identity(h, group=layer.model_parallel_group) if layer.is_mp else h


def _gather(layer: ColumnParallelLinear, branch: paddle.Tensor) -> paddle.Tensor:
    if layer.is_mp and layer.gather_output:
        return mp_ops._c_concat(branch, group=layer.model_parallel_group)
    return branch
