from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from merge_oracle import RANK, stored, write_lora

import peft_deploy
from peft_deploy.adapters.formats import read_adapter, write_adapter
from peft_deploy.adapters.provenance import Provenance, WeightSample
from peft_deploy.base import open_base
from peft_deploy.cli import cli
from peft_deploy.config import LoRAConfig
from peft_deploy.config.export import ExportOptions
from peft_deploy.errors import AdapterError, OutputError, UnsupportedModelError
from peft_deploy.families import parallel_axes
from peft_deploy.inspection import inspect
from peft_deploy.weights.tensor_parallel import split_shards
from peft_deploy.workflows.shards import merge_adapter_shards


def save_ranks(base: Path, adapter: Path, folder: Path, degree: int) -> None:
    """What the ranks of a tensor-parallel training write: a file each, and one configuration."""
    model, whole = open_base(base), read_adapter(adapter)
    axis_of = parallel_axes(model.family, model.config, degree)
    config = LoRAConfig(**{**whole.config.to_dict(), "tensor_parallel_degree": degree})
    # values of a rank's slice of a weight, which say nothing about the whole weight
    sample = {"llama.layers.0.self_attn.q_proj": WeightSample("float32", (1.0,) * 16)}
    provenance = Provenance(base_weights=sample)
    for rank, shard in enumerate(split_shards(whole.state, degree, axis_of)):
        write_adapter(folder, config, shard, provenance, variant=f"tp{rank:02}")
    content = {**model.config, "tensor_parallel_degree": degree}
    (folder / "config.json").write_text(json.dumps(content))


@pytest.fixture
def ranks(tiny_llama: Path, tuned: Path, tmp_path: Path) -> Path:
    save_ranks(tiny_llama, tuned, tmp_path / "ranks", 2)
    return tmp_path / "ranks"


@pytest.mark.parametrize(("degree", "heads"), [(2, {}), (4, {"heads": 8, "kv": 4})])
def test_the_ranks_make_the_adapter(make_tiny_llama, tmp_path: Path, degree: int, heads) -> None:
    sizes = {}
    if heads:
        sizes = {
            "num_attention_heads": heads["heads"],
            "num_key_value_heads": heads["kv"],
            "head_dim": 6,
        }
    base = make_tiny_llama(**sizes)
    norm = np.linspace(-2, 2, 48, dtype=np.float32)
    head = np.random.default_rng(0).normal(0, 2, (48, 131)).astype(np.float32)
    replaced = {"llama.norm.weight": norm, "lm_head.weight": head}
    write_lora(
        tmp_path / "adapter",
        base,
        replaced=replaced,
        trainable_modules=["llama.norm", "lm_head"],
    )
    save_ranks(base, tmp_path / "adapter", tmp_path / "ranks", degree)
    result = merge_adapter_shards(tmp_path / "ranks", tmp_path / "whole")
    assert (result.degree, result.modules, result.replaced) == (degree, 14, 2)
    assert result.spread == 14  # B of ten column layers, A of four row layers; 131 tokens are odd
    whole, original = read_adapter(tmp_path / "whole"), read_adapter(tmp_path / "adapter")
    assert RANK % degree and whole.config.tensor_parallel_degree == -1
    assert whole.fingerprint == original.fingerprint
    assert whole.provenance is not None and not whole.provenance.base_weights
    config = json.loads((tmp_path / "whole" / "config.json").read_text())
    assert config["tensor_parallel_degree"] == -1
    for name in ("whole", "adapter"):
        peft_deploy.merge(base, tmp_path / name, tmp_path / f"merged-{name}")
    first, second = (stored(tmp_path / f"merged-{name}")[0] for name in ("whole", "adapter"))
    assert all(first[name].tobytes() == second[name].tobytes() for name in second)


def test_ranks_are_put_together_while_reading(ranks: Path, tuned: Path) -> None:
    found, whole = read_adapter(ranks), read_adapter(tuned)
    assert found.fingerprint == whole.fingerprint
    assert found.config.tensor_parallel_degree == -1
    assert found.provenance is not None and not found.provenance.base_weights


