"""Version numbers, requirements, and this distribution's own metadata."""

from __future__ import annotations

import itertools

import pytest

from peft_deploy.diagnosis import Requirement, extras, fits, version_key
from peft_deploy.diagnosis.extras import own_requirements

IN_ORDER = [
    "0.9",
    "1.17.0.dev20260101",
    "1.17.0a1",
    "1.17.0b2",
    "1.17.0rc1",
    "1.17.0",
    "1.17.0.post1",
    "1.17.1",
    "1.18",
    "1.100.0",
    "3.0.0b4",
    "3.0",
]


@pytest.mark.parametrize(("lower", "higher"), itertools.combinations(IN_ORDER, 2))
def test_order(lower: str, higher: str) -> None:
    assert version_key(lower) < version_key(higher)


@pytest.mark.parametrize(("a", "b"), [("3.0", "3.0.0"), ("3.3.1", "3.3.1+cu126"), ("v2.1", "2.1")])
def test_equal(a: str, b: str) -> None:
    assert version_key(a) == version_key(b)


@pytest.mark.parametrize(
    ("version", "bounds", "expected"),
    [
        ("1.26.4", ">=1.26", True),
        ("2.0.0", ">=1.26,<2", False),
        ("1.17.0", "<=1.17.0,>=1.16.1", True),
        ("1.17.1", "<=1.17.0,>=1.16.1", False),
        ("80.10.2", "<81", True),
        ("81.0.0rc1", "<81", False),
        ("3.0.0b4", "==3.0.0b4", True),
        ("3.0.0", "==3.0.0b4", False),
        ("3.3.1+cu126", "==3.3.1", True),
        ("7", "", True),
        ("7", "!=7.0", False),
    ],
)
def test_bounds(version: str, bounds: str, expected: bool) -> None:
    assert fits(version, bounds) is expected


@pytest.mark.parametrize("text", ["", "abc", "~1"])
def test_what_is_no_version(text: str) -> None:
    with pytest.raises(ValueError, match="no version"):
        version_key(text)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("numpy>=1.26", Requirement("numpy", ">=1.26")),
        ("onnx-ir<2,>=1.1", Requirement("onnx-ir", "<2,>=1.1")),
        ('onnxruntime_gpu>=1.23; extra == "gpu"', Requirement("onnxruntime-gpu", ">=1.23", "gpu")),
        ("jinja2 ; extra == 'dev'", Requirement("jinja2", "", "dev")),
        ('a<2; python_version < "3.11"', Requirement("a", "<2", None, "<3.11")),
        (
            'a<2,>=1; python_version >= "3.11" and extra == "dev"',
            Requirement("a", "<2,>=1", "dev", ">=3.11"),
        ),
    ],
)
def test_requirements(line: str, expected: Requirement) -> None:
    assert Requirement.parse(line) == expected


@pytest.mark.parametrize(
    "line",
    [
        'a>=1; sys_platform == "linux"',
        'a; python_version < "3.11" or extra == "dev"',
        'a; python_version ~= "3.11"',
        "a~=1.2",
        "a @ https://example.org/a.whl",
        "a[b]>=1",
    ],
)
def test_requirements_that_are_not_understood_are_not_guessed(line: str) -> None:
    with pytest.raises(ValueError, match="cannot be understood"):
        Requirement.parse(line)


def test_our_own_metadata_is_understood() -> None:
    found = {(r.extra, r.name): r.bounds for r in own_requirements()}
    assert (None, "numpy") in found and (None, "onnx-ir") in found
    assert ("cpu", "onnxruntime") in found and ("gpu", "onnxruntime-gpu") in found
    assert found["paddle", "paddlepaddle"].startswith("==")


def test_what_another_python_needs_is_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ['old; python_version < "3.11"', 'new; python_version >= "3.11"', "always"]
    monkeypatch.setattr(extras.metadata, "requires", lambda name: lines)
    for python, expected in (("3.10", ["old", "always"]), ("3.11", ["new", "always"])):
        version = (*python.split("."), "7")
        monkeypatch.setattr(extras.platform, "python_version_tuple", lambda v=version: v)
        assert [r.name for r in own_requirements()] == expected
