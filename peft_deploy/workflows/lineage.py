"""Whether an adapter belongs to the base model that it is to be applied to."""

from __future__ import annotations

import warnings

from peft_deploy.adapters.formats import Adapter
from peft_deploy.adapters.merge_record import MergeRecord
from peft_deploy.base import BaseModel
from peft_deploy.weights import Array


def check_lineage(base: BaseModel, adapter: Adapter) -> None:
    """Refuses a base model that holds the adapter already; warns about one that it was not trained on.

    What is known: the record that a merge leaves in the checkpoint, and, in the adapter, the
    fingerprint and some values of the weights that it was trained on. Adapters that
    ``paddlenlp.peft`` wrote bring neither of the latter.

    Raises:
        AdapterError: the adapter was merged into the base model before.
        CheckpointError: the record of a merge cannot be read.
    """
    record = MergeRecord.load(base.path)
    if record is not None:
        record.check_absent(adapter.fingerprint, base=str(base.path), adapter=str(adapter.path))
    provenance = adapter.provenance
    if provenance is None or provenance.base_fingerprint == base.fingerprint:
        return
    names = set(base.tensors.names())

    def weight(module: str) -> Array | None:
        name, pair = f"{module}.weight", adapter.pairs.get(module)
        if pair is None or name not in names or name in adapter.replacements:
            return None
        # one that does not fit is reported with both shapes when it is to be merged
        return base.tensors.read(name) if base.tensors.info(name).shape == pair.shape else None

    provenance.check_base(adapter.pairs, weight)
    types = {sample.dtype for sample in provenance.base_weights.values()}
    if provenance.base_fingerprint and types <= _types(base):
        # in another floating-point type, the same weights have another fingerprint
        warnings.warn(
            f"{base.path} is not the base model that the adapter {adapter.path} was trained on: its "
            f"fingerprint is {base.fingerprint[:12]}, the adapter's base had "
            f"{provenance.base_fingerprint[:12]}",
            stacklevel=3,
        )


def _types(base: BaseModel) -> set[str]:
    return {base.tensors.info(name).dtype for name in base.tensors.names()}
