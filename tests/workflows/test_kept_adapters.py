"""Which layers get slots for the adapters that stay apart from the weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from peft_deploy.adapters.formats import write_adapter
from peft_deploy.config import LoRAConfig
from peft_deploy.config.export import ExportOptions
from peft_deploy.errors import AdapterError, ConfigError
from peft_deploy.workflows.kept_adapters import check_keepable, select_layers
from peft_deploy.workflows.sources import from_folders

HIDDEN, VOCABULARY, INNER = 48, 131, 88
LINEARS = [
    *(
        f"model.layers.{i}.{name}"
        for i in range(2)
        for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.down_proj")
    ),
    "lm_head",
]


def adapter(folder: Path, module: str, shape: tuple[int, int]) -> Path:
    rng = np.random.default_rng(5)
    A, B = rng.normal(size=(shape[0], 2)), rng.normal(size=(2, shape[1]))
    tensors = {f"{module}.lora_A": A.astype("f"), f"{module}.lora_B": B.astype("f")}
    write_adapter(folder, LoRAConfig(r=2, target_modules=[module]), tensors)
    return folder


@pytest.mark.parametrize(
    ("slots", "with_adapter", "expected"),
    [
        (None, True, LINEARS[:1]),
        (None, False, LINEARS[:-1]),
        ("all-linear", True, LINEARS[:-1]),
        ("up_proj", True, [LINEARS[0], LINEARS[2], LINEARS[6]]),
        (r"model\.layers\.1\..*", True, [LINEARS[0], *LINEARS[4:8]]),
        ("lm_head", False, ["lm_head"]),
    ],
)
def test_layers_that_get_slots(
    slots: str | None, with_adapter: bool, expected: list[str], tiny_llama: Path, tmp_path: Path
) -> None:
    module = "llama.layers.0.self_attn.q_proj"
    given = adapter(tmp_path / "a", module, (HIDDEN, HIDDEN)) if with_adapter else None
    source = from_folders(tiny_llama, given, keep=True)
    select = select_layers(source, ExportOptions(adapters="runtime", slots=slots))
    assert select(LINEARS) == expected


def test_an_expression_that_matches_no_layer(tiny_llama: Path) -> None:
    source = from_folders(tiny_llama, None, keep=True)
    select = select_layers(source, ExportOptions(adapters="runtime", slots="query_proj"))
    with pytest.raises(ConfigError, match="--slots query_proj matches none of the 9") as caught:
        select(LINEARS)
    assert "q_proj" in str(caught.value.hint)


def test_modules_that_are_no_linear_layers_are_refused_by_name(
    tiny_llama: Path, tmp_path: Path
) -> None:
    words = adapter(tmp_path / "a", "llama.embed_tokens", (VOCABULARY, HIDDEN))
    source = from_folders(tiny_llama, words, keep=True)
    select = select_layers(source, ExportOptions(adapters="runtime"))
    with pytest.raises(AdapterError, match=r"no plain linear layers.*\n  model\.embed") as caught:
        select(LINEARS)
    assert "--merge" in str(caught.value.hint)


def test_weights_that_are_shared_cannot_have_slots(
    make_tiny_llama: Callable[..., Path], tmp_path: Path
) -> None:
    words = adapter(tmp_path / "a", "llama.embed_tokens", (VOCABULARY, HIDDEN))
    source = from_folders(make_tiny_llama(tied=True), words, keep=True)
    (named,) = source.kept
    with pytest.raises(AdapterError, match=r"changes llama\.embed_tokens, whose weight is that"):
        check_keepable(named.adapter, source)


def test_an_adapter_of_another_model_does_not_fit(tiny_llama: Path, tmp_path: Path) -> None:
    wide = adapter(tmp_path / "a", "llama.layers.0.self_attn.q_proj", (HIDDEN, HIDDEN + 8))
    source = from_folders(tiny_llama, wide, keep=True)
    (named,) = source.kept
    with pytest.raises(AdapterError, match=r"q_proj.*\[48, 56\].*\[48, 48\]"):
        check_keepable(named.adapter, source)


@pytest.mark.parametrize(("rank", "fits"), [(None, True), (2, True), (1, False)])
def test_a_rank_above_that_of_the_slots(
    rank: int | None, fits: bool, tiny_llama: Path, tmp_path: Path
) -> None:
    folder = adapter(tmp_path / "a", "llama.layers.0.self_attn.q_proj", (HIDDEN, HIDDEN))
    source = from_folders(tiny_llama, folder, keep=True)
    (named,) = source.kept
    if fits:
        check_keepable(named.adapter, source, rank)
        return
    with pytest.raises(AdapterError, match="has rank 2, and slots of rank 1") as caught:
        check_keepable(named.adapter, source, rank)
    assert "--slot-rank 2" in str(caught.value.hint)
