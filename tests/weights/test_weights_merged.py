from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from weights_family import (
    HIDDEN,
    INNER,
    NAME_MAP,
    TIED,
    VOCABULARY,
    ArrayTensors,
    paddle_weights,
    save_safetensors,
    to_huggingface,
)

from peft_deploy.errors import AdapterError, CheckpointError
from peft_deploy.weights import (
    DTYPES,
    AdapterTensors,
    Array,
    CanonicalTensors,
    CastTensors,
    LoraPair,
    MergedTensors,
    TensorSource,
    cast_array,
    fingerprint,
    merge_weight,
    open_checkpoint,
)
from peft_deploy.weights.cast import round_to

Q = "toy.layers.0.attn.q_proj"
UP = "toy.layers.1.mlp.up_proj"
BIAS = "toy.layers.0.attn.q_proj.bias"
EMBEDDING = "toy.embed_tokens.weight"
WEIGHTS = paddle_weights()


def pair(rows: int, columns: int, seed: int = 0, scaling: float = 1.5) -> LoraPair:
    rng = np.random.default_rng(seed)
    A = rng.standard_normal((rows, 3)).astype(np.float32)
    B = (rng.standard_normal((3, columns)) + 1).astype(np.float32)
    return LoraPair(A, B, scaling)


PAIRS = {Q: pair(HIDDEN, HIDDEN, 1), UP: pair(HIDDEN, INNER, 2)}


def adapter(
    pairs: dict[str, LoraPair] | None = None, replacements: dict[str, Array] | None = None
) -> AdapterTensors:
    return AdapterTensors(PAIRS if pairs is None else pairs, replacements or {}, origin="ad")


def test_only_what_the_adapter_names_changes() -> None:
    bias = np.full(HIDDEN, 3.0, np.float32)
    merged = MergedTensors(ArrayTensors(WEIGHTS), adapter(replacements={BIAS: bias}))
    assert isinstance(merged, TensorSource)
    assert list(merged.names()) == list(WEIGHTS)
    for name, array in WEIGHTS.items():
        read = merged.read(name)
        assert merged.info(name).dtype == read.dtype.name == "float32"
        assert merged.info(name).shape == read.shape
        module = name.removesuffix(".weight")
        if module in PAIRS:
            p = PAIRS[module]
            expected = array + p.scaling * (p.A @ p.B)
            assert np.allclose(read, expected, rtol=1e-5, atol=1e-5)
            assert np.abs(read - array).max() > 0.5
        else:
            assert np.array_equal(read, bias if name == BIAS else array)


def test_merging_from_a_checkpoint_is_the_same_in_both_layouts(tmp_path: Path) -> None:
    weights = paddle_weights(dtype="bfloat16")
    sources = []
    for kind, stored in (("hf", to_huggingface(weights)), ("pd", weights)):
        save_safetensors(tmp_path / f"{kind}.safetensors", stored)
        checkpoint = open_checkpoint(tmp_path / f"{kind}.safetensors")
        sources.append(MergedTensors(CanonicalTensors(checkpoint, NAME_MAP, {}), adapter()))
    for name in weights:
        assert sources[0].read(name).tobytes() == sources[1].read(name).tobytes()
    merged = fingerprint(sources[0])
    assert merged == fingerprint(sources[1]) != fingerprint(ArrayTensors(weights))


def test_nothing_is_read_before_it_is_asked_for() -> None:
    source = ArrayTensors(WEIGHTS)
    merged = MergedTensors(source, adapter())
    merged.names()
    merged.info(EMBEDDING)
    assert source.reads == []
    merged.read(f"{Q}.weight")
    assert source.reads == [f"{Q}.weight"]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_another_type_for_everything_but_integers(dtype: str) -> None:
    source = ArrayTensors(WEIGHTS | {"steps": np.array([1, 2])})
    merged = MergedTensors(source, adapter(), dtype)
    for name in WEIGHTS:
        assert merged.info(name).dtype == merged.read(name).dtype.name == dtype
    assert merged.info("steps").dtype == merged.read("steps").dtype.name == "int64"
    name = f"{Q}.weight"
    expected = merge_weight(WEIGHTS[name], PAIRS[Q], dtype=dtype)
    assert merged.read(name).tobytes() == expected.tobytes()


