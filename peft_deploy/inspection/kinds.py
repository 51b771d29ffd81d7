"""Which kind of thing lies at a path, told by its files and never by its name."""

from __future__ import annotations

from enum import Enum
from pathlib import Path

from peft_deploy.adapters.formats.paddlenlp import WEIGHT_FILES as ADAPTER_WEIGHTS
from peft_deploy.adapters.formats.peft_files import PEFT_WEIGHTS_NAME
from peft_deploy.adapters.formats.prefix import PREFIX_WEIGHTS_NAME
from peft_deploy.base.folder import CONFIG
from peft_deploy.bundle import MANIFEST, MODEL
from peft_deploy.config import LORA_CONFIG_NAME, PREFIX_CONFIG_NAME
from peft_deploy.errors import CheckpointError, listed
from peft_deploy.inspection.adapter import AdapterInspection, inspect_adapter
from peft_deploy.inspection.bundle import BundleInspection, inspect_bundle
from peft_deploy.inspection.checkpoint import CheckpointInspection, inspect_checkpoint
from peft_deploy.inspection.evaluated_prefix import inspect_evaluated_prefix, is_evaluated_prefix
from peft_deploy.inspection.foreign import inspect_foreign, is_foreign
from peft_deploy.inspection.prefix import PrefixInspection, inspect_prefix
from peft_deploy.weights.checkpoint import WEIGHT_FILES

# One of them makes a folder an adapter. Those of other methods and formats are here so that their
# folders get the adapter reader's error, which names them.
ADAPTER_CONFIGS = (
    LORA_CONFIG_NAME,
    "adapter_config.json",
    "vera_config.json",
    "lokr_config.json",
)
_PREFIX_FILES = (PREFIX_CONFIG_NAME, PREFIX_WEIGHTS_NAME)
_WEIGHT_ENDINGS = (".safetensors", ".pdparams", ".safetensors.index.json", ".pdparams.index.json")


class Kind(str, Enum):
    """The things that can be inspected."""

    CHECKPOINT = "checkpoint"
    ADAPTER = "adapter"
    PREFIX = "prefix"
    BUNDLE = "bundle"


def inspect(
    path: str | Path, *, verify: bool = False
) -> CheckpointInspection | AdapterInspection | PrefixInspection | BundleInspection:
    """The facts about whatever lies at a path.

    Args:
        path: a base model's folder, a file of weights, an adapter's folder or a bundle's; also the
            file that makes a folder one of these, and the adapter files and prefixes of a bundle.
        verify: of a bundle, also hash every file and compare the graph with the manifest.

    Raises:
        CheckpointError: there is none of them; or a checkpoint is damaged.
        AdapterError: an adapter is damaged, or of a kind that cannot be read.
        BundleError: a bundle is damaged.

    Example:
        >>> from peft_deploy.inspection import inspect
        >>> inspect("adapter/").rank  # doctest: +SKIP
        8
    """
    path = Path(path).expanduser()
    kind, place = kind_of(path)
    if kind is Kind.BUNDLE:
        return inspect_bundle(place, verify=verify)
    if kind is Kind.ADAPTER:
        return inspect_foreign(place) if is_foreign(place) else inspect_adapter(place)
    if kind is Kind.PREFIX:
        return inspect_prefix(place) if place.is_dir() else inspect_evaluated_prefix(place)
    return inspect_checkpoint(place)


def kind_of(path: Path) -> tuple[Kind, Path]:
    """What lies at a path, and the folder or the file to read it from.

    Raises:
        CheckpointError: nothing is there, or none of them; the message says what was looked
            for and what is there.
    """
    if path.is_dir():
        if (path / MANIFEST).is_file():
            return Kind.BUNDLE, path
        if any(
            (path / name).is_file()
            for name in (*ADAPTER_CONFIGS, *ADAPTER_WEIGHTS, *_PREFIX_FILES)
        ):
            return _method(path), path
        if any((path / name).is_file() for name in (CONFIG, *WEIGHT_FILES)):
            return Kind.CHECKPOINT, path
        raise _unknown(path)
    if not path.is_file():
        raise CheckpointError(
            f"{path} does not exist",
            hint="give the folder of a base model, of an adapter or of a bundle",
        )
    return _kind_of_file(path)


def _kind_of_file(path: Path) -> tuple[Kind, Path]:
    folder = path.parent
    if is_evaluated_prefix(path):
        return Kind.PREFIX, path
    if is_foreign(path):
        return Kind.ADAPTER, path
    if path.name == PEFT_WEIGHTS_NAME and is_foreign(folder):
        return Kind.ADAPTER, folder
    if path.name in (MANIFEST, MODEL) and (folder / MANIFEST).is_file():
        return Kind.BUNDLE, folder
    if path.name in (*ADAPTER_CONFIGS, *ADAPTER_WEIGHTS, *_PREFIX_FILES):
        return _method(folder), folder
    if path.name == CONFIG:
        return kind_of(folder)
    if path.name.endswith(_WEIGHT_ENDINGS):
        return Kind.CHECKPOINT, path
    raise CheckpointError(
        f"{path} is neither a file of weights ({', '.join(_WEIGHT_ENDINGS)}) nor the file of an "
        "adapter or a bundle",
        hint="give the folder that it lies in",
    )


def _method(folder: Path) -> Kind:
    """Which kind of adapter a folder holds; LoRA's reader names what it cannot read."""
    prefix = any((folder / name).is_file() for name in _PREFIX_FILES)
    other = any((folder / name).is_file() for name in ADAPTER_CONFIGS)
    return Kind.PREFIX if prefix and not other else Kind.ADAPTER


def _unknown(folder: Path) -> CheckpointError:
    there = [entry.name for entry in folder.iterdir()]
    lines = [
        f"a bundle: {MANIFEST}",
        f"an adapter: {' or '.join((*ADAPTER_CONFIGS, PREFIX_CONFIG_NAME))}",
        f"a checkpoint: {CONFIG} or {' or '.join(WEIGHT_FILES)}",
    ]
    loose = sorted(name for name in there if name.endswith(_WEIGHT_ENDINGS))
    return CheckpointError(
        f"{folder} is no checkpoint, no adapter and no bundle. Looked for:\n{listed(lines)}\n"
        + (f"The folder holds:\n{listed(there)}" if there else "The folder is empty."),
        hint=f"to read a single file of weights, name it: {folder / loose[0]}" if loose else None,
    )
