"""From an adapter in one format to the same adapter in another."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from peft_deploy.adapters import Adapter, write_adapter
from peft_deploy.adapters.formats.detect import AdapterFormat, Method, detect, read_lora
from peft_deploy.adapters.formats.onnx_adapter import onnx_tensors, slot_names
from peft_deploy.adapters.formats.onnx_file import (
    SUFFIX,
    UNKNOWN_BASE,
    model_version,
    read_onnx_file,
    write_onnx_adapter,
)
from peft_deploy.adapters.formats.peft_config import PEFT_CONFIG_NAME
from peft_deploy.adapters.formats.peft_prefix import read_peft_prefix, write_peft_prefix
from peft_deploy.adapters.formats.peft_writer import (
    huggingface_modules,
    refuse_unmergeable,
    write_peft,
)
from peft_deploy.adapters.formats.prefix import EMBEDDING, PrefixAdapter, read_prefix, write_prefix
from peft_deploy.adapters.formats.uniform import UniformLora, adapter_of_pairs, make_uniform
from peft_deploy.atomic_folder import AtomicFolder, FolderKind, check_output
from peft_deploy.bundle.slots import check_slots, fixed_ranks
from peft_deploy.config import LORA_CONFIG_NAME, PREFIX_CONFIG_NAME
from peft_deploy.config.json_file import make_folder
from peft_deploy.errors import AdapterError, CheckpointError, OutputError
from peft_deploy.signature import LORA_B
from peft_deploy.weights import Array, LoraPair, cast_array
from peft_deploy.workflows.adapter_target import AdapterTarget, find_target
from peft_deploy.workflows.convert_prefix import PREFIX_OUTPUTS, write_evaluated_prefix

ONNX_DTYPE = "float32"  # of the graphs that export writes
_MARKS = {
    (AdapterFormat.PADDLE, Method.LORA): LORA_CONFIG_NAME,
    (AdapterFormat.PADDLE, Method.PREFIX): PREFIX_CONFIG_NAME,
    (AdapterFormat.HF, Method.LORA): PEFT_CONFIG_NAME,
    (AdapterFormat.HF, Method.PREFIX): PEFT_CONFIG_NAME,
}


@dataclass(frozen=True)
class ConvertedAdapter:
    """What a conversion wrote.

    Args:
        output: the folder or the file.
        source: the adapter's folder or file.
        source_format: ``paddle``, ``hf`` or ``onnx``.
        format: likewise, of the output.
        method: ``lora`` or ``prefix``.
        dtype: element type of what was written.
        modules: how many modules LoRA changes.
        ranks: their different ranks in the output, ascending.
        replaced: how many parameters are replaced as a whole.
        padded: modules that got zeros, for a format or a graph with one rank for all.
        folded: modules whose scaling, or a part of it, is in B now.
        num_tokens: P of a prefix.
        model_version: what an .onnx_adapter file says of its base model.
    """

    output: Path
    source: Path
    source_format: str
    format: str
    method: str
    dtype: str
    modules: int = 0
    ranks: tuple[int, ...] = ()
    replaced: int = 0
    padded: tuple[str, ...] = ()
    folded: tuple[str, ...] = ()
    num_tokens: int | None = None
    model_version: int | None = None

    def __str__(self) -> str:
        """One line for a terminal."""
        if self.num_tokens is not None:
            return f"{self.output}: prefix of {self.num_tokens} tokens, {self.dtype}"
        ranks = f"rank{'s' if len(self.ranks) > 1 else ''} {', '.join(map(str, self.ranks))}"
        parts = [f"LoRA of {ranks} on {self.modules} modules, {self.dtype}"]
        if self.replaced:
            parts.append(f"{self.replaced} replaced tensors")
        if self.padded:
            parts.append(f"{len(self.padded)} padded with zeros to one rank")
        if self.folded:
            parts.append(f"{len(self.folded)} with scaling in B")
        return f"{self.output}: {'; '.join(parts)}"

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready form."""
        return {**asdict(self), "output": str(self.output), "source": str(self.source)}


