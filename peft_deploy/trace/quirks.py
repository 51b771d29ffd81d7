"""What Paddle2ONNX 2.1.0 refuses or translates wrongly, as data.

Each entry was found by converting the operator alone and comparing ONNX Runtime with Paddle 3.3.1 on the CPU.
Remove an entry when a newer converter passes its test in ``tests/convert/test_quirks.py``.
"""

from __future__ import annotations

# Paddle2ONNX registers its translators under old operator names and looks a PIR name up through this table
# (paddle2onnx/mapper/exporter.h, function convert_pir_op_name, release 2.1.0).
RENAMED = {
    "add": "elementwise_add",
    "add_n": "sum",
    "all": "reduce_all",
    "any": "reduce_any",
    "arange": "range",
    "argmax": "arg_max",
    "assign_value_": "assign_value",
    "batch_norm_": "batch_norm",
    "divide": "elementwise_div",
    "expand": "expand_v2",
    "flatten": "flatten_contiguous_range",
    "floor_divide": "elementwise_floordiv",
    "grid_sample": "grid_sampler",
    "hardsigmoid": "hard_sigmoid",
    "hardswish": "hard_swish",
    "matmul": "matmul_v2",
    "max": "reduce_max",
    "maximum": "elementwise_max",
    "mean": "reduce_mean",
    "min": "reduce_min",
    "minimum": "elementwise_min",
    "multiply": "elementwise_mul",
    "nonzero": "where_index",
    "numel": "size",
    "prod": "reduce_prod",
    "remainder": "elementwise_mod",
    "repeat_interleave_with_tensor_index": "repeat_interleave",
    "subtract": "elementwise_sub",
    "sum": "reduce_sum",
    "topk": "top_k_v2",
    "unsqueeze": "unsqueeze2",
}

# Structure of a program rather than computation; the converter handles these itself.
STRUCTURAL = frozenset(
    {
        "builtin.parameter",
        "builtin.shadow_output",
        "cf.yield",
        "pd_op.data",
        "pd_op.feed",
        "pd_op.fetch",
        "pd_op.if",
        "pd_op.print",
        "pd_op.while",
    }
)

# Not in the converter's registry: it would abort the process.
REPLACEMENTS = {
    "addmm": "write x @ y + z",
    "broadcast_tensors": "index with gather_nd or take_along_axis instead of a tensor index",
    "fused_rms_norm_quant": "write the norm out: x * rsqrt(mean(x * x) + eps) * weight",
    "fused_rotary_position_embedding": "write the rotation out, with a table gathered by position",
    "flash_attn": "trace on the CPU, with an explicit mask",
    "masked_fill": "use where",
    "rms_norm": "write the norm out: x * rsqrt(mean(x * x) + eps) * weight",
    "swiglu": "write silu(gate) * up",
}

# In the registry, and wrong.
WRONG = {
    "repeat_interleave": (
        "is converted to a Tile that does not run with sizes that change; "
        "use unsqueeze, expand and reshape"
    ),
    "multinomial": "draws other numbers than Paddle; sample outside the graph",
}

# Attribute → (value for which the translation is wrong, what happens).
WRONG_ATTRIBUTES = {
    "gelu": (
        "approximate",
        True,
        "the tanh form is converted to the erf form; write the formula out",
    ),
}

# Operators whose double-precision attributes the converter reads correctly; every other one is read as float32
# from a float64's bytes (Paddle2ONNX issue 1646, open).
FLOAT64_ATTRIBUTES_SAFE = frozenset(
    {"full", "assign_value_", "set_value_", "full_like", "uniform"}
)
