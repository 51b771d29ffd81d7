from __future__ import annotations

import copy
from typing import Any

import numpy as np
import paddle
import pytest
from paddle import nn
from prefix_tiny import (
    CASES,
    IDS,
    LAYERS,
    MAX_POSITIONS,
    P,
    fill,
    given_past,
    prefix_rows,
    prefixed,
    run,
    tiny,
    trigger,
)

import peft_deploy
from peft_deploy.adapters import prefix as package
from peft_deploy.adapters.prefix import (
    PrefixConfig,
    PrefixInputError,
    PrefixModel,
    PrefixModelForCausalLM,
    UnsupportedPrefixModelError,
)
from peft_deploy.config import PrefixConfigError
from peft_deploy.errors import AdapterError

PROJECTIONS = [False, True]


@pytest.mark.parametrize("projection", PROJECTIONS)
@pytest.mark.parametrize("name", [n for n, case in CASES.items() if case.takes_a_past])
def test_a_model_sees_the_prefix_as_its_past(name: str, projection: bool) -> None:
    """GQA, MQA and explicit head sizes, with nothing said but the number of tokens."""
    case, base = CASES[name], tiny(name)
    before = run(base)
    model = prefixed(base=base, prefix_projection=projection)
    rows = prefix_rows(model)
    assert rows.shape == (LAYERS, 2, case.kv_heads, P, case.head_dim)
    expected = run(base, **given_past(name, rows, len(IDS)))
    assert np.abs(expected - before).max() > 0.1
    np.testing.assert_allclose(run(model), expected, atol=2e-5)
    np.testing.assert_array_equal(run(base), before)


@pytest.mark.parametrize("name", CASES)
def test_the_options_are_filled_in_from_the_model(name: str) -> None:
    given = PrefixConfig(num_prefix_tokens=P, prefix_projection=True)
    model = PrefixModelForCausalLM(tiny(name), given)
    config, case = model.prefix_config, CASES[name]
    assert given.num_attention_heads is None
    assert config.num_attention_heads == 4
    assert config.multi_query_group_num == case.kv_heads
    assert config.num_hidden_layers == LAYERS
    assert config.hidden_size == config.prefix_projection_hidden_size == 32
    assert config.dtype == "float32"
    assert config.tensor_parallel_degree == (-1 if name == "chatglm_v2" else 1)
    assert model.head_dim == case.head_dim


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_the_encoder_has_the_reference_s_names_and_shapes(projection: bool) -> None:
    model = prefixed(prefix_projection=projection, prefix_projection_hidden_size=24)
    shapes = {name: t.shape for name, t in model.prefix_encoder.state_dict().items()}
    wide = 2 * LAYERS * 2 * 8
    assert shapes == (
        {
            "0.weight": [P, 16],
            "1.weight": [16, 24],
            "1.bias": [24],
            "3.weight": [24, wide],
            "3.bias": [wide],
        }
        if projection
        else {"0.weight": [P, wide]}
    )
    assert "prefix_tokens" not in model.state_dict()
    own = {n for n in model.state_dict() if not n.startswith("model.")}
    assert own == {f"prefix_encoder.{name}" for name in shapes}


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"num_prefix_tokens": None}, "num_prefix_tokens"),
        ({"num_attention_heads": 8}, "num_attention_heads is 8, but the model's is 4"),
        ({"multi_query_group_num": 4}, "multi_query_group_num is 4, but the model's is 2"),
        ({"num_hidden_layers": 3}, "num_hidden_layers is 3, but the model's is 2"),
        ({"hidden_size": 64}, "hidden_size is 64, but the model's is 32"),
    ],
)
def test_options_for_another_model_are_refused(options: dict[str, Any], text: str) -> None:
    with pytest.raises(PrefixConfigError, match=text):
        PrefixModelForCausalLM(tiny("llama"), PrefixConfig(**{"num_prefix_tokens": P, **options}))


def test_a_hidden_size_made_up_for_the_reference_s_head_size_is_taken() -> None:
    """paddlenlp.peft divides hidden_size by the heads; Gemma's head size comes out only so."""
    wanted = run(prefixed("gemma"))
    np.testing.assert_array_equal(run(prefixed("gemma", hidden_size=64)), wanted)


class Decoder(nn.Layer):
    """Attends to the past with a plain mean; nobody has described it."""

    def __init__(self, argument: str = "past_key_values") -> None:
        super().__init__()
        self.weight = self.create_parameter([4])
        self.argument = argument

    def forward(
        self, input_ids: Any, past_key_values: Any = None, attention_mask: Any = None
    ) -> Any:
        return sum(key.mean([1, 2]) - 2 * value.mean([1, 2]) for key, value in past_key_values)


