"""What a folder or a file is: a checkpoint, an adapter or a bundle, and the facts about it.

Reads headers, names and shapes, and of weights only what a fact needs; nothing is written or printed. Needs neither
Paddle nor a runtime. Must not import workflows or the command line.
"""

from peft_deploy.inspection.adapter import AdapterInspection, TargetGroup, inspect_adapter
from peft_deploy.inspection.bundle import BundleFile, BundleInspection, inspect_bundle
from peft_deploy.inspection.checkpoint import CheckpointInspection, inspect_checkpoint
from peft_deploy.inspection.kinds import Kind, inspect, kind_of
from peft_deploy.inspection.prefix import PrefixInspection, inspect_prefix
from peft_deploy.inspection.tensors import FileSize, TensorTotals

__all__ = [
    "AdapterInspection",
    "BundleFile",
    "BundleInspection",
    "CheckpointInspection",
    "FileSize",
    "Kind",
    "PrefixInspection",
    "TargetGroup",
    "TensorTotals",
    "inspect",
    "inspect_adapter",
    "inspect_bundle",
    "inspect_checkpoint",
    "inspect_prefix",
    "kind_of",
]
