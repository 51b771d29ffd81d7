"""A reference computed layer by layer gives what the whole one gives, outside and inside, bit for bit."""

from __future__ import annotations

import inspect
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from model_recipes import load_recipe

from peft_deploy.adapters.formats import write_adapter
from peft_deploy.base import open_base
from peft_deploy.config import LoRAConfig
from peft_deploy.errors import ExecutionError
from peft_deploy.parity.bisect import LayeredReference, Taps
from peft_deploy.parity.cases import Case, build_matrix
from peft_deploy.parity.encoder_cases import EncoderSizes, build_encoder_matrix
from peft_deploy.parity.play import run_case
from peft_deploy.parity.reference import PaddleReference
from peft_deploy.progress import Silent
from peft_deploy.workflows.bisect_layers import layered_reference
from peft_deploy.workflows.rounded_reference import load_stored
from peft_deploy.workflows.sources import from_folders

MODELS = {  # what says how many layers there are
    "llama": "num_hidden_layers",
    "qwen2": "num_hidden_layers",
    "mistral": "num_hidden_layers",
    "gemma": "num_hidden_layers",
    "qwen": "num_hidden_layers",
    "chatglm_v2": "num_hidden_layers",
    "gpt": "num_hidden_layers",
    "opt": "num_hidden_layers",
    "bloom": "n_layer",
    "rw": "n_layer",
    "bert-classification": "num_hidden_layers",
    "ernie-masked-lm": "num_hidden_layers",
}
# Multiplies by the number of a layer what it has divided by it: another number rounds otherwise.
ROUNDING = {"chatglm_v2": 1e-5}
LAYERS, EMBEDDING = 3, "llama.embed_tokens.weight"


def _both(
    model: str, folder: Path, precision: str = "fp32"
) -> tuple[PaddleReference, LayeredReference]:
    recipe = load_recipe("tiny")
    base = open_base(recipe.make(folder / "base", model, **{MODELS[model]: LAYERS}))
    assert base.dims.num_layers == LAYERS
    source = from_folders(base, recipe.make_lora(folder / "lora", base.path))
    whole = load_stored(source, precision, Silent())
    layered = layered_reference(source, base, precision, Silent())
    return PaddleReference(whole, source.family, source.config), layered


def _padded_case(whole: PaddleReference) -> Case:
    """Several rows of different length; of a decoder, in several calls, each on the cache of the one before."""
    family, config = whole.family, whole.config
    if whole.signature.past:
        cases = build_matrix(whole.signature, family.dims(config).max_positions).cases
        return next(case for case in cases if case.name == "decode, left padding")
    sizes = EncoderSizes.of(family, config)
    cases = build_encoder_matrix(whole.signature, sizes).cases
    return max(cases, key=lambda case: (~case.counts).sum())


def _assert_same(found: np.ndarray, wanted: np.ndarray, name: str, rounding: float) -> None:
    if not rounding:
        np.testing.assert_array_equal(found, wanted, name)
        return
    scale = float(np.abs(wanted).max())
    np.testing.assert_allclose(found, wanted, 0, rounding * scale, err_msg=name)


def _compare(taps: Taps, layered: LayeredReference, case: Case, rounding: float = 0.0) -> int:
    """How many values of modules both have; they and all outputs are the same."""
    wanted, found = run_case(taps, case, {}), run_case(layered, case, {})
    assert found.values.keys() == wanted.values.keys()
    for name, values in wanted.values.items():
        _assert_same(found.values[name], values, name, rounding)
    for key, value in taps.values.items():
        other = layered.values.get(key)
        assert other is not None, key
        _assert_same(other, value, str(key), rounding)
    return len(taps.values)


@pytest.mark.parametrize("model", MODELS)
def test_layer_by_layer_is_the_same_as_whole(model: str, tmp_path: Path) -> None:
    whole, layered = _both(model, tmp_path)
    taps = Taps(whole)
    assert sorted(layered.paths) == sorted(taps.paths)
    case, rounding = _padded_case(whole), ROUNDING.get(model, 0.0)
    assert _compare(taps, layered, case, rounding) > 10 * LAYERS


def test_in_float64_and_rounded_to_16_bits_too(tmp_path: Path) -> None:
    whole, layered = _both("llama", tmp_path, "bf16")
    case = _padded_case(whole)
    case = replace(case, slots=case.slots[:, : case.calls[0]], calls=case.calls[:1])
    exact, twin = whole.exact(), layered.exact()
    assert exact is not None and twin is not None and twin.signature == exact.signature
    assert _compare(Taps(exact), twin, case)
    assert _compare(Taps(whole.rounded("bfloat16", {})), layered.rounded("bfloat16", {}), case)


def test_what_no_module_gives_is_not_there(tmp_path: Path) -> None:
    whole, layered = _both("llama", tmp_path)
    run_case(layered, _padded_case(whole), {})
    assert layered.values.get(("llama.layers.1.self_attn.q_proj", "elsewhere")) is None
    assert layered.values.get(("llama.nothing", "output")) is None


def test_a_layer_that_is_not_handed_its_input_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Better than a value that was computed from something else."""
    from paddlenlp.transformers.llama.modeling import LlamaDecoderLayer

    whole, layered = _both("llama", tmp_path)
    called = LlamaDecoderLayer.__call__

    names = list(inspect.signature(LlamaDecoderLayer.forward).parameters)[1:]

    def by_name(self: object, *args: object, **kwargs: object) -> object:
        return called(self, **dict(zip(names, args, strict=False)), **kwargs)

    monkeypatch.setattr(LlamaDecoderLayer, "__call__", by_name)
    with pytest.raises(ExecutionError, match="does not take what the layer before it gives"):
        run_case(layered, _padded_case(whole), {})


def test_an_adapter_on_one_layer_and_on_the_embedding(tmp_path: Path) -> None:
    """Models of the other layers have no LoRA, and the new embedding all the same."""
    base = open_base(
        load_recipe("tiny").make(tmp_path / "base", "llama", num_hidden_layers=LAYERS)
    )
    rng, module, table = np.random.default_rng(3), "llama.layers.1.self_attn.q_proj", EMBEDDING
    rows, columns = base.tensors.info(f"{module}.weight").shape
    tensors = {
        f"{module}.lora_A": rng.normal(0, 0.3, (rows, 3)).astype(np.float32),
        f"{module}.lora_B": rng.normal(0, 0.3, (3, columns)).astype(np.float32),
        table: rng.normal(0, 0.5, base.tensors.info(table).shape).astype(np.float32),
    }
    config = LoRAConfig(
        r=3, lora_alpha=6, target_modules=[module], trainable_modules=[".*embed_tokens"]
    )
    write_adapter(tmp_path / "lora", config, tensors)
    source = from_folders(base, tmp_path / "lora")
    assert source.adapter is not None and set(source.adapter.adapter.replacements) == {table}
    model = load_stored(source, "fp32", Silent())
    whole = PaddleReference(model, source.family, source.config)
    layered = layered_reference(source, base, "fp32", Silent())
    assert _compare(Taps(whole), layered, _padded_case(whole)) > 10 * LAYERS
