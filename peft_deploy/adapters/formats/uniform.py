"""One rank and one scaling for all modules of an adapter, which is all that PaddleNLP's format can say.

Smaller ranks are padded with zeros, which changes no product. Other scalings go into B: exact where the quotient of
the two is a power of two, otherwise each element is rounded once to float32 (to float64 where B is).
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from peft_deploy.adapters.formats.adapter import Adapter
from peft_deploy.adapters.formats.pairs import SUFFIX_A, SUFFIX_B
from peft_deploy.adapters.provenance import Provenance
from peft_deploy.config import LoRAConfig
from peft_deploy.errors import AdapterError, listed
from peft_deploy.weights.cast import cast_array
from peft_deploy.weights.lora import LoraPair
from peft_deploy.weights.source import Array

_NARROW = ("float16", "bfloat16")


@dataclass(frozen=True)
class UniformLora:
    """Pairs that share a rank and a scaling.

    Args:
        rank: R, the largest of the original ones.
        scaling: the one with which fewest elements of B had to be rounded.
        pairs: module → A [in, R] and B [R, out].
        padded: modules whose rank was smaller.
        folded: modules whose scaling went into B.
    """

    rank: int
    scaling: float
    pairs: Mapping[str, LoraPair]
    padded: tuple[str, ...]
    folded: tuple[str, ...]

    @property
    def state(self) -> dict[str, Array]:
        """The tensors under PaddleNLP's names."""
        return {
            name: array
            for module, pair in self.pairs.items()
            for name, array in ((module + SUFFIX_A, pair.A), (module + SUFFIX_B, pair.B))
        }


def make_uniform(pairs: Mapping[str, LoraPair]) -> UniformLora:
    """The same products scaling · A · B with one rank and one scaling; arrays that fit stay as they are.

    A and B of 16 bits become float32 where a scaling cannot go into B exactly.
    """
    rank = max((pair.rank for pair in pairs.values()), default=1)
    scaling = _shared_scaling(pair.scaling for pair in pairs.values())
    folded = {
        m: scaled(p.B, p.scaling / scaling) for m, p in pairs.items() if p.scaling != scaling
    }
    wide = any(
        pairs[m].B.dtype.name in _NARROW and B.dtype == np.float32 for m, B in folded.items()
    )
    result = {}
    for module, pair in pairs.items():
        A, B = pair.A, folded.get(module, pair.B)
        if wide:
            A, B = cast_array(A, "float32"), cast_array(B, "float32")
        result[module] = pad_rank(LoraPair(A, B, scaling), rank)
    padded = tuple(module for module, pair in pairs.items() if pair.rank < rank)
    return UniformLora(rank, scaling, result, padded, tuple(folded))


def pad_rank(pair: LoraPair, rank: int) -> LoraPair:
    """The pair with zeros behind A's columns and B's rows; the product stays the same to the bit."""
    missing = rank - pair.rank
    if not missing:
        return pair
    A = np.concatenate([pair.A, np.zeros((pair.A.shape[0], missing), pair.A.dtype)], axis=1)
    B = np.concatenate([pair.B, np.zeros((missing, pair.B.shape[1]), pair.B.dtype)], axis=0)
    return LoraPair(A, B, pair.scaling)


def scaled(B: Array, factor: float) -> Array:
    """``factor`` · B: of B's type where that holds it exactly or has at least 32 bits, else float32."""
    product = B.astype(np.float64) * factor
    if B.dtype.name not in _NARROW:
        return cast_array(product, B.dtype.name, name="the scaled B")
    with np.errstate(over="ignore"):
        same = product.astype(B.dtype)
    if np.array_equal(same.astype(np.float64), product):
        return same
    return cast_array(product, "float32", name="the scaled B")


def alpha_for(scaling: float, rank: int) -> int | float:
    """The lora_alpha with which alpha / rank is the scaling; an integer where that is one."""
    alpha = scaling * rank
    near = (alpha, math.nextafter(alpha, math.inf), math.nextafter(alpha, -math.inf))
    best = next((x for x in near if x / rank == scaling), alpha)
    return int(best) if best.is_integer() and abs(best) < 2**53 else best


