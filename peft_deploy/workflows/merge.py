"""From a model and an adapter to a checkpoint that holds both."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from peft_deploy import __version__
from peft_deploy.adapters.merge_record import (
    MERGE_RECORD_NAME,
    MergedAdapter,
    MergeRecord,
)
from peft_deploy.atomic_folder import AtomicFolder, FolderKind, check_output, nearest_existing
from peft_deploy.base import BaseModel, open_base
from peft_deploy.base.folder import CONFIG
from peft_deploy.config.merge import MergeOptions
from peft_deploy.errors import OutputError
from peft_deploy.progress import Progress, Silent
from peft_deploy.weights import (
    ROUNDING_LIMIT,
    Array,
    HuggingFaceTensors,
    RoundingLoss,
    TensorInfo,
    TensorSource,
    fingerprint,
    write_safetensors,
)
from peft_deploy.weights.canonical import HUGGINGFACE, PADDLENLP
from peft_deploy.weights.copies import WithCopies
from peft_deploy.weights.rounding import describe_losses, lossy
from peft_deploy.workflows.lineage import check_lineage
from peft_deploy.workflows.merged_checkpoint import check_known, main_dtype, merged_config, verify
from peft_deploy.workflows.sources import NamedAdapter, read_named

MERGED_CHECKPOINT = FolderKind("merged checkpoint", MERGE_RECORD_NAME)
WEIGHTS = "model.safetensors"
_LAYOUTS = {"hf": HUGGINGFACE, "paddle": PADDLENLP}
# What the libraries call their own files: transformers refuses any but "pt", PaddleNLP any but "np".
_METADATA = {HUGGINGFACE: {"format": "pt"}, PADDLENLP: {"format": "np"}}


@dataclass(frozen=True)
class MergeResult:
    """What a merge wrote.

    Args:
        output: the checkpoint's folder.
        layout: ``huggingface`` or ``paddlenlp``.
        dtype: of most of the weights.
        tensors: how many.
        nbytes: of their data.
        files: names of the files of weights, the index last when there are several.
        base_fingerprint: identifies the base model's weights.
        adapter_fingerprint: identifies the adapter.
        fingerprint: identifies the merged weights.
        rounding_loss: parameter → ‖round(W + Δ) - (W + Δ)‖ / ‖Δ‖, for those that the adapter changes and
            that are float16 or bfloat16.
    """

    output: Path
    layout: str
    dtype: str
    tensors: int
    nbytes: int
    files: tuple[str, ...]
    base_fingerprint: str
    adapter_fingerprint: str
    fingerprint: str
    rounding_loss: Mapping[str, float] = field(default_factory=dict)

    @property
    def lossy(self) -> dict[str, float]:
        """The entries of ``rounding_loss`` above the limit, the largest first."""
        return lossy(self.rounding_loss)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready form."""
        return {
            **asdict(self),
            "output": str(self.output),
            "rounding_limit": ROUNDING_LIMIT,
            "lossy": list(self.lossy),
        }


def merge(
    base: str | Path | BaseModel,
    adapter: str | Path,
    output: str | Path,
    *,
    options: MergeOptions | None = None,
    progress: Progress | None = None,
) -> MergeResult:
    """Writes a checkpoint of the base model with the adapter merged into its weights.

    Each weight becomes W + scaling · A · B, accumulated in float32 and rounded once; one tensor is held at a
    time. What was written is read back and compared with the merge computed anew, bit by bit, before it is put
    in place.

    Args:
        base: the base model's folder, or a name that PaddleNLP can download.
        adapter: the adapter's folder, or ``NAME=FOLDER``.
        output: the new checkpoint's folder.
        options: how; defaults are those of the command line.
        progress: is told about every phase.

    Returns:
        What was written. A warning names the layers where rounding to float16 or bfloat16 lost more than
        :data:`~peft_deploy.weights.ROUNDING_LIMIT` of the change, relative to its norm.

    Raises:
        AdapterError: the adapter does not fit the base model, or was merged into it before.
        CheckpointError: the base model cannot be read, or what was written does not read back the same.
        OutputError: the output cannot be written. It is then as it was before, as after every error.

    Example:
        >>> import peft_deploy
        >>> peft_deploy.merge("base/", "adapter/", "merged/")  # doctest: +SKIP
    """
    options, progress = options or MergeOptions(), progress or Silent()
    output = Path(output).expanduser()
    check_output(output, MERGED_CHECKPOINT, force=options.force)
    progress.phase("Reading names and shapes")
    model = base if isinstance(base, BaseModel) else open_base(base)
    named = read_named(str(adapter), model)
    _check_apart(output, model.path, named.adapter.path)
    check_known(model)
    layout = _LAYOUTS[options.to] if options.to else model.tensors.layout
    losses: dict[str, RoundingLoss] = {}
    merged = _merged(model, named, options, losses)
    check_lineage(model, named.adapter)
    total = sum(merged.info(name).nbytes for name in merged.names())
    _check_space(output, total)
    with AtomicFolder(output, MERGED_CHECKPOINT, force=options.force) as folder:
        progress.phase("Merging and writing", total, "bytes")
        files = _write(folder, _in_layout(merged, model, layout, progress), layout, options)
        dtype = main_dtype(merged)
        for file in model.companions():
            folder.copy(file)
        folder.write_text(CONFIG, _json(merged_config(model, layout, dtype)))
        progress.phase("Reading it back", total, "bytes")
        written = open_base(folder.path)
        verify(written, _merged(model, named, options), layout, progress)
        result = MergeResult(
            output=output,
            layout=layout,
            dtype=dtype,
            tensors=len(merged.names()),
            nbytes=total,
            files=files,
            base_fingerprint=model.fingerprint,
            adapter_fingerprint=named.adapter.fingerprint,
            fingerprint=fingerprint(written.tensors),
            rounding_loss={name: loss.relative for name, loss in losses.items()},
        )
        folder.write_text(MERGE_RECORD_NAME, _record(model, named, result).to_json())
        folder.commit()
    _warn_of_losses(result)
    return result


