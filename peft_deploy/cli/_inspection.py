"""The results of an inspection, for people."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from peft_deploy.bundle import MANIFEST
from peft_deploy.bundle.adapter_bank import bank_capacity
from peft_deploy.inspection import (
    AdapterInspection,
    BundleInspection,
    CheckpointInspection,
    FileSize,
    PrefixInspection,
    TensorTotals,
)
from peft_deploy.signature import TensorSpec, cross_names, past_names, present_names
from peft_deploy.weights.rounding import ROUNDING_LIMIT, lossy

_SHOWN = 12  # files, replaced tensors and operators in one list; the rest is counted
_TIMES = "×"  # noqa: RUF001 (the multiplication sign is meant)
_SHORT = 16  # digits of a fingerprint that tell it from others
_STATES = {
    "intact": "green",
    "changed": "bold red",
    "missing": "bold red",
    "not listed": "yellow",
    "listed": "dim",
}

_FORMATS = {
    "paddle": "PaddleNLP's",
    "hf": "Hugging Face PEFT's",
    "onnx": "onnxruntime's (.onnx_adapter)",
}
_UNNAMED = "made of PaddleNLP's names, which only the base model tells"

Rows = list[tuple[str, str | Text]]


def render(
    found: CheckpointInspection | AdapterInspection | PrefixInspection | BundleInspection,
) -> RenderableType:
    """The facts as lines of a label and a value."""
    if isinstance(found, BundleInspection):
        return _bundle(found)
    if isinstance(found, AdapterInspection):
        return _adapter(found)
    if isinstance(found, PrefixInspection):
        return _prefix(found)
    return _checkpoint(found)


def _sheet(kind: str, path: Path, rows: Rows, *below: RenderableType) -> RenderableType:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for label, value in rows:
        table.add_row(label, value if isinstance(value, Text) else Text(value))
    return Group(Text.assemble((kind, "bold cyan"), " ", str(path)), table, *below)


def _checkpoint(found: CheckpointInspection) -> RenderableType:
    rows: Rows = []
    if found.model_type or found.architectures:
        names = ", ".join(found.architectures) or "not named"
        rows.append(("architecture", f"{names} ({found.model_type})"))
    if found.unsupported is not None:
        rows.append(("export", Text(f"not possible: {found.unsupported}", "yellow")))
    if found.dims is not None:
        dims = found.dims
        rows += [
            (
                "dimensions",
                f"{dims.num_layers} layers, hidden {dims.hidden_size}, {dims.num_heads} heads over "
                f"{dims.num_kv_heads} key/value heads of {dims.head_dim}",
            ),
            ("vocabulary", f"{dims.vocab_size:,} tokens, {dims.max_positions:,} positions"),
        ]
    if found.tied is not None:
        tied = "shares the embedding (tied)" if found.tied else "has weights of its own (untied)"
        rows.append(("output layer", tied))
    rows.append(("parameters", _parameters(found.model or found.stored)))
    if found.model is not None and found.model != found.stored:
        rows.append(("in the files", _parameters(found.stored)))
    rows += [("layout", found.layout or "of no registered family")]
    rows += [("files", _sizes(f"{found.container}, ", found.files))]
    if found.companions:
        rows.append(("beside them", ", ".join(found.companions)))
    if found.fingerprint:
        rows.append(("fingerprint", found.fingerprint[:_SHORT]))
    return _sheet("checkpoint", found.path, rows)


def _parameters(totals: TensorTotals) -> str:
    parts = [f"{count:,} {dtype}" for dtype, count in totals.dtypes.items()]
    kinds = parts[0].partition(" ")[2] if len(parts) == 1 else " + ".join(parts)
    return f"{totals.parameters:,} in {totals.tensors} tensors, {kinds}, {decimal(totals.bytes)}"


def _sizes(prefix: str, files: Iterable[FileSize]) -> str:
    known = list(files)
    listed = [f"{file.name} {decimal(file.bytes)}" for file in known[:_SHOWN]]
    more = f", and {len(known) - _SHOWN} more" if len(known) > _SHOWN else ""
    return prefix + ", ".join(listed) + more


def _adapter(found: AdapterInspection) -> RenderableType:
    rows: Rows = [
        ("format", _FORMATS[found.format]),
        ("method", f"{found.method}, rank {_ranks(found)}"),
        (
            "scaling",
            f"{found.scaling:g} (alpha {found.alpha:g}), dropout {found.dropout:g} in training",
        ),
        ("base model", found.base_name or "not recorded"),
        ("targets", f"{found.modules} modules{_patterns(found)}"),
        ("values", _parameters(found.stored) + ", all finite"),
        ("change", _change(found)),
        ("files", _sizes("", found.files)),
        ("fingerprint", found.fingerprint[:_SHORT] if found.fingerprint else _UNNAMED),
        ("provenance", _provenance(found.provenance)),
    ]
    if found.replaced:
        shown = [f"{t.name} {list(t.shape)} {t.dtype}" for t in found.replaced[:_SHOWN]]
        more = len(found.replaced) - _SHOWN
        rows.append(("replaced", "\n".join(shown + ([f"and {more} more"] if more > 0 else []))))
    return _sheet("adapter", found.path, rows, _targets(found))


def _prefix(found: PrefixInspection) -> RenderableType:
    width = "" if found.projection_size is None else f" of width {found.projection_size}"
    caches = "compared with the weights" if found.pre_caches else "not there"
    evaluated = found.position_offset is not None
    rows: Rows = [
        ("method", f"{found.method}{width}, {found.num_tokens} prefix tokens"),
        ("base model", found.base_name or "not recorded")
        if evaluated
        else ("dropout", f"{found.dropout:g} in training"),
        (
            "for models of",
            f"{found.num_layers} layers, {found.num_kv_heads} key and value heads of "
            f"{found.head_dim}",
        ),
        ("values", _parameters(found.stored) + ", all finite"),
        (
            "keys and values",
            f"norm {found.norm:.4g}, {decimal(found.cache_bytes)} in a cache"
            + ("" if evaluated else f"; pre_caches.npy {caches}"),
        ),
        ("files", _sizes("", found.files)),
        ("fingerprint", found.fingerprint[:_SHORT]),
        ("positions", f"those of a text begin at {found.position_offset}")
        if evaluated
        else ("provenance", _provenance(found.provenance)),
    ]
    return _sheet("prefix", found.path, rows)


def _ranks(found: AdapterInspection) -> str:
    return ", ".join(map(str, found.ranks)) or str(found.rank)


def _patterns(found: AdapterInspection) -> str:
    return f"; patterns {', '.join(found.target_modules)}" if found.target_modules else ""


def _change(found: AdapterInspection) -> Text:
    if found.untrained:
        return Text("none: every A·B is zero, the adapter is untrained", "bold yellow")
    text = f"‖s·A·B‖ = {found.norm:.4g} over all modules"
    if found.unchanged:
        return Text(f"{text}; {found.unchanged} of {found.modules} modules unchanged", "yellow")
    return Text(text)


def _targets(found: AdapterInspection) -> Table:
    table = Table(box=None, padding=(0, 2), header_style="dim")
    table.add_column("modules", overflow="fold")
    table.add_column(Text("[in, out]"))
    table.add_column("‖s·A·B‖ each", justify="right")
    for group in found.targets:
        span = f"{group.smallest:.3g}"
        if f"{group.largest:.3g}" != span:
            span += f" … {group.largest:.3g}"
        table.add_row(
            f"{group.pattern} {_TIMES} {group.count}",
            Text(" or ".join(str(list(shape)) for shape in group.shapes)),
            Text(span, "bold yellow" if group.unchanged else ""),
        )
    return table


def _provenance(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "none recorded"
    base = found["base_fingerprint"]
    parts = [f"base fingerprint {base[:_SHORT]}" if base else "no base fingerprint"]
    parts.append(f"samples of {found['sampled_modules']} base weights")
    if found["saved_while_merged"]:
        parts.append("saved while merged")
    if found["principal_start"]:
        parts.append("started from the base's principal part")
    return ", ".join(parts)


def _bundle(found: BundleInspection) -> RenderableType:
    manifest = found.manifest
    base = manifest.base
    operators = list(found.operators.items())
    named = ", ".join(f"{name} {_TIMES} {count}" for name, count in operators[:_SHOWN])
    more = len(operators) - _SHOWN
    rows: Rows = [
        ("model", f"{manifest.architecture} ({manifest.model_type}), {manifest.precision}"),
        (
            "base model",
            f"{base.get('name')}, {base.get('layout')} layout, "
            f"fingerprint {str(base.get('fingerprint'))[:_SHORT]}",
        ),
        *([("not read", ", ".join(unread))] if (unread := base.get("unread")) else []),
        ("adapters", "\n".join(_entry(entry) for entry in manifest.adapters) or "none"),
        *(("rounding", _rounding(e)) for e in manifest.adapters if "rounding" in e),
        ("slots", _slots(manifest.graph)),
        ("graph", f"{_kind(manifest.opset)}, {found.nodes:,} nodes"),
        ("operators", named + (f" and {more} more kinds" if more > 0 else "")),
        *_packed(manifest.graph),
        ("inputs", _specs(manifest.signature.inputs)),
        ("outputs", _specs(manifest.signature.outputs)),
        *_encoder(found),
        ("parity", _parity(manifest.parity)),
        ("made with", ", ".join(f"{name} {v}" for name, v in manifest.versions.items())),
        ("manifest of", _written(found.path / MANIFEST)),
    ]
    problems = [Text(f"✗ {problem}", "bold red") for problem in found.problems]
    if found.verified and not problems:
        problems = [Text("✓ every file and the graph are what the manifest says", "green")]
    return _sheet("bundle", found.path, rows, _files(found), *problems)


def _packed(graph: Mapping[str, Any]) -> Rows:
    """How many linear layers share a matrix with others, and the kinds of such matrices."""
    packed: Mapping[str, Sequence[str]] = graph.get("packed", {})
    if not packed:
        return []
    kinds = {
        module.rpartition(".")[2]: ", ".join(part.rpartition(".")[2] for part in parts)
        for module, parts in packed.items()
    }
    layers = sum(map(len, packed.values()))
    named = "; ".join(f"{kind}: {parts}" for kind, parts in kinds.items())
    return [("packed", f"{layers} linear layers in {len(packed)} matrices ({named})")]


def _encoder(found: BundleInspection) -> Rows:
    """The graph that is run before, where there is one."""
    encoder = found.manifest.encoder
    if encoder is None:
        return []
    return [
        (
            "encoder",
            f"{found.encoder_nodes:,} nodes; the text begins with {encoder.start_token_id}",
        ),
        ("… inputs", _specs(encoder.signature.inputs)),
        ("… outputs", _specs(encoder.signature.outputs)),
    ]


def _slots(graph: Mapping[str, Any]) -> str:
    """What adapters can change at run time."""
    lora, prefix = graph.get("lora_slots"), graph.get("prefix_slots")
    parts = []
    if lora:
        rank = "any rank" if lora["rank"] is None else f"rank {lora['rank']}"
        layers = len(lora["targets"])
        parts.append(f"LoRA of {rank} on {layers} linear layers, {lora['dtype']}")
    capacity = bank_capacity(graph)
    if capacity is not None:
        parts.append(f"a bank of {capacity} adapters, one a row of the batch")
    if prefix:
        parts.append("a prefix of any length")
    return "; ".join(parts) or "none: adapters are in the weights"


def _entry(entry: Mapping[str, Any]) -> str:
    if entry.get("method") == "prefix":
        return (
            f"{entry.get('name')}: prefix of {entry.get('tokens')} tokens, "
            f"fingerprint {str(entry.get('fingerprint'))[:_SHORT]}"
        )
    targets = entry.get("targets", [])
    replaced = entry.get("replaced", [])
    also = f", {len(replaced)} replaced tensors" if replaced else ""
    return (
        f"{entry.get('name')}: {entry.get('method')} of rank {entry.get('rank')}, scaling "
        f"{entry.get('scaling'):g}, {_place(entry)} {len(targets)} modules{also}, "
        f"fingerprint {str(entry.get('fingerprint'))[:_SHORT]}"
    )


def _rounding(entry: Mapping[str, Any]) -> str | Text:
    """What of the adapter's change was lost when the merged weights were rounded."""
    lost, dtype = entry["rounding"]["lost"], entry["rounding"]["dtype"]
    if not lost:
        return f"{entry.get('name')}: no changed weight was rounded"
    worst = max(lost, key=lost.__getitem__)
    text = (
        f"{entry.get('name')}: to {dtype}, at most {lost[worst]:.2g} of a layer's change ({worst})"
    )
    over = lossy(lost)
    if not over:
        return text
    names = ", ".join(list(over)[:_SHOWN]) + (" …" if len(over) > _SHOWN else "")
    return Text(f"{text}; more than {ROUNDING_LIMIT:g} was lost in: {names}", "bold yellow")


