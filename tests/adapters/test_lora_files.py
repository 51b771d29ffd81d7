from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import paddle
import pytest
from adapters_tiny import bits, fill_branches, logits, tiny_llama
from paddle import nn

from peft_deploy.adapters.lora import LoRAConfig, LoRAModel
from peft_deploy.adapters.provenance import PROVENANCE_NAME, Provenance
from peft_deploy.errors import AdapterError, OutputError

TARGETS = ["q_proj", "v_proj"]
RULES = {"plain": {}, "rslora": {"rslora": True}, "pissa": {"pissa": True}}
FIRST_A = "llama.layers.0.self_attn.q_proj.lora_A"
FIRST_B = "llama.layers.0.self_attn.q_proj.lora_B"


def wrap(base: nn.Layer | None = None, **options: object) -> LoRAModel:
    options = {"target_modules": TARGETS, "r": 4, "lora_alpha": 6, **options}
    model = LoRAModel(base or tiny_llama(), LoRAConfig(**options))
    fill_branches(model)
    return model


def edit(folder: Path, change) -> None:
    """Rewrites the weight file of an adapter."""
    path = str(folder / "lora_model_state.pdparams")
    state = paddle.load(path, return_numpy=True)
    change(state)
    paddle.save(state, path)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    wrap().save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    "extra",
    [{}, {"trainable_modules": ["llama.norm", "lm_head.weight"]}, {"trainable_bias": "all"}],
)
@pytest.mark.parametrize("state", ["plain", "merged", "disabled"])
def test_l7_save_and_load(rule: str, extra: dict, state: str, tmp_path: Path) -> None:
    model = wrap(**RULES[rule], **extra)
    tuned = logits(model)
    if state == "merged":
        model.merge()
    elif state == "disabled":
        model.disable_lora()
    model.save_pretrained(tmp_path)
    base = tiny_llama()
    before = logits(base)
    assert np.abs(before - tuned).max() > 0.1
    loaded = LoRAModel.from_pretrained(base, tmp_path)
    np.testing.assert_allclose(logits(loaded), tuned, atol=1e-6)
    np.testing.assert_allclose(logits(loaded), tuned, atol=1e-6)  # nothing starts at the first run
    loaded.merge()
    np.testing.assert_allclose(logits(loaded), tuned, atol=1e-5)
    np.testing.assert_array_equal(logits(loaded.restore_original_model()), before)


def test_the_files_are_the_reference_s_and_our_own(saved: Path) -> None:
    assert sorted(path.name for path in saved.iterdir()) == [
        "config.json",
        "lora_config.json",
        "lora_model_state.pdparams",
        PROVENANCE_NAME,
    ]
    state = paddle.load(str(saved / "lora_model_state.pdparams"))
    assert list(state)[:2] == [FIRST_A, FIRST_B]
    assert len(state) == 8
    assert json.loads((saved / "config.json").read_text())["model_type"] == "llama"
    assert json.loads((saved / "lora_config.json").read_text())["scaling"] == 1.5


def test_a_model_without_a_config(tmp_path: Path) -> None:
    def net() -> nn.Layer:
        paddle.seed(2)
        return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))

    model = LoRAModel(net(), LoRAConfig(target_modules=["0"], r=2))
    fill_branches(model)
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "config.json").exists()
    x = paddle.randn([3, 4])
    loaded = LoRAModel.from_pretrained(net(), tmp_path)
    np.testing.assert_array_equal(loaded(x).numpy(), model(x).numpy())


def test_with_a_configuration_given(saved: Path) -> None:
    config = LoRAConfig.from_pretrained(saved)
    loaded = LoRAModel.from_pretrained(tiny_llama(), saved, lora_config=config)
    np.testing.assert_allclose(logits(loaded), logits(wrap()), atol=1e-6)


def test_a_variant(tmp_path: Path) -> None:
    wrap().save_pretrained(tmp_path, variant="best")
    assert (tmp_path / "lora_model_state.best.pdparams").is_file()
    with pytest.raises(AdapterError, match="no adapter weights"):
        LoRAModel.from_pretrained(tiny_llama(), tmp_path)
    loaded = LoRAModel.from_pretrained(tiny_llama(), tmp_path, variant="best")
    np.testing.assert_allclose(logits(loaded), logits(wrap()), atol=1e-6)


def test_other_processes_and_options_of_the_trainer(tmp_path: Path) -> None:
    model = wrap()
    model.save_pretrained(tmp_path / "rank1", is_main_process=False)
    assert not (tmp_path / "rank1").exists()
    model.save_pretrained(
        tmp_path / "rank0", save_model_config=False, max_shard_size="1GB", save_function=None
    )
    assert not (tmp_path / "rank0" / "config.json").exists()


