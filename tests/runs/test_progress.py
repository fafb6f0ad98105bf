"""Lines of a run's progress."""

import pytest

from ddml.runs.history import History
from ddml.runs.progress import AT_FIRST, Progress


def iterations(mode: str, capsys: pytest.CaptureFixture[str], first: int, last: int) -> list[int]:
    """The iterations that are printed when they come at once."""
    progress, history = Progress(mode, "error", first, last), History()
    for k in range(first, last + 1):
        history.append(iteration=k, loss=1.0, gradient_norm=1.0, step=1.0, work=k, work_critical=k, time=0.0)
        progress.show(history)
    progress.close()
    return [int(line.split()[0]) for line in capsys.readouterr().out.splitlines()[1:]]


def test_lines_keep_their_distance(capsys: pytest.CaptureFixture[str]) -> None:
    printed = iterations("auto", capsys, 40, 900)
    assert printed[: AT_FIRST + 1] == list(range(40, 41 + AT_FIRST))
    assert printed[-1] == 900
    assert len(printed) < 100
    assert iterations("lines", capsys, 0, 300) == list(range(301))
    assert iterations("none", capsys, 0, 300) == []
