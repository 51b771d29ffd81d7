"""Reading and writing PaddleNLP's adapter folders, without any Paddle model."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from peft_deploy.adapters import Adapter, Provenance, read_adapter, write_adapter
from peft_deploy.adapters.formats.fused import spread_parts
from peft_deploy.adapters.pissa import principal_split
from peft_deploy.adapters.provenance import WeightSample
from peft_deploy.config import LoRAConfig
from peft_deploy.errors import AdapterError
from peft_deploy.weights.source import DTYPES, TensorInfo

R, ALPHA = 3, 6
NAME = "lora_model_state.pdparams"
Tensors = dict[str, np.ndarray]


class Arrays:
    """A base model's tensors in memory."""

    def __init__(self, tensors: Tensors) -> None:
        self.tensors = tensors

    def names(self) -> list[str]:
        return list(self.tensors)

    def info(self, name: str) -> TensorInfo:
        return TensorInfo(name, self.tensors[name].dtype.name, self.tensors[name].shape)

    def read(self, name: str) -> np.ndarray:
        return self.tensors[name]


def tensors(dtype: str = "float32") -> Tensors:
    generator = np.random.default_rng(4)
    shapes = {
        "a.q.lora_A": (8, R),
        "a.q.lora_B": (R, 6),
        "a.v.lora_A": (8, R),
        "a.v.lora_B": (R, 4),
        "a.v.bias": (4,),
        "head.weight": (4, 5),
    }
    return {n: generator.standard_normal(s).astype(DTYPES[dtype]) for n, s in shapes.items()}


def config(**options: object) -> LoRAConfig:
    return LoRAConfig(**{"r": R, "lora_alpha": ALPHA, "target_modules": ["q", "v"], **options})


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def write(state: Tensors | None = None, **options: object) -> Path:
        write_adapter(tmp_path, config(**options), tensors() if state is None else state)
        return tmp_path

    return write


def equal(adapter: Adapter, state: Tensors) -> None:
    assert set(adapter.state) == set(state)
    for name, array in state.items():
        assert adapter.state[name].dtype == array.dtype
        np.testing.assert_array_equal(adapter.state[name], array)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
def test_round_trip(tmp_path: Path, dtype: str) -> None:
    state = tensors(dtype)
    write_adapter(tmp_path, config(), state)
    adapter = read_adapter(tmp_path)
    equal(adapter, state)
    assert list(adapter.pairs) == ["a.q", "a.v"]
    np.testing.assert_array_equal(adapter.pairs["a.q"].A, state["a.q.lora_A"])
    np.testing.assert_array_equal(adapter.pairs["a.q"].B, state["a.q.lora_B"])
    assert adapter.pairs["a.q"].scaling == ALPHA / R
    assert set(adapter.replacements) == {"a.v.bias", "head.weight"}
    assert adapter.dtype == dtype
    assert adapter.path == tmp_path
    assert adapter.provenance is None


def test_fingerprint_follows_the_contents(tmp_path: Path) -> None:
    state = tensors()
    write_adapter(tmp_path / "first", config(), state)
    write_adapter(tmp_path / "same", config(), dict(reversed(state.items())))
    write_adapter(tmp_path / "scaled", config(lora_alpha=7), state)
    state["a.v.bias"] = state["a.v.bias"] + 1
    write_adapter(tmp_path / "changed", config(), state)
    prints = [
        read_adapter(tmp_path / n).fingerprint for n in ("first", "same", "scaled", "changed")
    ]
    assert prints[0] == prints[1]
    assert len(set(prints)) == 3
    assert all(len(print_) == 64 for print_ in prints)


