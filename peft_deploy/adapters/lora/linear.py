"""LoRALinear: a linear layer with a low-rank branch beside its frozen weight."""

from __future__ import annotations

import math
from typing import Any

import paddle
from paddle import nn
from paddle.nn import functional

from peft_deploy.adapters.arrays import to_array
from peft_deploy.adapters.lora.layer import LoRALayer, check_rank
from peft_deploy.config import LoRAConfigError
from peft_deploy.weights.lora import LoraPair


def kaiming_uniform() -> nn.initializer.Initializer:
    """How A starts (arXiv 2106.09685, as in its published code)."""
    return nn.initializer.KaimingUniform(negative_slope=math.sqrt(5), nonlinearity="leaky_relu")


def zeros(learning_rate: float = 1.0) -> paddle.ParamAttr:
    """How B starts, and its relative learning rate (LoRA+, arXiv 2402.12354)."""
    return paddle.ParamAttr(initializer=nn.initializer.Constant(0.0), learning_rate=learning_rate)


def refuse_variants(lora_use_mixer: bool, use_mora: bool) -> None:
    """Refuses the variants that are not implemented, by name.

    Raises:
        LoRAConfigError: one of them is switched on.
    """
    if lora_use_mixer or use_mora:
        name = "use_mora (MoRA)" if use_mora else "lora_use_mixer (MosLoRA)"
        raise LoRAConfigError(f"{name} is not supported")


class LowRankLayer(LoRALayer):
    """A LoRA layer whose branch is ``scaling · dropout(x) @ A @ B`` with A [in, R] and B [R, out]."""

    def get_delta_weight(
        self,
        lora_A: paddle.Tensor | None = None,
        lora_B: paddle.Tensor | None = None,
        lora_AB: paddle.Tensor | None = None,
    ) -> paddle.Tensor:
        """``scaling · A @ B`` [in, out] in the type of A, accumulated in float32 or better.

        Args:
            lora_A: in place of the layer's own, [in, R].
            lora_B: in place of the layer's own, [R, out].
            lora_AB: not supported (the mixer's matrix).
        """
        refuse_variants(lora_AB is not None, use_mora=False)
        A = self.lora_A if lora_A is None else lora_A
        B = self.lora_B if lora_B is None else lora_B
        wide = "float64" if A.dtype == paddle.float64 else "float32"
        return (A.astype(wide) @ B.astype(wide) * self.scaling).astype(A.dtype)

    def reduce(self, input: paddle.Tensor) -> paddle.Tensor:
        """``scaling · dropout(x) @ A``, in the type of A: [..., in] → [..., R]."""
        x = self.lora_dropout(input)
        if x.dtype != self.lora_A.dtype:
            x = x.astype(self.lora_A.dtype)
        return x @ self.lora_A * self.scaling

    def _pair(self) -> LoraPair:
        return LoraPair(to_array(self.lora_A), to_array(self.lora_B), self.scaling)


