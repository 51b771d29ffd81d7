"""Generation behind a prefix against the same graph with the prefix hidden in its past."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from peft_deploy.bundle.manifest import MANIFEST
from peft_deploy.bundle.prefixes import Prefix, prefix_path, write_prefix_file
from peft_deploy.errors import AdapterError
from peft_deploy.parity.prefixed import PrefixedRunner
from peft_deploy.runtime import GenerationOptions, OnnxRunner, Session, generate, load_bundle
from peft_deploy.runtime.prefix_shelf import PrefixShelf

P = 4
PROMPTS = [[5, 9, 2, 7], [11, 3], [8, 8, 1, 6, 4, 13]]
BASE = "c" * 64


def make_prefix(runner: OnnxRunner, offset: int, name: str = "poet") -> Prefix:
    rng = np.random.default_rng(6)
    past = {}
    for spec in runner.signature.past:
        _, heads, _, dim = spec.dims
        past[spec.name] = rng.standard_normal((1, heads, P, dim)).astype(spec.dtype)
    return Prefix(name, past, offset)


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("offset", [0, P])
def test_the_prefix_and_its_position_rule_are_those_of_the_prefixed_runner(
    offset: int, padding: str, runner: OnnxRunner
) -> None:
    prefix = make_prefix(runner, offset)
    options = GenerationOptions(max_new_tokens=10, padding=padding)
    got = [r.token_ids for r in generate(runner, PROMPTS, options, prefix)]
    hidden = PrefixedRunner(runner, prefix)
    assert got == [r.token_ids for r in generate(hidden, PROMPTS, options)]
    assert got != [r.token_ids for r in generate(runner, PROMPTS, options)]


def test_an_offset_matters(runner: OnnxRunner) -> None:
    options = GenerationOptions(max_new_tokens=10)
    stays, moves = (
        [r.token_ids for r in generate(runner, PROMPTS, options, make_prefix(runner, offset))]
        for offset in (0, P)
    )
    assert stays != moves


@pytest.fixture
def prefixed(bundle: Path, runner: OnnxRunner, tmp_path: Path) -> Path:
    """The tiny bundle with a prefix."""
    folder = tmp_path / "bundle"
    shutil.copytree(bundle, folder)
    manifest = json.loads((folder / MANIFEST).read_text("utf-8"))
    manifest["base"]["fingerprint"] = BASE
    manifest["adapters"] = [{"name": "poet", "method": "prefix", "mode": "prefix", "slots": False}]
    (folder / MANIFEST).write_text(json.dumps(manifest), "utf-8")
    prefix_path(folder, "poet").parent.mkdir()
    write_prefix_file(prefix_path(folder, "poet"), make_prefix(runner, P), BASE)
    return folder


def test_a_bundle_s_prefix_is_found_by_name_or_file_and_read_once(
    prefixed: Path, runner: OnnxRunner, tmp_path: Path
) -> None:
    loaded = load_bundle(prefixed, threads=1)
    assert loaded.prefixes == ("poet",)
    copy = tmp_path / "copy.safetensors"
    shutil.copyfile(prefix_path(prefixed, "poet"), copy)
    texts = [
        loaded.generate("one two", max_new_tokens=6, prefix=prefix).text
        for prefix in ("poet", copy, str(copy), make_prefix(runner, P))
    ]
    assert len(set(texts)) == 1
    assert texts[0] != loaded.generate("one two", max_new_tokens=6).text
    shelf = PrefixShelf(prefixed, loaded.manifest)
    assert shelf.find("poet") is shelf.find("poet")
    assert shelf.find(None) is None


@pytest.mark.parametrize("damage", ["missing", "cut", "other base"])
def test_a_session_goes_on_after_a_prefix_that_it_refused(damage: str, prefixed: Path) -> None:
    session, options = Session(prefixed, threads=1), GenerationOptions(max_new_tokens=5)
    before = session.generate(PROMPTS, options)[0].token_ids
    path = prefix_path(prefixed, "poet")
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-5])
    else:
        write_prefix_file(path, make_prefix(OnnxRunner(prefixed), 0), "d" * 64)
    with pytest.raises(AdapterError, match=r"poet\.safetensors"):
        session.generate(PROMPTS, options, prefix="poet")
    assert session.generate(PROMPTS, options)[0].token_ids == before


def test_without_prefixes_the_error_says_how_to_get_them(bundle: Path) -> None:
    with pytest.raises(AdapterError, match="there is no prefix 'poet'") as info:
        load_bundle(bundle).generate("one", prefix="poet")
    assert info.value.hint is not None and "peft-deploy export" in info.value.hint