def test_ranks_are_merged_into_a_base_directly(
    ranks: Path, tuned: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    (ranks / "config.json").unlink()  # the base model's own says how it is spread
    with pytest.raises(AdapterError, match=r"config\.json is missing") as caught:
        read_adapter(ranks)
    assert caught.value.hint is not None and "adapter merge-shards" in caught.value.hint
    for name, adapter in (("ranks", ranks), ("whole", tuned)):
        peft_deploy.merge(tiny_llama, adapter, tmp_path / f"merged-{name}")
    first, second = (stored(tmp_path / f"merged-{name}")[0] for name in ("ranks", "whole"))
    base = stored(tiny_llama)[0]
    assert all(first[name].tobytes() == second[name].tobytes() for name in second)
    assert sum(first[name].tobytes() != base[name].tobytes() for name in base) == 14


def test_ranks_are_exported_directly(
    ranks: Path, tuned: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    for name, adapter in (("ranks", ranks), ("whole", tuned)):
        options = ExportOptions(merge=True, validate=name == "ranks")
        result = peft_deploy.export(
            tiny_llama, tmp_path / f"out-{name}", adapter=adapter, options=options
        )
        assert result.parity is None or result.parity.passed
    files = [tmp_path / f"out-{name}" / "model.onnx.data" for name in ("ranks", "whole")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_ranks_are_inspected_as_the_adapter_that_they_make(ranks: Path, tuned: Path) -> None:
    found, whole = inspect(ranks), inspect(tuned)
    assert (found.fingerprint, found.norm) == (whole.fingerprint, whole.norm)
    assert "lora_model_state.tp01.pdparams" in {file.name for file in found.files}


def test_ranks_of_a_model_that_no_family_claims(ranks: Path) -> None:
    content = json.loads((ranks / "config.json").read_text())
    content.update(model_type="unheard_of", architectures=["UnheardOfForCausalLM"])
    (ranks / "config.json").write_text(json.dumps(content))
    with pytest.raises(UnsupportedModelError, match="2 tensor-parallel ranks") as caught:
        read_adapter(ranks)
    assert caught.value.hint is not None and "merge_tensor_parallel=True" in caught.value.hint


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / "lora_model_state.tp00.pdparams").unlink(), r"one file a rank:\n  rank 0"),
        (
            lambda f: (f / "lora_model_state.tp01.pdparams").unlink(),
            r"1 ranks; its lora_config\.json says tensor_parallel_degree 2",
        ),
        (lambda f: (f / "config.json").unlink(), r"config\.json is missing"),
        (lambda f: (f / "prefix_config.json").write_text("{}"), "gives another prefix"),
        (
            lambda f: shutil.copy(
                f / "lora_model_state.tp00.pdparams", f / "lora_mode_state.tp00.pdparams"
            ),
            "does not hold one file a rank",
        ),
        (
            lambda f: (f / "lora_model_state.tp00.pdparams").rename(
                f / "lora_model_state.tp00_pp00.pdparams"
            ),
            r"pipeline stages.*\n  lora_model_state\.tp00_pp00",
        ),
    ],
)
def test_what_cannot_be_merged(ranks: Path, tmp_path: Path, change, message: str) -> None:
    change(ranks)
    with pytest.raises(AdapterError, match=message):
        merge_adapter_shards(ranks, tmp_path / "whole")
    assert not (tmp_path / "whole").exists()


def test_an_ordinary_adapter_is_no_set_of_ranks(tuned: Path, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"holds no files of tensor-parallel ranks"):
        merge_adapter_shards(tuned, tmp_path / "whole")


def test_nothing_is_replaced(ranks: Path, tuned: Path) -> None:
    with pytest.raises(OutputError, match="is not empty"):
        merge_adapter_shards(ranks, tuned)


def test_the_command_merges_shards(
    ranks: Path, tuned: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    (ranks / "config.json").unlink()
    arguments = ["adapter", "merge-shards", str(ranks), str(tmp_path / "whole")]
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 3 and "--config" in result.stderr
    result = CliRunner().invoke(cli, [*arguments, "--config", str(tiny_llama), "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == {
        "output": str(tmp_path / "whole"),
        "degree": 2,
        "modules": 14,
        "replaced": 0,
        "spread": 14,
    }
    assert read_adapter(tmp_path / "whole").fingerprint == read_adapter(tuned).fingerprint
