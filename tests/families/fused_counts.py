"""How often each fusion fires in the small models: two layers each, three in some.

Every norm, activation, rotation and attention of every family is fused; nothing is left plain. Where the heads of q, k
and v come out of one matrix side by side, they are not left last, and where each query has a mask of its own, there
are not as many masks to make one.
"""

from __future__ import annotations

COLUMNS = (
    "RMSNormalization",
    "Gelu",
    "RotaryEmbedding",
    "Attention",
    "Attention: cache",
    "Attention: heads last",
    "Attention: one mask for all queries",
)

# Model → its graph's counts, and its encoder's where there is one.
FUSED = {
    "bert-classification": [(0, 2, 0, 2, 0, 2, 2)],
    "bert-embedding": [(0, 0, 0, 2, 0, 2, 2)],
    "bloom": [(0, 2, 0, 2, 2, 0, 0)],
    "bloom-post-norm-residual": [(0, 2, 0, 2, 2, 0, 0)],
    "chatglm_v2": [(5, 0, 4, 2, 2, 2, 0)],
    "chatglm_v2-norm-residual": [(4, 0, 4, 2, 2, 2, 0)],
    "ernie-masked-lm": [(0, 3, 0, 2, 0, 2, 2)],
    "ernie-tokens": [(0, 2, 0, 2, 0, 2, 2)],
    "gemma": [(5, 2, 4, 2, 2, 2, 0)],
    "gemma-untied": [(5, 2, 4, 2, 2, 2, 0)],
    "gpt": [(0, 2, 0, 2, 2, 2, 0)],
    "gpt-fused-post-norm": [(0, 2, 0, 2, 2, 0, 0)],
    "llama": [(5, 0, 4, 2, 2, 2, 0)],
    "llama-fused": [(5, 0, 4, 2, 2, 2, 0)],
    "llama-linear": [(5, 0, 4, 2, 2, 2, 0)],
    "llama-llama3": [(5, 0, 4, 2, 2, 2, 0)],
    "llama-ntk": [(5, 0, 4, 2, 2, 2, 0)],
    "llama-tied": [(5, 0, 4, 2, 2, 2, 0)],
    "mistral": [(5, 0, 4, 2, 2, 2, 0)],
    "opt": [(0, 0, 0, 2, 2, 2, 0)],
    "opt-post-norm-projected": [(0, 2, 0, 2, 2, 2, 0)],
    "qwen": [(5, 0, 4, 2, 2, 0, 0)],
    "qwen-logn-biased": [(5, 0, 4, 2, 2, 0, 0)],
    "qwen2": [(5, 0, 4, 2, 2, 2, 0)],
    "qwen2-fused": [(5, 0, 4, 2, 2, 2, 0)],
    "roberta-answers": [(0, 2, 0, 2, 0, 2, 2)],
    "roberta-classification": [(0, 2, 0, 2, 0, 2, 2)],
    "rw": [(0, 2, 4, 2, 2, 2, 0)],
    "rw-alibi": [(0, 2, 0, 2, 2, 0, 0)],
    "rw-alibi-multi-query": [(0, 2, 0, 2, 2, 2, 0)],
    "rw-sequential": [(0, 2, 4, 2, 2, 0, 0)],
    "t5": [(7, 0, 0, 4, 2, 2, 2), (7, 0, 0, 3, 0, 3, 0)],
    "t5-gated": [(10, 3, 0, 6, 3, 3, 3), (5, 2, 0, 2, 0, 2, 0)],
}
