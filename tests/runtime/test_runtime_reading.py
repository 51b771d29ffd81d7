"""Encoders at work, on a graph that only counts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, processors

from peft_deploy.errors import ConfigError, ExecutionError
from peft_deploy.runtime import read_texts
from peft_deploy.runtime.reading import embeddings, predictions, require_output
from peft_deploy.runtime.runner import Array
from peft_deploy.signature import GraphSignature, causal_lm_signature, encoder_signature
from peft_deploy.text import Tokenizer
from peft_deploy.text.special_tokens import SpecialTokens

PAD, CLS, SEP = 7, 0, 1
SIGNATURE = encoder_signature(
    {
        "last_hidden_state": ("batch", "sequence", 2),
        "sentence_embedding": ("batch", 2),
        "logits": ("batch", 3),
    },
    token_types=True,
)


class Counter:
    """Gives every token its id and its segment, and every text their sums over real tokens."""

    def __init__(self, signature: GraphSignature = SIGNATURE) -> None:
        self.signature = signature
        self.shapes: list[tuple[int, ...]] = []

    def run(
        self, feeds: Mapping[str, Array], outputs: Sequence[str] | None = None
    ) -> dict[str, Array]:
        ids, mask, types = (feeds[s.name] for s in SIGNATURE.inputs)
        assert (ids[mask == 0] == PAD).all() and (types[mask == 0] == 0).all()
        self.shapes.append(ids.shape)
        tokens = np.stack([ids, types], -1).astype(np.float32)
        sums = (tokens * mask[..., None]).sum(1)
        logits = np.stack([sums[:, 0], sums[:, 1], 0 * sums[:, 0]], -1)
        results = {"last_hidden_state": tokens, "sentence_embedding": sums, "logits": logits}
        return {name: results[name] for name in outputs or self.signature.output_names}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    words = {word: i for i, word in enumerate(["[C]", "[S]", "a", "b", "c", "d", "e", "[P]"])}
    engine = tokenizers.Tokenizer(models.WordLevel(words, unk_token="e"))
    engine.pre_tokenizer = pre_tokenizers.Whitespace()
    engine.post_processor = processors.TemplateProcessing(
        single="[C] $A [S]",
        pair="[C] $A [S] $B:1 [S]:1",
        special_tokens=[("[C]", CLS), ("[S]", SEP)],
    )
    return Tokenizer(engine, SpecialTokens({}, None, (), PAD, {}))


def test_every_text_gets_its_own_tokens_back(tokenizer: Tokenizer) -> None:
    runner = Counter()
    texts: list[Any] = ["a b c", "d", ("a b", "c")]
    results = read_texts(runner, tokenizer, texts, batch_size=2)
    assert runner.shapes == [(2, 5), (1, 6)]
    assert [len(r["last_hidden_state"]) for r in results] == [5, 3, 6]
    assert results[1]["last_hidden_state"][:, 0].tolist() == [CLS, 5, SEP]
    assert results[2]["last_hidden_state"][:, 1].tolist() == [0, 0, 0, 0, 1, 1]
    np.testing.assert_array_equal(embeddings(results), [[10, 0], [6, 0], [11, 2]])


def test_only_what_is_asked_for_is_computed(tokenizer: Tokenizer) -> None:
    (result,) = read_texts(Counter(), tokenizer, ["a"], outputs=["logits"])
    assert list(result) == ["logits"] and result["logits"].shape == (3,)


def test_long_texts_are_refused_or_cut(tokenizer: Tokenizer) -> None:
    with pytest.raises(ConfigError, match="text 1 has 6 tokens; the model can see 5") as error:
        read_texts(Counter(), tokenizer, ["a", "a b c d"], limit=5)
    assert "truncate=True" in str(error.value.hint)
    results = read_texts(Counter(), tokenizer, ["a b c d"], limit=5, truncate=True)
    assert results[0]["last_hidden_state"][:, 0].tolist() == [CLS, 2, 3, 4, SEP]


@pytest.mark.parametrize(
    ("texts", "options", "said"),
    [
        ([], {}, "there is no text"),
        (["a"], {"batch_size": 0}, "a batch of 0 texts"),
        (["a"], {"limit": 2, "truncate": True}, "no room for a text in 2 tokens"),
    ],
)
def test_what_cannot_be_read(
    tokenizer: Tokenizer, texts: list[str], options: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        read_texts(Counter(), tokenizer, texts, **options)


def test_decoders_are_no_encoders(tokenizer: Tokenizer) -> None:
    decoder = causal_lm_signature(num_layers=1, num_kv_heads=1, head_dim=2, vocab_size=8)
    with pytest.raises(ExecutionError, match="decoder"):
        read_texts(Counter(decoder), tokenizer, ["a"])


def test_scores_of_classes() -> None:
    result = {"logits": np.array([0.0, math.log(3), -1e4], np.float32)}
    (found,) = predictions([result], {"id2label": {"0": "no", "1": "yes"}})
    assert found.label == "yes" and found.score == pytest.approx(0.75)
    assert found.scores == pytest.approx({"no": 0.25, "yes": 0.75, "LABEL_2": 0.0})
    config = {"problem_type": "multi_label_classification"}
    (found,) = predictions([result], config)
    assert list(found.scores.values()) == pytest.approx([0.5, 0.75, 0.0])
    (found,) = predictions([{"logits": np.array([-2.5], np.float32)}], {})
    assert found.score == -2.5


def test_an_output_of_another_form_is_none_to_embed_or_classify() -> None:
    with pytest.raises(ExecutionError, match="does not give one class a text"):
        tokens = encoder_signature({"logits": ("batch", "sequence", 3)}, token_types=False)
        require_output(tokens, "logits", rank=2, wanted="one class a text")
    require_output(SIGNATURE, "logits", rank=2, wanted="one class a text")
