"""Checks good bundles, hundreds of them, and counts how many fail: none may.

    python tools/false_alarms.py                 200 checks, over all families, ways and seeds
    python tools/false_alarms.py --runs 20       fewer
    python tools/false_alarms.py --write         and puts the outcome into docs/mutations.md

Every family of models/tiny is exported twice, LoRA merged and at run time; then weights, adapters, prefixes and tokens
are drawn anew for every seed, and each bundle goes through the whole gate against PaddleNLP's own forward.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
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


def run(families: Sequence[str], kinds: Sequence[str], exports: Path) -> Iterator[Trial]:
    """Checks without end: all families and ways with one seed, then with the next.

    Args:
        families: by name.
        kinds: of bundles.
        exports: where bundles are kept, and taken from if they are there.
    """
    from good_bundles import run_trials

    wanted = [
        (models()[family], kind)
        for family in families
        for kind in kinds
        if kind == MERGED or not _has_two_graphs(models()[family])
    ]
    for seed in count(1):
        for model, kind in wanted:
            exported = _exported(model, exports / f"{model}-{kind}", kind)
            with tempfile.TemporaryDirectory() as folder:
                yield from run_trials(exported, Path(folder) / "made", seed, tiny())


def _has_two_graphs(model: str) -> bool:
    """Such a model has no slots for adapters."""
    from peft_deploy.families import EncoderDecoderFamily, find_family

    return isinstance(find_family(tiny().config_of(model)), EncoderDecoderFamily)


def _exported(model: str, folder: Path, kind: str) -> Exported:
    from made_bundles import Exported, export, make_folders

    from peft_deploy.families import DecoderFamily, find_family

    if (folder / "bundle").is_dir():
        return Exported(model, folder, kind == AT_RUN_TIME)
    is_decoder = isinstance(find_family(tiny().config_of(model)), DecoderFamily)
    return export(
        make_folders(
            tiny(),
            folder,
            model,
            at_run_time=kind == AT_RUN_TIME,
            with_prefix=is_decoder and kind == MERGED,
        )
    )


def render(trials: Sequence[Trial]) -> str:
    """The outcome in Markdown."""
    failed = [t for t in trials if not t.report.passed]
    by_model: dict[str, dict[str, list[Trial]]] = defaultdict(lambda: defaultdict(list))
    for trial in trials:
        by_model[trial.model][trial.way].append(trial)
    ways = list(dict.fromkeys(t.way for t in trials))
    worst = max(trials, key=lambda t: t.used)
    lines = [
        f"{len(trials)} checks of good bundles, {len(failed)} failed. The largest error was {worst.used:.2f} of its "
        f"limit ({worst.model}, {worst.way}, seed {worst.seed}).",
        "",
        f"| model | {' | '.join(ways)} |",
        f"|---|{'---|' * len(ways)}",
    ]
    for model, found in sorted(by_model.items()):
        cells = [_cell(found.get(way, [])) for way in ways]
        lines.append(f"| {model} | {' | '.join(cells)} |")
    lines += [f"- failed: {t.model}, {t.way}, seed {t.seed}: {t.report.summary()}" for t in failed]
    return "\n".join(lines)


def _cell(trials: Sequence[Trial]) -> str:
    if not trials:
        return "-"
    return f"{len(trials)} checks, at most {max(t.used for t in trials):.2f}"


def _collect(endless: Iterator[Trial], runs: int, minutes: float | None) -> list[Trial]:
    trials: list[Trial] = []
    end = math.inf if minutes is None else time.monotonic() + 60 * minutes
    for trial in endless:
        trials.append(trial)
        state = "passed" if trial.report.passed else "FAILED"
        print(
            f"{len(trials):4d} {trial.model}, {trial.way}, seed {trial.seed}: {state}, "
            f"{trial.used:.2f} of the limit",
            *trial.report.warnings,
            file=sys.stderr,
            flush=True,
        )
        if len(trials) >= runs or time.monotonic() > end:
            break
    return trials


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=RUNS, help="how many checks")
    parser.add_argument("--minutes", type=float, help="stop after that long, with fewer")
    parser.add_argument("--family", action="append", choices=sorted(models()))
    parser.add_argument(
        "--kind",
        action="append",
        choices=(MERGED, AT_RUN_TIME),
        help="of bundles; both if left out",
    )
    parser.add_argument(
        "--exports", type=Path, help="keep the exported bundles there, for the next time"
    )
    parser.add_argument("--write", action="store_true", help="put the outcome into the document")
    args = parser.parse_args()
    os.environ.setdefault("MKL_DEBUG_CPU_TYPE", "5")
    sys.path.insert(0, str(ROOT / "tests" / "parity"))
    if args.write and args.family:
        parser.error("--write needs all families")
    with tempfile.TemporaryDirectory() as folder:
        families = args.family or sorted(models())
        kinds = args.kind or (MERGED, AT_RUN_TIME)
        endless = run(families, kinds, args.exports or Path(folder))
        trials = _collect(endless, args.runs, args.minutes)
    outcome = render(trials)
    if args.write:
        text = DOCUMENT.read_text("utf-8")
        head, _, rest = text.partition(BEGIN)
        DOCUMENT.write_text(f"{head}{BEGIN}\n{outcome}\n{END}{rest.partition(END)[2]}", "utf-8")
    print(outcome)
    return 0 if all(trial.report.passed for trial in trials) else 1


if __name__ == "__main__":
    sys.exit(main())
