"""Weights in a bundle's files against those that an export makes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from made_bundles import Exported, export, make_folders
from model_recipes import load_recipe

from peft_deploy.errors import BundleError
from peft_deploy.parity import ParityReport, stored_weights
from peft_deploy.parity.stored_weights import SAME_SUM, FileTensor, stored_in_onnx
from peft_deploy.weights import TensorInfo, contiguous
from peft_deploy.workflows.check_weights import check_weights

Tensor = Callable[..., FileTensor]
RNG = np.random.default_rng(3)
WEIGHT = RNG.standard_normal((700, 300)).astype(np.float32)


def difference(
    tensor: FileTensor, wanted: np.ndarray, *, summed: bool, chosen: bool = False
) -> str | None:
    """Against an array, given in pieces of a few rows."""
    info = TensorInfo("w", wanted.dtype.name, wanted.shape)
    pieces = (contiguous(wanted[i : i + 150]) for i in range(0, len(wanted), 150))
    return stored_weights.difference(tensor, info, pieces, summed=summed, chosen=chosen)


@pytest.fixture
def stored(tmp_path: Path) -> Tensor:
    """Writes an array behind some junk, as a tensor of a file is."""

    def write(array: np.ndarray, offset: int = 64) -> FileTensor:
        path = tmp_path / "model.onnx.data"
        path.write_bytes(b"x" * offset + array.tobytes() + b"y" * 7)
        return FileTensor("w", path, array.dtype.name, array.shape, offset, array.nbytes)

    return write


def test_equal_bytes_are_equal_whichever_way_the_wanted_array_lies(stored: Tensor) -> None:
    assert difference(stored(WEIGHT), WEIGHT, summed=False) is None
    assert difference(stored(WEIGHT), np.asfortranarray(WEIGHT), summed=False) is None
    assert (
        difference(stored(np.float32([np.nan, -0.0])), np.float32([np.nan, -0.0]), summed=False)
        is None
    )


def test_the_last_bit_of_one_number_counts(stored: Tensor) -> None:
    changed = WEIGHT.copy()
    changed[699, 17] = np.nextafter(changed[699, 17], np.float32(9))
    text = difference(stored(changed), WEIGHT, summed=False)
    assert text is not None and text.startswith("1 of 210000 numbers differ")
    assert text.endswith("the first is [699, 17]")


def test_the_sign_of_zero_and_nan_count(stored: Tensor) -> None:
    zeros = np.zeros(4, np.float32)
    assert difference(stored(-zeros), zeros, summed=False) is not None
    text = difference(stored(np.float32([0, np.nan, 0, 0])), zeros, summed=True)
    assert text is not None and "by up to inf" in text


def test_sums_may_differ_in_their_last_bits_and_no_further(stored: Tensor) -> None:
    largest = float(np.abs(WEIGHT).max())
    near, far = WEIGHT.copy(), WEIGHT.copy()
    near[5, 5] += 0.5 * SAME_SUM * largest
    far[5, 5] += 2 * SAME_SUM * largest
    assert difference(stored(near), WEIGHT, summed=True) is None
    assert difference(stored(near), WEIGHT, summed=False) is not None
    assert difference(stored(far), WEIGHT, summed=True) is not None


def test_few_blocks_of_searched_scales_may_have_others(stored: Tensor) -> None:
    def text(array: np.ndarray, wanted: np.ndarray, **given: bool) -> str | None:
        return difference(stored(array), wanted, summed=True, **given)

    scales = np.abs(WEIGHT) + 1
    few, many, wild = scales * np.float32(1 + SAME_SUM / 5), scales.copy(), scales.copy()
    few.reshape(-1)[::300] *= np.float32(1.2)
    assert text(few, scales, chosen=True) is None
    assert text(few, scales) is not None
    assert difference(stored(few), scales, summed=False, chosen=True) is not None
    many.reshape(-1)[::100] *= np.float32(1.2)
    assert text(many, scales, chosen=True) is not None
    for value in (np.nan, -scales[7, 7], 3 * scales[7, 7]):
        wild[7, 7] = value
        assert text(wild, scales, chosen=True) is not None

    numbers = RNG.integers(0, 256, (500, 8, 16), dtype=np.uint8)
    flipped = numbers.copy()
    flipped[3, 2:6] ^= 0x21  # four blocks
    assert text(flipped, numbers, chosen=True) is None
    assert text(flipped, numbers) is not None
    flipped[4, :2] ^= 0x21
    assert text(flipped, numbers, chosen=True) is not None


def test_another_shape_or_type_is_named(stored: Tensor) -> None:
    text = difference(stored(WEIGHT), WEIGHT.T, summed=False)
    assert text == "it is float32 [700, 300]; it should be float32 [300, 700]"
    text = difference(stored(WEIGHT), WEIGHT.astype(np.float16), summed=False)
    assert text == "it is float32 [700, 300]; it should be float16 [700, 300]"


def test_a_file_that_ends_early_is_damage(stored: Tensor) -> None:
    tensor = stored(WEIGHT)
    tensor.path.write_bytes(tensor.path.read_bytes()[:-100])
    with pytest.raises(BundleError, match="ends within w"):
        difference(tensor, WEIGHT, summed=False)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return export(make_folders(load_recipe("tiny"), tmp_path_factory.mktemp("made"), "llama"))


@pytest.mark.convert
def test_what_an_export_writes_is_what_it_would_write(made: Exported) -> None:
    report = check_weights(_nothing(), made.bundle, made.source())
    assert report.passed
    assert report.cases[0].shape.startswith("15 tensors")


@pytest.mark.convert
def test_a_table_is_held_to_what_the_export_wrote(made: Exported) -> None:
    manifest = json.loads((made.bundle / "peft_deploy.json").read_text("utf-8"))
    tables = manifest["graph"]["tables"]
    stored = stored_in_onnx(made.bundle / "model.onnx")
    assert tables == {name: stored[name].sha256() for name in tables} and tables
    tensor = stored[min(tables)]
    data = bytearray(tensor.path.read_bytes())
    before = bytes(data)
    data[tensor.offset + 4] ^= 1
    try:
        tensor.path.write_bytes(data)
        problem = check_weights(_nothing(), made.bundle, made.source()).cases[0].problem
    finally:
        tensor.path.write_bytes(before)
    assert problem is not None
    assert problem.endswith(f"{tensor.name}: it is not the table that the export wrote")


@pytest.mark.convert
def test_another_adapter_s_weights_are_named(made: Exported, tmp_path: Path) -> None:
    recipe = load_recipe("tiny")
    other = make_folders(recipe, tmp_path, "llama", seed=0)
    recipe.make_lora(tmp_path / "lora2", tmp_path / "base", seed=99)
    from peft_deploy.workflows.sources import from_folders

    source = from_folders(other.folder / "base", f"lora={tmp_path / 'lora2'}")
    problem = check_weights(_nothing(), made.bundle, source).cases[0].problem
    assert problem is not None and "self_attn.qkv_proj.weight: " in problem
    assert "embed_tokens" not in problem and "norm" not in problem


def _nothing() -> ParityReport:
    return ParityReport((), None, None, {}, exact=True, real_text=True, seed=0)
