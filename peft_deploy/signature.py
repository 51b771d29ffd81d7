"""Names, order, dtypes and symbolic dimensions of a graph's inputs and outputs.

The only module that spells these names. Tracing, conversion, bundle, runtime and parity all take them from here,
so that a graph, its ``genai_config.json`` and the loop that feeds it cannot disagree.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

INPUT_IDS = "input_ids"
ATTENTION_MASK = "attention_mask"
POSITION_IDS = "position_ids"
TOKEN_TYPE_IDS = "token_type_ids"
ADAPTER_IDS = "adapter_ids"  # [batch]: which adapter of a bank each row uses; 0 is none
LOGITS = "logits"
START_LOGITS = "start_logits"
END_LOGITS = "end_logits"
LAST_HIDDEN_STATE = "last_hidden_state"
SENTENCE_EMBEDDING = "sentence_embedding"

# What an encoder reads, as a model of encoder and decoder calls it beside its decoder's own inputs.
ENCODER_INPUT_IDS = "encoder_input_ids"
ENCODER_ATTENTION_MASK = "encoder_attention_mask"

BATCH = "batch"
SOURCE = "source"  # tokens that an encoder reads before a decoder writes
SEQUENCE = "sequence"  # new tokens of this call
PAST = "past"  # tokens in the cache, a prefix included
TOTAL = "past+sequence"  # what the attention mask covers

# "%d" is the layer's index: the form that onnxruntime-genai's configuration wants.
PAST_KEY_TEMPLATE = "past_key_values.%d.key"
PAST_VALUE_TEMPLATE = "past_key_values.%d.value"
PRESENT_KEY_TEMPLATE = "present.%d.key"
PRESENT_VALUE_TEMPLATE = "present.%d.value"

# What a decoder attends to of an encoder's text: outputs of the one graph and inputs of the other.
CROSS_KEY_TEMPLATE = "encoder.%d.key"
CROSS_VALUE_TEMPLATE = "encoder.%d.value"

# Inputs with an empty default, of graphs that take a prefix from an adapter file.
PREFIX_KEY_TEMPLATE = "prefix.%d.key"
PREFIX_VALUE_TEMPLATE = "prefix.%d.value"
PREFIX_OFFSET = "prefix.position_offset"  # [1], added to position_ids
PREFIX = "prefix"  # tokens in it

# Slots for LoRA are called after the module that they belong to; A is [in, rank], B is [rank, out].
LORA_A, LORA_B = ".lora_A.weight", ".lora_B.weight"
# Those of a bank hold every adapter's: A is [adapters, in, rank], B is [adapters, rank, out].
BANK_A, BANK_B = ".lora_A.bank", ".lora_B.bank"
ADAPTERS = "adapters"  # entries of a bank, the one of zeros for rows without an adapter included
# Layers that read the same input share one A, their As side by side; how many columns are whose is a slot, too:
# int64 [layers]. Where all slots have one fixed rank, the columns are shared out evenly.
LORA_RANKS = ".lora_A.ranks"
_JOINT = "+"


def joint_module(modules: Sequence[str]) -> str:
    """What modules with one A are called together.

    Args:
        modules: of one parent, in the order of their columns.

    Raises:
        ValueError: they have several parents.

    Example:
        >>> joint_module(["layers.0.attn.q", "layers.0.attn.v"])
        'layers.0.attn.q+v'
    """
    first, *others = modules
    if len({module.rpartition(".")[0] for module in modules}) > 1:
        raise ValueError(f"{', '.join(modules)} are not of one module")
    return _JOINT.join([first, *(module.rpartition(".")[2] for module in others)])


def modules_of(joint: str) -> list[str]:
    """The inverse of :func:`joint_module`; a module that has an A of its own is the only one."""
    parent, dot, names = joint.rpartition(".")
    return [f"{parent}{dot}{name}" for name in names.split(_JOINT)]


def past_names(num_layers: int) -> list[str]:
    """Cache inputs in graph order: key and value of layer 0, of layer 1, …"""
    return [t % i for i in range(num_layers) for t in (PAST_KEY_TEMPLATE, PAST_VALUE_TEMPLATE)]


def present_names(num_layers: int) -> list[str]:
    """Cache outputs in graph order, matching :func:`past_names`."""
    return [
        t % i for i in range(num_layers) for t in (PRESENT_KEY_TEMPLATE, PRESENT_VALUE_TEMPLATE)
    ]


def cross_names(num_layers: int) -> list[str]:
    """Keys and values of an encoder's text in graph order, matching :func:`past_names`."""
    return [t % i for i in range(num_layers) for t in (CROSS_KEY_TEMPLATE, CROSS_VALUE_TEMPLATE)]


