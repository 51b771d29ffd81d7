"""The facts about an adapter's files."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from made_things import ALPHA, MODULES, RANK, lora_tensors, write_lora

from peft_deploy.errors import AdapterError
from peft_deploy.inspection import AdapterInspection, inspect
from peft_deploy.inspection.adapter import delta_norm, grouped_name
from peft_deploy.weights import LoraPair


def full_norms(tensors: dict[str, np.ndarray], scaling: float) -> dict[str, float]:
    return {
        m: float(
            np.linalg.norm(
                scaling
                * (
                    tensors[f"{m}.lora_A"].astype(np.float64)
                    @ tensors[f"{m}.lora_B"].astype(np.float64)
                )
            )
        )
        for m in MODULES
    }


def test_the_facts(tmp_path: Path) -> None:
    tensors = lora_tensors()
    found = inspect(write_lora(tmp_path / "a", tensors, lora_dropout=0.1))
    assert isinstance(found, AdapterInspection)
    assert (found.method, found.rank, found.alpha, found.dropout) == ("lora", RANK, ALPHA, 0.1)
    assert found.scaling == ALPHA / RANK
    assert found.base_name == "some-base"
    assert found.stored.parameters == sum(t.size for t in tensors.values())
    assert found.stored.dtypes == {"float32": found.stored.parameters}
    assert {file.name for file in found.files} == {
        "lora_config.json",
        "lora_model_state.pdparams",
    }
    assert found.provenance is None
    assert len(found.fingerprint) == 64


def test_targets_are_grouped_with_their_norms(tmp_path: Path) -> None:
    tensors = lora_tensors()
    found = inspect(write_lora(tmp_path / "a", tensors))
    groups = {group.pattern: group for group in found.targets}
    assert set(groups) == {"llama.layers.*.self_attn.q_proj", "llama.layers.*.self_attn.v_proj"}
    q = groups["llama.layers.*.self_attn.q_proj"]
    assert (q.count, q.shapes, q.unchanged) == (2, ((48, 48),), 0)
    norms = full_norms(tensors, ALPHA / RANK)
    of_q = [norms[f"llama.layers.{i}.self_attn.q_proj"] for i in range(2)]
    assert q.smallest == pytest.approx(min(of_q), rel=1e-6)
    assert q.largest == pytest.approx(max(of_q), rel=1e-6)
    total = math.sqrt(sum(n * n for n in norms.values()))
    assert found.norm == pytest.approx(total, rel=1e-6)
    assert not found.untrained and found.unchanged == 0 and found.modules == 3


def test_an_untrained_adapter_shows(tmp_path: Path) -> None:
    found = inspect(write_lora(tmp_path / "a", lora_tensors(B_scale=0.0)))
    assert found.untrained and found.norm == 0
    assert found.to_dict()["untrained"] is True


def test_one_untrained_layer_shows(tmp_path: Path) -> None:
    tensors = lora_tensors()
    tensors["llama.layers.1.self_attn.q_proj.lora_B"][:] = 0
    found = inspect(write_lora(tmp_path / "a", tensors))
    assert (found.unchanged, found.untrained) == (1, False)
    (group,) = [g for g in found.targets if g.unchanged]
    assert group.pattern.endswith("q_proj") and group.smallest == 0 < group.largest


def test_replaced_tensors_and_variants(tmp_path: Path) -> None:
    tensors = lora_tensors(B_scale=0.0)
    tensors["llama.norm.weight"] = np.full(48, 0.7, np.float32)
    found = inspect(
        write_lora(tmp_path / "a", tensors, trainable_modules=["llama.norm"], rslora=True)
    )
    (replaced,) = found.replaced
    assert (replaced.name, replaced.shape) == ("llama.norm.weight", (48,))
    assert not found.untrained  # the norm changes the model
    assert found.method == "lora (rslora)"
    assert found.scaling == pytest.approx(ALPHA / math.sqrt(RANK))


def test_nan_is_the_readers_error(tmp_path: Path) -> None:
    tensors = lora_tensors()
    tensors["llama.layers.0.self_attn.v_proj.lora_B"][1, 2] = np.nan
    with pytest.raises(AdapterError, match=r"layers\.0\.self_attn\.v_proj\.lora_B"):
        inspect(write_lora(tmp_path / "a", tensors))


def test_a_truncated_file_is_the_readers_error(tmp_path: Path) -> None:
    folder = write_lora(tmp_path / "a", lora_tensors())
    file = folder / "lora_model_state.pdparams"
    file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(Exception, match=r"lora_model_state\.pdparams") as caught:
        inspect(folder)
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("seed", range(5))
def test_the_norm_without_the_product(seed: int) -> None:
    rng = np.random.default_rng(seed)
    into, rank, out = rng.integers(1, 40, 3)
    A = rng.standard_normal((into, rank)).astype(np.float32)
    B = (rng.standard_normal((rank, out)) * 10.0 ** rng.integers(-4, 4)).astype(np.float32)
    want = np.linalg.norm(-2.5 * (A.astype(np.float64) @ B.astype(np.float64)))
    assert delta_norm(LoraPair(A, B, -2.5)) == pytest.approx(want, rel=1e-7)


def test_grouped_names() -> None:
    assert grouped_name("a.10.b2.0.c") == "a.*.b2.*.c"
