"""Which module an operator came from, recorded while tracing."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import paddle


class ScopeTrace:
    """Remembers module paths by the ids of the operators traced meanwhile.

    Paddle's own way (``name_struct``) lists all operators at the end of every scope, which is quadratic in the
    model's depth; here a scope costs one look at the last operator.
    """

    def __init__(self) -> None:
        self._path: list[str] = []
        self._starts: list[int] = [-1]
        self._paths: list[str] = [""]

    @contextmanager
    def __call__(self, *names: str) -> Iterator[None]:
        """Operators traced inside belong to the module ``names`` of the enclosing one."""
        self._path.extend(names)
        self._mark()
        try:
            yield
        finally:
            del self._path[-len(names) :]
            self._mark()

    def _mark(self) -> None:
        if paddle.in_dynamic_mode():
            return
        block = paddle.static.default_main_program().global_block()
        self._starts.append(-1 if block.empty() else block.back().id())
        self._paths.append(".".join(self._path))

    def apply(self, program: Any) -> None:
        """Writes each operator's module path into its ``struct_name`` attribute."""
        for op in program.global_block().ops:
            path = self._paths[bisect_right(self._starts, op.id() - 1) - 1]
            if path:
                op.set_str_attr("struct_name", path)
