"""The real model behind prefixes: the tokens of PaddleNLP, of this package's runtime and of onnxruntime-genai."""

from __future__ import annotations

from pathlib import Path

import pytest
from flows_adapter import adapter_for
from flows_genai import Genai, needs_genai, ours
from flows_prefix import prefix_by_paddlenlp, prefix_by_us, tokens_by_paddlenlp

import peft_deploy
from peft_deploy.base import open_base
from peft_deploy.base.dygraph import load_model
from peft_deploy.config.export import ExportOptions
from peft_deploy.runtime import Session
from peft_deploy.text import Tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.convert]

TEXTS = ("The capital of France is", "Once upon a time, in a village", "def fibonacci(n):\n")
STEPS = 16


@pytest.fixture(scope="module")
def folders(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("real")
    projected = {"prefix_projection": True, "prefix_projection_hidden_size": 64, "spread": 0.3}
    return {
        "ours": prefix_by_us(smollm2, root / "ours", **projected),
        "theirs": prefix_by_paddlenlp(smollm2, root / "theirs"),
        "tuned": adapter_for(smollm2, root / "tuned", rank=8, spread=(0.02, 0.02)),
    }


@pytest.fixture(scope="module")
def bundle(
    smollm2: Path, folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    output = tmp_path_factory.mktemp("real") / "bundle"
    peft_deploy.export(
        smollm2,
        output,
        adapter=[f"{name}={folder}" for name, folder in folders.items()],
        options=ExportOptions(adapters="runtime", prefix_slots=True, validate=False),
    )
    return output


@pytest.fixture(scope="module")
def prompts(smollm2: Path) -> list[list[int]]:
    tokenizer = Tokenizer.from_folder(smollm2)
    return [tokenizer.encode(text) for text in TEXTS]


@pytest.mark.parametrize("name", ["ours", "theirs"])
def test_tokens_behind_a_prefix_are_those_of_paddlenlp(
    name: str, smollm2: Path, folders: dict[str, Path], bundle: Path, prompts: list[list[int]]
) -> None:
    model = load_model(open_base(smollm2))
    want = [tokens_by_paddlenlp(model, folders[name], prompt, STEPS) for prompt in prompts]
    session = Session(bundle)
    session.load_adapter(name)
    assert ours(session, prompts, STEPS, (), prefix=name) == want
    assert ours(session, prompts, STEPS, (), adapter=name) == want
    assert ours(session, prompts, STEPS, ()) != want


@needs_genai
def test_genai_says_what_we_say(bundle: Path, prompts: list[list[int]]) -> None:
    genai, session = Genai(bundle), Session(bundle)
    for name in ("tuned", "ours", "theirs"):
        genai.load(bundle / "adapters" / f"{name}.onnx_adapter")
        session.load_adapter(name)
    for active in ((), ("tuned",), ("ours",), ("tuned", "theirs")):
        want = ours(session, prompts, STEPS, genai.ends, adapter=list(active))
        assert genai.tokens(prompts, STEPS, active) == want
