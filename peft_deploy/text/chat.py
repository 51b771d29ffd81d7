"""Chat templates: a list of messages as the one text that the model was trained on."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_deploy.errors import CheckpointError, ConfigError
from peft_deploy.text.special_tokens import TOKENIZER_CONFIG

if TYPE_CHECKING:
    from jinja2 import Environment

TEMPLATE_FILE = "chat_template.jinja"
Message = Mapping[str, Any]


class ChatTemplate:
    """A Jinja template in the dialect of Hugging Face tokenizers, run in a sandbox.

    Args:
        source: the template.
        origin: the file that it came from, for messages.
        special_tokens: ``bos_token``, ``eos_token``, … → text; templates use them as variables.

    Raises:
        CheckpointError: the template is not valid Jinja.
    """

    def __init__(self, source: str, origin: str, special_tokens: Mapping[str, str]) -> None:
        from jinja2 import TemplateError

        self.source = source
        self._origin = origin
        self._special_tokens = dict(special_tokens)
        try:
            self._template = _environment().from_string(source)
        except TemplateError as exc:
            raise CheckpointError(f"the chat template of {origin} is not valid: {exc}") from exc

    @classmethod
    def from_folder(
        cls, folder: Path, tokenizer_config: Mapping[str, Any], special_tokens: Mapping[str, str]
    ) -> ChatTemplate | None:
        """The template of a model or bundle folder; None when it has none.

        ``chat_template.jinja`` goes before the entry in ``tokenizer_config.json``; of several
        named templates the one called ``default`` is taken.
        """
        path = folder / TEMPLATE_FILE
        try:
            return cls(path.read_text("utf-8"), str(path), special_tokens)
        except FileNotFoundError:
            pass
        except (OSError, ValueError) as exc:
            raise CheckpointError(f"{path} cannot be read: {exc}") from exc
        source = tokenizer_config.get("chat_template")
        if isinstance(source, list):
            source = {entry.get("name"): entry.get("template") for entry in source}.get("default")
        if source is None:
            return None
        if not isinstance(source, str):
            raise CheckpointError(
                f"chat_template of {folder / TOKENIZER_CONFIG} is a {type(source).__name__}, "
                "and should be a text or a list of named texts"
            )
        return cls(source, str(folder / TOKENIZER_CONFIG), special_tokens)

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
        """The messages as one text.

        Args:
            messages: ``role`` and ``content`` of each, in order.
            add_generation_prompt: end with the header of the assistant's turn, for the model to go
                on from.

        Raises:
            ConfigError: a message without a role or content, or the template refuses the messages.
        """
        from jinja2 import TemplateError

        for index, message in enumerate(messages):
            missing = {"role", "content"} - set(message)
            if missing:
                raise ConfigError(
                    f"message {index} has no {' and no '.join(sorted(missing))}; "
                    f"it has {sorted(message)}"
                )
        try:
            return self._template.render(
                messages=[dict(message) for message in messages],
                add_generation_prompt=add_generation_prompt,
                tools=None,
                documents=None,
                **self._special_tokens,
            )
        except (TemplateError, TypeError) as exc:
            raise ConfigError(f"the chat template of {self._origin} refuses: {exc}") from exc


def _environment() -> Environment:
    from jinja2 import TemplateError
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    from peft_deploy.text._generation_tag import GenerationTag

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def strftime_now(form: str) -> str:
        return datetime.datetime.now().astimezone().strftime(form)

    def tojson(value: Any, indent: int | None = None, **options: Any) -> str:
        # Jinja's own filter escapes <, > and & for HTML, which would change the prompt.
        options.setdefault("ensure_ascii", False)
        return json.dumps(value, indent=indent, **options)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, GenerationTag]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    return environment
