"""Opens a bundle for use."""

from __future__ import annotations

from pathlib import Path

from peft_deploy.bundle.folder import sha256
from peft_deploy.bundle.manifest import Manifest
from peft_deploy.errors import (
    BundleError,
    listed,
)
from peft_deploy.runtime.loaded import LoadedBundle, as_bundle_error
from peft_deploy.runtime.opening import open_runner
from peft_deploy.text.tokenizer import TOKENIZER, Tokenizer


def load_bundle(
    path: Path | str,
    *,
    provider: str = "cpu",
    threads: int | None = None,
    verify: bool = False,
) -> LoadedBundle:
    """Opens a bundle for use.

    Args:
        path: the bundle's folder.
        provider: ``"cpu"`` or ``"cuda"``.
        threads: threads within one operator; None leaves it to the runtime (all cores).
        verify: compare the SHA-256 of every file with the manifest's; reads all weights once.

    Raises:
        BundleError: the folder is not a bundle, or files are missing, damaged or not those of the
            manifest.
        ExecutionError: the provider is not available, or the runtime refuses the model.
        MissingExtraError: the runtime is not installed.

    Example:
        >>> bundle = load_bundle("out")  # doctest: +SKIP
        >>> bundle.generate("The capital of France is", max_new_tokens=8).text  # doctest: +SKIP
        ' Paris.'
    """
    folder = Path(path)
    manifest = Manifest.read(folder)
    _check_files(folder, manifest, verify=verify)
    runner = open_runner(folder, manifest.signature, provider=provider, threads=threads)
    with as_bundle_error():
        tokenizer = Tokenizer.from_folder(folder) if (folder / TOKENIZER).is_file() else None
    return LoadedBundle(folder, manifest, runner, tokenizer, manifest.context_length)


def _check_files(folder: Path, manifest: Manifest, *, verify: bool) -> None:
    root = folder.resolve()
    outside = {n for n in manifest.files if not (root / n).resolve().is_relative_to(root)}
    if outside:
        raise BundleError(
            f"the manifest of {folder} names files outside of it:\n{listed(outside)}"
        )
    missing = {name for name in manifest.files if not (folder / name).is_file()}
    if missing:
        raise BundleError(
            f"{folder} is not complete; these files of its manifest are "
            f"missing:\n{listed(missing)}"
        )
    if verify:
        changed = {n for n, known in manifest.files.items() if sha256(folder / n) != known}
        if changed:
            raise BundleError(
                f"files of {folder} are not those that its manifest describes:\n{listed(changed)}",
                hint="get the bundle again, or export it again",
            )
