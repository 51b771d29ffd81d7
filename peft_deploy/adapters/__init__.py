"""Adapters: LoRA in the dynamic graph, and the formats in which adapters lie on disk.

Owns ``lora/`` (layers and model, needs Paddle), ``formats/`` (readers and writers, numpy only),
the record of where an adapter comes from, and PiSSA's split of a weight. Importing this package,
or ``formats``, must not import Paddle; it must not import training, tracing or anything below.
"""

from peft_deploy.adapters.formats import Adapter, read_adapter, write_adapter
from peft_deploy.adapters.pissa import PrincipalSplit, principal_split
from peft_deploy.adapters.provenance import Provenance

__all__ = [
    "Adapter",
    "PrincipalSplit",
    "Provenance",
    "principal_split",
    "read_adapter",
    "write_adapter",
]
