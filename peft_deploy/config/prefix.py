"""PrefixConfig: the options of one prefix-tuning adapter, and ``prefix_config.json``."""

from __future__ import annotations

import os
import warnings
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from peft_deploy.config.errors import PrefixConfigError
from peft_deploy.config.json_file import make_folder, read_object, write_json
from peft_deploy.errors import nearest

PREFIX_CONFIG_NAME = "prefix_config.json"
PREFIX_DTYPES = ("float32", "float16", "bfloat16", "float64")
_SIZES = (
    "num_prefix_tokens",
    "num_attention_heads",
    "multi_query_group_num",
    "num_hidden_layers",
    "hidden_size",
    "prefix_projection_hidden_size",
)


@dataclass
class PrefixConfig:
    """The options of one prefix; names, order and defaults are those of
    ``paddlenlp.peft.PrefixConfig`` (prefix-tuning: arXiv 2101.00190).

    Sizes that are None are filled in from the model when a PrefixModelForCausalLM is made.

    Args:
        prefix_dropout: probability of zeroing an element of the prefix's keys and values while
            training, in [0, 1).
        num_prefix_tokens: P, the number of prefix tokens.
        num_attention_heads: H, the model's query heads.
        multi_query_group_num: K, the model's key and value heads where they are fewer than H.
        num_hidden_layers: L, the model's layers.
        hidden_size: E, the width of the model.
        prefix_projection: whether the prefix comes out of an embedding through two linear layers
            with a tanh between them, or directly out of an embedding.
        prefix_projection_hidden_size: the width between those linear layers; with a projection,
            None means E.
        tensor_parallel_degree: number of tensor-parallel ranks that the files were written for.
        dtype: element type of the prefix's parameters, None for Paddle's default.

    Raises:
        PrefixConfigError: a value is out of range; also a ValueError.
    """

    prefix_dropout: float = 0.0
    num_prefix_tokens: int | None = None
    num_attention_heads: int | None = None
    multi_query_group_num: int | None = None
    num_hidden_layers: int | None = None
    hidden_size: int | None = None
    prefix_projection: bool = False
    prefix_projection_hidden_size: int | None = None
    tensor_parallel_degree: int = -1
    dtype: str | None = None

    def __post_init__(self) -> None:
        self.validate()

    def validate(self) -> None:
        """Checks every value that is given.

        Raises:
            PrefixConfigError: a value is out of range.
        """
        for name in _SIZES:
            value = getattr(self, name)
            if value is not None and (not _is_int(value) or value <= 0):
                raise PrefixConfigError(f"{name} is {value!r}; it has to be a positive integer")
        rate = self.prefix_dropout
        if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 <= rate < 1:
            raise PrefixConfigError(f"prefix_dropout is {rate!r}; it has to be in [0, 1)")
        if not isinstance(self.prefix_projection, bool):
            raise PrefixConfigError(
                f"prefix_projection is {self.prefix_projection!r}; it has to be True or False"
            )
        if not _is_int(self.tensor_parallel_degree):
            raise PrefixConfigError(
                f"tensor_parallel_degree is {self.tensor_parallel_degree!r}; it has to be an "
                "integer, 1 or -1 without tensor parallelism"
            )
        if self.dtype is not None and self.dtype not in PREFIX_DTYPES:
            raise PrefixConfigError(
                f"dtype is {self.dtype!r}; it has to be one of {', '.join(PREFIX_DTYPES)}"
            )
        heads, groups = self.num_attention_heads, self.multi_query_group_num
        if heads is not None and groups is not None and heads % groups:
            raise PrefixConfigError(
                f"multi_query_group_num is {groups}; it has to divide num_attention_heads, {heads}"
            )

    @property
    def num_kv_heads(self) -> int | None:
        """K: the heads that keys and values have; None while that is not known."""
        return self.multi_query_group_num or self.num_attention_heads

    def to_dict(self) -> dict[str, Any]:
        """All fields."""
        return asdict(self)

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> None:
        """Writes ``prefix_config.json`` as the reference writes it.

        Raises:
            OutputError: the folder cannot be made or written.
        """
        self.validate()
        write_json(make_folder(Path(save_directory)) / PREFIX_CONFIG_NAME, self.to_dict())

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **overrides: Any
    ) -> PrefixConfig:
        """Reads ``prefix_config.json`` from a folder; what is given by keyword wins over the file.

        Raises:
            PrefixConfigError: no such file, not JSON, or a value that cannot be used.
        """
        path = Path(pretrained_model_name_or_path) / PREFIX_CONFIG_NAME
        if not path.is_file():
            raise PrefixConfigError(
                f"Can't find {PREFIX_CONFIG_NAME} at '{pretrained_model_name_or_path}'",
                hint="give the folder that PrefixModelForCausalLM.save_pretrained wrote",
            )
        names = [field.name for field in fields(cls)]
        values = cls.from_json_file(path)
        for key in sorted(set(values) - set(names)):
            close = nearest(key, names, limit=1)
            meant = f"; did you mean {close[0]}?" if close else ""
            warnings.warn(
                f"{path} has an unknown option {key}, which is ignored{meant}", stacklevel=2
            )
        known = {key: value for key, value in values.items() if key in names}
        return cls(**{**known, **overrides})

    @classmethod
    def from_json_file(cls, path_json_file: str | os.PathLike[str]) -> dict[str, Any]:
        """The contents of a configuration file.

        Raises:
            PrefixConfigError: it cannot be read, or is not a JSON object.
        """
        return read_object(Path(path_json_file), PrefixConfigError)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
