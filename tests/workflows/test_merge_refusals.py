from __future__ import annotations

import errno
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from merge_oracle import (
    Q0,
    assert_rounded_once,
    oracle,
    stored,
    write_lora,
)

import peft_deploy
from peft_deploy.adapters.merge_record import MERGE_RECORD_NAME, MergeRecord
from peft_deploy.adapters.provenance import Provenance, WeightSample
from peft_deploy.base import open_base
from peft_deploy.config.merge import MergeOptions
from peft_deploy.errors import AdapterError, CheckpointError, OutputError
from peft_deploy.weights import DTYPES
from peft_deploy.workflows.merged_checkpoint import same_bits
from peft_deploy.workflows.sources import from_folders

Make = Callable[..., Path]


# An adapter is merged once.


def test_the_same_adapter_is_refused_the_second_time(
    tiny_llama: Path, tuned: Path, tmp_path: Path
) -> None:
    peft_deploy.merge(tiny_llama, tuned, tmp_path / "once")
    with pytest.raises(AdapterError, match=r"already holds the adapter .*tuned") as caught:
        peft_deploy.merge(tmp_path / "once", f"again={tuned}", tmp_path / "twice")
    assert caught.value.hint is not None
    with pytest.raises(AdapterError, match="already holds the adapter"):
        peft_deploy.export(tmp_path / "once", tmp_path / "bundle", adapter=tuned)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["once", "tuned"]


def test_a_second_adapter_goes_on_top_and_both_are_known(
    tiny_llama: Path, tiny_llama_module: ModuleType, tmp_path: Path
) -> None:
    first = write_lora(tmp_path / "first", tiny_llama)
    second = write_lora(tmp_path / "second", tiny_llama, seed=8)
    peft_deploy.merge(tiny_llama, tmp_path / "first", tmp_path / "once")
    peft_deploy.merge(tmp_path / "once", tmp_path / "second", tmp_path / "both")
    weights = tiny_llama_module.weights(tiny_llama_module.config_of())
    exact, _ = oracle(weights, first, "float32")
    _, change = oracle(weights, second, "float32")
    tensors, _ = stored(tmp_path / "both")
    assert_rounded_once(tensors, {n: exact[n] + change[n] for n in exact}, "float32")
    record = MergeRecord.load(tmp_path / "both")
    assert record is not None
    assert [adapter.name for adapter in record.adapters] == ["first", "second"]
    for name in ("first", "second"):
        with pytest.raises(AdapterError, match="already holds"):
            from_folders(tmp_path / "both", tmp_path / name)


def provenance_for(base: Path, **changes: Any) -> Provenance:
    """What LoRAModel.save_pretrained records of a base model."""
    model = open_base(base)
    weight = model.tensors.read(f"{Q0}.weight")
    return Provenance(
        **{
            "base_fingerprint": model.fingerprint,
            "base_weights": {Q0: WeightSample.of(weight)},
            **changes,
        }
    )


def test_without_the_record_the_adapter_s_own_memory_tells(
    tiny_llama: Path, tmp_path: Path
) -> None:
    write_lora(tmp_path / "adapter", tiny_llama, provenance=provenance_for(tiny_llama))
    peft_deploy.merge(tiny_llama, tmp_path / "adapter", tmp_path / "once")
    (tmp_path / "once" / MERGE_RECORD_NAME).unlink()
    with pytest.raises(AdapterError, match=f"already holds this adapter, merged into:\n  {Q0}"):
        peft_deploy.merge(tmp_path / "once", tmp_path / "adapter", tmp_path / "twice")


def test_another_base_model_is_pointed_out(
    tiny_llama: Path, make_tiny_llama: Make, tmp_path: Path
) -> None:
    other = make_tiny_llama(seed=1)
    known = provenance_for(tiny_llama)
    write_lora(tmp_path / "adapter", tiny_llama, provenance=known)
    with pytest.warns(UserWarning) as caught:
        peft_deploy.merge(other, tmp_path / "adapter", tmp_path / "out")
    messages = "\n".join(str(warning.message) for warning in caught)
    assert "not the one that the adapter was trained on" in messages
    assert known.base_fingerprint is not None
    assert f"the adapter's base had {known.base_fingerprint[:12]}" in messages
    assert open_base(other).fingerprint[:12] in messages


