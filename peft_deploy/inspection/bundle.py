"""The facts about a bundle's files."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from peft_deploy.bundle import ENCODER, MANIFEST, MODEL, PARAMS, PROGRAM, Manifest
from peft_deploy.bundle.folder import sha256
from peft_deploy.config.export import PADDLE
from peft_deploy.errors import BundleError
from peft_deploy.runtime import check_external_data
from peft_deploy.runtime.program_file import check_weights
from peft_deploy.signature import GraphSignature, TensorSpec


@dataclass(frozen=True)
class BundleFile:
    """One file of a bundle.

    Args:
        name: relative to the folder.
        bytes: its size; None when it is missing.
        state: ``listed`` (in the manifest, not hashed), ``intact``, ``changed``, ``missing``, or
            ``not listed`` (beside the bundle, unknown to its manifest).
    """

    name: str
    bytes: int | None
    state: str


@dataclass(frozen=True)
class BundleInspection:
    """A bundle on disk.

    Args:
        path: the folder.
        manifest: what it says about itself.
        files: those of the manifest and whatever lies beside them.
        verified: whether files were hashed and the graph was read.
        problems: what contradicts the manifest, one sentence each.
    """

    path: Path
    manifest: Manifest
    files: tuple[BundleFile, ...]
    verified: bool
    problems: tuple[str, ...]

    @property
    def bytes(self) -> int:
        """Size of all files that are there."""
        return sum(file.bytes or 0 for file in self.files)

    @property
    def operators(self) -> dict[str, int]:
        """Operator → how often it appears, the commonest first."""
        counts = self.manifest.graph.get("operators", {})
        return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))

    @property
    def nodes(self) -> int:
        """Nodes of the graph."""
        return sum(self.operators.values())

    @property
    def encoder_nodes(self) -> int:
        """Nodes of the encoder's graph, 0 where there is none."""
        encoder = self.manifest.encoder
        return 0 if encoder is None else sum(encoder.graph.get("operators", {}).values())

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready form."""
        manifest = {**asdict(self.manifest), "signature": self.manifest.signature.to_dict()}
        del manifest["files"]
        return {
            "kind": "bundle",
            "path": str(self.path),
            **manifest,
            "operators": self.operators,
            "nodes": self.nodes,
            "bytes": self.bytes,
            "files": [asdict(file) for file in self.files],
            "verified": self.verified,
            "problems": list(self.problems),
        }


def inspect_bundle(folder: Path, *, verify: bool = False) -> BundleInspection:
    """The facts about a bundle's folder.

    Args:
        folder: the bundle.
        verify: hash every file, and compare the graph itself with the manifest.

    Raises:
        BundleError: no manifest, a damaged one, or one that names files outside the folder; the
            graph is no ONNX model or keeps weights outside the folder.
    """
    manifest = Manifest.read(folder)
    files = _files(folder, manifest, verify=verify)
    wrong = [file for file in files if file.state in ("missing", "changed")]
    problems = [
        f"{file.name} is missing"
        if file.state == "missing"
        else f"{file.name} is not the file that the manifest describes"
        for file in wrong
    ]
    complete = not any(file.state == "missing" for file in wrong)
    if manifest.format == PADDLE and complete:
        for place, graph in _graphs(folder, manifest):
            problems += _compare_program(place, graph)
    elif (folder / MODEL).is_file() and complete:
        for place, graph in _graphs(folder, manifest):
            check_external_data(place / MODEL)
            if verify:
                problems += _compare_graph(place / MODEL, graph)
    return BundleInspection(folder, manifest, files, verify, tuple(problems))


def _graphs(folder: Path, manifest: Manifest) -> list[tuple[Path, Manifest]]:
    """Where the bundle's graphs lie, each with what the manifest says of it."""
    own = [(folder, manifest)]
    if (encoder := manifest.encoder) is not None:
        said = replace(manifest, signature=encoder.signature, graph=encoder.graph)
        own.append((folder / ENCODER, said))
    return own


