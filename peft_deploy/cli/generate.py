"""``peft-deploy generate``: a bundle's answers to prompts, under ONNX Runtime or Paddle Inference alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import click

from peft_deploy.cli._common import common_options, emit_json

if TYPE_CHECKING:
    from rich.console import Console

    from peft_deploy.runtime import Generation, TextRun


NO_ADAPTER = "-"


@click.command("generate")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--prompt", "prompts", multiple=True, metavar="TEXT", help="A prompt; repeatable.")
@click.option(
    "--prompt-file",
    type=click.File("r", encoding="utf-8"),
    help="A file with one prompt a line; - reads them from standard input.",
)
@click.option("--chat", is_flag=True, help="Put the prompts into the model's chat template.")
@click.option("--system", metavar="TEXT", help="With --chat: the system's message.")
@click.option(
    "--adapter",
    "adapters",
    multiple=True,
    metavar="NAME",
    help="With this adapter of the bundle, or an .onnx_adapter file. With a bank: one for each prompt, or - for none.",
)
@click.option(
    "--scale", type=float, default=1.0, metavar="X", help="Multiplies what the adapter adds."
)
@click.option("--prefix", metavar="NAME", help="Begin after this prefix of the bundle, or a file.")
@click.option("--max-new-tokens", type=int, default=128, show_default=True, metavar="N")
@click.option(
    "--temperature",
    type=float,
    default=0.0,
    show_default=True,
    help="0 takes the likeliest token.",
)
@click.option(
    "--top-k", type=int, default=0, metavar="K", help="Draw from the K likeliest tokens."
)
@click.option(
    "--top-p", type=float, default=1.0, metavar="P", help="Draw from those that together reach P."
)
@click.option("--seed", type=int, metavar="N", help="Makes the draws repeatable.")
@click.option("--provider", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--threads", type=int, metavar="N", help="Default: all cores.")
@common_options
def generate_command(
    bundle: Path,
    prompts: tuple[str, ...],
    prompt_file: TextIO | None,
    chat: bool,
    system: str | None,
    adapters: tuple[str, ...],
    scale: float,
    prefix: str | None,
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int | None,
    provider: str,
    threads: int | None,
    as_json: bool,
) -> None:
    """Answer prompts with a bundle, under ONNX Runtime alone, or Paddle Inference for one in Paddle's format.

    One prompt is answered as the text comes; several are answered in one padded batch. For a model of encoder and
    decoder, a prompt is the text that the encoder reads.
    """
    texts = _all_prompts(prompts, prompt_file)
    from rich.console import Console

    from peft_deploy.runtime import load_bundle

    screen = Console(stderr=True)
    with screen.status("Loading the bundle"):
        loaded = load_bundle(bundle, provider=provider, threads=threads)
    run = loaded.start(
        texts,
        chat=chat,
        system=system,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        adapter=adapters[0] if len(adapters) == 1 else None,
        adapters=_by_prompt(adapters, texts) if len(adapters) > 1 else None,
        scale=scale,
        prefix=prefix,
    )
    if as_json:
        _print_json(texts, _finish(run, screen))
    elif len(texts) == 1:
        _print_stream(run)
    else:
        _print_batch(texts, _finish(run, screen))
    if not as_json:
        _print_figures(run.results, screen)


def _by_prompt(adapters: Sequence[str], texts: Sequence[str]) -> list[str | None]:
    if len(adapters) != len(texts):
        raise click.UsageError(
            f"{len(adapters)} adapters were named for {len(texts)} prompts: name one for all, or one for each"
        )
    return [None if name == NO_ADAPTER else name for name in adapters]


def _all_prompts(prompts: Sequence[str], prompt_file: TextIO | None) -> list[str]:
    texts = list(prompts)
    if prompt_file is not None:
        texts += [line.rstrip("\r\n") for line in prompt_file if line.strip()]
    if not texts:
        raise click.UsageError("there is no prompt: give --prompt TEXT or --prompt-file FILE")
    return texts


def _finish(run: TextRun, screen: Console) -> list[Generation]:
    with screen.status("Generating"):
        return run.results


def _print_stream(run: TextRun) -> None:
    for piece in run:
        click.echo(piece.text, nl=False)
    click.echo()


def _print_batch(texts: Sequence[str], results: Sequence[Generation]) -> None:
    for index, (prompt, result) in enumerate(zip(texts, results, strict=True), 1):
        click.echo(f"[{index}/{len(texts)}] {prompt}")
        click.echo(f"{result.text}\n")


def _print_json(texts: Sequence[str], results: Sequence[Generation]) -> None:
    data = [{"prompt": p, **r.to_dict()} for p, r in zip(texts, results, strict=True)]
    emit_json({"results": data})


def _print_figures(results: Sequence[Generation], screen: Console) -> None:
    for index, result in enumerate(results, 1):
        row = f"{index}/{len(results)}: " if len(results) > 1 else ""
        speed = result.tokens_per_second
        rate = "" if speed is None else f" at {speed:.1f} tok/s"
        screen.print(
            f"{row}{len(result.token_ids)} tokens{rate} · prompt of {result.prompt_tokens} in "
            f"{result.prefill_seconds:.2f} s · ended by {result.finish_reason}",
            style="dim",
            highlight=False,
        )
