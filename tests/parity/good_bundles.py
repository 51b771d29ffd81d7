"""Good bundles, one after another, none of which may fail.

A graph is exported once; then its weights are replaced by those of other models of the same shape, merged by the same
code that an export uses, and its adapter and prefix files are written anew. Every one of them is checked as an export
checks itself, against PaddleNLP's own forward.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
from made_bundles import LORA, PREFIX, Exported, make_folders
from mutation_subjects import adapted_model, behind_prefix

from peft_deploy.bundle import MODEL, MODEL_DATA, Manifest
from peft_deploy.bundle.adapter_files import adapter_path
from peft_deploy.bundle.prefixes import prefix_path, read_prefix_file
from peft_deploy.parity import ParityReport
from peft_deploy.parity.prefixed import PrefixedRunner
from peft_deploy.parity.reference import PaddleReference
from peft_deploy.runtime import Session, open_runner
from peft_deploy.workflows.check_bundle import check_bundle, check_runner
from peft_deploy.workflows.check_weights import names_in_bundle, parts_of
from peft_deploy.workflows.convert_adapter import convert_adapter
from peft_deploy.workflows.sources import ExportSource

MERGED, AT_RUN_TIME = "LoRA merged", "LoRA at run time"


@dataclass(frozen=True, eq=False)
class Trial:
    """One check of a good bundle.

    Args:
        model: the small model's name.
        way: merged, at run time or behind a prefix.
        seed: of weights, adapters and tokens.
        report: of the check.
    """

    model: str
    way: str
    seed: int
    report: ParityReport

    @property
    def used(self) -> float:
        """The largest error in units of its limit."""
        assert self.report.worst is not None
        return self.report.worst[2].used


def run_trials(exported: Exported, folder: Path, seed: int, recipe: ModuleType) -> Iterator[Trial]:
    """Checks a bundle with the weights of another seed: as it is, and behind its prefix if it has one.

    Args:
        exported: whose graph is used; it is left as it was.
        folder: an empty folder.
        seed: of weights, adapters and tokens.
        recipe: models/tiny/make.py.
    """
    with_prefix = (exported.folder / PREFIX).is_dir()
    made = make_folders(
        recipe,
        folder,
        exported.model,
        seed=seed,
        at_run_time=exported.at_run_time,
        with_prefix=with_prefix,
    )
    source = made.source()
    _copy_with_weights(exported.bundle, made.bundle, source)
    model = adapted_model(made.bundle, source)
    family, config = source.family, source.config
    if exported.at_run_time:
        options = {"to": "onnx", "bundle": made.bundle, "force": True}
        convert_adapter(folder / LORA, adapter_path(made.bundle, LORA), **options)  # type: ignore[arg-type]
        session = Session(made.bundle)
        session.load_adapter(LORA)
        report = check_bundle(
            made.bundle, model, family, config, runner=session.runner(LORA), seed=seed
        )
        yield Trial(exported.model, AT_RUN_TIME, seed, report)
        return
    yield Trial(
        exported.model, MERGED, seed, check_bundle(made.bundle, model, family, config, seed=seed)
    )
    if with_prefix:
        reference = behind_prefix(PaddleReference(model, family, config), source)
        report = _check_prefix(made, reference, source, seed)
        yield Trial(exported.model, PREFIX, seed, report)


def _check_prefix(
    made: Exported, reference: PaddleReference, source: ExportSource, seed: int
) -> ParityReport:
    manifest = Manifest.read(made.bundle)
    path = prefix_path(made.bundle, PREFIX)
    convert_adapter(made.folder / PREFIX, path, to="onnx", bundle=made.bundle, force=True)
    prefix = read_prefix_file(path, manifest.signature, manifest.base["fingerprint"])
    runner = PrefixedRunner(open_runner(made.bundle), prefix)
    room = source.family.dims(source.config).max_positions - prefix.num_tokens
    return check_runner(made.bundle, reference, runner, room, seed=seed)


def _copy_with_weights(bundle: Path, copy: Path, source: ExportSource) -> None:
    """A copy whose weights are those of the source, at the same places in the same file."""
    copy.mkdir()
    for path in bundle.rglob("*"):
        target = copy / path.relative_to(bundle)
        if path.is_dir():
            target.mkdir()
        else:
            target.write_bytes(path.read_bytes())
    manifest = json.loads((copy / "peft_deploy.json").read_text("utf-8"))
    manifest["base"]["fingerprint"] = source.fingerprint()
    (copy / "peft_deploy.json").write_text(json.dumps(manifest), "utf-8")
    _replace_weights(copy, source)


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
