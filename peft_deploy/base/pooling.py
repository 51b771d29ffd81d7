"""How a folder of sentence-transformers says that its texts become vectors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft_deploy.errors import CheckpointError, ConfigError, UnsupportedModelError
from peft_deploy.families import Family, Pooling
from peft_deploy.families.pooling import POOLING

NO_POOLING = "none"
MODULES = "modules.json"
_POOLING_CONFIG = "config.json"
_MODES = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}
_KNOWN = ("Transformer", "Pooling", "Normalize")
_HINT = "leave sentence embeddings out with --pooling none, or choose another: --pooling mean|cls"


def with_pooling(
    family: Family, config: Mapping[str, Any], folder: Path | None, asked: str | Pooling | None
) -> dict[str, Any]:
    """A configuration with the pooling of sentence embeddings in it.

    Args:
        family: of the model.
        config: its config.json, which may have a pooling already.
        folder: where files of sentence-transformers may be.
        asked: ``mean`` or ``cls`` in place of what the files say, ``none`` for no sentence embeddings, or all of it.

    Raises:
        ConfigError: a pooling was asked for that is unknown, or for a model that gives no hidden states.
        CheckpointError, UnsupportedModelError: see :func:`read_pooling`.
    """
    if asked not in (None, NO_POOLING) and not family.pools(config):
        raise ConfigError(
            f"a {family.paddle_model(config)} gives no hidden states that could be pooled to "
            "sentence embeddings",
            hint="leave --pooling out",
        )
    if asked == NO_POOLING:
        return {key: value for key, value in config.items() if key != POOLING}
    if isinstance(asked, Pooling):
        return asked.into(config)
    if asked is not None:
        normalize = folder is not None and normalizes(folder)
        return Pooling(mode=asked, normalize=normalize).into(config)
    if folder is None or not family.pools(config) or config.get(POOLING) is not None:
        return dict(config)
    own = read_pooling(folder)
    return dict(config) if own is None else own.into(config)


def read_pooling(folder: Path) -> Pooling | None:
    """The pooling of a sentence-transformers folder; None for any other folder.

    Raises:
        CheckpointError: one of its files cannot be read.
        UnsupportedModelError: it does something else than take the mean or the first token.
    """
    modules = _modules(folder)
    kinds = _kinds(modules)
    if unknown := [kind for kind in kinds if kind not in _KNOWN]:
        raise UnsupportedModelError(
            f"{folder / MODULES} has the module {unknown[0]!r}; exported are {', '.join(_KNOWN)}",
            hint=_HINT,
        )
    if "Pooling" not in kinds:
        return None
    entry = modules[kinds.index("Pooling")]
    config = _read(folder / str(entry.get("path", "")) / _POOLING_CONFIG)
    return Pooling(mode=_mode(folder, config), normalize="Normalize" in kinds)


def normalizes(folder: Path) -> bool:
    """Whether a sentence-transformers folder divides vectors by their length; False for any other folder."""
    return "Normalize" in _kinds(_modules(folder))


def _modules(folder: Path) -> list[dict[str, Any]]:
    path = folder / MODULES
    if not path.is_file():
        return []
    modules = _read(path)
    if not isinstance(modules, list) or not all(isinstance(m, dict) for m in modules):
        raise CheckpointError(f"{path} is not a list of modules")
    return modules


def _kinds(modules: list[dict[str, Any]]) -> list[str]:
    return [str(module.get("type", "")).rpartition(".")[2] for module in modules]


def _mode(folder: Path, config: Any) -> str:
    if not isinstance(config, dict):
        raise CheckpointError(f"{folder}: the configuration of the pooling is not an object")
    active = [key for key, on in config.items() if key.startswith("pooling_mode_") and on is True]
    named = config.get("pooling_mode")  # what newer releases write
    if not active and isinstance(named, str):
        active = [f"pooling_mode_{named}_token", f"pooling_mode_{named}_tokens"]
        active = [key for key in active if key in _MODES] or [named]
    if len(active) != 1 or active[0] not in _MODES:
        raise UnsupportedModelError(
            f"{folder} pools by {' and '.join(active) or 'nothing that is known'}; "
            "exported are the mean of the tokens and the first token",
            hint=_HINT,
        )
    return _MODES[active[0]]


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as exc:
        raise CheckpointError(f"{path} cannot be read: {exc}") from exc
