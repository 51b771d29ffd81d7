"""From a model in the dynamic graph to a static program without weights, and what is known to fail in it.

:mod:`~peft_deploy.trace.program` needs Paddle; :mod:`~peft_deploy.trace.preflight` and
:mod:`~peft_deploy.trace.quirks`, which say what the converter will make of a program, do not.
Imports only the packages above it; knows nothing of ONNX.
"""

from peft_deploy.trace.preflight import Finding, OperatorUse, check_program

__all__ = ["Finding", "OperatorUse", "check_program"]
