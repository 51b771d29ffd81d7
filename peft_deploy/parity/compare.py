"""How far one array is from another.

Special values: equal infinities are equal. A NaN is never equal to anything, not even to a NaN: an
output that is not a number proves nothing. Either one makes the error infinite, so that no limit
admits it. They are looked for at padding, too, where values do not count: a NaN there comes back
through the cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Bools = npt.NDArray[np.bool_]


# The bins of an error histogram: [0, 1e-12), [1e-12, 1e-11), … [0.1, 1), [1, ∞) of the scale.
DECADES: tuple[float, ...] = tuple(10.0**power for power in range(-12, 1))
TOP = 5
_COUNTED = 1 << 18  # elements of one output that a histogram counts at most


@dataclass(frozen=True)
class Difference:
    """Metrics of one output of one case; only real tokens count.

    Args:
        max_abs: largest absolute difference.
        mean_abs: mean of the absolute differences.
        p99_abs: their 99th percentile.
        scale: the largest finite magnitude that was expected; ``max_abs / scale`` is the relative
            error.
        cosine: of the two arrays, flattened.
        index: where the largest difference is, in the output's own axes.
        expected: the value there on the reference.
        actual: the value there on the other side.
        unequal_specials: NaNs, and infinities that are not the same on both sides.
        top1: share of the tokens with the same most likely next token; None for other outputs than
            logits.
        kl: largest Kullback-Leibler divergence of a token's next-token distribution, in nats; None
            likewise.
        top5: share of the reference's five most likely next tokens that are among the other
            side's five, over all tokens; None likewise.
        histogram: how many errors lie in each of :data:`DECADES`, by powers of ten of the scale;
            of very large outputs, evenly spread elements are counted.
    """

    max_abs: float
    mean_abs: float
    p99_abs: float
    scale: float
    cosine: float
    index: tuple[int, ...]
    expected: float
    actual: float
    unequal_specials: int = 0
    top1: float | None = None
    kl: float | None = None
    top5: float | None = None
    histogram: tuple[int, ...] = ()

    @property
    def relative_max(self) -> float:
        """``max_abs`` in units of the scale."""
        return _ratio(self.max_abs, self.scale)

    @property
    def relative_mean(self) -> float:
        """``mean_abs`` in units of the scale."""
        return _ratio(self.mean_abs, self.scale)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready form; what is not finite becomes a string."""
        plain = {name: getattr(self, name) for name in self.__dataclass_fields__}
        plain |= {"relative_max": self.relative_max, "relative_mean": self.relative_mean}
        plain["index"] = list(self.index)
        plain["histogram"] = list(self.histogram)
        return {name: json_number(value) for name, value in plain.items() if value is not None}


def json_number(value: Any) -> Any:
    """The value, or its name where JSON has no such number."""
    return str(value) if isinstance(value, float) and not np.isfinite(value) else value


def _ratio(part: float, whole: float) -> float:
    if whole > 0:
        return part / whole
    return 0.0 if part == 0 else float("inf")


