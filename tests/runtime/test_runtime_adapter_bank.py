"""Rows of a batch that each use an adapter of their own, against the same weights merged in numpy."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import tiny_graph
import tiny_slots
from click.testing import CliRunner
from tiny_slots import VERSION, Arrays, everywhere, make_adapter, merged

from peft_deploy.adapters.formats.onnx_file import write_onnx_adapter
from peft_deploy.cli import cli
from peft_deploy.cli.generate import generate_command
from peft_deploy.convert.linears import NO_GROUPS
from peft_deploy.errors import AdapterError, BundleError, ConfigError, ExecutionError
from peft_deploy.runtime import GenerationOptions, GenerationRun, OnnxRunner, Session, load_bundle
from peft_deploy.signature import ADAPTER_IDS

CAPACITY = 4
NAMES = ("wide", "attention", "feed_forward")
PROMPTS = [[5, 9, 77, 200, 31], [8, 40], [3, 3, 90, 12, 7, 11], [61, 2, 8]]
ROWS: list[str | None] = ["feed_forward", None, "wide", "attention"]
STEPS = 12


@pytest.fixture(scope="module", params=[NO_GROUPS, tiny_slots.GROUPS], ids=["apart", "joint"])
def banked(
    request: pytest.FixtureRequest, bundle: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Every layer with an A of its own, or q, k and v with one."""
    folder = tmp_path_factory.mktemp("bank") / "bundle"
    return tiny_slots.add_slots(bundle, folder, bank=CAPACITY, groups=request.param)


@pytest.fixture(scope="module")
def adapters(weights: Arrays) -> dict[str, Arrays]:
    """Of ranks 6, 2 to 7, and 1 to 5; only the first one changes every layer."""
    return {
        "wide": make_adapter(weights, everywhere(6), seed=1),
        "attention": make_adapter(weights, {"0.q": 3, "0.v": 7, "1.q": 2}, seed=2),
        "feed_forward": make_adapter(weights, {"0.up": 5, "1.down": 1}, seed=3),
    }


