"""ONNX Runtime behind the :class:`~peft_deploy.runtime.runner.Runner` interface."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from peft_deploy.bundle.manifest import MANIFEST, MODEL, Manifest
from peft_deploy.bundle.slots import Slot
from peft_deploy.config.precision import BFLOAT16, NO_BFLOAT16, precision_dtype
from peft_deploy.environment import debugging, require_onnxruntime
from peft_deploy.errors import BundleError, ExecutionError, listed
from peft_deploy.runtime._ort_values import numpy_name, to_numpy, to_ort
from peft_deploy.runtime.caching import Cache
from peft_deploy.runtime.exact_arithmetic import exact_model
from peft_deploy.runtime.external_data import check_external_data
from peft_deploy.runtime.feeds import (
    check_adapter_ids,
    check_feeds,
    check_indices,
    requested_outputs,
)
from peft_deploy.runtime.placement import RECORD, Placement
from peft_deploy.runtime.runner import Array, check_choices
from peft_deploy.signature import (
    ADAPTER_IDS,
    BANK_A,
    INPUT_IDS,
    LOGITS,
    GraphSignature,
    TensorSpec,
    present_names,
)

if TYPE_CHECKING:
    import onnxruntime as ort

Provider = Literal["cpu", "cuda"]
EXECUTION_PROVIDERS: dict[str, str] = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
}

# TF32 keeps 10 bits of a float32's 23 in matrix products, which is no longer the model that was trained.
_PROVIDER_OPTIONS: dict[str, dict[str, str]] = {"cuda": {"use_tf32": "0"}}
_QUIET = 4  # only what ends the process; errors arrive as exceptions with the same words
_WARNINGS = 2
NO_PREPACKING = "session.disable_prepacking"
# Where onnxruntime is to look for the weights of a model that it gets as bytes.
WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"


class OnnxRunner:
    """Runs an ONNX model, and keeps the cache on the device between the steps of a generation.

    Args:
        model: a bundle's folder, or an ``.onnx`` file.
        signature: what the graph's inputs and outputs must be; by default the manifest's, and for
            a lone file what the file itself declares.
        provider: ``"cpu"`` or ``"cuda"``.
        threads: threads within one operator; None leaves it to onnxruntime (all cores).
        graph: a serialized model to run in place of the file's, with weights beside that file.
        lean: take less memory and more time: weights are used where they are mapped, and not arranged anew.

    Raises:
        MissingExtraError: onnxruntime is not installed.
        BundleError: there is no model, its weights lie outside its folder, or it is not what the
            signature says.
        ExecutionError: the provider is not available, or onnxruntime refuses the model.
        ConfigError: an unknown provider, or a number of threads below 1.

    Attributes:
        placement: which of the graph's nodes the provider runs; None on the CPU, where there is no other.
    """

    def __init__(
        self,
        model: Path | str,
        signature: GraphSignature | None = None,
        *,
        provider: str = "cpu",
        threads: int | None = None,
        graph: bytes | None = None,
        lean: bool = False,
    ) -> None:
        path = Path(model)
        self._positions: int | None = None
        dtype = None
        if path.is_dir():
            if (path / MANIFEST).is_file():
                manifest = Manifest.read(path)
                signature = signature or manifest.signature
                self._positions = manifest.context_length
                dtype = precision_dtype(manifest.precision)
            path = path / MODEL
        if not path.is_file():
            raise BundleError(f"there is no model at {path}")
        _require_kernels(path, signature, dtype, provider)
        self.path = path
        self.provider = provider
        self._session = _open(path, provider, threads, graph, lean=lean)
        self.placement = None if provider == "cpu" else _placement(self._session, provider)
        declared = _declared_signature(self._session)
        self._has_bank = ADAPTER_IDS in declared.input_names
        if signature is not None:
            promised = signature.with_adapter_ids() if self._has_bank else signature
            _check_signature(path, promised, declared)
        self._signature = (signature or declared).without_adapter_ids()
        self._adapter_ids: int | Sequence[int] = 0
        self._bank_entries = 1  # the default's
        self._past = [spec.name for spec in self._signature.past]
        self._present = present_names(self._signature.num_layers)
        self._slot_values: Mapping[str, ort.OrtValue] = {}
        self._bindings: list[ort.IOBinding] = []  # at rest, the slots bound

    @property
    def slots(self) -> dict[str, Slot]:
        """The graph's slots for adapters by name: inputs that keep a default unless they are filled."""
        nodes = self._session.get_overridable_initializers()
        specs = [_declared(node, "slot") for node in nodes]
        return {spec.name: Slot(spec.name, spec.dtype, spec.dims) for spec in specs}

    @property
    def has_bank(self) -> bool:
        """Whether each row of a batch can use an adapter of its own."""
        return self._has_bank

    def with_slots(
        self, values: Mapping[str, ort.OrtValue], adapter_ids: int | Sequence[int] = 0
    ) -> OnnxRunner:
        """The same graph with some of its slots filled; it shares everything with this runner.

        Args:
            values: slot → its value on the runner's device; the runner keeps them alive.
            adapter_ids: for a bank, the entry that all rows use, or one a row; 0 is no adapter.
        """
        filled = copy.copy(self)
        filled._slot_values = dict(values)
        filled._adapter_ids = adapter_ids
        entries = [value.shape()[0] for name, value in values.items() if name.endswith(BANK_A)]
        filled._bank_entries = min(entries, default=1)
        filled._bindings = []
        return filled

    @property
    def signature(self) -> GraphSignature:
        """Inputs and outputs of the graph; a bank's ``adapter_ids`` may be fed, too, and are left out here."""
        return self._signature

    def run(
        self, feeds: Mapping[str, Array], outputs: Sequence[str] | None = None
    ) -> dict[str, Array]:
        """The named outputs (all when None), for a full set of inputs.

        Raises:
            ExecutionError: the inputs do not fit the signature, there is no such output, or
                onnxruntime failed.
        """
        names = requested_outputs(self._signature, outputs)
        own = {name: array for name, array in feeds.items() if name != ADAPTER_IDS}
        check_feeds(self._signature, own if self._has_bank else feeds, self._positions)
        values = self._inputs(feeds)
        results = self._run(values, dict.fromkeys(names, "cpu"))
        return {name: to_numpy(value) for name, value in results.items()}

    def load_cache(self, arrays: Sequence[Array]) -> Cache:
        """The arrays as a cache on the runner's device.

        Args:
            arrays: [B, K, P, D] each, in signature order.
        """
        values = tuple(to_ort(array, self.provider) for array in arrays)
        return Cache(values, arrays[0].shape[2])

    def step(self, feeds: Mapping[str, Array], cache: Cache) -> tuple[Array, Cache]:
        """Logits [B, S, V] of the new tokens, and the cache grown by them; the cache is not
        copied.

        Raises:
            ExecutionError: a token id or position that the model does not have, or onnxruntime
                failed.
        """
        check_indices(self._signature, feeds, self._positions)
        values = self._inputs(feeds)
        values.update(zip(self._past, cache.values, strict=True))
        places = {LOGITS: "cpu", **dict.fromkeys(self._present, self.provider)}
        results = self._run(values, places)
        logits = to_numpy(results.pop(LOGITS))
        present = tuple(results[name] for name in self._present)
        return logits, Cache(present, present[0].shape()[2])

    def _inputs(self, feeds: Mapping[str, Array]) -> dict[str, ort.OrtValue]:
        """The feeds, and for a bank the ids of the rows' adapters."""
        values = {name: to_ort(array, "cpu") for name, array in feeds.items()}
        if self._has_bank:
            batch, ids = len(feeds[INPUT_IDS]), feeds.get(ADAPTER_IDS)
            if ids is None:
                ids = np.array(self._adapter_ids, np.int64)
                ids = np.tile(ids, batch) if ids.ndim == 0 else ids
            check_adapter_ids(ids, batch, self._bank_entries)
            values[ADAPTER_IDS] = to_ort(ids, "cpu")
        return values

    def _run(
        self, values: Mapping[str, ort.OrtValue], places: Mapping[str, str]
    ) -> dict[str, ort.OrtValue]:
        """Outputs by name, each on the device that ``places`` gives it."""
        import onnxruntime as ort

        options = ort.RunOptions()
        options.log_severity_level = _WARNINGS if debugging() else _QUIET
        try:
            binding = self._binding()
            for name, value in values.items():
                binding.bind_ortvalue_input(name, value)
            for name, device in places.items():
                binding.bind_output(name, device)
            self._session.run_with_iobinding(binding, options)
            results = dict(zip(places, binding.get_outputs(), strict=True))
        except Exception as exc:  # onnxruntime's errors have no common base of their own
            raise ExecutionError(
                f"onnxruntime could not run {self.path.name}: {_reason(exc)}"
            ) from exc
        if self._slot_values:
            binding.clear_binding_outputs()
            self._bindings.append(binding)
        return results

    def _binding(self) -> ort.IOBinding:
        """A binding with the slots bound, which is as much work as a step of a small model: used again if possible.

        Every call binds all other inputs and outputs anew.
        """
        try:
            return self._bindings.pop()
        except IndexError:  # none, or all of them are in other threads' hands
            binding = self._session.io_binding()
        # Not by RunOptions.add_active_adapter, which a run with bound inputs ignores.
        for name, value in self._slot_values.items():
            binding.bind_ortvalue_input(name, value)
        return binding


