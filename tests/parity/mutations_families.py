"""Faults of what the first decoder does not have: biases, learned positions, ALiBi, fused weights, ties, encoders."""

from __future__ import annotations

import numpy as np
from bundle_edits import (
    GraphEdit,
    attribute,
    change,
    exchange,
    on_input,
    on_output,
    operator,
    own_constant,
    rewire,
    shared_constant,
)
from mutations import Mutation, in_graph
from mutations_weights import embedding_row

OPT, OPT_NODE, OPT_WEIGHT = (
    "opt.decoder.layers.1",
    "/model/decoder/layers.1",
    "model.decoder.layers.1",
)
BLOOM, BLOOM_NODE, BLOOM_WEIGHT = "bloom.h.1", "/transformer/h.1", "transformer.h.1"
BERT, BERT_NODE, BERT_WEIGHT = "encoder.layers.1", "/encoder/layers.1", "encoder.layer.1"


def gelu_for_relu(graph: GraphEdit) -> None:
    name = f"{OPT_NODE}/Relu"
    x = graph.node(name).input[0]
    inner = graph.add(name, "Erf", graph.add(name, "Mul", x, graph.constant(2**-0.5)))
    share = graph.add(name, "Add", inner, graph.constant(1.0))
    half = graph.add(name, "Mul", x, graph.constant(0.5))
    node = graph.node(name)
    node.op_type = "Mul"
    node.input[:] = [half, share]


def counted_padding(graph: GraphEdit) -> None:
    """Distances are counted over padding, too."""
    name = "/transformer/CumSum"
    nothing = graph.add(name, "Sub", "attention_mask", "attention_mask")
    graph.node(name).input[0] = graph.add(name, "Add", nothing, graph.constant(np.array(1)))


def untied_head(graph: GraphEdit) -> None:
    """The head has a copy of the embedding that has been changed a little since."""
    table = graph.weight("transformer.word_embeddings.weight")
    noise = np.random.default_rng(5).normal(0, 1e-3, table.shape)
    graph.node("/lm_head/Transpose").input[0] = graph.constant((table + noise).astype(np.float32))


def fused_in_blocks(graph: GraphEdit) -> None:
    """Columns of q, k and v behind each other in place of head by head."""
    name = f"{BLOOM_WEIGHT}.self_attention.query_key_value.weight"
    weight = graph.weight(name)
    parts = weight.reshape(len(weight), 5, 3, 8).swapaxes(1, 2)
    graph.set_weight(name, parts.reshape(weight.shape))


def swapped_split(graph: GraphEdit) -> None:
    """q and k out of the fused weight the other way round."""
    outputs = graph.node(f"{BLOOM_NODE}/self_attention/Split").output
    outputs[0], outputs[1] = outputs[1], outputs[0]


def padding_in_mean(graph: GraphEdit) -> None:
    """The mean over all slots, padded ones as well."""
    for name in ("/pooling/ReduceSum", "/pooling/Unsqueeze"):
        zero, one = graph.constant(0.0), graph.constant(1.0)
        nothing = graph.add(name, "Mul", graph.node(name).input[0], zero)
        graph.node(name).input[0] = graph.add(name, "Add", nothing, one)


def first_token(graph: GraphEdit) -> None:
    """The first slot's state in place of the mean."""
    name = "/pooling/Div"
    first = graph.constant(np.array(0))
    graph.node(name).input[0] = graph.add(name, "Gather", "last_hidden_state", first, axis=1)
    graph.node(name).input[1] = graph.constant(np.ones(1, np.float32))


