"""The program itself: its commands, its exit codes, what goes to which stream."""

from __future__ import annotations

import inspect as python_inspect
import json
import os
import signal
from importlib.metadata import version

import click
import pytest
from click.testing import CliRunner, Result

from peft_deploy import cli as program
from peft_deploy import errors
from peft_deploy.cli import cli
from peft_deploy.cli._common import common_options, emit_json
from peft_deploy.environment import DEBUG_VARIABLE
from peft_deploy.errors import PeftDeployError

COMMANDS = ("train", "export", "validate", "generate", "inspect", "doctor")
ERRORS = [
    cls
    for _, cls in python_inspect.getmembers(errors, python_inspect.isclass)
    if issubclass(cls, PeftDeployError)
]


@pytest.fixture(autouse=True)
def no_debug_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DEBUG_VARIABLE, "")  # so that what --debug sets is undone


def raising(error: BaseException, *arguments: str) -> Result:
    @click.command()
    @common_options
    def command(as_json: bool) -> None:
        raise error

    return CliRunner().invoke(command, list(arguments))


def test_help_lists_the_commands_each_with_a_line() -> None:
    result = CliRunner().invoke(cli, ["--help"])
    assert result.exit_code == 0
    lines = [line.split(maxsplit=1) for line in result.stdout.splitlines() if line.strip()]
    listed = {words[0]: words[1] for words in lines if words[0] in COMMANDS and len(words) > 1}
    assert set(listed) == set(COMMANDS)


def commands() -> list[str]:
    return cli.list_commands(click.Context(cli))


@pytest.mark.parametrize("name", commands())
def test_every_command_takes_json_and_debug(name: str) -> None:
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    commands = command.commands.values() if isinstance(command, click.Group) else [command]
    for each in commands:
        options = {option for parameter in each.params for option in parameter.opts}
        assert {"--json", "--debug"} <= options, each.name
        assert each.help


def test_version() -> None:
    result = CliRunner().invoke(cli, ["--version"])
    assert result.exit_code == 0 and version("peft-deploy") in result.stdout


@pytest.mark.parametrize("arguments", [["fly"], ["export"], ["inspect"], ["doctor", "--fly"]])
def test_wrong_usage(arguments: list[str]) -> None:
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 2
    assert result.stdout == "" and "Usage: " in result.stderr


@pytest.mark.parametrize("cls", ERRORS, ids=lambda cls: cls.__name__)
def test_each_error_has_its_exit_code_and_says_what_to_do(cls: type[PeftDeployError]) -> None:
    result = raising(cls("the [red] thing is broken", hint="mend it [now]"))
    assert result.exit_code == cls.exit_code
    assert result.stdout == ""
    assert "error: the [red] thing is broken" in result.stderr
    assert "hint:  mend it [now]" in result.stderr
    assert "Traceback" not in result.stderr


def test_exit_codes_tell_the_stages_apart() -> None:
    codes = {cls.__name__: cls.exit_code for cls in ERRORS}
    assert codes["ConfigError"] == codes["MissingExtraError"] == codes["OutputError"] == 2
    assert codes["CheckpointError"] == codes["AdapterError"] == 3
    assert codes["TraceError"] == codes["UnsupportedModelError"] == 4
    assert codes["ConversionError"] == codes["ConverterCrashError"] == 5
    assert codes["BundleError"] == codes["ExecutionError"] == 6
    assert codes["ParityError"] == 7


def test_an_error_as_json() -> None:
    result = raising(errors.AdapterError("it does not fit", hint="take another"), "--json")
    assert result.exit_code == 3
    assert json.loads(result.stdout) == {
        "error": "AdapterError",
        "message": "it does not fit",
        "hint": "take another",
    }


def test_debug_shows_the_traceback() -> None:
    result = raising(errors.TraceError("it does not trace"), "--debug")
    assert result.exit_code == 4
    assert "Traceback" in result.stderr and "it does not trace" in result.stderr


def test_what_nobody_foresaw() -> None:
    result = raising(RuntimeError("a [bold] surprise"))
    assert result.exit_code == 1
    assert "internal error: RuntimeError: a [bold] surprise" in result.stderr
    assert "Traceback" not in result.stderr and "--debug" in result.stderr
    with pytest.raises(RuntimeError, match="surprise"):
        raise raising(RuntimeError("surprise"), "--debug").exception or AssertionError


def test_interruption(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Ctrl-C inside a command; tests/flows has the real signals."""
    result = raising(KeyboardInterrupt())
    assert isinstance(result.exception, SystemExit) and "Traceback" not in result.stderr
    handler = signal.getsignal(signal.SIGTERM)

    def interrupted(**_options: object) -> None:
        raise click.Abort

    def ended(status: int) -> None:
        raise SystemExit(status)

    monkeypatch.setattr(program.cli, "main", interrupted)
    monkeypatch.setattr(os, "_exit", ended)
    try:
        with pytest.raises(SystemExit) as caught:
            program.main()
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert caught.value.code == 128 + signal.SIGINT
    assert "interrupted" in capsys.readouterr().err


def test_json_keeps_letters_of_all_languages() -> None:
    @click.command()
    def command() -> None:
        emit_json({"text": "naïve 你好"})

    result = CliRunner().invoke(command)
    assert "naïve 你好" in result.stdout
    assert json.loads(result.stdout) == {"text": "naïve 你好"}