def prefix_names(num_layers: int) -> list[str]:
    """Slots of a prefix, matching :func:`past_names`."""
    return [t % i for i in range(num_layers) for t in (PREFIX_KEY_TEMPLATE, PREFIX_VALUE_TEMPLATE)]


@dataclass(frozen=True)
class TensorSpec:
    """One input or output.

    Args:
        name: the name in the graph.
        dtype: numpy's name of the element type (``"int64"``, ``"float32"``, ``"bfloat16"``).
        dims: an int for a static dimension, a string for a symbolic one.
    """

    name: str
    dtype: str
    dims: tuple[int | str, ...]

    @property
    def is_last_logits(self) -> bool:
        """Whether it has the logits of a call's last token alone."""
        return self.name == LOGITS and len(self.dims) == 3 and self.dims[1] == 1

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready form of the specification."""
        return {"name": self.name, "dtype": self.dtype, "dims": list(self.dims)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> TensorSpec:
        """The inverse of :meth:`to_dict`."""
        return cls(data["name"], data["dtype"], tuple(data["dims"]))


@dataclass(frozen=True)
class GraphSignature:
    """All inputs and outputs of a graph, in order."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    @property
    def input_names(self) -> list[str]:
        """Names of the inputs in graph order."""
        return [spec.name for spec in self.inputs]

    @property
    def output_names(self) -> list[str]:
        """Names of the outputs in graph order."""
        return [spec.name for spec in self.outputs]

    @property
    def past(self) -> tuple[TensorSpec, ...]:
        """The cache inputs, key and value per layer; empty for a model without a cache."""
        names = set(past_names(len(self.inputs)))
        return tuple(spec for spec in self.inputs if spec.name in names)

    def with_cache_in(self, dtype: str) -> GraphSignature:
        """The same with the cache, and what an encoder gives a decoder, in another element type.

        Whatever else is floating-point, such as the logits, is what a caller reads, and stays as it is.
        """
        names = {*past_names(len(self.inputs)), *present_names(len(self.outputs))}
        names |= {*cross_names(max(len(self.inputs), len(self.outputs)))}

        def changed(specs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
            return tuple(replace(s, dtype=dtype) if s.name in names else s for s in specs)

        return GraphSignature(changed(self.inputs), changed(self.outputs))

    @property
    def last_logits(self) -> bool:
        """Whether the logits are those of the last token alone, [batch, 1, vocab]."""
        return any(spec.is_last_logits for spec in self.outputs)

    def with_last_logits(self) -> GraphSignature:
        """The same with the logits [batch, sequence, vocab] of the last token alone, [batch, 1, vocab]."""

        def changed(spec: TensorSpec) -> TensorSpec:
            if spec.name != LOGITS:
                return spec
            batch, _, vocab = spec.dims
            return replace(spec, dims=(batch, 1, vocab))

        return replace(self, outputs=tuple(map(changed, self.outputs)))

    @property
    def cross(self) -> tuple[TensorSpec, ...]:
        """The inputs that another graph's outputs go into, key and value per layer; empty without an encoder."""
        names = set(cross_names(len(self.inputs)))
        return tuple(spec for spec in self.inputs if spec.name in names)

    @property
    def num_layers(self) -> int:
        """Layers that have a cache."""
        return len(self.past) // 2

    def with_adapter_ids(self) -> GraphSignature:
        """The signature of the same graph with a bank of adapters: ``adapter_ids`` [batch] comes last."""
        if ADAPTER_IDS in self.input_names:
            return self
        return replace(self, inputs=(*self.inputs, TensorSpec(ADAPTER_IDS, "int64", (BATCH,))))

    def without_adapter_ids(self) -> GraphSignature:
        """The inverse of :meth:`with_adapter_ids`."""
        return replace(self, inputs=tuple(s for s in self.inputs if s.name != ADAPTER_IDS))

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready form of the signature."""
        return {
            "inputs": [spec.to_dict() for spec in self.inputs],
            "outputs": [spec.to_dict() for spec in self.outputs],
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> GraphSignature:
        """The inverse of :meth:`to_dict`."""
        return cls(
            tuple(TensorSpec.from_dict(spec) for spec in data["inputs"]),
            tuple(TensorSpec.from_dict(spec) for spec in data["outputs"]),
        )


def causal_lm_signature(
    *,
    num_layers: int,
    num_kv_heads: int,
    head_dim: int,
    vocab_size: int,
    dtype: str = "float32",
    positions: bool = True,
) -> GraphSignature:
    """The signature of a decoder-only model.

    Inputs ``input_ids`` [batch, sequence], ``attention_mask`` [batch, past+sequence] (1 = attend),
    ``position_ids`` [batch, sequence] unless positions follow from the mask alone, all int64, and the
    cache [batch, kv_heads, past, head_dim]; outputs ``logits`` [batch, sequence, vocab] and the grown
    cache [batch, kv_heads, past+sequence, head_dim].
    """
    position_ids = (TensorSpec(POSITION_IDS, "int64", (BATCH, SEQUENCE)),) if positions else ()
    past = (BATCH, num_kv_heads, PAST, head_dim)
    present = (BATCH, num_kv_heads, TOTAL, head_dim)
    return GraphSignature(
        inputs=(
            TensorSpec(INPUT_IDS, "int64", (BATCH, SEQUENCE)),
            TensorSpec(ATTENTION_MASK, "int64", (BATCH, TOTAL)),
            *position_ids,
            *(TensorSpec(name, dtype, past) for name in past_names(num_layers)),
        ),
        outputs=(
            TensorSpec(LOGITS, dtype, (BATCH, SEQUENCE, vocab_size)),
            *(TensorSpec(name, dtype, present) for name in present_names(num_layers)),
        ),
    )


def encoder_signature(
    outputs: Mapping[str, tuple[int | str, ...]], *, token_types: bool, dtype: str = "float32"
) -> GraphSignature:
    """The signature of an encoder.

    Inputs ``input_ids``, ``attention_mask`` (1 = attend) and, where the model tells segments apart,
    ``token_type_ids``, all int64 [batch, sequence].

    Args:
        outputs: name → dimensions, in graph order.
        token_types: whether there are several segments.
        dtype: of the outputs.
    """
    names = (INPUT_IDS, ATTENTION_MASK, *((TOKEN_TYPE_IDS,) if token_types else ()))
    return GraphSignature(
        inputs=tuple(TensorSpec(name, "int64", (BATCH, SEQUENCE)) for name in names),
        outputs=tuple(TensorSpec(name, dtype, dims) for name, dims in outputs.items()),
    )


def cross_attention_signatures(
    *, num_layers: int, num_heads: int, head_dim: int, vocab_size: int, dtype: str = "float32"
) -> tuple[GraphSignature, GraphSignature]:
    """The signatures of an encoder and of the decoder that attends to its text (Vaswani et al. 2017).

    The encoder reads ``input_ids`` and ``attention_mask`` [batch, source] once, and gives keys and values
    [batch, heads, source, head_dim] for every layer of the decoder. The decoder takes these, the source's mask as
    ``encoder_attention_mask``, and otherwise what a decoder alone takes.

    Args:
        num_layers: of the decoder.
        num_heads: of every layer's attention.
        head_dim: likewise.
        vocab_size: of the decoder.
        dtype: of keys, values and logits.
    """
    alone = causal_lm_signature(
        num_layers=num_layers,
        num_kv_heads=num_heads,
        head_dim=head_dim,
        vocab_size=vocab_size,
        dtype=dtype,
        positions=False,
    )
    dims = (BATCH, num_heads, SOURCE, head_dim)
    cross = tuple(TensorSpec(name, dtype, dims) for name in cross_names(num_layers))
    source = (BATCH, SOURCE)
    read = (TensorSpec(INPUT_IDS, "int64", source), TensorSpec(ATTENTION_MASK, "int64", source))
    own = len(alone.inputs) - len(alone.past)
    mask = TensorSpec(ENCODER_ATTENTION_MASK, "int64", source)
    inputs = (*alone.inputs[:own], mask, *cross, *alone.past)
    return GraphSignature(read, cross), GraphSignature(inputs, alone.outputs)


def joint_signature(encoder: GraphSignature, decoder: GraphSignature) -> GraphSignature:
    """Encoder and decoder seen as one: what the encoder gives is no input, and what it reads is one.

    Inputs ``encoder_input_ids`` and ``encoder_attention_mask`` [batch, source], and then the decoder's others.
    """
    source = next(spec.dims for spec in encoder.inputs if spec.name == INPUT_IDS)
    given = {*encoder.output_names, ENCODER_ATTENTION_MASK}
    names = (ENCODER_INPUT_IDS, ENCODER_ATTENTION_MASK)
    return GraphSignature(
        inputs=(
            *(TensorSpec(name, "int64", source) for name in names),
            *(spec for spec in decoder.inputs if spec.name not in given),
        ),
        outputs=decoder.outputs,
    )


def decoder_alone(decoder: GraphSignature) -> GraphSignature:
    """A decoder without the inputs that stay the same for as long as its source does."""
    fixed = {ENCODER_ATTENTION_MASK, *(spec.name for spec in decoder.cross)}
    kept = tuple(spec for spec in decoder.inputs if spec.name not in fixed)
    return GraphSignature(kept, decoder.outputs)
