"""A thousand switches between adapters from several threads: the same results, and no memory lost."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tiny_graph
import tiny_slots

from peft_deploy.adapters.formats.onnx_file import write_onnx_adapter
from peft_deploy.runtime import GenerationOptions, Session, generate

ADAPTERS, THREADS, SWITCHES = 8, 4, 1000
RANKS = (1, 2, 3, 5, 8, 13, 21, 34)


@pytest.fixture(scope="module")
def session(
    bundle: Path, weights: dict[str, np.ndarray], tmp_path_factory: pytest.TempPathFactory
) -> Session:
    folder = tmp_path_factory.mktemp("switching")
    session = Session(tiny_slots.add_slots(bundle, folder / "bundle"), threads=1)
    for i, rank in enumerate(RANKS):
        tensors = tiny_slots.make_adapter(weights, tiny_slots.everywhere(rank), seed=20 + i)
        path = write_onnx_adapter(folder / f"{i}.onnx_adapter", tensors, tiny_slots.VERSION)
        session.load_adapter(path)
    return session


def requests() -> Iterator[tuple[str | None, list[int], float]]:
    """Adapter, prompt and scale of each request."""
    rng = np.random.default_rng(8)
    for _ in range(SWITCHES):
        which = int(rng.integers(0, ADAPTERS + 1))
        ids = rng.integers(0, tiny_graph.VOCAB, int(rng.integers(1, 6))).tolist()
        name = None if which == ADAPTERS else str(which)
        yield name, ids, 1.0 if name is None else float(rng.choice([1.0, 0.5]))


def answer(session: Session, request: tuple[str | None, list[int], float]) -> bytes:
    name, ids, scale = request
    count = len(ids)
    feeds = {
        "input_ids": np.array([ids], np.int64),
        "attention_mask": np.ones((1, count), np.int64),
        "position_ids": np.arange(count, dtype=np.int64)[None],
    }
    outputs = session.run(feeds, adapter=name, scale=scale)
    return b"".join(array.tobytes() for array in outputs.values())


def resident() -> int:
    """Bytes of memory that this process holds."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text("ascii").split()[1])
    return pages * 4096


def test_four_threads_get_what_one_gets_and_memory_stays(session: Session) -> None:
    wanted = list(requests())
    alone = [answer(session, request) for request in wanted]
    assert len(set(alone)) > SWITCHES // 2
    with ThreadPoolExecutor(THREADS) as pool:
        assert list(pool.map(lambda r: answer(session, r), wanted)) == alone
        before = resident()
        for _ in range(2):
            assert list(pool.map(lambda r: answer(session, r), wanted)) == alone
        assert resident() - before < 4e6


def test_one_runner_in_four_threads(session: Session) -> None:
    """What a thread leaves bound is another thread's next request."""
    runner = session.runner("4", scale=0.5)
    wanted = [request[1] for request in requests()][:200]

    def run(ids: list[int]) -> bytes:
        options = GenerationOptions(max_new_tokens=2)
        return repr(generate(runner, [ids], options)[0].token_ids).encode()

    alone = [run(ids) for ids in wanted]
    assert len(set(alone)) > 20
    with ThreadPoolExecutor(THREADS) as pool:
        assert list(pool.map(run, wanted)) == alone


def test_loading_and_unloading_beside_requests(
    session: Session, weights: dict[str, np.ndarray], tmp_path: Path
) -> None:
    rank = 64
    tensors = tiny_slots.make_adapter(weights, tiny_slots.everywhere(rank), seed=40)
    path = write_onnx_adapter(tmp_path / "big.onnx_adapter", tensors, tiny_slots.VERSION)
    size = path.stat().st_size
    options = GenerationOptions(max_new_tokens=3)
    expected = session.generate([[5, 6]], options, adapter="0")[0].token_ids
    stop = threading.Event()
    wrong: list[object] = []

    def generate() -> None:
        while not stop.is_set():
            tokens = session.generate([[5, 6]], options, adapter="0")[0].token_ids
            if tokens != expected:
                wrong.append(tokens)

    def cycle(times: int) -> None:
        for _ in range(times):
            session.load_adapter(path)
            session.generate([[5, 6]], options, adapter="big", scale=0.5)
            session.unload_adapter("big")

    thread = threading.Thread(target=generate)
    thread.start()
    try:
        cycle(5)
        before = resident()
        cycle(60)
        grown = resident() - before
    finally:
        stop.set()
        thread.join()
    assert not wrong
    assert grown < 15 * size  # sixty that were kept would be more
    assert session.adapters == tuple(map(str, range(ADAPTERS)))
