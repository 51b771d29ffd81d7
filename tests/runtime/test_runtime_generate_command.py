from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from peft_deploy.cli.generate import generate_command
from peft_deploy.runtime import LoadedBundle, load_bundle

# Runs the real command line in a process in which nothing of Paddle can be imported.
WITHOUT_PADDLE = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("paddle", "paddlenlp", "paddle2onnx"):
            raise ImportError(f"{name} was asked for")

sys.meta_path.insert(0, Blocker())
from peft_deploy.cli import main
main()
"""


@pytest.fixture(scope="module")
def loaded(bundle: Path) -> LoadedBundle:
    return load_bundle(bundle)


def run(*arguments: object, stdin: str | None = None) -> Result:
    return CliRunner().invoke(generate_command, [str(a) for a in arguments], input=stdin)


def test_one_prompt_prints_its_text_and_its_figures_apart(
    bundle: Path, loaded: LoadedBundle
) -> None:
    result = run(bundle, "--prompt", "one two", "--max-new-tokens", 9)
    assert result.exit_code == 0, result.output
    expected = loaded.generate("one two", max_new_tokens=9)
    assert result.stdout == f"{expected.text}\n"
    assert "9 tokens at " in result.stderr
    assert "tok/s" in result.stderr


def test_several_prompts_are_printed_one_by_one(
    bundle: Path, loaded: LoadedBundle, tmp_path: Path
) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("über 😀\n\nthree four\r\n", "utf-8")
    result = run(
        bundle, "--prompt", "one", "--prompt-file", path, "--max-new-tokens", 5, "--threads", 1
    )
    assert result.exit_code == 0, result.output
    prompts = ["one", "über 😀", "three four"]
    texts = [r.text for r in loaded.generate(prompts, max_new_tokens=5)]
    parts = [
        f"[{i}/3] {p}\n{t}\n\n" for i, (p, t) in enumerate(zip(prompts, texts, strict=True), 1)
    ]
    assert result.stdout == "".join(parts)
    assert result.stderr.count("ended by length") == 3


def test_prompts_come_from_standard_input(bundle: Path, loaded: LoadedBundle) -> None:
    result = run(bundle, "--prompt-file", "-", "--max-new-tokens", 4, stdin="one two\n")
    assert result.stdout == f"{loaded.generate('one two', max_new_tokens=4).text}\n"


def test_json_is_all_that_is_on_stdout(bundle: Path, loaded: LoadedBundle) -> None:
    options = {"temperature": 0.9, "top_k": 20, "top_p": 0.95, "seed": 3, "max_new_tokens": 6}
    flags = [part for k, v in options.items() for part in (f"--{k.replace('_', '-')}", v)]
    chat = ["--chat", "--system", "Be brief."]
    result = run(bundle, "--prompt", "one", "--prompt", "two three", *chat, *flags, "--json")
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    data = json.loads(result.stdout)["results"]
    expected = loaded.generate(["one", "two three"], chat=True, system="Be brief.", **options)
    assert [entry["prompt"] for entry in data] == ["one", "two three"]
    assert [tuple(entry["token_ids"]) for entry in data] == [r.token_ids for r in expected]
    assert [entry["text"] for entry in data] == [r.text for r in expected]
    greedy = loaded.generate(["one", "two three"], chat=True, system="Be brief.", max_new_tokens=6)
    assert [r.token_ids for r in greedy] != [r.token_ids for r in expected]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "there is no prompt"),
        (["--prompt", "a", "--temperature", "-1"], 2, "temperature is -1.0"),
        (["--prompt", "a", "--max-new-tokens", "0"], 2, "max_new_tokens is 0"),
        (["--prompt", "a", "--system", "b"], 2, "add chat (--chat)"),
        (["--prompt", "a", "--provider", "tpu"], 2, "'tpu' is not one of"),
        (["--prompt", ""], 2, "row 0 of the batch has no tokens"),
    ],
)
def test_bad_options_end_with_their_exit_code(
    bundle: Path, arguments: list[str], code: int, message: str
) -> None:
    result = run(bundle, *arguments)
    assert result.exit_code == code
    assert message in result.stderr
    assert result.stdout == ""
    assert "Traceback" not in result.stderr


def test_a_folder_that_is_no_bundle_is_exit_code_6(tmp_path: Path) -> None:
    result = run(tmp_path, "--prompt", "a")
    assert result.exit_code == 6
    assert "is not a bundle" in result.stderr
    assert result.stdout == ""


def test_a_bundle_is_answered_with_paddle_made_unimportable(
    bundle: Path, loaded: LoadedBundle
) -> None:
    arguments = ["generate", str(bundle), "--prompt", "one two", "--max-new-tokens", "7", "--json"]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_PADDLE, *arguments],
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    (entry,) = json.loads(done.stdout)["results"]
    assert tuple(entry["token_ids"]) == loaded.generate("one two", max_new_tokens=7).token_ids


def test_the_blocker_of_the_test_above_does_block() -> None:
    code = WITHOUT_PADDLE.replace("main()", "import paddle")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "ImportError: paddle was asked for" in done.stderr
