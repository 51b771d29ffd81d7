"""From a model's configuration to an ONNX graph, and its weights.

:mod:`~peft_deploy.convert.process` runs tracing and Paddle2ONNX in a child process, :mod:`~peft_deploy.convert.worker`
is what runs there; the graph that comes back has no weights. :mod:`~peft_deploy.convert.passes` cleans it up,
:mod:`~peft_deploy.convert.weight_file` streams the weights to disk meanwhile, :mod:`~peft_deploy.convert.bind` joins
the two, :mod:`~peft_deploy.convert.postflight` checks the result. :mod:`~peft_deploy.convert.paddle_static` writes the
traced program itself instead of a graph. Imports only the packages above it; without Paddle
except in the child.

Everything is imported when it is first used: the child must not wait for onnx-ir, nor the parent before it has
started the child.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from peft_deploy.lazy import lazy_names

if TYPE_CHECKING:
    from peft_deploy.convert.bind import bind_weights
    from peft_deploy.convert.graph import ConvertedGraph
    from peft_deploy.convert.paddle_static import ParamsFile, StaticProgram, write_program
    from peft_deploy.convert.passes import run_pipeline
    from peft_deploy.convert.postflight import check_graph
    from peft_deploy.convert.process import ConversionJob
    from peft_deploy.convert.weight_file import WeightFile, stream_weights

__all__ = [
    "ConversionJob",
    "ConvertedGraph",
    "ParamsFile",
    "StaticProgram",
    "WeightFile",
    "bind_weights",
    "check_graph",
    "run_pipeline",
    "stream_weights",
    "write_program",
]

_HOME = {
    "ConversionJob": ".process",
    "ConvertedGraph": ".graph",
    "ParamsFile": ".paddle_static",
    "StaticProgram": ".paddle_static",
    "WeightFile": ".weight_file",
    "bind_weights": ".bind",
    "check_graph": ".postflight",
    "run_pipeline": ".passes",
    "stream_weights": ".weight_file",
    "write_program": ".paddle_static",
}


__getattr__ = lazy_names(__name__, _HOME)
