"""The last steps of a graph on its way into a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx_ir as ir

from peft_deploy.atomic_folder import disk_errors
from peft_deploy.convert import (
    ConvertedGraph,
    WeightFile,
    bind_weights,
    check_graph,
    run_pipeline,
)
from peft_deploy.convert.weight_file import add_tables
from peft_deploy.families import NameMap
from peft_deploy.workflows.sources import EXPORT_DTYPE, ExportSource


def finish_graph(
    converted: ConvertedGraph, source: ExportSource, file: WeightFile, opset: int, path: Path
) -> dict[str, Any]:
    """Cleans a graph up, joins it with its weights, checks it and writes it.

    Args:
        converted: the graph as it came from the converter.
        source: the model that it was made of.
        file: holds the model's weights; gets the stand-in's tables.
        opset: what was asked for.
        path: where the graph goes, beside the file.

    Returns:
        What the manifest says of it: ``operators``, how often each appears, and ``removed``, how many nodes each
        pass took away.

    Raises:
        ConversionError: the graph is not what it should be.
    """
    signature = source.family.signature(source.config, EXPORT_DTYPE)
    names = source.family.names(source.config)
    removed = run_pipeline(converted, signature, names)
    add_tables(converted.constants, file)
    bind_weights(converted, file, lambda parameter: _initializer(names, parameter))
    counts = check_graph(converted.model, signature, opset)
    with disk_errors(file.output):
        ir.save(converted.model, path)
    return {"operators": counts, "removed": removed}


def _initializer(names: NameMap, parameter: str) -> str:
    """Weights go by Hugging Face's names, which the tools around ONNX know; their layout is [in, out]."""
    mapped = names.to_huggingface(parameter)
    return mapped.name if mapped else parameter