SIZES = {"num_attention_heads": 2, "num_hidden_layers": 3, "hidden_size": 8}


def test_a_model_that_nobody_has_described_needs_a_postprocess() -> None:
    config = PrefixConfig(num_prefix_tokens=P, **SIZES)
    with pytest.raises(UnsupportedPrefixModelError, match="Decoder takes a past is not known"):
        PrefixModelForCausalLM(Decoder(), config)
    model = PrefixModelForCausalLM(
        Decoder(), config, postprocess_past_key_value=package.llama_postprocess_past_key_value
    )
    fill(model)
    weight = model.prefix_encoder[0].weight.numpy().reshape(P, 6, 2, 4)
    expected = weight[:, :3].mean((0, 2)).sum(0) - 2 * weight[:, 3:].mean((0, 2)).sum(0)
    np.testing.assert_allclose(run(model), np.stack([expected] * 2), rtol=1e-5)


def test_sizes_that_nobody_says_are_an_error() -> None:
    with pytest.raises(
        PrefixConfigError, match="num_attention_heads, num_hidden_layers, hidden_s"
    ):
        PrefixModelForCausalLM(Decoder(), PrefixConfig(num_prefix_tokens=P), lambda past: past)


def test_models_without_a_past_and_models_with_a_prefix_are_refused() -> None:
    config = PrefixConfig(num_prefix_tokens=P, **SIZES)
    with pytest.raises(NotImplementedError, match="neither past_key_values nor cache"):
        PrefixModelForCausalLM(nn.Linear(2, 2), config)
    with pytest.raises(PrefixConfigError, match="has a prefix already"):
        PrefixModelForCausalLM(prefixed(), PrefixConfig(num_prefix_tokens=P))
    with pytest.raises(PrefixConfigError, match="not a PrefixConfig and a Llama"):
        PrefixModelForCausalLM(config, tiny("llama"))


def test_tensor_parallel_models_are_refused() -> None:
    base = tiny("llama")
    base.config.tensor_parallel_degree = 2
    with pytest.raises(UnsupportedPrefixModelError, match="tensor_parallel_degree 2"):
        PrefixModelForCausalLM(base, PrefixConfig(num_prefix_tokens=P))


@pytest.mark.parametrize("dtype", ["bool", "int32", "int64", "float32"])
@pytest.mark.parametrize("name", CASES)
def test_masks_of_two_three_and_four_dimensions_mean_the_same(name: str, dtype: str) -> None:
    model = prefixed(name)
    wanted = run(model)
    two = np.ones(IDS.shape, np.int64)
    for mask in (two, trigger(), trigger()[:, None]):
        if mask.ndim not in CASES[name].mask_dims:
            with pytest.raises(PrefixInputError, match=r"only takes masks \[B, T\]"):
                run(model, attention_mask=paddle.to_tensor(mask.astype(dtype)))
            continue
        found = run(model, attention_mask=paddle.to_tensor(mask.astype(dtype)))
        np.testing.assert_allclose(found, wanted, atol=2e-5)


@pytest.mark.parametrize("name", CASES)
def test_padding_on_the_right_changes_nothing(name: str) -> None:
    model = prefixed(name)
    padded = np.concatenate([IDS, np.full((2, 3), 11)], axis=1)
    mask = (np.arange(8) < 5).astype(np.int64)[None].repeat(2, 0)
    found = run(model, padded, attention_mask=paddle.to_tensor(mask))
    np.testing.assert_allclose(found[:, :5], run(model), atol=2e-5)
    blind = run(model, np.roll(padded, 3, axis=1))[:, 3:]
    assert np.abs(blind - run(model)).max() > 0.05  # without its mask, padding would tell


@pytest.mark.parametrize("name", CASES)
def test_padding_on_the_left_changes_nothing(name: str) -> None:
    model = prefixed(name)
    padded = np.concatenate([np.full((2, 3), 11), IDS], axis=1)
    inputs = {
        "attention_mask": paddle.to_tensor((np.arange(8) >= 3).astype(np.int64)[None].repeat(2, 0))
    }
    first = P if CASES[name].positions_after_past else 0
    if not CASES[name].counts_in_mask:
        positions = np.maximum(np.arange(8) - 3, 0) + first
        inputs["position_ids"] = paddle.to_tensor(positions[None].repeat(2, 0))
    np.testing.assert_allclose(run(model, padded, **inputs)[:, 3:], run(model), atol=3e-5)


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen", "gemma", "chatglm_v2"])
def test_positions_are_not_moved_by_the_prefix(name: str) -> None:
    model = prefixed(name)
    wanted, positions = run(model), np.arange(5)[None].repeat(2, 0)
    np.testing.assert_array_equal(run(model, position_ids=paddle.to_tensor(positions)), wanted)
    moved = run(model, position_ids=paddle.to_tensor(positions + P))
    assert np.abs(moved - wanted).max() > 1e-2


