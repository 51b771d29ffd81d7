"""``peft_deploy.json``: what a bundle says about itself."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from peft_deploy.config.export import FORMATS, ONNX
from peft_deploy.errors import BundleError
from peft_deploy.signature import GraphSignature

FORMAT_VERSION = 1
MANIFEST = "peft_deploy.json"
MODEL = "model.onnx"
MODEL_DATA = "model.onnx.data"
PROGRAM = "model.json"  # Paddle's static format
PARAMS = "model.pdiparams"
ENCODER = "encoder"  # the folder of an encoder's graph and weights, which go by the same names


@dataclass(frozen=True, kw_only=True)
class EncoderGraph:
    """A second graph, which reads a source text once; its outputs are inputs of the bundle's own graph.

    Args:
        signature: its inputs and outputs.
        start_token_id: the token that the decoder begins with.
        graph: facts about it, as in :class:`Manifest`.
    """

    signature: GraphSignature
    start_token_id: int
    graph: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready form of the entry."""
        return {**asdict(self), "signature": self.signature.to_dict()}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> EncoderGraph:
        """The inverse of :meth:`to_dict`."""
        return cls(**{**data, "signature": GraphSignature.from_dict(data["signature"])})


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The contents of ``peft_deploy.json``.

    Args:
        format_version: version of this file's form; a reader refuses a newer one.
        created: when, in UTC (ISO 8601).
        versions: package name → version of everything that took part.
        model_type: the family.
        architecture: PaddleNLP's class name.
        signature: inputs and outputs of the graph.
        opset: version of the default operator set; None in Paddle's format.
        format: ``onnx``, or ``paddle`` for Paddle's static format.
        precision: ``fp32``, ….
        context_length: the most tokens that the model can see, new ones included; None when that is not known.
        base: where the base model came from: ``name``, ``layout`` and ``fingerprint``, and where there are any,
            ``unread``, the entries of its config.json that nobody reads (:mod:`~peft_deploy.families.unread`).
        adapters: one entry an adapter: ``name``, ``method``, ``mode`` (``merged``; ``runtime`` for one that is kept
            in ``adapters/``; ``prefix``), ``rank``, ``scaling``, ``targets`` (module names), ``fingerprint``.
        files: file name in the bundle → SHA-256 of its contents.
        graph: node counts by operator and other facts about the graph: ``lora_slots`` with the modules that have
            some, their names, rank and type, ``prefix_slots``.
        layer: for a model that no family knows, what its user said of it
            (:class:`~peft_deploy.config.layer_signature.LayerSignature`).
        encoder: the graph in ``encoder/`` that is run before this one, for a model that reads one text and writes
            another; None for a model of one graph.
        parity: the result of the parity check, or None when the bundle was not validated.
    """

    format_version: int = FORMAT_VERSION
    created: str = ""
    versions: dict[str, str]
    model_type: str
    architecture: str
    signature: GraphSignature
    opset: int | None
    precision: str
    format: str = ONNX
    context_length: int | None = None
    base: dict[str, Any]
    adapters: list[dict[str, Any]] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)
    graph: dict[str, Any] = field(default_factory=dict)
    layer: dict[str, Any] | None = None
    encoder: EncoderGraph | None = None
    parity: dict[str, Any] | None = None

    def to_json(self) -> str:
        """The text of the file."""
        data = asdict(self)
        data["signature"] = self.signature.to_dict()
        data["encoder"] = self.encoder and self.encoder.to_dict()
        return json.dumps(data, indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """The manifest of the bundle in ``folder``.

        Raises:
            BundleError: there is none, it is not readable, or it is of a newer version.
        """
        path = folder / MANIFEST
        try:
            data = json.loads(path.read_text("utf-8"))
        except FileNotFoundError:
            raise BundleError(
                f"{folder} is not a bundle: it has no {MANIFEST}",
                hint="make one with: peft-deploy export --base … --adapter … --merge --output DIR",
            ) from None
        except (OSError, ValueError) as exc:
            raise BundleError(f"{path} cannot be read: {exc}") from exc
        try:
            version = data["format_version"]
            if version > FORMAT_VERSION:
                raise BundleError(
                    f"{path} has format_version {version}; this release reads up to {FORMAT_VERSION}",
                    hint="update peft-deploy",
                )
            data["signature"] = GraphSignature.from_dict(data["signature"])
            if data.get("encoder") is not None:
                data["encoder"] = EncoderGraph.from_dict(data["encoder"])
            unknown = set(data) - {f.name for f in fields(cls)}
            if unknown:
                raise BundleError(f"{path} has unknown entries: {', '.join(sorted(unknown))}")
            if data.get("format", ONNX) not in FORMATS:
                raise BundleError(f"{path} has the unknown format {data['format']!r}")
            return cls(**data)
        except (KeyError, TypeError) as exc:
            raise BundleError(f"{path} is incomplete: {exc}") from exc
