"""``peft-deploy bench``: how fast bundles are, side by side."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from peft_deploy.cli._common import common_options, emit_json

if TYPE_CHECKING:
    from rich.table import Table

    from peft_deploy.workflows.bench import BenchReport, Speed


@click.command("bench")
@click.argument("bundles", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--adapter",
    "adapters",
    multiple=True,
    metavar="NAME",
    help="Measure with this adapter of the bundles; repeatable. Default: with each.",
)
@click.option(
    "--batch", "batches", multiple=True, type=int, default=(1,), show_default=True, metavar="B"
)
@click.option(
    "--prompt-tokens", multiple=True, type=int, default=(128,), show_default=True, metavar="N"
)
@click.option("--new-tokens", type=int, default=16, show_default=True, metavar="N")
@click.option("--rounds", type=int, default=5, show_default=True, metavar="N")
@click.option("--provider", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--threads", type=int, metavar="N", help="Default: all cores.")
@common_options
def bench_command(
    bundles: tuple[Path, ...],
    adapters: tuple[str, ...],
    batches: tuple[int, ...],
    prompt_tokens: tuple[int, ...],
    new_tokens: int,
    rounds: int,
    provider: str,
    threads: int | None,
    as_json: bool,
) -> None:
    """Measure prefill and decoding of one bundle or several, in one interleaved run.

    A bundle with adapters is measured without and with each of them. The ratios are to the first line: above
    1 is faster. Memory is the most that a process with nothing but this bundle had.
    """
    from rich.console import Console

    from peft_deploy.cli._progress import RichProgress
    from peft_deploy.config.bench import BenchOptions
    from peft_deploy.workflows.bench import bench

    options = BenchOptions(
        batches=batches,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        rounds=rounds,
        adapters=adapters,
        provider=provider,
        threads=threads,
    )
    with RichProgress() as progress:
        report = bench(bundles, options=options, progress=progress)
    if as_json:
        emit_json(report.to_dict())
        return
    screen = Console(highlight=False)
    screen.print(_speeds(report))
    screen.print()
    screen.print(_sizes(report))


def _sizes(report: BenchReport) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("bundle", overflow="fold")
    for title in ("loading", "on disk"):
        table.add_column(title, justify="right", no_wrap=True)
    for lane in report.lanes:
        table.add_row(
            lane.name,
            f"{lane.load_seconds:.2f} s",
            f"{lane.disk / 1e6:,.0f} MB",
        )
    return table


def _speeds(report: BenchReport) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("bundle", overflow="fold")
    for title in (
        "batch",
        "prompt",
        "first token",
        "prefill",
        "ratio",
        "decode",
        "ratio",
        "memory",
    ):
        table.add_column(title, justify="right", no_wrap=True)
    for speed in report.speeds:
        table.add_row(speed.lane, *_cells(speed))
    return table


def _cells(speed: Speed) -> tuple[str, ...]:
    return (
        str(speed.batch),
        str(speed.prompt_tokens),
        f"{speed.prefill_seconds * 1000:,.0f} ms",
        f"{speed.prefill_tokens_per_second:,.0f} tok/s",
        f"{speed.prefill_ratio:.3f}",
        f"{speed.decode_tokens_per_second:,.1f} tok/s",
        f"{speed.decode_ratio:.3f}",
        "unknown" if speed.peak_memory is None else f"{speed.peak_memory / 1e6:,.0f} MB",
    )
