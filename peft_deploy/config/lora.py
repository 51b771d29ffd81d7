"""LoRAConfig: the options of one LoRA adapter, and ``lora_config.json``."""

from __future__ import annotations

import math
import os
import warnings
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from peft_deploy.config.errors import LoRAConfigError, LoRAConfigTypeError
from peft_deploy.config.json_file import make_folder, read_object, write_json
from peft_deploy.errors import nearest

LORA_CONFIG_NAME = "lora_config.json"

# Options of the reference, its later versions and its forks that change the arithmetic or the file
# format. Off, they may stand in a file; on, they are refused.
UNSUPPORTED_FEATURES = {
    "do_qat": "quantization-aware training",
    "loraga": "LoRA-GA",
    "use_mora": "MoRA",
    "lora_use_mixer": "the MosLoRA mixer",
    "nola": "NoLA",
    "lorapro": "LoRA-Pro",
    "quantized": "a quantized base model",
    "use_dora": "DoRA",
}
# Options of later versions that mean something only together with one of the above, or only at run
# time.
_HARMLESS_KEYS = frozenset(
    {
        "scaling",
        "mixer_num",
        "nola_basis_num",
        "lorapro_x_mode",
        "lorapro_scaling_factor",
        "use_intermediate_api",
        "pipeline_model_parallel_size",
    }
)
_RENAMED_KEYS = {"tensor_model_parallel_size": "tensor_parallel_degree"}  # PaddleFormers


@dataclass
class LoRAConfig:
    """The options of one LoRA adapter; names, order and defaults are those of
    ``paddlenlp.peft.LoRAConfig``.

    Args:
        r: rank R of the matrices A and B, positive.
        target_modules: which modules get LoRA: module names (``"q_proj"``, ``"self_attn.q_proj"``)
            or regular expressions for the whole dotted name (``".*q_proj.*"``), one or a list.
            None wraps nothing.
        trainable_modules: further modules or parameters that are trained and saved whole, in the
            same notation.
        lora_alpha: numerator of the scaling.
        lora_dropout: probability of zeroing an input of the LoRA branch while training, in [0, 1).
        merge_weights: deprecated; ``eval()`` merges and ``train()`` unmerges.
        trainable_bias: None, ``"lora"`` (biases of the adapted layers) or ``"all"``.
        enable_lora_list: for fused projections, which of the fused parts get LoRA (``[True, False,
            True]``): one such list for a single target, one list or None for each target
            otherwise. Selects LoRAMergedLinear.
        tensor_parallel_degree: number of tensor-parallel ranks that the files were written for.
        dtype: element type of A and B, None for Paddle's default.
        head_dim: size of one attention head, needed with ``enable_lora_list``.
        do_qat: not supported.
        rslora: rank-stabilized scaling, alpha / sqrt(R) (arXiv 2312.03732).
        pissa: A and B start as the principal singular vectors of the weight (arXiv 2404.02948);
            scaling 1.
        loraga: not supported.
        use_mora: not supported.
        lora_plus_scale: learning rate of B relative to that of A (arXiv 2402.12354).
        base_model_name_or_path: for information only.
        use_quick_lora: accepted; the reference's hand-written backward gives the same numbers.
        lora_use_mixer: not supported.

    Raises:
        LoRAConfigError: a value is out of range, or an unsupported feature is switched on; also a
            ValueError.
        LoRAConfigTypeError: ``enable_lora_list`` or a list of patterns has a wrong form; also a
            TypeError.
    """

    r: int = 8
    target_modules: list[str] | str | None = None
    trainable_modules: list[str] | str | None = None
    lora_alpha: int | float = 8
    lora_dropout: float = 0.0
    merge_weights: bool = False
    trainable_bias: str | None = None
    enable_lora_list: list[bool] | list[list[bool] | None] | None = None
    tensor_parallel_degree: int = -1
    dtype: str | None = None
    head_dim: int | None = None
    do_qat: bool = False
    rslora: bool = False
    pissa: bool = False
    loraga: bool = False
    use_mora: bool = False
    lora_plus_scale: float = 1.0
    base_model_name_or_path: str | None = None
    use_quick_lora: bool = False
    lora_use_mixer: bool = False

    def __post_init__(self) -> None:
        self.validate()
        if self.use_quick_lora and self.lora_dropout > 0:
            warnings.warn("use_quick_lora is switched off: lora_dropout is not 0", stacklevel=3)
            self.use_quick_lora = False
        if self.merge_weights:
            warnings.warn(
                "merge_weights is deprecated; call model.merge() and model.unmerge() instead",
                DeprecationWarning,
                stacklevel=3,
            )

    def validate(self) -> None:
        """Checks every value.

        Raises:
            LoRAConfigError: a value is out of range, or an unsupported feature is switched on.
            LoRAConfigTypeError: a value has the wrong form.
        """
        _refuse_unsupported(asdict(self))
        if isinstance(self.r, bool) or not isinstance(self.r, int) or self.r <= 0:
            raise LoRAConfigError(f"r is {self.r!r}; LoRA's rank is a positive integer")
        _check_number("lora_alpha", self.lora_alpha)
        _check_number("lora_plus_scale", self.lora_plus_scale)
        _check_number("lora_dropout", self.lora_dropout)
        if not 0 <= self.lora_dropout < 1:
            raise LoRAConfigError(f"lora_dropout is {self.lora_dropout!r}; it has to be in [0, 1)")
        if self.trainable_bias not in (None, "lora", "all"):
            raise LoRAConfigError(
                f"trainable_bias is {self.trainable_bias!r}; it has to be None, 'lora' or 'all'"
            )
        for option in ("target_modules", "trainable_modules"):
            _check_patterns(option, getattr(self, option))
        _check_enable_lora(self.enable_lora_list, self.target_modules, self.head_dim)

    @property
    def scaling(self) -> float:
        """The factor of A @ B: alpha / R, with rsLoRA alpha / sqrt(R), with PiSSA 1."""
        if self.pissa:
            return 1.0
        return self.lora_alpha / (math.sqrt(self.r) if self.rslora else self.r)

    @property
    def target_patterns(self) -> list[str]:
        """``target_modules`` as a list, empty when nothing is to be wrapped."""
        return _as_list(self.target_modules)

    @property
    def trainable_patterns(self) -> list[str]:
        """``trainable_modules`` as a list."""
        return _as_list(self.trainable_modules)

    def enabled_parts(self) -> list[list[bool] | None]:
        """For each of :attr:`target_patterns`, which fused parts get LoRA; None for an ordinary
        layer.
        """
        targets = self.target_patterns
        if self.enable_lora_list is None:
            return [None] * len(targets)
        if isinstance(self.target_modules, str):
            return [[bool(part) for part in self.enable_lora_list]]
        return [None if part is None else list(part) for part in self.enable_lora_list]  # type: ignore[arg-type]

    def to_dict(self) -> dict[str, Any]:
        """All fields, without the computed scaling."""
        return asdict(self)

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> None:
        """Writes ``lora_config.json``: all fields and the computed scaling, as the reference
        writes it.

        Raises:
            OutputError: the folder cannot be made or written.
        """
        self.validate()
        folder = make_folder(Path(save_directory))
        write_json(folder / LORA_CONFIG_NAME, {**self.to_dict(), "scaling": self.scaling})

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **overrides: Any
    ) -> LoRAConfig:
        """Reads ``lora_config.json`` from a folder; what is given by keyword wins over the file.

        Raises:
            LoRAConfigError: no such file, not JSON, an invalid value, or an unsupported feature is
                on.
        """
        path = Path(pretrained_model_name_or_path) / LORA_CONFIG_NAME
        if not path.is_file():
            raise LoRAConfigError(
                f"Can't find {LORA_CONFIG_NAME} at '{pretrained_model_name_or_path}'",
                hint="give the folder that LoRAModel.save_pretrained wrote",
            )
        values = cls.from_json_file(path)
        stored_scaling = values.get("scaling")
        known = _known_values(values, {field.name for field in fields(cls)}, path)
        config = cls(**known)
        if stored_scaling is not None and not math.isclose(
            stored_scaling, config.scaling, rel_tol=1e-6
        ):
            raise LoRAConfigError(
                f"{path} says scaling {stored_scaling}, but r, lora_alpha, rslora, pissa in the "
                f"same file give {config.scaling}"
            )
        return cls(**{**known, **overrides}) if overrides else config

    @classmethod
    def from_json_file(cls, path_json_file: str | os.PathLike[str]) -> dict[str, Any]:
        """The contents of a configuration file.

        Raises:
            LoRAConfigError: it cannot be read, or is not a JSON object.
        """
        return read_object(Path(path_json_file), LoRAConfigError)


