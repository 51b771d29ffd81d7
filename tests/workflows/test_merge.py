from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from merge_oracle import (
    assert_rounded_once,
    oracle,
    stored,
    write_lora,
)

import peft_deploy
from peft_deploy.adapters.merge_record import MergeRecord
from peft_deploy.base import open_base
from peft_deploy.cli import cli
from peft_deploy.config.export import ExportOptions
from peft_deploy.config.merge import MergeOptions, parse_size
from peft_deploy.errors import ConfigError
from peft_deploy.weights import ROUNDING_LIMIT, Array
from peft_deploy.workflows.merge import merge as merge_function

Make = Callable[..., Path]


def in_huggingface_terms(tensors: Mapping[str, Array]) -> dict[str, Array]:
    result = {}
    for name, array in tensors.items():
        linear = "_proj" in name or name == "lm_head.weight"
        result[name.replace("llama.", "model.", 1)] = array.T if linear else array
    return result


@pytest.mark.parametrize("layout", ["huggingface", "paddlenlp"])
@pytest.mark.parametrize("to", [None, "hf", "paddle"])
@pytest.mark.parametrize(
    ("base_dtype", "dtype"),
    [
        ("float32", None),
        ("float32", "float16"),
        ("bfloat16", None),
        ("bfloat16", "float32"),
        ("float16", "bfloat16"),
    ],
)
def test_every_weight_is_the_oracle_s_rounded_once(
    make_tiny_llama: Make,
    tiny_llama_module: ModuleType,
    tmp_path: Path,
    layout: str,
    to: str | None,
    base_dtype: str,
    dtype: str | None,
) -> None:
    base = make_tiny_llama(layout=layout, dtype=base_dtype)
    lora = write_lora(tmp_path / "adapter", base)
    out = tmp_path / "out"
    result = peft_deploy.merge(
        base, tmp_path / "adapter", out, options=MergeOptions(to=to, dtype=dtype)
    )
    expected_layout = {None: layout, "hf": "huggingface", "paddle": "paddlenlp"}[to]
    assert result.layout == expected_layout
    tensors, metadata = stored(out)
    if expected_layout == "paddlenlp":
        tensors = in_huggingface_terms(tensors)
    assert metadata == [{"format": "pt" if expected_layout == "huggingface" else "np"}]
    weights = tiny_llama_module.weights(tiny_llama_module.config_of())
    exact, change = oracle(weights, lora, base_dtype)
    assert_rounded_once(tensors, exact, dtype or base_dtype)
    assert np.abs(change["model.layers.1.mlp.up_proj.weight"]).max() > 0.5
    config = json.loads((out / "config.json").read_text())
    wanted, other = ("torch_dtype", "dtype")[:: 1 if expected_layout == "huggingface" else -1]
    assert config[wanted] == (dtype or base_dtype) == result.dtype
    assert other not in config
    assert open_base(out).dims == open_base(base).dims
    assert (out / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    assert (out / "generation_config.json").is_file()


def test_paddlenlp_s_config_names_one_type(
    make_tiny_llama: Make, tuned: Path, tmp_path: Path
) -> None:
    base = make_tiny_llama(layout="paddlenlp")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "torch_dtype": "float32"}))
    options = MergeOptions(dtype="bfloat16")
    peft_deploy.merge(base, tuned, tmp_path / "out", options=options)
    merged = json.loads((tmp_path / "out" / "config.json").read_text())
    assert merged == {**config, "dtype": "bfloat16"}


@pytest.mark.parametrize("container", ["sharded-safetensors", "pdparams", "sharded-pdparams"])
def test_whatever_the_base_is_stored_in(
    make_tiny_llama: Make, tiny_llama: Path, tuned: Path, tmp_path: Path, container: str
) -> None:
    peft_deploy.merge(tiny_llama, tuned, tmp_path / "plain")
    base = make_tiny_llama(container=container, layout="paddlenlp")
    options = MergeOptions(to="hf")
    peft_deploy.merge(base, tuned, tmp_path / "other", options=options)
    first, second = stored(tmp_path / "plain")[0], stored(tmp_path / "other")[0]
    assert first.keys() == second.keys()
    assert all(first[name].tobytes() == second[name].tobytes() for name in first)


@pytest.mark.parametrize("to", ["hf", "paddle"])
@pytest.mark.parametrize("tied", [False, True])
def test_shards_hold_everything_once(
    make_tiny_llama: Make, tmp_path: Path, to: str, tied: bool
) -> None:
    base = make_tiny_llama(tied=tied)
    write_lora(tmp_path / "adapter", base)
    options = MergeOptions(to=to, max_shard_size="64KB")
    result = peft_deploy.merge(base, tmp_path / "adapter", tmp_path / "out", options=options)
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    tensors, metadata = stored(tmp_path / "out")
    assert len(metadata) == len(result.files) - 1 >= 3
    assert index["weight_map"].keys() == tensors.keys()
    assert len(tensors) == result.tensors == (20 if tied else 21)
    assert ("lm_head.weight" in tensors) == (not tied)
    assert index["metadata"]["total_size"] == sum(a.nbytes for a in tensors.values())
    for file in (tmp_path / "out").glob("*.safetensors"):
        assert file.stat().st_size < 64_000 + 4_000
    assert open_base(tmp_path / "out").config["tie_word_embeddings"] is tied