class LoRALinear(LowRankLayer, nn.Linear):  # type: ignore[misc]
    """``y = x @ W + b + scaling · dropout(x) @ A @ B`` with W [in, out], A [in, R], B [R, out].

    W is frozen; the bias keeps its state. The scaling is alpha / R, with rsLoRA alpha / sqrt(R)
    and with PiSSA 1.

    Args:
        in_features: size of the last axis of the input.
        out_features: size of the last axis of the output.
        r: rank R.
        lora_alpha: numerator of the scaling.
        lora_dropout: probability of zeroing an input of the branch while training.
        use_quick_lora: accepted; the reference's hand-written backward gives the same numbers.
        rslora: rank-stabilized scaling.
        lora_plus_scale: learning rate of B relative to that of A.
        pissa: A and B start as the principal part of W, W as the rest.
        lora_use_mixer: not supported.
        use_mora: not supported.
        linear_kwargs: what ``paddle.nn.Linear`` takes (``weight_attr``, ``bias_attr``, ``name``).

    Raises:
        LoRAConfigError: the rank is not a positive integer, or an unsupported variant is on.

    Example:
        >>> layer = LoRALinear(16, 8, r=4, lora_alpha=8)
        >>> layer.scaling
        2.0
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 0,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        use_quick_lora: bool = False,
        rslora: bool = False,
        lora_plus_scale: float = 1.0,
        pissa: bool = False,
        lora_use_mixer: bool = False,
        use_mora: bool = False,
        **linear_kwargs: Any,
    ) -> None:
        check_rank(r)
        refuse_variants(lora_use_mixer, use_mora)
        nn.Linear.__init__(self, in_features, out_features, **linear_kwargs)
        self._begin(r, lora_alpha, lora_dropout, rslora=rslora, pissa=pissa)
        self._create_branch(lora_plus_scale, pissa, self._dtype)

    @classmethod
    def wrap(
        cls,
        linear: nn.Linear,
        *,
        r: int,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        rslora: bool = False,
        lora_plus_scale: float = 1.0,
        pissa: bool = False,
        dtype: str | None = None,
    ) -> LoRALinear:
        """A LoRA layer that shares the weight and bias of an existing layer, which stays as it is.

        Args:
            linear: the layer; no second weight is allocated.
            r: rank R.
            lora_alpha: numerator of the scaling.
            lora_dropout: dropout of the branch.
            rslora: rank-stabilized scaling.
            lora_plus_scale: learning rate of B relative to that of A.
            pissa: start from the principal part of the weight.
            dtype: of A and B, None for Paddle's default.
        """
        layer = cls.__new__(cls)
        adopt(layer, linear)
        layer._begin(r, lora_alpha, lora_dropout, rslora=rslora, pissa=pissa)
        layer._create_branch(lora_plus_scale, pissa, dtype or paddle.get_default_dtype())
        return layer

    def _create_branch(self, lora_plus_scale: float, pissa: bool, dtype: str) -> None:
        inputs, outputs = self.weight.shape
        self.lora_A = self.create_parameter(
            [inputs, self.r], dtype=dtype, default_initializer=kaiming_uniform()
        )
        self.lora_B = self.create_parameter(
            [self.r, outputs], dtype=dtype, attr=zeros(lora_plus_scale)
        )
        if pissa:
            self._start_from_principal_part()

    def forward(self, input: paddle.Tensor, *args: Any, **kwargs: Any) -> paddle.Tensor:
        """[..., in] → [..., out]; further arguments are ignored, as in the reference."""
        result = functional.linear(input, self.weight, self.bias, self.name)
        if self.disable_lora or self.merged:
            return result
        return add_branch(result, self.reduce(input) @ self.lora_B)

    def extra_repr(self) -> str:
        """What ``print(layer)`` shows between the brackets."""
        name = f", name={self.name}" if self.name else ""
        inputs, outputs = self.weight.shape
        return f"in_features={inputs}, out_features={outputs}, rank={self.r}{name}"


def adopt(layer: nn.Layer, module: nn.Layer) -> None:
    """Makes ``layer``, which was created without its initializer, share everything that ``module``
    has.

    Parameters are the same objects; the tables that hold them are new, so that adding A and B to
    the one leaves the other alone. Hooks and the training flag come along.
    """
    nn.Layer.__init__(layer)
    own = {"_full_name", "_helper", "_parameters", "_buffers", "_sub_layers", "forward"}
    for key, value in module.__dict__.items():
        if key not in own:
            layer.__dict__[key] = value
    for table in ("_parameters", "_buffers", "_sub_layers"):
        getattr(layer, table).update(getattr(module, table))


def add_branch(result: paddle.Tensor, branch: paddle.Tensor) -> paddle.Tensor:
    """The sum, in the type of the base layer's result."""
    return result + (branch if branch.dtype == result.dtype else branch.astype(result.dtype))
