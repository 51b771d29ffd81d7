"""Measures bundles against other exporters' graphs of the same model, and against Paddle. See bench_peers.sh.

One process a contender; all of them are measured in turn, round by round, so that the ratios hold on a machine that
does other things as well. Every ONNX graph runs in the same loop under the same onnxruntime (peers/onnx_loop.py).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path

from peers import table
from peers.builds import BuildError, Workshop, say
from peers.contenders import PEERS, PRECISIONS, ROOT, Contender, contenders, missing, preparations
from peers.crew import CHUNK, Worker, lanes_of, load_all, measure
from peers.plot import plot
from peers.results import Export, Run, bars

MODEL = ROOT / "models" / "smollm2-135m"
README, PICTURE = ROOT / "README.md", ROOT / table.PICTURE
BEGIN, END = "<!-- speed table: begin -->", "<!-- speed table: end -->"
PROMPT_TOKENS, STEPS = 128, 32
PROMPT = """The lighthouse at the end of the bay had been dark for eleven years when the council decided to sell it.
Nobody in the village wanted the building itself, which was damp and hard to heat, but everybody had an opinion about
who should not have it. The baker feared a hotel, the harbour master feared a museum, and the children feared that
the door, which had never been locked, would be locked at last. In the end it went to a retired teacher of physics,
who moved in with two suitcases, a telescope and a very old dog. On the first clear night of autumn she climbed the
stairs, cleaned the glass with vinegar and newspaper, and lit the lamp again, although no ship had asked for it. The
next morning there was a queue of people at the foot of the tower, and all of them wanted to know"""


def main() -> int:
    """The command line; 1 when a promise was missed."""
    args = _arguments()
    run = Run.read(args.read) if args.read else _measure(args)
    if args.json:
        run.write(args.json)
    if args.plot or args.write:
        plot(run, args.plot or PICTURE)
    if args.write:
        _write_readme(run)
    table.show(run)
    return 0 if all(bar.passed for bar in bars(run)) else 1


def _measure(args: argparse.Namespace) -> Run:
    base = args.base or _make_model()
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tools"))),
        "PEFT_DEPLOY_CACHE": "",  # every export does all of its work
        "MKL_DEBUG_CPU_TYPE": "5",  # an AMD processor's fast path in Paddle's MKL
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_OFFLINE": "1",
    }
    # The others' environment has its byte code; ours gets it with the first run, as anybody's does.
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    shop = Workshop(args.work, environment)
    for build in preparations(base, shop):
        shop.make(build)
    chosen = [c for c in contenders(base, shop) if not args.only or c.precision in args.only]
    built, gone = _build(chosen, shop)
    exports = _exports(built, shop, args.exports)
    prompt = _prompt(base)
    most = PROMPT_TOKENS + args.steps + 1
    workers = []
    try:
        for contender in built:
            folder = shop.folder(contender.build.key)
            workers.append(Worker(contender, folder, args.threads, most, environment))
        lanes = lanes_of(workers)
        say(f"loading {len(workers)} models")
        gone |= load_all(lanes, prompt)
        lanes = [lane for lane in lanes if str(lane.worker) not in gone]
        say(f"measuring {len(lanes)} lanes in {args.rounds} rounds")
        measure(lanes, prompt, args.rounds, args.steps)
    finally:
        for worker in workers:
            worker.stop()
    records = [lane.record for lane in lanes]
    return Run(_machine(args), PROMPT_TOKENS, records, exports, {**missing(args.only), **gone})


def _build(chosen: Sequence[Contender], shop: Workshop) -> tuple[list[Contender], dict[str, str]]:
    """Makes all folders; gives who takes part, and who does not and why.

    Raises:
        SystemExit: one that the comparison is about could not be built.
    """
    built, gone = [], {}
    for contender in chosen:
        who = f"{contender.name} {contender.precision}"
        try:
            shop.make(contender.build)
        except BuildError as exc:
            if contender.required:
                raise SystemExit(f"error: {who} could not be built:\n{exc}") from None
            gone[who] = f"could not be built: {str(exc).splitlines()[-1]}"
            say(f"left out: {who}: {gone[who]}")
        else:
            built.append(contender)
    return built, gone


def _exports(built: Sequence[Contender], shop: Workshop, runs: int) -> list[Export]:
    """What the exports took; those that promises are about are run again, in turn."""
    took = {c.build: [shop.make(c.build)] for c in built if c.exports}
    again = [c.build for c in built if c.exports and c.times_export]
    for turn in range(runs):
        say(f"exporting {', '.join(build.key for build in again)}, {turn + 1} of {runs}")
        for build in again:
            took[build] = ([] if turn == 0 else took[build]) + [shop.time_again(build)]
    return [
        Export(
            contender.name,
            contender.precision,
            [measured.seconds for measured in took[contender.build]],
            [measured.tree_peak for measured in took[contender.build]],
            _disk(shop.folder(contender.build.key)),
        )
        for contender in built
        if contender.exports
    ]


def _disk(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _prompt(base: Path) -> list[int]:
    from tokenizers import Tokenizer

    tokens: list[int] = Tokenizer.from_file(str(base / "tokenizer.json")).encode(PROMPT).ids
    if len(tokens) < PROMPT_TOKENS:
        raise SystemExit(f"error: the text has {len(tokens)} tokens, of {PROMPT_TOKENS}")
    return tokens[:PROMPT_TOKENS]


def _machine(args: argparse.Namespace) -> dict[str, object]:
    packages = ("onnxruntime", "paddlepaddle", "paddlenlp", "numpy")
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text("utf-8").splitlines() if cpuinfo.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.processor(),
        "cores": args.threads,
        "rounds": args.rounds,
        "new_tokens": args.steps + 1,
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in packages},
        "peers": (PEERS / ".packages").read_text("utf-8").split(),
    }


def _make_model() -> Path:
    """SmolLM2-135M, made by its recipe unless it is there."""
    spec = importlib.util.spec_from_file_location("make_smollm2", MODEL / "make.py")
    assert spec is not None and spec.loader is not None
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    recipe.make(say=say)
    return MODEL


def _write_readme(run: Run) -> None:
    head, begin, rest = README.read_text("utf-8").partition(BEGIN)
    if not begin:
        raise SystemExit(f"error: {README.name} has no line {BEGIN}")
    text = f"{head}{BEGIN}\n{table.markdown(run)}\n{END}{rest.partition(END)[2]}"
    README.write_text(text, "utf-8")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--base", type=Path, help="a checkpoint; default: SmolLM2-135M by its recipe"
    )
    parser.add_argument("--work", type=Path, default=ROOT / "tools" / ".bench-peers")
    parser.add_argument("--only", action="append", choices=PRECISIONS, help="this precision")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=STEPS, help=f"a round; a multiple of {CHUNK}")
    parser.add_argument("--exports", type=int, default=2, help="how often exports are timed again")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the raw numbers here")
    parser.add_argument(
        "--read", type=Path, metavar="FILE", help="show a kept run, measure nothing"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw it, as PNG")
    parser.add_argument(
        "--write", action="store_true", help="put table and picture into README.md"
    )
    args = parser.parse_args()
    if args.rounds < 1 or args.steps < CHUNK or args.steps % CHUNK or args.exports < 0:
        parser.error(
            f"--rounds must be 1 at least, --steps a multiple of {CHUNK}, --exports 0 at least"
        )
    args.base = args.base and args.base.resolve()
    args.work = args.work.resolve()
    return args


if __name__ == "__main__":
    sys.exit(main())