@pytest.mark.parametrize("name", ["gpt", "mistral"])
def test_models_that_count_on_from_their_past_do_so(name: str) -> None:
    model = prefixed(name)
    wanted, positions = run(model), np.arange(5)[None].repeat(2, 0)
    np.testing.assert_allclose(
        run(model, position_ids=paddle.to_tensor(positions + P)), wanted, atol=1e-6
    )
    assert np.abs(run(model, position_ids=paddle.to_tensor(positions)) - wanted).max() > 1e-2


LOWEST = float(np.finfo(np.float32).min)


@pytest.mark.parametrize("lowest", [-1e4, -1e9, LOWEST, -np.inf])
@pytest.mark.parametrize("name", CASES)
def test_an_additive_mask_is_never_inverted(name: str, lowest: float) -> None:
    additive = np.where(trigger()[:, None] == 1, 0, lowest).astype(np.float32)
    with pytest.raises(ValueError, match="only 0 and 1 have a meaning"):
        run(prefixed(name), attention_mask=paddle.to_tensor(additive))


def test_masks_that_mean_nothing_are_refused() -> None:
    model = prefixed()
    for shape in ((2, 5), (2, 1, 5, 5)):
        with pytest.raises(PrefixInputError, match="zeros only"):
            run(model, attention_mask=paddle.zeros(shape))
    with pytest.raises(PrefixInputError, match="values from 0 to 2"):
        run(model, attention_mask=paddle.to_tensor([[0, 1, 2, 1, 1]] * 2))
    with pytest.raises(ValueError, match=r"has the shape \[5\]"):
        run(model, attention_mask=paddle.ones([5]))
    with pytest.raises(PrefixInputError, match="prefix is not to be counted"):
        run(model, attention_mask=paddle.ones([2, 5 + P], dtype="int64"))


def test_a_pad_attention_mask_of_one_s_own() -> None:
    """It hides the first prefix token, as if it was not there."""
    calls = []

    def pad(shape: Any, num_prefix_tokens: int, mask: paddle.Tensor) -> paddle.Tensor:
        calls.append((list(shape), num_prefix_tokens))
        front = paddle.ones([shape[0], num_prefix_tokens], dtype=mask.dtype)
        front[:, 0] = 0
        return paddle.concat([front, mask], axis=-1)

    model = prefixed()
    shorter = PrefixModelForCausalLM(model.model, PrefixConfig(num_prefix_tokens=P - 1)).eval()
    shorter.prefix_encoder[0].weight.set_value(model.prefix_encoder[0].weight[1:])
    model.pad_attention_mask = pad
    mask = paddle.ones([2, 5], dtype="int64")
    np.testing.assert_allclose(run(model, attention_mask=mask), run(shorter), atol=1e-5)
    assert calls == [([2, 5], P)]
    model.pad_attention_mask = lambda shape, num, mask: mask
    with pytest.raises(PrefixInputError, match="has to add 3 columns"):
        run(model, attention_mask=mask)


@pytest.mark.parametrize(
    "name", ["llama", "qwen2", "gpt", "opt", "mistral", "chatglm_v2", "gemma"]
)
def test_more_positions_than_the_model_has(name: str) -> None:
    model = prefixed(name)
    fits = np.resize(IDS, (1, MAX_POSITIONS - P))
    assert np.isfinite(run(model, fits)).all()
    with pytest.raises(PrefixInputError, match=r"3 prefix tokens and 62 tokens make 65; .* 64"):
        run(model, np.resize(IDS, (1, MAX_POSITIONS - P + 1)))


def test_alibi_has_no_largest_position() -> None:
    long = np.resize(IDS, (1, MAX_POSITIONS + 10))
    assert np.isfinite(run(prefixed("bloom"), long)).all()


@pytest.mark.parametrize("name", [n for n in CASES if n != "chatglm_v2"])
def test_embeddings_in_place_of_tokens(name: str) -> None:
    model = prefixed(name)
    embeddings = model.get_input_embeddings()(paddle.to_tensor(IDS))
    found = run(model, None, inputs_embeds=embeddings)
    np.testing.assert_allclose(found, run(model), atol=1e-6)


