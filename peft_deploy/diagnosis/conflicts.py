"""Combinations of installed versions that are known not to work, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from peft_deploy.diagnosis.versions import fits

PYTHON = "python"  # stands among the packages for the interpreter


@dataclass(frozen=True)
class Conflict:
    """Versions that must not come together.

    Args:
        when: distribution → bounds; the conflict is there when all of them are installed within
            theirs. Empty bounds mean any version.
        problem: what goes wrong, one sentence.
        fix: what to do, one sentence or a command.
    """

    when: Mapping[str, str]
    problem: str
    fix: str

    def applies(self, installed: Mapping[str, str]) -> bool:
        """Whether these versions are installed together."""
        return all(
            name in installed and fits(installed[name], bounds)
            for name, bounds in self.when.items()
        )


_GPU_BUILD = (
    "pip uninstall paddlepaddle-gpu, then install the 3.3.1 GPU build from Paddle's own package "
    "index, which its installation page names"
)

CONFLICTS = (
    # https://github.com/PaddlePaddle/Paddle/issues/77757
    Conflict(
        {"paddlepaddle": "==3.3.0", "paddle2onnx": "==2.1.0"},
        "Paddle2ONNX 2.1.0 fails on the programs of Paddle 3.3.0: "
        "“0th elementwise MUST be ir::FloatAttribute”",
        "pip install 'paddlepaddle==3.3.1'",
    ),
    Conflict(
        {"paddlepaddle-gpu": "==3.3.0", "paddle2onnx": "==2.1.0"},
        "Paddle2ONNX 2.1.0 fails on the programs of Paddle 3.3.0: "
        "“0th elementwise MUST be ir::FloatAttribute”",
        _GPU_BUILD,
    ),
    # https://github.com/PaddlePaddle/Paddle2ONNX/pull/1579, and its own requirement since then
    Conflict(
        {"paddle2onnx": ">=2.0.1", "onnx": ">1.17.0"},
        "Paddle2ONNX 2 is made for onnx up to 1.17.0; with a newer one its models may get an IR "
        "version that the runtime does not know",
        "pip install 'onnx>=1.16.1,<=1.17.0'",
    ),
    # https://github.com/PaddlePaddle/Paddle2ONNX/issues/1597: the old line reads no .json program
    Conflict(
        {"paddle2onnx": "<2", "paddlepaddle": ">=3"},
        "Paddle2ONNX 1 cannot read the programs that Paddle 3 writes",
        "pip install 'paddle2onnx==2.1.0'",
    ),
    # paddle2onnx 2.1.0 raises ValueError on import below paddlepaddle 3.0.0.dev20250426
    Conflict(
        {"paddle2onnx": ">=2.1.0", "paddlepaddle": "<3"},
        "Paddle2ONNX 2.1 cannot be imported beside Paddle 2",
        "pip install 'paddlepaddle==3.3.1'",
    ),
    # Both distributions install the module onnxruntime, and the second overwrites the first.
    Conflict(
        {"onnxruntime": "", "onnxruntime-gpu": ""},
        "onnxruntime and onnxruntime-gpu install the same module and overwrite each other's files",
        "pip uninstall -y onnxruntime onnxruntime-gpu, then pip install 'peft-deploy[cpu]' or "
        "'peft-deploy[gpu]'",
    ),
    # Likewise the module paddle.
    Conflict(
        {"paddlepaddle": "", "paddlepaddle-gpu": ""},
        "paddlepaddle and paddlepaddle-gpu install the same module and overwrite each other's "
        "files",
        "pip uninstall -y paddlepaddle paddlepaddle-gpu, then install the one that is wanted",
    ),
    # The last GPU build on PyPI is a 2.6; later ones are published by Paddle itself.
    Conflict(
        {"paddlepaddle-gpu": "<3"},
        "PyPI's paddlepaddle-gpu ended with version 2; PaddleNLP 3 and Paddle2ONNX 2 need Paddle 3",
        _GPU_BUILD,
    ),
    # paddle2onnx publishes wheels for Python 3.8 to 3.12
    Conflict(
        {PYTHON: ">=3.13"},
        "there is no Paddle2ONNX for Python 3.13, so nothing can be exported with it",
        "use Python 3.10, 3.11 or 3.12",
    ),
    # Released after paddlenlp 3.0.0b4, which none of them lets be imported or run; the bounds are
    # those of the extra paddle in pyproject.toml, under which it was found to work.
    Conflict(
        {"paddlenlp": "==3.0.0b4", "numpy": ">=2"},
        "PaddleNLP 3.0.0b4 does not work with numpy 2",
        "pip install 'numpy>=1.26,<2'",
    ),
    Conflict(
        {"paddlenlp": "==3.0.0b4", "aistudio-sdk": ">=0.3"},
        "PaddleNLP 3.0.0b4 cannot be imported with aistudio-sdk 0.3",
        "pip install 'aistudio-sdk<0.3'",
    ),
    Conflict(
        {"paddlenlp": "==3.0.0b4", "datasets": ">=4"},
        "PaddleNLP 3.0.0b4 cannot be imported with datasets 4",
        "pip install 'datasets<4'",
    ),
    Conflict(
        {"paddlenlp": "==3.0.0b4", "pyarrow": ">=21"},
        "PaddleNLP 3.0.0b4 cannot be imported with pyarrow 21",
        "pip install 'pyarrow<21'",
    ),
    Conflict(
        {"paddlenlp": "==3.0.0b4", "pandas": ">=3"},
        "PaddleNLP 3.0.0b4 cannot be imported with pandas 3",
        "pip install 'pandas<3'",
    ),
    Conflict(
        {"paddlenlp": "==3.0.0b4", "scipy": ">=1.16"},
        "PaddleNLP 3.0.0b4 cannot be imported with scipy 1.16",
        "pip install 'scipy<1.16'",
    ),
    Conflict(
        {"paddlenlp": "==3.0.0b4", "setuptools": ">=81"},
        "PaddleNLP 3.0.0b4 cannot be imported with setuptools 81",
        "pip install 'setuptools<81'",
    ),
)


def find_conflicts(installed: Mapping[str, str], python: str) -> list[Conflict]:
    """The conflicts of :data:`CONFLICTS` that are there.

    Args:
        installed: distribution → version.
        python: the interpreter's version.
    """
    everything = {**installed, PYTHON: python}
    return [conflict for conflict in CONFLICTS if conflict.applies(everything)]