def _open(
    path: Path, provider: str, threads: int | None, graph: bytes | None, *, lean: bool = False
) -> ort.InferenceSession:
    check_choices(provider, threads)
    require_onnxruntime()
    check_external_data(path)
    import onnxruntime as ort

    wanted = EXECUTION_PROVIDERS[provider]
    _require_provider(wanted, ort.get_available_providers())
    options = ort.SessionOptions()
    options.log_severity_level = _WARNINGS if debugging() else _QUIET
    if threads is not None:
        options.intra_op_num_threads = threads
    if lean:
        options.enable_cpu_mem_arena = False
        options.add_session_config_entry(NO_PREPACKING, "1")
    if provider == "cuda":
        ort.preload_dlls()  # CUDA's libraries may come from pip
        options.add_session_config_entry(RECORD, "1")
    try:
        graph = exact_model(path) if graph is None else graph
        if graph is not None:
            options.add_session_config_entry(WEIGHTS_FOLDER, str(path.parent))
        session = ort.InferenceSession(
            graph or str(path), options, providers=[(wanted, _PROVIDER_OPTIONS.get(provider, {}))]
        )
    except Exception as exc:  # onnxruntime's errors have no common base of their own
        raise ExecutionError(f"onnxruntime cannot load {path}: {_reason(exc)}") from exc
    _require_provider(wanted, session.get_providers(), started=True)
    return session


