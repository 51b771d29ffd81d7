"""The real sentence encoder: LoRA trained on sentences, merged, and the same embeddings from both sides."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

import peft_deploy
from peft_deploy.base import open_base
from peft_deploy.bundle import Manifest
from peft_deploy.runtime import load_bundle
from peft_deploy.text import Tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.convert]

# What belongs together: the training pulls the two of a pair towards each other and apart from all others.
PAIRS = (
    ("The lamp had burned all night.", "Until dawn the light was never put out."),
    ("A ship came round the point.", "Behind the headland a vessel appeared."),
    ("The keeper counted the flashes from the shore.", "Someone on land noted every signal."),
    (
        "Ice floats on water because it is less dense.",
        "Frozen water weighs less than liquid water.",
    ),
    ("He has not paid the rent for two months.", "The tenant owes sixty days of payments."),
    ("Bread is baked before the town wakes up.", "Loaves leave the oven in the early morning."),
)
STEPS = 20
TOLERANCE = 1e-5

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Trained:
    """An adapter on disk, what it says in the dynamic graph, and how its training went."""

    folder: Path
    embeddings: Floats
    plain: Floats
    losses: list[float]


def sentences() -> list[str]:
    return [text for pair in PAIRS for text in pair]


@pytest.fixture(scope="module")
def trained(minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    from peft_deploy.environment import require_paddle

    require_paddle("this test")
    import paddle
    from paddle.nn import functional as F

    from peft_deploy.base.dygraph import load_model

    paddle.seed(11)
    base = open_base(minilm)
    config = peft_deploy.LoRAConfig(
        r=8, lora_alpha=16, target_modules=list(base.family.lora_targets)
    )
    model = peft_deploy.LoRAModel(load_model(base), config)
    tokenizer = Tokenizer.from_folder(minilm)

    def embed(texts: list[str]) -> paddle.Tensor:
        batch = tokenizer.pad([tokenizer.encode(text) for text in texts], "right")
        mask = paddle.to_tensor(batch.attention_mask)
        hidden = model(paddle.to_tensor(batch.input_ids), attention_mask=mask)[0]  # [B, S, E]
        keep = mask.astype("float32").unsqueeze(-1)
        return F.normalize((hidden * keep).sum(1) / keep.sum(1), axis=-1)

    def alone(text: str) -> Floats:
        with paddle.no_grad():
            row: Floats = embed([text]).numpy()[0]
        return row

    model.eval()
    plain = np.stack([alone(text) for text in sentences()])
    trainable = [p for p in model.parameters() if not p.stop_gradient]
    optimizer = paddle.optimizer.AdamW(2e-3, parameters=trainable, weight_decay=0.0)
    losses = []
    for _ in range(STEPS):
        one, other = (embed([pair[side] for pair in PAIRS]) for side in range(2))
        scores = paddle.matmul(one, other, transpose_y=True) * 20.0
        loss = F.cross_entropy(scores, paddle.arange(len(PAIRS)))
        loss.backward()
        optimizer.step()
        optimizer.clear_grad()
        losses.append(float(loss))
    folder = tmp_path_factory.mktemp("minilm") / "adapter"
    model.save_pretrained(folder)
    tuned = np.stack([alone(text) for text in sentences()])
    return Trained(folder, tuned, plain, losses)


@pytest.fixture(scope="module")
def bundle(minilm: Path, trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("minilm") / "bundle"
    peft_deploy.export(minilm, output, adapter=trained.folder)
    return output


def test_the_training_taught_something(trained: Trained) -> None:
    assert trained.losses[-1] < 0.5 * trained.losses[0]
    assert np.abs(trained.embeddings - trained.plain).max() > 1e-2


def test_embeddings_are_those_of_paddle(trained: Trained, bundle: Path) -> None:
    loaded = load_bundle(bundle)
    got = loaded.embed(sentences())
    assert np.abs(got - trained.embeddings).max() <= TOLERANCE
    # padding counts for nothing
    alone = np.concatenate([loaded.embed(text) for text in sentences()])
    assert np.abs(got - alone).max() <= TOLERANCE
    np.testing.assert_allclose(np.linalg.norm(got, axis=-1), 1, atol=1e-6)


def test_the_gate_passed_on_real_text(bundle: Path) -> None:
    manifest = Manifest.read(bundle)
    assert manifest.parity is not None and manifest.parity["passed"] is True
    assert manifest.parity["real_text"] is True and manifest.parity["warnings"] == []
    assert manifest.signature.output_names == ["last_hidden_state", "sentence_embedding"]
    assert manifest.adapters[0]["name"] == "adapter"
    assert len(manifest.adapters[0]["targets"]) == 6 * 6


def test_what_other_runtimes_read(bundle: Path) -> None:
    config = json.loads((bundle / "config.json").read_text("utf-8"))
    assert config["architectures"] == ["BertModel"] and config["model_type"] == "bert"
    assert not (bundle / "genai_config.json").exists()
    assert (bundle / "tokenizer.json").is_file()
