"""Runs every family through every way out, and keeps README's table of what works.

    python tools/support_table.py            runs everything and prints the table
    python tools/support_table.py --write    and puts it into README.md
    python tools/support_table.py --check    and fails when README.md says something else

The models are those of models/tiny; each bundle goes through the whole case matrix against PaddleNLP's own forward,
and a cell is the largest error of any output in units of that output's largest magnitude, rounded up to a power of
ten. "-" stands where a way does not exist for that kind of model; nothing here is left out because it fails: a bundle
that does not pass ends the run.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from peft_deploy.parity import ParityReport
    from peft_deploy.workflows.export import ExportResult

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
BEGIN, END = "<!-- support table: begin -->", "<!-- support table: end -->"

MERGED, RUNTIME, PREFIX = "LoRA merged", "LoRA at run time", "prefix"
ONNX, PADDLE = "onnx", "paddle"
COLUMNS = (
    (MERGED, ONNX),
    (RUNTIME, ONNX),
    (PREFIX, ONNX),
    (MERGED, PADDLE),
    (PREFIX, PADDLE),
)
MAX_ERROR = 1e-4  # of any cell

Cells = Mapping[tuple[str, str], float]


def tiny() -> ModuleType:
    """The recipe of the small models."""
    path = ROOT / "models" / "tiny" / "make.py"
    spec = importlib.util.spec_from_file_location("make_tiny", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def models() -> dict[str, str]:
    """Family → the model that stands for it: the one that bears its name, or the first of its variants."""
    chosen: dict[str, str] = {}
    for name in tiny().known():
        chosen.setdefault(name.partition("-")[0], name)
    return chosen


def measure(name: str, folder: Path) -> Cells:
    """Makes every bundle of a model and gives the largest error of each way out.

    Args:
        name: of the model, in models/tiny.
        folder: an empty folder for models and bundles.

    Raises:
        PeftDeployError: an export failed or did not pass its check.
    """
    from peft_deploy.base import open_base
    from peft_deploy.families import DecoderFamily, EncoderDecoderFamily

    recipe = tiny()
    base = recipe.make(folder / "base", name)
    family = open_base(base).family
    adapters = [f"lora={recipe.make_lora(folder / 'lora', base)}"]
    if isinstance(family, DecoderFamily):
        adapters.append(f"prefix={recipe.make_prefix(folder / 'prefix', base)}")
    cells: dict[tuple[str, str], float] = {}
    for format in (ONNX, PADDLE):
        cells |= _merged(base, adapters, format, folder)
    if not isinstance(family, EncoderDecoderFamily):  # two graphs, which one file cannot fill
        cells[RUNTIME, ONNX] = _at_run_time(base, adapters, folder)
    return cells


def _merged(
    base: Path, adapters: list[str], format: str, folder: Path
) -> dict[tuple[str, str], float]:
    import peft_deploy
    from peft_deploy.config.export import ExportOptions

    options = ExportOptions(format=format)
    report = _report(peft_deploy.export(base, folder / format, adapter=adapters, options=options))
    cells = {(MERGED, format): worst(report)}
    for title, part in report.parts.items():
        # Other parts are of the model itself, such as its encoder.
        way = PREFIX if title.startswith("prefix") else MERGED
        cells[way, format] = max(worst(part), cells.get((way, format), 0.0))
    return cells


def _at_run_time(base: Path, adapters: list[str], folder: Path) -> float:
    import peft_deploy
    from peft_deploy.config.export import ExportOptions

    options = ExportOptions(adapters="runtime")
    exported = peft_deploy.export(base, folder / "runtime", adapter=adapters[:1], options=options)
    report = _report(exported)
    (part,) = report.parts.values()
    return max(worst(report), worst(part))


def _report(exported: ExportResult) -> ParityReport:
    """The report of an export, which has nothing to complain of."""
    report, manifest = exported.parity, exported.manifest
    assert report is not None and manifest is not None
    assert report.passed
    assert not report.warnings, report.warnings
    assert not {"If", "Loop"} & manifest.graph.get("operators", {}).keys()
    return report


def worst(report: ParityReport) -> float:
    """The largest error of any output of any case."""
    return max(
        output.difference.relative_max for case in report.cases for output in case.outputs.values()
    )


def measure_all(names: Iterable[str]) -> dict[str, Cells]:
    """Family → its cells."""
    chosen, found = models(), {}
    for family in names:
        with tempfile.TemporaryDirectory() as folder:
            found[family] = measure(chosen[family], Path(folder))
        print(family, {" ".join(k): f"{v:.1e}" for k, v in found[family].items()}, file=sys.stderr)
    return found


def render(found: Mapping[str, Cells]) -> str:
    """The table in Markdown."""
    heads = [f"{way}, {'ONNX' if format == ONNX else 'Paddle'}" for way, format in COLUMNS]
    lines = [f"| family | {' | '.join(heads)} |", f"|---|{'---|' * len(heads)}"]
    for family, cells in sorted(found.items()):
        texts = [_cell(cells.get(column)) for column in COLUMNS]
        lines.append(f"| {family} | {' | '.join(texts)} |")
    return "\n".join(lines)


def _cell(error: float | None) -> str:
    if error is None:
        return "-"
    return f"≤ 1e{math.ceil(math.log10(error)):d}" if error > 0 else "0"


def written() -> str:
    """The table that README.md has.

    Raises:
        ValueError: it has none.
    """
    return README.read_text("utf-8").split(BEGIN)[1].split(END)[0].strip()


def disagreements(old: str, new: str) -> list[str]:
    """Lines in which two tables say different things; errors may differ by one power of ten, as machines do."""
    before, after = _rows(old), _rows(new)
    wrong = [f"{name}: only in one of the two" for name in before.keys() ^ after.keys()]
    for name in before.keys() & after.keys():
        for ours, theirs in zip(before[name], after[name], strict=False):
            if not _alike(ours, theirs):
                wrong.append(f"{name}: README.md says {ours}, measured {theirs}")
        if len(before[name]) != len(after[name]):
            wrong.append(f"{name}: another number of columns")
    return sorted(wrong)


def _rows(table: str) -> dict[str, list[str]]:
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in table.splitlines()]
    return {row[0]: row[1:] for row in rows if not row[0].startswith("---")}


def _alike(ours: str, theirs: str) -> bool:
    if not (ours.startswith("≤ 1e") and theirs.startswith("≤ 1e")):
        return ours == theirs
    return abs(int(ours[4:]) - int(theirs[4:])) <= 1


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help="put the table into README.md")
    parser.add_argument("--check", action="store_true", help="fail when README.md is stale")
    parser.add_argument(
        "--family", action="append", choices=sorted(models()), help="only this one"
    )
    args = parser.parse_args()
    if args.family and (args.write or args.check):
        parser.error("--write and --check need all families")
    table = render(measure_all(args.family or models()))
    if args.write:
        text = README.read_text("utf-8")
        head, _, rest = text.partition(BEGIN)
        README.write_text(f"{head}{BEGIN}\n{table}\n{END}{rest.partition(END)[2]}", "utf-8")
    if args.check and (wrong := disagreements(written(), table)):
        print("README.md is stale:", *wrong, "", table, sep="\n", file=sys.stderr)
        return 1
    print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
