"""The runner for a bundle: which one, its manifest says."""

from __future__ import annotations

from pathlib import Path

from peft_deploy.bundle.manifest import ENCODER, MODEL, Manifest
from peft_deploy.config.export import PADDLE
from peft_deploy.errors import BundleError
from peft_deploy.runtime.encoder_decoder import EncoderDecoderRunner
from peft_deploy.runtime.onnx_runner import OnnxRunner
from peft_deploy.runtime.paddle_runner import PaddleRunner
from peft_deploy.signature import GraphSignature

BundleRunner = OnnxRunner | PaddleRunner | EncoderDecoderRunner


def open_runner(
    folder: Path,
    signature: GraphSignature | None = None,
    *,
    provider: str = "cpu",
    threads: int | None = None,
) -> BundleRunner:
    """ONNX Runtime, or Paddle Inference for a bundle in Paddle's format; both graphs of a bundle that has two.

    Args:
        folder: the bundle.
        signature: what the inputs and outputs must be; by default the manifest's. For a bundle of two graphs, those
            of its own graph or of both together.
        provider: ``"cpu"`` or ``"cuda"``.
        threads: threads within one operator; None leaves it to the runtime.

    Raises:
        BundleError: the folder is no bundle, or not what it says.
        ExecutionError: the provider is not available, or the runtime refuses the model.
        MissingExtraError: the runtime is not installed.
    """
    manifest = Manifest.read(folder)
    if manifest.encoder is None:
        runner = PaddleRunner if manifest.format == PADDLE else OnnxRunner
        wanted = signature or manifest.signature
        return runner(folder, wanted, provider=provider, threads=threads)
    encoder = open_encoder(folder, manifest, provider=provider, threads=threads)
    decoder = open_graph(folder, manifest, provider=provider, threads=threads)
    both = EncoderDecoderRunner(encoder, decoder, manifest.encoder.start_token_id)
    if signature not in (None, manifest.signature, both.signature):
        raise BundleError(
            f"the graphs of {folder} do not have the inputs and outputs of its model"
        )
    return both


def open_graph(
    folder: Path, manifest: Manifest, *, provider: str = "cpu", threads: int | None = None
) -> OnnxRunner | PaddleRunner:
    """The bundle's own graph alone."""
    runner = PaddleRunner if manifest.format == PADDLE else OnnxRunner
    return runner(folder, manifest.signature, provider=provider, threads=threads)


def open_encoder(
    folder: Path, manifest: Manifest, *, provider: str = "cpu", threads: int | None = None
) -> OnnxRunner | PaddleRunner:
    """The encoder of a bundle of two graphs, alone.

    Raises:
        BundleError: the bundle has one graph.
    """
    if manifest.encoder is None:
        raise BundleError(f"{folder} has one graph; there is no encoder beside it")
    signature = manifest.encoder.signature
    if manifest.format == PADDLE:
        return PaddleRunner(folder / ENCODER, signature, provider=provider, threads=threads)
    return OnnxRunner(folder / ENCODER / MODEL, signature, provider=provider, threads=threads)
