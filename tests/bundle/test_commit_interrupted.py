"""Ctrl-C while a new bundle takes the place of an old one."""

from __future__ import annotations

from pathlib import Path

import pytest

from peft_deploy.bundle import MANIFEST, BundleFolder


@pytest.mark.parametrize("after", [False, True], ids=["before the move", "after the move"])
@pytest.mark.parametrize("moves", [1, 2])
def test_one_of_the_two_bundles_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moves: int, after: bool
) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / MANIFEST).write_text("old")
    rename, done = Path.rename, 0

    def interrupted(self: Path, target: Path) -> Path:
        nonlocal done
        done += 1
        if done != moves:
            return rename(self, target)
        if after:
            rename(self, target)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), BundleFolder(output, force=True) as folder:
        folder.write_text(MANIFEST, "new")
        monkeypatch.setattr(Path, "rename", interrupted)
        folder.commit()

    expected = "new" if (moves, after) == (2, True) else "old"
    assert (output / MANIFEST).read_text() == expected
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
