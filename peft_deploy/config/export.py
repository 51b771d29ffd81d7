"""Options of an export."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from peft_deploy.config.matching import match_pattern
from peft_deploy.config.precision import (
    BFLOAT16,
    CALIBRATED_BITS,
    FP32,
    NO_BFLOAT16,
    PRECISIONS,
    Precision,
)
from peft_deploy.errors import ConfigError

ONNX, PADDLE = "onnx", "paddle"
FORMATS = (ONNX, PADDLE)
RUNTIME = "runtime"
ALL_LINEAR = "all-linear"
ALL_LAYERS = "all"
# Why a bundle of both is not checked.
LAST_LOGITS_IN_16_BITS = (
    "logits of the last token alone cannot be told from wrong ones in 16 bits: single tokens are that far off, and "
    "there are no others beside them"
)
BUILTIN = "builtin"  # the calibration text that comes with the package
# How far small operators are put together: not at all, into standard operators, or into onnxruntime's own, too.
PLAIN, FUSED, FUSED_ORT = "none", "onnx", "ort"
FUSE_LEVELS = (PLAIN, FUSED, FUSED_ORT)
DEFAULT_FUSE = FUSED
DEFAULT_OPSET = 17  # of a plain graph
FUSED_OPSET = 23  # the first with Attention, RotaryEmbedding and RMSNormalization
# Paddle2ONNX aborts above 21; below 13 Unsqueeze and Split have another form than its translators emit here.
OPSETS = range(13, 22)


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """How a bundle is made.

    Args:
        merge: fold the adapter into the base model's weights.
        adapters: ``"runtime"`` keeps LoRA adapters apart from the weights, in files that fill slots of the graph;
            ``merge`` then means nothing.
        slots: which linear layers get slots beside those that the adapters change: ``"all-linear"`` for every one
            in the model's layers, or a regular expression for their names. None means no others, and all of them
            where no adapter is given.
        slot_rank: the one rank of all slots, for runtimes that take no empty tensors; None leaves it open.
        adapter_bank: how many adapters can be in use at once, each row of a batch naming its own
            (``adapter_ids``); implies ``adapters="runtime"``. None for one adapter at a time.
        format: ``"onnx"``, or ``"paddle"`` for Paddle's static format (``model.json``, ``model.pdiparams``).
        fuse: ``"onnx"`` puts small operators together to larger ones of the ONNX standard (opset 23), ``"ort"``
            to onnxruntime's own, too, ``"none"`` leaves them as they are. None does what ``opset`` allows: an opset
            below 23 has none of the larger ones; see :attr:`fusion`. Not used for Paddle's format.
        opset: version of the default ONNX operator set; None for 23 where operators are put together and 17 where they
            are not; see :attr:`graph_opset`. Not used for Paddle's format.
        precision: of the arithmetic and the weights, a key of
            :data:`~peft_deploy.config.precision.PRECISIONS`; Paddle's format has ``"fp32"`` only.
        calibration: a file with a text, or ``"builtin"``: scales of 4-bit weights are chosen by what the model's
            layers are given while it reads it. None for rounding to nearest.
        pooling: of the sentence embeddings that an encoder without a head gives beside its hidden states:
            ``"mean"`` or ``"cls"``, ``"none"`` for none of them; None does what the model's folder says.
        last_logits: compute the logits of the last token only, [batch, 1, vocab]: all that generation needs.
        prefix_slots: give the graph inputs for a prefix with an empty default, so that a prefix can be an
            ``.onnx_adapter`` file.
        validate: check the bundle against the dynamic graph before it is put in place.
        force: replace an output folder that is not empty.
        keep_failed: leave a bundle in place that failed the check, marked as failed in its manifest.
        dry_run: check everything that can be checked without tracing, and write nothing.
        cases: a file of prompts that the check covers, too.
        record_reference: keep what the dynamic graph says in the bundle, so that the check can be repeated without
            Paddle and the base model.
        report: a folder for the check's report.
        validate_layers: how many layers the check computes with, or ``"all"``; None computes with all where they fit
            into memory, and with as many as do otherwise.

    Raises:
        ConfigError: a value that cannot be used.
    """

    merge: bool = True
    adapters: str | None = None
    slots: str | None = None
    slot_rank: int | None = None
    adapter_bank: int | None = None
    format: str = ONNX
    fuse: str | None = None
    opset: int | None = None
    precision: str = FP32
    last_logits: bool = False
    calibration: str | Path | None = None
    prefix_slots: bool = False
    pooling: str | None = None
    validate: bool = True
    force: bool = False
    keep_failed: bool = False
    dry_run: bool = False
    cases: Path | None = None
    record_reference: bool = False
    report: Path | None = None
    validate_layers: int | str | None = None

    @property
    def keeps_adapters(self) -> bool:
        """Whether LoRA adapters stay apart from the weights."""
        return self.adapters == RUNTIME or self.adapter_bank is not None

    @property
    def arithmetic(self) -> Precision:
        """What the precision's name stands for."""
        return PRECISIONS[self.precision]

    @property
    def fusion(self) -> str:
        """How far operators are put together, one of :data:`FUSE_LEVELS`."""
        if self.fuse is not None:
            return self.fuse
        below = self.opset is not None and self.opset < FUSED_OPSET
        return PLAIN if below or self.format == PADDLE else DEFAULT_FUSE

    @property
    def graph_opset(self) -> int:
        """Version of the operator set that the graph is to declare."""
        if self.opset is not None:
            return self.opset
        return DEFAULT_OPSET if self.fusion == PLAIN else FUSED_OPSET

    @property
    def converted_opset(self) -> int:
        """Version of the operator set that Paddle2ONNX is asked for."""
        return min(self.graph_opset, OPSETS.stop - 1)

    @property
    def packs(self) -> bool:
        """Whether linear layers that read the same input become one matrix."""
        return self.format == ONNX and self.fusion != PLAIN

    def __post_init__(self) -> None:
        self._check_slots()
        self._check_bank()
        self._check_layers()
        self._check_fusion()
        self._check_precision()
        self._check_last_logits()
        if self.format not in FORMATS:
            raise ConfigError(
                f"format {self.format!r} is unknown; it can be {' or '.join(FORMATS)}"
            )
        if self.format == PADDLE and self.prefix_slots:
            raise ConfigError(
                "prefix slots are inputs with a default, which Paddle's static format does not have",
                hint="leave --prefix-slots out: the bundle takes prefixes as past_key_values",
            )
        if self.keep_failed and not self.validate:
            raise ConfigError("--keep-failed needs the check that --no-validate leaves out")
        of_check = {
            "--cases": self.cases is not None,
            "--record-reference": self.record_reference,
            "--report": self.report is not None,
            "--validate-layers": self.validate_layers is not None,
        }
        if wrong := [name for name, given in of_check.items() if given and not self.validate]:
            raise ConfigError(f"{wrong[0]} needs the check that --no-validate leaves out")

    def _check_fusion(self) -> None:
        if self.fuse is not None and self.fuse not in FUSE_LEVELS:
            raise ConfigError(f"fuse {self.fuse!r} is unknown; it can be {', '.join(FUSE_LEVELS)}")
        if self.format == PADDLE:
            if self.opset is not None:
                raise ConfigError(
                    f"opset {self.opset} was asked for, which is a version of ONNX's operators; "
                    "the format is Paddle's own",
                    hint="leave --opset out, or --format paddle",
                )
            if self.fuse not in (None, PLAIN):
                raise ConfigError(
                    f"fuse {self.fuse!r} was asked for, which puts ONNX's operators together; "
                    "Paddle Inference does that by itself when it loads its own format",
                    hint="leave --fuse out, or --format paddle",
                )
        if self.opset is None:
            return
        if self.opset not in OPSETS and self.opset != FUSED_OPSET:
            raise ConfigError(
                f"opset {self.opset} cannot be made; choose {OPSETS.start} to {OPSETS.stop - 1}, "
                f"or {FUSED_OPSET} with --fuse"
            )
        if self.fuse not in (None, PLAIN) and self.opset != FUSED_OPSET:
            raise ConfigError(
                f"--fuse {self.fuse} makes operators of opset {FUSED_OPSET}, and opset {self.opset} was asked for",
                hint="leave --opset out, or --fuse",
            )
        if self.fusion == PLAIN and self.opset == FUSED_OPSET:
            raise ConfigError(
                f"opset {self.opset} is for fused graphs; what is not fused is of {OPSETS.start} to {OPSETS.stop - 1}",
                hint=f"add --fuse {FUSED}, or leave --opset out",
            )

    def _check_layers(self) -> None:
        check_layer_count(self.validate_layers)
        if isinstance(self.validate_layers, int) and self.record_reference:
            raise ConfigError(
                "a check of some layers records nothing that a later one of the whole bundle could use",
                hint="leave --record-reference or --validate-layers out",
            )

    def _check_slots(self) -> None:
        if self.adapters not in (None, RUNTIME):
            raise ConfigError(
                f"adapters {self.adapters!r} is unknown; it can be {RUNTIME!r}",
                hint="to fold an adapter into the weights, ask for merge (--merge)",
            )
        if self.keeps_adapters and self.format == PADDLE:
            raise ConfigError(
                "adapters fill inputs with a default, which Paddle's static format does not have",
                hint="use --merge, or --format onnx",
            )
        if not self.keeps_adapters and (self.slots is not None or self.slot_rank is not None):
            raise ConfigError(
                "slots are for adapters that are kept apart from the weights",
                hint="add --adapters runtime",
            )
        if self.slots is not None:
            match_pattern(self.slots, ())  # refuses what cannot be read, before any work
        if self.slot_rank is not None and self.slot_rank < 1:
            raise ConfigError(
                f"slots of rank {self.slot_rank} were asked for; it must be at least 1"
            )

    def _check_precision(self) -> None:
        if self.precision not in PRECISIONS:
            raise ConfigError(
                f"precision {self.precision!r} is unknown; it can be {' or '.join(PRECISIONS)}"
            )
        if self.format == PADDLE and self.precision != FP32:
            raise ConfigError(
                f"precision {self.precision} was asked for; Paddle's static format is exported in {FP32} only: "
                "Paddle Inference has no 16-bit kernels for the CPU, and no operator for quantized weights",
                hint="leave --precision out, or --format paddle",
            )
        if self.calibration is not None and self.arithmetic.bits != CALIBRATED_BITS:
            raise ConfigError(
                f"calibration chooses scales of {CALIBRATED_BITS}-bit weights, and the precision is {self.precision}",
                hint="add --precision int4, or leave --calibration out",
            )
        if self.arithmetic.dtype == BFLOAT16 and self.validate and not self.dry_run:
            raise ConfigError(
                f"precision {self.precision} cannot be checked by an export, which runs the bundle on the CPU: "
                f"{NO_BFLOAT16}",
                hint="add --no-validate, and check it on a GPU: peft-deploy validate BUNDLE --provider cuda",
            )

    def _check_last_logits(self) -> None:
        if not self.last_logits:
            return
        if self.format == PADDLE:
            raise ConfigError(
                "the logits of the last token alone are cut out of the ONNX graph; the format is Paddle's own",
                hint="leave --last-logits out, or --format paddle",
            )
        if self.arithmetic.in_16_bits and self.validate and not self.dry_run:
            raise ConfigError(
                LAST_LOGITS_IN_16_BITS,
                hint="export without --last-logits to check the model; then with it and --no-validate",
            )

    def _check_bank(self) -> None:
        if self.adapter_bank is None:
            return
        if self.adapter_bank < 1:
            raise ConfigError(
                f"a bank of {self.adapter_bank} adapters was asked for; it must be at least 1"
            )
        if self.slot_rank is not None:
            raise ConfigError(
                f"slots of rank {self.slot_rank} were asked for; those of a bank are as wide as its widest adapter",
                hint="leave --slot-rank out, or --adapter-bank",
            )
        if self.prefix_slots:
            raise ConfigError(
                "a bank gives each row of a batch its own LoRA adapter, which it cannot do with prefixes",
                hint="leave --prefix-slots out: the bundle takes prefixes as past_key_values, for all rows",
            )


def check_layer_count(asked: int | str | None) -> None:
    """Passes for what ``validate_layers`` can be.

    Raises:
        ConfigError: something else.
    """
    count = isinstance(asked, int) and not isinstance(asked, bool) and asked >= 1
    if not count and asked not in (None, ALL_LAYERS):
        raise ConfigError(
            f"--validate-layers is {asked!r}; it has to be a number of layers, at least 1, or {ALL_LAYERS}"
        )
