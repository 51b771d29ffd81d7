"""A prefix on PaddleNLP's RW, whose class gets a past wrong that it has not computed itself."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import paddle
import pytest
from adapters_tiny import fill_branches
from numpy_falcon import falcon
from paddle import nn
from paddlenlp import transformers
from prefix_tiny import CASES, IDS, LAYERS, P, given_past, prefix_rows, prefixed, run, tiny

from peft_deploy.adapters.lora import LoRAModel
from peft_deploy.adapters.prefix import (
    PrefixConfig,
    PrefixModelForCausalLM,
    UnsupportedPrefixModelError,
)
from peft_deploy.config import LoRAConfig
from peft_deploy.errors import ExecutionError

NAMES = [name for name, case in CASES.items() if case.model == "RW"]
ROTARY = [name for name in NAMES if "alibi" not in name]
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def by_hand(model: Any, ids: np.ndarray = IDS, first: int = 0) -> np.ndarray:
    weights = {
        name.removeprefix("model.").removeprefix("transformer."): tensor.numpy().astype(np.float64)
        for name, tensor in model.model.state_dict().items()
    }
    rows = prefix_rows(model)
    return np.stack([falcon(weights, model.config, row, rows, first) for row in ids])


@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_the_prefix_is_what_stands_before_the_text_in_every_layer(
    name: str, projection: bool
) -> None:
    base = tiny(name)
    before = run(base)
    model = prefixed(base=base, prefix_projection=projection)
    wanted = by_hand(model)
    assert np.abs(wanted - before).max() > 0.1
    np.testing.assert_allclose(run(model), wanted, atol=3e-5)
    np.testing.assert_array_equal(run(base), before)


@pytest.mark.parametrize("heads", [2, 16])
def test_slopes_that_bfloat16_rounds(heads: int) -> None:
    options = {"alibi": True, "n_head": heads}
    model = prefixed(base=tiny("rw-alibi", **options))
    np.testing.assert_allclose(run(model), by_hand(model), atol=3e-5)


@pytest.mark.parametrize("name", NAMES)
def test_by_itself_the_class_fails_or_is_wrong(name: str) -> None:
    """Why it is put right: with a newer PaddleNLP that may not be needed any more."""
    model = prefixed(name)
    ((_, past),) = given_past(name, prefix_rows(model), len(IDS)).items()
    flat = [tuple(t.reshape([-1, P, t.shape[-1]]) for t in pair) for pair in past]
    with pytest.raises(ValueError, match=r"(?i)broadcast"):
        run(model.model, past_key_values=flat, attention_mask=paddle.ones([2, P + 5]))


@pytest.mark.parametrize("name", ROTARY)
def test_positions_that_are_given(name: str) -> None:
    model = prefixed(name)
    wanted, positions = run(model), np.arange(5)[None].repeat(2, 0)
    np.testing.assert_array_equal(run(model, position_ids=paddle.to_tensor(positions)), wanted)
    moved = run(model, position_ids=paddle.to_tensor(positions + 7))
    assert np.abs(moved - wanted).max() > 1e-2
    np.testing.assert_allclose(moved, by_hand(model, first=7), atol=3e-5)


@pytest.mark.parametrize("name", ROTARY)
def test_generation_takes_positions(name: str) -> None:
    model = prefixed(name)
    positions = paddle.arange(7, 12).expand([2, 5])
    options = {"decode_strategy": "greedy_search", "eos_token_id": 1000, "pad_token_id": 0}
    ids = paddle.to_tensor(IDS)
    found = model.generate(ids, position_ids=positions, max_length=3, **options)[0].numpy()
    text = IDS
    for _ in range(3):
        best = by_hand(model, text, first=7)[:, -1].argmax(-1)
        text = np.concatenate([text, best[:, None]], axis=1)
    np.testing.assert_array_equal(found, text[:, 5:])
    assert not np.array_equal(found, model.generate(ids, max_length=3, **options)[0].numpy())


def test_generation_sees_every_token_once() -> None:
    """PaddleNLP's own prepares every step over the whole text, and never hands the cache on."""
    model, lengths = prefixed("rw"), []
    table = model.model.transformer.word_embeddings
    table.register_forward_pre_hook(lambda _, inputs: lengths.append(inputs[0].shape[1]))
    calls: list[Any] = []
    model.model.register_forward_post_hook(lambda *_: calls.append(None))
    model.generate(
        paddle.to_tensor(IDS),
        max_length=4,
        decode_strategy="greedy_search",
        eos_token_id=1000,
        pad_token_id=0,
    )
    assert lengths == [5, 1, 1, 1]
    assert len(calls) == 4  # hooks of the model run once a step


