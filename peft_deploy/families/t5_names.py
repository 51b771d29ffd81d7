"""Tensor names of T5, PaddleNLP's and Hugging Face's: the same but for what they begin with."""

from __future__ import annotations

from collections.abc import Iterator

from peft_deploy.families.names import NameMap, NameRule

ROOT = "t5."
ENCODER, DECODER = f"{ROOT}encoder.", f"{ROOT}decoder."
SHARED = f"{ROOT}shared.weight"
HEAD = "lm_head.weight"
CROSS = "layer.1.EncDecAttention."
_ATTENTION = ("q", "k", "v", "o")
_BIAS = "block.0.layer.0.SelfAttention.relative_attention_bias.weight"
# What checkpoints of T5's first release hold and no model uses.
_IGNORED = (
    r"(t5\.)?decoder\.block\.\d+\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",
)


class T5Names(NameMap):
    """The names of a model whose encoder and decoder may differ in depth.

    Args:
        gated: whether feed-forward blocks have a gate.
        encoder_layers: of the encoder; None where the configuration does not say.
        decoder_layers: likewise, of the decoder.
    """

    def __init__(
        self, *, gated: bool, encoder_layers: int | None, decoder_layers: int | None
    ) -> None:
        super().__init__(_rules(gated=gated), _IGNORED)
        self._layers = {ENCODER: encoder_layers, DECODER: decoder_layers}

    def indexed(self, template: str, num_layers: int) -> list[str]:
        """See :meth:`NameMap.indexed`; each half has its own number of layers, whatever is given."""
        halves = {half.removeprefix(ROOT): n for half, n in self._layers.items()}
        name = template.removeprefix(ROOT)
        own = (n for half, n in halves.items() if n is not None and name.startswith(half))
        return super().indexed(template, next(own, num_layers))


def _rules(*, gated: bool) -> Iterator[NameRule]:
    yield NameRule(SHARED, "shared.weight")
    yield NameRule(HEAD, HEAD, transpose=True)
    for half, feed_forward in ((ENCODER, "1"), (DECODER, "2")):
        yield _same(f"{half}embed_tokens.weight")
        yield _same(f"{half}final_layer_norm.weight")
        yield _same(f"{half}{_BIAS}")
        block = f"{half}block.{{i}}.layer."
        for name in _ATTENTION:
            yield _same(f"{block}0.SelfAttention.{name}.weight", linear=True)
        for name in ("wi_0", "wi_1", "wo") if gated else ("wi", "wo"):
            yield _same(f"{block}{feed_forward}.DenseReluDense.{name}.weight", linear=True)
        for part in range(int(feed_forward) + 1):
            yield _same(f"{block}{part}.layer_norm.weight")
    for name in _ATTENTION:
        yield _same(f"{DECODER}block.{{i}}.{CROSS}{name}.weight", linear=True)


def _same(paddle: str, *, linear: bool = False) -> NameRule:
    return NameRule(paddle, paddle.removeprefix(ROOT), transpose=linear)
