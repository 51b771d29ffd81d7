"""The demo behind demo.sh: fine-tune, export, compare, on a real model.

Exit code 0 says that everything passed: the export was checked against Paddle, the fine-tuned
model answers in the form that it was taught, and the base model does not.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / ".demo"
MODEL = ROOT / "models" / "smollm2-135m"
DATA = ROOT / "tools" / "demo_data"

BEGINNING, END = "Captain's log:", "Steady as she goes!"
MAX_NEW_TOKENS = 48

console = Console(highlight=False)


@dataclass
class Clock:
    """Which step the demo is at, and how long the rest will take.

    Args:
        expected: title of each step → seconds that it took on two cores; replaced by what it took
            on this machine once the demo has been there.
    """

    expected: dict[str, float]
    start: float = field(default_factory=time.perf_counter)
    taken: dict[str, float] = field(default_factory=dict)

    def step(self, title: str) -> None:
        """Announces the next step."""
        titles = list(self.expected)
        left = sum(self.expected[t] for t in titles[titles.index(title) :])
        console.print(
            f"\n[bold cyan]Step {titles.index(title) + 1} of {len(titles)}: {title}[/] "
            f"[dim](about {_minutes(left)} left)[/]"
        )
        self._begun = time.perf_counter()
        self._title = title

    def done(self) -> None:
        """Ends the step."""
        self.taken[self._title] = round(time.perf_counter() - self._begun, 1)


def _minutes(seconds: float) -> str:
    if seconds < 60:
        return f"{max(int(seconds / 10 + 0.5) * 10, 10)} s"
    return f"{seconds / 60:.1f} min"


class DemoError(Exception):
    """Something did not pass."""


FETCH = "fetch SmolLM2-135M-Instruct"
TRAIN = "fine-tune it with LoRA"
BASE = "export the base model, for comparison"
EXPORT = "export it with the adapter merged, and check it against Paddle"
HALF = "export it in half the size, in fp16"
INT4 = "export it in a fifth of the size, in int4 with scales chosen by a text"
ASK = "ask all of them under onnxruntime"
EXPECTED = {FETCH: 15.0, TRAIN: 110.0, BASE: 12.0, EXPORT: 70.0, HALF: 10.0, INT4: 25.0, ASK: 22.0}


def main() -> int:
    """Runs all steps; 1 when one of them fails."""
    if not WORK.exists():
        WORK.mkdir()
    clock = Clock(_expected())
    try:
        _run(clock)
    except DemoError as exc:
        console.print(f"\n[bold red]The demo failed:[/] {escape(str(exc))}")
        return 1
    except KeyboardInterrupt:
        console.print("\n[yellow]interrupted[/]")
        return 130
    _remember(clock)
    return 0


def _run(clock: Clock) -> None:
    clock.step(FETCH)
    _fetch_model()
    clock.done()

    clock.step(TRAIN)
    count = len((DATA / "train.jsonl").read_text("utf-8").splitlines())
    console.print(
        f"[dim]{count} short examples teach one habit: answer in a sentence, "
        "like a ship's captain.[/]"
    )
    _peft_deploy(
        *("train", "--base", MODEL, "--method", "lora", "--data", DATA / "train.jsonl"),
        *("--output", WORK / "adapter", "--force"),
        *("--learning-rate", "1e-3", "--max-steps", "40"),
    )
    clock.done()

    clock.step(BASE)
    _peft_deploy("export", "--base", MODEL, "--output", WORK / "base", "--force", "--no-validate")
    clock.done()

    clock.step(EXPORT)
    _peft_deploy(
        *("export", "--base", MODEL, "--adapter", WORK / "adapter", "--merge"),
        *("--output", WORK / "captain", "--force"),
    )
    _check_parity(WORK / "captain")
    clock.done()

    clock.step(HALF)
    _peft_deploy(
        *("export", "--base", MODEL, "--adapter", WORK / "adapter", "--merge", "--no-validate"),
        *("--precision", "fp16", "--output", WORK / "captain-fp16", "--force"),
    )
    clock.done()

    clock.step(INT4)
    _peft_deploy(
        *("export", "--base", MODEL, "--adapter", WORK / "adapter", "--merge", "--no-validate"),
        *("--precision", "int4", "--calibration", "builtin"),
        *("--output", WORK / "captain-int4", "--force"),
    )
    clock.done()

    clock.step(ASK)
    questions = json.loads((DATA / "questions.json").read_text("utf-8"))
    names = ("base", "captain", "captain-fp16", "captain-int4")
    before, after, *smaller = (_answers(WORK / name, questions) for name in names)
    clock.done()
    _compare(questions, before, after)
    _check_answers(questions, before, after)
    for answers in smaller:
        _check_answers(questions, before, answers)
    console.print(
        f"\n[bold green]Everything passed[/] in {_minutes(time.perf_counter() - clock.start)}. "
        f"The bundle is in {(WORK / 'captain').relative_to(ROOT)}; ask it yourself:\n"
        f'  .venv/bin/peft-deploy generate .demo/captain --chat --prompt "What is a volcano?"'
    )


def _fetch_model() -> None:
    path = MODEL / "make.py"
    spec = importlib.util.spec_from_file_location("make_smollm2", path)
    assert spec is not None and spec.loader is not None
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    if recipe.is_complete():
        console.print("[dim]It is there already.[/]")
    try:
        recipe.make(say=lambda line: console.print(f"[dim]{line} …[/]"))
    except recipe.RecipeError as exc:
        raise DemoError(str(exc)) from exc


def _peft_deploy(*arguments: object) -> None:
    """One command of the tool, shown as one would type it."""
    words = [str(argument) for argument in arguments]
    shown = " ".join(word.removeprefix(f"{ROOT}/") for word in words)
    console.print(f"[bold]$ peft-deploy {shown}[/]", soft_wrap=True)
    done = subprocess.run([sys.executable, "-m", "peft_deploy", *words], cwd=ROOT)
    if done.returncode:
        raise DemoError(f"peft-deploy {words[0]} ended with exit code {done.returncode}")


def _check_parity(bundle: Path) -> None:
    parity = json.loads((bundle / "peft_deploy.json").read_text("utf-8"))["parity"]
    if not parity or not parity.get("passed"):
        raise DemoError(f"{bundle} has not passed the parity check")


def _answers(bundle: Path, questions: list[str]) -> list[str]:
    """One process for each bundle, without Paddle in it."""
    prompts = [word for question in questions for word in ("--prompt", question)]
    command = [sys.executable, "-m", "peft_deploy", "generate", str(bundle), "--chat", "--json"]
    done = subprocess.run(
        [*command, "--max-new-tokens", str(MAX_NEW_TOKENS), *prompts],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    if done.returncode:
        raise DemoError(f"peft-deploy generate {bundle} ended with {done.returncode}")
    return [entry["text"].strip() for entry in json.loads(done.stdout)["results"]]


def _compare(questions: list[str], before: list[str], after: list[str]) -> None:
    table = Table(title="\nThe same questions, under onnxruntime", show_lines=True)
    table.add_column("question", style="bold", ratio=2)
    table.add_column("SmolLM2-135M", ratio=4)
    table.add_column("… after fine-tuning, merged and exported", style="cyan", ratio=4)
    for row in zip(questions, before, after, strict=True):
        table.add_row(*map(escape, row))
    console.print(table)


def _check_answers(questions: list[str], before: list[str], after: list[str]) -> None:
    for question, old, new in zip(questions, before, after, strict=True):
        if not (new.startswith(BEGINNING) and new.endswith(END)):
            raise DemoError(f"the fine-tuned model did not answer {question!r} as it was taught")
        if BEGINNING in old or END in old:
            raise DemoError(f"the base model answered {question!r} as if it had been fine-tuned")


def _expected() -> dict[str, float]:
    path = WORK / "seconds.json"
    try:
        taken = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return dict(EXPECTED)
    return {title: taken.get(title, seconds) for title, seconds in EXPECTED.items()}


def _remember(clock: Clock) -> None:
    temporary = WORK / "seconds.json.tmp"
    temporary.write_text(json.dumps(clock.taken, indent=2), "utf-8")
    temporary.replace(WORK / "seconds.json")


if __name__ == "__main__":
    sys.exit(main())
