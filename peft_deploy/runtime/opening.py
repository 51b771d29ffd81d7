"""The runner for a bundle: which one, its manifest says."""

from __future__ import annotations

from pathlib import Path

from peft_deploy.bundle.manifest import Manifest
from peft_deploy.config.export import PADDLE
from peft_deploy.runtime.onnx_runner import OnnxRunner
from peft_deploy.runtime.paddle_runner import PaddleRunner
from peft_deploy.signature import GraphSignature


def open_runner(
    folder: Path,
    signature: GraphSignature | None = None,
    *,
    provider: str = "cpu",
    threads: int | None = None,
) -> OnnxRunner | PaddleRunner:
    """ONNX Runtime, or Paddle Inference for a bundle in Paddle's format.

    Args:
        folder: the bundle.
        signature: what the inputs and outputs must be; by default the manifest's.
        provider: ``"cpu"`` or ``"cuda"``.
        threads: threads within one operator; None leaves it to the runtime.

    Raises:
        BundleError: the folder is no bundle, or not what it says.
        ExecutionError: the provider is not available, or the runtime refuses the model.
        MissingExtraError: the runtime is not installed.
    """
    manifest = Manifest.read(folder)
    signature = signature or manifest.signature
    runner = PaddleRunner if manifest.format == PADDLE else OnnxRunner
    return runner(folder, signature, provider=provider, threads=threads)