def convert_adapter(
    source: str | Path,
    output: str | Path,
    *,
    to: str,
    base: str | Path | None = None,
    bundle: str | Path | None = None,
    dtype: str | None = None,
    force: bool = False,
) -> ConvertedAdapter:
    """Writes an adapter in another format; what was written is read back and compared before it is put in place.

    LoRA's products scaling · A · B stay what they are. Between PaddleNLP and PEFT no bit of A and B changes where
    the adapter has one rank and one scaling; see :mod:`peft_deploy.adapters.formats.uniform` for the rest.

    Args:
        source: the adapter; its format is read from its files.
        output: the new folder, or the file, which ends in ``.onnx_adapter``, or for a prefix in ``.safetensors``.
        to: ``paddle``, ``hf`` or ``onnx``.
        base: the base model's folder.
        bundle: a bundle of the base model; for ``onnx``, the adapter is fitted to the slots of its graph, also where
            it comes from such a file: graphs differ in which layers share an A, and in the rank of slots.
        dtype: of the tensors; as they are when None, for ``onnx`` that of the graph's slots or float32.
        force: replace what is there.

    Raises:
        AdapterError: it cannot be read, does not fit the base model, or cannot be represented in the format.
        ConfigError: neither ``base`` nor ``bundle``.
        OutputError: the output cannot be written; it is then as it was before, as after every error.

    Example:
        >>> from peft_deploy.workflows.convert_adapter import convert_adapter
        >>> convert_adapter("peft/", "paddle/", to="paddle", base="base/")  # doctest: +SKIP
    """
    source, output = Path(source).expanduser(), Path(output).expanduser()
    wanted = AdapterFormat(to)
    format, method = detect(source)
    fits = wanted is AdapterFormat.ONNX  # to one graph or another
    if format is wanted and not (fits and bundle is not None):
        hint = "--for BUNDLE fits it to the slots of that bundle's graph" if fits else None
        raise AdapterError(f"{source} is in the format {to} already", hint=hint)
    _check_output(source, output, wanted, method, force=force)
    target = find_target(base, bundle)
    result = ConvertedAdapter(output, source, format.value, to, method.value, "")
    if method is Method.PREFIX:
        if wanted is AdapterFormat.ONNX:
            return _prefix_to_onnx(result, target, dtype)
        return _convert_prefix(result, wanted, target, dtype, force=force)
    dims, names = target.dims, target.names
    adapter = read_lora(
        source, names, num_layers=dims.num_layers, tied=target.tied, model_config=target.config
    )
    refuse_unmergeable(adapter)
    target.check(adapter)
    if format is AdapterFormat.ONNX:
        _warn_of_base(source, target)
    if wanted is AdapterFormat.ONNX:
        return _to_onnx(result, adapter, target, dtype)
    adapter = adapter if dtype is None else _cast(adapter, dtype, dims.num_layers)
    return _to_folder(result, wanted, adapter, target, force=force)


def _to_folder(
    result: ConvertedAdapter,
    format: AdapterFormat,
    adapter: Adapter,
    target: AdapterTarget,
    *,
    force: bool,
) -> ConvertedAdapter:
    names, layers = target.names, target.dims.num_layers
    uniform: UniformLora | None = None
    with AtomicFolder(result.output, _kind(format, Method.LORA), force=force) as folder:
        if format is AdapterFormat.HF:
            expected = adapter.pairs
            task = target.family.peft_task(target.config)
            write_peft(folder.path, adapter, names, num_layers=layers, tied=target.tied, task=task)
        else:
            uniform = make_uniform(adapter.pairs)
            expected = uniform.pairs
            write_adapter(folder.path, adapter.config, adapter.state, adapter.provenance)
        written = read_lora(folder.path, names, num_layers=layers, tied=target.tied)
        _verify(written.pairs, expected, written.replacements, adapter.replacements)
        folder.commit()
    return replace(
        result,
        dtype=written.dtype,
        modules=len(expected),
        ranks=tuple(sorted({pair.rank for pair in expected.values()})),
        replaced=len(adapter.replacements),
        padded=uniform.padded if uniform else (),
        folded=uniform.folded if uniform else (),
    )