def test_inputs_that_a_model_cannot_take() -> None:
    with pytest.raises(PrefixInputError, match="takes no inputs_embeds without input_ids"):
        run(prefixed("chatglm_v2"), None, inputs_embeds=paddle.ones([2, 5, 32]))
    with pytest.raises(PrefixInputError, match="input_ids or inputs_embeds"):
        run(prefixed(), None)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", CASES)
def test_the_returned_past_continues_the_text(name: str) -> None:
    model = prefixed(name)
    ids = paddle.to_tensor(IDS)
    with paddle.no_grad():
        first = model(ids[:, :3], use_cache=True)
    past = next(item for item in first if isinstance(item, (list, tuple)))
    first_position = P if CASES[name].positions_after_past else 0
    positions = paddle.arange(3, 5).expand([2, 2]) + first_position
    argument = CASES[name].argument
    found = run(
        model,
        IDS[:, 3:],
        attention_mask=paddle.ones([2, 5], dtype="int64"),
        position_ids=positions,
        **{argument: past},
    )
    np.testing.assert_allclose(found, run(model)[:, 3:], atol=3e-5)


def test_a_past_without_the_prefix_is_refused() -> None:
    short = tuple((paddle.ones([2, 2, 2, 8]),) * 2 for _ in range(LAYERS))
    with pytest.raises(PrefixInputError, match="fewer than the prefix's 3"):
        run(prefixed(), past_key_values=short)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("name", "projection"), [*((name, False) for name in CASES), ("llama", True), ("bloom", True)]
)
def test_only_the_prefix_learns(name: str, projection: bool) -> None:
    model = prefixed(name, prefix_projection=projection).train()
    before = {n: p.numpy().copy() for n, p in model.named_parameters()}
    optimizer = paddle.optimizer.AdamW(
        0.05, parameters=[p for p in model.parameters() if not p.stop_gradient]
    )
    losses = []
    for _ in range(20):
        loss = model(input_ids=paddle.to_tensor(IDS), labels=paddle.to_tensor(IDS))[0]
        loss.backward()
        optimizer.step()
        optimizer.clear_grad()
        losses.append(float(loss))
    assert losses[-1] < 0.85 * losses[0]
    for parameter, tensor in model.named_parameters():
        changed = np.abs(tensor.numpy() - before[parameter]).max() > 0
        assert changed == parameter.startswith("prefix_encoder."), parameter


def test_trainable_parameters_are_marked_and_printed(capsys: pytest.CaptureFixture[str]) -> None:
    model = prefixed()
    for parameter in model.parameters():
        parameter.stop_gradient = False
    model.mark_only_prefix_as_trainable()
    trained = [n for n, p in model.named_parameters() if not p.stop_gradient]
    assert trained == ["prefix_encoder.0.weight"]
    model.print_trainable_parameters()
    own = P * 2 * LAYERS * 16
    total = own + sum(p.size for p in model.model.parameters())
    text = capsys.readouterr().out
    assert f"Trainable parameters:{own:.2e}" in text
    assert f"Trainable:{own / total:.2%}" in text


def test_modes_return_the_model_and_dropout_acts_in_training_only() -> None:
    model = prefixed(prefix_dropout=0.5)
    calm = run(model)
    assert model.train() is model and model.prefix_encoder[1].training
    assert np.abs(run(model) - calm).max() > 0.05
    assert model.eval() is model and not model.model.training
    np.testing.assert_array_equal(run(model), calm)


def test_the_prefix_starts_in_the_model_s_mode() -> None:
    base = tiny("llama").train()
    model = PrefixModelForCausalLM(base, PrefixConfig(num_prefix_tokens=P, prefix_dropout=0.5))
    assert model.training and model.prefix_encoder[1].training
    model = PrefixModelForCausalLM(tiny("llama"), PrefixConfig(num_prefix_tokens=P))
    assert not model.training and not model.prefix_encoder[1].training


def test_a_deep_copy_is_independent() -> None:
    model = prefixed()
    before = run(model)
    twin = copy.deepcopy(model)
    np.testing.assert_array_equal(run(twin), before)
    fill(twin, seed=9)
    twin.model.llama.norm.weight.set_value(twin.model.llama.norm.weight * 2)
    assert np.abs(run(twin) - before).max() > 0.1
    np.testing.assert_array_equal(run(model), before)
    assert type(twin) is PrefixModelForCausalLM


