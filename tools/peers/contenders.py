"""Who takes part: every exporter, precision and way of fusing, and Paddle itself, all with the same model.

The model is the base with a rank-8 adapter on all linear layers merged in; other exporters get it as a Hugging Face
checkpoint. What this version of peft-deploy can do is read from its command line.
"""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from peers.builds import OUTPUT, Build, Workshop, sources_of

ROOT = Path(__file__).resolve().parents[2]
PEERS = ROOT / "tools" / ".venv-peers"  # made by _peers.sh
PEERS_PYTHON = PEERS / "bin" / "python"

OURS, OPTIMUM, GENAI = "peft-deploy", "optimum", "genai builder"
EAGER, INFERENCE = "Paddle eager", "Paddle Inference"
FP32, FP16, INT8, INT4, INT4_ALL = "fp32", "fp16", "int8", "int4", "int4-all"
PRECISIONS = (FP32, FP16, INT8, INT4, INT4_ALL)
LAST_LOGITS = f"{OURS} --last-logits"
NO_FUSION, DEFAULT_FUSION, CONTRIB = "none", "onnx", "ort"
SLOTS_OFF, RANK_8, RANK_64 = "slots, off", "slots, rank 8", "slots, rank 64"
SLOTS, SLOT_LANES = "slots", (SLOTS_OFF, RANK_8, RANK_64)
RANKS = {"r8": 8, "r64": 64}
# Of an adapter's part in a layer's output against the layer's own: enough to be seen, and the model still speaks.
ADAPTER_SPREAD = 0.05


@dataclass(frozen=True)
class Contender:
    """A folder and how it is run.

    Args:
        name: in the tables, with the precision.
        precision: one of :data:`PRECISIONS`.
        loop: of the worker: ``"onnx"``, ``"eager"`` or ``"inference"``.
        build: makes the folder.
        required: whether there is nothing to compare with without it.
        adapters: variant → ``.onnx_adapter`` file in the folder; the variant ``""`` is the folder as it is.
        variant_names: variant → name in the tables, where there are several.
        times_export: whether making it is measured again, interleaved.
        exports: whether making it is an export; the table says how long that took.
    """

    name: str
    precision: str
    loop: str
    build: Build
    required: bool = False
    adapters: Mapping[str, str] = field(default_factory=dict)
    variant_names: Mapping[str, str] = field(default_factory=dict)
    times_export: bool = False
    exports: bool = True

    @property
    def variants(self) -> Mapping[str, str]:
        """Variant → name in the tables."""
        return self.variant_names or {"": self.name}


def preparations(base: Path, shop: Workshop) -> Iterator[Build]:
    """Adapters, and the checkpoint that has one of them merged in, in this order."""
    for key, rank in RANKS.items():
        command = (sys.executable, "-m", "peers.make_adapter", str(base), OUTPUT, str(rank))
        yield Build(key, command, (base,), f"spread {ADAPTER_SPREAD}")
    yield _model(base, shop)


def contenders(base: Path, shop: Workshop) -> Iterator[Contender]:
    """All that this version can be compared with, the baseline of each precision first."""
    offered = offers("--precision") or (FP32,)
    for precision in (p for p in PRECISIONS if p in offered):
        yield from _ours_at(precision, base, shop)
    yield _last_logits(base, shop)
    yield _slots(base, shop)
    yield _peer(OPTIMUM, FP32, _optimum(shop), shop, required=True)
    for precision in (FP32, FP16, INT4):
        yield _peer(GENAI, precision, _genai(precision, shop), shop, required=precision != FP16)
    yield Contender(EAGER, FP32, "eager", _model(base, shop), exports=False)
    static = (*_merged(base, shop), "--format", "paddle")
    yield Contender(
        INFERENCE, FP32, "inference", _our_build("paddle-inference", static, base, shop)
    )


def missing(only: Sequence[str] | None = None) -> dict[str, str]:
    """What is left out, and why, whatever is built.

    Args:
        only: precisions that are asked for; all when None.
    """
    offered = offers("--precision") or (FP32,)
    gone = {
        (OURS, p): "this version has no such --precision" for p in PRECISIONS if p not in offered
    }
    for fusion in (NO_FUSION, CONTRIB):
        if fusion not in offers("--fuse"):
            gone[f"{OURS} --fuse {fusion}", FP32] = "this version has no such --fuse"
    gone[OPTIMUM, FP16] = "it exports fp16 on CUDA only"
    gone[OPTIMUM, INT4] = "it has no 4-bit quantization for ONNX"
    return {f"{name} {p}": why for (name, p), why in gone.items() if not only or p in only}


