"""PaddleNLP's prefix folders: ``prefix_config.json``, ``prefix_model_state.pdparams`` and
``pre_caches.npy``; and the keys and values that a prefix stands for, computed without Paddle.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from peft_deploy.adapters.formats.pre_caches import (
    PRE_CACHES_NAME,
    check_pre_caches,
    write_pre_caches,
)
from peft_deploy.adapters.formats.state_file import (
    find_state_file,
    read_state,
    with_variant,
    write_state,
)
from peft_deploy.adapters.provenance import Provenance
from peft_deploy.config import PREFIX_CONFIG_NAME, PrefixConfig
from peft_deploy.config.json_file import make_folder
from peft_deploy.errors import AdapterError, listed
from peft_deploy.signature import past_names
from peft_deploy.weights.merged import adapter_fingerprint
from peft_deploy.weights.source import DTYPES, Array

PREFIX_WEIGHTS_NAME = "prefix_model_state.pdparams"
# What readers have to look for, the reference's order first.
PREFIX_WEIGHT_FILES = (
    "peft_model.safetensors.index.json",
    "peft_model.safetensors",
    PREFIX_WEIGHTS_NAME,
)
_RANK_FILE = re.compile(r"prefix_model_state\.(?:\w+_)?(?:tp|pp)\d+.*\.pdparams")
# A prefix's columns mean something else on the ranks than they mean on a single card.
_RANKS_HINT = "train it again with tensor_parallel_degree 1"
EMBEDDING = "0.weight"
PROJECTION = ("1.weight", "1.bias", "3.weight", "3.bias")
_NEEDED = ("num_prefix_tokens", "num_hidden_layers", "num_attention_heads")


@dataclass(frozen=True)
class PrefixAdapter:
    """A prefix as arrays; its tensors fit its options and one another.

    Args:
        path: the folder that it was read from or goes to.
        config: its options, with all sizes.
        state: the encoder's tensors under the names of the file: an embedding [P, 2·L·K·D], or,
            with a projection, an embedding [P, K·D] and two linear layers [K·D, hidden] and
            [hidden, 2·L·K·D].
        provenance: what the folder says about where it comes from, if anything.

    Raises:
        AdapterError: missing, unexpected or mis-shaped tensors, or element types that differ.
    """

    path: Path
    config: PrefixConfig
    state: Mapping[str, Array]
    provenance: Provenance | None = None

    def __post_init__(self) -> None:
        absent = [name for name in _NEEDED if getattr(self.config, name) is None]
        if absent:
            raise AdapterError(f"{self.path}: {PREFIX_CONFIG_NAME} does not say {absent[0]}")
        if self.config.tensor_parallel_degree > 1:
            raise AdapterError(
                f"{self.path} was saved for tensor_parallel_degree "
                f"{self.config.tensor_parallel_degree}, where the prefix's columns have another "
                "meaning; it cannot be read yet"
            )
        _check_names(self.state, self.config, self.path)
        _check_shapes(self)

    @property
    def num_tokens(self) -> int:
        """P."""
        return self.config.num_prefix_tokens or 0

    @property
    def num_layers(self) -> int:
        """L."""
        return self.config.num_hidden_layers or 0

    @property
    def num_kv_heads(self) -> int:
        """K."""
        return self.config.num_kv_heads or 0

    @property
    def head_dim(self) -> int:
        """D; the options do not say it, the embedding's width does."""
        per_row = 1 if self.config.prefix_projection else 2 * self.num_layers
        return int(self.state[EMBEDDING].shape[1]) // (per_row * self.num_kv_heads)

    @property
    def dtype(self) -> str:
        """Element type of the tensors."""
        return self.state[EMBEDDING].dtype.name

    @cached_property
    def fingerprint(self) -> str:
        """The sha256 over the names, types, shapes and values of all tensors."""
        return adapter_fingerprint({}, self.state)

    def pre_caches(self) -> Array:
        """Keys and values of all layers, [L, 2, K, P, D], in the prefix's own element type.

        Without dropout; a projection is computed in float32 and rounded once.

        Raises:
            AdapterError: they are not all finite.
        """
        L, K, P, D = self.num_layers, self.num_kv_heads, self.num_tokens, self.head_dim
        wide = "float64" if self.dtype == "float64" else "float32"
        rows = self._projected_rows(wide) if self.config.prefix_projection else None
        caches = np.empty((L, 2, K, P, D), DTYPES[self.dtype])
        for half in range(2):
            for layer in range(L):
                # The keys of all layers come first, then the values of all layers.
                start = (half * L + layer) * K * D
                block = self._columns(rows, slice(start, start + K * D), wide)  # [P, K·D]
                caches[layer, half] = block.reshape(P, K, D).transpose(1, 0, 2)
        if not np.isfinite(caches).all():
            raise AdapterError(
                f"{self.path}: the prefix's keys and values are not all finite in {self.dtype}"
            )
        return caches

    def flattened(self) -> PrefixAdapter:
        """The same keys and values without the projection that they come from: what formats hold that know none.

        It computes the same and cannot be trained on as the projected one was; itself when it has no projection.
        """
        if not self.config.prefix_projection:
            return self
        rows = self.pre_caches().transpose(3, 1, 0, 2, 4)  # [P, 2, L, K, D]
        config = replace(self.config, prefix_projection=False, prefix_projection_hidden_size=None)
        state = {EMBEDDING: np.ascontiguousarray(rows.reshape(self.num_tokens, -1))}
        return replace(self, config=config, state=state)

    def past_key_values(self) -> list[tuple[Array, Array]]:
        """For each layer its key and value in the bundle's layout, [1, K, P, D]."""
        caches = self.pre_caches()
        return [(layer[0][None], layer[1][None]) for layer in caches]

    def named_past(self) -> dict[str, Array]:
        """:meth:`past_key_values` under the names of the exported graph's inputs."""
        flat = [array for pair in self.past_key_values() for array in pair]
        return dict(zip(past_names(self.num_layers), flat, strict=True))

    def _projected_rows(self, wide: str) -> Array:
        """What the last linear layer multiplies, [P, hidden]."""
        embedding, weight, bias = (
            self.state[name].astype(DTYPES[wide]) for name in (EMBEDDING, *PROJECTION[:2])
        )
        rows: Array = np.tanh(np.matmul(embedding, weight) + bias)
        return rows

    def _columns(self, rows: Array | None, columns: slice, wide: str) -> Array:
        if rows is None:
            return self.state[EMBEDDING][:, columns]
        weight, bias = (self.state[name] for name in PROJECTION[2:])
        product = np.matmul(rows, weight[:, columns].astype(DTYPES[wide]))
        result: Array = product + bias[columns].astype(DTYPES[wide])
        return result.astype(DTYPES[self.dtype])