def measure(
    expected: Floats,
    actual: Floats,
    counts: Bools,
    *,
    axis: int | None,
    logits: bool,
    brief: bool = False,
) -> Difference:
    """The difference of one output.

    Args:
        expected: the logits [B, S, V], a cache tensor [B, K, T, D], or another output of a batch.
        actual: the same of the other side, of the same shape.
        counts: which tokens count, [B, S] or [B, T]; at least one. Without tokens, which rows, [B].
        axis: along which the tokens lie; None where there is one value a row.
        logits: whether the last axis holds the scores of tokens or classes, one of which is to be
            chosen.
        brief: leave out what no limit depends on (percentile, cosine, next token).
    """
    shape = [1] * expected.ndim
    shape[0] = len(counts)
    if axis is not None:
        shape[axis] = counts.shape[1]
    errors = _absolute_errors(expected, actual, counts.reshape(shape))
    index = np.unravel_index(int(np.argmax(errors)), errors.shape)
    want, have, counted = (
        (values if axis is None else np.moveaxis(values, axis, 1))[counts]  # [N, V] or [N, K, D]
        for values in (expected, actual, errors)
    )
    finite = np.abs(want[np.isfinite(want)])
    scale = float(finite.max()) if finite.size else 0.0
    top1, top5, kl = _next_token(want, have) if logits and not brief else (None, None, None)
    return Difference(
        max_abs=float(errors[index]),
        mean_abs=float(counted.mean(dtype=np.float64)),
        p99_abs=float("nan") if brief else _percentile(counted, 99),
        scale=scale,
        cosine=float("nan") if brief else cosine(want, have),
        index=tuple(int(i) for i in index),
        expected=float(expected[index]),
        actual=float(actual[index]),
        unequal_specials=int(np.count_nonzero(np.isinf(errors))),
        top1=top1,
        kl=kl,
        top5=top5,
        histogram=() if brief else _histogram(counted, scale),
    )


def _absolute_errors(expected: Floats, actual: Floats, keep: Bools) -> Floats:
    """|expected - actual| where ``keep`` is true, infinite at unequal specials, 0 elsewhere."""
    with np.errstate(invalid="ignore", over="ignore"):
        errors: Floats = np.abs(expected - actual)
    errors[expected == actual] = 0  # equal infinities, whose difference is not a number
    special = ~np.isfinite(errors)
    np.multiply(errors, keep, out=errors, where=~special)
    errors[special] = np.inf
    return errors


def _percentile(errors: Floats, percent: int) -> float:
    last = errors.size - 1
    rank = min(last, int(np.ceil(percent / 100 * errors.size)) - 1)
    return float(np.partition(errors.ravel(), rank)[rank])


def cosine(want: Floats, have: Floats) -> float:
    """Of two arrays, flattened; NaN when one of them is not finite."""
    a, b = want.ravel().astype(np.float64), have.ravel().astype(np.float64)
    norms = float(np.sqrt((a @ a) * (b @ b)))
    if not np.isfinite(norms):
        return float("nan")
    if norms == 0:
        return 1.0 if not a.any() and not b.any() else 0.0
    return float(a @ b) / norms


def _histogram(errors: Floats, scale: float) -> tuple[int, ...]:
    step = -(-errors.size // _COUNTED) | 1  # odd: dimensions are mostly even, and none is missed
    sample = errors.ravel()[::step].astype(np.float64)
    bins = np.searchsorted(np.array(DECADES) * (scale or 1.0), sample, side="right")
    return tuple(np.bincount(bins, minlength=len(DECADES) + 1).tolist())


def _next_token(want: Floats, have: Floats) -> tuple[float, float, float]:
    """Share of equal argmax, share of common tokens among the best, and the largest KL divergence,
    over tokens [N, V].
    """
    same = float((want.argmax(-1) == have.argmax(-1)).mean())
    common = _common(_best(want), _best(have))
    if not (np.isfinite(want).all() and np.isfinite(have).all()):
        return same, common, float("inf")
    p, q = log_softmax(want), log_softmax(have)
    return same, common, max(0.0, float((np.exp(p) * (p - q)).sum(-1).max()))


def _best(x: Floats) -> npt.NDArray[np.intp]:
    """The most likely tokens, [N, 5], in no order."""
    count = min(TOP, x.shape[-1])
    return np.argpartition(x, x.shape[-1] - count, axis=-1)[:, -count:]


def _common(one: npt.NDArray[np.intp], other: npt.NDArray[np.intp]) -> float:
    return float((one[:, :, None] == other[:, None, :]).any(-1).mean())


def log_softmax(x: Floats) -> npt.NDArray[np.float64]:
    """Over the last axis, in float64."""
    shifted = x.astype(np.float64) - x.max(-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)))
