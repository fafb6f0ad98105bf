"""Figures from run files."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from launch import ROOT

PNG = b"\x89PNG"


def plot(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "drivers/plot.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_convergence_and_maps_are_drawn(trained: Path, tmp_path: Path) -> None:
    done = plot(trained, trained, "-o", tmp_path / "figure.png", "-labels", "one", "two")
    assert done.returncode == 0, done.stderr
    for name in ("figure.png", "figure.maps.png"):
        assert (tmp_path / name).read_bytes().startswith(PNG)
        assert str(tmp_path / name) in done.stdout


def test_file_that_is_no_run_file_is_refused(trained: Path, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.h5"
    wrong.write_bytes(b"no HDF5")
    for arguments in ((wrong, "-o", tmp_path / "a.png"), (trained, "-o", tmp_path / "nowhere/a.png")):
        done = plot(*arguments)
        assert done.returncode == 1
        assert [line.startswith("error: ") for line in done.stderr.splitlines()] == [True]
        assert not list(tmp_path.glob("**/*.png"))
