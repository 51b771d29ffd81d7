"""The facts about a prefix's files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from peft_deploy.adapters.formats.onnx_file import write_onnx_adapter
from peft_deploy.adapters.formats.prefix import PrefixAdapter, write_prefix
from peft_deploy.bundle.prefixes import Prefix, write_prefix_file
from peft_deploy.cli import cli
from peft_deploy.config import PrefixConfig
from peft_deploy.errors import AdapterError
from peft_deploy.inspection import Kind, PrefixInspection, inspect, kind_of
from peft_deploy.signature import past_names

P, L, H, K, D, WIDTH = 5, 2, 6, 3, 8, 20


def write(folder: Path, *, projection: bool = False) -> Path:
    rng = np.random.default_rng(7)
    shapes: dict[str, tuple[int, ...]] = {"0.weight": (P, 2 * L * K * D)}
    if projection:
        shapes = {
            "0.weight": (P, K * D),
            "1.weight": (K * D, WIDTH),
            "1.bias": (WIDTH,),
            "3.weight": (WIDTH, 2 * L * K * D),
            "3.bias": (2 * L * K * D,),
        }
    config = PrefixConfig(
        num_prefix_tokens=P,
        num_attention_heads=H,
        multi_query_group_num=K,
        num_hidden_layers=L,
        hidden_size=H * D,
        prefix_dropout=0.1,
        prefix_projection=projection,
        prefix_projection_hidden_size=WIDTH if projection else None,
    )
    tensors = {name: rng.standard_normal(s).astype(np.float32) for name, s in shapes.items()}
    write_prefix(PrefixAdapter(folder, config, tensors))
    return folder


@pytest.mark.parametrize("projection", [False, True])
def test_the_facts(projection: bool, tmp_path: Path) -> None:
    found = inspect(write(tmp_path / "p", projection=projection))
    assert isinstance(found, PrefixInspection)
    assert found.method == ("prefix (projection)" if projection else "prefix")
    assert (found.num_tokens, found.num_layers) == (P, L)
    assert (found.num_kv_heads, found.head_dim) == (K, D)
    assert found.projection_size == (WIDTH if projection else None)
    assert found.dropout == 0.1
    state = np.load(tmp_path / "p" / "pre_caches.npy")
    assert found.norm == pytest.approx(np.linalg.norm(state.astype(np.float64)), rel=1e-6)
    assert found.norm > 1
    assert found.cache_bytes == 2 * L * K * P * D * 4
    assert found.pre_caches
    assert {file.name for file in found.files} == {
        "prefix_config.json",
        "prefix_model_state.pdparams",
        "pre_caches.npy",
    }
    assert found.provenance is None
    assert len(found.fingerprint) == 64


def test_the_command_describes_a_prefix(tmp_path: Path) -> None:
    folder = write(tmp_path / "p")
    result = CliRunner().invoke(cli, ["inspect", str(folder), "--json"])
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert (data["kind"], data["num_tokens"], data["finite"]) == ("prefix", P, True)
    text = CliRunner().invoke(cli, ["inspect", str(folder)]).stderr
    assert f"{P} prefix tokens" in text and f"{K} key and value heads of {D}" in text


def test_its_files_are_the_prefix(tmp_path: Path) -> None:
    folder = write(tmp_path / "p")
    for name in ("prefix_config.json", "prefix_model_state.pdparams"):
        assert kind_of(folder / name) == (Kind.PREFIX, folder)


def test_a_damaged_prefix_is_the_readers_error(tmp_path: Path) -> None:
    folder = write(tmp_path / "p")
    caches = np.load(folder / "pre_caches.npy")
    caches[0, 0, 0, 0, 0] += 1
    np.save(folder / "pre_caches.npy", caches)
    with pytest.raises(AdapterError, match=r"pre_caches\.npy"):
        inspect(folder)


def evaluated(**changes: np.ndarray) -> Prefix:
    rng = np.random.default_rng(3)
    shape = (1, K, P, D)
    past = {n: rng.standard_normal(shape).astype(np.float32) for n in past_names(L)} | changes
    return Prefix("p", past, P)


@pytest.mark.parametrize("suffix", [".safetensors", ".onnx_adapter"])
def test_an_evaluated_prefix(suffix: str, tmp_path: Path) -> None:
    path, prefix = tmp_path / f"p{suffix}", evaluated()
    if suffix == ".safetensors":
        write_prefix_file(path, prefix, "ab" * 32)
    else:
        write_onnx_adapter(path, prefix.slots(positions=True), 9)
    assert kind_of(path) == (Kind.PREFIX, path)
    found = inspect(path)
    assert isinstance(found, PrefixInspection)
    assert (found.num_tokens, found.num_layers) == (P, L)
    assert (found.num_kv_heads, found.head_dim, found.position_offset) == (K, D, P)
    assert found.norm == pytest.approx(np.linalg.norm(np.stack(list(prefix.past.values()))))
    assert found.cache_bytes == 2 * L * K * P * D * 4
    assert found.fingerprint == prefix.fingerprint
    base = {".safetensors": f"fingerprint {'ab' * 8}", ".onnx_adapter": "model_version 9"}
    assert found.base_name == base[suffix]
    shown = CliRunner().invoke(cli, ["inspect", str(path)])
    assert shown.exit_code == 0, shown.stderr
    for part in (base[suffix], f"{P} prefix tokens", f"begin at {P}"):
        assert part in shown.stderr
    assert "dropout" not in shown.stderr and "pre_caches" not in shown.stderr


def test_an_evaluated_prefix_of_layers_that_differ(tmp_path: Path) -> None:
    short = evaluated(**{"past_key_values.1.value": np.ones((1, K, P - 1, D), np.float32)})
    write_prefix_file(tmp_path / "p.safetensors", short, "ab" * 32)
    with pytest.raises(AdapterError, match=r"no whole prefix"):
        inspect(tmp_path / "p.safetensors")
    write_onnx_adapter(tmp_path / "p.onnx_adapter", short.slots(positions=True), 9)
    with pytest.raises(AdapterError, match=r"have the shapes \(1, 3, 4, 8\), \(1, 3, 5, 8\)"):
        inspect(tmp_path / "p.onnx_adapter")
    half = {n: a for n, a in evaluated().slots(positions=True).items() if n != "prefix.0.value"}
    write_onnx_adapter(tmp_path / "half.onnx_adapter", half, 9)
    with pytest.raises(AdapterError, match=r"no whole prefix(.|\n)*prefix\.0\.value"):
        inspect(tmp_path / "half.onnx_adapter")


def test_values_that_were_changed_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "p.safetensors"
    write_prefix_file(path, evaluated(), "ab" * 32)
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(data)
    with pytest.raises(AdapterError, match="is damaged"):
        inspect(path)