def test_a_low_precision_base_merges_into_float32_without_losing_the_change() -> None:
    base = {name: array.astype(DTYPES["bfloat16"]) for name, array in WEIGHTS.items()}
    tiny = LoraPair(PAIRS[Q].A, PAIRS[Q].B * 1e-5, 1.0)
    name = f"{Q}.weight"
    merged = MergedTensors(ArrayTensors(base), adapter({Q: tiny}), "float32").read(name)
    change = merged - base[name].astype(np.float32)
    assert np.allclose(change, tiny.A @ tiny.B, rtol=0.01, atol=1e-6)
    assert np.abs(change).max() > 1e-5


def test_a_pair_goes_on_top_of_a_replacement() -> None:
    name = f"{Q}.weight"
    value = np.full((HIDDEN, HIDDEN), 5.0, np.float32)
    merged = MergedTensors(ArrayTensors(WEIGHTS), adapter(replacements={name: value}))
    assert np.array_equal(merged.read(name), merge_weight(value, PAIRS[Q]))


def test_a_replacement_gets_the_type_of_the_base() -> None:
    base = {name: array.astype(np.float16) for name, array in WEIGHTS.items()}
    value = np.full(HIDDEN, 0.1, np.float32)
    merged = MergedTensors(ArrayTensors(base), adapter(replacements={BIAS: value}))
    assert merged.read(BIAS).dtype == np.float16
    assert np.array_equal(merged.read(BIAS), value.astype(np.float16))


def test_the_first_three_misfits_are_named_with_both_shapes() -> None:
    pairs = {f"toy.layers.{i}.attn.k_proj": pair(HIDDEN, HIDDEN) for i in range(4)}
    source = ArrayTensors(WEIGHTS)
    with pytest.raises(AdapterError) as caught:
        MergedTensors(source, adapter({UP: pair(INNER, HIDDEN)} | pairs))
    assert caught.value.message == (
        "ad does not fit the base model:\n"
        f"  {UP}.weight: A · B is [20, 12], the base model's is [12, 20]\n"
        "  toy.layers.0.attn.k_proj.weight: the base model has no such parameter\n"
        "  toy.layers.1.attn.k_proj.weight: the base model has no such parameter\n"
        "  … and 2 more"
    )
    assert source.reads == []


