"""Writes safetensors files tensor by tensor, which the safetensors library itself cannot do."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np

from peft_deploy.errors import CheckpointError, OutputError
from peft_deploy.weights.blocks import contiguous_blocks
from peft_deploy.weights.checkpoint import INDEX_SUFFIX
from peft_deploy.weights.large_file import open_output
from peft_deploy.weights.safetensors_file import DTYPE_OF_CODE, LENGTH_BYTES
from peft_deploy.weights.source import DTYPES, TensorInfo, TensorSource

CODE_OF_DTYPE = {dtype: code for code, dtype in DTYPE_OF_CODE.items()}
# The library writes wide types first, so that every tensor is aligned; in this order, then by
# name.
WRITTEN_FIRST = ("I64", "F64", "F32", "I32", "BF16", "F16", "I16", "I8", "U8", "BOOL")
ALIGNMENT = 8


def write_safetensors(
    path: Path,
    source: TensorSource,
    metadata: Mapping[str, str] | None = None,
    max_shard_bytes: int | None = None,
) -> tuple[Path, ...]:
    """Writes all tensors of a source, holding one of them at a time.

    Args:
        path: the file, ending in ``.safetensors``. When several shards are needed, they are called
            ``<stem>-00001-of-00003.safetensors``, and ``path`` itself is not written but
            ``<path>.index.json``.
        source: the tensors.
        metadata: text for the header; readers of torch files want ``{"format": "pt"}``.
        max_shard_bytes: bytes of data in one file; a larger tensor gets a file of its own. No
            limit when None.

    Returns:
        The files written, the index last. They get their names once all of them are complete.

    Raises:
        OutputError: the folder cannot be written to, or is full.
    """
    infos = [source.info(name) for name in source.names()]
    shards = _split(infos, max_shard_bytes)
    if len(shards) == 1:
        paths = [path]
    else:
        paths = [
            path.with_name(f"{path.stem}-{i:05}-of-{len(shards):05}{path.suffix}")
            for i in range(1, len(shards) + 1)
        ]
    total = sum(info.nbytes for info in infos)  # of all files: a cache would have to hold them all
    with ExitStack() as stack:
        finished: list[tuple[Path, Path]] = []
        for target, shard in zip(paths, shards, strict=True):
            temporary = stack.enter_context(_temporary(target))
            with _clear_errors(target), open_output(temporary, total) as file:
                _write_file(file, source, shard, dict(metadata or {}))
            finished.append((temporary, target))
        if len(shards) > 1:
            target = path.with_name(path.name + INDEX_SUFFIX)
            temporary = stack.enter_context(_temporary(target))
            with _clear_errors(target):
                temporary.write_text(_index(paths, shards), "utf-8")
            finished.append((temporary, target))
        for temporary, target in finished:
            with _clear_errors(target):
                temporary.replace(target)
    return tuple(target for _, target in finished)


def _split(infos: Sequence[TensorInfo], limit: int | None) -> list[list[TensorInfo]]:
    shards: list[list[TensorInfo]] = [[]]
    size = 0
    for info in infos:
        if limit is not None and shards[-1] and size + info.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(info)
        size += info.nbytes
    return shards


def _write_file(
    file: IO[bytes], source: TensorSource, infos: Sequence[TensorInfo], metadata: dict[str, str]
) -> None:
    ordered = sorted(infos, key=lambda i: (WRITTEN_FIRST.index(CODE_OF_DTYPE[i.dtype]), i.name))
    header = _header(ordered, metadata)
    file.write(len(header).to_bytes(LENGTH_BYTES, "little"))
    file.write(header)
    for info in ordered:
        data = source.read(info.name)
        if data.shape != info.shape or data.dtype != DTYPES[info.dtype]:
            raise CheckpointError(
                f"{info.name} was announced as {info.dtype} {list(info.shape)}, "
                f"but read as {data.dtype.name} {list(data.shape)}"
            )
        for block in contiguous_blocks(data):
            file.write(block.reshape(-1).view(np.uint8).data)


def _header(ordered: Sequence[TensorInfo], metadata: dict[str, str]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    position = 0
    for info in ordered:
        end = position + info.nbytes
        entries[info.name] = {
            "dtype": CODE_OF_DTYPE[info.dtype],
            "shape": list(info.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    return text + b" " * (-len(text) % ALIGNMENT)


def _index(paths: Sequence[Path], shards: Sequence[Sequence[TensorInfo]]) -> str:
    weight_map = {
        info.name: path.name for path, shard in zip(paths, shards, strict=True) for info in shard
    }
    total = sum(info.nbytes for shard in shards for info in shard)
    content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


@contextmanager
def _temporary(target: Path) -> Iterator[Path]:
    """A name beside the target; whatever is still there at the end is removed."""
    path = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


@contextmanager
def _clear_errors(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        full = exc.errno in (errno.ENOSPC, errno.EDQUOT)
        raise OutputError(
            f"{target} cannot be written: {exc.strerror or exc}",
            hint="free some space or choose another disk" if full else None,
        ) from exc
