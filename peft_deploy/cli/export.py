"""``peft-deploy export``."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from peft_deploy.cli._common import common_options, emit_json, layers_option, say
from peft_deploy.config.export import ALL_LINEAR, BUILTIN, FORMATS, FUSE_LEVELS, ONNX, RUNTIME
from peft_deploy.config.precision import FP32, PRECISIONS

if TYPE_CHECKING:
    from peft_deploy.workflows.export import ExportResult


@click.command("export")
@click.option(
    "--base", required=True, help="Base model: a folder, or a name that PaddleNLP can download."
)
@click.option(
    "--adapter",
    "adapter_folders",
    multiple=True,
    metavar="[NAME=]DIR",
    help="LoRA or prefix adapter to export with it; repeatable.",
)
@click.option("--merge", is_flag=True, help="Merge the LoRA adapter into the weights.")
@click.option(
    "--adapters",
    type=click.Choice([RUNTIME]),
    help="Keep LoRA adapters apart from the weights, to be chosen at run time.",
)
@click.option(
    "--slots",
    metavar=f"{ALL_LINEAR}|REGEX",
    help="With --adapters runtime: further linear layers that adapters can change.",
)
@click.option(
    "--slot-rank",
    type=int,
    metavar="R",
    help="One rank for all slots, for runtimes that take no empty tensors.",
)
@click.option(
    "--adapter-bank",
    type=int,
    metavar="N",
    help="Slots for up to N LoRA adapters at once: each row of a batch names its own (adapter_ids).",
)
@click.option(
    "--prefix-slots",
    is_flag=True,
    help="Let the graph take a prefix from an .onnx_adapter file, too.",
)
@click.option(
    "--signature",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Inputs and outputs (JSON) of a model that no family knows; it is exported by its own forward.",
)
@click.option(
    "--output", required=True, type=click.Path(path_type=Path), help="The bundle's folder."
)
@click.option(
    "--format",
    type=click.Choice(FORMATS),
    default=ONNX,
    show_default=True,
    help="ONNX, or Paddle's static format for Paddle Inference.",
)
@click.option(
    "--fuse",
    type=click.Choice(FUSE_LEVELS),
    help="Put small operators together: to standard ones of opset 23 (onnx), to onnxruntime's own, too (ort), or not.",
)
@click.option(
    "--opset",
    type=int,
    help="ONNX operator set; default: 23 for fused graphs, 17 for plain ones. Below 23 nothing is fused.",
)
@click.option(
    "--precision",
    type=click.Choice(list(PRECISIONS)),
    default=FP32,
    show_default=True,
    help="Of the arithmetic and the weights.",
)
@click.option(
    "--last-logits",
    is_flag=True,
    help="Compute the logits of the last token only, which is all that generation needs: prompts are read faster.",
)
@click.option(
    "--calibration",
    metavar=f"FILE|{BUILTIN}",
    help="With int4: choose scales by what the model's layers are given while it reads this text.",
)
@click.option(
    "--pooling",
    type=click.Choice(["mean", "cls", "none"]),
    help="Of the sentence embeddings of an encoder; default: as its folder says.",
)
@click.option("--no-validate", is_flag=True, help="Leave out the check against the dynamic graph.")
@layers_option
@click.option(
    "--cases",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Prompts that the check covers, too: one a line, or .jsonl.",
)
@click.option(
    "--record-reference",
    is_flag=True,
    help="Keep what Paddle says in the bundle, so that validate needs no --base.",
)
@click.option(
    "--report",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Write the check's report as JSON, Markdown, JUnit XML and HTML.",
)
@click.option("--keep-failed", is_flag=True, help="Keep a bundle that failed the check.")
@click.option("--force", is_flag=True, help="Replace the bundle that is there.")
@click.option("--dry-run", is_flag=True, help="Check the inputs and say what would be done.")
@common_options
def export_command(
    base: str,
    adapter_folders: tuple[str, ...],
    merge: bool,
    adapters: str | None,
    slots: str | None,
    slot_rank: int | None,
    adapter_bank: int | None,
    prefix_slots: bool,
    signature: Path | None,
    output: Path,
    format: str,
    fuse: str | None,
    opset: int | None,
    precision: str,
    last_logits: bool,
    calibration: str | None,
    pooling: str | None,
    no_validate: bool,
    validate_layers: int | str | None,
    cases: Path | None,
    record_reference: bool,
    report: Path | None,
    keep_failed: bool,
    force: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Make a bundle of a base model and the adapters trained on it: ONNX, or Paddle's static format.

    The bundle is checked against the model in Paddle's dynamic graph before it is put in place.
    """
    from peft_deploy.cli._progress import RichProgress
    from peft_deploy.config.export import ExportOptions
    from peft_deploy.errors import ConfigError, ParityError

    if merge and adapters is not None:
        raise ConfigError(
            f"--merge folds an adapter into the weights and --adapters {adapters} keeps it apart",
            hint="give one of the two",
        )
    if merge and adapter_bank is not None:
        raise ConfigError(
            "--merge folds an adapter into the weights and --adapter-bank keeps adapters apart",
            hint="give one of the two",
        )
    if merge and not adapter_folders:
        raise ConfigError(
            "--merge says what to do with an adapter, and none was given", hint="add --adapter DIR"
        )
    options = ExportOptions(
        merge=merge,
        adapters=adapters,
        slots=slots,
        slot_rank=slot_rank,
        adapter_bank=adapter_bank,
        prefix_slots=prefix_slots,
        format=format,
        fuse=fuse,
        opset=opset,
        precision=precision,
        last_logits=last_logits,
        calibration=calibration,
        pooling=pooling,
        validate=not no_validate,
        validate_layers=validate_layers,
        keep_failed=keep_failed,
        cases=cases,
        record_reference=record_reference,
        report=report,
        force=force,
        dry_run=dry_run,
    )
    from peft_deploy.convert.process import started_early

    converts = signature is None and not dry_run
    try:
        with started_early() if converts else nullcontext():
            # Not above: it takes a quarter of a second, in which the converter's process imports Paddle already.
            from peft_deploy.workflows.export import export

            with RichProgress() as progress:
                result = export(
                    base,
                    output,
                    adapter=adapter_folders,
                    signature=signature,
                    options=options,
                    progress=progress,
                )
    except ParityError as exc:
        if exc.report is not None:
            say(exc.report.table())
        raise
    if as_json:
        emit_json(_data(result))
    else:
        _show(result)
    if result.parity is not None and not result.parity.passed:
        say(f"[bold red]the check failed[/]; the bundle is kept in {output}")
        click.get_current_context().exit(ParityError.exit_code)


def _data(result: ExportResult) -> dict[str, Any]:
    return {
        "output": str(result.output),
        "plan": result.plan,
        "seconds": result.seconds,
        "peak_memory": result.peak_memory,
        "parity": None if result.parity is None else result.parity.to_dict(),
    }


def _show(result: ExportResult) -> None:
    if result.plan:
        for line in result.plan:
            say(line)
        return
    if result.parity is not None:
        say(result.parity.table())
    files = sorted(p for p in result.output.rglob("*") if p.is_file())
    size = sum(p.stat().st_size for p in files)
    verdict = "[green]verified[/]" if result.parity is not None else "[yellow]not verified[/]"
    seconds = sum(result.seconds.values())
    say(
        f"{result.output}: {size / 1e6:,.0f} MB in {len(files)} files, {verdict}; "
        f"{seconds:.1f} s, peak memory {result.peak_memory / 1e6:,.0f} MB"
    )