def test_whole_tensors_of_the_adapter_take_the_base_s_place(
    tiny_llama: Path, tmp_path: Path
) -> None:
    rng = np.random.default_rng(3)
    norm = rng.normal(0, 2, 48).astype(np.float32)
    head = rng.normal(0, 2, (48, 131)).astype(np.float32)
    replaced = {"llama.norm.weight": norm, "lm_head.weight": head}
    write_lora(
        tmp_path / "adapter",
        tiny_llama,
        replaced=replaced,
        trainable_modules=["llama.norm", "lm_head"],
    )
    peft_deploy.merge(tiny_llama, tmp_path / "adapter", tmp_path / "out")
    tensors, _ = stored(tmp_path / "out")
    assert np.array_equal(tensors["model.norm.weight"], norm)
    assert np.array_equal(tensors["lm_head.weight"], head.T)
    record = MergeRecord.load(tmp_path / "out")
    assert record is not None and record.adapters[0].replaced == tuple(sorted(replaced))


def test_a_replaced_tied_matrix_is_stored_once(make_tiny_llama: Make, tmp_path: Path) -> None:
    base = make_tiny_llama(tied=True)
    value = np.random.default_rng(4).normal(0, 2, (131, 48)).astype(np.float32)
    write_lora(
        tmp_path / "adapter",
        base,
        replaced={"llama.embed_tokens.weight": value},
        trainable_modules=["llama.embed_tokens"],
    )
    peft_deploy.merge(base, tmp_path / "adapter", tmp_path / "out")
    tensors, _ = stored(tmp_path / "out")
    assert np.array_equal(tensors["model.embed_tokens.weight"], value)
    assert "lm_head.weight" not in tensors


# What PaddleNLP makes of it.


def logits(model: Any) -> Array:
    import paddle

    ids = paddle.to_tensor(np.array([[5, 90, 17, 33, 60, 8, 8], [1, 2, 3, 4, 100, 6, 7]]))
    with paddle.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PaddleNLP calls functions that Paddle has deprecated
        result = model(ids)
    return (result[0] if isinstance(result, (tuple, list)) else result).astype("float32").numpy()


def with_active_adapter(base: Path, adapter: Path) -> tuple[Array, Array]:
    """Logits of the base model alone and with the adapter active, not merged, in float32."""
    from peft_deploy.adapters.lora import LoRAModel
    from peft_deploy.base.dygraph import load_model

    model = load_model(open_base(base))
    alone = logits(model)
    adapted = LoRAModel.from_pretrained(model, adapter)
    adapted.eval()
    return alone, logits(adapted)


def from_pretrained(folder: Path) -> Any:
    from peft_deploy.environment import require_paddle

    require_paddle("the test")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from paddlenlp.transformers import LlamaForCausalLM

        model = LlamaForCausalLM.from_pretrained(str(folder))
    model.eval()
    return model