def offers(option: str) -> tuple[str, ...]:
    """The choices of an option of ``export``; empty when there is no such option."""
    from peft_deploy.cli.export import export_command

    for parameter in export_command.params:
        if option in parameter.opts:
            return tuple(str(choice) for choice in getattr(parameter.type, "choices", ()))
    return ()


def _ours_at(precision: str, base: Path, shop: Workshop) -> Iterator[Contender]:
    fusions = offers("--fuse")
    # int8 has nobody to be compared with but the other precisions.
    wanted = (
        (DEFAULT_FUSION, CONTRIB, NO_FUSION) if precision == FP32 else (DEFAULT_FUSION, CONTRIB)
    )
    for fusion in [f for f in wanted if f in fusions] or [DEFAULT_FUSION]:
        default = fusion == DEFAULT_FUSION
        options = ("--precision", precision) if offers("--precision") else ()
        options += ("--fuse", fusion) if fusions else ()
        name = OURS if default else f"{OURS} --fuse {fusion}"
        build = _our_build(
            f"ours-{precision}-{fusion}", (*_merged(base, shop), *options), base, shop
        )
        yield Contender(
            name,
            precision,
            "onnx",
            build,
            required=default,
            times_export=default and precision == FP32,
        )


def _last_logits(base: Path, shop: Workshop) -> Contender:
    build = _our_build("ours-last", (*_merged(base, shop), "--last-logits"), base, shop)
    return Contender(LAST_LOGITS, FP32, "onnx", build)


def _slots(base: Path, shop: Workshop) -> Contender:
    adapters = [f"--adapter={name}={shop.folder(name)}" for name in RANKS]
    command = (*_deploy("export"), "--base", str(base), *adapters, "--adapters", "runtime")
    build = _our_build("slots", (*command, "--no-validate"), base, shop)
    return Contender(
        SLOTS,
        FP32,
        "onnx",
        build,
        required=True,
        adapters={name: f"adapters/{name}.onnx_adapter" for name in RANKS},
        variant_names={"": SLOTS_OFF, "r8": RANK_8, "r64": RANK_64},
    )


def _merged(base: Path, shop: Workshop) -> tuple[str, ...]:
    command = (*_deploy("export"), "--base", str(base), "--adapter", str(shop.folder("r8")))
    return (*command, "--merge", "--no-validate")


def _our_build(key: str, command: tuple[str, ...], base: Path, shop: Workshop) -> Build:
    reads = (base, *(shop.folder(name) for name in RANKS))
    return Build(key, (*command, "--output", OUTPUT), reads, _ours())


def _deploy(verb: str) -> tuple[str, ...]:
    return (sys.executable, "-m", "peft_deploy", verb)


def _model(base: Path, shop: Workshop) -> Build:
    adapter = shop.folder("r8")
    command = (*_deploy("merge"), "--base", str(base), "--adapter", str(adapter), "--to", "hf")
    # Not of our sources: everyone else's graph is made of it. Were it wrong, tokens would differ.
    software = importlib.metadata.version("peft-deploy")
    return Build("model", (*command, "--output", OUTPUT), (base, adapter), software)


def _ours() -> str:
    return sources_of(ROOT / "peft_deploy")


def _optimum(shop: Workshop) -> tuple[str, ...]:
    model = str(shop.folder("model"))
    return (str(PEERS_PYTHON), "-m", "peers.export_optimum", model, OUTPUT)


def _genai(precision: str, shop: Workshop) -> tuple[str, ...]:
    model, cache = str(shop.folder("model")), str(shop.folder("genai-cache"))
    path = f"PYTHONPATH={PEERS / 'for-builder'}"
    builder = ("env", path, str(PEERS_PYTHON), "-m", "onnxruntime_genai.models.builder")
    return (*builder, "-i", model, "-o", OUTPUT, "-p", precision, "-e", "cpu", "-c", cache)


def _peer(
    name: str, precision: str, command: tuple[str, ...], shop: Workshop, *, required: bool
) -> Contender:
    key = f"{name.split()[0]}-{precision}"
    build = Build(key, command, (shop.folder("model"),), (PEERS / ".packages").read_text("utf-8"))
    return Contender(
        name, precision, "onnx", build, required=required, times_export=precision == FP32
    )
