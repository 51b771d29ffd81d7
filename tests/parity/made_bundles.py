"""Small models, their adapters, and the good bundles that are made of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import peft_deploy
from peft_deploy.config.export import PLAIN, RUNTIME, ExportOptions
from peft_deploy.config.precision import FP32
from peft_deploy.workflows.sources import ExportSource, from_folders

LORA, PREFIX = "lora", "prefix"
NOT_FUSED = "llama, not fused"
# subject → the small model that it is, whether its adapter stays apart from the weights, its precision, and how far
# operators are put together, as an export does by default where that is None
BUNDLES: dict[str, tuple[str, bool, str, str | None]] = {
    "llama": ("llama", False, FP32, None),
    NOT_FUSED: ("llama", False, FP32, PLAIN),
    "llama, LoRA at run time": ("llama", True, FP32, None),
    "opt": ("opt", False, FP32, None),
    "bloom": ("bloom", False, FP32, None),
    "bert": ("bert-embedding", False, FP32, None),
    "llama, int4": ("llama", False, "int4", None),
}
BEHIND_PREFIX = "llama behind a prefix"
SUBJECTS = (*BUNDLES, BEHIND_PREFIX)


@dataclass(frozen=True, eq=False)
class Exported:
    """A good bundle and the folders that it was made of.

    Args:
        model: the small model's name.
        folder: holds ``base``, ``lora``, perhaps ``prefix``, and ``bundle``.
        at_run_time: whether LoRA stays apart from the weights.
    """

    model: str
    folder: Path
    at_run_time: bool

    @property
    def bundle(self) -> Path:
        """Its folder."""
        return self.folder / "bundle"

    @property
    def adapters(self) -> list[str]:
        """As an export takes them."""
        return [f"{n}={self.folder / n}" for n in (LORA, PREFIX) if (self.folder / n).is_dir()]

    def source(self) -> ExportSource:
        """What it is made of."""
        return from_folders(self.folder / "base", self.adapters, keep=self.at_run_time)


def make_folders(
    recipe: ModuleType,
    folder: Path,
    model: str,
    *,
    seed: int = 0,
    at_run_time: bool = False,
    with_prefix: bool = False,
) -> Exported:
    """Makes a small model and its adapters.

    Args:
        recipe: models/tiny/make.py.
        folder: an empty folder.
        model: the small model's name.
        seed: of the weights.
        at_run_time: whether LoRA is to stay apart from the weights.
        with_prefix: whether to make a prefix, too.
    """
    base = recipe.make(folder / "base", model, seed=seed)
    recipe.make_lora(folder / LORA, base, seed=seed + 7)
    if with_prefix:
        recipe.make_prefix(folder / PREFIX, base, seed=seed + 9)
    return Exported(model, folder, at_run_time)


def export(made: Exported, precision: str = FP32, fuse: str | None = None) -> Exported:
    """Writes the bundle, with slots for the prefix if it has one and adapters stay apart from the weights.

    Args:
        made: the model and its adapters.
        precision: of the bundle.
        fuse: how far operators are put together; None as an export does it by default.
    """
    with_prefix = (made.folder / PREFIX).is_dir()
    options = ExportOptions(
        fuse=fuse,
        precision=precision,
        validate=False,
        adapters=RUNTIME if made.at_run_time else None,
        prefix_slots=with_prefix and made.at_run_time,
    )
    peft_deploy.export(made.folder / "base", made.bundle, adapter=made.adapters, options=options)
    return made


def make_bundle(name: str, folder: Path, recipe: ModuleType) -> Exported:
    """Makes a small model and its adapters and exports them.

    Args:
        name: a key of :data:`BUNDLES`.
        folder: an empty folder.
        recipe: models/tiny/make.py.
    """
    model, at_run_time, precision, fuse = BUNDLES[name]
    with_prefix = name == bundle_of(BEHIND_PREFIX)
    made = make_folders(recipe, folder, model, at_run_time=at_run_time, with_prefix=with_prefix)
    return export(made, precision, fuse)


def bundle_of(name: str) -> str:
    """The bundle that a subject is a copy of."""
    return "llama" if name == BEHIND_PREFIX else name
