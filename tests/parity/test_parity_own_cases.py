from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy_decoder import NumpyDecoder, V

from peft_deploy.errors import ConfigError
from peft_deploy.parity import CaseMatrix, Prompt, check
from peft_deploy.parity.own_cases import (
    GROUP,
    MAX_PROMPTS,
    MAX_TOKENS,
    check_own_prompts,
    read_own_prompts,
    with_own_texts,
)


def encode(text: str) -> list[int]:
    return [ord(letter) % V for letter in text]


def written(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, "utf-8")
    return path


def test_lines_are_prompts(tmp_path: Path) -> None:
    path = written(tmp_path, "cases.txt", "Hello, you\n\n  Wie geht es?  \n")
    prompts = read_own_prompts(path, encode)
    assert [p.text for p in prompts] == ["Hello, you", "Wie geht es?"]
    assert prompts[0].ids == tuple(encode("Hello, you"))


def test_objects_are_prompts_or_tokens(tmp_path: Path) -> None:
    lines = [{"prompt": "a\nb", "name": "two lines"}, {"ids": [3, 1, 2]}, {"prompt": " c"}]
    path = written(tmp_path, "cases.jsonl", "\n".join(map(json.dumps, lines)))
    prompts = read_own_prompts(path, encode)
    assert [p.text for p in prompts] == ["two lines", "3 tokens", " c"]
    assert [p.ids for p in prompts] == [tuple(encode("a\nb")), (3, 1, 2), tuple(encode(" c"))]
    path = written(tmp_path, "ids.jsonl", '{"ids": [3, 1]}')
    assert read_own_prompts(path, None)[0].ids == (3, 1)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.txt", "\n \n", "holds 0 prompts"),
        ("a.txt", "x\n" * (MAX_PROMPTS + 1), f"holds {MAX_PROMPTS + 1} prompts"),
        ("a.jsonl", '{"prompt": "a"}\n{"prompt"', "line 2 is not JSON"),
        ("a.jsonl", '["a"]', "line 1 holds a list"),
        ("a.jsonl", '{"promt": "a"}', "unknown key 'promt'"),
        ("a.jsonl", "{}", "line 1 needs either a prompt or ids"),
        ("a.jsonl", '{"prompt": "a", "ids": [1]}', "needs either a prompt or ids"),
        ("a.jsonl", '{"prompt": 3}', "the prompt is 3"),
        ("a.jsonl", '{"prompt": "a", "name": 3}', "the name is 3"),
        ("a.jsonl", '{"ids": [1, true]}', "list of whole numbers"),
        ("a.jsonl", '{"ids": []}', "list of whole numbers"),
        ("a.jsonl", '{"prompt": ""}', "has no tokens"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, name: str, text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        read_own_prompts(written(tmp_path, name, text), encode)


def test_files_that_are_no_text_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_own_prompts(tmp_path / "missing.txt", encode)
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_own_prompts(tmp_path / "binary.txt", encode)


def test_a_text_needs_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no tokenizer") as caught:
        read_own_prompts(written(tmp_path, "a.txt", "Hello"), None)
    assert caught.value.hint is not None and '{"ids"' in caught.value.hint


def test_prompts_have_to_fit_the_model() -> None:
    fits = {"vocab_size": 10, "max_positions": 20, "new_tokens": 8}
    check_own_prompts([Prompt("a", (0, 9) * 6)], **fits)
    with pytest.raises(ConfigError, match="has the token 10; the model's are 0 to 9"):
        check_own_prompts([Prompt("a", (1, 10))], **fits)
    with pytest.raises(ConfigError, match="13 tokens; with 8 new ones"):
        check_own_prompts([Prompt("a", (1,) * 13)], **fits)


OWN = [
    Prompt("short", (7,)),
    Prompt("five", (1, 2, 3, 4, 5)),
    Prompt("long", tuple(range(50)) * 2),
]


def test_every_prompt_is_in_the_matrix(matrix: CaseMatrix) -> None:
    extended = with_own_texts(matrix, OWN)
    assert extended.cases[: len(matrix.cases)] == matrix.cases
    own = [case for case in extended.cases if case.group == GROUP]
    assert len({case.name for case in extended.cases}) == len(extended.cases)
    assert [case.calls for case in own] == [(1,), (5,), (64,), (2, 1, 1, 1), (61, 1, 1, 1), (66,)]
    assert (own[2].input_ids[0] == OWN[2].ids[:MAX_TOKENS]).all()
    padded = own[-1]
    assert padded.counts.sum(1).tolist() == [1, 5, 64]


def test_a_fault_that_only_a_users_prompt_meets_is_found(
    reference: NumpyDecoder, good_bundle: NumpyDecoder, matrix: CaseMatrix
) -> None:
    """An embedding that is wrong for one token, which no other text has."""
    token = next(iter(set(range(V)) - {int(i) for t in matrix.texts for i in t.ids}), None)
    assert token is not None
    own = [Prompt("rare", (1, token, 2))]
    embed = good_bundle.base["embed"].copy()
    embed[token] *= 1.05
    # the head is tied to it, so that it is put right there
    wrong = WrongRow(good_bundle.base | {"wrong": embed})
    reports = [
        check(reference, bundle, m)
        for bundle in (good_bundle, wrong)
        for m in (matrix, with_own_texts(matrix, own))
    ]
    assert [report.passed for report in reports] == [True, True, True, False]
    failed = [case for case in reports[-1].cases if not case.passed]
    assert {case.group for case in failed} == {GROUP}


class WrongRow(NumpyDecoder):
    def run(self, feeds, outputs=None):  # type: ignore[no-untyped-def]
        embed = self.base["embed"]
        results = replace(self, base=self.base | {"embed": self.base["wrong"]})
        inside = NumpyDecoder.run(results, feeds, outputs)
        changed = np.any(self.base["wrong"] != embed, axis=1)
        inside["logits"][..., changed] = NumpyDecoder.run(
            replace(self, base={k: v for k, v in self.base.items() if k != "wrong"}), feeds
        )["logits"][..., changed]
        return inside