def read_prefix(
    path: Path, config: PrefixConfig | None = None, variant: str | None = None
) -> PrefixAdapter:
    """Reads a prefix folder; every tensor is checked, and pre_caches.npy where it is there.

    Args:
        path: the folder.
        config: in place of the folder's ``prefix_config.json``.
        variant: what was given to ``save_pretrained``: it stands before the file's extension.

    Raises:
        AdapterError: no prefix there, files of another format or of single tensor-parallel ranks,
            a damaged file, missing, unexpected or mis-shaped tensors, NaN or infinity, or a
            pre_caches.npy that says something else than the weights.
        PrefixConfigError: a configuration that cannot be used.
    """
    path = Path(path)
    if not path.is_dir():
        kind = "is a file; the prefix's folder is needed" if path.exists() else "does not exist"
        raise AdapterError(f"the prefix {path} {kind}")
    if config is None:
        if not (path / PREFIX_CONFIG_NAME).is_file():
            raise AdapterError(
                f"{path} is not a prefix: it has no {PREFIX_CONFIG_NAME}",
                hint="give the folder that PrefixModelForCausalLM.save_pretrained wrote",
            )
        config = PrefixConfig.from_pretrained(path)
    names = [with_variant(name, variant) for name in PREFIX_WEIGHT_FILES]
    state = read_state(find_state_file(path, names, _RANK_FILE, _RANKS_HINT))
    prefix = PrefixAdapter(path, config, state, Provenance.load(path))
    caches = path / PRE_CACHES_NAME
    if variant is None and caches.is_file():
        check_pre_caches(caches, prefix.pre_caches(), config.prefix_dropout)
    return prefix


