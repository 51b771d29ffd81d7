"""Hugging Face PEFT's LoRA folders, read and written in numpy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import peft_made as made
import pytest
from peft_made import LAYERS, NAMES, PREFIX, QV, lora_tensors, paddle, write
from safetensors.numpy import load_file, save_file

from peft_deploy.adapters.formats.adapter import Adapter
from peft_deploy.adapters.formats.peft import read_peft
from peft_deploy.adapters.formats.peft_writer import write_peft
from peft_deploy.config import LoRAConfig
from peft_deploy.errors import AdapterError
from peft_deploy.weights.lora import lora_delta
from peft_deploy.weights.source import DTYPES

V0 = "model.layers.0.self_attn.v_proj"


def check_merged(adapter: Adapter, tensors: made.Tensors, scalings: dict[str, float]) -> None:
    """Every merged weight is the oracle's, and no other weight has changed."""
    base = made.base()
    merged = adapter.merge_into(made.Arrays(base))
    wanted = {name: array.astype(np.float64) for name, array in base.items()}
    for module, scaling in scalings.items():
        wanted[f"{paddle(module)}.weight"] += made.delta(tensors, module, scaling)
    for name, array in wanted.items():
        np.testing.assert_allclose(merged.read(name), array, rtol=2e-6, atol=2e-6, err_msg=name)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("rslora", [False, True])
def test_the_merged_weights(tmp_path: Path, dtype: str, rslora: bool) -> None:
    tensors = lora_tensors(QV, dtype)
    adapter = read_peft(write(tmp_path, tensors, use_rslora=rslora), NAMES)
    scaling = (made.rank_stable if rslora else made.plain)(7, 3)
    check_merged(adapter, tensors, dict.fromkeys(QV, scaling))
    assert adapter.dtype == dtype
    assert (adapter.config.r, adapter.config.lora_alpha, adapter.config.rslora) == (3, 7, rslora)
    assert adapter.config.base_model_name_or_path == "some/base"


@pytest.mark.parametrize("rslora", [False, True])
def test_patterns_of_ranks_and_alphas(tmp_path: Path, rslora: bool) -> None:
    ranks = {**QV, V0: 5, "model.layers.1.self_attn.q_proj": 2}
    tensors = lora_tensors(ranks)
    folder = write(
        tmp_path,
        tensors,
        use_rslora=rslora,
        rank_pattern={
            r"^model.layers.0.self_attn.v_proj": 5,
            "1.self_attn.q_proj": 2,
            "v_proj": 3,
        },
        alpha_pattern={r"layers\.\d+\.self_attn\.v_proj": 20},
    )
    adapter = read_peft(folder, NAMES, num_layers=LAYERS)
    rule = made.rank_stable if rslora else made.plain
    alphas = {module: 20 if "v_proj" in module else 7 for module in ranks}
    scalings = {module: rule(alphas[module], rank) for module, rank in ranks.items()}
    check_merged(adapter, tensors, scalings)
    assert {m: p.rank for m, p in adapter.pairs.items()} == {
        paddle(m): r for m, r in ranks.items()
    }
    # what PaddleNLP's format would hold has one rank and one scaling, and the same products
    assert adapter.config.r == 5
    for module, pair in adapter.pairs.items():
        A, B = (adapter.state[f"{module}.lora_{half}"].astype(np.float64) for half in "AB")
        assert A.shape[1] == B.shape[0] == 5
        exact = pair.scaling * pair.A.astype(np.float64) @ pair.B.astype(np.float64)
        np.testing.assert_allclose(adapter.config.scaling * A @ B, exact, rtol=1e-6, atol=2e-6)


def test_layers_and_regular_expressions(tmp_path: Path) -> None:
    one = {m: r for m, r in QV.items() if ".1." in m}
    folder = write(tmp_path / "a", lora_tensors(one), layers_to_transform=1)
    adapter = read_peft(folder, NAMES, num_layers=LAYERS)
    assert sorted(adapter.pairs) == sorted(map(paddle, one))
    folder = write(
        tmp_path / "b", lora_tensors(one), target_modules=r".*\.1\.self_attn\.[qv]_proj"
    )
    assert read_peft(folder, NAMES, num_layers=LAYERS).fingerprint == adapter.fingerprint
    patterns = adapter.config.target_patterns
    names = [name.removesuffix(".weight") for name in made.base()]
    assert sorted(LoRAConfig(target_modules=patterns).target_patterns) == sorted(patterns)
    from peft_deploy.config import match_patterns

    found = match_patterns(patterns, names, "target_modules")
    assert sorted(n for matched in found.values() for n in matched) == sorted(adapter.pairs)