def _to_onnx(
    result: ConvertedAdapter, adapter: Adapter, target: AdapterTarget, dtype: str | None
) -> ConvertedAdapter:
    slots, names = target.slots, target.names
    types = {slot.dtype for name, slot in slots.items() if name.endswith(LORA_B)}
    dtype = dtype or (types.pop() if len(types) == 1 else ONNX_DTYPE)
    tensors = onnx_tensors(adapter, names, dtype, fixed_ranks(slots), slots)
    if target.bundle is not None:
        check_slots(slots, tensors, target.bundle)
    version = model_version(target.fingerprint())
    output = result.output
    make_folder(output.parent)
    temporary = output.with_name(f".{output.name}.{os.getpid()}.unchecked")
    try:
        write_onnx_adapter(temporary, tensors, version)
        written = read_onnx_file(temporary)
        same = written.model_version == version and _equal(written.tensors, tensors)
        if not same:
            raise CheckpointError(f"what was written to {output} does not read back the same")
        temporary.replace(output)
    except OSError as exc:
        raise OutputError(f"{output} cannot be written: {exc.strerror or exc}") from exc
    finally:
        temporary.unlink(missing_ok=True)
    widths = {
        module: tensors[slot_names(name)[1]].shape[0]
        for module, (name, _) in huggingface_modules(adapter, names).items()
    }
    return replace(
        result,
        dtype=dtype,
        modules=len(adapter.pairs),
        ranks=tuple(sorted(set(widths.values()))),
        padded=tuple(m for m, pair in adapter.pairs.items() if pair.rank < widths[m]),
        folded=tuple(m for m, pair in adapter.pairs.items() if pair.scaling != 1),
        model_version=version,
    )


def _convert_prefix(
    result: ConvertedAdapter,
    format: AdapterFormat,
    target: AdapterTarget,
    dtype: str | None,
    *,
    force: bool,
) -> ConvertedAdapter:
    source = AdapterFormat(result.source_format)
    prefix = _read_prefix(result.source, source, target)
    target.check_prefix(prefix)
    if dtype is not None:
        state = {n: cast_array(a, dtype, name=n) for n, a in prefix.state.items()}
        prefix = replace(prefix, state=state, config=replace(prefix.config, dtype=dtype))
    if format is AdapterFormat.HF:
        prefix = prefix.flattened()  # PEFT's files have no room for a projection
    with AtomicFolder(result.output, _kind(format, Method.PREFIX), force=force) as folder:
        if format is AdapterFormat.HF:
            write_peft_prefix(folder.path, prefix)
        else:
            write_prefix(replace(prefix, path=folder.path))
        written = _read_prefix(folder.path, format, target)
        if not _equal({EMBEDDING: written.state[EMBEDDING]}, {EMBEDDING: prefix.state[EMBEDDING]}):
            raise CheckpointError(
                f"what was written to {result.output} does not read back the same"
            )
        folder.commit()
    _warn_of_positions(prefix)
    return replace(result, dtype=prefix.dtype, num_tokens=prefix.num_tokens)


def _prefix_to_onnx(
    result: ConvertedAdapter, target: AdapterTarget, dtype: str | None
) -> ConvertedAdapter:
    if dtype not in (None, ONNX_DTYPE):
        raise AdapterError(f"the graph takes prefixes of {ONNX_DTYPE}, not {dtype}")
    source = AdapterFormat(result.source_format)
    adapter = _read_prefix(result.source, source, target)
    target.check_prefix(adapter)
    prefix = write_evaluated_prefix(result.output, adapter, source, target)
    return replace(
        result,
        dtype=ONNX_DTYPE,
        num_tokens=prefix.num_tokens,
        model_version=model_version(target.fingerprint()),
    )


