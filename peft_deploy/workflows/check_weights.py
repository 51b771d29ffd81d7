"""Checks the weights in a bundle's files against those that an export makes of the checkpoint and the adapter."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_deploy.bundle import MODEL, PARAMS, PROGRAM, Manifest
from peft_deploy.config.export import ONNX
from peft_deploy.config.precision import PRECISIONS
from peft_deploy.convert.packed_names import graph_parameters
from peft_deploy.errors import listed
from peft_deploy.parity.case_result import CaseResult
from peft_deploy.parity.report import ParityReport
from peft_deploy.parity.stored_weights import (
    FileTensor,
    difference,
    stored_in_onnx,
    stored_in_paddle,
)
from peft_deploy.progress import Progress, Silent
from peft_deploy.weights import TensorSource
from peft_deploy.weights.block_quantized import QUANTIZED, SCALES
from peft_deploy.weights.pieces import in_order, pieces_of
from peft_deploy.workflows.graph_parts import GraphPart
from peft_deploy.workflows.sources import ExportSource
from peft_deploy.workflows.storage import written_parts

if TYPE_CHECKING:
    from peft_deploy.convert import WeightFile

CASE = "weights, byte by byte"  # in a report
# In what a manifest says of a graph: initializer → hash, and initializer → tensor that the file got, where one name
# does not follow from the other.
TABLES, RENAMED = "tables", "renamed"
PACKED = "packed"  # there, too: packed layer → the layers in it


def check_weights(
    report: ParityReport,
    folder: Path,
    source: ExportSource,
    *,
    progress: Progress | None = None,
) -> ParityReport:
    """The report with one more case, which reads no text: every weight is the one that an export would write.

    Args:
        report: of the other cases.
        folder: the bundle, sealed.
        source: what it was made of.
        progress: gets a phase counted in tensors.
    """
    manifest, progress = Manifest.read(folder), progress or Silent()
    parts = parts_of(manifest, source)
    count = sum(len(part.tensors.names()) for part in parts)
    progress.phase("Comparing the weights", count, "tensors")
    wrong: dict[str, str] = {}
    size = 0
    for part in parts:
        place = folder / part.folder
        stored, facts = stored_tensors(place, manifest.format), _graph_facts(manifest, part)
        names = names_in_bundle(manifest, source, part)
        summed = _summed(source, part)
        chosen = summed if source.importance is not None else frozenset[str]()
        found = wrong_weights(stored, part.tensors, names.items(), summed, progress, chosen=chosen)
        found |= wrong_tables(stored, facts.get(TABLES, {}))
        wrong |= {(Path(part.folder) / name).as_posix(): text for name, text in found.items()}
        size += sum(tensor.length for tensor in stored.values())
    return with_weights(report, wrong, count, size)


def with_weights(
    report: ParityReport, wrong: Mapping[str, str], count: int, size: int
) -> ParityReport:
    """The report with a case that says which weights are wrong.

    Args:
        report: of the other cases.
        wrong: weight → what is wrong with it.
        count: how many were compared.
        size: of all of them, in bytes.
    """
    problem = None
    if wrong:
        lines = listed(f"{name}: {text}" for name, text in wrong.items())
        problem = (
            f"{len(wrong)} of {count} are not what an export of this model would write:\n{lines}"
        )
    case = CaseResult(CASE, CASE, f"{count} tensors, {size / 1e6:.0f} MB", problem=problem)
    return replace(report, cases=(*report.cases, case))


def parts_of(manifest: Manifest, source: ExportSource) -> list[GraphPart]:
    """The graphs of a bundle with the tensors that an export would write into its files now.

    Args:
        manifest: of the bundle.
        source: what it was made of.
    """
    pack = bool(manifest.graph.get(PACKED))
    return written_parts(source, PRECISIONS[manifest.precision], pack=pack)


def names_in_bundle(manifest: Manifest, source: ExportSource, part: GraphPart) -> dict[str, str]:
    """Tensor → what the bundle's graph calls it.

    Args:
        manifest: of the bundle.
        source: what it was made of.
        part: one of :func:`parts_of`.
    """
    renamed = _graph_facts(manifest, part).get(RENAMED, {})
    return written_names(source, part, manifest.format) | {
        tensor: n for n, tensor in renamed.items()
    }


def _graph_facts(manifest: Manifest, part: GraphPart) -> Mapping[str, Any]:
    """What the manifest says of a graph."""
    if not part.folder:
        return manifest.graph
    return {} if manifest.encoder is None else manifest.encoder.graph


def stored_tensors(place: Path, format: str) -> Mapping[str, FileTensor]:
    """Name → place of everything that is stored beside a graph, or in it.

    Args:
        place: the graph's folder.
        format: of the bundle.

    Raises:
        BundleError: the graph cannot be read, or does not belong to the file of weights.
    """
    if format == ONNX:
        return stored_in_onnx(place / MODEL)
    return stored_in_paddle(place / PROGRAM, place / PARAMS)


def written_names(source: ExportSource, part: GraphPart, format: str) -> dict[str, str]:
    """Parameter → what an export calls it in a bundle, unless :func:`file_facts` says otherwise."""
    names = source.family.names(source.config)
    mapped = {parameter: names.to_huggingface(parameter) for parameter in part.tensors.names()}
    own = {p: m.name if m and format == ONNX else p for p, m in mapped.items()}
    packed = graph_parameters(part.packed, names)
    return own | {parameter: packed[parameter] for parameter in packed.keys() & own.keys()}


def _summed(source: ExportSource, part: GraphPart) -> frozenset[str]:
    """Tensors that are sums, or made of sums, which no two processors need to compute alike to the last bit."""
    if source.adapter is None:
        return frozenset()
    changed = {f"{module}.weight" for module in source.adapter.adapter.pairs}
    kept = {name for name in source.tensors.names() if name not in changed}
    quantized = {f"{name}{suffix}" for name in kept for suffix in (QUANTIZED, SCALES)}
    return frozenset(changed | (set(part.tensors.names()) - kept - quantized))


def wrong_weights(
    stored: Mapping[str, FileTensor],
    tensors: TensorSource,
    names: Iterable[tuple[str, str]],
    summed: frozenset[str],
    progress: Progress,
    *,
    chosen: frozenset[str] = frozenset(),
) -> dict[str, str]:
    """Weight → what is wrong with it.

    Args:
        stored: what the bundle has.
        tensors: what an export would write.
        names: pairs of a tensor and what the bundle calls it.
        summed: tensors whose last bits depend on the processor.
        progress: is told of every tensor.
        chosen: tensors of blocks whose scales such bits can decide.
    """
    wrong: dict[str, str] = {}
    for parameter, name in names:
        if name not in stored:
            wrong[name] = "it is not there"
        else:
            info, summing = tensors.info(parameter), parameter in summed
            searched = parameter in chosen and parameter.endswith((QUANTIZED, SCALES))
            with closing(in_order(pieces_of(tensors, parameter))) as pieces:
                text = difference(stored[name], info, pieces, summed=summing, chosen=searched)
            if text is not None:
                wrong[name] = text
        progress.advance(1, name)
    return wrong


def file_facts(
    place: Path, names: Mapping[str, str], format: str, file: WeightFile
) -> dict[str, Any]:
    """What the manifest has to say of a graph's files, so that they can be compared later.

    Args:
        place: folder of the graph, complete.
        names: tensor → what it is usually called in a bundle (:func:`written_names`).
        format: of the bundle.
        file: that its weights were written to.

    Returns:
        The hashes of everything beside the graph that is no weight of the model's, and the names of weights that do
        not follow from those of their tensors.
    """
    origins = {file.placements[tensor].offset: tensor for tensor in names}
    tables, renamed = dict[str, str](), dict[str, str]()
    for name, tensor in stored_tensors(place, format).items():
        origin = None if tensor.content is not None else origins.get(tensor.offset)
        if origin is not None and file.placements[origin].shape != tensor.shape:
            origin = None  # the same bytes, read in another shape
        if origin is not None and names[origin] != name:
            renamed[name] = origin
        elif origin is None and tensor.content is None:
            tables[name] = tensor.sha256()
    return {TABLES: tables} | ({RENAMED: renamed} if renamed else {})


def wrong_tables(stored: Mapping[str, FileTensor], tables: Mapping[str, str]) -> dict[str, str]:
    """What the checkpoint does not have is held to what the export wrote."""
    wrong: dict[str, str] = {}
    for name, known in tables.items():
        if name not in stored:
            wrong[name] = "it is not there"
        elif stored[name].sha256() != known:
            wrong[name] = "it is not the table that the export wrote"
    return wrong
