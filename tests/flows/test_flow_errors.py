"""What wrong input gets: a clear error, the documented exit code, and nothing half-written."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from flows_adapter import adapter_for

import peft_deploy
from peft_deploy.adapters.formats import read_adapter, write_adapter
from peft_deploy.cli import cli
from peft_deploy.config.export import ExportOptions
from peft_deploy.errors import (
    AdapterError,
    CheckpointError,
    ConfigError,
    OutputError,
    ParityError,
    UnsupportedModelError,
)
from peft_deploy.workflows import export as export_module

UNCHECKED = ExportOptions(validate=False)


def run(*arguments: object) -> Any:
    return CliRunner().invoke(cli, [str(a) for a in arguments])


def copy_adapter(adapter: Path, folder: Path, change: Any) -> Path:
    """The adapter with its tensors changed."""
    read = read_adapter(adapter)
    tensors = {name: np.array(value) for name, value in read.state.items()}
    write_adapter(folder, read.config, change(tensors))
    return folder


def nothing_left(output: Path) -> bool:
    return list(output.parent.glob(f".{output.name}*")) == [] and not output.exists()


def test_missing_base(tmp_path: Path) -> None:
    result = run("export", "--base", tmp_path / "none" / "x", "--output", tmp_path / "out")
    assert result.exit_code == 3
    assert "neither a folder nor a model that PaddleNLP can download" in result.stderr
    assert nothing_left(tmp_path / "out")


def test_an_adapter_given_as_base_is_recognized(tiny_adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        peft_deploy.export(tiny_adapter, tmp_path / "out")
    assert "has no config.json" in caught.value.message
    assert "--adapter" in str(caught.value.hint)


def test_adapter_of_another_model_names_the_first_three(
    make_tiny_llama: Any, tiny_llama: Path, tmp_path: Path
) -> None:
    other = make_tiny_llama(hidden_size=72, head_dim=12)
    adapter = adapter_for(other, tmp_path / "adapter")
    result = run(
        "export", "--base", tiny_llama, "--adapter", adapter, "--merge", "--output", tmp_path / "o"
    )
    assert result.exit_code == 3
    assert result.stderr.count("the base model's is") == 3
    assert "… and 11 more" in result.stderr
    assert nothing_left(tmp_path / "o")


def test_adapter_with_a_layer_the_base_lacks(
    tiny_llama: Path, tiny_adapter: Path, tmp_path: Path
) -> None:
    def rename(tensors: dict[str, Any]) -> dict[str, Any]:
        return {n.replace("layers.1.", "layers.5."): t for n, t in tensors.items()}

    adapter = copy_adapter(tiny_adapter, tmp_path / "adapter", rename)
    with pytest.raises(AdapterError, match=r"layers\.5.*the base model has no such parameter"):
        peft_deploy.export(tiny_llama, tmp_path / "out", adapter=adapter, options=UNCHECKED)


def test_rank_in_the_file_differs_from_the_configuration(
    tiny_llama: Path, tiny_adapter: Path, tmp_path: Path
) -> None:
    adapter = shutil.copytree(tiny_adapter, tmp_path / "adapter")
    config = json.loads((adapter / "lora_config.json").read_text("utf-8"))
    (adapter / "lora_config.json").write_text(
        json.dumps({**config, "r": 4, "scaling": 10 / 4}), "utf-8"
    )
    with pytest.raises(AdapterError, match=r"of rank 5; its lora_config\.json says r = 4"):
        peft_deploy.export(tiny_llama, tmp_path / "out", adapter=adapter, options=UNCHECKED)


def test_half_a_pair_is_missing(tiny_llama: Path, tiny_adapter: Path, tmp_path: Path) -> None:
    def drop(tensors: dict[str, Any]) -> dict[str, Any]:
        gone = "llama.layers.0.self_attn.q_proj.lora_B"
        return {n: t for n, t in tensors.items() if n != gone}

    adapter = copy_adapter(tiny_adapter, tmp_path / "adapter", drop)
    with pytest.raises(AdapterError, match="q_proj"):
        peft_deploy.export(tiny_llama, tmp_path / "out", adapter=adapter, options=UNCHECKED)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_adapter_that_is_not_finite(
    value: float, tiny_llama: Path, tiny_adapter: Path, tmp_path: Path
) -> None:
    def spoil(tensors: dict[str, Any]) -> dict[str, Any]:
        tensors["llama.layers.1.mlp.up_proj.lora_A"][3, 2] = value
        return tensors

    adapter = copy_adapter(tiny_adapter, tmp_path / "adapter", spoil)
    with pytest.raises(AdapterError, match=r"layers\.1\.mlp\.up_proj"):
        peft_deploy.export(tiny_llama, tmp_path / "out", adapter=adapter, options=UNCHECKED)
    assert nothing_left(tmp_path / "out")


def test_truncated_weights(tiny_llama: Path, tmp_path: Path) -> None:
    base = shutil.copytree(tiny_llama, tmp_path / "base")
    file = base / "model.safetensors"
    os.truncate(file, file.stat().st_size - 100)
    result = run("export", "--base", base, "--output", tmp_path / "out")
    assert result.exit_code == 3
    assert "model.safetensors" in result.stderr
    assert nothing_left(tmp_path / "out")


def test_extra_tensor_in_the_base(make_tiny_llama: Any, tmp_path: Path) -> None:
    base = make_tiny_llama(num_hidden_layers=3)
    config = json.loads((base / "config.json").read_text("utf-8"))
    (base / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2}), "utf-8")
    with pytest.raises(CheckpointError, match=r"layers\.2\."):
        peft_deploy.export(base, tmp_path / "out", options=UNCHECKED)
    assert nothing_left(tmp_path / "out")


def test_unknown_architecture_names_the_known_ones(tiny_llama: Path, tmp_path: Path) -> None:
    base = shutil.copytree(tiny_llama, tmp_path / "base")
    config = json.loads((base / "config.json").read_text("utf-8"))
    changed = {**config, "architectures": ["MambaForCausalLM"]}
    (base / "config.json").write_text(json.dumps(changed), "utf-8")
    result = run("export", "--base", base, "--output", tmp_path / "out")
    assert result.exit_code == 4
    assert "MambaForCausalLM" in result.stderr
    assert "LlamaForCausalLM" in result.stderr


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("attention_bias", True),
        ("hidden_act", "gelu"),
        ("head_dim", 16),
        ("rope_scaling", {"rope_type": "dynamic", "factor": 2.0}),
    ],
)
def test_configuration_that_would_be_computed_wrongly_is_refused(
    entry: str, value: object, tiny_llama: Path, tmp_path: Path
) -> None:
    base = shutil.copytree(tiny_llama, tmp_path / "base")
    config = json.loads((base / "config.json").read_text("utf-8"))
    (base / "config.json").write_text(json.dumps({**config, entry: value}), "utf-8")
    with pytest.raises(UnsupportedModelError, match=entry.replace("_", ".")):
        peft_deploy.export(base, tmp_path / "out", options=UNCHECKED)


def test_adapter_without_merge(tiny_llama: Path, tiny_adapter: Path, tmp_path: Path) -> None:
    result = run(
        "export", "--base", tiny_llama, "--adapter", tiny_adapter, "--output", tmp_path / "out"
    )
    assert result.exit_code == 2
    assert "--merge" in result.stderr


def test_merge_without_an_adapter(tiny_llama: Path, tmp_path: Path) -> None:
    result = run("export", "--base", tiny_llama, "--merge", "--output", tmp_path / "out")
    assert result.exit_code == 2
    assert "--adapter" in result.stderr


def test_unknown_opset(tiny_llama: Path, tmp_path: Path) -> None:
    result = run("export", "--base", tiny_llama, "--output", tmp_path / "o", "--opset", 25)
    assert result.exit_code == 2
    assert "13 to 21" in result.stderr


def test_output_that_is_not_empty(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious.txt").write_text("keep me", "utf-8")
    for force in (False, True):
        with pytest.raises(OutputError):
            peft_deploy.export(
                tiny_llama, tmp_path / "out", options=ExportOptions(validate=False, force=force)
            )
    assert (tmp_path / "out" / "precious.txt").read_text("utf-8") == "keep me"


@pytest.mark.convert
def test_force_replaces_a_bundle(base_bundle: Path, tiny_llama: Path, tmp_path: Path) -> None:
    output = shutil.copytree(base_bundle, tmp_path / "out")
    (output / "config.json").write_text("{}", "utf-8")
    with pytest.raises(OutputError, match="not empty"):
        peft_deploy.export(tiny_llama, output, options=UNCHECKED)
    peft_deploy.export(tiny_llama, output, options=ExportOptions(validate=False, force=True))
    assert json.loads((output / "config.json").read_text("utf-8"))["model_type"] == "llama"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


@pytest.mark.convert
def test_no_space_left(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    opened = Path.open

    def open_full(path: Path, *arguments: Any, **options: Any) -> Any:
        file = opened(path, *arguments, **options)
        return SimpleNamespace(write=full, close=file.close) if path.suffix == ".data" else file

    monkeypatch.setattr(Path, "open", open_full)
    with pytest.raises(OutputError, match="no space left"):
        peft_deploy.export(tiny_llama, tmp_path / "out", options=UNCHECKED)
    assert nothing_left(tmp_path / "out")


@pytest.mark.convert
def test_a_disk_that_is_too_small_is_known_before_writing(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: SimpleNamespace(free=1000))
    with pytest.raises(OutputError, match="0 MB are free"):
        peft_deploy.export(tiny_llama, tmp_path / "out", options=UNCHECKED)
    assert nothing_left(tmp_path / "out")


@pytest.mark.convert
def test_a_bundle_that_fails_the_check_is_not_left_in_place(
    tiny_llama: Path, tiny_adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The adapter is scaled by 1.05 on its way into the weights."""
    from peft_deploy.weights.lora import LoraPair

    source_of = export_module.from_folders

    def scaled(*arguments: Any, **options: Any) -> Any:
        import dataclasses

        source = source_of(*arguments, **options)
        adapter = source.adapter.adapter
        pairs = {
            name: LoraPair(pair.A, pair.B, pair.scaling * 1.05)
            for name, pair in adapter.pairs.items()
        }
        wrong = dataclasses.replace(adapter, pairs=pairs)
        return dataclasses.replace(
            source, adapter=dataclasses.replace(source.adapter, adapter=wrong)
        )

    monkeypatch.setattr(export_module, "from_folders", scaled)
    with pytest.raises(ParityError) as caught:
        peft_deploy.export(tiny_llama, tmp_path / "out", adapter=tiny_adapter)
    assert caught.value.report is not None and not caught.value.report.passed
    assert nothing_left(tmp_path / "out")
    result = peft_deploy.export(
        tiny_llama, tmp_path / "out", adapter=tiny_adapter, options=ExportOptions(keep_failed=True)
    )
    assert result.manifest is not None and result.manifest.parity is not None
    assert result.manifest.parity["passed"] is False
    assert (tmp_path / "out" / "model.onnx").exists()