def test_saving_to_a_file(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(OutputError, match="is a file"):
        wrap().save_pretrained(tmp_path / "taken")


def test_saving_over_an_adapter_leaves_no_temporary_files(saved: Path) -> None:
    before = sorted(path.name for path in saved.iterdir())
    wrap().save_pretrained(saved)
    assert sorted(path.name for path in saved.iterdir()) == before


def test_bfloat16_survives(tmp_path: Path) -> None:
    model = wrap(dtype="bfloat16")
    model.save_pretrained(tmp_path)
    loaded = LoRAModel.from_pretrained(tiny_llama(), tmp_path)
    ours, theirs = model.get_trainable_state_dict(), loaded.get_trainable_state_dict()
    for name, tensor in ours.items():
        assert theirs[name].dtype == paddle.bfloat16
        assert (theirs[name].astype("float32") == tensor.astype("float32")).all()
        assert float(tensor.astype("float32").abs().max()) > 0.1


def fails(base: nn.Layer, folder: Path, message: str) -> str:
    """Loading fails with the message, and leaves the model as it was."""
    before, layers = bits(base), [id(layer) for layer in base.sublayers()]
    flags = [p.stop_gradient for p in base.parameters()]
    with pytest.raises(AdapterError, match=message) as caught:
        LoRAModel.from_pretrained(base, folder)
    assert bits(base) == before
    assert [id(layer) for layer in base.sublayers()] == layers
    assert [p.stop_gradient for p in base.parameters()] == flags
    return str(caught.value)


def test_l2_missing_keys(saved: Path) -> None:
    def drop(state: dict) -> None:
        del state[FIRST_A], state[FIRST_B]

    edit(saved, drop)
    message = fails(tiny_llama(), saved, "2 missing from the file")
    assert FIRST_A in message
    assert FIRST_B in message


def test_l2_junk_keys(saved: Path) -> None:
    edit(saved, lambda state: state.update(junk=np.ones((2, 2), np.float32)))
    assert "junk" in fails(tiny_llama(), saved, "1 in the file, but not in the model")


def test_l2_rank_in_the_file_differs_from_the_configuration(saved: Path) -> None:
    LoRAConfig(target_modules=TARGETS, r=8).save_pretrained(saved)
    message = fails(tiny_llama(), saved, "r = 8")
    assert "rank 4" in message


def test_l2_shapes_of_another_model(saved: Path) -> None:
    def widen(state: dict) -> None:
        state[FIRST_A] = np.ones((40, 4), np.float32)

    edit(saved, widen)
    message = fails(tiny_llama(), saved, "of another shape")
    assert f"{FIRST_A}: [40, 4] in the file, [32, 4] in the model" in message


def test_l2_no_weight_file(saved: Path) -> None:
    (saved / "lora_model_state.pdparams").unlink()
    fails(tiny_llama(), saved, "no adapter weights")


def test_l2_a_trained_module_that_the_file_lacks(tmp_path: Path) -> None:
    wrap(trainable_modules=["llama.norm"]).save_pretrained(tmp_path)
    edit(tmp_path, lambda state: state.pop("llama.norm.weight"))
    assert "llama.norm.weight" in fails(tiny_llama(), tmp_path, "1 missing from the file")


def test_an_adapter_for_other_layer_names(saved: Path) -> None:
    net = nn.Sequential()
    net.add_sublayer("q_proj", nn.Linear(32, 32))
    net.add_sublayer("v_proj", nn.Linear(32, 16))
    fails(net, saved, "4 missing from the file")


def test_tensors_beyond_the_options_take_effect_and_travel_on(saved: Path, tmp_path: Path) -> None:
    norm = np.linspace(0.5, 1.5, 32).astype(np.float32)
    plain = logits(LoRAModel.from_pretrained(tiny_llama(), saved))
    edit(saved, lambda state: state.update({"llama.norm.weight": norm}))
    base = tiny_llama()
    before = bits(base)
    loaded = LoRAModel.from_pretrained(base, saved)
    assert np.abs(logits(loaded) - plain).max() > 0.1
    np.testing.assert_array_equal(base.llama.norm.weight.numpy(), norm)
    loaded.save_pretrained(tmp_path / "again")
    again = LoRAModel.from_pretrained(tiny_llama(), tmp_path / "again")
    np.testing.assert_array_equal(logits(again), logits(loaded))
    loaded.restore_original_model()
    assert bits(base) == before


def test_l4_loading_while_merged_does_not_touch_the_base(saved: Path) -> None:
    base = tiny_llama()
    before = logits(base)
    model = LoRAModel.from_pretrained(base, saved)
    first = logits(model)
    other = {
        name: tensor.numpy() * -0.5 for name, tensor in model.get_trainable_state_dict().items()
    }
    model.merge()
    model.set_state_dict(other)
    assert model.merged
    second = logits(model)
    assert np.abs(second - first).max() > 0.05
    model.unmerge()
    np.testing.assert_allclose(logits(model), second, atol=1e-5)
    model.disable_lora()
    np.testing.assert_array_equal(logits(model), before)


def test_state_dicts_load_with_and_without_the_wrapper_s_prefix() -> None:
    model = wrap()
    expected = logits(model)
    for state in (model.state_dict(), model.model.state_dict(), model.get_trainable_state_dict()):
        other = LoRAModel(tiny_llama(seed=0), model.lora_config)
        missing, unexpected = other.set_state_dict(state)
        assert unexpected == []
        assert bool(missing) == (len(state) == 8)
        np.testing.assert_array_equal(logits(other), expected)


def test_base_weights_alone_can_be_loaded() -> None:
    model = wrap()
    donor = tiny_llama(seed=5)
    model.set_state_dict(donor.state_dict())
    model.disable_lora()
    np.testing.assert_array_equal(logits(model), logits(donor))


def test_l2_state_dicts_are_strict() -> None:
    model = wrap()
    before = bits(model)
    state = model.get_trainable_state_dict()
    with pytest.raises(AdapterError, match="junk"):
        model.set_state_dict({**state, "junk": state[FIRST_A]})
    with pytest.raises(AdapterError, match="another shape"):
        model.set_state_dict({**state, FIRST_A: paddle.ones([32, 5])})
    with pytest.raises(AdapterError, match="missing"):
        model.set_state_dict({FIRST_A: state[FIRST_A] + 1})
    assert bits(model) == before


def test_a_whole_pissa_model_s_state_can_be_loaded() -> None:
    model = wrap(pissa=True)
    expected, base = logits(model), tiny_llama()
    before = logits(base)
    other = LoRAModel(base, model.lora_config)
    other.set_state_dict(model.state_dict())
    np.testing.assert_array_equal(logits(other), expected)
    other.merge()
    np.testing.assert_allclose(logits(other), expected, atol=1e-5)
    other.disable_lora()
    np.testing.assert_allclose(logits(other), before, atol=1e-5)


def test_l12_a_base_that_holds_the_adapter_already_is_refused(saved: Path) -> None:
    base = tiny_llama()
    model = LoRAModel.from_pretrained(base, saved)
    model.merge()
    merged = {name: tensor.numpy() for name, tensor in base.state_dict().items()}
    fresh = tiny_llama()
    fresh.set_state_dict({n: v for n, v in merged.items() if "lora_" not in n})
    message = fails(fresh, saved, "already holds this adapter")
    assert "llama.layers.0.self_attn.q_proj" in message


def test_l12_another_base_of_the_same_shape_is_told(saved: Path) -> None:
    with pytest.warns(UserWarning, match="not the one that the adapter was trained on"):
        LoRAModel.from_pretrained(tiny_llama(seed=1), saved)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_l12_rounding_of_the_base_is_no_other_base(saved: Path, dtype: str) -> None:
    base = tiny_llama()
    base.to(dtype=dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LoRAModel.from_pretrained(base, saved)


def test_l12_provenance(tmp_path: Path) -> None:
    model = wrap(pissa=True)
    model.base_fingerprint = "ab" * 32
    model.merge()
    model.save_pretrained(tmp_path)
    provenance = Provenance.load(tmp_path)
    assert provenance is not None
    assert provenance.merged
    assert provenance.principal_start
    assert provenance.base_fingerprint == "ab" * 32
    base = tiny_llama()
    sample = provenance.base_weights["llama.layers.0.self_attn.q_proj"]
    weight = base.llama.layers[0].self_attn.q_proj.weight.numpy()
    assert set(sample.values) <= set(weight.reshape(-1).tolist())
    assert LoRAModel.from_pretrained(base, tmp_path).base_fingerprint == "ab" * 32


@pytest.mark.parametrize("text", ["{", "[]", '{"format_version": 99}', '{"format_version": 1}'])
def test_provenance_that_cannot_be_read(saved: Path, text: str) -> None:
    (saved / PROVENANCE_NAME).write_text(text)
    with pytest.raises(AdapterError, match=PROVENANCE_NAME):
        LoRAModel.from_pretrained(tiny_llama(), saved)