def _as_list(patterns: list[str] | str | None) -> list[str]:
    if patterns is None:
        return []
    return [patterns] if isinstance(patterns, str) else list(patterns)


def _refuse_unsupported(values: dict[str, Any]) -> None:
    on = sorted(key for key in UNSUPPORTED_FEATURES if values.get(key))
    if on:
        named = ", ".join(f"{UNSUPPORTED_FEATURES[key]} ({key})" for key in on)
        raise LoRAConfigError(f"{named} is not supported; switch it off to go on")


def _check_number(option: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise LoRAConfigError(f"{option} is {value!r}; it has to be a finite number")


def _check_patterns(option: str, value: object) -> None:
    if value is None or isinstance(value, str):
        return
    if not isinstance(value, (list, tuple)) or not all(isinstance(item, str) for item in value):
        raise LoRAConfigTypeError(
            f"{option} is {value!r}; it has to be a string or a list of them"
        )


def _check_enable_lora(value: object, targets: object, head_dim: object) -> None:
    if value is None:
        return
    single = isinstance(targets, str) or targets is None
    wanted = (
        "a list of booleans" if single else "a list with None or a list of booleans per target"
    )
    valid = isinstance(value, (list, tuple)) and len(value) > 0
    if valid and single:
        valid = all(isinstance(part, bool) for part in value)  # type: ignore[attr-defined]
    elif valid:
        valid = len(value) == len(targets) and all(  # type: ignore[arg-type]
            part is None
            or (
                isinstance(part, (list, tuple)) and part and all(isinstance(p, bool) for p in part)
            )
            for part in value  # type: ignore[attr-defined]
        )
    if not valid:
        raise LoRAConfigTypeError(f"enable_lora_list is {value!r}; it has to be {wanted}")
    fused = single or any(part is not None for part in value)  # type: ignore[attr-defined]
    if fused and (isinstance(head_dim, bool) or not isinstance(head_dim, int) or head_dim <= 0):
        raise LoRAConfigError(
            f"enable_lora_list needs head_dim, the size of one attention head; it is {head_dim!r}"
        )


def _known_values(values: dict[str, Any], names: set[str], path: Path) -> dict[str, Any]:
    """The file's values under today's names; refuses unsupported features and warns about unknown
    keys.
    """
    values = {_RENAMED_KEYS.get(key, key): value for key, value in values.items()}
    _refuse_unsupported(values)
    for key in sorted(set(values) - names - _HARMLESS_KEYS - set(UNSUPPORTED_FEATURES)):
        close = nearest(key, names, limit=1)
        meant = f"; did you mean {close[0]}?" if close else ""
        warnings.warn(f"{path} has an unknown option {key}, which is ignored{meant}", stacklevel=4)
    return {key: value for key, value in values.items() if key in names}
