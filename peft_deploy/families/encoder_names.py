"""Tensor names of encoders, PaddleNLP's and Hugging Face's."""

from __future__ import annotations

from collections.abc import Iterator

from peft_deploy.families.names import MappedName, NameMap, NameRule

_EMBEDDINGS = ("word_embeddings", "position_embeddings")
_LINEARS = {
    "self_attn.q_proj": "attention.self.query",
    "self_attn.k_proj": "attention.self.key",
    "self_attn.v_proj": "attention.self.value",
    "self_attn.out_proj": "attention.output.dense",
    "linear1": "intermediate.dense",
    "linear2": "output.dense",
}
_NORMS = {"norm1": "attention.output.LayerNorm", "norm2": "output.LayerNorm"}
# What checkpoints from TensorFlow's BERT call weight and bias of a layer norm.
_OLD_NAMES = {".gamma": ".weight", ".beta": ".bias"}


class EncoderNames(NameMap):
    """The same, with the old names of layer norms understood in Hugging Face checkpoints."""

    def to_paddle(self, huggingface: str) -> MappedName | None:
        """See :meth:`NameMap.to_paddle`."""
        for old, new in _OLD_NAMES.items():
            if huggingface.endswith(old):
                return super().to_paddle(huggingface.removesuffix(old) + new)
        return super().to_paddle(huggingface)


def linear_rules(paddle: str, huggingface: str) -> Iterator[NameRule]:
    """Weight and bias of a linear layer."""
    yield NameRule(f"{paddle}.weight", f"{huggingface}.weight", transpose=True)
    yield NameRule(f"{paddle}.bias", f"{huggingface}.bias")


def norm_rules(paddle: str, huggingface: str) -> Iterator[NameRule]:
    """Weight and bias of a layer norm."""
    yield NameRule(f"{paddle}.weight", f"{huggingface}.weight")
    yield NameRule(f"{paddle}.bias", f"{huggingface}.bias")


def encoder_rules(
    prefix: str, *, token_types: bool, task_types: bool, pooler: bool
) -> Iterator[NameRule]:
    """The parameters of an encoder without its head.

    Args:
        prefix: what stands before all names, on both sides.
        token_types: whether it has embeddings of segments.
        task_types: whether it has embeddings of tasks.
        pooler: whether it has a pooler.
    """
    tables = [*_EMBEDDINGS]
    tables += ["token_type_embeddings"] if token_types else []
    tables += ["task_type_embeddings"] if task_types else []
    for table in tables:
        name = f"{prefix}embeddings.{table}.weight"
        yield NameRule(name, name)
    yield from norm_rules(f"{prefix}embeddings.layer_norm", f"{prefix}embeddings.LayerNorm")
    ours, theirs = f"{prefix}encoder.layers.{{i}}.", f"{prefix}encoder.layer.{{i}}."
    for paddle, huggingface in _LINEARS.items():
        yield from linear_rules(ours + paddle, theirs + huggingface)
    for paddle, huggingface in _NORMS.items():
        yield from norm_rules(ours + paddle, theirs + huggingface)
    if pooler:
        yield from linear_rules(f"{prefix}pooler.dense", f"{prefix}pooler.dense")


def tied_rules(decoder: str, bias: tuple[str, str]) -> Iterator[NameRule]:
    """The output layer of a masked language model, whose matrix is that of the word embeddings.

    Args:
        decoder: its name, the same on both sides.
        bias: PaddleNLP's and Hugging Face's name of the bias, beside the one inside the layer.
    """
    yield NameRule(*bias)
    for name in (f"{decoder}.weight", f"{decoder}.bias"):
        yield NameRule(name, name)
