from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from peft_deploy.base import open_base
from peft_deploy.text import Tokenizer


def read(folder: Path) -> dict[str, np.ndarray]:
    tensors = open_base(folder).tensors
    return {name: np.array(tensors.read(name)) for name in tensors.names()}


@pytest.mark.parametrize("tied", [False, True])
def test_every_form_holds_the_same_model(
    tiny_llama_module: ModuleType, make_tiny_llama: Callable[..., Path], tied: bool
) -> None:
    wanted = read(make_tiny_llama(tied=tied))
    assert ("lm_head.weight" in wanted) is not tied
    forms = itertools.product(tiny_llama_module.LAYOUTS, tiny_llama_module.CONTAINERS)
    for layout, container in forms:
        found = read(make_tiny_llama(layout=layout, container=container, tied=tied))
        assert found.keys() == wanted.keys()
        for name, array in wanted.items():
            np.testing.assert_array_equal(found[name], array)


@pytest.mark.parametrize("container", ["safetensors", "pdparams"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_16_bit_weights_are_the_float32_ones_rounded_once(
    tiny_llama_module: ModuleType,
    make_tiny_llama: Callable[..., Path],
    dtype: str,
    container: str,
) -> None:
    exact, rounded = (
        read(make_tiny_llama()),
        read(make_tiny_llama(dtype=dtype, container=container)),
    )
    for name, array in exact.items():
        assert rounded[name].dtype == tiny_llama_module.DTYPES[dtype]
        np.testing.assert_array_equal(rounded[name], array.astype(rounded[name].dtype))


def test_the_seed_decides_and_sizes_can_be_replaced(make_tiny_llama: Callable[..., Path]) -> None:
    one, same = read(make_tiny_llama(seed=1)), read(make_tiny_llama(seed=1))
    other = read(make_tiny_llama(seed=2, num_hidden_layers=3))
    assert all(np.array_equal(same[name], array) for name, array in one.items())
    assert len(other) == len(one) + 9
    assert all(not np.array_equal(other[name], array) for name, array in one.items())


def test_wrong_options_are_named(make_tiny_llama: Callable[..., Path]) -> None:
    for options, said in (
        ({"layout": "torch"}, "'torch' is none of huggingface, paddlenlp"),
        ({"num_layers": 3}, "no entry num_layers"),
        ({"hidden_size": 50}, "has to be hidden_size"),
        ({"num_key_value_heads": 4}, "has to divide"),
    ):
        with pytest.raises(ValueError, match=said):
            make_tiny_llama(**options)


def test_the_tokenizer_covers_ascii_and_has_a_chat_template(tiny_llama: Path) -> None:
    tokenizer = Tokenizer.from_folder(tiny_llama)
    text = "".join(map(chr, range(32, 127))) + "\nthe other thing"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert (
        tokenizer.vocab_size == json.loads((tiny_llama / "config.json").read_text())["vocab_size"]
    )
    assert tokenizer.chat([{"role": "user", "content": "Hi"}]) == "<s>user\nHi</s>\n<s>assistant\n"
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.pad_id) == (1, (2,), 0)