@pytest.fixture(scope="module")
def files(
    adapters: dict[str, Arrays], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return {
        name: write_onnx_adapter(folder / f"{name}.onnx_adapter", tensors, VERSION)
        for name, tensors in adapters.items()
    }


@pytest.fixture
def session(banked: Path, files: dict[str, Path]) -> Session:
    session = Session(banked, threads=1)
    for name in NAMES:
        session.load_adapter(files[name])
    return session


@pytest.fixture(scope="module")
def greedy(weights: Arrays, adapters: dict[str, Arrays]) -> dict[str | None, list[int]]:
    """What each of the four rows has to say: its prompt continued by its own merged weights."""
    return {
        name: tiny_graph.reference_greedy(_weights(weights, adapters, name), prompt, STEPS)
        for name, prompt in zip(ROWS, PROMPTS, strict=True)
    }


def _weights(weights: Arrays, adapters: dict[str, Arrays], name: str | None) -> Arrays:
    return merged(weights, [] if name is None else [adapters[name]])


def feeds(ids: Sequence[int], rows: int) -> dict[str, np.ndarray]:
    return {
        "input_ids": np.tile(np.array(ids, np.int64), (rows, 1)),
        "attention_mask": np.ones((rows, len(ids)), np.int64),
        "position_ids": np.tile(np.arange(len(ids)), (rows, 1)),
    }


def logits(session: Session, rows: int = 1, **options: object) -> np.ndarray:
    found = session.run(feeds(PROMPTS[0], rows), ["logits"], **options)  # type: ignore[arg-type]
    return found["logits"]


def test_four_rows_are_four_merged_models(
    session: Session, weights: Arrays, adapters: dict[str, Arrays]
) -> None:
    found = logits(session, 4, adapters=ROWS)
    for row, name in zip(found, ROWS, strict=True):
        want = tiny_graph.reference_logits(dict(_weights(weights, adapters, name)), PROMPTS[0])
        np.testing.assert_allclose(row, want, atol=1e-5 * np.abs(want).max())
    sizes = np.abs(found - found[1]).max(axis=(1, 2))
    assert sizes[1] == 0 and (np.delete(sizes, 1) > 1).all()


@pytest.mark.parametrize("padding", ["left", "right"])
def test_generation_row_by_row(
    padding: str, session: Session, greedy: dict[str | None, list[int]]
) -> None:
    options = GenerationOptions(max_new_tokens=STEPS, padding=padding)  # type: ignore[arg-type]
    results = session.generate(PROMPTS, options, adapters=ROWS)
    assert [list(r.token_ids) for r in results] == list(greedy.values())
    for name, prompt in zip(ROWS, PROMPTS, strict=True):
        (alone,) = session.generate([prompt], options, adapter=name)
        assert list(alone.token_ids) == greedy[name]


def test_off_is_the_graph_without_a_bank_to_the_bit(session: Session, runner: OnnxRunner) -> None:
    cache = {
        spec.name: np.zeros((2, tiny_graph.K, 0, tiny_graph.D), np.float32)
        for spec in runner.signature.past
    }
    want = runner.run({**feeds(PROMPTS[0], 2), **cache})["logits"]
    np.testing.assert_array_equal(logits(session, 2), want)
    np.testing.assert_array_equal(logits(session, 2, adapters=[None, None]), want)
    assert np.abs(logits(session, 2, adapter="wide") - want).max() > 1
    np.testing.assert_array_equal(logits(session, 2), want)


def test_a_scale_is_for_every_row(
    session: Session, weights: Arrays, adapters: dict[str, Arrays]
) -> None:
    found = logits(session, 2, adapters=["wide", None], scale=0.5)
    for row, change in zip(found, ([adapters["wide"]], []), strict=True):
        want = tiny_graph.reference_logits(merged(weights, change, 0.5), PROMPTS[0])
        np.testing.assert_allclose(row, want, atol=1e-5 * np.abs(want).max())
    with pytest.raises(AdapterError, match="is too large for float32"):
        session.runner(adapters=["wide"], scale=1e39)


def test_requests_under_way_keep_the_bank_that_they_began_with(
    session: Session, files: dict[str, Path], greedy: dict[str | None, list[int]]
) -> None:
    """The first adapter goes, so that the others' ids move, and another one takes its name."""
    run = GenerationRun(
        session.runner(adapters=ROWS), PROMPTS, GenerationOptions(max_new_tokens=STEPS)
    )
    events = iter(run)
    for _ in range(6):
        next(events)
    session.unload_adapter("wide")
    session.load_adapter(files["attention"], "wide")
    assert session.adapters == ("attention", "feed_forward", "wide")
    assert [list(r.token_ids) for r in run.results] == list(greedy.values())
    options = GenerationOptions(max_new_tokens=STEPS)
    later = session.generate(PROMPTS, options, adapters=["feed_forward", None, None, "wide"])
    assert list(later[3].token_ids) == greedy["attention"]
    assert list(later[0].token_ids) == greedy["feed_forward"]
    assert list(later[2].token_ids) != greedy["wide"]


def test_adapters_come_and_go_beside_requests(
    session: Session, files: dict[str, Path], greedy: dict[str | None, list[int]]
) -> None:
    options, wrong = GenerationOptions(max_new_tokens=STEPS), list[str]()

    def ask() -> None:
        for _ in range(10):
            results = session.generate(PROMPTS, options, adapters=ROWS)
            if [list(r.token_ids) for r in results] != list(greedy.values()):
                wrong.append("other tokens")

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    for _ in range(15):
        session.load_adapter(files["wide"], "fourth")
        session.unload_adapter("fourth")
    for thread in threads:
        thread.join()
    assert wrong == []


def test_all_rows_begin_behind_one_prefix(session: Session) -> None:
    rng = np.random.default_rng(8)
    prefix = {
        spec.name: rng.normal(size=(1, tiny_graph.K, 3, tiny_graph.D)).astype(np.float32)
        for spec in session.signature.past
    }
    options = GenerationOptions(max_new_tokens=STEPS)
    results = session.generate(PROMPTS, options, adapters=ROWS, prefix=prefix)
    for name, prompt, result in zip(ROWS, PROMPTS, results, strict=True):
        (alone,) = session.generate([prompt], options, adapter=name, prefix=prefix)
        (without,) = session.generate([prompt], options, adapter=name)
        assert result.token_ids == alone.token_ids != without.token_ids


def test_a_full_bank_takes_no_more(session: Session, files: dict[str, Path]) -> None:
    before = logits(session, 4, adapters=ROWS)
    session.load_adapter(files["wide"], "fourth")
    with pytest.raises(AdapterError, match=r"at most, and has wide, .*fourth; .* for fifth") as e:
        session.load_adapter(files["wide"], "fifth")
    assert "--adapter-bank" in str(e.value.hint)
    np.testing.assert_allclose(logits(session, 4, adapters=ROWS), before, atol=1e-4)
    session.unload_adapter("attention")
    session.load_adapter(files["wide"], "fifth")
    assert session.adapters == ("wide", "feed_forward", "fourth", "fifth")


def test_what_cannot_be_asked_for(session: Session, banked: Path) -> None:
    with pytest.raises(AdapterError, match="no adapter 'poet' is loaded") as caught:
        session.runner(adapters=["wide", "poet"])
    assert caught.value.hint == "there is wide, attention, feed_forward"
    with pytest.raises(AdapterError, match="no adapter 'poet' is loaded"):
        session.runner("poet")
    with pytest.raises(AdapterError, match="attention, feed_forward cannot be active together"):
        session.runner(["attention", "feed_forward"])
    with pytest.raises(ConfigError, match="both were given"):
        session.runner("wide", adapters=ROWS)
    with pytest.raises(ConfigError, match="no row"):
        session.runner(adapters=[])
    with pytest.raises(ExecutionError, match="named for 4 rows, and the batch has 3"):
        logits(session, 3, adapters=ROWS)
    options = GenerationOptions(max_new_tokens=2)
    with pytest.raises(ExecutionError, match="named for 4 rows, and the batch has 2"):
        session.generate(PROMPTS[:2], options, adapters=ROWS)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([0, -1], r"holds the value -1; the bank has the ids 0 \(no adapter\) to 3"),
        ([4, 0], "holds the value 4"),
        ([1], "named for 1 rows, and the batch has 2"),
        (np.array([1, 2], np.int32), r"is int32 \[2\]; it must be int64 \[batch\]"),
        (np.array([[1, 2]]), r"is int64 \[1, 2\]"),
    ],
)
def test_ids_outside_the_bank_are_refused(
    ids: object, message: str, session: Session, banked: Path
) -> None:
    active = session.runner(adapters=["wide", "wide"])
    cache = dict.fromkeys(
        [spec.name for spec in active.signature.past],
        np.zeros((2, tiny_graph.K, 0, tiny_graph.D), np.float32),
    )
    given = {**feeds(PROMPTS[0], 2), **cache}
    with pytest.raises(ExecutionError, match=message):
        active.run({**given, ADAPTER_IDS: np.asarray(ids)})
    swapped = active.run({**given, ADAPTER_IDS: np.array([0, 2])})["logits"]
    np.testing.assert_array_equal(swapped[1], logits(session, 2, adapters=[None, "attention"])[1])
    with pytest.raises(ExecutionError, match=r"the ids 0 \(no adapter\) to 0"):
        OnnxRunner(banked, threads=1).run({**given, ADAPTER_IDS: np.array([0, 1])})


