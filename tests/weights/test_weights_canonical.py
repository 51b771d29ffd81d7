from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from weights_family import (
    HIDDEN,
    NAME_MAP,
    TIED,
    VOCABULARY,
    ArrayTensors,
    paddle_weights,
    save_pdparams,
    save_safetensors,
    save_sharded,
    shapes,
    to_huggingface,
)

from peft_deploy.errors import CheckpointError
from peft_deploy.weights import Array, CanonicalTensors, TensorSource, fingerprint, open_checkpoint
from peft_deploy.weights.fingerprint import SAMPLED_ELEMENTS, sample

WEIGHTS = paddle_weights()


def canonical(
    folder: Path,
    weights: dict[str, Array],
    *,
    tied: dict[str, str] | None = None,
    format: str = "pt",
    expected: dict[str, tuple[int, ...]] | None = None,
) -> CanonicalTensors:
    folder.mkdir(exist_ok=True)
    save_safetensors(folder / "model.safetensors", weights, format)
    return CanonicalTensors(open_checkpoint(folder), NAME_MAP, tied or {}, expected)


def test_both_layouts_are_the_same_tensors(tmp_path: Path) -> None:
    theirs = canonical(tmp_path / "hf", to_huggingface(WEIGHTS), expected=shapes(WEIGHTS))
    ours = canonical(tmp_path / "pd", WEIGHTS, format="np", expected=shapes(WEIGHTS))
    assert (theirs.layout, ours.layout) == ("huggingface", "paddlenlp")
    assert isinstance(theirs, TensorSource)
    assert set(theirs.names()) == set(ours.names()) == set(WEIGHTS)
    for name, array in WEIGHTS.items():
        for source in (theirs, ours):
            assert source.info(name).shape == array.shape == source.read(name).shape
            assert source.info(name).name == name
            assert np.array_equal(source.read(name), array)


def test_a_transposed_matrix_is_a_view(tmp_path: Path) -> None:
    source = canonical(tmp_path, to_huggingface(WEIGHTS))
    read = source.read("toy.layers.0.mlp.up_proj.weight")
    assert read.flags.f_contiguous
    assert not read.flags.owndata


def test_all_forms_have_one_fingerprint(tmp_path: Path) -> None:
    prints = {
        canonical(tmp_path / "hf", to_huggingface(WEIGHTS)).fingerprint(),
        canonical(tmp_path / "pd", WEIGHTS, format="np").fingerprint(),
        fingerprint(ArrayTensors(dict(reversed(WEIGHTS.items())))),
    }
    for protocol in (2, 4):
        path = tmp_path / f"{protocol}.pdparams"
        save_pdparams(path, WEIGHTS, protocol)
        prints.add(CanonicalTensors(open_checkpoint(path), NAME_MAP, {}).fingerprint())
    index = save_sharded(tmp_path, to_huggingface(WEIGHTS), save_safetensors)
    prints.add(CanonicalTensors(open_checkpoint(index), NAME_MAP, {}).fingerprint())
    assert len(prints) == 1
    assert len(prints.pop()) == 64


