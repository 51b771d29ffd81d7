"""LoRAEmbedding: a table with a low-rank branch beside its frozen weight."""

from __future__ import annotations

from typing import Any

import paddle
from paddle import nn
from paddle.nn import functional

from peft_deploy.adapters.arrays import to_array
from peft_deploy.adapters.lora.layer import LoRALayer, check_rank
from peft_deploy.adapters.lora.linear import add_branch, adopt, kaiming_uniform, zeros
from peft_deploy.config import LoRAConfigError
from peft_deploy.weights.lora import LoraPair


class LoRAEmbedding(LoRALayer, nn.Embedding):  # type: ignore[misc]
    """``y = W[ids] + scaling · dropout(A[ids]) @ B`` with W [rows, E], A [rows, R], B [R, E].

    The row of ``padding_idx`` gets no change: its output is zero in Paddle.

    Args:
        num_embeddings: rows of the table.
        embedding_dim: E.
        r: rank R.
        lora_alpha: numerator of the scaling.
        lora_dropout: probability of zeroing an element of A[ids] while training.
        rslora: rank-stabilized scaling.
        lora_plus_scale: learning rate of B relative to that of A.
        embedding_kwargs: what ``paddle.nn.Embedding`` takes; not ``max_norm``, which rewrites the
            frozen weight.

    Raises:
        LoRAConfigError: the rank is not a positive integer, or ``max_norm`` is set.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        r: int = 0,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        rslora: bool = False,
        lora_plus_scale: float = 1.0,
        **embedding_kwargs: Any,
    ) -> None:
        check_rank(r)
        nn.Embedding.__init__(self, num_embeddings, embedding_dim, **embedding_kwargs)
        self._begin(r, lora_alpha, lora_dropout, rslora=rslora)
        self._create_branch(lora_plus_scale, self._dtype)

    @classmethod
    def wrap(
        cls,
        embedding: nn.Embedding,
        *,
        r: int,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        rslora: bool = False,
        lora_plus_scale: float = 1.0,
        dtype: str | None = None,
    ) -> LoRAEmbedding:
        """A LoRA layer that shares the weight of an existing layer; see the class for the
        arguments.
        """
        layer = cls.__new__(cls)
        adopt(layer, embedding)
        layer._begin(r, lora_alpha, lora_dropout, rslora=rslora)
        layer._create_branch(lora_plus_scale, dtype or paddle.get_default_dtype())
        return layer

    def _create_branch(self, lora_plus_scale: float, dtype: str) -> None:
        if self._max_norm is not None:
            raise LoRAConfigError(
                "an embedding with max_norm rewrites its weight; LoRA keeps it frozen"
            )
        rows, size = self.weight.shape
        self.lora_A = self.create_parameter(
            [rows, self.r], dtype=dtype, default_initializer=kaiming_uniform()
        )
        self.lora_B = self.create_parameter(
            [self.r, size], dtype=dtype, attr=zeros(lora_plus_scale)
        )

    def get_delta_weight(self) -> paddle.Tensor:
        """``scaling · A @ B`` [rows, E] in the type of A, zero in the row of ``padding_idx``."""
        wide = "float64" if self.lora_A.dtype == paddle.float64 else "float32"
        ids = paddle.arange(self.lora_A.shape[0])
        A = functional.embedding(ids, self.lora_A.astype(wide), padding_idx=self._padding_idx)
        return (A @ self.lora_B.astype(wide) * self.scaling).astype(self.lora_A.dtype)

    def forward(self, input: paddle.Tensor, *args: Any, **kwargs: Any) -> paddle.Tensor:
        """[...] of row numbers → [..., E]."""
        result = nn.Embedding.forward(self, input)
        if self.disable_lora or self.merged:
            return result
        picked = functional.embedding(
            input, self.lora_A, padding_idx=self._padding_idx
        )  # [..., R]
        return add_branch(result, self.lora_dropout(picked) @ self.lora_B * self.scaling)

    def _pair(self) -> LoraPair:
        A = to_array(self.lora_A)
        if self._padding_idx is not None:
            A[self._padding_idx] = 0
        return LoraPair(A, to_array(self.lora_B), self.scaling)

    def extra_repr(self) -> str:
        """What ``print(layer)`` shows between the brackets."""
        return f"{nn.Embedding.extra_repr(self)}, rank={self.r}"