def test_the_same_base_in_another_type_is_no_other_base(
    tiny_llama: Path, make_tiny_llama: Make, tmp_path: Path
) -> None:
    write_lora(tmp_path / "adapter", tiny_llama, provenance=provenance_for(tiny_llama))
    narrow = make_tiny_llama(dtype="bfloat16")
    assert open_base(narrow).fingerprint != open_base(tiny_llama).fingerprint
    peft_deploy.merge(narrow, tmp_path / "adapter", tmp_path / "out")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read"),
        ('{"format_version": 99}', "format_version 99; this release reads up to 1"),
        ('{"format_version": 1}', "cannot be read: 'adapters'"),
    ],
)
def test_a_record_that_cannot_be_used(
    make_tiny_llama: Make, tuned: Path, tmp_path: Path, text: str, message: str
) -> None:
    base = make_tiny_llama()
    (base / MERGE_RECORD_NAME).write_text(text)
    with pytest.raises(CheckpointError, match=message):
        peft_deploy.merge(base, tuned, tmp_path / "out")


# Errors leave nothing behind.


def test_an_adapter_of_another_model(
    make_tiny_llama: Make, tiny_llama: Path, tmp_path: Path
) -> None:
    wider = make_tiny_llama(intermediate_size=96)
    write_lora(tmp_path / "adapter", wider)
    with pytest.raises(AdapterError, match=r"does not fit the base model:\n.*mlp\.down_proj"):
        peft_deploy.merge(tiny_llama, tmp_path / "adapter", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_an_adapter_that_is_not_finite(tiny_llama: Path, tmp_path: Path) -> None:
    norm = np.full(48, np.nan, np.float32)
    replaced = {"llama.norm.weight": norm}
    write_lora(tmp_path / "adapter", tiny_llama, replaced=replaced)
    with pytest.raises(AdapterError, match=r"holds NaN or infinity in:\n  llama\.norm"):
        peft_deploy.merge(tiny_llama, tmp_path / "adapter", tmp_path / "out")


def test_a_result_that_the_type_cannot_hold(tiny_llama: Path, tmp_path: Path) -> None:
    write_lora(tmp_path / "adapter", tiny_llama, spread=1e6)
    with pytest.raises(AdapterError, match="the merged weight is not finite in float16"):
        peft_deploy.merge(
            tiny_llama,
            tmp_path / "adapter",
            tmp_path / "out",
            options=MergeOptions(dtype="float16"),
        )
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_tensors_that_the_family_does_not_know(
    make_tiny_llama: Make, tuned: Path, tmp_path: Path
) -> None:
    from safetensors.numpy import load_file, save_file

    base = make_tiny_llama()
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.0.self_attn.q_proj.scales"] = np.ones(4, np.float32)
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"does not have:\n.*q_proj\.scales"):
        peft_deploy.merge(base, tuned, tmp_path / "out")


class FullDisk:
    """Stands in for the shards' file: takes some bytes, then the disk is full."""

    def __init__(self, file: Any) -> None:
        self._file, self._left = file, 50_000

    def __enter__(self) -> FullDisk:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, data: Any) -> int:
        self._left -= len(data)
        if self._left < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return int(self._file.write(data))