@pytest.mark.parametrize("layout", ["huggingface", "paddlenlp"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shard", ["5GB", "64KB"])
def test_paddlenlp_loads_it_and_computes_what_was_trained(
    make_tiny_llama: Make, tmp_path: Path, layout: str, tied: bool, shard: str
) -> None:
    base = make_tiny_llama(layout=layout, tied=tied)
    write_lora(tmp_path / "adapter", base, spread=0.1)
    options = MergeOptions(to="paddle", max_shard_size=shard)
    peft_deploy.merge(base, tmp_path / "adapter", tmp_path / "out", options=options)
    alone, active = with_active_adapter(base, tmp_path / "adapter")
    assert np.abs(alone - active).max() > 1
    np.testing.assert_allclose(logits(from_pretrained(tmp_path / "out")), active, atol=2e-4)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_paddlenlp_reads_the_very_bits_of_narrow_types(
    tiny_llama: Path, tuned: Path, tmp_path: Path, dtype: str
) -> None:
    options = MergeOptions(to="paddle", dtype=dtype)
    peft_deploy.merge(tiny_llama, tuned, tmp_path / "out", options=options)
    model = from_pretrained(tmp_path / "out")
    tensors, _ = stored(tmp_path / "out")
    parameters = dict(model.named_parameters())
    assert parameters.keys() == tensors.keys()
    for name, parameter in parameters.items():
        assert str(parameter.dtype) == f"paddle.{dtype}"
        wide = tensors[name].astype(np.float32)
        assert np.array_equal(parameter.astype("float32").numpy(), wide), name


@pytest.mark.convert
def test_exporting_the_merged_checkpoint_is_exporting_with_merge(
    tiny_llama: Path, tuned: Path, tmp_path: Path
) -> None:
    peft_deploy.merge(tiny_llama, tuned, tmp_path / "merged", options=MergeOptions(to="paddle"))
    options = ExportOptions(validate=False)
    peft_deploy.export(tmp_path / "merged", tmp_path / "one", options=options)
    peft_deploy.export(tiny_llama, tmp_path / "two", adapter=tuned, options=options)
    for name in ("model.onnx", "model.onnx.data"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


# Rounding.


@pytest.mark.parametrize(
    ("dtype", "spread", "warns"),
    [("bfloat16", 0.0007, True), ("float16", 0.0007, False), ("bfloat16", 0.2, False)],
)
def test_what_rounding_loses_is_measured(
    tiny_llama: Path,
    tiny_llama_module: ModuleType,
    tmp_path: Path,
    dtype: str,
    spread: float,
    warns: bool,
) -> None:
    lora = write_lora(tmp_path / "adapter", tiny_llama, spread=spread)
    options = MergeOptions(dtype=dtype)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        result = peft_deploy.merge(
            tiny_llama, tmp_path / "adapter", tmp_path / "out", options=options
        )
    weights = tiny_llama_module.weights(tiny_llama_module.config_of())
    exact, change = oracle(weights, lora, "float32")
    tensors, _ = stored(tmp_path / "out")
    assert len(result.rounding_loss) == 14
    for name, loss in result.rounding_loss.items():
        key = name.replace("llama.", "model.", 1)
        error = tensors[key].astype(np.float64) - exact[key]
        expected = np.linalg.norm(error) / np.linalg.norm(change[key])
        assert loss == pytest.approx(expected, rel=1e-3)
        assert (loss > ROUNDING_LIMIT) == (name in result.lossy)
    assert bool(result.lossy) == warns
    record = MergeRecord.load(tmp_path / "out")
    assert record is not None and record.rounding_loss == result.rounding_loss
    messages = [str(warning.message) for warning in caught]
    assert bool(messages) == warns
    if warns:
        worst = next(iter(result.lossy))
        assert f"{worst}: {result.lossy[worst]:.2f}" in messages[0]
        assert f"in {len(result.lossy)} tensors" in messages[0]


def test_rounding_of_a_replaced_tensor_is_measured_too(
    make_tiny_llama: Make, tmp_path: Path
) -> None:
    base = make_tiny_llama(dtype="bfloat16")
    before = open_base(base).tensors.read("llama.norm.weight").astype(np.float32)
    norm = before + np.float32(1e-3)  # less than half a step of bfloat16: nothing remains of it
    replaced = {"llama.norm.weight": norm}
    write_lora(
        tmp_path / "adapter", base, replaced=replaced, trainable_modules=["llama.norm.weight"]
    )
    with pytest.warns(UserWarning, match=r"llama\.norm\.weight: 1\.00"):
        result = peft_deploy.merge(base, tmp_path / "adapter", tmp_path / "out")
    assert list(result.lossy) == ["llama.norm.weight"]


# Options and the command line.


@pytest.mark.parametrize(
    ("size", "count"),
    [
        ("5GB", 5 * 10**9),
        ("1.5 MB", 1_500_000),
        ("2GiB", 2**31),
        ("512mib", 2**29),
        ("1000", 1000),
        (4096, 4096),
        ("7 kb", 7000),
        ("12B", 12),
    ],
)
def test_sizes(size: int | str, count: int) -> None:
    assert parse_size(size) == count


@pytest.mark.parametrize(
    "size", ["", "GB", "-1GB", "5 TB", "7K", "GiB", "0", 0, -3, True, "1e9", "5GB extra"]
)
def test_what_is_no_size(size: Any) -> None:
    with pytest.raises(ConfigError, match="is no size"):
        MergeOptions(max_shard_size=size)


@pytest.mark.parametrize("options", [{"to": "onnx"}, {"dtype": "int8"}, {"dtype": "fp16"}])
def test_options_that_cannot_be_used(options: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="is none of"):
        MergeOptions(**options)


def run(*arguments: object):
    return CliRunner().invoke(cli, ["merge", *map(str, arguments)])


def test_the_command(tiny_llama: Path, tmp_path: Path) -> None:
    write_lora(tmp_path / "tuned", tiny_llama, spread=0.0007)
    given = ("--base", tiny_llama, "--adapter", f"mine={tmp_path / 'tuned'}")
    out = tmp_path / "out"
    result = run(*given, "--output", out, "--dtype", "bfloat16", "--to", "paddle", "--json")
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert data["layout"] == "paddlenlp" and data["dtype"] == "bfloat16"
    assert data["output"] == str(out) and data["tensors"] == 21
    assert max(data["rounding_loss"].values()) > data["rounding_limit"] == ROUNDING_LIMIT
    assert data["lossy"] and data["lossy"][0] in data["warnings"][0]
    assert "warning:" in result.stderr
    record = MergeRecord.load(out)
    assert record is not None and record.adapters[0].name == "mine"
    again = run("--base", out, "--adapter", tmp_path / "tuned", "--output", tmp_path / "twice")
    assert again.exit_code == 3
    assert "already holds the adapter" in again.stderr and again.stdout == ""
    assert run(*given, "--output", out).exit_code == 2
    assert run(*given, "--output", out, "--max-shard-size", "much", "--force").exit_code == 2


def test_merge_is_in_the_python_api() -> None:
    assert peft_deploy.merge is merge_function
