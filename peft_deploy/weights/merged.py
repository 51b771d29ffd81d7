"""A base model's tensors with an adapter merged into them, one at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import numpy.typing as npt

from peft_deploy.errors import AdapterError
from peft_deploy.weights.cast import cast_array, cast_pieces, check_float
from peft_deploy.weights.large_file import is_large
from peft_deploy.weights.leases import Leases
from peft_deploy.weights.lora import LoraPair, merge_weight, merged_pieces, require_finite
from peft_deploy.weights.pieces import Task, along, pieces_of_array
from peft_deploy.weights.rounding import NARROW, RoundingLoss, sampled
from peft_deploy.weights.source import FLOATING, Array, TensorInfo, TensorSource

NAMED_MISFITS = 3


@dataclass(frozen=True)
class AdapterTensors:
    """What an adapter does to a base model's parameters, in PaddleNLP's names and layout.

    Args:
        pairs: module → the change of ``module.weight``.
        replacements: parameter → the value that takes the base's place (trained biases, whole
        layers). fingerprint: sha256 of all of it; computed when not given.
        origin: what to call the adapter in errors, such as its path.
    """

    pairs: Mapping[str, LoraPair]
    replacements: Mapping[str, Array]
    fingerprint: str = field(default="")
    origin: str = "the adapter"

    def __post_init__(self) -> None:
        if not self.fingerprint:
            object.__setattr__(
                self, "fingerprint", adapter_fingerprint(self.pairs, self.replacements)
            )


def adapter_fingerprint(pairs: Mapping[str, LoraPair], replacements: Mapping[str, Array]) -> str:
    """The sha256 over all names, types, shapes, values and scalings; 64 hexadecimal digits."""
    digest = hashlib.sha256()

    def add(name: str, array: Array) -> None:
        digest.update(f"{name} {array.dtype.name} {list(array.shape)}\n".encode())
        digest.update(np.ascontiguousarray(array).tobytes())

    for module in sorted(pairs):
        pair = pairs[module]
        digest.update(f"{module} {float(pair.scaling).hex()}\n".encode())
        add("A", pair.A)
        add("B", pair.B)
    for name in sorted(replacements):
        add(name, replacements[name])
    return digest.hexdigest()


class MergedTensors:
    """A :class:`~peft_deploy.weights.source.TensorSource` of merged parameters.

    Everything about the adapter is checked when this is made, before any of the base's data is
    read. A parameter with both a replacement and a pair gets the pair's change on top of the
    replacement, as in the model that was trained.

    Args:
        source: the base model in PaddleNLP's names and layout.
        adapter: what to merge.
        dtype: floating-point type of all results; each tensor keeps its own when None.
        tied: parameter → the one whose storage it shares; the source's own ``tied`` when None.
        losses: gets, for every changed parameter that is read in float16 or bfloat16, what rounding
            lost of the change, on a sample.
        original: for ``losses``, the model that training began with, where ``source`` is not it.
        sampled: count in ``losses`` what rounding to float32 loses, too.

    Raises:
        AdapterError: the adapter does not fit the source, or holds a NaN or an infinity.
    """

    def __init__(
        self,
        source: TensorSource,
        adapter: AdapterTensors,
        dtype: str | None = None,
        *,
        tied: Mapping[str, str] | None = None,
        losses: MutableMapping[str, RoundingLoss] | None = None,
        original: TensorSource | None = None,
        sampled: bool = False,
    ) -> None:
        self._source = source
        self._losses = losses
        self._sampled = sampled
        self._original = source if original is None else original
        self._dtype = None if dtype is None else check_float(dtype)
        self.tied: Mapping[str, str] = getattr(source, "tied", {}) if tied is None else tied
        self._names = list(source.names())
        large = is_large(sum(source.info(name).nbytes for name in self._names))
        self._leases = Leases() if large else None
        self._pairs = {f"{module}.weight": pair for module, pair in adapter.pairs.items()}
        self._check_tied_pairs(adapter)
        self._replacements = self._untie(adapter)
        self._check_fit(adapter)
        for name, pair in self._pairs.items():
            require_finite(pair.A, f"{adapter.origin}: A of {name}")
            require_finite(pair.B, f"{adapter.origin}: B of {name}")
        for name, value in self._replacements.items():
            require_finite(value, f"{adapter.origin}: {name}")

    def names(self) -> Sequence[str]:
        """The source's names."""
        return self._names

    def info(self, name: str) -> TensorInfo:
        """Type after merging, and shape."""
        info = self._source.info(name)
        return TensorInfo(name, self._target(info), info.shape)

    def read(self, name: str) -> Array:
        """One parameter, merged and converted with a single rounding.

        Raises:
            AdapterError: the result is not finite.
            CheckpointError: a value is too large for the type.
        """
        value, pair, target = self._opened(name)
        self._note_loss(name, value, pair, target)
        if pair is not None:
            return merge_weight(value, pair, name=name, dtype=target)
        return cast_array(value, target, name=name) if target in FLOATING else value

    def pieces(self, name: str, axis: int = 0, height: int | None = None) -> Iterator[Task[Array]]:
        """One parameter in pieces; errors as in :meth:`read`.

        Rows are bit for bit those of :meth:`read`; in columns, sums of an adapter may differ in their last bits.
        """
        value, pair, target = self._opened(name)
        # Only what is merged: other pieces may be views of the tensor itself.
        lease = self._leases.load(value) if self._leases is not None and pair is not None else None
        value = value if lease is None else lease.array
        self._note_loss(name, value, pair, target)
        if pair is not None:
            pair = pair if axis == 0 else pair.transposed()
            merge = partial(merged_pieces, pair=pair, name=name, dtype=target, height=height)
            tasks = along(axis, merge, value)
            return tasks if lease is None else lease.over(tasks)
        if target in FLOATING:
            cast = partial(cast_pieces, dtype=target, name=name, height=height)
            return along(axis, cast, value)
        return along(axis, partial(pieces_of_array, height=height), value)

    def _opened(self, name: str) -> tuple[Array, LoraPair | None, str]:
        """What a parameter is made of, and the type that it gets."""
        replacement = self._replacements.get(name)
        value = self._source.read(name) if replacement is None else replacement
        return value, self._pairs.get(name), self._target(self._source.info(name))

    def _note_loss(self, name: str, value: Array, pair: LoraPair | None, target: str) -> None:
        changed = pair is not None or name in self._replacements
        if self._losses is not None and changed and self._counts(target, pair):
            self._losses[name] = self._loss(name, value, pair, target)

    def _counts(self, target: str, pair: LoraPair | None) -> bool:
        return target in NARROW or (self._sampled and target == "float32" and pair is not None)

    def _loss(self, name: str, value: Array, pair: LoraPair | None, target: str) -> RoundingLoss:
        """What rounding loses of a change, on a sample, against the same sum in float64."""
        sample = sampled(value.shape)
        same = self._original is self._source and name not in self._replacements
        before = np.atleast_1d(value if same else self._original.read(name))[sample]
        value = np.atleast_1d(value)[sample]
        exact: npt.NDArray[np.float64] = value.astype(np.float64)
        if pair is None:
            rounded = cast_array(value, target, name=name)
        else:
            rows, columns = sample
            A, B = pair.A[rows], pair.B[:, columns]
            exact = exact + pair.scaling * (A.astype(np.float64) @ B.astype(np.float64))
            rounded = merge_weight(value, LoraPair(A, B, pair.scaling), name=name, dtype=target)
        loss = RoundingLoss()
        loss.add(before, exact, rounded)
        return loss

    def _target(self, info: TensorInfo) -> str:
        return self._dtype if self._dtype and info.dtype in FLOATING else info.dtype

    def _check_tied_pairs(self, adapter: AdapterTensors) -> None:
        """A pair changes one use of a shared matrix; merged, it would change the other too."""
        shared = {**self.tied, **{target: name for name, target in self.tied.items()}}
        for name in self._pairs:
            if name in shared:
                raise AdapterError(
                    f"{adapter.origin} changes {name}, which shares its storage with "
                    f"{shared[name]}; merging would change both",
                    hint="untie the two (tie_word_embeddings false, both stored) before merging",
                )

    def _untie(self, adapter: AdapterTensors) -> dict[str, Array]:
        """The replacements, those of tied parameters moved to the parameter that is stored."""
        result = dict(adapter.replacements)
        for name, target in self.tied.items():
            value = result.pop(name, None)
            if value is None:
                continue
            if target in result and not np.array_equal(result[target], value):
                raise AdapterError(
                    f"{adapter.origin} holds different values for {name} and {target}, "
                    "which share one storage"
                )
            result[target] = value
        return result

    def _check_fit(self, adapter: AdapterTensors) -> None:
        known = set(self._names)
        misfits: list[str] = []
        for name, pair in self._pairs.items():
            misfits += self._misfit(known, name, pair.shape, "A · B")
        for name, value in self._replacements.items():
            misfits += self._misfit(known, name, value.shape, "the replacement")
        if misfits:
            more = len(misfits) - NAMED_MISFITS
            lines = misfits[:NAMED_MISFITS] + ([f"… and {more} more"] if more > 0 else [])
            raise AdapterError(
                f"{adapter.origin} does not fit the base model:\n"
                + "\n".join(f"  {line}" for line in lines),
                hint="was it trained on another model?",
            )

    def _misfit(self, known: set[str], name: str, shape: tuple[int, ...], what: str) -> list[str]:
        if name not in known:
            return [f"{name}: the base model has no such parameter"]
        info = self._source.info(name)
        if info.shape != shape:
            return [f"{name}: {what} is {list(shape)}, the base model's is {list(info.shape)}"]
        if info.dtype not in FLOATING:
            return [f"{name}: the base model's is {info.dtype}, not floating-point"]
        return []
