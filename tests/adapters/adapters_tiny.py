"""Tiny PaddleNLP models for the tests of this folder, and B matrices far from zero."""

from __future__ import annotations

import warnings

import numpy as np
import paddle
from paddle import nn
from paddlenlp import transformers

from peft_deploy.adapters.arrays import assign

IDS = np.array([[3, 14, 15, 9, 26], [5, 35, 8, 9, 7]], np.int64)
VOCABULARY = 67

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}


def tiny_llama(seed: int = 0) -> nn.Layer:
    return _causal("Llama", seed, num_key_value_heads=2)


def tiny_model(name: str, seed: int = 0) -> nn.Layer:
    if name == "llama":
        return tiny_llama(seed)
    if name == "qwen2":
        return _causal("Qwen2", seed, num_key_value_heads=2)
    if name == "gpt":
        return _causal("GPT", seed, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    if name == "bloom":
        return _causal("Bloom", seed, n_layer=2, n_head=4)
    return _build(
        transformers.BertForSequenceClassification,
        transformers.BertConfig(
            **SIZES, num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
        ),
        seed,
    )


def _causal(family: str, seed: int, **options: object) -> nn.Layer:
    config = getattr(transformers, f"{family}Config")(**SIZES, **options)
    return _build(getattr(transformers, f"{family}ForCausalLM"), config, seed)


def _build(model_class: type, config: object, seed: int) -> nn.Layer:
    paddle.seed(seed)
    model = model_class(config)
    generator = np.random.default_rng(seed)
    for parameter in model.parameters():  # PaddleNLP's own start is too close to zero to tell much
        scale = 0.25 if parameter.ndim > 1 else 0.1
        values = generator.standard_normal(parameter.shape) * scale
        if parameter.ndim == 1:
            values += parameter.numpy()
        parameter.set_value(values.astype("float32"))
    model.eval()
    return model


def logits(model: nn.Layer, ids: np.ndarray = IDS) -> np.ndarray:
    with paddle.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PaddleNLP calls functions that Paddle has deprecated
        result = model(paddle.to_tensor(ids))
    if isinstance(result, (tuple, list)):
        result = result[0]
    return result.numpy()


def fill_branches(model: nn.Layer, seed: int = 1, scale: float = 0.3) -> None:
    """Random A and B, and random values for whatever else is trainable."""
    generator = np.random.default_rng(seed)
    for parameter in model.parameters():
        if not parameter.stop_gradient:
            values = generator.standard_normal(parameter.shape) * scale
            assign(parameter, values)


def bits(model: nn.Layer) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in model.state_dict().items()}