def adapter_of_pairs(
    path: Path,
    pairs: Mapping[str, LoraPair],
    replacements: Mapping[str, Array],
    *,
    num_layers: int | None = None,
    declared: LoRAConfig | None = None,
    provenance: Provenance | None = None,
) -> Adapter:
    """An adapter of another format; its options and ``state`` are those that PaddleNLP's format would have.

    Args:
        path: what it was read from.
        pairs: PaddleNLP's module → its own A, B and scaling.
        replacements: PaddleNLP's parameter → the tensor that takes its place.
        num_layers: L, where it is known; makes the patterns of target_modules short.
        declared: options to keep where they agree with the pairs: r, lora_alpha and rslora, the rest anyway.
        provenance: where it comes from.
    """
    uniform = make_uniform(pairs)
    declared = declared or LoRAConfig()
    if (uniform.rank, uniform.scaling) == (declared.r, declared.scaling):
        r, alpha, rslora = declared.r, declared.lora_alpha, declared.rslora
    else:
        r, alpha, rslora = uniform.rank, alpha_for(uniform.scaling, uniform.rank), False
    state = {**uniform.state, **replacements}
    config = LoRAConfig(
        r=r,
        lora_alpha=alpha,
        rslora=rslora,
        lora_dropout=declared.lora_dropout,
        target_modules=exact_patterns(pairs, num_layers),
        trainable_modules=[re.escape(name) for name in sorted(replacements)] or None,
        dtype=next((pair.A.dtype.name for pair in uniform.pairs.values()), None),
        base_model_name_or_path=declared.base_model_name_or_path,
    )
    return Adapter(path, config, state, dict(pairs), dict(replacements), provenance)


def exact_patterns(modules: Iterable[str], num_layers: int | None) -> list[str]:
    r"""Regular expressions that match these modules of a model and no other.

    Args:
        modules: their dotted names.
        num_layers: L; where all layers have the module, ``\d+`` stands for the index.
    """
    by_template: dict[tuple[str, str], list[int]] = defaultdict(list)
    patterns: list[str] = []
    for module in modules:
        numbered = re.fullmatch(r"((?:[^.\d][^.]*\.)+)(\d+)((?:\.[^.\d][^.]*)+)", module)
        if numbered is None:
            patterns.append(re.escape(module))
        else:
            by_template[numbered[1], numbered[3]].append(int(numbered[2]))
    for (before, after), indices in by_template.items():
        every = num_layers is not None and sorted(indices) == list(range(num_layers))
        index = r"\d+" if every else f"({'|'.join(map(str, sorted(indices)))})"
        patterns.append(f"{re.escape(before)}{index}{re.escape(after)}")
    return sorted(patterns)


def refuse_both(
    pairs: Mapping[str, LoraPair], replacements: Mapping[str, Array], where: object
) -> None:
    """Passes when no parameter has both a pair and a whole tensor.

    Raises:
        AdapterError: some have; most formats can hold only one of the two.
    """
    both = [name for name in replacements if name.removesuffix(".weight") in pairs]
    if both:
        raise AdapterError(
            f"{where} replaces weights and adapts them with LoRA too, which this format "
            f"cannot represent:\n{listed(both)}",
            hint="merge the adapter into the base model instead",
        )


def _shared_scaling(scalings: Iterable[float]) -> float:
    """The scaling that most modules can take exactly; among equals, the one that most have."""
    counts = Counter(scalings)
    candidates = [s for s in counts if s] or [1.0]
    return max(candidates, key=lambda s: (_exact(counts, s), counts[s]))


def _exact(counts: Mapping[float, int], scaling: float) -> int:
    return sum(
        count
        for other, count in counts.items()
        if not other or abs(math.frexp(other / scaling)[0]) == 0.5
    )
