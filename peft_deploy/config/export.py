"""Options of an export."""

from __future__ import annotations

from dataclasses import dataclass

from peft_deploy.errors import ConfigError

DEFAULT_OPSET = 17
# Paddle2ONNX aborts above 21; below 13 Unsqueeze and Split have another form than its translators emit here.
OPSETS = range(13, 22)


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """How a bundle is made.

    Args:
        merge: fold the adapter into the base model's weights.
        opset: version of the default ONNX operator set.
        validate: check the bundle against the dynamic graph before it is put in place.
        force: replace an output folder that is not empty.
        keep_failed: leave a bundle in place that failed the check, marked as failed in its manifest.
        dry_run: check everything that can be checked without tracing, and write nothing.

    Raises:
        ConfigError: a value that cannot be used.
    """

    merge: bool = True
    opset: int = DEFAULT_OPSET
    validate: bool = True
    force: bool = False
    keep_failed: bool = False
    dry_run: bool = False

    def __post_init__(self) -> None:
        if self.opset not in OPSETS:
            raise ConfigError(
                f"opset {self.opset} cannot be made; choose {OPSETS.start} to {OPSETS.stop - 1}"
            )
        if self.keep_failed and not self.validate:
            raise ConfigError("--keep-failed needs the check that --no-validate leaves out")
