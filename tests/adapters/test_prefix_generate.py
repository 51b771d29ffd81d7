"""Generation behind a prefix: the same tokens as running the whole text again for each, and a
model that is none the wiser.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import paddle
import pytest
from prefix_tiny import CASES, IDS, MAX_POSITIONS, P, prefixed, run, tiny

from peft_deploy.adapters.prefix import PrefixInputError, UnsupportedPrefixModelError

NEW = 6
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
NO_END = {"eos_token_id": 1000, "pad_token_id": 0}  # a token that the models do not have


def generate(model: Any, ids: np.ndarray = IDS, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    """The tokens, and of each row the mean of their logits."""
    given = {"max_length": NEW, "decode_strategy": "greedy_search", **NO_END, **options}
    found, scores = model.generate(input_ids=paddle.to_tensor(ids), **given)
    return found.numpy(), scores.numpy()


def tokens(model: Any, ids: np.ndarray = IDS, **options: Any) -> np.ndarray:
    return generate(model, ids, **options)[0]


def step_by_step(model: Any, ids: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
    """Greedy, without a cache: every step is a run over the whole text."""
    text, found = ids, []
    for _ in range(NEW):
        inputs = {}
        if mask is not None:
            grown = np.concatenate([mask, np.ones((len(ids), len(found)), np.int64)], axis=1)
            inputs["attention_mask"] = paddle.to_tensor(grown)
        found.append(run(model, text, **inputs)[:, -1].argmax(-1))
        text = np.concatenate([text, found[-1][:, None]], axis=1)
    return np.stack(found, axis=1)


def attributes(model: Any) -> dict[int, dict[str, Any]]:
    """All but what OPT notes down in every run: the names of its layers' outputs."""
    return {
        id(layer): {name: value for name, value in vars(layer).items() if name != "checkpoints"}
        for layer in model.sublayers(include_self=True)
    }


@pytest.mark.parametrize("given", ["no mask", "mask"])
@pytest.mark.parametrize("name", CASES)
def test_greedy_tokens_are_those_of_forward(name: str, given: str) -> None:
    model = prefixed(name)
    wanted = step_by_step(model, IDS)
    assert not np.array_equal(wanted, step_by_step(model.model, IDS))
    options = {} if given == "no mask" else {"attention_mask": paddle.ones([2, 5], dtype="int64")}
    found = tokens(model, **options)
    assert found.shape == (2, NEW)
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("given", ["no mask", "mask"])
@pytest.mark.parametrize("name", CASES)
def test_padded_prompts(name: str, given: str) -> None:
    model = prefixed(name)
    padded = np.concatenate([np.zeros((2, 2), np.int64), IDS], axis=1)
    padded[1, :3] = 0  # one row is shorter still
    mask = (padded != 0).astype(np.int64)
    wanted = step_by_step(model, padded, mask)
    assert not np.array_equal(wanted, step_by_step(model, padded))
    options = {} if given == "no mask" else {"attention_mask": paddle.to_tensor(mask)}
    np.testing.assert_array_equal(tokens(model, padded, **options), wanted)


@pytest.mark.parametrize("name", ["llama", "mistral", "chatglm_v2"])
def test_positions_of_one_s_own(name: str) -> None:
    """Also where they do not change the token: they change its logit."""
    model = prefixed(name)
    positions = paddle.to_tensor([[7, 30, 9, 41, 20]]).expand([2, 5])
    first, scores = generate(model, position_ids=positions, max_length=1)
    logits = run(model, position_ids=positions)[:, -1]
    np.testing.assert_array_equal(first[:, 0], logits.argmax(-1))
    np.testing.assert_allclose(scores[:, 0], logits.max(-1), atol=1e-4)
    usual = run(model)[:, -1]
    assert (np.abs(usual - logits).max(-1) > 1e-2).all()
    assert (np.abs(usual.max(-1) - scores[:, 0]) > 1e-3).all()


@pytest.mark.parametrize("name", ["llama", "bloom", "chatglm_v2"])
def test_sampling(name: str) -> None:
    model = prefixed(name)
    options = {"decode_strategy": "sampling", "top_k": 5, "temperature": 3.0}
    paddle.seed(3)
    first = tokens(model, **options)
    paddle.seed(3)
    np.testing.assert_array_equal(tokens(model, **options), first)
    best = np.argsort(-run(model)[:, -1], axis=-1)[:, :5]
    assert all(row[0] in allowed for row, allowed in zip(first, best, strict=True))
    drawn = np.stack([tokens(model, **options) for _ in range(3)])
    assert (drawn != tokens(model)).any()


def beam_by_hand(model: Any, ids: np.ndarray, beams: int, steps: int) -> list[int]:
    """The best continuation of one prompt among those that a beam search keeps."""
    kept: list[tuple[float, list[int]]] = [(0.0, [])]
    for _ in range(steps):
        grown = []
        for score, new in kept:
            text = np.concatenate([ids, np.array([new], np.int64).reshape(1, -1)], axis=1)
            logits = run(model, text)[0, -1].astype(np.float64)
            logp = logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max()
            grown += [(score + logp[t], [*new, int(t)]) for t in np.argsort(-logp)[: 2 * beams]]
        kept = sorted(grown, reverse=True)[:beams]
    return kept[0][1]


