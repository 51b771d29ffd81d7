"""What a speed measurement compares: every bundle, without and with each of its adapters."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from peft_deploy.bundle import Manifest
from peft_deploy.config.bench import BenchOptions
from peft_deploy.config.export import PADDLE
from peft_deploy.errors import ConfigError
from peft_deploy.progress import Progress
from peft_deploy.runtime import CachingRunner, Runner
from peft_deploy.runtime.opening import open_runner
from peft_deploy.runtime.session import Session

RUNTIME = "runtime"  # the mode of an adapter that a graph has slots for


@dataclass(frozen=True)
class Lane:
    """One thing that is measured.

    Args:
        name: the bundle's folder name, with ``+ ADAPTER`` when one is active.
        folder: the bundle.
        adapter: the one that is active.
        runner: computes the steps.
        load_seconds: opening the bundle.
        disk: size of the bundle's files, in bytes.
    """

    name: str
    folder: Path
    adapter: str | None
    runner: Runner | CachingRunner
    load_seconds: float
    disk: int


def open_lanes(
    bundles: Sequence[Path], options: BenchOptions, progress: Progress
) -> Iterator[Lane]:
    """Opens the bundles, each once.

    Raises:
        ConfigError: a bundle that does not generate, or an adapter of ``options`` that none has.
        BundleError, ExecutionError: a bundle cannot be opened.
    """
    manifests = [Manifest.read(folder) for folder in bundles]
    own = [_adapters(manifest, options) for manifest in manifests]
    if missing := set(options.adapters) - {name for names in own for name in names}:
        raise ConfigError(
            f"no bundle has the adapter {', '.join(sorted(missing))} to be switched on",
            hint="adapters that were merged cannot be: export with --adapters runtime",
        )
    names = _distinct_names(bundles)
    for folder, name, manifest, adapters in zip(bundles, names, manifests, own, strict=True):
        _check_room(folder, manifest, options)
        yield from _open(folder, name, manifest, adapters, options)
        progress.advance(1, name)


def _check_room(folder: Path, manifest: Manifest, options: BenchOptions) -> None:
    if manifest.encoder is not None:
        raise ConfigError(
            f"{folder} has two graphs; the speed of one that decodes alone is measured"
        )
    if not manifest.signature.past:
        raise ConfigError(f"{folder} has no cache, so there is no decoding to measure")
    limit, most = manifest.context_length, max(options.prompt_tokens) + options.new_tokens
    if limit is not None and most > limit:
        raise ConfigError(
            f"prompts of {max(options.prompt_tokens)} tokens and {options.new_tokens} new ones make {most}; "
            f"the model of {folder} can see {limit}",
            hint=f"--prompt-tokens and --new-tokens that add up to {limit} at most",
        )


def _open(
    folder: Path, name: str, manifest: Manifest, adapters: Sequence[str], options: BenchOptions
) -> Iterator[Lane]:
    start = time.perf_counter()
    session: Session | None = None
    if manifest.format == PADDLE:
        runner: Runner | CachingRunner = open_runner(
            folder, provider=options.provider, threads=options.threads
        )
    else:
        session = Session(folder, provider=options.provider, threads=options.threads)
        runner = session.runner()
    seconds = time.perf_counter() - start
    disk = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    yield Lane(name, folder, None, runner, seconds, disk)
    if session is not None:
        for adapter in adapters:
            session.load_adapter(adapter)
            active = session.runner(adapter)
            yield Lane(f"{name} + {adapter}", folder, adapter, active, seconds, disk)


def _adapters(manifest: Manifest, options: BenchOptions) -> list[str]:
    """The bundle's adapters that are to be measured: those in slots, and of them the ones asked for."""
    own = [str(entry["name"]) for entry in manifest.adapters if entry.get("mode") == RUNTIME]
    return [name for name in own if not options.adapters or name in options.adapters]


def _distinct_names(bundles: Sequence[Path]) -> list[str]:
    names = [folder.resolve().name for folder in bundles]
    return names if len(set(names)) == len(names) else [str(folder) for folder in bundles]
