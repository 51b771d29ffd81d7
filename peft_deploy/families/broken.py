"""Models whose classes in PaddleNLP fail on the Paddle that this package works with.

Nothing can be checked against a model that does not run, so no stand-in was written for any of them. What is said
here was found by running small models under paddlenlp 3.0.0b4 and paddlepaddle 3.3; a test runs them again, and
turns red when a newer release has mended one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

_GATE = (
    "its gate to the experts multiplies int64 by int32 numbers (TopKGate's running counts by their mask), "
    "which Paddle refuses to mix"
)


@dataclass(frozen=True)
class BrokenModel:
    """A model that does not run.

    Args:
        model_type: as config.json has it.
        reason: what fails in PaddleNLP's class.
    """

    model_type: str
    reason: str


# By architecture.
BROKEN: Mapping[str, BrokenModel] = {
    "MixtralForCausalLM": BrokenModel(
        "mixtral",
        "it multiplies what an expert gives, [tokens, hidden_size], by weights that Paddle's indexing hands over as "
        "[tokens] and no longer as [tokens, 1]",
    ),
    "Qwen2MoeForCausalLM": BrokenModel("qwen2_moe", _GATE),
    "DeepseekV2ForCausalLM": BrokenModel("deepseek_v2", _GATE),
    "DeepseekV3ForCausalLM": BrokenModel("deepseek_v3", _GATE),
    "GPTJForCausalLM": BrokenModel(
        "gptj",
        "it runs only with an attention mask, and without one compares the tokens with a padding token that it does "
        "not have; it has no stand-in here either",
    ),
    "YuanForCausalLM": BrokenModel(
        "yuan",
        "it takes no mask that covers its cache and the new tokens, attends to padding on the left, and keeps a "
        "third tensor in every layer's cache",
    ),
}


def find_broken(architectures: list[str], model_type: object) -> tuple[str, BrokenModel] | None:
    """The first named architecture that is known not to run, or the one of a type when none is named.

    Args:
        architectures: config.json's.
        model_type: config.json's.
    """
    for name in architectures:
        if name in BROKEN:
            return name, BROKEN[name]
    if not architectures:
        for name, broken in BROKEN.items():
            if broken.model_type == model_type:
                return name, broken
    return None