FAMILY_MUTATIONS = [
    Mutation(
        "bias left out",
        "opt",
        in_graph(change(f"{OPT_WEIGHT}.fc1.bias", np.zeros_like)),
        f"{OPT_NODE}/fc1/Add",
        OPT,
    ),
    Mutation(
        "biases of q and k swapped",
        "opt",
        in_graph(
            exchange(f"{OPT_WEIGHT}.self_attn.q_proj.bias", f"{OPT_WEIGHT}.self_attn.k_proj.bias")
        ),
        f"{OPT_NODE}/self_attn/q_proj/Add",
        OPT,
    ),
    Mutation(
        "bias added twice",
        "opt",
        in_graph(change(f"{OPT_WEIGHT}.self_attn.out_proj.bias", lambda b: 2 * b)),
        f"{OPT_NODE}/self_attn/out_proj/Add",
        OPT,
    ),
    Mutation(
        "offset of the position table forgotten",
        "opt",
        in_graph(own_constant("/model/decoder/embed_positions/Add", 1, np.zeros_like)),
        "/model/decoder/embed_positions/Gather",
    ),
    Mutation(
        "GELU in place of ReLU",
        "opt",
        in_graph(gelu_for_relu),
        f"{OPT_NODE}/Relu",
        OPT,
    ),
    Mutation(
        "bias of a norm left out",
        "opt",
        in_graph(change(f"{OPT_WEIGHT}.final_layer_norm.bias", np.zeros_like)),
        f"{OPT_NODE}/final_layer_norm/LayerNormalization",
        OPT,
    ),
    Mutation(
        "norm reads the value before the residual",
        "opt",
        in_graph(
            rewire(
                f"{OPT_NODE}/final_layer_norm/LayerNormalization",
                0,
                "/model/decoder/layers.0/Add_1_output_0",
            )
        ),
        f"{OPT_NODE}/final_layer_norm/LayerNormalization",
        OPT,
    ),
    Mutation(
        "residual around the feed-forward lost",
        "opt",
        in_graph(on_input(f"{OPT_NODE}/Add_1", 0, "Mul", 0.0)),
        f"{OPT_NODE}/Add_1",
        OPT,
    ),
    Mutation(
        "exact GELU in place of the one with tanh",
        "bloom",
        in_graph(attribute(f"{BLOOM_NODE}/mlp/Gelu", "approximate", "none")),
        f"{BLOOM_NODE}/mlp/Gelu",
        BLOOM,
    ),
    Mutation(
        "ALiBi slopes of another head",
        "bloom",
        in_graph(shared_constant("/transformer/Mul_1", 1, lambda s: np.roll(s, 1, 0))),
        "/transformer/Mul_1",
    ),
    Mutation(
        "ALiBi of the wrong sign",
        "bloom",
        in_graph(shared_constant("/transformer/Mul_1", 1, np.negative)),
        "/transformer/Mul_1",
    ),
    Mutation("ALiBi counts padding", "bloom", in_graph(counted_padding), "/transformer/CumSum"),
    Mutation(
        "fused q, k, v in blocks in place of heads",
        "bloom",
        in_graph(fused_in_blocks),
        f"{BLOOM_NODE}/self_attention/query_key_value/MatMul",
        BLOOM,
    ),
    Mutation(
        "q and k of a fused weight swapped",
        "bloom",
        in_graph(swapped_split),
        f"{BLOOM_NODE}/self_attention/Split",
        BLOOM,
    ),
    Mutation(
        "tied head untied, and changed since", "bloom", in_graph(untied_head), "/lm_head/MatMul"
    ),
    Mutation(
        "row of a tied embedding doubled, its token in no text",
        "bloom",
        embedding_row(is_read=False, name="transformer.word_embeddings.weight"),
        "/lm_head/MatMul",
    ),
    Mutation(
        "norm behind the embedding left out",
        "bloom",
        in_graph(
            rewire(
                "/transformer/h.0/input_layernorm/LayerNormalization",
                0,
                "/transformer/word_embeddings/Gather_output_0",
            ),
            rewire("/transformer/h.0/Add", 1, "/transformer/word_embeddings/Gather_output_0"),
        ),
        "/transformer/word_embeddings/Gather",
        "bloom.h.0",
    ),
    Mutation(
        "epsilon of a norm 1e-3 in place of 1e-5",
        "bloom",
        in_graph(
            attribute(f"{BLOOM_NODE}/post_attention_layernorm/LayerNormalization", "epsilon", 1e-3)
        ),
        f"{BLOOM_NODE}/post_attention_layernorm/LayerNormalization",
        BLOOM,
    ),
    Mutation(
        "segments ignored",
        "bert",
        in_graph(on_output("/embeddings/Gather_2", 0, "Mul", 0.0)),
        "/embeddings/Gather_2",
    ),
    Mutation(
        "every token in the first segment",
        "bert",
        in_graph(
            lambda graph: graph.on_input(
                "/embeddings/Gather_2", 1, "Mul", graph.constant(np.array(0))
            )
        ),
        "/embeddings/Gather_2",
    ),
    Mutation(
        "positions counted from the padding on the left",
        "bert",
        in_graph(
            lambda graph: graph.on_input("/embeddings/Sub", 1, "Mul", graph.constant(np.array(0)))
        ),  # the search leaves these cases out: PaddleNLP's modules see such rows moved to the left
    ),
    Mutation("padding attended to", "bert", in_graph(on_output("/Mul", 0, "Mul", 0.0)), "/Mul"),
    Mutation("mean over padding, too", "bert", in_graph(padding_in_mean), "/pooling/Div"),
    Mutation("first token in place of the mean", "bert", in_graph(first_token), "/pooling/Div"),
    Mutation(
        "embedding not of length 1",
        "bert",
        in_graph(on_input("/pooling/Div_1", 1, "Pow", 0.0)),
        "/pooling/Div_1",
    ),
    Mutation(
        "norm of another place",
        "bert",
        in_graph(
            exchange(
                f"{BERT_WEIGHT}.attention.output.LayerNorm.weight",
                f"{BERT_WEIGHT}.output.LayerNorm.weight",
            )
        ),
        f"{BERT_NODE}/norm1/LayerNormalization",
        BERT,
    ),
    Mutation(
        "residual lost in an encoder",
        "bert",
        in_graph(on_input(f"{BERT_NODE}/norm2/Add", 0, "Mul", 0.0)),
        f"{BERT_NODE}/norm2/Add",
        BERT,
    ),
    Mutation(
        "leaky ReLU in place of ReLU",
        "bert",
        in_graph(operator(f"{BERT_NODE}/linear1/Relu", "LeakyRelu")),
        f"{BERT_NODE}/linear1/Relu",
        BERT,
    ),
]