@pytest.mark.parametrize("name", NAMES)
def test_padding_before_a_text_that_goes_on_behind_its_cache(name: str) -> None:
    """Positions come from the mask of all tokens, the cached ones too."""
    model = prefixed(name)
    padded = np.concatenate([np.full((2, 2), 11), IDS], axis=1)
    mask = paddle.to_tensor([[0, 0, 1, 1, 1, 1, 1]] * 2)
    ids = paddle.to_tensor(padded)
    with paddle.no_grad():
        first = model(ids[:, :4], attention_mask=mask[:, :4], use_cache=True)
    found = run(model, padded[:, 4:], attention_mask=mask, past_key_values=first[1])
    np.testing.assert_allclose(found, by_hand(model)[:, 2:], atol=3e-5)


def test_the_cache_has_an_axis_for_the_batch() -> None:
    model = prefixed("rw-sequential")
    with paddle.no_grad():
        logits, cache = model(paddle.to_tensor(IDS), use_cache=True)
        named = model(paddle.to_tensor(IDS), use_cache=True, return_dict=True)
        (alone,) = model(paddle.to_tensor(IDS), use_cache=False)
    assert [t.shape for pair in cache for t in pair] == [[2, 4, P + 5, 8]] * (2 * LAYERS)
    rows = np.stack([np.stack([t.numpy()[:, :, :P] for t in pair], 1) for pair in cache])
    np.testing.assert_array_equal(rows[:, 0], prefix_rows(model).astype(np.float32))
    np.testing.assert_array_equal(named.logits.numpy(), logits.numpy())
    np.testing.assert_array_equal(named.past_key_values[1][0].numpy(), cache[1][0].numpy())
    np.testing.assert_array_equal(alone.numpy(), logits.numpy())


def test_tables_of_the_model_stay_its_own() -> None:
    """PaddleNLP keeps rotations for one length, and takes them again where the length is the same."""
    model, longer = prefixed("rw"), np.concatenate([IDS, IDS], axis=1)
    wanted, plain = by_hand(model, longer), run(tiny("rw"), longer)
    np.testing.assert_array_equal(run(model.model, longer), plain)
    run(model)
    np.testing.assert_allclose(run(model, longer), wanted, atol=3e-5)
    np.testing.assert_array_equal(run(model.model, longer), plain)


def test_two_threads_on_one_model() -> None:
    base = tiny("rw")
    models = [prefixed(base=base, seed=seed) for seed in (1, 2)]
    wanted = [run(model, IDS[:, : 3 + i]) for i, model in enumerate(models)]
    found: list[list[np.ndarray]] = [[], []]

    def work(which: int) -> None:
        for _ in range(10):
            found[which].append(run(models[which], IDS[:, : 3 + which]))

    threads = [threading.Thread(target=work, args=(which,)) for which in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for which, results in enumerate(found):
        assert len(results) == 10
        for result in results:
            np.testing.assert_array_equal(result, wanted[which])


@pytest.mark.parametrize("name", NAMES)
def test_lora_and_prefix(name: str) -> None:
    lora = LoRAModel(tiny(name), LoRAConfig(r=2, lora_alpha=4, target_modules=[".*dense.*"]))
    fill_branches(lora)
    model = prefixed(base=lora.eval())
    without, found = by_hand(model), run(model)
    lora.merge()
    np.testing.assert_allclose(found, by_hand(model), atol=1e-4)
    assert np.abs(found - without).max() > 0.1
    np.testing.assert_allclose(run(model), found, atol=1e-4)


class Around(nn.Layer):
    """Runs a model that is not among its layers; there is another one."""

    def __init__(self, model: Any, shown: Any) -> None:
        super().__init__()
        self.hidden, self.shown, self.config = [model], shown, model.config

    def forward(self, input_ids: Any = None, past_key_values: Any = None, **rest: Any) -> Any:
        return self.hidden[0](input_ids, past_key_values, **rest)


def test_a_model_that_cannot_be_put_right_is_an_error() -> None:
    model = prefixed(base=Around(tiny("rw"), tiny("rw", seed=1)))
    one = paddle.to_tensor(IDS[:, :1])
    with pytest.raises(ExecutionError, match="Around runs other layers than those it names"):
        model(one)


def test_its_rule_is_not_that_of_others_whose_parameters_begin_alike() -> None:
    config = transformers.GPTJConfig(n_embd=16, n_layer=1, n_head=2, rotary_dim=4, vocab_size=11)
    model = transformers.GPTJForCausalLM(config)
    assert model.base_model_prefix == tiny("rw").base_model_prefix
    with pytest.raises(UnsupportedPrefixModelError, match="GPTJForCausalLM takes a past is not"):
        PrefixModelForCausalLM(model, PrefixConfig(num_prefix_tokens=P))
