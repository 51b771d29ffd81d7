"""The way back from PaddleNLP's names and layout to a Hugging Face checkpoint's."""

from __future__ import annotations

from collections.abc import Sequence

from peft_deploy.errors import CheckpointError, listed
from peft_deploy.families.names import MappedName, NameMap
from peft_deploy.weights.source import Array, TensorInfo, TensorSource


class HuggingFaceTensors:
    """A source in PaddleNLP's terms, seen in Hugging Face's: torch keeps linear weights [out, in].

    Args:
        source: the tensors, in PaddleNLP's names and layout.
        name_map: the family's names.

    Raises:
        CheckpointError: tensors that have no name in Hugging Face's scheme.
    """

    def __init__(self, source: TensorSource, name_map: NameMap) -> None:
        self._source = source
        self._origins: dict[str, MappedName] = {}
        unknown = []
        for name in source.names():
            mapped = name_map.to_huggingface(name)
            if mapped is None or mapped.paddle_only:
                unknown.append(name)
            else:
                self._origins[mapped.name] = MappedName(name, mapped.transpose)
        if unknown:
            raise CheckpointError(
                f"tensors that have no place in Hugging Face's layout:\n{listed(unknown)}",
                hint="Hugging Face's models keep the parts of a fused weight apart",
            )

    def names(self) -> Sequence[str]:
        """Hugging Face's names, in the order of the source."""
        return list(self._origins)

    def info(self, name: str) -> TensorInfo:
        """Type and shape in Hugging Face's layout; KeyError for an unknown name."""
        origin = self._origins[name]
        info = self._source.info(origin.name)
        return TensorInfo(name, info.dtype, info.shape[::-1] if origin.transpose else info.shape)

    def read(self, name: str) -> Array:
        """One tensor; a transposed view where the layouts differ."""
        origin = self._origins[name]
        data = self._source.read(origin.name)
        return data.T if origin.transpose else data