def test_all_linear_leaves_the_output_layer_out(tmp_path: Path) -> None:
    only = made.layers_of("self_attn.q_proj")
    with pytest.raises(AdapterError, match="targets modules that the file does not hold"):
        read_peft(write(tmp_path, lora_tensors(only), target_modules="all-linear"), NAMES)
    tensors = lora_tensors(only)
    tensors[f"{PREFIX}lm_head.lora_A.weight"] = np.ones((3, 8), np.float32)
    tensors[f"{PREFIX}lm_head.lora_B.weight"] = np.ones((11, 3), np.float32)
    with pytest.raises(AdapterError, match=r"does not target[\s\S]*lm_head"):
        read_peft(write(tmp_path, tensors, target_modules="all-linear"), NAMES)


def test_embeddings_and_whole_tensors(tmp_path: Path) -> None:
    generator = np.random.default_rng(2)
    A, B, head = (
        generator.standard_normal(s).astype(np.float32) for s in ((3, 11), (8, 3), (11, 8))
    )
    tensors = lora_tensors(QV) | {
        f"{PREFIX}model.embed_tokens.lora_embedding_A": A,
        f"{PREFIX}model.embed_tokens.lora_embedding_B": B,
        f"{PREFIX}lm_head.weight": head,
    }
    options: dict[str, Any] = {
        "target_modules": ["q_proj", "v_proj", "embed_tokens"],
        "modules_to_save": ["lm_head"],
    }
    adapter = read_peft(write(tmp_path / "a", tensors, **options), NAMES)
    base = made.base()
    merged = adapter.merge_into(made.Arrays(base))
    wanted = base["llama.embed_tokens.weight"].astype(np.float64)
    wanted = wanted + 7 / 3 * (B.astype(np.float64) @ A.astype(np.float64)).T
    np.testing.assert_allclose(merged.read("llama.embed_tokens.weight"), wanted, atol=2e-6)
    np.testing.assert_array_equal(merged.read("lm_head.weight"), head.T)
    write_peft(tmp_path / "b", adapter, NAMES, num_layers=LAYERS)
    written = load_file(tmp_path / "b" / "adapter_model.safetensors")
    assert written.keys() == tensors.keys()
    for name, array in tensors.items():
        np.testing.assert_array_equal(written[name], array)
    tied = {"lm_head.weight": "llama.embed_tokens.weight"}
    with pytest.raises(AdapterError, match="share their storage"):
        read_peft(tmp_path / "a", NAMES, tied=tied)
    with pytest.raises(AdapterError, match="of which PEFT would train a copy"):
        write_peft(tmp_path / "c", adapter, NAMES, tied=tied)
    assert not (tmp_path / "c").exists()


def test_what_is_written_is_what_peft_looks_for(tmp_path: Path) -> None:
    tensors = lora_tensors(QV, "bfloat16")
    adapter = read_peft(write(tmp_path / "a", tensors, use_rslora=True), NAMES)
    write_peft(tmp_path / "b", adapter, NAMES, num_layers=LAYERS, task="CAUSAL_LM")
    config = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
    wanted = {k: made.ordinary()[k] for k in config} | {"use_rslora": True}
    assert config == wanted
    again = read_peft(tmp_path / "b", NAMES)
    assert again.fingerprint == adapter.fingerprint
    # without the number of layers, nobody can say that a short name means these modules only
    write_peft(tmp_path / "c", adapter, NAMES)
    config = json.loads((tmp_path / "c" / "adapter_config.json").read_text())
    assert config["target_modules"] == sorted(QV)


