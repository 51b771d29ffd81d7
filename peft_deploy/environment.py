"""What has to be true of the process before a heavy package is imported.

Paddle reads its environment once, at import; so whoever needs Paddle calls :func:`require_paddle` first.
"""

from __future__ import annotations

import gc
import importlib
import importlib.metadata
import importlib.util
import logging
import os
import sys
import types
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from peft_deploy.errors import MissingExtraError

DEBUG_VARIABLE = "PEFT_DEPLOY_DEBUG"  # set by --debug, inherited by child processes


def debugging() -> bool:
    """Whether the log lines of Paddle, PaddleNLP, Paddle2ONNX and onnxruntime are wanted."""
    return bool(os.environ.get(DEBUG_VARIABLE))


def require(module: str, extra: str, purpose: str) -> None:
    """Fails with one clear sentence when a package is missing.

    Args:
        module: the import name.
        extra: the extra of this distribution that installs it.
        purpose: what needs it, as the subject of the sentence.

    Raises:
        MissingExtraError: the module cannot be found.
    """
    try:
        found = module in sys.modules or importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        found = False
    if not found:
        raise MissingExtraError(
            f"{purpose} needs the package {module}, which is not installed",
            hint=f"pip install 'peft-deploy[{extra}]'",
        )


def require_onnxruntime(purpose: str = "running a bundle") -> None:
    """Fails with one clear sentence when neither onnxruntime nor onnxruntime-gpu is installed."""
    require("onnxruntime", "cpu", purpose)


def require_paddle(purpose: str = "this step") -> None:
    """Prepares the process for Paddle and PaddleNLP, before their first import.

    All cores are used (Paddle's default is one), MKL takes its fast path on AMD processors, where it would
    otherwise choose a slow one (three times slower training, measured), and the log lines of both packages
    are silenced unless debugging.
    """
    require("paddle", "paddle", purpose)
    require("paddlenlp", "paddle", purpose)
    require_paddle_inference(purpose)
    if not debugging():
        _silence_paddle()


def require_paddle_inference(purpose: str = "running a bundle in Paddle's format") -> None:
    """The same without PaddleNLP, which running a bundle does not need."""
    require("paddle", "paddle", purpose)
    if "paddle" not in sys.modules:
        cores = available_cores()
        os.environ.setdefault("FLAGS_paddle_num_threads", str(cores))
        # Importing Paddle sets OMP_NUM_THREADS to 1, which MKL follows unless told otherwise.
        os.environ.setdefault("MKL_NUM_THREADS", str(cores))
        if _is_amd():
            os.environ.setdefault("MKL_DEBUG_CPU_TYPE", "5")
        if not debugging():
            os.environ.setdefault("GLOG_minloglevel", "3")
    with _quiet_import():
        importlib.import_module("paddle")


def available_cores() -> int:
    """CPU cores that this process may use, at least 1."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def import_paddlenlp_models() -> None:
    """Makes ``paddlenlp.transformers`` importable without the rest of PaddleNLP.

    ``import paddlenlp`` imports its server, taskflow and data sets along, three seconds of them; here its package
    is entered without running its ``__init__``. Only for processes of our own that end when their job is done:
    a later ``import paddlenlp`` in the same process would find it incomplete.
    """
    if "paddlenlp" in sys.modules:
        return
    spec = importlib.util.find_spec("paddlenlp")
    if spec is None or spec.submodule_search_locations is None:
        return
    package = types.ModuleType("paddlenlp")
    package.__path__ = list(spec.submodule_search_locations)
    package.__spec__ = spec
    package.__dict__["__version__"] = importlib.metadata.version("paddlenlp")
    sys.modules["paddlenlp"] = package
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        importlib.import_module(
            "paddlenlp.data"
        )  # it and transformers import each other; this order works


@contextmanager
def uncollected() -> Iterator[None]:
    """Without Python's search for garbage in cycles: where many objects are made and few thrown away, a fifth of the
    time.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _is_amd() -> bool:
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text("utf-8", errors="replace")
    except OSError:
        return False


def available_memory() -> int | None:
    """Bytes that can be had without swapping, by the system and by this process's group; None where nobody says."""
    found = [_free_in_system(), _free_in_group()]
    known = [size for size in found if size is not None]
    return min(known, default=None)


def _free_in_system() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text("ascii").splitlines()
    except OSError:
        return None
    fields = dict(line.split(":", 1) for line in lines)
    return 1024 * int(fields["MemAvailable"].split()[0]) if "MemAvailable" in fields else None


def _free_in_group() -> int | None:
    """What a container's limit leaves, its page cache counted as free."""
    folder = Path("/sys/fs/cgroup")
    try:
        limit = (folder / "memory.max").read_text("ascii").strip()
        used = int((folder / "memory.current").read_text("ascii"))
        fields = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    return None if limit == "max" else int(limit) - used + int(fields.get("file", 0))


def _silence_paddle() -> None:
    with _quiet_import():
        importlib.import_module("paddlenlp")
        from paddlenlp.utils.log import logger
    logger.set_level("CRITICAL")


@contextmanager
def _quiet_import() -> Iterator[None]:
    """Imports inside warn of nothing, and leave the root logger as it was: both packages, or what they import,
    make it print everybody's INFO lines.
    """
    if debugging():
        yield
        return
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about ccache, distutils and pkg_resources
            yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