def _place(entry: Mapping[str, Any]) -> str:
    return "kept apart, for" if entry.get("mode") == "runtime" else f"{entry.get('mode')} into"


def _specs(specs: tuple[TensorSpec, ...]) -> str:
    """One line each; of what every layer has, that of the first."""
    count = len(specs)
    families = [cross_names(count), [*past_names(count), *present_names(count)]]
    layered = {name for names in families for name in names}
    lines = [_spec(spec) for spec in specs if spec.name not in layered]
    for names in families:
        layers = [spec for spec in specs if spec.name in names]
        lines += [_spec(spec) for spec in layers[:2]]
        if len(layers) > 2:
            others = len(layers) // 2 - 1
            lines.append(f"… and the same for {others} more layer{'s' if others > 1 else ''}")
    return "\n".join(lines)


def _spec(spec: TensorSpec) -> str:
    return f"{spec.name} {spec.dtype} [{', '.join(str(dim) for dim in spec.dims)}]"


def _parity(parity: Mapping[str, Any] | None) -> Text:
    if parity is None:
        return Text("not checked", "yellow")
    passed = bool(parity.get("passed"))
    return Text(str(parity.get("summary", "")), "green" if passed else "bold red")


def _written(manifest: Path) -> str:
    time = datetime.fromtimestamp(manifest.stat().st_mtime).astimezone()
    return time.strftime("%Y-%m-%d %H:%M %Z")


def _files(found: BundleInspection) -> Table:
    table = Table(box=None, padding=(0, 2), header_style="dim")
    table.add_column("file", overflow="fold")
    table.add_column("size", justify="right")
    table.add_column("hash" if found.verified else "")
    for file in found.files:
        size = "" if file.bytes is None else decimal(file.bytes)
        quiet = file.state == "listed"
        table.add_row(
            Text(file.name), size, Text("" if quiet else file.state, _STATES[file.state])
        )
    table.add_row(Text(f"{len(found.files)} files", "dim"), decimal(found.bytes), "")
    return table


def _kind(opset: int | None) -> str:
    return "Paddle's static format" if opset is None else f"opset {opset}"
