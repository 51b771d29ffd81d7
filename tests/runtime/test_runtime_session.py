"""Adapters that come and go in one graph, against the same weights merged in numpy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny_graph
import tiny_slots
from click.testing import CliRunner
from tiny_slots import VERSION, Arrays, everywhere, make_adapter, merged

from peft_deploy.adapters.formats.joint_lora import join
from peft_deploy.adapters.formats.onnx_file import write_onnx_adapter
from peft_deploy.cli.generate import generate_command
from peft_deploy.convert.linears import NO_GROUPS, Groups
from peft_deploy.errors import AdapterError, ConfigError, ExecutionError
from peft_deploy.runtime import (
    GenerationOptions,
    GenerationRun,
    OnnxRunner,
    Session,
    initial_cache,
    load_bundle,
)
from peft_deploy.runtime.loaded_adapter import KEPT_SCALES
from peft_deploy.signature import joint_module

IDS = [5, 9, 77, 200, 31]
ATTENTION = {"0.q": 3, "0.v": 7, "1.q": 2}
FEED_FORWARD = {"0.up": 5, "1.down": 1}


@pytest.fixture(scope="module", params=[NO_GROUPS, tiny_slots.GROUPS], ids=["apart", "joint"])
def slotted(
    request: pytest.FixtureRequest, bundle: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Every layer with an A of its own, or q, k and v with one; the files have one for each module."""
    folder = tmp_path_factory.mktemp("slots") / "bundle"
    return tiny_slots.add_slots(bundle, folder, groups=request.param)


@pytest.fixture
def session(slotted: Path) -> Session:
    return Session(slotted, threads=1)