def test_only_a_bank_has_rows(bundle: Path, files: dict[str, Path], tmp_path: Path) -> None:
    slotted = Session(tiny_slots.add_slots(bundle, tmp_path / "slotted"), threads=1)
    slotted.load_adapter(files["wide"])
    with pytest.raises(AdapterError, match="has no bank of adapters") as caught:
        slotted.runner(adapters=["wide"])
    assert "--adapter-bank" in str(caught.value.hint)
    given = {**feeds(PROMPTS[0], 1), ADAPTER_IDS: np.zeros(1, np.int64)}
    with pytest.raises(ExecutionError, match=rf"no such inputs:\n.*{ADAPTER_IDS}"):
        slotted.run(given)


def test_a_manifest_that_promises_a_bank(bundle: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(bundle, tmp_path / "bundle")
    path = tiny_slots.add_slots(bundle, tmp_path / "bank", bank=2) / "peft_deploy.json"
    shutil.copy(path, folder)
    with pytest.raises(BundleError, match=rf"differ in these inputs:\n.*{ADAPTER_IDS}"):
        Session(folder)


@pytest.fixture
def kept(bundle: Path, adapters: dict[str, Arrays], tmp_path: Path) -> Path:
    """A bundle with adapters of its own."""
    folder = tiny_slots.add_slots(bundle, tmp_path / "kept", bank=CAPACITY)
    for name in ("wide", "attention"):
        tiny_slots.keep_adapter(folder, name, adapters[name])
    return folder


def test_a_bundle_and_its_texts(kept: Path, files: dict[str, Path]) -> None:
    loaded = load_bundle(kept, threads=1)
    texts = ["one two", "one two", "one two", "one two"]
    rows = ["wide", None, files["feed_forward"], "attention"]
    results = loaded.generate(texts, max_new_tokens=9, adapters=rows)
    alone = [loaded.generate("one two", max_new_tokens=9, adapter=row) for row in rows]
    assert [r.token_ids for r in results] == [r.token_ids for r in alone]
    assert len({r.token_ids for r in results}) == 4
    assert loaded.session.adapters == ("wide", str(files["feed_forward"]), "attention")
    with pytest.raises(ConfigError, match="both were given"):
        loaded.generate(texts, adapter="wide", adapters=rows)


def test_the_commands(kept: Path) -> None:
    def run(*options: object) -> str:
        words = (kept, "--prompt", "one two", "--max-new-tokens", 9, *options)
        result = CliRunner().invoke(generate_command, [str(word) for word in words])
        assert result.exit_code == 0, result.output
        return result.stdout

    base, wide = run(), run("--adapter", "wide")
    assert base != wide
    both = run("--prompt", "one two", "--adapter", "-", "--adapter", "wide")
    texts = [part.partition("\n")[2].strip() for part in both.split("[")[1:]]
    assert texts == [base.strip(), wide.strip()]
    words = [str(kept), "--prompt", "one", "--adapter", "wide", "--adapter", "-"]
    wrong = CliRunner().invoke(generate_command, words)
    assert wrong.exit_code == 2 and "2 adapters were named for 1 prompts" in wrong.output
    words = ["bench", str(kept), "--prompt-tokens", "4", "--new-tokens", "1", "--rounds", "1"]
    measured = CliRunner().invoke(cli, words)
    assert measured.exit_code == 0, measured.output
    assert all(f"kept + {name}" in measured.output for name in ("wide", "attention"))
