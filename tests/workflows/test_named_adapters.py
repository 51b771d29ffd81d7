"""What an adapter is called in a bundle."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import MagicMock

import pytest

from peft_deploy.errors import ConfigError
from peft_deploy.workflows import sources


@pytest.fixture(autouse=True)
def _unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the name matters here; the folder is handed on unread."""
    for reader in ("read_adapter", "read_lora"):
        monkeypatch.setattr(sources, reader, lambda path, *_, **__: path, raising=False)


@pytest.mark.parametrize(
    ("folder", "name"),
    [("plain", "plain"), ("my adapter ü", "my-adapter-ü"), ("a=b", "a-b"), ("...", "default")],
)
def test_any_folder_gets_a_name(tmp_path: Path, folder: str, name: str) -> None:
    (tmp_path / folder).mkdir()

    named = sources.read_named(str(tmp_path / folder), MagicMock())

    assert named.name == name
    assert str(named.adapter) == str(tmp_path / folder)


@pytest.mark.parametrize("name", ["a b", "../a", "..", "a:b"])
def test_a_given_name_is_taken_as_it_is_or_refused(tmp_path: Path, name: str) -> None:
    assert sources.read_named(f"given={tmp_path}", MagicMock()).name == "given"
    with pytest.raises(ConfigError, match="letters, digits"):
        sources.read_named(f"{name}={tmp_path}", MagicMock())