def write_prefix(prefix: PrefixAdapter, variant: str | None = None) -> Path:
    """Writes a prefix to its folder as the reference does; each file appears whole or not at all.

    Args:
        prefix: what to write; ``pre_caches.npy`` is computed from it.
        variant: stands before the extension of the weight file.

    Returns:
        The weight file.

    Raises:
        OutputError: something cannot be written.
        AdapterError: NaN or infinity in a tensor. Nothing has been written then.
    """
    broken = [name for name, array in prefix.state.items() if not np.isfinite(array).all()]
    if broken:
        raise AdapterError(
            f"the prefix is not saved: NaN or infinity in:\n{listed(broken)}",
            hint="the training may have diverged; use an earlier checkpoint",
        )
    caches = prefix.pre_caches()
    folder = make_folder(Path(prefix.path))
    target = folder / with_variant(PREFIX_WEIGHTS_NAME, variant)
    write_state(target, prefix.state)
    prefix.config.save_pretrained(folder)
    write_pre_caches(folder, caches)
    if prefix.provenance is not None:
        prefix.provenance.save(folder)
    return target


def _check_names(state: Mapping[str, Array], config: PrefixConfig, where: Path) -> None:
    wanted = (EMBEDDING, *PROJECTION) if config.prefix_projection else (EMBEDDING,)
    missing = [name for name in wanted if name not in state]
    unexpected = [name for name in state if name not in wanted]
    if missing or unexpected:
        raise AdapterError(
            f"{where} does not hold a prefix with prefix_projection {config.prefix_projection}"
            + (f"\nmissing:\n{listed(missing)}" if missing else "")
            + (f"\nunexpected:\n{listed(unexpected)}" if unexpected else ""),
            hint="the configuration and the weights come from different runs",
        )
    types = {array.dtype.name for array in state.values()}
    if len(types) > 1:
        raise AdapterError(f"{where} mixes the element types {', '.join(sorted(types))}")


def _check_shapes(prefix: PrefixAdapter) -> None:
    """Every shape follows from P, L, K, the embedding's width and the projection's."""
    state, config = prefix.state, prefix.config
    shapes = {name: tuple(int(n) for n in array.shape) for name, array in state.items()}
    P, L, K, D = prefix.num_tokens, prefix.num_layers, prefix.num_kv_heads, 0
    if len(shapes[EMBEDDING]) == 2:
        D = prefix.head_dim
    wanted: dict[str, tuple[int, ...]] = {EMBEDDING: (P, 2 * L * K * D)}
    if config.prefix_projection:
        hidden = config.prefix_projection_hidden_size or config.hidden_size or 0
        first, last = K * D, 2 * L * K * D
        shapes_in_order = ((P, first), (first, hidden), (hidden,), (hidden, last), (last,))
        wanted = dict(zip((EMBEDDING, *PROJECTION), shapes_in_order, strict=True))
    wrong = [
        f"{name}: {list(shapes[name])} in the file, {list(shape)} by its configuration"
        for name, shape in wanted.items()
        if shapes[name] != shape or not D
    ]
    if wrong:
        raise AdapterError(
            f"{prefix.path}: tensors of another shape than {PREFIX_CONFIG_NAME} says "
            f"({P} prefix tokens, {L} layers, {K} key and value heads):\n{listed(wrong)}",
            hint="the configuration and the weights come from different runs",
        )
