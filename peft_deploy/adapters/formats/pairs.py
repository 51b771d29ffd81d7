"""From the tensors of an adapter's file to pairs of matrices, and everything that can be wrong
with them.
"""

from __future__ import annotations

from collections.abc import Mapping

from peft_deploy.adapters.formats.fused import spread_parts
from peft_deploy.config import LoRAConfig, match_pattern
from peft_deploy.errors import AdapterError, listed
from peft_deploy.weights.lora import LoraPair
from peft_deploy.weights.source import Array

SUFFIX_A = ".lora_A"
SUFFIX_B = ".lora_B"
# Tensors that only a variant which is not supported has.
_FOREIGN = {
    ".lora_AB": "the MosLoRA mixer",
    "_quanter._scale": "quantization-aware training",
    ".lora_magnitude_vector": "DoRA",
}


def build_pairs(
    state: Mapping[str, Array], config: LoRAConfig, where: str
) -> tuple[dict[str, LoraPair], dict[str, Array]]:
    """The pairs by module, and the tensors that replace a parameter as a whole.

    Args:
        state: the tensors of the file.
        config: the adapter's options; its rank has to be that of the matrices.
        where: what the tensors were read from, for messages.

    Raises:
        AdapterError: half a pair, a rank that is not the configuration's, matrices that do not fit
            each other, element types that differ, tensors of a variant that is not supported, or
            no pair at all.
    """
    _refuse_foreign(state, where)
    modules = [name.removesuffix(SUFFIX_A) for name in state if name.endswith(SUFFIX_A)]
    with_B = [name.removesuffix(SUFFIX_B) for name in state if name.endswith(SUFFIX_B)]
    halves = [m + SUFFIX_A for m in set(modules) - set(with_B)]
    halves += [m + SUFFIX_B for m in set(with_B) - set(modules)]
    if halves:
        raise AdapterError(f"{where}: one half of the pair is missing beside:\n{listed(halves)}")
    if not modules and config.target_patterns:
        raise AdapterError(f"{where} holds no lora_A and lora_B at all")
    pairs = {m: _pair(m, state[m + SUFFIX_A], state[m + SUFFIX_B], config, where) for m in modules}
    types = {array.dtype.name for pair in pairs.values() for array in (pair.A, pair.B)}
    if len(types) > 1:
        raise AdapterError(
            f"{where} mixes the element types {', '.join(sorted(types))} in lora_A and lora_B"
        )
    replacements = {n: a for n, a in state.items() if not n.endswith((SUFFIX_A, SUFFIX_B))}
    return pairs, replacements


def _refuse_foreign(state: Mapping[str, Array], where: str) -> None:
    for suffix, feature in _FOREIGN.items():
        found = [name for name in state if name.endswith(suffix)]
        if found:
            raise AdapterError(
                f"{where} was made with {feature}, which is not supported:\n{listed(found)}"
            )


def _pair(module: str, A: Array, B: Array, config: LoRAConfig, where: str) -> LoraPair:
    shapes = f"{where}: {module} has lora_A {list(A.shape)} and lora_B {list(B.shape)}"
    if A.ndim == B.ndim == 4:
        if A.shape[0] != B.shape[1] or B.shape[2:] != (1, 1):
            raise AdapterError(f"{shapes}; a convolution needs [R, in, k, k] and [out, R, 1, 1]")
        rank = A.shape[0]
        A, B = B.reshape(B.shape[0], rank), A.reshape(rank, -1)
    elif A.ndim == B.ndim == 2:
        parts = _parts_of(module, config)
        rank = B.shape[0]
        if parts is not None and config.head_dim is not None:
            B = spread_parts(B, parts, config.head_dim)
        if A.shape[1] != B.shape[0]:
            raise AdapterError(f"{shapes}; the rank in the middle has to be the same")
    else:
        raise AdapterError(f"{shapes}; both have to be matrices")
    if rank != config.r:
        raise AdapterError(
            f"{shapes}, of rank {rank}; its lora_config.json says r = {config.r}",
            hint="the configuration and the weights come from different runs",
        )
    return LoraPair(A, B, config.scaling)


def _parts_of(module: str, config: LoRAConfig) -> list[bool] | None:
    """Which fused parts of a module are adapted; None for an ordinary layer."""
    for pattern, parts in zip(config.target_patterns, config.enabled_parts(), strict=True):
        if parts is not None and match_pattern(pattern, [module]):
            return parts
    return None
