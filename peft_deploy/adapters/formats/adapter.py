"""An adapter read from disk, whatever its format was."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from peft_deploy.adapters.pissa import WithoutPrincipalPart
from peft_deploy.adapters.provenance import Provenance
from peft_deploy.config import LoRAConfig
from peft_deploy.errors import AdapterError
from peft_deploy.weights.lora import LoraPair
from peft_deploy.weights.merged import AdapterTensors, MergedTensors, adapter_fingerprint
from peft_deploy.weights.rounding import RoundingLoss
from peft_deploy.weights.source import Array, TensorSource


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter as arrays.

    Args:
        path: the folder that it was read from.
        config: its options.
        state: every tensor of its file, under the names of the file.
        pairs: module → A and B whose product, scaled, is the change of the module's weight as a
            matrix: [in, out] for linear layers, [rows, columns] for embeddings, [out, in · k · k]
            for convolutions.
        replacements: parameter → the tensor that takes its place (``trainable_modules``, trained
            biases).
        provenance: what the folder says about where it comes from, if anything.
    """

    path: Path
    config: LoRAConfig
    state: Mapping[str, Array]
    pairs: Mapping[str, LoraPair]
    replacements: Mapping[str, Array] = field(default_factory=dict)
    provenance: Provenance | None = None

    @cached_property
    def fingerprint(self) -> str:
        """The sha256 over the scaling and the names, types, shapes and values of all tensors."""
        return adapter_fingerprint(self.pairs, self.replacements)

    @property
    def dtype(self) -> str:
        """Element type of A and B."""
        return next(iter(self.pairs.values())).A.dtype.name if self.pairs else "float32"

    @property
    def tensors(self) -> AdapterTensors:
        """What the adapter adds to the base model's own weights, and what it replaces.

        Raises:
            AdapterError: with PiSSA, A · B is not to be added to the base's weights but to what is
                left of them without their principal part; :meth:`merge_into` does that.
        """
        if self.config.pissa:
            raise AdapterError(
                f"{self.path} is a PiSSA adapter: A · B cannot be added to "
                "the base model's weights as they are",
                hint="merge it with Adapter.merge_into",
            )
        return self._tensors()

    def merge_into(
        self,
        source: TensorSource,
        dtype: str | None = None,
        losses: MutableMapping[str, RoundingLoss] | None = None,
        *,
        sampled: bool = False,
    ) -> MergedTensors:
        """The base model's tensors with this adapter merged into them, computed as they are read.

        Args:
            source: the base model's, in PaddleNLP's names and layout, as they were before
                training.
            dtype: floating-point type of all results; each tensor keeps its own when None.
            losses: gets what rounding loses; see :class:`~peft_deploy.weights.MergedTensors`.
            sampled: likewise.

        Raises:
            AdapterError: the adapter does not fit the base model.
        """
        base = (
            WithoutPrincipalPart(source, set(self.pairs), self.config.r)
            if self.config.pissa
            else source
        )
        tied = getattr(source, "tied", {})
        return MergedTensors(
            base,
            self._tensors(),
            dtype,
            tied=tied,
            losses=losses,
            original=source,
            sampled=sampled,
        )

    def _tensors(self) -> AdapterTensors:
        return AdapterTensors(self.pairs, self.replacements, self.fingerprint, str(self.path))
