"""Deliberate faults are seen and found; good bundles are left in peace."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from good_bundles import run_trials
from made_bundles import BUNDLES, SUBJECTS, Exported, bundle_of, make_bundle
from model_recipes import load_recipe
from mutation_subjects import Subject, read_subject
from mutations import Mutation, catalogue, complaints

ROOT = Path(__file__).resolve().parents[2]
MUTATIONS = catalogue()
Subjects = Callable[[str], Subject]
Bundles = Callable[[str], Exported]


@pytest.fixture(scope="session")
def good_bundles(tmp_path_factory: pytest.TempPathFactory) -> Bundles:
    made: dict[str, Exported] = {}

    def find(name: str) -> Exported:
        if name not in made:
            folder = tmp_path_factory.mktemp("good")
            made[name] = make_bundle(name, folder, load_recipe("tiny"))
        return made[name]

    return find


@pytest.fixture(scope="session")
def subjects(good_bundles: Bundles) -> Subjects:
    read: dict[str, Subject] = {}

    def find(name: str) -> Subject:
        if name not in read:
            read[name] = read_subject(name, good_bundles(bundle_of(name)))
        return read[name]

    return find


@pytest.mark.convert
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_fault_is_seen_and_found(mutation: Mutation, subjects: Subjects, tmp_path: Path) -> None:
    subject = subjects(mutation.subject)
    folder = subject.copy_to(tmp_path / "broken")
    mutation.apply(subject, folder)
    verdict = subject.judge(folder, tmp_path / "found")
    assert not complaints(mutation, verdict)


@pytest.mark.convert
@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("name", BUNDLES)
def test_no_false_alarm(name: str, seed: int, good_bundles: Bundles, tmp_path: Path) -> None:
    trials = list(run_trials(good_bundles(name), tmp_path, seed, load_recipe("tiny")))
    assert trials
    for trial in trials:
        assert trial.report.passed, trial.report.summary()
        assert not trial.report.warnings
        assert 0 < trial.used < 0.7


def test_the_catalogue_is_large_and_names_are_unique() -> None:
    seen = [m for m in MUTATIONS if m.seen]
    assert len(seen) >= 40 and sum(m.layer is not None for m in seen) >= 40
    assert len({m.name for m in MUTATIONS}) == len(MUTATIONS)
    assert {m.subject for m in MUTATIONS} == set(SUBJECTS)


def test_the_document_lists_the_catalogue() -> None:
    listed = sorted(_tool("mutations").written())
    assert listed == sorted((m.name, m.subject, m.seen) for m in MUTATIONS), (
        "run tools/mutations.py --write"
    )


def _tool(name: str) -> ModuleType:
    """A module of tools/, as it is when it runs as a script."""
    import sys

    path = ROOT / "tools" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"tool_{name}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "tools")
        spec.loader.exec_module(module)
    return module
