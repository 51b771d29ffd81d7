"""Whole jobs, which the command line and the Python API both call.

Owns the order in which the packages above are put to work, and nothing else. Paddle is needed only by what a
job needs it for: validating in the dynamic graph.
"""

from peft_deploy.workflows.export import ExportResult, export
from peft_deploy.workflows.merge import MergeResult, merge
from peft_deploy.workflows.shards import MergedShards, merge_adapter_shards
from peft_deploy.workflows.validate import validate

__all__ = [
    "ExportResult",
    "MergeResult",
    "MergedShards",
    "export",
    "merge",
    "merge_adapter_shards",
    "validate",
]
