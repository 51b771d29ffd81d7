from __future__ import annotations

import datetime
from pathlib import Path

import pytest
import tiny_tokenizers as tiny

from peft_deploy.errors import CheckpointError, ConfigError
from peft_deploy.text import ChatTemplate, Tokenizer

CONFIG = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": None}
TEMPLATE = """\
{% for message in messages %}
    {% if message['role'] not in ('system', 'user', 'assistant') %}
        {{ raise_exception('no role ' + message['role']) }}
    {% endif %}
<|im_start|>{{ message.role }}
{{ message.content | trim }}<|im_end|>
{% endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant
{% endif %}
"""
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": " Hi & <b> "}]


def folder_with(tmp_path: Path, template: object, engine=tiny.byte_level) -> Path:
    config = {**CONFIG, "chat_template": template}
    return tiny.write(tmp_path, engine(), tokenizer_config=config)


def render(source: str, messages=MESSAGES, **options: bool) -> str:
    return ChatTemplate(source, "here", {"eos_token": "</s>"}).render(messages, **options)


def test_messages_become_one_text_with_block_lines_trimmed(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(folder_with(tmp_path, TEMPLATE))
    turns = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi & <b><|im_end|>\n"
    assert tokenizer.chat(MESSAGES) == turns + "<|im_start|>assistant\n"
    assert tokenizer.chat(MESSAGES, add_generation_prompt=False) == turns


def test_no_special_token_is_added_to_what_the_template_made(tmp_path: Path) -> None:
    source = "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}"
    folder = folder_with(tmp_path, source, tiny.sentencepiece_like)
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.encode("the")[0] == tiny.BOS
    ids = tokenizer.chat_ids([{"role": "user", "content": "the cat"}])
    assert ids.count(tiny.BOS) == 1 and ids[0] == tiny.BOS and ids[-1] == tiny.EOS


def test_the_file_goes_before_the_configuration(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, "from the configuration")
    assert Tokenizer.from_folder(folder).chat(MESSAGES) == "from the configuration"
    (folder / "chat_template.jinja").write_text("from the file", "utf-8")
    assert Tokenizer.from_folder(folder).chat(MESSAGES) == "from the file"


def test_of_named_templates_the_default_is_taken(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    assert Tokenizer.from_folder(folder_with(tmp_path, named)).chat(MESSAGES) == "plain"


def test_no_template_is_an_error_only_when_one_is_needed(tmp_path: Path) -> None:
    for template in (None, [{"name": "tool_use", "template": "tools"}]):
        tokenizer = Tokenizer.from_folder(folder_with(tmp_path, template))
        with pytest.raises(ConfigError, match="has no chat template"):
            tokenizer.chat(MESSAGES)


def test_a_template_that_is_no_text_or_no_jinja(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"chat_template of .* is a int"):
        Tokenizer.from_folder(folder_with(tmp_path, 3))
    with pytest.raises(CheckpointError, match=r"is not valid: .*endif"):
        Tokenizer.from_folder(folder_with(tmp_path, "{% if messages %}"))


def test_what_a_template_raises_reaches_the_user() -> None:
    with pytest.raises(ConfigError, match="the chat template of here refuses: no role robot"):
        render(TEMPLATE, [{"role": "robot", "content": "beep"}])
    with pytest.raises(ConfigError, match="message 1 has no content"):
        render(TEMPLATE, [MESSAGES[0], {"role": "user"}])
    with pytest.raises(ConfigError, match=r"refuses: .*undefined"):
        render("{{ nothing.at_all }}")


def test_the_sandbox_keeps_templates_from_python_and_from_the_messages() -> None:
    with pytest.raises(ConfigError, match="unsafe"):
        render("{{ messages.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(ConfigError, match="unsafe"):
        render("{{ messages.append(1) }}")


def test_what_huggingface_templates_rely_on() -> None:
    assert render("{{ messages[1] | tojson }}") == '{"role": "user", "content": " Hi & <b> "}'
    assert render("{{ [1, 'ü'] | tojson(indent=1) }}") == '[\n 1,\n "ü"\n]'
    year = str(datetime.datetime.now().astimezone().year)
    assert render("{{ strftime_now('%Y') }}") in (year, str(int(year) + 1))
    loop = (
        "{% for m in messages %}{% if loop.index0 %}{% break %}{% endif %}{{ m.role }}{% endfor %}"
    )
    assert render(loop) == "system"
    assert render("a{% generation %}b{{ eos_token }}{% endgeneration %}c") == "ab</s>c"
    assert render("{% if tools is none and documents is none %}none{% endif %}") == "none"
    assert render("[{{ pad_token }}]") == "[]"
