"""The parent's side of the converter's process."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import site
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import peft_deploy.errors
from peft_deploy.atomic_folder import make_temporary, remove_temporary
from peft_deploy.config.export import ONNX, PADDLE
from peft_deploy.convert.graph_cache import GraphCache
from peft_deploy.convert.worker import (
    CONSTANTS_FILE,
    ERROR_FILE,
    GRAPH_FILE,
    NAMES_FILE,
    PROGRAM_FILE,
    REQUEST_FILE,
)
from peft_deploy.environment import debugging, require
from peft_deploy.errors import ConverterCrashError, MissingExtraError, PeftDeployError

if TYPE_CHECKING:
    from peft_deploy.convert.graph import ConvertedGraph
    from peft_deploy.convert.paddle_static import StaticProgram

LOG_FILE = "log.txt"
_PIPE_BYTES = 1 << 16
_RESULTS = {
    ONNX: frozenset({GRAPH_FILE, NAMES_FILE, CONSTANTS_FILE}),
    PADDLE: frozenset({PROGRAM_FILE, NAMES_FILE, CONSTANTS_FILE}),
}
_LOG_LINES = 12  # of the child's log, in the message about a crash


@contextlib.contextmanager
def started_early() -> Iterator[None]:
    """Starts a converter's process, which imports Paddle while the caller still finds out what is to be converted.

    The next job that is made within takes it over, unless the program was traced elsewhere. A process that nobody has
    taken is ended.
    """
    try:
        for package in ("paddle", "paddlenlp"):
            require(package, "paddle", "exporting a model")
    except MissingExtraError:  # the job says so, where its graph is not kept from before
        yield
        return
    child = _Child(_new_folder(), waits=True)
    _early.append(child)
    try:
        yield
    finally:
        if child in _early:
            _early.remove(child)
            child.end()
            remove_temporary(child.folder)


def _new_folder() -> Path:
    return make_temporary(Path(tempfile.gettempdir()), "peft-deploy-")


class _Child:
    """The converter's process.

    Args:
        folder: for its request, its results and its home.
        waits: for :meth:`go_on` before it reads the request.
    """

    def __init__(self, folder: Path, *, waits: bool = False) -> None:
        self.folder = folder
        self._waits, self._ended = waits, False
        self.events, writing = os.pipe()
        try:
            self.process = self._start(writing)
        except BaseException:
            os.close(self.events)
            raise
        finally:
            os.close(writing)

    def go_on(self) -> None:
        """The request is there."""
        if self.process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):  # it has died, and the job will say so
                self.process.stdin.write(b"\n")
                self.process.stdin.close()

    def end(self) -> None:
        """Ends it, if it still runs."""
        if self._ended:
            return
        self._ended = True
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        if self.process.stdin is not None:
            self.process.stdin.close()
        os.close(self.events)

    def _start(self, writing: int) -> subprocess.Popen[bytes]:
        with (self.folder / LOG_FILE).open("wb") as log:
            return subprocess.Popen(
                [sys.executable, "-m", f"{__package__}.worker", str(self.folder), str(writing)],
                stdin=subprocess.PIPE if self._waits else subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=(writing,),
                env=self._environment(),
                bufsize=0,
                start_new_session=True,  # Ctrl-C reaches us alone, and we end the child
            )

    def _environment(self) -> dict[str, str]:
        """Ours, with a home in the folder: Paddle writes the source of what it traces to ``~/.cache`` and leaves
        it there when the process ends early.
        """
        user_packages = os.environ.get("PYTHONUSERBASE") or site.getuserbase()
        return {**os.environ, "HOME": str(self.folder), "PYTHONUSERBASE": user_packages}


_early: list[_Child] = []  # not taken by a job yet


class ConversionJob:
    """Tracing and converting, running beside this process from the moment it is made; or what that gave before.

    A context manager: leaving it ends the child and removes its folder, whatever happened.

    Args:
        config: the model's config.json.
        opset: version of the default operator set to ask Paddle2ONNX for.
        format: ``"onnx"``, or ``"paddle"`` for the traced program itself.
        traced: leaves a program that was traced already in the folder that it is given (see
            :func:`~peft_deploy.convert.worker.leave_traced`); the configuration is not used then.

    Raises:
        MissingExtraError: Paddle, PaddleNLP or, for ONNX, Paddle2ONNX is not installed.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        opset: int,
        format: str = ONNX,
        *,
        traced: Callable[[Path], None] | None = None,
    ) -> None:
        request = {"config": dict(config), "opset": opset, "format": format}
        request["traced"] = traced is not None
        self._format = format
        self._child: _Child | None = None
        self._importing: threading.Thread | None = None
        # A program that was traced elsewhere can be of anything.
        self._cache = GraphCache(request) if traced is None else None
        early = _early.pop() if _early and traced is None else None
        self._folder = early.folder if early else _new_folder()
        try:
            if self._cache is None or not self._cache.take(self._folder):
                self._begin(request, traced, early)
            elif early is not None:
                early.end()
        except BaseException:
            if early is not None:
                early.end()
            remove_temporary(self._folder)
            raise

    def _begin(
        self,
        request: Mapping[str, Any],
        traced: Callable[[Path], None] | None,
        early: _Child | None,
    ) -> None:
        converter = ("paddle2onnx",) if self._format == ONNX else ()
        for package in ("paddle", "paddlenlp", *converter):
            require(package, "paddle", "exporting a model")
        (self._folder / REQUEST_FILE).write_text(json.dumps(request), "utf-8")
        if traced is not None:
            traced(self._folder)
        self._child = early or _Child(self._folder)
        self._child.go_on()
        if self._format == ONNX:
            # Two seconds of Python that would begin when the graph is there; meanwhile the caller writes weights.
            # No daemon: a process that ends early, for an error elsewhere, must not take itself apart meanwhile.
            self._importing = threading.Thread(target=_import_libraries)
            self._importing.start()

    def __enter__(self) -> ConversionJob:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._child is not None:
            self._child.end()
        remove_temporary(self._folder)

    def wait_for_imports(self) -> None:
        """Waits until nothing is imported in another thread any more: what two threads import at once, they may see
        half-made.
        """
        if self._importing is not None:
            self._importing.join()

    def result(self, on_phase: Callable[[str], None]) -> ConvertedGraph | StaticProgram:
        """Reads what was made before, or waits for the child and reads what it made.

        Args:
            on_phase: is called with the title of the phase that the child is in.

        Raises:
            PeftDeployError: the error that the child met, of the child's class.
            ConverterCrashError: the child died; its last log lines are in the message.
        """
        if self._child is None:
            on_phase("Taking the graph from the cache")
            return self._read()
        events = self._child.events
        while lines := os.read(events, _PIPE_BYTES):  # empty: the child closed its end or died
            on_phase(lines.decode().splitlines()[-1])  # the ones before it are over already
        status = self._child.process.wait()
        self.wait_for_imports()  # of what reads the graph
        if debugging():
            with contextlib.suppress(OSError):
                sys.stderr.write(self._log())
        error = self._folder / ERROR_FILE
        if error.exists():
            raise _rebuild(json.loads(error.read_text("utf-8")))
        if status != 0:
            raise self._crash(status)
        if self._cache is not None:
            self._cache.keep(self._folder, _RESULTS[self._format])
        return self._read()

    def _read(self) -> ConvertedGraph | StaticProgram:
        if self._format != ONNX:
            from peft_deploy.convert.paddle_static import StaticProgram

            return StaticProgram.read(self._folder)
        from peft_deploy.convert.graph import ConvertedGraph

        return ConvertedGraph.read(self._folder)

    def _log(self) -> str:
        return (self._folder / LOG_FILE).read_text("utf-8", errors="replace")

    def _crash(self, status: int) -> ConverterCrashError:
        how = f"ended with status {status}"
        if status < 0:
            how = f"was ended by {signal.Signals(-status).name}"
        tail = "\n".join(f"  {line}" for line in self._log().splitlines()[-_LOG_LINES:])
        return ConverterCrashError(
            f"the converter's process {how}; its log ends with\n{tail or '  (nothing)'}",
            hint="run again with --debug for the whole log",
        )


def _import_libraries() -> None:
    """What reads and fuses graphs. Nothing of this package, whose modules the caller may be importing right now."""
    with contextlib.suppress(ImportError):  # the caller will meet it, and can say it
        for library in ("onnx_ir", "onnxscript.rewriter.pattern"):
            importlib.import_module(library)


def _rebuild(error: Mapping[str, Any]) -> PeftDeployError:
    cls = getattr(peft_deploy.errors, error["class"], PeftDeployError)
    rebuilt: PeftDeployError = cls(error["message"], hint=error["hint"])
    return rebuilt
