"""Paddle Inference behind the :class:`~peft_deploy.runtime.runner.Runner` interface. Paddle is imported when used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from peft_deploy.bundle.manifest import MANIFEST, PARAMS, PROGRAM, Manifest
from peft_deploy.environment import available_cores, debugging, require_paddle_inference
from peft_deploy.errors import BundleError, ExecutionError, listed
from peft_deploy.runtime.feeds import check_feeds, requested_outputs
from peft_deploy.runtime.program_file import check_weights
from peft_deploy.runtime.runner import Array, check_choices
from peft_deploy.signature import GraphSignature

_GPU_POOL_MB = 256  # what Paddle reserves at once; it grows by itself


class PaddleRunner:
    """Runs a bundle in Paddle's static format.

    Args:
        folder: the bundle.
        signature: what the program's inputs and outputs must be; by default the manifest's.
        provider: ``"cpu"`` or ``"cuda"``.
        threads: threads within one operator; None takes all cores.

    Raises:
        MissingExtraError: Paddle is not installed.
        BundleError: there is no program, its weights are not those that it names, or its inputs or outputs are not
            the signature's.
        ExecutionError: the provider is not available, or Paddle refuses the program.
        ConfigError: an unknown provider, or a number of threads below 1.
    """

    def __init__(
        self,
        folder: Path | str,
        signature: GraphSignature | None = None,
        *,
        provider: str = "cpu",
        threads: int | None = None,
    ) -> None:
        folder = Path(folder)
        self.path = folder / PROGRAM
        self.provider = provider
        self._positions: int | None = None
        if (folder / MANIFEST).is_file():
            manifest = Manifest.read(folder)
            signature = signature or manifest.signature
            self._positions = manifest.context_length
        if signature is None:
            raise BundleError(f"{folder} is not a bundle: it has no {MANIFEST}")
        self._signature = signature
        self._predictor = _open(folder, provider, threads)
        for kind, promised, declared in (
            ("input", signature.input_names, self._predictor.get_input_names()),
            ("output", signature.output_names, self._predictor.get_output_names()),
        ):
            if odd := set(promised) ^ set(declared):
                raise BundleError(
                    f"{self.path} and its manifest differ in these {kind}s:\n{listed(odd)}"
                )

    @property
    def signature(self) -> GraphSignature:
        """Inputs and outputs of the program."""
        return self._signature

    def run(
        self, feeds: Mapping[str, Array], outputs: Sequence[str] | None = None
    ) -> dict[str, Array]:
        """The named outputs (all when None), for a full set of inputs.

        Raises:
            ExecutionError: the inputs do not fit the signature, there is no such output, or Paddle failed.
        """
        names = requested_outputs(self._signature, outputs, "program")
        check_feeds(self._signature, feeds, self._positions)
        try:
            for name, array in feeds.items():
                self._predictor.get_input_handle(name).copy_from_cpu(np.ascontiguousarray(array))
            self._predictor.run()
            return {n: self._predictor.get_output_handle(n).copy_to_cpu() for n in names}
        except Exception as exc:  # Paddle's errors have no common base of their own
            raise ExecutionError(f"Paddle could not run {self.path.name}: {_reason(exc)}") from exc


def _open(folder: Path, provider: str, threads: int | None) -> Any:
    check_choices(provider, threads)
    program, params = folder / PROGRAM, folder / PARAMS
    for file in (program, params):
        if not file.is_file():
            raise BundleError(f"there is no model at {file}")
    check_weights(program, params)
    require_paddle_inference()
    import paddle
    from paddle import inference

    config = inference.Config(str(program), str(params))
    if not debugging():
        config.disable_glog_info()
    if provider == "cuda":
        if not (paddle.is_compiled_with_cuda() and paddle.device.cuda.device_count()):
            raise ExecutionError(
                "this Paddle has no CUDA device to run on",
                hint="CUDA needs the package paddlepaddle-gpu and an NVIDIA driver",
            )
        config.enable_use_gpu(_GPU_POOL_MB, 0)
    else:
        config.disable_gpu()
        # With oneDNN, SmolLM2 takes five times as long for a prompt, and twice as long for a token (measured).
        config.disable_mkldnn()
        config.set_cpu_math_library_num_threads(threads or available_cores())
    try:
        return inference.create_predictor(config)
    except Exception as exc:  # Paddle's errors have no common base of their own
        raise ExecutionError(f"Paddle cannot load {program}: {_reason(exc)}") from exc


def _reason(exc: Exception) -> str:
    """Paddle's message without the C++ stack around it."""
    lines = [line.strip() for line in str(exc).splitlines() if line.strip()]
    telling = [line for line in lines if "Error:" in line]
    return (telling or lines or [type(exc).__name__])[-1]
