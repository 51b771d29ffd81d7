from __future__ import annotations

import numpy as np
import pytest
import tiny_graph

from peft_deploy.errors import ConfigError, ExecutionError
from peft_deploy.runtime import (
    ArrayCaching,
    CachingRunner,
    GenerationOptions,
    GenerationRun,
    OnnxRunner,
    Sampling,
    generate,
)
from peft_deploy.signature import LOGITS, GraphSignature, TensorSpec

PROMPTS = [[5, 9, 77, 200, 31], [4, 8], [150, 33, 2, 61, 90, 17, 3], [250]]


class Recorder:
    """A runner that keeps what it was fed."""

    def __init__(self, runner: OnnxRunner) -> None:
        self.inner = runner
        self.signature = runner.signature
        self.calls: list[dict] = []

    def run(self, feeds, outputs=None):
        self.calls.append(feeds)
        return self.inner.run(feeds, outputs)


@pytest.fixture(scope="session")
def expected(weights: dict) -> list[list[int]]:
    """Twelve greedy tokens after each prompt, recomputed from the beginning each time."""
    tokens = [tiny_graph.reference_greedy(weights, ids, 12) for ids in PROMPTS]
    assert all(len(set(row)) > 8 for row in tokens)  # a loop that repeats itself proves little
    return tokens


def random_prefix(length: int, rows: int = 1) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(21)
    shape = (rows, tiny_graph.K, length, tiny_graph.D)
    names = [spec.name for spec in tiny_graph.signature().past]
    return {name: rng.normal(size=shape).astype(np.float32) for name in names}


def pairs_of(prefix: dict[str, np.ndarray], row: int = 0) -> list[tuple[np.ndarray, np.ndarray]]:
    arrays = [array[row] for array in prefix.values()]
    return list(zip(arrays[::2], arrays[1::2], strict=True))


@pytest.mark.parametrize("row", range(len(PROMPTS)))
def test_greedy_tokens_are_those_of_full_recomputation(
    runner: OnnxRunner, expected: list[list[int]], row: int
) -> None:
    (result,) = generate(runner, [PROMPTS[row]], GenerationOptions(max_new_tokens=12))
    assert list(result.token_ids) == expected[row]
    assert result.finish_reason == "length"
    assert result.prompt_tokens == len(PROMPTS[row])
    assert result.tokens_per_second is not None and result.tokens_per_second > 0
    assert result.prefill_seconds > 0


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("arrays", [False, True])
def test_a_padded_batch_gives_what_each_row_gives_alone(
    runner: OnnxRunner, expected: list[list[int]], padding: str, arrays: bool
) -> None:
    options = GenerationOptions(max_new_tokens=12, padding=padding, pad_id=7)
    steps: OnnxRunner | CachingRunner = ArrayCaching(runner) if arrays else runner
    results = generate(steps, PROMPTS, options)
    assert [list(result.token_ids) for result in results] == expected


