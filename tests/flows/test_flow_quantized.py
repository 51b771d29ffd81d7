"""Bundles whose linear layers are in blocks of 4 or 8 bits, from export to generation."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from flows_adapter import adapter_for
from flows_genai import Genai, needs_genai, ours
from flows_prefix import prefix_by_us
from safetensors.numpy import load_file, save_file

import peft_deploy
from peft_deploy.bundle import MODEL, MODEL_DATA, Manifest
from peft_deploy.config.export import ExportOptions
from peft_deploy.environment import require_paddle
from peft_deploy.parity import ParityReport
from peft_deploy.runtime import GenerationOptions, Session
from peft_deploy.runtime.exact_arithmetic import exact_arithmetic
from peft_deploy.workflows.check_weights import CASE

require_paddle("the reference")  # now: what it warns of when it is imported is no test's business

pytestmark = pytest.mark.convert

DOWN = "model.layers.1.mlp.down_proj"  # [80, 48]: blocks of 32, 32 and 16
IDS = np.array([[3, 17, 5, 9, 40, 33, 8], [8, 5, 6, 99, 120, 1, 7]])
Blocks = np.ndarray  # [out, blocks, ...]


def export(base: Path, output: Path, precision: str = "int4", **given: Any) -> Path:
    options = ExportOptions(precision=precision, **given.pop("options", {}))
    peft_deploy.export(base, output, options=options, **given)
    return output


@pytest.fixture(scope="module")
def merged(tiny_llama: Path, tiny_adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(tiny_llama, tmp_path_factory.mktemp("int4") / "merged", adapter=tiny_adapter)


@pytest.fixture(scope="module")
def kept(tiny_llama: Path, tiny_adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two adapters and a prefix beside the weights; each of them passed the check."""
    root = tmp_path_factory.mktemp("kept")
    small = adapter_for(tiny_llama, root / "small", rank=2, seed=3)
    poet = prefix_by_us(tiny_llama, root / "poet")
    return export(
        tiny_llama,
        root / "out",
        adapter=[f"tuned={tiny_adapter}", f"small={small}", f"poet={poet}"],
        options={"adapters": "runtime", "prefix_slots": True},
    )


def parity(bundle: Path) -> dict[str, object]:
    found = Manifest.read(bundle).parity
    assert found is not None and found["passed"] is True
    return found


def test_a_merged_bundle_passes_and_says_what_it_lost(
    merged: Path, merged_bundle: Path, tiny_llama: Path, tiny_adapter: Path, tmp_path: Path
) -> None:
    finer = export(tiny_llama, tmp_path / "int8", "int8", adapter=tiny_adapter)
    loss, less = parity(merged)["loss"], parity(finer)["loss"]
    assert isinstance(loss, dict) and isinstance(less, dict)
    assert loss["perplexity_fp32"] == less["perplexity_fp32"]
    assert 1e-4 < less["kl"] < 0.05 * loss["kl"]  # a sixteenth of the step, and squared
    assert loss["top1"] < less["top1"] and less["top1"] > 0.9
    weights = Manifest.read(merged).graph["quantized"]["weights"]
    assert f"{DOWN}.weight" in weights["int4"] and weights["int8"] == ["lm_head.weight"]
    sizes = [(folder / MODEL_DATA).stat().st_size for folder in (merged, merged_bundle)]
    assert sizes[0] < 0.5 * sizes[1]  # the embedding is in float32


def test_an_untied_head_can_have_4_bits(tiny_llama: Path, tmp_path: Path) -> None:
    bundle = export(tiny_llama, tmp_path / "out", "int4-all")
    parity(bundle)
    quantized = Manifest.read(bundle).graph["quantized"]
    assert "lm_head.weight" in quantized["weights"]["int4"] and set(quantized["weights"]) == {
        "int4"
    }
    heads = [node for node in ir.load(bundle / MODEL).graph if node.domain == "com.microsoft"]
    assert [int(node.attributes["bits"].as_int()) for node in heads][-1] == 4


def test_a_shared_table_is_looked_up_and_multiplied_by(
    make_tiny_llama: Callable[..., Path], tmp_path: Path
) -> None:
    sizes = {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 2}
    base = make_tiny_llama(tied=True, **sizes)
    bundle = export(base, tmp_path / "out")
    parity(bundle)
    operators = [node.op_type for node in ir.load(bundle / MODEL).graph]
    assert operators.count("GatherBlockQuantized") == 1 and "MatMul" not in operators
    assert Manifest.read(bundle).graph["quantized"]["float32"] == []


