"""Models that are named rather than lying in a folder: PaddleNLP downloads them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

from peft_deploy.environment import require_paddle
from peft_deploy.errors import CheckpointError

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")

# In PaddleNLP's order of preference; an index names its shards.
_WEIGHTS = (
    "model.safetensors.index.json",
    "model.safetensors",
    "model_state.pdparams.index.json",
    "model_state.pdparams",
)
_OPTIONAL = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
)

Fetch = Callable[[str, str], "str | None"]


def download(name: str, fetch: Fetch | None = None) -> Path:
    """The local folder of a model that PaddleNLP's download service knows under ``name``.

    Args:
        name: ``"facebook/llama-7b"`` or a PaddleNLP built-in name.
        fetch: ``fetch(name, file) -> local path or None``; PaddleNLP's downloader when not given.

    Raises:
        CheckpointError: it is neither a folder nor a name that can be downloaded.
    """
    missing = CheckpointError(
        f"--base {name} is neither a folder nor a model that PaddleNLP can download",
        hint="give a folder with a config.json and weights, or a name such as facebook/llama-7b",
    )
    if not _HUB_NAME.fullmatch(name) or name.startswith("."):
        raise missing
    fetch = fetch or _paddlenlp_fetch
    config = fetch(name, "config.json")
    if config is None:
        raise missing
    for file in _WEIGHTS:
        if path := fetch(name, file):
            if file.endswith(".index.json"):
                _fetch_shards(name, Path(path), fetch)
            break
    else:
        raise CheckpointError(f"{name} has a config.json but none of {', '.join(_WEIGHTS)}")
    for file in _OPTIONAL:
        fetch(name, file)
    return Path(config).parent


def _fetch_shards(name: str, index: Path, fetch: Fetch) -> None:
    try:
        shards = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError) as exc:
        raise CheckpointError(f"{index} cannot be read: {exc}") from exc
    for shard in shards:
        if fetch(name, shard) is None:
            raise CheckpointError(
                f"{name}: {index.name} names {shard}, which cannot be downloaded"
            )


def _paddlenlp_fetch(name: str, file: str) -> str | None:
    require_paddle(f"downloading {name}")
    from paddlenlp.utils.download import resolve_file_path

    try:
        path: str | None = resolve_file_path(name, file)
    except (OSError, ValueError):  # what PaddleNLP raises for no network and for no such file
        return None
    return path
