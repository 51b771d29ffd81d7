from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from peft_deploy.errors import ConfigError
from peft_deploy.text import ChatTemplate, Tokenizer
from peft_deploy.training import Chat, Completion, Encoded, Text, encode_records
from peft_deploy.training.batches import IGNORED, Collator, Examples, SeededBatches, step_seed
from peft_deploy.training.encoding import Example
from peft_deploy.training.records import Record

FILE = Path("data.jsonl")


@pytest.fixture(scope="module")
def tokenizer(tiny_llama: Path) -> Tokenizer:
    return Tokenizer.from_folder(tiny_llama)


def said(tokenizer: Tokenizer, example: Example) -> str:
    learned = [i for i, counts in zip(example.ids, example.learned, strict=True) if counts]
    return tokenizer.decode(learned, skip_special=False)


def encoded(tokenizer: Tokenizer, *records: Record, max_length: int = 200) -> Encoded:
    return encode_records(records, tokenizer, max_length, FILE)


def test_only_the_completion_and_the_end_are_learned(tokenizer: Tokenizer) -> None:
    (example,) = encoded(tokenizer, Completion(1, "Say it: ", "the thing")).examples
    assert tokenizer.decode(example.ids, skip_special=False) == "Say it: the thing</s>"
    assert said(tokenizer, example) == "the thing</s>"


def test_a_text_is_learned_whole(tokenizer: Tokenizer) -> None:
    (example,) = encoded(tokenizer, Text(1, "All of it")).examples
    assert said(tokenizer, example) == "All of it</s>"
    assert all(example.learned)


def test_only_the_assistants_turns_are_learned(tokenizer: Tokenizer) -> None:
    messages = (
        {"role": "system", "content": "Be brief"},
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "first answer"},
        {"role": "user", "content": "Two?"},
        {"role": "assistant", "content": "second answer"},
    )
    (example,) = encoded(tokenizer, Chat(1, messages)).examples
    whole = tokenizer.chat(messages, add_generation_prompt=False)
    assert tokenizer.decode(example.ids, skip_special=False) == whole
    # Not the template's line feed behind the end token: nobody generates that far.
    assert said(tokenizer, example) == "first answer</s>second answer</s>"


def test_what_is_generated_from_has_the_very_tokens_that_were_trained(
    tokenizer: Tokenizer,
) -> None:
    question = {"role": "user", "content": "the other in"}
    chat = Chat(1, (question, {"role": "assistant", "content": "an answer"}))
    (example,) = encoded(tokenizer, chat).examples
    prompt = tokenizer.chat_ids([question])
    assert list(example.ids[: len(prompt)]) == prompt
    assert not any(example.learned[: len(prompt)])


def test_a_template_that_rewrites_history_is_refused(tokenizer: Tokenizer) -> None:
    source = "{% for m in messages %}[{{ loop.revindex }}:{{ m['content'] }}]{% endfor %}"
    odd = Tokenizer(tokenizer._engine, tokenizer.special, ChatTemplate(source, "x", {}))
    question = {"role": "user", "content": "q"}
    answer = {"role": "assistant", "content": "a"}
    with pytest.raises(ConfigError, match=r"line 7: the chat template changes"):
        encoded(odd, Chat(7, (question, answer)))


def test_cut_and_dropped_examples_are_reported(tokenizer: Tokenizer) -> None:
    kept = Completion(1, "ab", "cd")
    cut = Completion(2, "ab", "cdefghijkl")
    hopeless = Completion(3, "abcdefghijkl", "x")
    result = encoded(tokenizer, kept, cut, hopeless, max_length=6)
    assert [len(e.ids) for e in result.examples] == [5, 6]
    assert result.truncated == (2, 3)
    assert result.dropped == (3,)
    remarks = result.remarks(FILE, 6)
    assert "2 examples are longer than 6 tokens and were cut (line 2, 3)" in remarks[0]
    assert "1 examples were left out" in remarks[1]
    with pytest.raises(ConfigError, match="no example has anything to learn"):
        encoded(tokenizer, hopeless, max_length=6)


def test_labels_are_the_tokens_that_follow() -> None:
    short = Example((5, 6, 7), (False, True, True))
    longer = Example((8, 9, 10, 11), (False, False, False, True))
    batch = Collator(pad_id=0)([short, longer])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 0], [8, 9, 10, 11]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    no = IGNORED
    assert batch["labels"].tolist() == [[6, 7, no, no], [no, no, 11, no]]
    assert all(array.dtype == np.int64 for array in batch.values())


def test_the_order_follows_from_seed_and_epoch_alone() -> None:
    examples = Examples([Example((i, i), (False, True)) for i in range(10)])

    def order(seed: int, epoch: int) -> list[list[int]]:
        sampler = SeededBatches(examples, 4, seed)
        list(sampler)  # an epoch that went before leaves no mark
        sampler.set_epoch(epoch)
        return [list(batch) for batch in sampler]

    assert order(1, 2) == order(1, 2)
    assert order(1, 2) != order(1, 3)
    assert order(1, 2) != order(2, 2)
    assert sorted(i for batch in order(1, 2) for i in batch) == list(range(10))
    shares = [
        [i for b in SeededBatches(examples, 2, 3, ranks=2, rank=rank) for i in b]
        for rank in (0, 1)
    ]
    assert sorted(shares[0] + shares[1]) == list(range(10))


def test_batches_that_fill_no_step_are_left_out() -> None:
    examples = Examples([Example((i, i), (False, True)) for i in range(10)])
    batches = SeededBatches(examples, 2, 0, accumulation=2)
    assert len(batches) == len(list(batches)) == 4


def test_dropout_seeds_differ_in_every_direction() -> None:
    seeds = {step_seed(s, t, p, r) for s in (0, 1) for t in (0, 1) for p in (0, 1) for r in (0, 1)}
    assert len(seeds) == 16
