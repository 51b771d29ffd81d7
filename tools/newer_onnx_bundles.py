"""Makes the bundles that check_newer_onnx.py checks, in a folder: small/NAME for small models, large/NAME else."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from support_table import models, tiny

FUSIONS = (
    "none",
    "onnx",
)  # the operators of "ort" are onnxruntime's own, which onnx does not know


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--family", action="append", choices=sorted(models()), help="only this one"
    )
    parser.add_argument("--base", type=Path, help="a checkpoint to export as well")
    args = parser.parse_args()
    for family in args.family or sorted(models()):
        with tempfile.TemporaryDirectory() as scratch:
            base = tiny().make(Path(scratch) / "base", models()[family])
            _export(base, args.folder / "small" / family, _ways(base, Path(scratch)))
    if args.base:
        _export(args.base, args.folder / "large" / args.base.resolve().name, [("merged", {})])


def _ways(base: Path, scratch: Path) -> Iterator[tuple[str, dict[str, object]]]:
    """Name and options of each way out that gives another graph."""
    from peft_deploy.base import open_base
    from peft_deploy.families import DecoderFamily, EncoderDecoderFamily

    yield "merged", {}
    family = open_base(base).family
    if not isinstance(family, EncoderDecoderFamily):  # two graphs, which one file cannot fill
        adapter = tiny().make_lora(scratch / "lora", base)
        prefix = isinstance(family, DecoderFamily)
        yield "slots", {"adapters": "runtime", "prefix_slots": prefix, "adapter": adapter}


def _export(base: Path, folder: Path, ways: Sequence[object] | Iterator[object]) -> None:
    import peft_deploy
    from peft_deploy.config.export import ExportOptions

    for name, options in ways:  # type: ignore[misc]
        adapter = options.pop("adapter", None)
        for fuse in FUSIONS:
            print(f"exporting {folder.name}, {name}, --fuse {fuse}", file=sys.stderr, flush=True)
            peft_deploy.export(
                base,
                folder / f"{name}-{fuse}",
                adapter=[f"lora={adapter}"] if adapter else None,
                options=ExportOptions(fuse=fuse, validate=False, **options),
            )


if __name__ == "__main__":
    main()
