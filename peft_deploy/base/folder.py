"""A base model on disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from peft_deploy.base.pooling import with_pooling
from peft_deploy.config.json_file import read_object
from peft_deploy.errors import CheckpointError, listed
from peft_deploy.families import Family, ModelDims, NameMap, Pooling, find_family
from peft_deploy.weights import CanonicalTensors, open_checkpoint

CONFIG = "config.json"
_ADAPTER_CONFIGS = ("lora_config.json", "prefix_config.json", "adapter_config.json")
_WEIGHTS = ("model.safetensors", "model-", "model_state")  # how weight files of base models begin

# Files that travel with a model into a bundle, when they are there: what tokenizes and what ends a text.
COMPANIONS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "tokenizer.model",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
)


@dataclass(frozen=True)
class BaseModel:
    """A folder that holds a model of a registered family.

    Args:
        path: the folder.
        config: its config.json, as written (PaddleNLP's or Hugging Face's), and in it how its sentence embeddings
            are pooled, wherever that came from.
        family: the family that claims it.
    """

    path: Path
    config: Mapping[str, Any]
    family: Family

    @cached_property
    def tensors(self) -> CanonicalTensors:
        """The weights, in PaddleNLP's names and layout. Opening reads names and shapes only.

        Raises:
            CheckpointError: weights missing, damaged, or of another layout than either known one.
        """
        tied = self.family.tied(self.config)
        return CanonicalTensors(open_checkpoint(self.path), self.names, tied)

    @cached_property
    def names(self) -> NameMap:
        """Hugging Face's names of its tensors and PaddleNLP's."""
        return self.family.names(self.config)

    @property
    def dims(self) -> ModelDims:
        """The model's sizes."""
        return self.family.dims(self.config)

    @property
    def name(self) -> str:
        """The folder's name, for messages and the manifest."""
        return self.path.resolve().name

    @cached_property
    def fingerprint(self) -> str:
        """Identifies the weights, whatever the layout or file format they are stored in."""
        return self.tensors.fingerprint()

    def check_names(self) -> None:
        """Fails when the weights are not those of a model with this many layers. Reads no data.

        Raises:
            CheckpointError: names are missing, or unexpected.
        """
        expected = self.names.parameters(self.dims.num_layers)
        expected -= self.tensors.tied.keys()
        found = set(self.tensors.names())
        found |= self.family.unused(self.config) & expected
        if found != expected:
            raise CheckpointError(
                f"{self.path}: the weights are not those of a model with "
                f"{self.dims.num_layers} layers, as its {CONFIG} says"
                + (f"; missing:\n{listed(expected - found)}" if expected - found else "")
                + (f"; unexpected:\n{listed(found - expected)}" if found - expected else "")
            )

    def check(self, expected: Mapping[str, tuple[int, ...]]) -> None:
        """Compares names and shapes with those of the model.

        Args:
            expected: PaddleNLP's parameter → shape.

        Raises:
            CheckpointError: what is missing, not expected, or of another shape.
        """
        absent = self.family.unused(self.config) - set(self.tensors.names())
        self.tensors.check({n: shape for n, shape in expected.items() if n not in absent})

    def pooled(self, asked: str | Pooling | None) -> BaseModel:
        """The same model with a pooling of sentence embeddings; see :func:`~peft_deploy.base.pooling.with_pooling`.

        Raises:
            ConfigError: it gives no hidden states that could be pooled.
        """
        config = with_pooling(self.family, self.config, self.path, asked)
        return replace(self, config=config, family=find_family(config))

    def with_layers(self, layers: Sequence[int]) -> BaseModel:
        """A model of some of this one's layers, with its embeddings and its head.

        Args:
            layers: their indices, in order.

        Raises:
            UnsupportedModelError: the configuration does not say where others do how many layers there are.
        """
        config = self.family.with_num_layers(self.config, len(layers))
        return _ShortenedModel(self.path, config, self.family, self, tuple(layers))

    def companions(self) -> list[Path]:
        """Tokenizer and generation files that are there."""
        return companions_in(self.path)