def interrupted(body: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """What becomes of a command that runs this code in place of its own."""
    (folder / "interrupted.py").write_text(
        "import signal, sys, time, weakref\n"
        "from peft_deploy.cli import cli, main\n"
        f"def run(**_):\n{textwrap.indent(body, '    ')}\n"
        "cli.main = run\n"
        "main()\n"
    )
    command = [sys.executable, "-m", "interrupted"]
    path = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path}
    return subprocess.run(
        command, capture_output=True, text=True, env=environment, check=False, timeout=60
    )


def test_an_interrupt_in_generated_code_has_the_same_status(tmp_path: Path) -> None:
    """Dataclasses, of which every import makes some, are such code."""
    done = interrupted("exec('raise KeyboardInterrupt')", tmp_path)
    assert done.returncode == 128 + signal.SIGINT, done.stderr
    assert "interrupted" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_in_a_callback_is_not_lost(number: int, tmp_path: Path) -> None:
    """What the callback of a weak reference raises Python prints, and goes on."""
    body = f"""\
class Thing: pass
thing = Thing()
reference = weakref.ref(thing, lambda _: signal.raise_signal({int(number)}))
del thing
time.sleep(0.5)
print("went on")
"""
    done = interrupted(body, tmp_path)
    assert (done.returncode, done.stdout) == (128 + number, ""), done.stderr
    assert done.stderr.strip() == "interrupted; nothing was left half-written"


