"""The facts about a prefix that has been evaluated: the files that bundles and onnxruntime take."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from peft_deploy.adapters.formats.onnx_file import (
    UNKNOWN_BASE,
    OnnxAdapterFile,
    is_onnx_adapter,
    read_onnx_file,
)
from peft_deploy.bundle.prefixes import Prefix, is_prefix_file, read_prefix_alone
from peft_deploy.errors import AdapterError, listed
from peft_deploy.inspection.prefix import PrefixInspection
from peft_deploy.inspection.tensors import TensorTotals, file_sizes, info_of
from peft_deploy.signature import PREFIX_OFFSET, past_names, prefix_names
from peft_deploy.weights import Array

METHOD = "prefix (evaluated)"


def is_evaluated_prefix(path: Path) -> bool:
    """Whether a file holds the keys and values of a prefix; of an ``.onnx_adapter`` file, every tensor is read.

    Raises:
        AdapterError: an ``.onnx_adapter`` file that is damaged.
        MissingExtraError: for such a file, onnxruntime is not installed.
    """
    if is_onnx_adapter(path):
        return prefix_names(1)[0] in read_onnx_file(path).tensors
    return is_prefix_file(path)


def inspect_evaluated_prefix(path: Path) -> PrefixInspection:
    """The facts about ``prefixes/NAME.safetensors``, or an ``.onnx_adapter`` file for prefix slots.

    Raises:
        AdapterError: a damaged one, layers that do not go together, or NaN or infinity in it.
        MissingExtraError: for the ``.onnx_adapter`` file, onnxruntime is not installed.
    """
    if is_onnx_adapter(path):
        file = read_onnx_file(path)
        known = file.model_version not in UNKNOWN_BASE
        base = f"model_version {file.model_version}" if known else None
        prefix = _of_slots(file)
    else:
        fingerprint, prefix = read_prefix_alone(path)
        base = f"fingerprint {fingerprint[:16]}"
    keys, layers = next(iter(prefix.past.values())), len(prefix.past) // 2
    squares = sum(float(np.square(a.astype(np.float64)).sum()) for a in prefix.past.values())
    return PrefixInspection(
        path=path,
        method=METHOD,
        num_tokens=prefix.num_tokens,
        num_layers=layers,
        num_kv_heads=int(keys.shape[1]),
        head_dim=int(keys.shape[3]),
        projection_size=None,
        dropout=None,
        stored=TensorTotals.of(info_of(name, array) for name, array in prefix.past.items()),
        files=file_sizes([path], path.parent),
        cache_bytes=sum(array.nbytes for array in prefix.past.values()),
        norm=float(np.sqrt(squares)),
        pre_caches=False,
        fingerprint=prefix.fingerprint,
        provenance=None,
        base_name=base,
        position_offset=prefix.position_offset,
    )


def _of_slots(file: OnnxAdapterFile) -> Prefix:
    tensors: dict[str, Array] = dict(file.tensors)
    offset = tensors.pop(PREFIX_OFFSET, np.zeros(1, np.int64))
    layers = max(len(tensors) // 2, 1)
    if odd := tensors.keys() ^ set(prefix_names(layers)):
        raise AdapterError(f"{file.path} holds no whole prefix; these differ:\n{listed(odd)}")
    _require_one_shape(file.path, tensors)
    renamed = {
        p: tensors[s] for p, s in zip(past_names(layers), prefix_names(layers), strict=True)
    }
    return Prefix(file.path.stem, renamed, int(offset[0]))


def _require_one_shape(path: Path, tensors: Mapping[str, Array]) -> None:
    shapes = {array.shape for array in tensors.values()}
    if len(shapes) > 1 or len(next(iter(shapes))) != 4:
        raise AdapterError(
            f"the layers of the prefix in {path} have the shapes {', '.join(map(str, sorted(shapes)))}; "
            "all must have the same, [1, heads, tokens, head size]"
        )