@pytest.mark.parametrize("padding", ["left", "right"])
def test_what_is_fed_counts_only_real_tokens(runner: OnnxRunner, padding: str) -> None:
    recorder = Recorder(runner)
    prefix = random_prefix(2)
    options = GenerationOptions(max_new_tokens=3, padding=padding, pad_id=7)
    results = generate(recorder, [[10, 11, 12], [20]], options, prefix)
    prefill, first, second = recorder.calls
    left = padding == "left"
    assert prefill["input_ids"].tolist() == [[10, 11, 12], [7, 7, 20] if left else [20, 7, 7]]
    assert prefill["position_ids"].tolist() == [[0, 1, 2], [0, 0, 0]]
    short = [0, 0, 1] if left else [1, 0, 0]
    assert prefill["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, *short]]
    assert first["position_ids"].tolist() == [[3], [1]]
    assert first["attention_mask"].tolist() == [[1] * 6, [1, 1, *short, 1]]
    assert second["position_ids"].tolist() == [[4], [2]]
    assert second["input_ids"].tolist() == [[result.token_ids[1]] for result in results]
    assert first["past_key_values.0.key"].shape[2] == 2 + 3
    assert second["past_key_values.0.key"].shape[2] == 2 + 4


def test_prompts_are_computed_once(runner: OnnxRunner) -> None:
    recorder = Recorder(runner)
    generate(recorder, PROMPTS, GenerationOptions(max_new_tokens=5))
    widths = [call["input_ids"].shape[1] for call in recorder.calls]
    assert widths == [7, 1, 1, 1, 1]


@pytest.mark.parametrize("padding", ["left", "right"])
def test_a_row_stops_at_an_end_token_and_the_others_go_on(
    runner: OnnxRunner, expected: list[list[int]], padding: str
) -> None:
    stop = expected[1][4]
    at = [row.index(stop) if stop in row else None for row in expected]
    assert at[1] is not None and None in at  # one row stops early, another never does
    options = GenerationOptions(max_new_tokens=12, stop_ids=(999, stop), padding=padding)
    results = generate(runner, PROMPTS, options)
    for result, tokens, end in zip(results, expected, at, strict=True):
        assert list(result.token_ids) == (tokens if end is None else tokens[: end + 1])
        assert result.finish_reason == ("length" if end is None else "stop")


def test_a_row_that_has_ended_is_fed_padding_that_nobody_sees(
    runner: OnnxRunner, expected: list[list[int]]
) -> None:
    recorder = Recorder(runner)
    options = GenerationOptions(max_new_tokens=4, stop_ids=(expected[1][0],), pad_id=7)
    generate(recorder, PROMPTS[:2], options)
    last = recorder.calls[-1]
    assert last["input_ids"][1].tolist() == [7]
    assert last["position_ids"][1].tolist() == [0]
    assert last["attention_mask"][1, -3:].tolist() == [0, 0, 0]
    assert last["attention_mask"][0, -3:].tolist() == [1, 1, 1]


def test_no_step_is_computed_after_the_last_row_has_ended(
    runner: OnnxRunner, expected: list[list[int]]
) -> None:
    recorder = Recorder(runner)
    stops = (expected[0][2], expected[1][2])
    generate(recorder, PROMPTS[:2], GenerationOptions(max_new_tokens=12, stop_ids=stops))
    assert len(recorder.calls) == 3


def test_tokens_come_as_they_are_made(runner: OnnxRunner, expected: list[list[int]]) -> None:
    recorder = Recorder(runner)
    run = GenerationRun(recorder, PROMPTS[:2], GenerationOptions(max_new_tokens=3))
    assert not recorder.calls
    events = []
    for event in run:
        events.append((event.row, event.token, event.finish_reason))
        assert len(recorder.calls) == (len(events) + 1) // 2
    assert events == [
        (row, expected[row][step], "length" if step == 2 else None)
        for step in range(3)
        for row in range(2)
    ]
    assert [list(result.token_ids) for result in run.results] == [r[:3] for r in expected[:2]]


@pytest.mark.parametrize("padding", ["left", "right"])
def test_a_prefix_is_seen_by_every_row_and_shifts_no_position(
    runner: OnnxRunner, weights: dict, expected: list[list[int]], padding: str
) -> None:
    prefix = random_prefix(3)
    with_prefix = [
        tiny_graph.reference_greedy(weights, ids, 8, pairs_of(prefix)) for ids in PROMPTS
    ]
    assert all(a != b[:8] for a, b in zip(with_prefix, expected, strict=True))
    options = GenerationOptions(max_new_tokens=8, padding=padding)
    results = generate(runner, PROMPTS, options, prefix)
    assert [list(result.token_ids) for result in results] == with_prefix


def test_each_row_can_have_a_prefix_of_its_own(runner: OnnxRunner, weights: dict) -> None:
    prefix = random_prefix(2, rows=2)
    results = generate(runner, PROMPTS[:2], GenerationOptions(max_new_tokens=6), prefix)
    for row in range(2):
        tokens = tiny_graph.reference_greedy(weights, PROMPTS[row], 6, pairs_of(prefix, row))
        assert list(results[row].token_ids) == tokens


def test_a_prefix_that_does_not_fit_is_refused(runner: OnnxRunner) -> None:
    options = GenerationOptions(max_new_tokens=2)
    prefix = random_prefix(2)
    missing = dict(list(prefix.items())[1:])
    with pytest.raises(ExecutionError, match=r"these differ:\n  past_key_values\.0\.key"):
        generate(runner, PROMPTS, options, missing)
    with pytest.raises(ExecutionError, match=r"must be \[1, 2, length, 8\]"):
        generate(runner, PROMPTS, options, random_prefix(2, rows=3))
    flat = {name: array[0] for name, array in prefix.items()}
    with pytest.raises(ExecutionError, match=r"shape \[2, 2, 8\]"):
        generate(runner, PROMPTS, options, flat)
    heads = {name: array[:, :1] for name, array in prefix.items()}
    with pytest.raises(ExecutionError, match=r"shape \[1, 1, 2, 8\].*must be \[1, 2, length, 8\]"):
        generate(runner, PROMPTS, options, heads)
    uneven = {**prefix, "past_key_values.1.value": prefix["past_key_values.1.value"][:, :, :1]}
    with pytest.raises(ExecutionError, match=r"1 tokens long; .* is 2"):
        generate(runner, PROMPTS, options, uneven)
    double = {name: array.astype(np.float64) for name, array in prefix.items()}
    with pytest.raises(ExecutionError, match="float64; it must be float32"):
        generate(runner, PROMPTS, options, double)


def test_sampling_repeats_with_its_seed_and_not_without(runner: OnnxRunner) -> None:
    def tokens(seed: int | None, prompts: list[list[int]]) -> list[tuple[int, ...]]:
        sampling = Sampling(temperature=1.5, seed=seed)
        options = GenerationOptions(max_new_tokens=10, sampling=sampling)
        return [result.token_ids for result in generate(runner, prompts, options)]

    assert tokens(1, PROMPTS) == tokens(1, PROMPTS)
    assert tokens(1, PROMPTS)[0] == tokens(1, PROMPTS[:1])[0]
    assert tokens(1, PROMPTS) != tokens(2, PROMPTS)
    assert tokens(None, PROMPTS) != tokens(None, PROMPTS)


def test_top_k_of_one_is_greedy(runner: OnnxRunner, expected: list[list[int]]) -> None:
    sampling = Sampling(temperature=3.0, top_k=1)
    options = GenerationOptions(max_new_tokens=12, sampling=sampling)
    results = generate(runner, PROMPTS, options)
    assert [list(result.token_ids) for result in results] == expected


def test_rows_end_where_the_model_can_see_no_more(
    runner: OnnxRunner, expected: list[list[int]]
) -> None:
    options = GenerationOptions(max_new_tokens=10, context_length=9)
    results = generate(runner, PROMPTS[:3], options)
    assert [result.finish_reason for result in results] == ["context", "context", "context"]
    assert [list(result.token_ids) for result in results] == [
        expected[0][:4],
        expected[1][:7],
        expected[2][:2],
    ]


def test_the_whole_context_can_be_used(runner: OnnxRunner, weights: dict) -> None:
    limit = tiny_graph.MAX_POSITIONS
    options = GenerationOptions(max_new_tokens=limit, context_length=limit)
    (result,) = generate(runner, [PROMPTS[0]], options)
    assert len(result.token_ids) == limit - len(PROMPTS[0])
    ids = [*PROMPTS[0], *result.token_ids[:-1]]
    logits = tiny_graph.reference_logits(weights, ids)
    assert int(logits[-1].argmax()) == result.token_ids[-1]


def test_a_prompt_that_leaves_no_room_is_refused(runner: OnnxRunner) -> None:
    options = GenerationOptions(context_length=5)
    with pytest.raises(ConfigError, match="prompt 0 has 5 tokens; the model can see 5"):
        generate(runner, PROMPTS[:2], options)


def test_prompts_that_cannot_be_fed(runner: OnnxRunner) -> None:
    with pytest.raises(ConfigError, match="row 1 of the batch has no tokens"):
        generate(runner, [[3], []], GenerationOptions())
    with pytest.raises(ExecutionError, match="input_ids holds the negative value -4"):
        generate(runner, [[3, -4]], GenerationOptions())
    with pytest.raises(ConfigError, match="at least one row"):
        generate(runner, [], GenerationOptions())
    with pytest.raises(ConfigError, match="max_new_tokens is 0"):
        GenerationOptions(max_new_tokens=0)
    with pytest.raises(ConfigError, match="'middle' is neither"):
        generate(runner, [[3]], GenerationOptions(padding="middle"))  # type: ignore[arg-type]


def test_a_graph_without_a_cache_cannot_generate() -> None:
    class Encoder:
        signature = GraphSignature(
            (TensorSpec("input_ids", "int64", ("batch", "sequence")),),
            (TensorSpec(LOGITS, "float32", ("batch", 2)),),
        )

        def run(self, feeds, outputs=None):
            raise AssertionError("must not be reached")

    with pytest.raises(ExecutionError, match="no past_key_values inputs"):
        generate(Encoder(), [[1]], GenerationOptions())