def _files(folder: Path, manifest: Manifest, *, verify: bool) -> tuple[BundleFile, ...]:
    root = folder.resolve()
    outside = [n for n in manifest.files if not (root / n).resolve().is_relative_to(root)]
    if outside:
        raise BundleError(
            f"the manifest of {folder} names files outside of it: {', '.join(sorted(outside))}"
        )
    found = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
    files = []
    for name, known in manifest.files.items():
        path = found.pop(name, None)
        if path is None:
            files.append(BundleFile(name, None, "missing"))
            continue
        state = "listed" if not verify else "intact" if sha256(path) == known else "changed"
        files.append(BundleFile(name, path.stat().st_size, state))
    manifest_file = found.pop(MANIFEST)
    files.append(BundleFile(MANIFEST, manifest_file.stat().st_size, "listed"))
    files += [BundleFile(n, p.stat().st_size, "not listed") for n, p in sorted(found.items())]
    return tuple(files)


def _compare_program(folder: Path, manifest: Manifest) -> list[str]:
    """Where a program in Paddle's format is not what the manifest says of it. No weight is read."""
    program = check_weights(folder / PROGRAM, folder / PARAMS)
    return [
        f"the program's {kind} are {', '.join(found)}, the manifest says {', '.join(promised)}"
        for kind, found, promised in (
            ("inputs", program.inputs, manifest.signature.input_names),
            ("outputs", program.outputs, manifest.signature.output_names),
        )
        if list(found) != list(promised)
    ]


def _compare_graph(model: Path, manifest: Manifest) -> list[str]:
    """Where the graph is not what the manifest says of it. No weight is read."""
    import onnx_ir as ir

    try:
        loaded = ir.load(model)
    except Exception as exc:  # protobuf's and onnx-ir's errors have no common base
        raise BundleError(f"{model} is not an ONNX model, or is damaged: {exc}") from exc
    problems = []
    opset = loaded.opset_imports.get("")
    if opset != manifest.opset:
        problems.append(f"the graph has opset {opset}, the manifest says {manifest.opset}")
    operators = Counter(node.op_type for node in loaded.graph)
    if dict(operators) != manifest.graph.get("operators", {}):
        problems.append("the graph's operators are not those of the manifest")
    declared = GraphSignature(
        tuple(_spec(v) for v in loaded.graph.inputs if v.name not in loaded.graph.initializers),
        tuple(_spec(value) for value in loaded.graph.outputs),
    )
    return problems + _differences(declared, manifest.signature) + _slots(loaded, manifest)


def _slots(model: Any, manifest: Manifest) -> list[str]:
    """Where the inputs with a default are not the slots that the manifest names."""
    graph = model.graph
    found = {value.name for value in graph.inputs if value.name in graph.initializers}
    promised = set(manifest.graph.get("lora_slots", {}).get("names", ()))
    promised |= set(manifest.graph.get("prefix_slots", ()))
    return [
        f"the slot {name} is {'in the graph and not in' if name in found else 'not in the graph but in'} the manifest"
        for name in sorted(found ^ promised)
    ]


def _spec(value: Any) -> TensorSpec:
    shape = () if value.shape is None else tuple(value.shape)
    dims = tuple(dim if isinstance(dim, int) else str(dim.value) for dim in shape)
    dtype = "" if value.dtype is None else str(value.dtype.numpy())
    return TensorSpec(value.name, dtype, dims)


def _differences(declared: GraphSignature, promised: GraphSignature) -> list[str]:
    problems = []
    for kind, graph, manifest in (
        ("input", declared.inputs, promised.inputs),
        ("output", declared.outputs, promised.outputs),
    ):
        ours, theirs = {s.name: s for s in graph}, {s.name: s for s in manifest}
        problems += [
            f"the {kind} {name} is {_words(ours.get(name))} in the graph and "
            f"{_words(theirs.get(name))} in the manifest"
            for name in sorted(ours.keys() | theirs.keys())
            if ours.get(name) != theirs.get(name)
        ]
    return problems


def _words(spec: TensorSpec | None) -> str:
    return "absent" if spec is None else f"{spec.dtype} {list(spec.dims)}"