def logits(bundle: Path, adapter: str | None = None) -> np.ndarray:
    session = Session(bundle)
    if adapter is not None:
        session.load_adapter(adapter)
    feeds = {
        "input_ids": IDS,
        "attention_mask": np.ones_like(IDS),
        "position_ids": np.tile(np.arange(IDS.shape[1]), (len(IDS), 1)),
    }
    return session.run(feeds, adapter=adapter)["logits"]


def off(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


def inputs_of(node: ir.Node) -> list[ir.Value]:
    return [value for value in node.inputs if value is not None]


def read_blocks(bundle: Path) -> dict[str, np.ndarray]:
    """Weight [out, in] → the numbers that the file's bits stand for; none of the package's code takes part."""
    graph, found = ir.load(bundle / MODEL).graph, {}
    nodes = {str(inputs_of(node)[1].name): node for node in graph if _reads_blocks(node)}
    for name, node in nodes.items():
        tensors = [value.const_value for value in inputs_of(node)[1:3]]
        packed, scales = (tensor.numpy() for tensor in tensors if tensor is not None)
        if node.attributes["bits"].as_int() == 4:
            packed = np.stack([packed % 16, packed // 16], -1).reshape(*packed.shape[:2], 32)
            numbers = packed.astype(np.float32) - 8
        else:
            numbers = packed.astype(np.float32) - 128
        values = (numbers * scales.reshape(*packed.shape[:2], 1)).reshape(len(packed), -1)
        found[name.removesuffix(".quantized")] = values[:, : node.attributes["K"].as_int()]
    return found


def _reads_blocks(node: ir.Node) -> bool:
    return node.op_type == "MatMulNBits"


def with_decoded(base: Path, bundle: Path, folder: Path) -> Path:
    """A base model in float32 that has the numbers of a bundle's blocks for weights."""
    shutil.copytree(base, folder)
    tensors, packed = load_file(base / "model.safetensors"), Manifest.read(bundle).graph["packed"]
    changed = 0
    for name, values in read_blocks(bundle).items():
        parts = [f"{m}.weight" for m in packed.get(name.removesuffix(".weight"), ())] or [name]
        ends = np.cumsum([len(tensors[part]) for part in parts])
        for part, rows in zip(parts, np.split(values, ends[:-1]), strict=True):
            assert tensors[part].shape == rows.shape and 0 < off(rows, tensors[part]) < 0.1
            tensors[part] = np.ascontiguousarray(rows)
            changed += 1
    assert changed == 15  # seven layers in each of two, and the head
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_adapters_add_to_the_decoded_weights(
    kept: Path, tiny_llama: Path, tiny_adapter: Path, tmp_path: Path
) -> None:
    """Slots on blocks, slots on the decoded weights in float32, and the adapter merged into those are one model."""
    base = with_decoded(tiny_llama, kept, tmp_path / "decoded")
    adapter, options = f"tuned={tiny_adapter}", {"validate": False}
    whole = export(base, tmp_path / "merged", "fp32", adapter=adapter, options=options)
    slots = export(
        base,
        tmp_path / "slots",
        "fp32",
        adapter=adapter,
        options={**options, "adapters": "runtime"},
    )
    with exact_arithmetic():
        without, with_adapter, again = logits(kept), logits(kept, "tuned"), logits(kept)
    assert off(without, logits(slots)) < 1e-5
    assert off(with_adapter, logits(slots, "tuned")) < 1e-5
    assert off(with_adapter, logits(whole)) < 1e-5
    assert off(with_adapter, without) > 0.1
    assert np.array_equal(without, again)
    assert 1e-4 < off(logits(kept), without) < 0.1  # as it runs: activations in 8 bits


def test_without_an_adapter_it_is_the_base_models_bundle(
    kept: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    base = export(tiny_llama, tmp_path / "base", options={"validate": False})
    assert off(logits(kept), logits(base)) < 1e-6


def test_adapters_and_prefixes_were_checked_each(kept: Path) -> None:
    parts = parity(kept)["parts"]
    assert isinstance(parts, dict)
    assert set(parts) == {
        "adapter tuned",
        "adapter small",
        "prefix poet",
        "prefix poet in slots",
    }
    session = Session(kept)
    session.load_adapter("poet")
    options = GenerationOptions(max_new_tokens=8)
    prompts = [[3, 17, 5, 9]]
    plain = session.generate(prompts, options)[0].token_ids
    assert session.generate(prompts, options, prefix="poet")[0].token_ids != plain


def shifted(numbers: Blocks, scales: Blocks) -> None:
    """Every block of the weight where its neighbour should be."""
    flat = numbers.reshape(-1, numbers.shape[-1])
    flat[:] = np.roll(flat, 1, 0)


def scales_swapped(numbers: Blocks, scales: Blocks) -> None:
    """Of two blocks of one column."""
    column = int(np.abs(scales[:, 0] - scales[:, 1]).argmax())
    scales[column, [0, 1]] = scales[column, [1, 0]]


def zero_point_moved(numbers: Blocks, scales: Blocks) -> None:
    """Every number of a weight one larger; the largest stay."""
    low, high = np.minimum(numbers % 16 + 1, 15), np.minimum(numbers // 16 + 1, 15)
    numbers[:] = high * 16 + low


def halves_swapped(numbers: Blocks, scales: Blocks) -> None:
    """The two numbers of every byte."""
    numbers[:] = numbers % 16 * 16 + numbers // 16


def broken(bundle: Path, copy: Path, fault: Callable[[Blocks, Blocks], None]) -> Path:
    """A copy with a fault in the bytes of one layer's weight."""
    shutil.copytree(bundle, copy)
    weights, parts = ir.load(copy / MODEL).graph.initializers, []
    for suffix, dtype in (("quantized", np.uint8), ("scales", np.float32)):
        tensor = weights[f"{DOWN}.weight.{suffix}"].const_value
        assert isinstance(tensor, ir.ExternalTensor) and tensor.dtype.numpy() == dtype
        shape = tuple(tensor.shape.numpy())
        parts.append(np.memmap(copy / MODEL_DATA, dtype, "r+", tensor.offset or 0, shape))
    assert parts[0].shape == (48, 3, 16) and parts[1].shape == (48, 3)
    fault(*parts)
    for part in parts:
        part.flush()
    assert (copy / MODEL_DATA).read_bytes() != (bundle / MODEL_DATA).read_bytes()
    return copy


@pytest.mark.parametrize(
    "fault", [shifted, scales_swapped, zero_point_moved, halves_swapped], ids=lambda f: f.__name__
)
def test_a_fault_in_the_blocks_is_found_and_located(
    fault: Callable[[Blocks, Blocks], None],
    merged: Path,
    tiny_llama: Path,
    tiny_adapter: Path,
    tmp_path: Path,
) -> None:
    folder = broken(merged, tmp_path / "broken", fault)
    report: ParityReport = peft_deploy.validate(
        folder, tiny_llama, adapter=tiny_adapter, bisect=tmp_path / "where"
    )
    assert not report.passed
    failed = [case for case in report.cases if not case.passed]
    (bytes_,) = (case for case in failed if case.name == CASE)
    kind = "scales" if fault is scales_swapped else "quantized"
    assert f"{DOWN}.weight.{kind}: " in str(bytes_.problem)
    behaviour = [case for case in failed if case is not bytes_]
    assert len(behaviour) > 5 and all(case.problem is None for case in behaviour)
    found = report.finding
    assert found is not None and found.module.endswith("layers.1.mlp.down_proj"), str(found)
    assert [weight.name for weight in found.weights] == [f"{DOWN}.weight.{kind}"]
    assert "144 blocks are others" in found.weights[0].note


@needs_genai
def test_genai_generates_the_same_tokens(merged: Path, kept: Path) -> None:
    """Of prompts without padding: genai pads on the other side, and where two tokens are almost as likely, a last bit
    that differs can move an activation to the next of its 8-bit steps and decide between them.
    """
    prompts = [[3, 17, 5, 9, 40, 33], [8, 5, 6], [40, 99, 33, 7, 1, 9, 12, 4]]
    for bundle, names in ((merged, [()]), (kept, [(), "tuned", "poet"])):
        genai, session, seen = Genai(bundle), Session(bundle), []
        for name in names:
            if name:
                genai.load(bundle / "adapters" / f"{name}.onnx_adapter")
                session.load_adapter(name)
            given = {"adapter": name} if name else {}
            tokens = [genai.tokens([prompt], 14, name)[0] for prompt in prompts]
            assert tokens == [
                ours(session, [prompt], 14, genai.ends, **given)[0] for prompt in prompts
            ]
            assert tokens not in seen
            seen.append(tokens)