def test_an_interrupt_before_a_folder_is_entered_leaves_nothing(tmp_path: Path) -> None:
    """As ``with`` begins, between two instructions."""
    output = tmp_path / "here" / "out"
    body = f"""\
from pathlib import Path
from peft_deploy.atomic_folder import AtomicFolder, FolderKind
folder = AtomicFolder(Path({str(output)!r}), FolderKind("bundle", "mark"))
(folder.path / "file").write_text("half")
raise KeyboardInterrupt
"""
    done = interrupted(body, tmp_path)
    assert done.returncode == 128 + signal.SIGINT, done.stderr
    assert list(output.parent.iterdir()) == []


def test_the_import_system_is_not_interrupted(tmp_path: Path) -> None:
    """Its locks would be held for ever."""
    body = f"""\
code = "signal.raise_signal({int(signal.SIGTERM)}); print('unlocked', flush=True)"
exec(compile(code, "<frozen importlib._bootstrap>", "exec"))
time.sleep(0.5)
print("went on")
"""
    done = interrupted(body, tmp_path)
    assert (done.returncode, done.stdout) == (128 + signal.SIGTERM, "unlocked\n"), done.stderr


@pytest.mark.convert
@pytest.mark.usefixtures("no_graph_cache")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_nothing_behind(number: int, tiny_llama: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    command = [sys.executable, "-m", "peft_deploy", "export", "--base", tiny_llama]
    process = subprocess.Popen(
        [*command, "--output", output, "--no-validate"],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        # Started in the background, this process ignores Ctrl-C, and so would its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL) and None,
    )
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".out*")) and time.monotonic() < deadline:
        time.sleep(0.05)  # until it has begun to write and the converter's process runs
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number, errors
    assert "interrupted" in errors
    assert list(tmp_path.iterdir()) == []