@pytest.mark.parametrize(
    ("replacements", "message"),
    [
        ({BIAS: np.ones(HIDDEN + 1, np.float32)}, r"replacement is \[13\], .* \[12\]"),
        ({"nobody": np.ones(2, np.float32)}, "nobody: the base model has no such"),
        ({BIAS: np.full(HIDDEN, np.nan, np.float32)}, f"ad: {BIAS} holds 12 values"),
    ],
)
def test_replacements_that_cannot_be_used(replacements: dict[str, Array], message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        MergedTensors(ArrayTensors(WEIGHTS), adapter(replacements=replacements))


def test_a_factor_that_is_not_finite_is_found_before_anything_is_read() -> None:
    bad = pair(HIDDEN, INNER)
    bad.B[2, 7] = np.inf
    source = ArrayTensors(WEIGHTS)
    with pytest.raises(AdapterError, match=rf"ad: B of {UP}.weight holds 1 values"):
        MergedTensors(source, adapter({UP: bad}))
    assert source.reads == []


def test_a_pair_for_a_quantized_weight_is_refused() -> None:
    base = WEIGHTS | {f"{UP}.weight": np.ones((HIDDEN, INNER), np.int8)}
    with pytest.raises(AdapterError, match="is int8, not floating-point"):
        MergedTensors(ArrayTensors(base), adapter())


# Tied storage: the source lists the embedding only.


def tied_source(tmp_path: Path) -> CanonicalTensors:
    path = tmp_path / "model.safetensors"
    save_safetensors(path, to_huggingface(paddle_weights(head=False)))
    return CanonicalTensors(open_checkpoint(path), NAME_MAP, TIED)


@pytest.mark.parametrize(
    ("module", "rows", "columns"),
    [("lm_head", HIDDEN, VOCABULARY), ("toy.embed_tokens", VOCABULARY, HIDDEN)],
)
def test_a_pair_on_a_tied_matrix_is_refused(
    tmp_path: Path, module: str, rows: int, columns: int
) -> None:
    with pytest.raises(AdapterError, match=rf"ad changes {module}\.weight, which shares"):
        MergedTensors(tied_source(tmp_path), adapter({module: pair(rows, columns)}))


def test_an_untied_head_is_merged() -> None:
    p = pair(HIDDEN, VOCABULARY)
    merged = MergedTensors(ArrayTensors(WEIGHTS), adapter({"lm_head": p}))
    assert np.array_equal(
        merged.read("lm_head.weight"), merge_weight(WEIGHTS["lm_head.weight"], p)
    )
    assert np.array_equal(merged.read(EMBEDDING), WEIGHTS[EMBEDDING])


@pytest.mark.parametrize("names", [[EMBEDDING], ["lm_head.weight"], [EMBEDDING, "lm_head.weight"]])
def test_a_replacement_of_a_tied_matrix_replaces_the_stored_one(
    tmp_path: Path, names: list[str]
) -> None:
    value = np.full((VOCABULARY, HIDDEN), 0.25, np.float32)
    merged = MergedTensors(
        tied_source(tmp_path), adapter(replacements=dict.fromkeys(names, value))
    )
    assert "lm_head.weight" not in merged.names()
    assert np.array_equal(merged.read(EMBEDDING), value)


def test_two_different_replacements_of_a_tied_matrix_are_refused(tmp_path: Path) -> None:
    value = np.full((VOCABULARY, HIDDEN), 0.25, np.float32)
    both = {EMBEDDING: value, "lm_head.weight": value + 1}
    with pytest.raises(AdapterError, match="which share one storage"):
        MergedTensors(tied_source(tmp_path), adapter(replacements=both))


def test_the_fingerprint_of_an_adapter_covers_all_of_it() -> None:
    p = PAIRS[Q]
    variants = [
        adapter(),
        adapter({Q: p}),
        adapter({UP: PAIRS[UP], Q: LoraPair(p.A, p.B, 1.25)}),
        adapter({UP: PAIRS[UP], Q: LoraPair(p.A, p.B + 1e-6, p.scaling)}),
        adapter({UP: PAIRS[UP], Q: LoraPair(p.A.astype(np.float64), p.B, p.scaling)}),
        adapter(replacements={BIAS: np.ones(HIDDEN, np.float32)}),
    ]
    assert len({a.fingerprint for a in variants}) == len(variants)
    assert adapter(dict(reversed(PAIRS.items()))).fingerprint == adapter().fingerprint
    assert AdapterTensors({}, {}, "given").fingerprint == "given"


# Conversion of types.


@pytest.mark.parametrize("source", ["float64", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("target", ["float32", "float16", "bfloat16"])
def test_casting_rounds_to_the_nearest(source: str, target: str) -> None:
    rng = np.random.default_rng(4)
    array = rng.standard_normal((50, 30)).astype(DTYPES[source])
    result = cast_array(array, target)
    assert result.dtype == DTYPES[target]
    wide = array.astype(np.float64)
    step = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}[target]
    assert (np.abs(result.astype(np.float64) - wide) <= step * np.abs(wide) + 2.0**-24).all()
    assert (result is array) == (source == target)


def test_float64_becomes_bfloat16_with_one_rounding() -> None:
    just_above_half = 1 + 2**-8 + 2**-40
    values = np.array([just_above_half, -just_above_half, 1 + 2**-8, 1 + 2**-8 - 2**-40, 1e300])
    rounded = round_to(values, DTYPES["bfloat16"]).astype(np.float64)
    assert rounded.tolist()[:4] == [1 + 2**-7, -1 - 2**-7, 1.0, 1.0]
    assert np.isinf(rounded[4])


@pytest.mark.parametrize("source", ["float32", "bfloat16", "float64"])
def test_values_that_a_type_cannot_hold_are_refused(source: str) -> None:
    array = np.array([[1.0, -70000.0], [1e6, 2.0]]).astype(DTYPES[source])
    with pytest.raises(
        CheckpointError, match=r"w: 2 values are too large for float16.*65504|6.55"
    ):
        cast_array(array, "float16", name="w")


def test_infinities_that_were_there_stay() -> None:
    array = np.array([[-np.inf, 1.0]], np.float32)
    assert cast_array(array, "float16")[0, 0] == -np.inf


def test_casting_scalars_integers_and_empty_arrays() -> None:
    scalar = cast_array(np.array(1.5, np.float32), "float16")
    assert (scalar.shape, scalar.dtype) == ((), np.float16)
    integers = np.array([1, 2])
    assert cast_array(integers, "float16") is integers
    assert cast_array(np.empty((0, 4), np.float32), "bfloat16").shape == (0, 4)


def test_a_cast_source() -> None:
    source = ArrayTensors(WEIGHTS | {"steps": np.array([1, 2])})
    cast = CastTensors(source, "bfloat16")
    assert list(cast.names()) == [*WEIGHTS, "steps"]
    for name in cast.names():
        expected = "int64" if name == "steps" else "bfloat16"
        assert cast.info(name).dtype == cast.read(name).dtype.name == expected
    with pytest.raises(ValueError, match="int8 is not one of bfloat16, float16"):
        CastTensors(source, "int8")