@pytest.fixture(scope="module")
def adapters(weights: Arrays) -> dict[str, Arrays]:
    return {
        "wide": make_adapter(weights, everywhere(6), seed=1),
        "attention": make_adapter(weights, ATTENTION, seed=2),
        "feed_forward": make_adapter(weights, FEED_FORWARD, seed=3),
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


def feeds(ids: list[int] = IDS) -> dict[str, np.ndarray]:
    count = len(ids)
    return {
        "input_ids": np.array([ids], np.int64),
        "attention_mask": np.ones((1, count), np.int64),
        "position_ids": np.arange(count, dtype=np.int64)[None],
    }


def logits(session: Session, **options: object) -> np.ndarray:
    return session.run(feeds(), ["logits"], **options)["logits"][0]  # type: ignore[arg-type]


def assert_is(actual: np.ndarray, weights: Arrays) -> None:
    """The logits are those of these weights, as far as float32 goes, and not by being small."""
    expected = tiny_graph.reference_logits(dict(weights), IDS)
    assert np.abs(expected).max() > 3
    np.testing.assert_allclose(actual, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("name", ["wide", "attention", "feed_forward"])
def test_an_adapter_is_what_it_would_be_merged(
    name: str, session: Session, files: dict[str, Path], adapters: dict, weights: Arrays
) -> None:
    assert session.load_adapter(files[name]) == name
    assert_is(logits(session, adapter=name), merged(weights, [adapters[name]]))
    assert_is(logits(session), weights)


@pytest.mark.parametrize("scale", [0.5, -2.0, 0.0, 1.0])
def test_a_scale_multiplies_what_the_adapter_adds(
    scale: float, session: Session, files: dict[str, Path], adapters: dict, weights: Arrays
) -> None:
    session.load_adapter(files["wide"])
    session.load_adapter(files["attention"])
    for name in ("wide", "attention"):
        expected = merged(weights, [adapters[name]], scale)
        assert_is(logits(session, adapter=name, scale=scale), expected)


def test_more_scales_than_are_kept(session: Session, files: dict[str, Path]) -> None:
    session.load_adapter(files["wide"])
    scales = [0.1 * (i + 1) for i in range(KEPT_SCALES + 3)]
    first = [logits(session, adapter="wide", scale=scale) for scale in scales]
    again = [logits(session, adapter="wide", scale=scale) for scale in scales]
    np.testing.assert_array_equal(again, first)
    assert len({array.tobytes() for array in first}) == len(scales)


def test_off_is_the_graph_without_slots_to_the_bit_before_and_after(
    session: Session, runner: OnnxRunner, files: dict[str, Path]
) -> None:
    cache = {
        spec.name: np.zeros((1, tiny_graph.K, 0, tiny_graph.D), np.float32)
        for spec in runner.signature.past
    }
    base = runner.run({**feeds(), **cache})
    for name in ("wide", "attention", "wide"):
        off = session.run(feeds())
        for output, array in base.items():
            np.testing.assert_array_equal(off[output], array)
        session.load_adapter(files[name], name="again")
        assert np.abs(logits(session, adapter="again") - base["logits"][0]).max() > 1
        session.unload_adapter("again")
    np.testing.assert_array_equal(session.run(feeds())["logits"], base["logits"])


def test_two_adapters_of_different_layers_work_together(
    session: Session, files: dict[str, Path], adapters: dict, weights: Arrays
) -> None:
    pair = ("attention", "feed_forward")
    for name in pair:
        session.load_adapter(files[name])
    assert_is(logits(session, adapter=pair), merged(weights, [adapters[n] for n in pair]))


@pytest.mark.parametrize("scale", [1.0, -0.5])
def test_several_adapters_of_layers_that_share_an_a(
    scale: float, session: Session, weights: Arrays, tmp_path: Path
) -> None:
    layers = [{"0.q": 3, "1.k": 2}, {"0.v": 5, "1.q": 1, "0.down": 2}, {"0.k": 1, "head": 3}]
    made = [make_adapter(weights, ranks, seed=seed) for seed, ranks in enumerate(layers)]
    for name, tensors in zip("abc", made, strict=True):
        session.load_adapter(
            write_onnx_adapter(tmp_path / f"{name}.onnx_adapter", tensors, VERSION)
        )
    for names in ("a", "ab", "cb", "bac"):
        own = [made["abc".index(name)] for name in names]
        found = logits(session, adapter=list(names), scale=scale)
        assert_is(found, merged(weights, own, scale))


def test_a_file_for_the_other_kind_of_graph(
    session: Session, adapters: dict, weights: Arrays, tmp_path: Path
) -> None:
    """Adapters do not care whether a graph's layers share an A."""
    slots = [name for module in tiny_slots.GROUPS.values() for name in joint_slots(module)]
    tensors = join(adapters["attention"], slots, "here")
    assert "model.layers.0.q+k+v.lora_A.ranks" in tensors
    path = write_onnx_adapter(tmp_path / "joint.onnx_adapter", tensors, VERSION)
    session.load_adapter(path)
    assert_is(logits(session, adapter="joint"), merged(weights, [adapters["attention"]]))


def joint_slots(modules: list[str]) -> list[str]:
    name = joint_module(modules)
    return [f"{name}.lora_A.weight", f"{name}.lora_A.ranks"]


def test_two_adapters_of_the_same_slots_are_refused(
    session: Session, files: dict[str, Path]
) -> None:
    session.load_adapter(files["attention"])
    session.load_adapter(files["attention"], "twin")
    for pair in (("attention", "twin"), ("attention", "attention")):
        with pytest.raises(AdapterError, match="fill the same slots"):
            logits(session, adapter=pair)


@pytest.mark.parametrize("groups", [NO_GROUPS, tiny_slots.GROUPS], ids=["apart", "joint"])
def test_slots_of_a_fixed_rank(
    groups: Groups, bundle: Path, weights: Arrays, runner: OnnxRunner, tmp_path: Path
) -> None:
    folder = tiny_slots.add_slots(bundle, tmp_path / "fixed", rank=4, groups=groups)
    fixed = Session(folder, threads=1)
    fitting = make_adapter(weights, everywhere(4), seed=5)
    fixed.load_adapter(write_onnx_adapter(tmp_path / "a.onnx_adapter", fitting, VERSION))
    assert_is(logits(fixed, adapter="a"), merged(weights, [fitting]))
    assert_is(logits(fixed), weights)
    parts = {"some": {"0.v": 4, "1.q": 4, "1.k": 4}, "rest": {"0.q": 4, "0.k": 4, "1.v": 4}}
    made = {n: make_adapter(weights, ranks, seed=6) for n, ranks in parts.items()}
    for name, tensors in made.items():
        file = write_onnx_adapter(tmp_path / f"{name}.onnx_adapter", tensors, VERSION)
        fixed.load_adapter(file)
        assert_is(logits(fixed, adapter=name), merged(weights, [tensors]))
    assert_is(logits(fixed, adapter=["rest", "some"]), merged(weights, list(made.values())))
    narrow = make_adapter(weights, everywhere(3), seed=5)
    path = write_onnx_adapter(tmp_path / "b.onnx_adapter", narrow, VERSION)
    with pytest.raises(
        AdapterError, match=r"float32 \[32, (3|9)\], the slot is float32 \[32, (4|12)\]"
    ):
        fixed.load_adapter(path)


def test_generation_with_an_adapter(
    session: Session, files: dict[str, Path], adapters: dict, weights: Arrays
) -> None:
    session.load_adapter(files["wide"])
    options = GenerationOptions(max_new_tokens=12)
    prompts = [IDS, [8, 40]]
    results = session.generate(prompts, options, adapter="wide")
    plain = session.generate(prompts, options)
    for prompt, tuned, base in zip(prompts, results, plain, strict=True):
        weights_on = merged(weights, [adapters["wide"]])
        assert list(tuned.token_ids) == tiny_graph.reference_greedy(weights_on, prompt, 12)
        assert list(base.token_ids) == tiny_graph.reference_greedy(dict(weights), prompt, 12)
        assert tuned.token_ids != base.token_ids


def test_a_request_under_way_keeps_an_adapter_that_is_unloaded(
    session: Session, files: dict[str, Path], adapters: dict, weights: Arrays
) -> None:
    session.load_adapter(files["wide"], "a")
    run = GenerationRun(session.runner("a"), [IDS], GenerationOptions(max_new_tokens=12))
    events = iter(run)
    for _ in range(3):
        next(events)
    session.unload_adapter("a")
    session.load_adapter(files["attention"], "a")
    expected = tiny_graph.reference_greedy(merged(weights, [adapters["wide"]]), IDS, 12)
    assert list(run.results[0].token_ids) == expected
    assert_is(logits(session, adapter="a"), merged(weights, [adapters["attention"]]))


def test_a_request_that_fails_leaves_the_next_one_right(
    session: Session, files: dict[str, Path], adapters: dict, weights: Arrays
) -> None:
    session.load_adapter(files["wide"])
    active = session.runner("wide")
    wrong = {**feeds(), "attention_mask": np.ones((1, 3), np.int64)}
    for _ in range(2):
        with pytest.raises(ExecutionError, match=r"could not run model\.onnx"):
            active.step(wrong, active.load_cache(initial_cache(active.signature, 1)))
        cache = active.load_cache(initial_cache(active.signature, 1))
        right, _ = active.step(feeds(), cache)
        assert_is(right[0], merged(weights, [adapters["wide"]]))


def halved(tensors: Arrays) -> Arrays:
    return {name: array.astype(np.float16) for name, array in tensors.items()}


def renamed(tensors: Arrays) -> Arrays:
    return {name.replace("layers.0.q", "layers.7.q"): array for name, array in tensors.items()}


def widened(tensors: Arrays) -> Arrays:
    first, *_ = tensors
    return {**tensors, first: np.vstack([tensors[first], tensors[first]])}


def flattened(tensors: Arrays) -> Arrays:
    return {n: a[:, 0] if n == "model.layers.0.v.lora_A.weight" else a for n, a in tensors.items()}


def twice(tensors: Arrays) -> Arrays:
    A = tensors["model.layers.0.q.lora_A.weight"]
    return {**tensors, "model.layers.0.q+k.lora_A.weight": np.hstack([A, A])}


def without_a_half(tensors: Arrays) -> Arrays:
    return {n: a for n, a in tensors.items() if n != "model.layers.0.v.lora_B.weight"}


def of_two_ranks(tensors: Arrays) -> Arrays:
    name = "model.layers.0.v.lora_A.weight"
    return {**tensors, name: tensors[name][:, :-1]}


def not_finite(tensors: Arrays) -> Arrays:
    name = "model.layers.1.q.lora_B.weight"
    return {**tensors, name: np.full_like(tensors[name], np.nan)}


@pytest.mark.parametrize(
    ("change", "version", "message"),
    [
        (dict, VERSION + 1, "is for another base model"),
        (halved, VERSION, r"float16 .*, the slot is float32"),
        (renamed, VERSION, r"no slots for these tensors.*\n.*layers\.7\.q"),
        (
            widened,
            VERSION,
            r"another type or shape:\n.*\[64, 3\], the slot is float32 \[32|"
            r"parts of .*q\+k\+v\.lora_A\.weight are no matrices that fit .*: float32 \[64, 3\]",
        ),
        (
            flattened,
            VERSION,
            r"float32 \[32\], the slot is float32 \[32|no matrices that fit .*: .*float32 \[32\]",
        ),
        (twice, VERSION, r"holds more than one lora_A of model\.layers\.0\.q\."),
        (without_a_half, VERSION, r"layers\.0\.v\.lora_A\.weight: its lora_B is missing"),
        (of_two_ranks, VERSION, r"layers\.0\.v.*rank 6, its lora_B has 7"),
        (not_finite, VERSION, r"NaN or infinity in:\n.*layers\.1\.q"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_what_does_not_fit_is_found_when_it_is_loaded(
    change: Callable[[Arrays], Arrays],
    version: int,
    message: str,
    session: Session,
    files: dict[str, Path],
    adapters: dict,
    tmp_path: Path,
) -> None:
    session.load_adapter(files["feed_forward"])
    before = logits(session, adapter="feed_forward")
    path = tmp_path / "wrong.onnx_adapter"
    write_onnx_adapter(path, change(adapters["attention"]), version)
    with pytest.raises(AdapterError, match=f"(?s){message}") as caught:
        session.load_adapter(path)
    assert caught.value.exit_code == 3
    assert session.adapters == ("feed_forward",)
    np.testing.assert_array_equal(logits(session, adapter="feed_forward"), before)


@pytest.mark.parametrize("length", [0, 3, 40, 700])
def test_damaged_files_are_refused(
    length: int, session: Session, files: dict[str, Path], tmp_path: Path
) -> None:
    path = tmp_path / "cut.onnx_adapter"
    path.write_bytes(files["wide"].read_bytes()[:length])
    with pytest.raises(AdapterError, match=r"cut\.onnx_adapter"):
        session.load_adapter(path)
    assert session.adapters == ()


def test_a_file_that_does_not_say_its_base_is_taken_with_a_warning(
    session: Session, adapters: dict, weights: Arrays, tmp_path: Path
) -> None:
    path = write_onnx_adapter(tmp_path / "olive.onnx_adapter", adapters["attention"], 1)
    with pytest.warns(UserWarning, match="does not say which base model") as caught:
        session.load_adapter(path)
    assert caught[0].filename == __file__
    assert_is(logits(session, adapter="olive"), merged(weights, [adapters["attention"]]))


def test_names(session: Session, files: dict[str, Path]) -> None:
    with pytest.raises(AdapterError, match="there is no adapter 'poet'"):
        session.load_adapter("poet")
    session.load_adapter(str(files["wide"]))
    session.load_adapter(files["wide"], "other")
    assert session.adapters == ("wide", "other")
    with pytest.raises(AdapterError, match="'wide' is loaded already"):
        session.load_adapter(files["attention"], "wide")
    session.unload_adapter("other")
    for call in (lambda: session.unload_adapter("other"), lambda: session.runner("other")):
        with pytest.raises(AdapterError, match="no adapter 'other' is loaded") as caught:
            call()
        assert "wide" in str(caught.value.hint)


@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_scales_that_are_no_numbers(
    scale: float, session: Session, files: dict[str, Path]
) -> None:
    session.load_adapter(files["wide"])
    with pytest.raises(ConfigError, match="it has to be a finite number"):
        session.runner("wide", scale=scale)
    with pytest.raises(AdapterError, match="is too large for float32"):
        session.runner("wide", scale=1e39)


def test_a_graph_without_slots_takes_no_adapter(bundle: Path, files: dict[str, Path]) -> None:
    plain = Session(bundle, threads=1)
    assert plain.slots == {}
    with pytest.raises(AdapterError, match="has no slots for adapters") as caught:
        plain.load_adapter(files["wide"])
    assert "--adapters runtime" in str(caught.value.hint)


def test_a_prefix_stands_in_place_of_the_cache(session: Session) -> None:
    past = {
        spec.name: np.ones((1, tiny_graph.K, 2, tiny_graph.D), np.float32)
        for spec in session.signature.past
    }
    given = {**feeds(), "attention_mask": np.ones((1, 7), np.int64)}
    np.testing.assert_array_equal(
        session.run(given, prefix=past)["logits"], session.run({**given, **past})["logits"]
    )
    with pytest.raises(ExecutionError, match="both were given"):
        session.run({**given, **past}, prefix=past)


@pytest.fixture
def kept(slotted: Path, adapters: dict, tmp_path: Path) -> Path:
    """A bundle with an adapter of its own."""
    import shutil

    folder = shutil.copytree(slotted, tmp_path / "kept")
    tiny_slots.keep_adapter(folder, "own", adapters["wide"])
    return folder


def test_a_bundle_knows_its_own_adapters(kept: Path, files: dict[str, Path]) -> None:
    loaded = load_bundle(kept, threads=1)
    own = loaded.generate("one two", max_new_tokens=9, adapter="own")
    file = loaded.generate("one two", max_new_tokens=9, adapter=files["wide"])
    base = loaded.generate("one two", max_new_tokens=9)
    assert own.token_ids == file.token_ids != base.token_ids
    weak = loaded.generate("one two", max_new_tokens=9, adapter="own", scale=0)
    assert weak.token_ids == base.token_ids
    assert loaded.session.adapters == ("own", str(files["wide"]))
    tuned = loaded.with_adapter("own")
    assert tuned.generate("one two", max_new_tokens=9).token_ids == own.token_ids
    assert loaded.generate("one two", max_new_tokens=9).token_ids == base.token_ids
    with pytest.raises(AdapterError, match="there is no adapter 'poet'") as caught:
        loaded.generate("one", adapter="poet")
    assert caught.value.hint == "the bundle has own"
    with pytest.raises(ConfigError, match="none was named"):
        loaded.generate("one", scale=2.0)


def test_the_command_takes_adapters(kept: Path, files: dict[str, Path]) -> None:
    def run(*options: object) -> str:
        words = (kept, "--prompt", "one two", "--max-new-tokens", 9, *options)
        result = CliRunner().invoke(generate_command, [str(word) for word in words])
        assert result.exit_code == 0, result.output
        return result.stdout

    base, own = run(), run("--adapter", "own")
    assert own != base
    assert run("--adapter", files["wide"]) == own
    assert run("--adapter", "own", "--scale", 0) == base
    words = [str(kept), "--prompt", "one", "--adapter", "poet"]
    wrong = CliRunner().invoke(generate_command, words)
    assert wrong.exit_code == 3
    assert "the bundle has own" in wrong.stderr
