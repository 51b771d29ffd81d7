"""What a lower precision costs: the bundle against the model as it was trained, in float32.

The other checks compare a bundle with the very numbers that it holds. This one has no limit and fails nothing; it says
what the numbers themselves have lost, on a text that is longer than those of the cases.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from peft_deploy.parity.cases import Text
from peft_deploy.parity.compare import cosine, json_number, log_softmax
from peft_deploy.parity.play import Results, read_text
from peft_deploy.runtime.runner import Runner
from peft_deploy.signature import LOGITS, cross_names, present_names

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Loss:
    """The distance of a bundle from the model in float32, on one text.

    Args:
        precision: of the bundle.
        tokens: of the text.
        real_text: whether the text is real; random tokens stand in its place without a tokenizer.
        kl: mean Kullback-Leibler divergence of the next-token distributions, in nats; None for a model that
            predicts no tokens.
        kl_max: the largest of them; None likewise.
        top1: share of the positions with the same most likely token, or of the rows with the same class.
        perplexity: of the text under the bundle; None likewise.
        perplexity_fp32: under the model in float32; None likewise.
        cosine: output → cosine of both sides, for outputs other than the cache.
    """

    precision: str
    tokens: int
    real_text: bool
    kl: float | None = None
    kl_max: float | None = None
    top1: float | None = None
    perplexity: float | None = None
    perplexity_fp32: float | None = None
    cosine: Mapping[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready form; what does not apply is left out."""
        plain = {key: json_number(value) for key, value in asdict(self).items()}
        plain["cosine"] = {name: json_number(value) for name, value in self.cosine.items()}
        return {key: value for key, value in plain.items() if value is not None}

    def sentence(self) -> str:
        """All of it for people."""
        what = f"{self.tokens} {'' if self.real_text else 'random '}tokens"
        if self.kl is None:
            near = ", ".join(f"{name} {value:.6f}" for name, value in self.cosine.items())
            return f"{self.precision} against fp32 on {what}: cosine of {near}."
        return (
            f"{self.precision} against fp32 on {what}: KL divergence {self.kl:.2g} nats (at most {self.kl_max:.2g}), "
            f"the same most likely token at {100 * (self.top1 or 0):.1f} %, perplexity {self.perplexity:.4g} "
            f"(fp32 {self.perplexity_fp32:.4g})."
        )


def measure_loss(
    bundle: Runner, known: Results, text: Text, *, precision: str, real_text: bool
) -> Loss:
    """Reads a text with a bundle and compares.

    Args:
        bundle: the exported model.
        known: what the model in float32 gives for the text.
        text: what is read.
        precision: of the bundle.
        real_text: whether the text is real.
    """
    have, want = read_text(bundle, text).outputs(), known.outputs()
    caches = {*present_names(len(want)), *cross_names(len(want))}
    names = [name for name in want if name not in caches]
    near = {name: cosine(want[name], have[name]) for name in names or list(want)[:1]}
    loss = Loss(precision, len(text), real_text, cosine=near)
    if LOGITS not in want:
        return loss
    logits, exact = have[LOGITS][0], want[LOGITS][0]
    same = float((logits.argmax(-1) == exact.argmax(-1)).mean())
    if not bundle.signature.past:  # classes
        return Loss(precision, len(text), real_text, top1=same, cosine=near)
    p, q = log_softmax(exact), log_softmax(logits)
    divergence = np.maximum((np.exp(p) * (p - q)).sum(-1), 0)
    following = np.asarray(text.ids[1:], np.int64)[:, None]
    perplexities = [
        float(np.exp(-np.take_along_axis(side[:-1], following, -1).mean())) for side in (q, p)
    ]
    return Loss(
        precision,
        len(text),
        real_text,
        kl=float(divergence.mean()),
        kl_max=float(divergence.max()),
        top1=same,
        perplexity=perplexities[0],
        perplexity_fp32=perplexities[1],
        cosine=near,
    )