@pytest.mark.parametrize("name", CASES)
def test_beam_search(name: str) -> None:
    """Rows of the past change places: also where the batch is not its first axis."""
    model = prefixed(name)
    found = tokens(model, decode_strategy="beam_search", num_beams=3, length_penalty=0.0)
    wanted = [beam_by_hand(model, IDS[i : i + 1], 3, NEW) for i in range(2)]
    assert found.tolist() == wanted


def test_without_a_cache_the_tokens_are_the_same() -> None:
    model = prefixed()
    np.testing.assert_array_equal(tokens(model, use_cache=False), tokens(model))


def test_positional_tokens_and_scores() -> None:
    model = prefixed()
    ids, scores = model.generate(
        paddle.to_tensor(IDS), max_length=NEW, decode_strategy="greedy_search", **NO_END
    )
    assert ids.shape == [2, NEW] and scores.shape == [2, 1]


@pytest.mark.parametrize(
    ("name", "strategy"),
    [(name, "greedy_search") for name in CASES]
    + [(name, way) for name in ("llama", "chatglm_v2") for way in ("sampling", "beam_search")],
)
def test_the_model_is_as_it_was(name: str, strategy: str) -> None:
    model = prefixed(name)
    run(model.model)  # makes what a layer makes in its first run
    before, logits, plain = attributes(model), run(model), run(model.model)
    beams = {"num_beams": 2} if strategy == "beam_search" else {}
    tokens(model, decode_strategy=strategy, **beams)
    _same_attributes(model, before, name)
    np.testing.assert_array_equal(run(model), logits)
    np.testing.assert_array_equal(run(model.model), plain)


class Stumble:
    """A listener that fails at the second token."""

    def __init__(self) -> None:
        self.heard = 0

    def put(self, new: Any) -> None:
        self.heard += 1
        if self.heard == 3:  # the prompt comes first
            raise RuntimeError("stumbled")

    def end(self) -> None:
        raise AssertionError("it should not have come so far")


@pytest.mark.parametrize("name", ["llama", "bloom", "chatglm_v2"])
def test_an_error_leaves_no_trace(name: str) -> None:
    """With the reference, the base model keeps its prefix after an exception."""
    model = prefixed(name)
    own = tokens(model.model, attention_mask=paddle.ones([2, 5], dtype="int64"))
    before, plain = attributes(model), run(model.model)
    with pytest.raises(RuntimeError, match="stumbled"):
        tokens(model, streamer=Stumble())
    _same_attributes(model, before, name)
    np.testing.assert_array_equal(run(model.model), plain)
    again = tokens(model.model, attention_mask=paddle.ones([2, 5], dtype="int64"))
    np.testing.assert_array_equal(again, own)


def test_two_threads_and_two_prefixes_on_one_model() -> None:
    base = tiny("llama")
    models = [prefixed(base=base, seed=seed) for seed in (1, 2)]
    prompts = [IDS, IDS[::-1]]
    wanted = [tokens(model, ids) for model, ids in zip(models, prompts, strict=True)]
    plain = tokens(base, attention_mask=paddle.ones([2, 5], dtype="int64"))
    assert not np.array_equal(wanted[0], wanted[1][::-1])
    found: dict[int, list[np.ndarray]] = {0: [], 1: [], 2: []}

    def work(which: int) -> None:
        for _ in range(4):
            if which == 2:
                mask = {"attention_mask": paddle.ones([2, 5], dtype="int64")}
                found[2].append(tokens(base, **mask))
            else:
                found[which].append(tokens(models[which], prompts[which]))

    threads = [threading.Thread(target=work, args=(which,)) for which in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for which, expected in enumerate([*wanted, plain]):
        assert len(found[which]) == 4
        for result in found[which]:
            np.testing.assert_array_equal(result, expected)


def test_a_text_that_outgrows_the_model() -> None:
    long = np.resize(IDS, (1, MAX_POSITIONS - P - 2))
    assert tokens(prefixed(), long, max_length=3).shape == (1, 3)
    with pytest.raises(PrefixInputError, match="make 65; the model has 64"):
        tokens(prefixed(), long, max_length=4)


def test_inputs_that_generate_refuses() -> None:
    model = prefixed()
    with pytest.raises(ValueError, match="input_ids must be provided"):
        model.generate(max_length=2)
    with pytest.raises(PrefixInputError, match="not inputs_embeds"):
        tokens(model, inputs_embeds=paddle.ones([2, 5, 32]))
    with pytest.raises(PrefixInputError, match="only 0 and 1 have a meaning"):
        tokens(model, attention_mask=paddle.full([2, 5], -1e4))
    model.model = paddle.nn.Linear(2, 2)
    with pytest.raises(UnsupportedPrefixModelError, match="a Linear cannot generate"):
        tokens(model)


def _same_attributes(model: Any, before: dict[int, dict[str, Any]], name: str) -> None:
    """Nothing new and nothing replaced, but for tables that a layer's own forward grows."""
    after = attributes(model)
    assert before.keys() == after.keys()
    grown = (
        {"_seq_len_cached", "cos_cached", "sin_cached", "inv_freq"} if name == "qwen" else set()
    )
    for key, attrs in before.items():
        assert after[key].keys() == attrs.keys()
        for attribute, value in attrs.items():
            if attribute in grown:
                continue
            assert after[key][attribute] is value or after[key][attribute] == value, attribute
