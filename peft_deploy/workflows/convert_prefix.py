"""From a prefix adapter to a file that a bundle takes, without another export."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from peft_deploy.adapters.formats.detect import AdapterFormat
from peft_deploy.adapters.formats.onnx_file import (
    SUFFIX,
    model_version,
    read_onnx_file,
    write_onnx_adapter,
)
from peft_deploy.adapters.formats.prefix import PrefixAdapter
from peft_deploy.bundle.prefixes import (
    PREFIX_SUFFIX,
    Prefix,
    check_prefix_tensors,
    read_prefix_file,
    write_prefix_file,
)
from peft_deploy.bundle.slots import check_slots, in_types_of
from peft_deploy.config.json_file import make_folder
from peft_deploy.errors import CheckpointError, OutputError
from peft_deploy.signature import POSITION_IDS, GraphSignature
from peft_deploy.workflows.adapter_target import AdapterTarget
from peft_deploy.workflows.prefixes import evaluate_prefix
from peft_deploy.workflows.sources import EXPORT_DTYPE

PREFIX_OUTPUTS = (PREFIX_SUFFIX, SUFFIX)


def write_evaluated_prefix(
    output: Path, adapter: PrefixAdapter, format: AdapterFormat, target: AdapterTarget
) -> Prefix:
    """Writes what a prefix adapter stands for; it is read back and compared before it is put in place.

    Args:
        output: ``.safetensors`` for a file that every bundle takes (``generate --prefix FILE``), ``.onnx_adapter``
            for one that fills the prefix slots of a graph.
        adapter: the prefix.
        format: that it was read from.
        target: the base model; its bundle, where one was named, has to have slots for an ``.onnx_adapter``.

    Returns:
        What was written.

    Raises:
        AdapterError: the prefix does not fit the base model, or the bundle has no slots for it.
        OutputError: the file cannot be written.
    """
    name = output.name.removesuffix(output.suffix)
    prefix = evaluate_prefix(name, adapter, format, target.family, target.config)
    signature = target.family.signature(target.config, EXPORT_DTYPE)
    make_folder(output.parent)
    temporary = output.with_name(f".{output.stem}.{os.getpid()}{output.suffix}")
    try:
        if output.suffix == SUFFIX:
            _write_slots(temporary, prefix, signature, target)
        else:
            write_prefix_file(temporary, prefix, target.fingerprint())
            written = read_prefix_file(temporary, signature, target.fingerprint())
            if written.fingerprint != prefix.fingerprint:
                raise CheckpointError(f"what was written to {output} does not read back the same")
        temporary.replace(output)
    except OSError as exc:
        raise OutputError(f"{output} cannot be written: {exc.strerror or exc}") from exc
    finally:
        temporary.unlink(missing_ok=True)
    return prefix


def _write_slots(
    path: Path, prefix: Prefix, signature: GraphSignature, target: AdapterTarget
) -> None:
    tensors = prefix.slots(positions=POSITION_IDS in signature.input_names)
    if target.bundle is not None:
        tensors = in_types_of(target.slots, tensors)
        check_slots(target.slots, tensors, target.bundle)
        check_prefix_tensors(tensors, target.slots, prefix.name)
    write_onnx_adapter(path, tensors, model_version(target.fingerprint()))
    written = read_onnx_file(path).tensors
    if written.keys() != tensors.keys() or not all(
        np.array_equal(array, tensors[name]) for name, array in written.items()
    ):
        raise CheckpointError(f"what was written for {prefix.name} does not read back the same")