def test_ranks_and_scalings_are_written_as_patterns(tmp_path: Path) -> None:
    ranks = {**QV, V0: 5}
    tensors = lora_tensors(ranks)
    folder = write(tmp_path / "a", tensors, rank_pattern={V0: 5}, alpha_pattern={"q_proj": 9})
    adapter = read_peft(folder, NAMES)
    write_peft(tmp_path / "b", adapter, NAMES)
    again = read_peft(tmp_path / "b", NAMES)
    assert again.fingerprint == adapter.fingerprint
    config = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
    assert config["rank_pattern"] == {V0: 5}
    assert len({p.scaling for p in adapter.pairs.values()}) == 3


REFUSED = [
    ({"peft_type": "LOHA"}, "of the type LOHA"),
    ({"peft_type": "IA3"}, "of the type IA3"),
    ({"use_dora": True}, "DoRA"),
    ({"lora_bias": True}, "a bias beside lora_B"),
    ({"bias": "lora_only"}, "trained biases"),
    ({"target_parameters": ["mlp.experts.gate_up_proj"]}, "mixtures of experts"),
    ({"trainable_token_indices": [1]}, "trainable tokens"),
    ({"layer_replication": [[0, 2]]}, "replicated layers"),
    ({"alora_invocation_tokens": [1]}, "activated LoRA"),
    ({"loftq_config": {"loftq_bits": 4}}, "LoftQ"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa'"),
    ({"init_lora_weights": "olora"}, "changes the base model's weights"),
    ({"use_something_new": True}, "not known here .use_something_new"),
    ({"target_modules": None}, "does not say target_modules"),
    ({"target_modules": "([qv"}, "no regular expression"),
    ({"rank_pattern": {"[": 3}}, "cannot be used"),
    ({"r": 0}, "no rank"),
    ({"lora_alpha": "7"}, "no finite number"),
    ({"r": 4}, "of rank 3; r and rank_pattern"),
    ({"target_modules": ["q_proj"]}, "does not target"),
    ({"target_modules": ["q_proj", "v_proj", "k_proj"]}, "does not hold"),
    ({"layers_to_transform": [0]}, "does not target"),
    ({"exclude_modules": ["v_proj"]}, "does not target"),
    ({"modules_to_save": ["lm_head"]}, "without a tensor"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=[m for _, m in REFUSED])
def test_configurations_that_are_refused(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    folder = write(tmp_path, **options)
    with pytest.raises(AdapterError, match=message) as caught:
        read_peft(folder, NAMES)
    assert caught.value.exit_code == 3


Q0 = f"{PREFIX}model.layers.0.self_attn.q_proj"


def _with(name: str, shape: tuple[int, ...]) -> made.Tensors:
    return lora_tensors(QV) | {name: np.ones(shape, np.float32)}


TENSORS = [
    (_with(f"{Q0}.lora_magnitude_vector", (8,)), "DoRA"),
    (_with(f"{Q0}.lora_B.bias", (8,)), "a bias beside lora_B"),
    (_with(f"{Q0}.bias", (8,)), "trained biases"),
    (_with(f"{Q0}.lora_C.weight", (8,)), "not known"),
    (_with("llama.layers.0.q_proj.lora_A", (8, 3)), "begin with base_model.model."),
    (_with(f"{PREFIX}score.weight", (2, 8)), "does not have"),
    ({n: a for n, a in lora_tensors(QV).items() if n != f"{Q0}.lora_B.weight"}, "only one of"),
    ({n: a for n, a in lora_tensors(QV).items() if not n.startswith(Q0)}, "does not hold"),
    (lora_tensors(QV) | {f"{Q0}.lora_A.weight": np.ones((3, 8), np.float16)}, "mixes the element"),
    (lora_tensors(QV) | {f"{Q0}.lora_A.weight": np.full((3, 8), np.nan, np.float32)}, "NaN"),
    (lora_tensors(QV) | {f"{Q0}.lora_A.weight": np.ones((8, 3), np.float32)}, "are needed"),
    (
        {n.replace("self_attn", "attention"): a for n, a in lora_tensors(QV).items()},
        "family does not have",
    ),
]


@pytest.mark.parametrize(("tensors", "message"), TENSORS, ids=range(len(TENSORS)))
def test_tensors_that_are_refused(tmp_path: Path, tensors: made.Tensors, message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        read_peft(write(tmp_path, tensors), NAMES)


def test_a_pickle_is_refused_by_name(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(AdapterError, match="a pickle of torch"):
        read_peft(tmp_path, NAMES)
    (tmp_path / "adapter_model.bin").unlink()
    with pytest.raises(AdapterError, match=r"but no adapter_model\.safetensors"):
        read_peft(tmp_path, NAMES)


def test_damaged_configurations(tmp_path: Path) -> None:
    write(tmp_path)
    for text in ("{", "[]", '{"r": 3}'):
        (tmp_path / "adapter_config.json").write_text(text)
        with pytest.raises(AdapterError, match=r"adapter_config\.json"):
            read_peft(tmp_path, NAMES)


def test_a_linear_layer_is_no_embedding(tmp_path: Path) -> None:
    tensors = lora_tensors(QV)
    for half in "AB":
        tensors[f"{Q0}.lora_embedding_{half}"] = tensors.pop(f"{Q0}.lora_{half}.weight")
    with pytest.raises(AdapterError, match="what is an embedding, or the reverse"):
        read_peft(write(tmp_path, tensors, target_modules=["v_proj", "1.self_attn.q_proj"]), NAMES)


WRITING = [
    ({"pissa": True, "lora_alpha": 3}, {}, "PiSSA"),
    ({}, {"llama.layers.0.self_attn.q_proj.bias": (8,)}, "a trained bias"),
    ({}, {"llama.layers.0.self_attn.q_proj.weight": (8, 8)}, "adapts them with LoRA too"),
    ({}, {"score.weight": (8, 2)}, "no name in Hugging Face"),
]


@pytest.mark.parametrize(("options", "extra", "message"), WRITING, ids=[m for *_, m in WRITING])
def test_adapters_that_peft_cannot_hold(
    tmp_path: Path, options: dict[str, Any], extra: dict[str, tuple[int, ...]], message: str
) -> None:
    read = read_peft(write(tmp_path / "a"), NAMES)
    config = LoRAConfig(**{"r": 3, "target_modules": ["q_proj"], **options})
    whole = {name: np.ones(shape, np.float32) for name, shape in extra.items()}
    adapter = Adapter(tmp_path, config, read.state, read.pairs, whole)
    with pytest.raises(AdapterError, match=message):
        write_peft(tmp_path / "b", adapter, NAMES)
    assert not (tmp_path / "b").exists()


def test_bfloat16_is_not_rounded_where_scalings_go_into_B(tmp_path: Path) -> None:
    tensors = lora_tensors(QV, "bfloat16")
    same = read_peft(write(tmp_path / "a", tensors, alpha_pattern={"q_proj": 28}), NAMES)
    assert same.config.dtype == "bfloat16"  # the quotient is a power of two
    other = read_peft(write(tmp_path / "b", tensors, alpha_pattern={"q_proj": 9}), NAMES)
    assert other.config.dtype == "float32"
    for adapter in (same, other):
        assert adapter.dtype == "bfloat16"
        for module, pair in adapter.pairs.items():
            A, B = (adapter.state[f"{module}.lora_{half}"].astype(np.float64) for half in "AB")
            wanted = lora_delta(type(pair)(pair.A.astype(np.float64), pair.B, pair.scaling))
            np.testing.assert_allclose(
                adapter.config.scaling * A @ B, wanted, rtol=1e-6, atol=2e-6
            )


def test_the_metadata_says_torch(tmp_path: Path) -> None:
    adapter = read_peft(write(tmp_path / "a"), NAMES)
    file = write_peft(tmp_path / "b", adapter, NAMES)
    header = json.loads(file.read_bytes()[8 : 8 + int.from_bytes(file.read_bytes()[:8], "little")])
    assert header["__metadata__"] == {"format": "pt"}
    assert DTYPES["float32"] == adapter.pairs[paddle(V0)].A.dtype


def test_a_resized_embedding_in_the_file_is_a_whole_tensor(tmp_path: Path) -> None:
    tensors = _with(f"{PREFIX}model.embed_tokens.base_layer.weight", (11, 8))
    adapter = read_peft(write(tmp_path, tensors), NAMES)
    assert list(adapter.replacements) == ["llama.embed_tokens.weight"]
    save_file({"x": np.ones(1, np.float32)}, tmp_path / "other.safetensors")  # ignored
    assert read_peft(tmp_path, NAMES).fingerprint == adapter.fingerprint
