"""Puts every fault of the catalogue into good bundles, and writes down what the check says of each.

    python tools/mutations.py                 prints the document's two tables
    python tools/mutations.py --write         and puts them into docs/mutations.md
    python tools/mutations.py --fault WORD    only faults with the word in their names
    python tools/mutations.py --log FILE      keeps what was found there, and goes on from it

The catalogue is tests/parity/mutations.py. A fault that is not seen, or not found where it is, ends in exit code 1.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from support_table import tiny

if TYPE_CHECKING:
    from made_bundles import Exported
    from mutation_subjects import Subject, Verdict
    from mutations import Mutation

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "docs" / "mutations.md"
BEGIN, END = "<!-- faults: begin -->", "<!-- faults: end -->"
SEEN = "| fault | bundle | cases failed | error / limit | same best token | KL | text | found |"
PACKAGES = ("paddlepaddle", "paddlenlp", "paddle2onnx", "onnxruntime")
BLIND = "| fault | bundle | error / limit | what the files show |"


@dataclass(frozen=True)
class Outcome:
    """A fault and what was said of it.

    Args:
        name: of the fault.
        row: of the document's table.
        seen: whether a case can see it.
        located: whether it lies in a layer or a file.
        wrong: what should have been said and was not.
    """

    name: str
    row: str
    seen: bool
    located: bool
    wrong: list[str]

    @classmethod
    def of(cls, mutation: Mutation, verdict: Verdict) -> Outcome:
        """What is to be kept of a verdict."""
        from mutations import complaints

        return cls(
            mutation.name,
            _row(mutation, verdict),
            mutation.seen,
            bool(mutation.node or mutation.file),
            complaints(mutation, verdict),
        )


def _row(m: Mutation, v: Verdict) -> str:
    """In Markdown."""
    if not m.seen:
        files = " ".join((v.files or "-").partition("\n")[2].split())
        return f"| {m.name} | {m.subject} | {v.used:.2f} | {files} |"
    cases = v.report.cases
    failed = f"{sum(not c.passed for c in cases)} of {len(cases)}"
    cells = (m.name, m.subject, failed, _ratio(v.used), *_logits(v), _text(v), _found(v))
    return f"| {' | '.join(cells)} |"


def _ratio(used: float) -> str:
    if math.isinf(used):
        return "∞"
    if used < 1000:
        return f"{used:.2g}" if used < 100 else f"{used:.0f}"
    return f"{used:.0e}".replace("e+0", "e").replace("e+", "e")


def _logits(verdict: Verdict) -> tuple[str, str]:
    """How often the most likely token is the same in the worst case, and the largest divergence."""
    found = [
        o.difference
        for c in verdict.report.cases
        for o in c.outputs.values()
        if o.difference.kl is not None
    ]
    if not found:
        return "-", "-"
    top1 = min(d.top1 for d in found if d.top1 is not None)
    kl = max(d.kl for d in found if d.kl is not None)
    return f"{top1:.0%}", f"{kl:.1e}"


def _text(verdict: Verdict) -> str:
    """How many of the tokens that the bundle writes are those that the reference would write."""
    generation = verdict.report.generation
    if generation is None:
        return "-"
    if generation.problem is not None:
        return "does not run"
    same = sum(p.agreeing for p in generation.prompts)
    return f"{same} of {sum(len(p.actual) for p in generation.prompts)}"


def _found(verdict: Verdict) -> str:
    finding = verdict.finding
    if finding is None:
        return "-"
    count = len(finding.nodes)
    before = f", {len(finding.shared)} before that good layers use" if finding.shared else ""
    return f"{finding.place}, {count} operator{'s' * (count > 1)}{before}"


def run(chosen: Iterable[Mutation], known: Mapping[str, Outcome]) -> Iterator[Outcome]:
    """Every fault in a fresh copy of its bundle.

    Args:
        chosen: the faults.
        known: outcomes by name, which are taken as they are.
    """
    from made_bundles import bundle_of, make_bundle
    from mutation_subjects import read_subject

    with tempfile.TemporaryDirectory() as root:
        exported: dict[str, Exported] = {}
        subjects: dict[str, Subject] = {}
        for number, mutation in enumerate(chosen):
            if mutation.name in known:
                yield known[mutation.name]
                continue
            name = mutation.subject
            if bundle_of(name) not in exported:
                exported[bundle_of(name)] = make_bundle(
                    bundle_of(name), Path(root) / f"bundle{len(exported)}", tiny()
                )
            if name not in subjects:
                subjects[name] = read_subject(name, exported[bundle_of(name)])
            folder = subjects[name].copy_to(Path(root) / str(number))
            mutation.apply(subjects[name], folder)
            verdict = subjects[name].judge(folder, Path(root) / f"{number}.found")
            yield Outcome.of(mutation, verdict)


def render(outcomes: Sequence[Outcome]) -> str:
    """Both tables in Markdown."""
    seen = [o for o in outcomes if o.seen]
    blind = [o for o in outcomes if not o.seen]
    located = sum(o.located for o in seen)
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    lines = [
        f"{len(seen)} faults, all seen; {located} of them lie at an operator or in a file, and are found there. "
        f"With {versions}.",
        "",
        *_table(SEEN, seen),
    ]
    if blind:
        lines += [
            "",
            "What no case sees, and the comparison of the files does:",
            "",
            *_table(BLIND, blind),
        ]
    return "\n".join(lines)


def _table(head: str, outcomes: Sequence[Outcome]) -> list[str]:
    return [head, "|---" * (head.count("|") - 1) + "|", *(o.row for o in outcomes)]


def written() -> list[tuple[str, str, bool]]:
    """Fault, bundle and whether it is seen, of every row of the document."""
    text = DOCUMENT.read_text("utf-8").split(BEGIN)[1].split(END)[0]
    rows, seen = [], True
    for line in text.splitlines():
        if line in (SEEN, BLIND):
            seen = line == SEEN
        elif line.startswith("| "):
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            rows.append((cells[0], cells[1], seen))
    return rows


def _read(log: Path | None) -> dict[str, Outcome]:
    """Fault → what was found of it earlier."""
    if log is None or not log.is_file():
        return {}
    found = [Outcome(**json.loads(line)) for line in log.read_text("utf-8").splitlines()]
    return {outcome.name: outcome for outcome in found}


def _keep(log: Path | None, outcome: Outcome) -> None:
    if log is not None:
        with log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(outcome)) + "\n")


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--fault", action="append", help="only faults with this in their names")
    parser.add_argument("--log", type=Path, help="keep what was found there, and go on from it")
    parser.add_argument("--write", action="store_true", help="put the tables into the document")
    args = parser.parse_args()
    if args.write and args.fault:
        parser.error("--write needs all faults")
    os.environ.setdefault("MKL_DEBUG_CPU_TYPE", "5")
    sys.path.insert(0, str(ROOT / "tests" / "parity"))
    from mutations import catalogue

    words, known, outcomes = args.fault or [""], _read(args.log), list[Outcome]()
    for outcome in run((m for m in catalogue() if any(w in m.name for w in words)), known):
        outcomes.append(outcome)
        if outcome.name not in known:
            _keep(args.log, outcome)
            print(outcome.row, *outcome.wrong, sep="\n", file=sys.stderr, flush=True)
    if wrong := [complaint for outcome in outcomes for complaint in outcome.wrong]:
        print(*wrong, sep="\n", file=sys.stderr)
        return 1
    tables = render(outcomes)
    if args.write:
        text = DOCUMENT.read_text("utf-8")
        head, _, rest = text.partition(BEGIN)
        DOCUMENT.write_text(f"{head}{BEGIN}\n{tables}\n{END}{rest.partition(END)[2]}", "utf-8")
    print(tables)
    return 0


if __name__ == "__main__":
    sys.exit(main())