def test_what_the_wrapper_has_not_the_model_has() -> None:
    model = prefixed()
    assert model.config is model.model.config
    assert model.lm_head is model.model.lm_head
    with pytest.raises(AttributeError, match="nonsense"):
        _ = model.nonsense


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_a_prefix_of_another_type_than_the_model(dtype: str) -> None:
    model = prefixed(dtype=dtype)
    assert str(model.prefix_encoder[0].weight.dtype) == f"paddle.{dtype}"
    plain = prefixed()
    rounded = model.prefix_encoder[0].weight.astype("float32")
    plain.prefix_encoder[0].weight.set_value(rounded)
    np.testing.assert_allclose(run(model), run(plain), atol=1e-5)


def test_states_load_under_both_names_all_or_nothing() -> None:
    model, other = prefixed(prefix_projection=True), prefixed(prefix_projection=True, seed=5)
    wanted = run(other)
    missing, unexpected = model.set_state_dict(other.prefix_encoder.state_dict())
    np.testing.assert_array_equal(run(model), wanted)
    assert unexpected == [] and all(name.startswith("model.") for name in missing)
    fresh = prefixed(prefix_projection=True, seed=6)
    arrays = {name: tensor.numpy() for name, tensor in other.state_dict().items()}
    assert fresh.set_state_dict(arrays) == ([], [])
    np.testing.assert_array_equal(run(fresh), wanted)
    state = dict(prefixed(prefix_projection=True, seed=7).prefix_encoder.state_dict())
    for change, text in (
        (lambda s: s.pop("3.bias"), "missing:\n  prefix_encoder.3.bias"),
        (lambda s: s.update({"5.weight": s["0.weight"]}), "no parameters of these names:\n  5.w"),
        (lambda s: s.update({"0.weight": s["0.weight"][:2]}), r"0.weight: \[2, 16\] given"),
    ):
        wrong = dict(state)
        change(wrong)
        with pytest.raises(AdapterError, match=text):
            fresh.set_state_dict(wrong)
        np.testing.assert_array_equal(run(fresh), wanted)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("masked", [True, False])
def test_a_static_graph_of_any_size(masked: bool) -> None:
    model = prefixed(prefix_projection=True)
    texts = [IDS, IDS[:1, :3], np.tile(IDS, (2, 2))]
    wanted = [run(model, text) for text in texts]
    spec = [paddle.static.InputSpec([None, None], "int64")] * (1 + masked)
    static = paddle.jit.to_static(model, input_spec=spec, full_graph=True)
    for text, expected in zip(texts, wanted, strict=True):
        inputs = [paddle.to_tensor(text), paddle.ones(text.shape, dtype="int64")]
        with paddle.no_grad():
            found = static(*inputs[: 1 + masked])
        found = found[0] if isinstance(found, (tuple, list)) else found
        np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)


def test_the_names_of_the_specification() -> None:
    assert PrefixModel is PrefixModelForCausalLM is peft_deploy.PrefixModel
    assert peft_deploy.PrefixModelForCausalLM is PrefixModelForCausalLM
    assert peft_deploy.PrefixConfig is PrefixConfig
    base = tiny("llama")
    model = PrefixModelForCausalLM(
        model=base,
        prefix_config=PrefixConfig(
            num_prefix_tokens=64 - 5,
            num_attention_heads=base.config.n_head,
            num_hidden_layers=base.config.n_layer,
            hidden_size=base.config.hidden_size,
            prefix_projection=False,
            prefix_projection_hidden_size=base.config.hidden_size,
        ),
    )
    model.mark_only_prefix_as_trainable()
    assert run(model).shape == (2, 5, 67)


def test_the_functions_that_arrange_a_past() -> None:
    past = paddle.to_tensor(np.arange(2 * P * 4 * 2 * 5).reshape(2, P, 4, 2, 5))
    axes = {"B": 0, "S": 1, "K": 2, "D": 3}
    for name, layout in {
        "llama": "BSKD",
        "qwen": "BSKD",
        "bloom": "BSKD",
        "chatglm": "SBKD",
        "mistral": "BKSD",
    }.items():
        pairs = getattr(package, f"{name}_postprocess_past_key_value")(past)
        assert len(pairs) == LAYERS
        for layer, (key, value) in enumerate(pairs):
            for found, index in ((key, layer), (value, layer + LAYERS)):
                wanted = past.numpy()[:, :, index].transpose([axes[letter] for letter in layout])
                np.testing.assert_array_equal(found.numpy(), wanted)