def test_dry_run_writes_nothing(tiny_llama: Path, tiny_adapter: Path, tmp_path: Path) -> None:
    result = run(
        "export", "--base", tiny_llama, "--adapter", tiny_adapter, "--merge",
        "--output", tmp_path / "out", "--dry-run",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    assert "LoRA of rank 5 on 14 layers" in result.stderr
    assert nothing_left(tmp_path / "out")


def test_adapter_name_with_odd_characters(
    tiny_llama: Path, tiny_adapter: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="a/b"):
        peft_deploy.export(tiny_llama, tmp_path / "out", adapter=f"a/b={tiny_adapter}")


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("hidden_size", "48"),
        ("num_attention_heads", 0),
        ("num_hidden_layers", -1),
        ("rope_scaling", "linear"),
        ("architectures", [3]),
        ("architectures", "LlamaForCausalLM"),
        ("eos_token_id", ["2"]),
        ("pad_token_id", [0]),
    ],
)
def test_damaged_configuration(
    entry: str, value: object, tiny_llama: Path, tmp_path: Path
) -> None:
    base = shutil.copytree(tiny_llama, tmp_path / "base")
    config = json.loads((base / "config.json").read_text("utf-8"))
    (base / "config.json").write_text(json.dumps({**config, entry: value}), "utf-8")
    result = run("export", "--base", base, "--output", tmp_path / "out", "--dry-run")
    assert result.exit_code == 3, result.stderr
    assert "config.json" in result.stderr


def test_a_dry_run_counts_the_layers(tiny_llama: Path, tmp_path: Path) -> None:
    base = shutil.copytree(tiny_llama, tmp_path / "base")
    config = json.loads((base / "config.json").read_text("utf-8"))
    (base / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}), "utf-8")
    result = run("export", "--base", base, "--output", tmp_path / "out", "--dry-run")
    assert result.exit_code == 3
    assert "llama.layers.2." in result.stderr


@pytest.mark.convert
@pytest.mark.parametrize("file", ["generation_config.json", "tokenizer.json"])
def test_damaged_companions_are_found_before_the_work(
    file: str, tiny_llama: Path, tmp_path: Path
) -> None:
    base = shutil.copytree(tiny_llama, tmp_path / "base")
    (base / file).write_text("{ not json", "utf-8")
    result = run("export", "--base", base, "--output", tmp_path / "out", "--no-validate")
    assert result.exit_code in (2, 3), result.stderr
    assert str(base / file) in result.stderr.replace("\n", "")
    assert "Merging" not in result.stderr
    assert nothing_left(tmp_path / "out")