@pytest.mark.parametrize("there", [False, True])
def test_a_disk_that_gets_full(
    tiny_llama: Path, tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: bool
) -> None:
    out = tmp_path / "out"
    if there:
        peft_deploy.merge(tiny_llama, tuned, out)
    before = {path.name: path.read_bytes() for path in out.iterdir()} if there else {}
    opened = Path.open

    def limited(self: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        file = opened(self, mode, *args, **kwargs)
        return FullDisk(file) if mode == "wb" and "model.safetensors" in self.name else file

    monkeypatch.setattr(Path, "open", limited)
    with pytest.raises(OutputError, match=f"{out}/model.safetensors cannot be written: No space"):
        peft_deploy.merge(tiny_llama, tuned, out, options=MergeOptions(force=True))
    monkeypatch.undo()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"] * there + ["tuned"]
    assert before == ({p.name: p.read_bytes() for p in out.iterdir()} if there else {})


def test_too_little_space_is_noticed_before_writing(
    tiny_llama: Path, tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage._replace(free=1000))
    with pytest.raises(OutputError, match="the merged weights take 0 MB, 0 MB are free"):
        peft_deploy.merge(tiny_llama, tuned, tmp_path / "out")


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, RuntimeError])
def test_an_interruption(
    tiny_llama: Path, tuned: Path, tmp_path: Path, interruption: type[BaseException]
) -> None:
    class Stops:
        done = 0

        def phase(self, title: str, total: int | None = None, unit: str = "") -> None:
            pass

        def advance(self, amount: int = 1, item: str = "") -> None:
            self.done += 1
            if self.done == 30:  # of 42: while it is read back
                raise interruption

    with pytest.raises(interruption):
        peft_deploy.merge(tiny_llama, tuned, tmp_path / "out", progress=Stops())
    assert [path.name for path in tmp_path.iterdir()] == ["tuned"]


def test_a_bit_that_flips_on_the_disk_is_found(
    tiny_llama: Path, tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = sys.modules[peft_deploy.merge.__module__]  # the package's attribute is the function
    write = module.write_safetensors

    def careless(path: Path, *args: Any, **kwargs: Any) -> Any:
        files = write(path, *args, **kwargs)
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        return files

    monkeypatch.setattr(module, "write_safetensors", careless)
    with pytest.raises(CheckpointError, match=r"not what was merged:\n  .*holds other values"):
        peft_deploy.merge(tiny_llama, tuned, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["tuned"]


def test_same_bits() -> None:
    array = np.arange(3_000_000, dtype=np.float32).reshape(1500, 2000)
    assert same_bits(array, np.asfortranarray(array))
    other = array.copy()
    other[1499, 1999] = np.nextafter(other[1499, 1999], np.float32(np.inf))
    assert not same_bits(array, other)
    zeros = np.zeros(2, np.float32)
    assert not same_bits(zeros, -zeros)
    assert same_bits(np.full(2, np.nan), np.full(2, np.nan))
    assert same_bits(np.array(1.5), np.array(1.5))


# Where it may write.


def test_force_replaces_only_merged_checkpoints(
    make_tiny_llama: Make, tiny_llama: Path, tuned: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    peft_deploy.merge(tiny_llama, tuned, out)
    with pytest.raises(OutputError, match="is not empty"):
        peft_deploy.merge(tiny_llama, tuned, out)
    force = MergeOptions(force=True, dtype="bfloat16")
    assert peft_deploy.merge(tiny_llama, tuned, out, options=force).dtype == "bfloat16"
    assert stored(out)[0]["model.norm.weight"].dtype == DTYPES["bfloat16"]
    base = make_tiny_llama(seed=9)
    before = (base / "model.safetensors").read_bytes()
    with pytest.raises(OutputError, match="not a merged checkpoint; --force replaces only"):
        peft_deploy.merge(tiny_llama, tuned, base, options=force)
    assert (base / "model.safetensors").read_bytes() == before


def test_the_inputs_are_not_replaced(tiny_llama: Path, tuned: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    peft_deploy.merge(tiny_llama, tuned, out)
    write_lora(out / "adapters" / "second", out, seed=8)
    for base, adapter in ((out, tuned), (tiny_llama, out / "adapters" / "second")):
        with pytest.raises(OutputError, match=f"--output {out} would replace"):
            peft_deploy.merge(base, adapter, out, options=MergeOptions(force=True))
    assert (out / "adapters" / "second" / "lora_config.json").is_file()
