from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy_decoder import SCALING, NumpyDecoder, Weights, merge

from peft_deploy.errors import BundleError, ConfigError
from peft_deploy.parity import (
    CaseMatrix,
    CheckOptions,
    ParityReport,
    Prompt,
    Scores,
    Text,
    check_expectation,
    measure_reference,
    score_tokens,
)
from peft_deploy.parity.recording import (
    MAX_BYTES,
    Recording,
    check_size,
    expected_bytes,
    read_recording,
    write_recording,
)
from peft_deploy.progress import Silent
from peft_deploy.signature import causal_lm_signature

PROMPTS = [Prompt("short", (1, 2, 3)), Prompt("long ü", (4, 5, 6, 7, 8, 9))]
OPTIONS = CheckOptions(seed=3, real_text=True, new_tokens=12, provider="cpu")


@pytest.fixture
def recorded(
    reference: NumpyDecoder, good_bundle: NumpyDecoder, matrix: CaseMatrix
) -> tuple[Recording, ParityReport]:
    expectation = measure_reference(reference, matrix, dtype="float32", progress=Silent())
    scores: list[Scores] = []

    def judge(prompt: Prompt, tokens: np.ndarray) -> Scores:
        scores.append(score_tokens(reference, prompt, tokens))
        return scores[-1]

    report = check_expectation(expectation, good_bundle, PROMPTS, judge, options=OPTIONS)
    return Recording("part a", expectation, PROMPTS, scores, OPTIONS), report


def repeated(recording: Recording, bundle: NumpyDecoder) -> ParityReport:
    return check_expectation(
        recording.expectation,
        bundle,
        recording.prompts,
        recording.judge,
        options=recording.options,
    )


def without_times(report: ParityReport) -> str:
    data = report.to_dict(full=True)
    del data["seconds"]
    for entry in (*data["cases"], data["generation"]):
        del entry["seconds"]
    return json.dumps(data)


def test_a_repeated_check_says_the_same(
    recorded: tuple[Recording, ParityReport], good_bundle: NumpyDecoder, tmp_path: Path
) -> None:
    recording, report = recorded
    assert report.passed and report.effect is not None
    write_recording(tmp_path / "r.safetensors", recording)
    read = read_recording(tmp_path / "r.safetensors")
    assert read.title == "part a"
    assert without_times(repeated(read, good_bundle)) == without_times(report)
    assert [p.name for p in tmp_path.iterdir()] == ["r.safetensors"]


@pytest.mark.parametrize("scaling", [1.01, 0.99, 0.0])
def test_a_repeated_check_finds_faults(
    scaling: float,
    recorded: tuple[Recording, ParityReport],
    weights: tuple[Weights, Weights],
    tmp_path: Path,
) -> None:
    write_recording(tmp_path / "r.safetensors", recorded[0])
    recording = read_recording(tmp_path / "r.safetensors")
    report = repeated(recording, NumpyDecoder(merge(*weights, scaling * SCALING)))
    assert not any(case.passed for case in report.cases)
    assert scaling > 0 or (report.generation is not None and not report.generation.passed)


def test_the_size_is_known_before(
    recorded: tuple[Recording, ParityReport], matrix: CaseMatrix, tmp_path: Path
) -> None:
    recording, _ = recorded
    write_recording(tmp_path / "r.safetensors", recording)
    signature = NumpyDecoder({}).signature
    assert expected_bytes(signature, matrix.texts) == sum(
        array.nbytes
        for r in recording.expectation.known.values()
        for array in r.outputs().values()
    )
    # the rest are tokens, slots and the header
    size = (tmp_path / "r.safetensors").stat().st_size
    assert 0 < size - expected_bytes(signature, matrix.texts) < 60_000


def test_the_size_that_the_documentation_names(matrix: CaseMatrix) -> None:
    smollm2 = causal_lm_signature(num_layers=30, num_kv_heads=3, head_dim=64, vocab_size=49152)
    assert expected_bytes(smollm2, matrix.texts) == pytest.approx(19e6, rel=0.03)
    llama_7b = causal_lm_signature(num_layers=32, num_kv_heads=32, head_dim=128, vocab_size=32000)
    assert expected_bytes(llama_7b, matrix.texts) == pytest.approx(90e6, rel=0.03)
    check_size(llama_7b, matrix.texts)


def test_too_much_is_refused() -> None:
    signature = causal_lm_signature(num_layers=1, num_kv_heads=1, head_dim=8, vocab_size=250_000)
    texts = [Text("long", np.zeros(MAX_BYTES // 1_000_000 + 1, np.int64))]
    with pytest.raises(ConfigError, match="at most 268 MB are recorded"):
        check_size(signature, texts)


def test_damage_is_an_error(recorded: tuple[Recording, ParityReport], tmp_path: Path) -> None:
    path = tmp_path / "r.safetensors"
    write_recording(path, recorded[0])
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(BundleError, match="cut short"):
        read_recording(path)
    path.write_bytes(whole.replace(b'\\"pad_id\\"', b'\\"pad_ix\\"'))
    with pytest.raises(BundleError, match="is damaged: 'pad_id'"):
        read_recording(path)
    path.write_bytes(whole.replace(b'\\"format_version\\": 1', b'\\"format_version\\": 9'))
    with pytest.raises(BundleError, match="format_version 9; this release reads up to 1"):
        read_recording(path)
    with pytest.raises(BundleError, match="cannot be read"):
        read_recording(tmp_path / "missing.safetensors")


def test_segments_are_kept(recorded: tuple[Recording, ParityReport], tmp_path: Path) -> None:
    recording, _ = recorded
    expectation = recording.expectation
    first, *rest = expectation.matrix.texts
    typed = replace(first, types=np.arange(len(first)) % 2)
    cases = [
        replace(case, texts=tuple(typed if text is first else text for text in case.texts))
        for case in expectation.matrix.cases
    ]
    matrix = CaseMatrix((typed, *rest), tuple(cases))
    known = {(typed if text is first else text): r for text, r in expectation.known.items()}
    expectation = replace(expectation, matrix=matrix, known=known)
    write_recording(tmp_path / "r.safetensors", replace(recording, expectation=expectation))
    texts = read_recording(tmp_path / "r.safetensors").expectation.matrix.texts
    assert texts[0].types is not None and (texts[0].types == typed.types).all()
    assert texts[1].types is None