def test_reading_needs_no_paddle(write: Callable[..., Path]) -> None:
    script = f"""
        import sys
        sys.modules["paddle"] = sys.modules["paddlenlp"] = None
        from pathlib import Path
        from peft_deploy.adapters.formats.paddlenlp import read_adapter
        from peft_deploy.adapters import write_adapter
        adapter = read_adapter(Path({str(write())!r}))
        print(sorted(adapter.tensors.pairs))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True
    )
    assert done.stdout == "['a.q', 'a.v']\n"


def test_the_specification_s_spelling_of_the_file(write: Callable[..., Path]) -> None:
    folder = write()
    (folder / NAME).rename(folder / "lora_mode_state.pdparams")
    equal(read_adapter(folder), tensors())


@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_safetensors_alone_or_with_an_index(
    write: Callable[..., Path], indexed: bool, dtype: str
) -> None:
    folder, state = write(), tensors(dtype)
    (folder / NAME).unlink()
    if indexed:
        halves = [dict(list(state.items())[:2]), dict(list(state.items())[2:])]
        files = [f"peft_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
        for file, half in zip(files, halves, strict=True):
            save_file(half, folder / file)
        names = {n: f for f, half in zip(files, halves, strict=True) for n in half}
        index = {"metadata": {}, "weight_map": names}
        (folder / "peft_model.safetensors.index.json").write_text(json.dumps(index))
    else:
        save_file(state, folder / "peft_model.safetensors")
    equal(read_adapter(folder), state)


def test_a_shard_that_is_not_there(write: Callable[..., Path]) -> None:
    folder = write()
    (folder / NAME).unlink()
    index = {"weight_map": {"a.q.lora_A": "peft_model-00001-of-00002.safetensors"}}
    (folder / "peft_model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(Exception, match="peft_model-00001-of-00002") as caught:
        read_adapter(folder)
    assert caught.value.exit_code == 3


def test_two_sets_of_weights(write: Callable[..., Path]) -> None:
    folder = write()
    save_file(tensors(), folder / "peft_model.safetensors")
    with pytest.raises(AdapterError, match="more than one set"):
        read_adapter(folder)


@pytest.mark.parametrize("part", ["tp01_pp00", "pp02"])
def test_pieces_of_pipeline_stages(write: Callable[..., Path], part: str) -> None:
    folder = write()
    (folder / NAME).rename(folder / f"lora_model_state.{part}.pdparams")
    with pytest.raises(AdapterError, match=f"single parallel ranks:\n  lora_model_state.{part}"):
        read_adapter(folder)


@pytest.mark.parametrize(
    ("file", "format"), [("adapter_config.json", "Hugging Face"), ("prefix_config.json", "prefix")]
)
def test_other_formats_are_named(tmp_path: Path, file: str, format: str) -> None:
    (tmp_path / file).write_text("{}")
    with pytest.raises(AdapterError, match=format):
        read_adapter(tmp_path)


def test_no_adapter_at_all(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="not an adapter"):
        read_adapter(tmp_path)
    with pytest.raises(AdapterError, match="does not exist"):
        read_adapter(tmp_path / "missing")
    (tmp_path / "file").write_text("")
    with pytest.raises(AdapterError, match="is a file"):
        read_adapter(tmp_path / "file")


def test_no_weights(write: Callable[..., Path]) -> None:
    folder = write()
    (folder / NAME).unlink()
    with pytest.raises(AdapterError, match="no adapter weights"):
        read_adapter(folder)


def broken(change: Callable[[Tensors], object]) -> Tensors:
    state = tensors()
    change(state)
    return state


ONES = np.ones((2, 2), np.float32)
BROKEN = {
    "A without B": (lambda s: s.pop("a.q.lora_B"), r"one half.*\n  a\.q\.lora_A"),
    "B without A": (lambda s: s.pop("a.v.lora_A"), r"one half.*\n  a\.v\.lora_B"),
    "another rank": (
        lambda s: s.update(
            {"a.q.lora_A": np.ones((8, 2), "f4"), "a.q.lora_B": np.ones((2, 6), "f4")}
        ),
        r"a\.q.*of rank 2; its lora_config\.json says r = 3",
    ),
    "ranks of A and B": (lambda s: s.update({"a.q.lora_B": np.ones((4, 6), "f4")}), "rank in the"),
    "one axis": (lambda s: s.update({"a.q.lora_A": np.ones(8, "f4")}), "have to be matrices"),
    "mixed types": (
        lambda s: s.update({"a.q.lora_A": s["a.q.lora_A"].astype(np.float16)}),
        "mixes the element types float16, float32",
    ),
    "NaN": (lambda s: s["a.q.lora_A"].__setitem__((0, 0), np.nan), r"NaN.*\n  a\.q\.lora_A"),
    "infinity": (lambda s: s["a.v.lora_B"].__setitem__((0, 0), -np.inf), r"\n  a\.v\.lora_B"),
    "NaN in a bias": (lambda s: s["a.v.bias"].__setitem__(0, np.nan), r"\n  a\.v\.bias"),
    "mixer": (lambda s: s.update({"a.q.lora_AB": ONES}), "MosLoRA"),
    "quantizer": (lambda s: s.update({"a.q.weight_quanter._scale": ONES}), "quantization-aware"),
    "no pair": (lambda s: [s.pop(n) for n in list(s) if "lora" in n], "no lora_A and lora_B"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_file_is_refused(write: Callable[..., Path], fault: str) -> None:
    change, message = BROKEN[fault]
    folder = write(broken(change))
    with pytest.raises(AdapterError, match=message):
        read_adapter(folder)


def test_integers_are_no_adapter(write: Callable[..., Path]) -> None:
    folder = write()
    state = {**tensors(), "a.q.lora_A": np.ones((8, R), np.int64)}
    (folder / NAME).write_bytes(pickle.dumps(state, protocol=4))
    with pytest.raises(AdapterError, match=r"a\.q\.lora_A: int64"):
        read_adapter(folder)
    with pytest.raises(AdapterError, match="int64"):
        write_adapter(folder, config(), state)


def test_a_file_that_would_run_code_is_not_run(write: Callable[..., Path], tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> object:
            return (Path.touch, (tmp_path / "ran",))

    folder = write()
    (folder / NAME).write_bytes(pickle.dumps({**tensors(), "x": Evil()}, protocol=4))
    with pytest.raises(Exception, match="pathlib") as caught:
        read_adapter(folder)
    assert caught.value.exit_code == 3
    assert not (tmp_path / "ran").exists()


def test_a_truncated_file(write: Callable[..., Path]) -> None:
    folder = write()
    data = (folder / NAME).read_bytes()
    (folder / NAME).write_bytes(data[: len(data) // 2])
    with pytest.raises(Exception, match=NAME) as caught:
        read_adapter(folder)
    assert caught.value.exit_code == 3


def test_a_scaling_of_rslora(write: Callable[..., Path]) -> None:
    assert read_adapter(write(rslora=True)).pairs["a.q"].scaling == pytest.approx(ALPHA / R**0.5)


def test_merging_into_a_base_model(write: Callable[..., Path]) -> None:
    adapter, state = read_adapter(write()), tensors()
    base = Arrays(
        {
            "a.q.weight": np.random.default_rng(1).standard_normal((8, 6)).astype(np.float32),
            "a.v.weight": np.zeros((8, 4), ml_dtypes.bfloat16),
            "a.v.bias": np.zeros(4, np.float32),
            "head.weight": np.zeros((4, 5), np.float32),
            "other": np.ones(3, np.float32),
        }
    )
    merged = adapter.merge_into(base)
    expected = base.read("a.q.weight") + 2.0 * state["a.q.lora_A"] @ state["a.q.lora_B"]
    np.testing.assert_allclose(merged.read("a.q.weight"), expected, atol=1e-5)
    assert merged.read("a.v.weight").dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(merged.read("head.weight"), state["head.weight"])
    np.testing.assert_array_equal(merged.read("other"), base.read("other"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_l7_pissa_is_merged_into_what_is_left_of_the_weight(
    write: Callable[..., Path], dtype: str
) -> None:
    adapter, state = read_adapter(write(pissa=True)), tensors()
    generator = np.random.default_rng(1)
    shapes = {"a.q.weight": (8, 6), "a.v.weight": (8, 4), "a.v.bias": (4,), "head.weight": (4, 5)}
    base = Arrays(
        {n: generator.standard_normal(s).astype(DTYPES[dtype]) for n, s in shapes.items()}
    )
    W = base.read("a.q.weight").astype(np.float64)
    u, s, v = np.linalg.svd(W, full_matrices=False)
    rest = W - u[:, :R] * s[:R] @ v[:R]
    expected = rest + state["a.q.lora_A"].astype(np.float64) @ state["a.q.lora_B"]
    merged = adapter.merge_into(base).read("a.q.weight")
    assert merged.dtype == DTYPES[dtype]
    np.testing.assert_allclose(
        merged.astype(np.float64), expected, atol=1e-5 if dtype == "float32" else 3e-2
    )
    assert np.abs(expected - W).max() > 1
    with pytest.raises(AdapterError, match="PiSSA"):
        _ = adapter.tensors


def test_principal_split_adds_up() -> None:
    W = np.random.default_rng(0).standard_normal((5, 7)).astype(np.float32)
    split = principal_split(W, 2)
    np.testing.assert_allclose(split.residual + split.A @ split.B, W, atol=1e-6)
    assert np.linalg.matrix_rank(split.residual, tol=1e-4) == 3
    with pytest.raises(AdapterError, match="at most 5"):
        principal_split(W, 6)
    with pytest.raises(AdapterError, match="NaN"):
        principal_split(np.full((2, 2), np.nan, np.float32), 1)


def test_fused_parts_become_one_pair(write: Callable[..., Path]) -> None:
    generator = np.random.default_rng(2)
    state = {
        "a.qkv.lora_A": generator.standard_normal((8, 2 * R)).astype(np.float32),
        "a.qkv.lora_B": generator.standard_normal((R, 2 * 2 * 4)).astype(np.float32),
        "a.out.lora_A": generator.standard_normal((8, R)).astype(np.float32),
        "a.out.lora_B": generator.standard_normal((R, 8)).astype(np.float32),
    }
    options = {"enable_lora_list": [[True, False, True], None], "head_dim": 4}
    adapter = read_adapter(write(state, target_modules=["qkv", "out"], **options))
    assert adapter.pairs["a.qkv"].A.shape == (8, 2 * R)
    assert adapter.pairs["a.qkv"].B.shape == (2 * R, 2 * 3 * 4)
    assert adapter.pairs["a.out"].rank == R
    delta = adapter.pairs["a.qkv"].A @ adapter.pairs["a.qkv"].B
    value_of_head_1 = delta.reshape(8, 2, 3, 4)[:, 1, 2]
    B = state["a.qkv.lora_B"].reshape(R, 2, 2, 4)[:, 1, 1]
    np.testing.assert_allclose(value_of_head_1, state["a.qkv.lora_A"][:, R:] @ B, atol=1e-5)
    assert not delta.reshape(8, 2, 3, 4)[:, :, 1].any()


def test_fused_parts_that_are_no_whole_heads() -> None:
    with pytest.raises(AdapterError, match="head_dim 4"):
        spread_parts(np.ones((R, 10), np.float32), [True, False], 4)


def test_convolutions_become_matrices(write: Callable[..., Path]) -> None:
    generator = np.random.default_rng(2)
    A = generator.standard_normal((R, 2, 3, 3)).astype(np.float32)
    B = generator.standard_normal((5, R, 1, 1)).astype(np.float32)
    adapter = read_adapter(write({"c.lora_A": A, "c.lora_B": B}, target_modules=["c"]))
    assert adapter.pairs["c"].shape == (5, 18)
    expected = np.einsum("or,rikl->oikl", B[:, :, 0, 0], A).reshape(5, 18)
    np.testing.assert_allclose(adapter.pairs["c"].A @ adapter.pairs["c"].B, expected, atol=1e-5)


def test_provenance_round_trip(tmp_path: Path) -> None:
    weight = np.random.default_rng(0).standard_normal((6, 5)).astype(np.float16)
    provenance = Provenance("ab", {"a.q": WeightSample.of(weight)}, merged=True)
    write_adapter(tmp_path, config(), tensors(), provenance)
    assert read_adapter(tmp_path).provenance == provenance
