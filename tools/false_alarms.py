"""Checks good bundles, hundreds of them, and counts how many fail: none may.

    python tools/false_alarms.py                 over all families, precisions, ways and, again and again, seeds
    python tools/false_alarms.py --runs 20       fewer
    python tools/false_alarms.py --write         and puts the outcome into docs/mutations.md
    python tools/false_alarms.py --log FILE      keeps what was done there, and goes on from it

A model of models/tiny for every family is exported in every precision, LoRA merged and at run time, as an export does
it by default; then weights, adapters, prefixes and tokens are drawn anew for every seed, and each bundle goes through
all of ``validate --base``, PaddleNLP's own forward and every byte of its weights.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

from support_table import models, tiny

if TYPE_CHECKING:
    from good_bundles import Trial
    from made_bundles import Exported

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "docs" / "mutations.md"
BEGIN, END = "<!-- false alarms: begin -->", "<!-- false alarms: end -->"
RUNS = 200
MERGED, AT_RUN_TIME = "merged", "run-time"
PRECISIONS = ("fp32", "fp16", "int8", "int4")
PACKAGES = ("paddlepaddle", "paddlenlp", "paddle2onnx", "onnxruntime")


@dataclass(frozen=True)
class Wanted:
    """A good bundle that is to be checked.

    Args:
        model: the small model's name.
        kind: merged, or adapters at run time.
        precision: of the bundle.
        seed: of weights, adapters and tokens.
    """

    model: str
    kind: str
    precision: str
    seed: int

    @property
    def exported(self) -> str:
        """The folder of the bundle whose graph it has."""
        return f"{self.model}-{self.kind}-{self.precision}"


@dataclass(frozen=True)
class Check:
    """What became of one check of a good bundle.

    Args:
        wanted: the bundle.
        way: what was active beside its weights.
        passed: whether nothing was found wrong.
        used: the largest error in units of its limit.
        summary: in words.
        warnings: that the report has.
    """

    wanted: Wanted
    way: str
    passed: bool
    used: float
    summary: str
    warnings: list[str]

    @classmethod
    def of(cls, wanted: Wanted, trial: Trial) -> Check:
        """What is to be kept of a trial."""
        report = trial.report
        return cls(
            wanted,
            trial.way,
            report.passed_alone,
            trial.used,
            report.summary(),
            list(report.warnings),
        )

    def __str__(self) -> str:
        """One line for a terminal."""
        w = self.wanted
        state = "passed" if self.passed else f"FAILED: {self.summary}"
        return " ".join(
            [
                f"{w.model}, {self.way}, {w.precision}, seed {w.seed}: {self.used:.2f} of the limit, {state}",
                *self.warnings,
            ]
        )


class Log:
    """Checks that were done, one bundle a line.

    Args:
        path: of the file; None to keep nothing.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self.checks: dict[Wanted, list[Check]] = {}
        if path is not None and path.is_file():
            for line in path.read_text("utf-8").splitlines():
                entry = json.loads(line)
                wanted = Wanted(**entry["wanted"])
                self.checks[wanted] = [Check(wanted, **check) for check in entry["checks"]]

    def add(self, wanted: Wanted, checks: list[Check]) -> None:
        """Keeps what became of one bundle."""
        self.checks[wanted] = checks
        if self._path is None:
            return
        kept = [{k: v for k, v in asdict(check).items() if k != "wanted"} for check in checks]
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"wanted": asdict(wanted), "checks": kept}) + "\n")


def bundles(
    families: Sequence[str], kinds: Sequence[str], precisions: Sequence[str]
) -> Iterator[Wanted]:
    """Without end: all families in all precisions and kinds with one seed, then with the next.

    Args:
        families: by name.
        kinds: of bundles.
        precisions: of bundles.
    """
    for seed in count(1):
        for precision in precisions:
            for kind in kinds:
                for family in families:
                    model = models()[family]
                    if kind == MERGED or not _has_two_graphs(model):
                        yield Wanted(model, kind, precision, seed)


def _has_two_graphs(model: str) -> bool:
    """Such a model has no slots for adapters."""
    from peft_deploy.families import EncoderDecoderFamily, find_family

    return isinstance(find_family(tiny().config_of(model)), EncoderDecoderFamily)


def check(wanted: Wanted, exports: Path) -> list[Check]:
    """Checks one bundle.

    Args:
        wanted: the bundle.
        exports: where exported bundles are kept, and taken from if they are there.
    """
    from good_bundles import run_trials

    exported = _exported(wanted, exports / wanted.exported)
    with tempfile.TemporaryDirectory() as folder:
        trials = run_trials(exported, Path(folder) / "made", wanted.seed, tiny())
        return [Check.of(wanted, trial) for trial in trials]


