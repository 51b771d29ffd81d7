"""What a bundle says about itself, and what an export says that it would do."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timezone
from importlib.metadata import distributions
from typing import TYPE_CHECKING, Any

from peft_deploy.bundle import Manifest
from peft_deploy.config.export import RUNTIME, ExportOptions
from peft_deploy.config.layer_signature import LayerSignature
from peft_deploy.signature import GraphSignature
from peft_deploy.workflows.kept_adapters import planned_slots
from peft_deploy.workflows.sources import EXPORT_DTYPE, MEMORY, ExportSource, NamedAdapter
from peft_deploy.workflows.storage import written_parts

if TYPE_CHECKING:
    from peft_deploy.convert import ConvertedGraph, StaticProgram

LAYER = "layer"  # the model type of what no family knows
_PACKAGES = ("peft-deploy", "onnx-ir", "onnxruntime", "numpy")


def describe(
    source: ExportSource,
    options: ExportOptions,
    converted: ConvertedGraph | StaticProgram,
    hashes: dict[str, str],
    fingerprint: str,
    graph: dict[str, Any],
    shares: Mapping[str, float],
) -> Manifest:
    """The manifest of a bundle that was not validated yet.

    Args:
        source: the model and its adapters.
        options: of the export.
        converted: what the converter's process made.
        hashes: file → SHA-256.
        fingerprint: of the base model.
        graph: facts about the graph.
        shares: parameter → what rounding lost of the merged adapter's change.
    """
    traced = source.family.signature(source.config, EXPORT_DTYPE)
    signature = traced.with_cache_in(options.arithmetic.dtype)
    if options.last_logits:
        signature = signature.with_last_logits()
    if options.adapter_bank is not None:
        signature = signature.with_adapter_ids()
    return Manifest(
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        versions=_versions() | converted.versions,
        model_type=source.family.model_type,
        architecture=source.family.paddle_model(source.config),
        signature=signature,
        opset=_opset(converted),
        format=options.format,
        precision=options.precision,
        context_length=source.family.context_length(source.config),
        base={
            "name": source.name,
            "layout": source.layout,
            "fingerprint": fingerprint,
            **({"unread": source.unread} if source.unread else {}),
        },
        adapters=[
            *([_merged_entry(source.adapter, shares, options)] if source.adapter else []),
            *(_adapter_entry(named, RUNTIME) for named in source.kept),
            *(named.entry(slots=options.prefix_slots) for named in source.prefixes),
        ],
        files=hashes,
        graph=graph,
    )


def describe_layer(
    *,
    names: tuple[str, str],
    signature: GraphSignature,
    layer: LayerSignature,
    fingerprint: str,
    adapter: NamedAdapter | None,
    options: ExportOptions,
    converted: ConvertedGraph | StaticProgram,
    hashes: dict[str, str],
    graph: dict[str, Any],
) -> Manifest:
    """The same for a bundle of a layer that no family knows.

    Args:
        names: of the base model, and of the layer's class.
        signature: of the graph.
        layer: what the user said of it.
        fingerprint: of the weights without any adapter.
        adapter: merged into them, if any.
        options: of the export.
        converted: what the converter's process made.
        hashes: file → SHA-256.
        graph: facts about the graph.
    """
    return Manifest(
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        versions=_versions() | converted.versions,
        model_type=LAYER,
        architecture=names[1],
        signature=signature,
        opset=_opset(converted),
        format=options.format,
        precision=options.precision,
        base={"name": names[0], "layout": MEMORY, "fingerprint": fingerprint},
        adapters=[] if adapter is None else [_adapter_entry(adapter, "merged")],
        files=hashes,
        graph=graph,
        layer=layer.to_dict(),
    )


def unfused_warning(options: ExportOptions, graph: Mapping[str, Any]) -> str | None:
    """What to say of a graph that could not be fused though that was asked for by name; None of any other.

    Args:
        options: of the export.
        graph: what the manifest says of the graph.
    """
    if "not_fused" not in graph or (options.fuse is None and options.opset is None):
        return None
    asked = f"--opset {options.opset}" if options.fuse is None else f"--fuse {options.fuse}"
    return (
        f"{asked} was asked for, and the graph stays plain, of opset {options.converted_opset}: "
        f"{graph['not_fused']}"
    )


def _opset(converted: ConvertedGraph | StaticProgram) -> int | None:
    """What the graph declares, which is not what was asked for where it could not be fused."""
    model = getattr(converted, "model", None)
    return None if model is None else model.opset_imports[""]


def _merged_entry(
    named: NamedAdapter, shares: Mapping[str, float], options: ExportOptions
) -> dict[str, Any]:
    """With what rounding lost of the adapter, module by module: ‖round(W + Δ) - (W + Δ)‖ / ‖Δ‖."""
    lost = {
        name.removesuffix(".weight"): float(f"{share:.3g}")
        for name, share in sorted(shares.items())
    }
    rounding = {"dtype": options.arithmetic.dtype, "lost": lost}
    return {**_adapter_entry(named, "merged"), "rounding": rounding}


def _adapter_entry(named: NamedAdapter, mode: str) -> dict[str, Any]:
    adapter = named.adapter
    return {
        "name": named.name,
        "method": "lora",
        "mode": mode,
        "rank": adapter.config.r,
        "scaling": adapter.config.scaling,
        "targets": sorted(adapter.pairs),
        "replaced": sorted(adapter.replacements),
        "fingerprint": adapter.fingerprint,
    }


def plan_lines(source: ExportSource, options: ExportOptions) -> list[str]:
    """What an export would do, a sentence each.

    Args:
        source: the model and its adapters.
        options: of the export.
    """
    parts = written_parts(source, options.arithmetic, pack=options.packs)
    total = sum(part.nbytes for part in parts)
    count = len(source.merged(EXPORT_DTYPE).names())
    plan = [
        f"base model {source.name}: {source.family.paddle_model(source.config)}, {count} tensors, "
        f"{source.layout} layout"
    ]
    for named in (*([source.adapter] if source.adapter else []), *source.kept):
        adapter = named.adapter
        kept = ", kept apart from the weights" if named in source.kept else ""
        plan.append(
            f"adapter {named.name}{kept}: LoRA of rank {adapter.config.r} on {len(adapter.pairs)} layers, "
            f"{len(adapter.replacements)} replaced tensors; it fits the base model"
        )
    plan += [
        f"prefix {prefix.name}: {prefix.prefix.num_tokens} tokens; it fits the base model"
        for prefix in source.prefixes
    ]
    if options.keeps_adapters:
        plan.append(f"slots for adapters on {len(planned_slots(source, options))} linear layers")
    plan.append(f"the bundle would hold {total / 1e6:,.0f} MB of weights in {options.precision}")
    return plan


def _versions() -> dict[str, str]:
    return {p: found[0].version for p in _PACKAGES if (found := list(distributions(name=p)))}