def test_other_weights_have_another_fingerprint(tmp_path: Path) -> None:
    base = fingerprint(ArrayTensors(WEIGHTS))
    name = "toy.layers.1.attn.q_proj.weight"
    merged = WEIGHTS | {name: WEIGHTS[name] + np.float32(0.01)}
    transposed = WEIGHTS | {name: WEIGHTS[name].T}
    swapped = WEIGHTS | {
        "toy.layers.0.norm.weight": WEIGHTS["toy.layers.1.norm.weight"],
        "toy.layers.1.norm.weight": WEIGHTS["toy.layers.0.norm.weight"],
    }
    fewer = {n: a for n, a in WEIGHTS.items() if n != "lm_head.weight"}
    renamed = fewer | {"lm_tail.weight": WEIGHTS["lm_head.weight"]}
    reshaped = WEIGHTS | {name: WEIGHTS[name].reshape(HIDDEN // 2, HIDDEN * 2)}
    others = (merged, transposed, swapped, fewer, renamed, reshaped)
    prints = [fingerprint(ArrayTensors(other)) for other in others]
    assert len({base, *prints}) == 7


def test_tied_weights_have_one_fingerprint_stored_once_or_twice(tmp_path: Path) -> None:
    once = paddle_weights(head=False)
    embedding = once["toy.embed_tokens.weight"]
    stored = {
        "once": canonical(tmp_path / "a", to_huggingface(once), tied=TIED),
        # Hugging Face's head is [vocabulary, hidden], as the embedding is
        "twice": canonical(
            tmp_path / "b", to_huggingface(once) | {"lm_head.weight": embedding}, tied=TIED
        ),
        # and so is PaddleNLP's, when it is tied
        "paddle": canonical(
            tmp_path / "c", once | {"lm_head.weight": embedding}, tied=TIED, format="np"
        ),
        "paddle, transposed": canonical(
            tmp_path / "d", once | {"lm_head.weight": embedding.T.copy()}, tied=TIED, format="np"
        ),
    }
    wanted = shapes(paddle_weights())
    for source in stored.values():
        source.check(wanted)
        assert "lm_head.weight" not in source.names()
    assert len({source.fingerprint() for source in stored.values()}) == 1


@pytest.mark.parametrize("position", [(0, 0), (VOCABULARY - 1, HIDDEN - 1)])
def test_a_tied_head_that_differs_is_refused(tmp_path: Path, position: tuple[int, int]) -> None:
    weights = to_huggingface(paddle_weights(head=False))
    head = weights["model.embed_tokens.weight"].copy()
    head[position] += 1
    with pytest.raises(CheckpointError, match=r"ties lm_head.weight to toy\.embed_tokens"):
        canonical(tmp_path, weights | {"lm_head.weight": head}, tied=TIED)


def test_a_tied_head_beyond_the_first_rows_is_compared_too(tmp_path: Path) -> None:
    embedding = np.ones((3000, HIDDEN), np.float32)
    head = embedding.copy()
    head[2999, 3] = 2
    weights = to_huggingface(paddle_weights(head=False)) | {"model.embed_tokens.weight": embedding}
    with pytest.raises(CheckpointError, match="different values"):
        canonical(tmp_path, weights | {"lm_head.weight": head}, tied=TIED)


def test_tensors_without_weight_are_left_out(tmp_path: Path) -> None:
    weights = to_huggingface(WEIGHTS)
    weights["model.layers.0.attn.inv_freq"] = np.ones(3, np.float32)
    source = canonical(tmp_path, weights, expected=shapes(WEIGHTS))
    assert set(source.names()) == set(WEIGHTS)


def test_a_mixture_of_layouts_is_refused(tmp_path: Path) -> None:
    weights = to_huggingface(WEIGHTS)
    del weights["model.layers.1.norm.weight"]
    weights["toy.layers.1.norm.weight"] = WEIGHTS["toy.layers.1.norm.weight"]
    with pytest.raises(
        CheckpointError, match=r"mixes two .*model\..*, as in toy\.layers\.1\.norm"
    ):
        canonical(tmp_path, weights)


def test_another_kind_of_model_is_refused(tmp_path: Path) -> None:
    weights = {f"encoder.{i}.weight": np.ones(2, np.float32) for i in range(5)}
    with pytest.raises(CheckpointError) as caught:
        canonical(tmp_path, weights)
    assert "encoder.0.weight, encoder.1.weight, encoder.2.weight;" in caught.value.message
    assert "encoder.3" not in caught.value.message


def test_the_head_alone_does_not_tell_the_layout(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="another kind of model"):
        canonical(tmp_path, {"lm_head.weight": WEIGHTS["lm_head.weight"]})


def test_a_bare_model_of_torch_gets_its_prefix(tmp_path: Path) -> None:
    full = to_huggingface(paddle_weights(head=False))
    bare = {name.removeprefix("model."): array for name, array in full.items()}
    source = canonical(tmp_path, bare, tied=TIED, expected=shapes(WEIGHTS))
    assert source.layout == "huggingface"
    for name in source.names():
        assert np.array_equal(source.read(name), WEIGHTS[name])


def test_a_bare_model_of_unknown_layout_is_refused(tmp_path: Path) -> None:
    bare = {n.removeprefix("toy."): a for n, a in paddle_weights(head=False).items()}
    with pytest.raises(CheckpointError, match="nothing in the file says which of the two"):
        canonical(tmp_path, bare, format="np")


def test_missing_unexpected_and_misshaped_are_listed(tmp_path: Path) -> None:
    weights = to_huggingface(WEIGHTS)
    del weights["model.layers.1.norm.weight"]
    weights["model.layers.0.attn.k_norm.weight"] = np.ones(3, np.float32)
    weights["model.layers.2.norm.weight"] = np.ones(HIDDEN, np.float32)
    weights["model.layers.0.mlp.up_proj.weight"] = np.ones((HIDDEN, HIDDEN), np.float32)
    source = canonical(tmp_path, weights)
    with pytest.raises(CheckpointError) as caught:
        source.check(shapes(WEIGHTS))
    assert caught.value.message.endswith(
        "missing (1):\n  toy.layers.1.norm.weight\n"
        "not expected (2):\n  model.layers.0.attn.k_norm.weight\n  toy.layers.2.norm.weight\n"
        "of another shape (1):\n"
        "  toy.layers.0.mlp.up_proj.weight: [12, 12], the model has [12, 20]"
    )
    assert str(tmp_path) in caught.value.message


def test_an_untied_model_needs_its_head(tmp_path: Path) -> None:
    weights = to_huggingface(paddle_weights(head=False))
    with pytest.raises(CheckpointError, match=r"missing \(1\):\n  lm_head.weight"):
        canonical(tmp_path, weights, expected=shapes(WEIGHTS))


def test_two_stored_tensors_for_one_parameter_are_refused(tmp_path: Path) -> None:
    from peft_deploy.families.names import NameMap, NameRule

    rules = [NameRule("toy.w", "model.w"), NameRule("toy.w", "model.alias")]
    save_safetensors(
        tmp_path / "model.safetensors",
        {"model.w": np.ones(2, np.float32), "model.alias": np.ones(2, np.float32)},
    )
    with pytest.raises(CheckpointError, match=r"are both toy\.w"):
        CanonicalTensors(open_checkpoint(tmp_path), NameMap(rules), {})


def test_a_vector_where_a_matrix_has_to_be(tmp_path: Path) -> None:
    weights = to_huggingface(WEIGHTS) | {"lm_head.weight": np.ones(5, np.float32)}
    with pytest.raises(CheckpointError, match=r"lm_head.weight has shape \[5\]"):
        canonical(tmp_path, weights)


@pytest.mark.parametrize(
    "shape", [(), (0,), (1,), (5000,), (40, 3), (3, 40_000), (500, 700), (8, 8, 8, 8), (2, 0, 3)]
)
def test_a_sample_is_spread_over_the_array_and_bounded(shape: tuple[int, ...]) -> None:
    array = np.arange(np.prod(shape), dtype=np.float64).reshape(shape)
    picked = sample(array)
    assert picked.size <= SAMPLED_ELEMENTS
    assert picked.size >= min(array.size, SAMPLED_ELEMENTS // 2)
    if array.size:
        assert picked.min() == 0
        assert picked.max() == array.size - 1
        assert picked.dtype == np.float32
    if array.ndim == 2:
        assert np.array_equal(sample(np.asfortranarray(array)), picked)


def test_a_sample_of_integers_is_not_rounded() -> None:
    values = np.array([2**53 + 1, 5])
    assert np.array_equal(sample(values), values)
    assert sample(values).dtype == np.int64