def _require_kernels(
    path: Path, signature: GraphSignature | None, dtype: str | None, provider: str
) -> None:
    """Passes unless the graph computes in bfloat16 and is to run on the CPU; onnxruntime names some node only."""
    used = {spec.dtype for spec in signature.inputs} if signature is not None else set()
    if provider == "cpu" and BFLOAT16 in {*used, dtype}:
        raise ExecutionError(
            f"{path} computes in bfloat16, which cannot run on the CPU: {NO_BFLOAT16}",
            hint="use --provider cuda, or export it with --precision fp16 or fp32",
        )


def _placement(session: ort.InferenceSession, provider: str) -> Placement:
    placement = Placement.of(session, EXECUTION_PROVIDERS[provider])
    placement.require_any()
    return placement


def _require_provider(wanted: str, present: Sequence[str], *, started: bool = False) -> None:
    if wanted in present:
        return
    if started:
        what = "did not start"
        hint = (
            "see that the NVIDIA driver, CUDA and cuDNN are those that this onnxruntime-gpu "
            "wants; "
            "--debug shows its log"
        )
    else:
        what = "is not available"
        hint = (
            "CUDA needs the package onnxruntime-gpu instead of onnxruntime: "
            "pip uninstall onnxruntime, then pip install 'peft-deploy[gpu]'"
        )
    raise ExecutionError(
        f"{wanted} {what} in this process; there is: {', '.join(present)}", hint=hint
    )


def _declared_signature(session: ort.InferenceSession) -> GraphSignature:
    return GraphSignature(
        tuple(_declared(node, "input") for node in session.get_inputs()),
        tuple(_declared(node, "output") for node in session.get_outputs()),
    )


def _declared(node: Any, kind: str) -> TensorSpec:
    dims = tuple(
        dim if isinstance(dim, int) else (dim or f"{node.name}.{axis}")
        for axis, dim in enumerate(node.shape)
    )
    return TensorSpec(node.name, numpy_name(node.type, f"{kind} {node.name}"), dims)


def _check_signature(path: Path, promised: GraphSignature, declared: GraphSignature) -> None:
    for kind, ours, theirs in (
        ("input", promised.inputs, declared.inputs),
        ("output", promised.outputs, declared.outputs),
    ):
        found = {spec.name: spec for spec in theirs}
        if odd := {spec.name for spec in ours} ^ set(found):
            raise BundleError(f"{path} and its manifest differ in these {kind}s:\n{listed(odd)}")
        for spec in ours:
            if not _agree(spec, found[spec.name]):
                raise BundleError(
                    f"{kind} {spec.name} of {path} is {found[spec.name].dtype} "
                    f"{list(found[spec.name].dims)}; "
                    f"its manifest says {spec.dtype} {list(spec.dims)}"
                )


def _agree(ours: TensorSpec, theirs: TensorSpec) -> bool:
    static = zip(ours.dims, theirs.dims, strict=False)
    return (
        ours.dtype == theirs.dtype
        and len(ours.dims) == len(theirs.dims)
        and not any(isinstance(a, int) and isinstance(b, int) and a != b for a, b in static)
    )


def _reason(exc: Exception) -> str:
    """Onnxruntime's message without its prefix of codes."""
    text = str(exc).strip()
    return text.split(" : ", 3)[-1] if text.startswith("[ONNXRuntimeError]") else text
