"""From a static program to an ONNX model, and its weights.

:mod:`~peft_deploy.convert.process` runs tracing and Paddle2ONNX in a child process, :mod:`~peft_deploy.convert.worker`
is what runs there; the graph that comes back has no weights. :mod:`~peft_deploy.convert.bind` gives its dangling
inputs their names and lazily read tensors, :mod:`~peft_deploy.convert.passes` cleans it up,
:mod:`~peft_deploy.convert.postflight` checks it, :mod:`~peft_deploy.convert.write` streams it to disk.
Imports only the packages above it; without Paddle except in the child.
"""

from peft_deploy.convert.bind import bind_weights
from peft_deploy.convert.graph import ConvertedGraph
from peft_deploy.convert.passes import run_pipeline
from peft_deploy.convert.postflight import check_graph
from peft_deploy.convert.process import ConversionJob
from peft_deploy.convert.write import write_model

__all__ = [
    "ConversionJob",
    "ConvertedGraph",
    "bind_weights",
    "check_graph",
    "run_pipeline",
    "write_model",
]
