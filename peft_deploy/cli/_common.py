"""What every command does alike: options, errors, exit codes, where output goes."""

from __future__ import annotations

import functools
import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import click

from peft_deploy.environment import DEBUG_VARIABLE
from peft_deploy.errors import PeftDeployError

F = TypeVar("F", bound=Callable[..., Any])


def _layer_count(_context: click.Context, _option: click.Parameter, text: str | None) -> Any:
    return int(text) if text is not None and text.isdecimal() else text


def layers_option(command: F) -> F:
    """Adds ``--validate-layers``, passed on as ``validate_layers``: a number, a text, or None."""
    return click.option(
        "--validate-layers",
        metavar="N|all",
        callback=_layer_count,
        help="Compute with N layers only, the first and the last among them, and compare the structure and the "
        "weights of all. Default: all layers, or as many as fit into memory.",
    )(command)


def common_options(command: F) -> F:
    """Adds ``--json`` (passed on as ``as_json``) and ``--debug``, and turns errors into exit codes.

    Data goes to stdout, everything for people to stderr.
    """

    @click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout.")
    @click.option(
        "--debug",
        is_flag=True,
        help="Show tracebacks and the log lines of Paddle and ONNX Runtime.",
    )
    @functools.wraps(command)
    def run(*args: Any, debug: bool, **kwargs: Any) -> Any:
        if debug:
            os.environ[DEBUG_VARIABLE] = "1"
        else:
            warnings.showwarning = _show_warning
        try:
            return command(*args, **kwargs)
        except PeftDeployError as exc:
            fail(exc, debug=debug, as_json=bool(kwargs.get("as_json")))
        except KeyboardInterrupt:
            raise click.Abort from None
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise
        except Exception as exc:
            if debug:
                raise
            from rich.markup import escape

            if kwargs.get("as_json"):
                emit_json({"error": type(exc).__name__, "message": str(exc), "hint": None})
            say(f"[bold red]internal error:[/] {type(exc).__name__}: {escape(str(exc))}")
            say("[bold]hint:[/]  run again with --debug for the traceback, and please report it")
            sys.exit(PeftDeployError.exit_code)

    return run  # type: ignore[return-value]


def fail(error: PeftDeployError, *, debug: bool, as_json: bool) -> NoReturn:
    """Prints an error and its hint and ends the program with its exit code."""
    if debug:
        traceback.print_exception(error)
    if as_json:
        emit_json({"error": type(error).__name__, "message": error.message, "hint": error.hint})
    from rich.markup import escape

    say(f"[bold red]error:[/] {escape(error.message)}")
    if error.hint:
        say(f"[bold]hint:[/]  {escape(error.hint)}")
    sys.exit(error.exit_code)


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: object = None,
    line: str | None = None,
) -> None:
    """This package's own warnings, a sentence each; those of others only with --debug."""
    own = Path(__file__).parents[1]
    if own in Path(filename).parents:
        from rich.markup import escape

        say(f"[bold yellow]warning:[/] {escape(str(message))}")


def emit_json(data: Any) -> None:
    """One JSON document on stdout."""
    click.echo(json.dumps(data, indent=2, ensure_ascii=False, default=str))


def say(message: object) -> None:
    """A line for people, on stderr; rich markup is understood."""
    from rich.console import Console

    Console(stderr=True, highlight=False, soft_wrap=True).print(message)
