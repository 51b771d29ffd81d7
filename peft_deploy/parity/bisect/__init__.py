"""Where a bundle goes wrong: the first bad layer, module and operator.

Owns the search through a graph whose inner values are compared with what PaddleNLP's modules return. Needs an ONNX
bundle, ONNX Runtime and a reference with its modules; imports onnx-ir when it is used, and nothing below parity.
"""

from peft_deploy.parity.bisect.activation import Activation
from peft_deploy.parity.bisect.finding import Finding, Weight
from peft_deploy.parity.bisect.layered import LayeredReference, Stack
from peft_deploy.parity.bisect.places import Place
from peft_deploy.parity.bisect.reproduction import write_reproduction
from peft_deploy.parity.bisect.search import locate
from peft_deploy.parity.bisect.taps import Taps

__all__ = [
    "Activation",
    "Finding",
    "LayeredReference",
    "Place",
    "Stack",
    "Taps",
    "Weight",
    "locate",
    "write_reproduction",
]
