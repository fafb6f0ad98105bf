"""How a run that a signal has stopped ends, and what -check and a sweep say before there is a run."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from calling import call, refusal, tree
from launch import HERE, ROOT, SMALL, content

from ddml.errors import StoppedError

PROBLEMS = HERE / "hindering_problems.py"
RUN = ("-solver", "lbfgs", *SMALL, "-progress", "none", "-max_it", 60)
DRIVERS = {
    "pinn": (*RUN, "-problem", "klein_gordon"),
    "classify": ("-data", "digits", "-samples", 90, "-widths", "6,5", "-progress", "none", "-max_it", 1),
    "logistic": ("-data", "digits", "-classes", "4,9", "-progress", "none", "-max_it", 1),
}


@pytest.mark.parametrize(
    ("words", "code"), [((), 0), (("-interrupted_code", 75), 75), (("-interrupted_code", 254), 254)]
)
def test_a_run_that_a_signal_stops_ends_with_the_code(tmp_path: Path, words: tuple[object, ...], code: int) -> None:
    problem = ("-problem", f"{PROBLEMS}:Interrupted")
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    assert call("pinn", *problem, *RUN, *words, "-output", tmp_path / "run.h5") == code
    signal.signal(signal.SIGINT, before)
    assert 0 < content(tmp_path / "run.h5").history["iteration"][-1] < 60


@pytest.mark.parametrize(("words", "code"), [((), 1), (("-interrupted_code", 75), 76), (("-interrupted_code", 1), 2)])
def test_before_the_run_it_is_one_more(tmp_path: Path, words: tuple[object, ...], code: int) -> None:
    problem = ("-problem", f"{PROBLEMS}:InterruptedAtOnce")
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.raises(StoppedError, match="nothing was written") as caught:
        call("pinn", *problem, *RUN, *words, "-output", tmp_path / "run.h5")
    signal.signal(signal.SIGINT, before)
    assert caught.value.exit_code == code
    assert tree(tmp_path) == {}


@pytest.mark.parametrize("driver", DRIVERS)
def test_a_run_that_is_not_stopped_ends_as_ever(driver: str) -> None:
    assert call(driver, *DRIVERS[driver], "-interrupted_code", 75) == 0


@pytest.mark.parametrize("value", ["255", "256", "-1", "1.5", "x", "1e3"])
def test_what_is_no_exit_code_is_refused(value: str, tmp_path: Path) -> None:
    assert "option -interrupted_code must be" in refusal("pinn", *RUN, "-interrupted_code", value)


@pytest.mark.parametrize(
    ("driver", "blocked"),
    [
        pytest.param(driver, blocked, marks=[pytest.mark.long] * (not blocked and driver != "pinn"))
        for driver in DRIVERS
        for blocked in (True, False)
    ],
)
def test_a_signal_while_modules_are_imported_is_remembered(driver: str, blocked: bool, tmp_path: Path) -> None:
    """From the first moment where the signal is blocked until there are handlers, and behind these anyway."""
    hold = ["env", "--block-signal=TERM,USR1,HUP"] if blocked else []
    command = [*hold, sys.executable, "-m", "mpi4py", str(ROOT / "drivers" / f"{driver}.py")]
    words = [*map(str, DRIVERS[driver]), "-interrupted_code", "75", "-output", str(tmp_path / "run.h5")]
    process = subprocess.Popen([*command, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    maps = Path(f"/proc/{process.pid}/maps")
    while not any(name in maps.read_text() for name in (("libpetsc",) if not blocked else ("python",))):
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=100)
    assert (process.returncode, out) == (76, ""), err
    assert err == "error: a signal asked to stop before the run began; nothing was written\n"
    assert tree(tmp_path) == {}


@pytest.mark.parametrize("driver", DRIVERS)
def test_check_says_what_a_run_would_be(driver: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert call(driver, *DRIVERS[driver], "-check", "-output", tmp_path / "run.h5") == 0
    out = capfd.readouterr().out
    assert "solver" in out
    assert "stopped" not in out
    assert tree(tmp_path) == {}
    assert "unknown option -widht" in refusal(driver, *DRIVERS[driver], "-check", "-widht", 9)


def sweep(folder: Path, *lines: str) -> Path:
    path = folder / "sweep.txt"
    path.write_text("\n".join(lines) + "\n")
    return path


GOOD = "-points 200 -test_points 50 -error_points 100 -width 6"


def test_good_lines_of_a_sweep(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = sweep(tmp_path, "# widths", f"{GOOD} -solver lbfgs", "", f"pinn {GOOD}",
                 "  # another driver", "classify -data digits -samples 90 -widths 6,5")  # fmt: skip
    before = tree(tmp_path)
    assert call("sweep", path) == 0
    assert capfd.readouterr().out == "3 runs, no option that is refused\n"
    assert tree(tmp_path) == before


WRONG = {
    "an unknown option": (f"{GOOD} -widht 9", "unknown option -widht"),
    "one of another solver": (f"{GOOD} -solver lbfgs -radius 1", "unknown option"),
    "one of another driver": ("classify -points 200", "unknown option -points"),
    "a value": (f"{GOOD} -width x", "option -width must be an integer, got 'x'"),
    "a problem": (f"{GOOD} -problem bugers", "bugers"),
    "a driver": (f"pin {GOOD}", "pin"),
    "a solver": (f"{GOOD} -solver lbfg", "lbfg"),
    "the run file": (f"{GOOD} -output a.h5", "option -output is not for a line of a sweep"),
    "a file of options that is not there": (f"{GOOD} -options_file nothing", "cannot read nothing"),
    "no run": (f"{GOOD} -help", "option -help is not for a line of a sweep"),
    "the code": (f"{GOOD} -interrupted_code 3", "option -interrupted_code is not for a line of a sweep"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_line_of_a_sweep_is_named(name: str, tmp_path: Path) -> None:
    line, expected = WRONG[name]
    path = sweep(tmp_path, "# a comment", GOOD, line)
    said = refusal("sweep", path)
    assert said.startswith(f"run 2 of {path}: ")
    assert expected in said


def test_a_sweep_without_runs(tmp_path: Path) -> None:
    assert "has no line with options" in refusal("sweep", sweep(tmp_path, "# nothing", "", "  "))
    assert "cannot read" in refusal("sweep", tmp_path / "none.txt")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    assert "cannot read" in refusal("sweep", tmp_path / "bytes")


def test_the_table_of_a_sweep(
    good: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = sweep(tmp_path, "-width 8", "classify -widths 6", "-width 9")
    (tmp_path / "widths_1.h5").write_bytes(good.read_bytes())
    (tmp_path / "widths_3.h5").write_bytes(good.read_bytes()[:-9])
    monkeypatch.chdir(tmp_path)
    assert call("sweep", path, "-table", "widths") == 0
    head, first, second, third, wrong = capfd.readouterr().out.splitlines()
    assert head.split() == ["run", "iteration", "loss", "error", "accuracy", "work", "time", "options"]
    loss = content(good).history["loss"][-1]
    assert first.split()[:3] == ["1", "5", f"{loss:.6g}"]
    assert first.endswith("  -width 8")
    assert second.split() == ["2", "classify", "-widths", "6"]
    assert third.split() == ["3", "-width", "9"]
    assert wrong.startswith("run 3: widths_3.h5 is damaged")