def _read_prefix(path: Path, format: AdapterFormat, target: AdapterTarget) -> PrefixAdapter:
    return read_peft_prefix(path, target.dims) if format is AdapterFormat.HF else read_prefix(path)


def _warn_of_base(source: Path, target: AdapterTarget) -> None:
    found, own = read_onnx_file(source).model_version, model_version(target.fingerprint())
    if found not in (
        *UNKNOWN_BASE,
        own,
    ):  # the same weights in another element type have another, too
        warnings.warn(
            f"{source} was written for a base model with the model_version {found}; that of {target.path} is {own}",
            stacklevel=3,
        )


def _warn_of_positions(prefix: PrefixAdapter) -> None:
    """The tensors are the same, the libraries are not: see the texts of both about positions."""
    P = prefix.num_tokens
    warnings.warn(
        f"PEFT counts the positions of a text's tokens from {P}, the prefix's length, PaddleNLP from 0. The prefix "
        f"computes what it was trained for where position_ids are those of the library that trained it",
        stacklevel=4,
    )


def _cast(adapter: Adapter, dtype: str, num_layers: int) -> Adapter:
    try:
        pairs = {
            m: LoraPair(
                cast_array(p.A, dtype, name=f"{m}.lora_A"),
                cast_array(p.B, dtype, name=f"{m}.lora_B"),
                p.scaling,
            )
            for m, p in adapter.pairs.items()
        }
        replaced = {n: cast_array(a, dtype, name=n) for n, a in adapter.replacements.items()}
    except CheckpointError as exc:
        raise AdapterError(f"{adapter.path}: {exc.message}", hint=exc.hint) from exc
    return adapter_of_pairs(
        adapter.path,
        pairs,
        replaced,
        num_layers=num_layers,
        declared=adapter.config,
        provenance=adapter.provenance,
    )


def _verify(
    written: Mapping[str, LoraPair],
    pairs: Mapping[str, LoraPair],
    replaced: Mapping[str, Array],
    replacements: Mapping[str, Array],
) -> None:
    same = written.keys() == pairs.keys() and all(
        _equal({"A": w.A, "B": w.B}, {"A": p.A, "B": p.B})
        and abs(w.scaling - p.scaling) <= 4 * np.finfo(np.float64).eps * abs(p.scaling)
        for w, p in ((written[m], pairs[m]) for m in pairs)
    )
    if not same or not _equal(replaced, replacements):
        raise CheckpointError(
            "what was written does not read back the same; nothing was put in place"
        )


def _equal(first: Mapping[str, Array], second: Mapping[str, Array]) -> bool:
    return first.keys() == second.keys() and all(
        a.dtype == second[n].dtype and np.array_equal(a, second[n]) for n, a in first.items()
    )


def _kind(format: AdapterFormat, method: Method) -> FolderKind:
    return FolderKind("adapter", _MARKS[format, method])


def _check_output(
    source: Path, output: Path, format: AdapterFormat, method: Method, *, force: bool
) -> None:
    target = output.resolve()
    if target == source.resolve() or target in source.resolve().parents:
        raise OutputError(f"{output} would replace {source}, which is to be read")
    if format is not AdapterFormat.ONNX:
        check_output(output, _kind(format, method), force=force)
        return
    endings = PREFIX_OUTPUTS if method is Method.PREFIX else (SUFFIX,)
    if output.suffix not in endings:
        raise OutputError(
            f"{output} has to end in {' or '.join(endings)}",
            hint=f"{output.name}{endings[0]}, for instance",
        )
    if output.is_dir() or (output.exists() and not force):
        raise OutputError(f"{output} exists already", hint="name another file, or give --force")