def _merged(
    model: BaseModel,
    named: NamedAdapter,
    options: MergeOptions,
    losses: MutableMapping[str, RoundingLoss] | None = None,
) -> TensorSource:
    return named.adapter.merge_into(model.tensors, options.dtype, losses)


def _check_apart(output: Path, *inputs: Path) -> None:
    """The output must not be one of the inputs, or contain one: replacing it would delete that."""
    target = output.resolve()
    for path in map(Path.resolve, inputs):
        if target == path or target in path.parents:
            raise OutputError(
                f"--output {output} would replace {path}, which the merge reads",
                hint="name another folder",
            )


def _check_space(output: Path, needed: int) -> None:
    free = shutil.disk_usage(nearest_existing(output)).free
    if free < needed:
        raise OutputError(
            f"no space left for {output}: the merged weights take {needed / 1e6:,.0f} MB, "
            f"{free / 1e6:,.0f} MB are free",
            hint="free some space, choose another disk, or a narrower --dtype",
        )


def _in_layout(
    merged: TensorSource, model: BaseModel, layout: str, progress: Progress
) -> TensorSource:
    if layout == HUGGINGFACE:
        return _Reported(HuggingFaceTensors(merged, model.names), progress)
    copies = model.family.kept_apart(model.config)
    return _Reported(WithCopies(merged, copies), progress)


def _write(
    folder: AtomicFolder, tensors: TensorSource, layout: str, options: MergeOptions
) -> tuple[str, ...]:
    try:
        paths = write_safetensors(
            folder.path / WEIGHTS, tensors, _METADATA[layout], options.max_shard_bytes
        )
    except OutputError as exc:
        # the temporary folder's name says nothing to anybody
        message = exc.message.replace(str(folder.path), str(folder.output))
        raise OutputError(f"{message}; nothing was left behind", hint=exc.hint) from exc
    return tuple(path.name for path in paths)


def _record(model: BaseModel, named: NamedAdapter, result: MergeResult) -> MergeRecord:
    earlier = MergeRecord.load(model.path)
    adapter = named.adapter
    entry = MergedAdapter(
        name=named.name,
        method="lora",
        fingerprint=adapter.fingerprint,
        rank=adapter.config.r,
        scaling=adapter.config.scaling,
        targets=tuple(sorted(adapter.pairs)),
        replaced=tuple(sorted(adapter.replacements)),
        base_fingerprint=result.base_fingerprint,
    )
    return MergeRecord(
        base={
            "name": model.name,
            "layout": model.tensors.layout,
            "fingerprint": result.base_fingerprint,
        },
        adapters=(*(earlier.adapters if earlier else ()), entry),
        fingerprint=result.fingerprint,
        layout=result.layout,
        dtype=result.dtype,
        rounding_loss=dict(result.rounding_loss),
        versions={"peft-deploy": __version__, "numpy": np.__version__},
    )


def _warn_of_losses(result: MergeResult) -> None:
    text = describe_losses(result.dtype, result.rounding_loss)
    if text is not None:
        warnings.warn(text, stacklevel=3)


def _json(data: Mapping[str, Any]) -> str:
    return json.dumps(data, indent=2, ensure_ascii=False) + "\n"


class _Reported:
    """A source that tells the progress of every tensor that is read."""

    def __init__(self, source: TensorSource, progress: Progress) -> None:
        self._source = source
        self._progress = progress

    def names(self) -> Sequence[str]:
        return self._source.names()

    def info(self, name: str) -> TensorInfo:
        return self._source.info(name)

    def read(self, name: str) -> Array:
        data = self._source.read(name)
        self._progress.advance(data.nbytes, name)
        return data