@dataclass(frozen=True)
class _ShortenedModel(BaseModel):
    """Some layers of another model.

    Args:
        whole: that model.
        layers: its indices of these layers.
    """

    whole: BaseModel
    layers: tuple[int, ...]

    @cached_property
    def tensors(self) -> CanonicalTensors:
        """The weights of these layers and of what is around them, the layers counted anew."""
        known = set(self.whole.tensors.names())
        names = self.names.with_layers(self.layers)
        return self.whole.tensors.renamed({n: old for n, old in names.items() if old in known})


def companions_in(folder: Path) -> list[Path]:
    """Tokenizer and generation files in a folder."""
    return [folder / name for name in COMPANIONS if (folder / name).is_file()]


def open_base(path: str | Path, pooling: str | Pooling | None = None) -> BaseModel:
    """The base model in a folder, or under a name that PaddleNLP can download.

    Args:
        path: the folder or the name.
        pooling: of sentence embeddings: ``mean`` or ``cls`` in place of what the folder says, ``none`` for none, or
            all of it; None does what the folder says.

    Raises:
        ConfigError: a pooling for a model that gives no hidden states, or an unknown one.
        CheckpointError: no such folder and no such name; no config.json; a config.json that lacks what its
            family needs.
        UnsupportedModelError: no family claims it, or its family refuses it.
    """
    if not str(path).strip():
        raise CheckpointError("--base is empty", hint="give the base model's folder")
    folder = Path(path).expanduser()
    if not folder.exists():
        from peft_deploy.base.hub import download

        folder = download(str(path))
    if not folder.is_dir():
        raise CheckpointError(
            f"--base {folder} is a file; it must be a folder with a {CONFIG} and weights",
            hint=f"try --base {folder.parent}",
        )
    config = _read_config(folder)
    _refuse_adapter(folder)
    _check_entries(folder / CONFIG, config)
    family = find_family(config)
    try:
        family.paddle_arguments(config)
        sizes = asdict(family.dims(config))
    except KeyError as exc:
        raise CheckpointError(f"{folder / CONFIG} lacks the entry {exc}") from exc
    except (TypeError, ValueError, ArithmeticError, AttributeError) as exc:
        raise CheckpointError(f"{folder / CONFIG} has an entry of the wrong type: {exc}") from exc
    if odd := {name: size for name, size in sizes.items() if type(size) is not int or size < 1}:
        raise CheckpointError(
            f"{folder / CONFIG} gives sizes that are no positive whole numbers: {odd}"
        )
    return BaseModel(folder, config, family).pooled(pooling)


def _check_entries(path: Path, config: Mapping[str, Any]) -> None:
    """The entries that every reader relies on.

    Raises:
        CheckpointError: one has another type than it should.
    """
    named = config.get("architectures")
    if named is not None and not _is_list_of(str, named):
        raise CheckpointError(f"{path}: architectures is {named!r}, not a list of names")
    for key, several in (("bos_token_id", False), ("eos_token_id", True), ("pad_token_id", False)):
        value = config.get(key)
        if type(value) is int or value is None or (several and _is_list_of(int, value)):
            continue
        raise CheckpointError(f"{path}: {key} is {value!r}, not a token's number")


def _is_list_of(kind: type, value: object) -> bool:
    return isinstance(value, list) and all(type(item) is kind for item in value)


def _refuse_adapter(folder: Path) -> None:
    """Adapter folders have a config.json too, the base model's."""
    if is_adapter(folder) and not any(p.name.startswith(_WEIGHTS) for p in folder.iterdir()):
        raise CheckpointError(
            f"{folder} is an adapter, not a base model",
            hint="pass it with --adapter, and the model that it was trained on with --base",
        )


def is_adapter(folder: Path) -> bool:
    """Whether the folder holds an adapter's configuration."""
    return any((folder / name).is_file() for name in _ADAPTER_CONFIGS)


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        there = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
        raise CheckpointError(
            f"{folder} has no {CONFIG}; it holds {there}",
            hint="this is an adapter: pass it with --adapter" if is_adapter(folder) else None,
        )
    return read_object(path, CheckpointError)
