"""Good bundles, one after another, none of which may fail.

A graph is exported once; then its weights are replaced by those of other models of the same shape, written by the same
code that an export uses, and its adapter and prefix files are written anew. Every one of them goes through the whole
of ``validate --base``: against PaddleNLP's own forward, byte by byte, and with every adapter that it keeps.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
from made_bundles import LORA, PREFIX, Exported, make_folders

import peft_deploy
from peft_deploy.adapters.formats import Adapter
from peft_deploy.adapters.formats.prefix import PrefixAdapter
from peft_deploy.bundle import MODEL, MODEL_DATA, Manifest
from peft_deploy.bundle.adapter_files import adapter_path
from peft_deploy.bundle.manifest import MANIFEST
from peft_deploy.bundle.prefixes import prefix_path
from peft_deploy.parity import ParityReport
from peft_deploy.workflows.check_adapters import PART
from peft_deploy.workflows.check_prefixes import IN_SLOTS
from peft_deploy.workflows.check_weights import names_in_bundle, parts_of
from peft_deploy.workflows.convert_adapter import convert_adapter
from peft_deploy.workflows.sources import ExportSource

MERGED, AT_RUN_TIME, NO_ADAPTER = "LoRA merged", "LoRA at run time", "slots left empty"
IN_A_SLOT = "prefix in slots"
# A part of a report → the way that it is the check of; all others are of the bundle itself.
WAYS = {
    PART.format(LORA): AT_RUN_TIME,
    f"prefix {PREFIX}": PREFIX,
    f"prefix {PREFIX}{IN_SLOTS}": IN_A_SLOT,
}


@dataclass(frozen=True, eq=False)
class Trial:
    """One check of a good bundle.

    Args:
        model: the small model's name.
        way: merged, at run time or behind a prefix.
        precision: of the bundle.
        seed: of weights, adapters and tokens.
        report: of this check alone, without its parts.
    """

    model: str
    way: str
    precision: str
    seed: int
    report: ParityReport

    @property
    def used(self) -> float:
        """The largest error in units of its limit."""
        assert self.report.worst is not None
        return self.report.worst[2].used


def run_trials(exported: Exported, folder: Path, seed: int, recipe: ModuleType) -> Iterator[Trial]:
    """Checks a bundle with the weights of another seed: as it is, and with all that it keeps beside its weights.

    Args:
        exported: whose graph is used; it is left as it was.
        folder: an empty folder.
        seed: of weights, adapters and tokens.
        recipe: models/tiny/make.py.
    """
    made = make_folders(
        recipe,
        folder,
        exported.model,
        seed=seed,
        at_run_time=exported.at_run_time,
        with_prefix=(exported.folder / PREFIX).is_dir(),
    )
    source = made.source()
    _copy_with_weights(exported.bundle, made.bundle, source)
    _write_adapters(made)
    precision = Manifest.read(made.bundle).precision
    report = peft_deploy.validate(
        made.bundle, made.folder / "base", adapter=made.adapters, seed=seed
    )
    itself = NO_ADAPTER if exported.at_run_time else MERGED
    yield Trial(exported.model, itself, precision, seed, report)
    for title, part in report.parts.items():
        yield Trial(exported.model, WAYS.get(title, itself), precision, seed, part)


def _copy_with_weights(bundle: Path, copy: Path, source: ExportSource) -> None:
    """A copy whose weights are those of the source, at the same places in the same file."""
    copy.mkdir()
    for path in bundle.rglob("*"):
        target = copy / path.relative_to(bundle)
        if path.is_dir():
            target.mkdir()
        else:
            target.write_bytes(path.read_bytes())
    manifest = json.loads((copy / MANIFEST).read_text("utf-8"))
    manifest["base"]["fingerprint"] = source.fingerprint()
    known = _fingerprints(source)
    for entry in manifest["adapters"]:
        entry["fingerprint"] = known[entry["name"]]
    (copy / MANIFEST).write_text(json.dumps(manifest), "utf-8")
    _replace_weights(copy, source)


def _fingerprints(source: ExportSource) -> Mapping[str, str]:
    """Adapter → fingerprint."""
    given: dict[str, Adapter | PrefixAdapter] = {p.name: p.adapter for p in source.prefixes}
    given |= {named.name: named.adapter for named in source.kept}
    if source.adapter is not None:
        given[source.adapter.name] = source.adapter.adapter
    return {name: adapter.fingerprint for name, adapter in given.items()}


def _replace_weights(bundle: Path, source: ExportSource) -> None:
    manifest = Manifest.read(bundle)
    for part in parts_of(manifest, source):
        path = bundle / part.folder / MODEL
        graph = onnx.load(str(path), load_external_data=False).graph
        places = {t.name: {e.key: e.value for e in t.external_data} for t in graph.initializer}
        data = bytearray(path.with_name(MODEL_DATA).read_bytes())
        for tensor, name in names_in_bundle(manifest, source, part).items():
            value = np.ascontiguousarray(part.tensors.read(tensor)).tobytes()
            start, length = (int(places[name][key]) for key in ("offset", "length"))
            assert length == len(value) and data[start : start + length] != value
            data[start : start + length] = value
        path.with_name(MODEL_DATA).write_bytes(data)


def _write_adapters(made: Exported) -> None:
    """The files beside the graph, as ``adapter convert`` makes them for a bundle that is there already."""
    lora, prefix = adapter_path(made.bundle, LORA), adapter_path(made.bundle, PREFIX)
    files = {lora: LORA, prefix: PREFIX, prefix_path(made.bundle, PREFIX): PREFIX}
    for path, name in files.items():
        if path.is_file():
            convert_adapter(made.folder / name, path, to="onnx", bundle=made.bundle, force=True)