def _exported(wanted: Wanted, folder: Path) -> Exported:
    from made_bundles import Exported, export, make_folders

    from peft_deploy.families import DecoderFamily, find_family

    at_run_time = wanted.kind == AT_RUN_TIME
    if (folder / "bundle").is_dir():
        return Exported(wanted.model, folder, at_run_time)
    is_decoder = isinstance(find_family(tiny().config_of(wanted.model)), DecoderFamily)
    made = make_folders(
        tiny(), folder, wanted.model, at_run_time=at_run_time, with_prefix=is_decoder
    )
    return export(made, wanted.precision)


def render(checks: Sequence[Check], versions: Mapping[str, str]) -> str:
    """The outcome in Markdown.

    Args:
        checks: at least one.
        versions: package → version.
    """
    failed = [c for c in checks if not c.passed]
    warned = [c for c in checks if c.warnings]
    found: dict[tuple[str, str], dict[str, list[Check]]] = defaultdict(lambda: defaultdict(list))
    for one in checks:
        found[one.wanted.model, one.way][one.wanted.precision].append(one)
    precisions = [p for p in PRECISIONS if any(c.wanted.precision == p for c in checks)]
    worst = max(checks, key=lambda c: c.used)
    w = worst.wanted
    named = ", ".join(f"{name} {number}" for name, number in versions.items())
    lines = [
        f"{len(checks)} checks of {len({c.wanted for c in checks})} good bundles, {len(failed)} failed, "
        f"{len(warned)} with a warning. The largest error was {worst.used:.2f} of its limit ({w.model}, {worst.way}, "
        f"{w.precision}, seed {w.seed}). With {named}.",
        "",
        f"| model | with | {' | '.join(precisions)} |",
        f"|---|---|{'---|' * len(precisions)}",
    ]
    for (model, way), cells in sorted(found.items()):
        row = [_cell(cells.get(precision, [])) for precision in precisions]
        lines.append(f"| {model} | {way} | {' | '.join(row)} |")
    lines += [f"- {one}" for one in checks if not one.passed or one.warnings]
    return "\n".join(lines)


def _cell(checks: Sequence[Check]) -> str:
    """How many checks, and the largest error of any."""
    return f"{len(checks)}: {max(c.used for c in checks):.2f}" if checks else "-"


def _collect(
    endless: Iterator[Wanted], exports: Path, log: Log, runs: int, minutes: float | None
) -> list[Check]:
    done: list[Check] = []
    end = math.inf if minutes is None else time.monotonic() + 60 * minutes
    for wanted in endless:
        if len(done) >= runs or time.monotonic() > end:
            break
        if wanted not in log.checks:
            log.add(wanted, check(wanted, exports))
            for one in log.checks[wanted]:
                print(f"{len(done):4d} {one}", file=sys.stderr, flush=True)
        done += log.checks[wanted]
    return done


def _versions() -> dict[str, str]:
    """Of what takes part in an export and its check."""
    return {name: version(name) for name in PACKAGES}


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=RUNS, help="how many checks, at least")
    parser.add_argument("--minutes", type=float, help="stop after that long, with fewer")
    parser.add_argument("--family", action="append", choices=sorted(models()))
    parser.add_argument(
        "--kind",
        action="append",
        choices=(MERGED, AT_RUN_TIME),
        help="of bundles; both if left out",
    )
    parser.add_argument("--precision", action="append", choices=PRECISIONS, help="all if left out")
    parser.add_argument("--log", type=Path, help="keep what was done there, and go on from it")
    parser.add_argument(
        "--exports", type=Path, help="keep the exported bundles there, for the next time"
    )
    parser.add_argument("--write", action="store_true", help="put the outcome into the document")
    args = parser.parse_args()
    os.environ.setdefault("MKL_DEBUG_CPU_TYPE", "5")
    sys.path.insert(0, str(ROOT / "tests" / "parity"))
    if args.write and (args.family or args.kind or args.precision):
        parser.error("--write needs all families, kinds and precisions")
    endless = bundles(
        args.family or sorted(models()),
        args.kind or (MERGED, AT_RUN_TIME),
        args.precision or PRECISIONS,
    )
    with tempfile.TemporaryDirectory() as folder:
        exports = args.exports or Path(folder)
        checks = _collect(endless, exports, Log(args.log), args.runs, args.minutes)
        outcome = render(checks, _versions())
    if args.write:
        text = DOCUMENT.read_text("utf-8")
        head, _, rest = text.partition(BEGIN)
        DOCUMENT.write_text(f"{head}{BEGIN}\n{outcome}\n{END}{rest.partition(END)[2]}", "utf-8")
    print(outcome)
    return 0 if all(one.passed for one in checks) else 1


if __name__ == "__main__":
    sys.exit(main())
