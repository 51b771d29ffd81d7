"""What tools/bench_peers.py reckons with: the loop that it runs graphs in, its ratios, its verdicts."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_graph
import tiny_slots
from peers import results, table
from peers.builds import Build, BuildError, Workshop
from peers.contenders import EAGER, FP32, GENAI, INT4, OURS, RANK_64, SLOTS_OFF
from peers.crew import Record
from peers.onnx_loop import OnnxLoop

PROMPT, STEPS = [5, 9, 77], 6


def test_the_loop_generates_what_the_weights_say(
    bundle: Path, weights: dict[str, np.ndarray], tmp_path: Path
) -> None:
    """Each variant with its own adapter and its own cache, their steps mixed."""
    slotted = tiny_slots.add_slots(bundle, tmp_path / "slotted")
    tensors = tiny_slots.make_adapter(weights, tiny_slots.everywhere(4), seed=4)
    tiny_slots.keep_adapter(slotted, "r4", tensors)
    files = {"r4": slotted / "adapters" / "r4.onnx_adapter"}
    loop = OnnxLoop(slotted, 1, files, len(PROMPT) + STEPS)
    want = {
        "": tiny_graph.reference_greedy(weights, PROMPT, STEPS),
        "r4": tiny_graph.reference_greedy(tiny_slots.merged(weights, [tensors]), PROMPT, STEPS),
    }
    assert want[""] != want["r4"]
    found = {name: [loop.start(name, PROMPT)] for name in want}
    for _ in range(STEPS - 1):
        for name, tokens in found.items():
            tokens.append(loop.decode(name))
    assert found == want


def _run(**seconds: list[float]) -> results.Run:
    names = {"ours": OURS, "genai": GENAI, "eager": EAGER, "off": SLOTS_OFF, "r64": RANK_64}
    records = [
        Record(names[who], FP32, prefill=[1.0, 1.0], decode=times, tokens=[1, 2, 3], load=[1.0])
        for who, times in seconds.items()
    ]
    exports = [
        results.Export(OURS, FP32, [6.0, 8.0], [100, 100], 5),
        results.Export(GENAI, FP32, [12.0, 10.0], [90, 110], 5),
    ]
    machine = {"cpu": "a processor", "cores": 2, "rounds": 2}
    return results.Run(machine, 128, records, exports, {f"{OURS} {INT4}": "not there"})


def test_ratios_are_of_the_same_round() -> None:
    """A round in which everything took ten times as long changes nothing."""
    ratio = results.speed_ratio([1.0, 10.0, 1.0], [2.0, 20.0, 2.0])
    assert (ratio.low, ratio.median, ratio.high) == (2, 2, 2)
    with pytest.raises(ValueError, match="2 measurements against 1"):
        results.speed_ratio([1.0, 1.0], [1.0])


def test_bars_pass_and_fail_in_the_right_direction() -> None:
    run = _run(
        ours=[1.0, 1.0], genai=[1.04, 1.04], eager=[3.1, 3.1], off=[1.02, 1.02], r64=[1.2, 1.2]
    )
    verdicts = {bar.title: bar.passed for bar in results.bars(run)}
    assert verdicts == {
        "decode, peft-deploy fp32 / genai builder fp32": False,
        "decode, peft-deploy fp32 / Paddle eager fp32": True,
        "prefill, peft-deploy fp32 / genai builder fp32": False,
        "decode, slots, off fp32 / peft-deploy fp32": True,
        "decode, slots, rank 64 fp32 / peft-deploy fp32": False,
        "time, export --merge / genai builder": True,  # 0.5 and 0.8
        "peak memory, export --merge / genai builder": False,  # 1.11 and 0.91: 1.01
    }


def test_what_is_shown_names_who_says_something_else(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run = _run(ours=[1.0, 1.0], genai=[2.0, 2.0], off=[1.0, 1.0])
    run.records[1].tokens[2] = 9
    run.write(tmp_path / "run.json")
    read = results.Run.read(tmp_path / "run.json")
    assert read == run
    table.show(read)
    shown = capsys.readouterr().out
    assert "greedy tokens in fp32 differ: genai builder after 2 tokens" in shown
    assert f"left out: {OURS} int4 - not there" in shown
    lines = table.markdown(read).splitlines()
    speeds = "128 tok/s (1.00) | 0.5 tok/s (0.50)"
    row = f"| fp32 | genai builder | 11.0 s, 0.00 GB | 0 MB | 1.00 s | 0.00 GB | {speeds} | 2/3 |"
    assert row in lines
    assert any(
        line.startswith("| fp32 | slots, off |") and line.endswith("| - |") for line in lines
    )


def test_a_build_is_kept_until_something_changes(tmp_path: Path) -> None:
    shop, source = Workshop(tmp_path / "work", {}), tmp_path / "source"
    source.mkdir()
    (source / "weights").write_text("one")

    def build(software: str = "1", code: str = "pass") -> Build:
        script = f"import os, sys; {code}; os.mkdir(sys.argv[1]);"
        script += " print(os.getpid(), file=open(sys.argv[1] + '/t', 'a'))"
        return Build("thing", (sys.executable, "-c", script, "{output}"), (source,), software)

    def made() -> str:
        return (shop.folder("thing") / "t").read_text()

    shop.make(build())
    first = made()
    shop.make(build())
    assert made() == first
    shop.make(build("2"))
    assert made() != first
    second = made()
    (source / "weights").write_text("other")
    shop.make(build("2"))
    assert made() != second
    with pytest.raises(BuildError, match="no such model"):
        shop.make(build(code="sys.exit('no such model')"))
    assert not shop.folder("thing").exists()
