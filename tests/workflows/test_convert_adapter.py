"""``peft-deploy adapter convert``: there and back between three formats, and every refusal."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from onnx import TensorProto, helper, numpy_helper

from peft_deploy.adapters import Adapter, read_adapter, write_adapter
from peft_deploy.adapters.formats.detect import read_lora
from peft_deploy.adapters.formats.onnx_file import model_version, read_onnx_file
from peft_deploy.adapters.formats.prefix import (
    EMBEDDING,
    PrefixAdapter,
    read_prefix,
    write_prefix,
)
from peft_deploy.base import BaseModel, open_base
from peft_deploy.bundle import MODEL, Manifest
from peft_deploy.bundle.prefixes import read_prefix_file
from peft_deploy.cli import cli
from peft_deploy.config import LoRAConfig, PrefixConfig
from peft_deploy.errors import AdapterError, CheckpointError, ConfigError, OutputError
from peft_deploy.weights.lora import LoraPair, lora_delta
from peft_deploy.workflows.convert_adapter import convert_adapter

MODULES = ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")


@pytest.fixture(scope="module")
def base(tiny_llama: Path) -> BaseModel:
    return open_base(tiny_llama)


@pytest.fixture
def lora(tmp_path: Path, base: BaseModel) -> Callable[..., Path]:
    def make(name: str = "lora", scale: float = 1.0, **options: Any) -> Path:
        generator = np.random.default_rng(12)
        config = LoRAConfig(
            **{"r": 4, "lora_alpha": 6, "target_modules": list(MODULES), **options}
        )
        state = {}
        for i in range(base.dims.num_layers):
            for part in MODULES:
                module = f"llama.layers.{i}.{part}"
                inner, out = base.tensors.info(f"{module}.weight").shape
                A = generator.standard_normal((inner, config.r)) * scale
                B = generator.uniform(0.5, 1, (config.r, out))
                state[f"{module}.lora_A"] = A.astype(np.float32)
                state[f"{module}.lora_B"] = B.astype(np.float32)
        write_adapter(tmp_path / name, config, state)
        return tmp_path / name

    return make


def same_products(first: Adapter, second: Adapter) -> None:
    assert first.pairs.keys() == second.pairs.keys()
    for module, pair in first.pairs.items():
        other, wanted = lora_delta(second.pairs[module]), lora_delta(pair)
        np.testing.assert_allclose(other, wanted, rtol=1e-6, atol=1e-6 * np.abs(wanted).max())


def read(path: Path, base: BaseModel) -> Adapter:
    return read_lora(path, base.names, num_layers=base.dims.num_layers)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, ["adapter", "convert", *map(str, arguments)])


@pytest.mark.parametrize("rslora", [False, True])
def test_paddle_and_hf_keep_every_bit(
    tmp_path: Path, base: BaseModel, lora: Callable[..., Path], rslora: bool
) -> None:
    source = lora(rslora=rslora, lora_dropout=0.1)
    result = convert_adapter(source, tmp_path / "hf", to="hf", base=base.path)
    assert (result.source_format, result.format, result.ranks, result.folded) == (
        *("paddle", "hf"),
        (4,),
        (),
    )
    convert_adapter(tmp_path / "hf", tmp_path / "back", to="paddle", base=base.path)
    first, again = read_adapter(source), read_adapter(tmp_path / "back")
    assert again.fingerprint == first.fingerprint
    assert again.state.keys() == first.state.keys()
    for key in ("r", "lora_alpha", "rslora", "lora_dropout"):
        assert getattr(again.config, key) == getattr(first.config, key)
    config = json.loads((tmp_path / "hf" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["down_proj", "q_proj", "v_proj"]


def test_paddle_to_onnx_and_back(
    tmp_path: Path, base: BaseModel, lora: Callable[..., Path]
) -> None:
    source, file = lora(), tmp_path / "deep" / "a.onnx_adapter"
    result = convert_adapter(source, file, to="onnx", base=base.path)
    assert len(result.folded) == result.modules == 3 * base.dims.num_layers
    assert read_onnx_file(file).model_version == result.model_version
    assert result.model_version == model_version(base.fingerprint)
    convert_adapter(file, tmp_path / "back", to="paddle", base=base.path)
    again = read_adapter(tmp_path / "back")
    same_products(read_adapter(source), again)
    assert again.config.scaling == 1


def test_a_file_for_another_base_model(
    tmp_path: Path,
    base: BaseModel,
    lora: Callable[..., Path],
    make_tiny_llama: Callable[..., Path],
) -> None:
    file, other = tmp_path / "a.onnx_adapter", make_tiny_llama(seed=7)
    convert_adapter(lora(), file, to="onnx", base=base.path)
    with pytest.warns(UserWarning, match="was written for a base model with the model_version"):
        convert_adapter(file, tmp_path / "back", to="paddle", base=other)


def test_a_scaling_of_one_keeps_every_bit(
    tmp_path: Path, base: BaseModel, lora: Callable[..., Path]
) -> None:
    source = lora(lora_alpha=4)
    convert_adapter(source, tmp_path / "a.onnx_adapter", to="onnx", base=base.path)
    convert_adapter(tmp_path / "a.onnx_adapter", tmp_path / "hf", to="hf", base=base.path)
    convert_adapter(tmp_path / "hf", tmp_path / "back", to="paddle", base=base.path)
    assert read_adapter(tmp_path / "back").fingerprint == read_adapter(source).fingerprint


@pytest.fixture
def mixed(tmp_path: Path, base: BaseModel, lora: Callable[..., Path]) -> Path:
    """A PEFT folder with three ranks and three scalings."""
    convert_adapter(lora(), tmp_path / "mixed", to="hf", base=base.path)
    from safetensors.numpy import load_file, save_file

    file = tmp_path / "mixed" / "adapter_model.safetensors"
    tensors = load_file(file)
    for name, array in tensors.items():
        rank = 2 if "q_proj" in name else 3 if "layers.1.mlp" in name else 4
        kept = array[:rank] if "lora_A" in name else array[:, :rank]
        tensors[name] = np.ascontiguousarray(kept)
    save_file(tensors, file, {"format": "pt"})
    config_file = tmp_path / "mixed" / "adapter_config.json"
    config = json.loads(config_file.read_text())
    config["rank_pattern"] = {"q_proj": 2, r"layers\.1\.mlp\.down_proj": 3}
    config["alpha_pattern"] = {"v_proj": 11}
    config_file.write_text(json.dumps(config))
    return tmp_path / "mixed"


def test_mixed_ranks_to_paddle_and_onnx(tmp_path: Path, base: BaseModel, mixed: Path) -> None:
    original = read(mixed, base)
    assert {p.rank for p in original.pairs.values()} == {2, 3, 4}
    result = convert_adapter(mixed, tmp_path / "paddle", to="paddle", base=base.path)
    assert result.ranks == (4,)
    assert len(result.padded) == base.dims.num_layers + 1
    assert result.folded
    same_products(original, read_adapter(tmp_path / "paddle"))
    result = convert_adapter(mixed, tmp_path / "a.onnx_adapter", to="onnx", base=base.path)
    assert result.ranks == (2, 3, 4)
    same_products(original, read(tmp_path / "a.onnx_adapter", base))


def test_dtype(tmp_path: Path, base: BaseModel, lora: Callable[..., Path]) -> None:
    convert_adapter(lora(), tmp_path / "hf", to="hf", base=base.path, dtype="bfloat16")
    assert read(tmp_path / "hf", base).dtype == "bfloat16"
    convert_adapter(
        lora(), tmp_path / "a.onnx_adapter", to="onnx", base=base.path, dtype="float16"
    )
    assert {
        a.dtype.name for a in read_onnx_file(tmp_path / "a.onnx_adapter").tensors.values()
    } == {"float16"}
    with pytest.raises(AdapterError, match="too large for float16"):
        convert_adapter(lora("b", 1e6), tmp_path / "c", to="hf", base=base.path, dtype="float16")
    assert not (tmp_path / "c").exists()


@pytest.fixture
def bundle(tmp_path: Path, base: BaseModel) -> Callable[..., Path]:
    """A bundle that is as much of one as a conversion looks at: manifest, config.json, slots in the graph."""

    def make(rank: int | str = "rank", dtype: int = TensorProto.FLOAT, slots: bool = True) -> Path:
        folder = tmp_path / "bundle"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        size, inputs, weights = rank if isinstance(rank, int) else 0, [], []
        for i in range(base.dims.num_layers if slots else 0):
            for part in MODULES:
                inner, out = base.tensors.info(f"llama.layers.{i}.{part}.weight").shape
                for half, dims, shape in (
                    ("A", (inner, rank), (inner, size)),
                    ("B", (rank, out), (size, out)),
                ):
                    name = f"model.layers.{i}.{part}.lora_{half}.weight"
                    inputs.append(helper.make_tensor_value_info(name, dtype, dims))
                    default = np.zeros(shape, helper.tensor_dtype_to_np_dtype(dtype))
                    weights.append(numpy_helper.from_array(default, name))
        inputs.append(helper.make_tensor_value_info("x", TensorProto.FLOAT, [1]))
        outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])]
        nodes = [helper.make_node("Identity", ["x"], ["y"])]
        graph = helper.make_graph(nodes, "g", inputs, outputs, weights)
        (folder / MODEL).write_bytes(helper.make_model(graph, ir_version=8).SerializeToString())
        config = base.family.huggingface_config(base.config)
        (folder / "config.json").write_text(json.dumps(config))
        manifest = Manifest(
            versions={},
            model_type="llama",
            architecture="LlamaForCausalLM",
            signature=base.family.signature(base.config),
            opset=21,
            precision="fp32",
            base={"name": "tiny", "layout": "huggingface", "fingerprint": base.fingerprint},
        )
        (folder / "peft_deploy.json").write_text(manifest.to_json())
        return folder

    return make


def test_fitted_to_a_bundle(
    tmp_path: Path, base: BaseModel, lora: Callable[..., Path], bundle: Callable[..., Path]
) -> None:
    source, file = lora(), tmp_path / "a.onnx_adapter"
    result = convert_adapter(source, file, to="onnx", bundle=bundle(dtype=TensorProto.FLOAT16))
    assert (result.dtype, result.ranks, result.padded) == ("float16", (4,), ())
    assert result.model_version == model_version(base.fingerprint)
    result = convert_adapter(source, file, to="onnx", bundle=bundle(rank=6), force=True)
    assert (result.dtype, result.ranks) == ("float32", (6,))
    assert len(result.padded) == result.modules
    same_products(read_adapter(source), read(file, base))
    before = file.read_bytes()
    with pytest.raises(AdapterError, match="its slot takes 2"):
        convert_adapter(source, file, to="onnx", bundle=bundle(rank=2), force=True)
    with pytest.raises(AdapterError, match="of another type or shape"):
        convert_adapter(source, file, to="onnx", bundle=bundle(), dtype="bfloat16", force=True)
    with pytest.raises(AdapterError, match="has no slots for adapters"):
        convert_adapter(source, file, to="onnx", bundle=bundle(slots=False), force=True)
    assert file.read_bytes() == before
    convert_adapter(source, tmp_path / "hf", to="hf", bundle=bundle(slots=False))
    assert read(tmp_path / "hf", base).fingerprint == read_adapter(source).fingerprint


def test_slots_that_a_graph_lacks(
    tmp_path: Path, lora: Callable[..., Path], bundle: Callable[..., Path]
) -> None:
    source = lora()
    read_here = read_adapter(source)
    state = {n.replace("v_proj", "k_proj"): a for n, a in read_here.state.items()}
    config = LoRAConfig(r=4, lora_alpha=6, target_modules=["q_proj", "k_proj", "down_proj"])
    write_adapter(tmp_path / "other", config, state)
    with pytest.raises(AdapterError, match=r"no slots for these[\s\S]*k_proj\.lora_A\.weight"):
        convert_adapter(
            tmp_path / "other", tmp_path / "a.onnx_adapter", to="onnx", bundle=bundle()
        )
    assert not (tmp_path / "a.onnx_adapter").exists()


def test_another_base_model(
    tmp_path: Path,
    lora: Callable[..., Path],
    bundle: Callable[..., Path],
    make_tiny_llama: Callable[..., Path],
) -> None:
    other = make_tiny_llama(seed=7)
    with pytest.raises(CheckpointError, match="with fingerprint"):
        convert_adapter(lora(), tmp_path / "hf", to="hf", base=other, bundle=bundle())
    wider = make_tiny_llama(intermediate_size=96)
    with pytest.raises(AdapterError, match=r"does not fit[\s\S]*down_proj"):
        convert_adapter(lora(), tmp_path / "hf", to="hf", base=wider)
    assert not (tmp_path / "hf").exists()


@pytest.fixture
def prefix(tmp_path: Path, base: BaseModel) -> Path:
    dims = base.dims
    array = np.random.default_rng(3).standard_normal(
        (5, 2 * dims.num_layers * dims.num_kv_heads * dims.head_dim)
    )
    config = PrefixConfig(
        num_prefix_tokens=5,
        num_attention_heads=dims.num_heads,
        multi_query_group_num=dims.num_kv_heads,
        num_hidden_layers=dims.num_layers,
        hidden_size=dims.hidden_size,
        dtype="float32",
    )
    state = {EMBEDDING: array.astype(np.float32)}
    write_prefix(PrefixAdapter(tmp_path / "prefix", config, state))
    return tmp_path / "prefix"


def test_prefixes(tmp_path: Path, base: BaseModel, prefix: Path) -> None:
    with pytest.warns(UserWarning, match="PEFT counts the positions of a text's tokens from 5"):
        result = convert_adapter(prefix, tmp_path / "hf", to="hf", base=base.path)
    assert (result.method, result.num_tokens) == ("prefix", 5)
    with pytest.warns(UserWarning, match="positions"):
        convert_adapter(tmp_path / "hf", tmp_path / "back", to="paddle", base=base.path)
    first, again = read_prefix(prefix), read_prefix(tmp_path / "back")
    np.testing.assert_array_equal(first.state[EMBEDDING], again.state[EMBEDDING])
    assert again.fingerprint == first.fingerprint


def test_a_prefix_as_what_bundles_take(tmp_path: Path, base: BaseModel, prefix: Path) -> None:
    rows = read_prefix(prefix).named_past()
    file, cache = tmp_path / "poet.onnx_adapter", tmp_path / "poet.safetensors"
    result = convert_adapter(prefix, file, to="onnx", base=base.path)
    assert (result.num_tokens, result.dtype) == (5, "float32")
    written = read_onnx_file(file)
    assert written.model_version == model_version(base.fingerprint)
    assert written.tensors["prefix.position_offset"].tolist() == [0]
    for name, array in rows.items():
        slot = name.replace("past_key_values", "prefix")
        np.testing.assert_array_equal(written.tensors[slot], array)
    convert_adapter(prefix, cache, to="onnx", base=base.path)
    signature = base.family.signature(base.config)
    read = read_prefix_file(cache, signature, base.fingerprint)
    assert (read.name, read.position_offset) == ("poet", 0)
    for name, array in rows.items():
        np.testing.assert_array_equal(read.past[name], array)
    with pytest.warns(UserWarning, match="PEFT counts"):
        convert_adapter(prefix, tmp_path / "hf", to="hf", base=base.path)
    convert_adapter(tmp_path / "hf", file, to="onnx", base=base.path, force=True)
    assert read_onnx_file(file).tensors["prefix.position_offset"].tolist() == [5]
    with pytest.raises(AdapterError, match="keys and values of a prefix"):
        convert_adapter(file, tmp_path / "back", to="paddle", base=base.path)
    assert not (tmp_path / "back").exists()


def test_prefix_files_that_are_refused(tmp_path: Path, base: BaseModel, prefix: Path) -> None:
    with pytest.raises(OutputError, match=r"has to end in \.safetensors or \.onnx_adapter"):
        convert_adapter(prefix, tmp_path / "poet.bin", to="onnx", base=base.path)
    with pytest.raises(AdapterError, match="takes prefixes of float32, not float16"):
        convert_adapter(
            prefix, tmp_path / "p.safetensors", to="onnx", base=base.path, dtype="float16"
        )
    (tmp_path / "there.safetensors").write_text("mine")
    with pytest.raises(OutputError, match="exists already"):
        convert_adapter(prefix, tmp_path / "there.safetensors", to="onnx", base=base.path)
    assert (tmp_path / "there.safetensors").read_text() == "mine"
    assert {p.name for p in tmp_path.iterdir() if p.suffix} == {"there.safetensors"}


def test_the_command(tmp_path: Path, base: BaseModel, lora: Callable[..., Path]) -> None:
    source = lora()
    done = run(source, tmp_path / "hf", "--to", "hf", "--base", base.path, "--json")
    assert done.exit_code == 0, done.output
    data = json.loads(done.stdout)
    assert (data["format"], data["modules"], data["ranks"]) == ("hf", 6, [4])
    again = run(source, tmp_path / "hf", "--to", "hf", "--base", base.path)
    assert again.exit_code == OutputError.exit_code
    assert "is not empty" in again.stderr
    forced = run(source, tmp_path / "hf", "--to", "hf", "--base", base.path, "--force")
    assert forced.exit_code == 0
    assert "LoRA of rank 4 on 6 modules, float32" in forced.stderr


def test_what_the_command_refuses(
    tmp_path: Path, base: BaseModel, lora: Callable[..., Path]
) -> None:
    source = lora()
    for arguments, code, message in (
        ((source, tmp_path / "o", "--to", "hf"), ConfigError.exit_code, "--base"),
        ((source, tmp_path / "o", "--to", "paddle", "--base", base.path), 3, "already"),
        (
            (tmp_path / "no", tmp_path / "o", "--to", "hf", "--base", base.path),
            3,
            "does not exist",
        ),
        ((tmp_path, tmp_path / "o", "--to", "hf", "--base", base.path), 3, "holds no adapter"),
        ((source, source / "x" / "..", "--to", "hf", "--base", base.path), 2, "would replace"),
        ((source, tmp_path / "o", "--to", "onnx", "--base", base.path), 2, "has to end in"),
        ((source, tmp_path / "o", "--to", "tf", "--base", base.path), 2, "Invalid value"),
    ):
        done = run(*arguments)
        assert (done.exit_code, message in done.stderr) == (code, True), done.stderr
        assert not (tmp_path / "o").exists()


def test_what_cannot_be_represented_leaves_nothing(
    tmp_path: Path, base: BaseModel, lora: Callable[..., Path]
) -> None:
    pissa = lora("pissa", pissa=True)
    for to, name in (("hf", "o"), ("onnx", "o.onnx_adapter")):
        done = run(pissa, tmp_path / name, "--to", to, "--base", base.path)
        assert done.exit_code == 3
        assert "PiSSA" in done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["pissa"]


def test_pairs_of_the_fixture_are_far_from_zero(lora: Callable[..., Path]) -> None:
    pairs: dict[str, LoraPair] = dict(read_adapter(lora()).pairs)
    assert all(np.abs(lora_delta(pair)).mean() > 0.1 for pair in pairs.values())
