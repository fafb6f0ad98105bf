"""A history for TensorBoard: asked for in one line where the package is missing, and gone on with after a restart."""

from importlib.util import find_spec
from pathlib import Path

import pytest

from ddml.errors import InputError
from ddml.runs.board import Board
from ddml.runs.history import History

INSTALLED = find_spec("tensorboard") is not None
needs_it = pytest.mark.skipif(not INSTALLED, reason="needs tensorboard")


def history(rows: int, factor: float = 1.0) -> History:
    made = History()
    for i in range(rows):
        made.append(iteration=i, loss=factor * (10 - i), work_level_0=2.0 * i, **({"error": 0.5} if i % 2 else {}))
    return made


def written(folder: Path, tag: str) -> dict[int, float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {event.step: event.value for event in events.Scalars(tag)}


def test_nothing_is_asked_for_where_there_is_no_folder() -> None:
    board = Board(None)
    board.open(history(3))
    board.show(history(3))
    board.flush()
    board.close()
    assert not board.failure


@pytest.mark.skipif(INSTALLED, reason="tensorboard is installed")
def test_the_missing_package_is_named_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="option -tensorboard needs tensorboard: pip install tensorboard") as said:
        Board(str(tmp_path))
    assert "\n" not in str(said.value) and not list(tmp_path.iterdir())


@needs_it
def test_rows_are_written_as_they_come(tmp_path: Path) -> None:
    board, made = Board(str(tmp_path / "new" / "folder")), History()
    board.open(made)
    for i in range(4):
        made.append(iteration=i, loss=10.0 - i, **({"error": 0.5} if i % 2 else {}))
        board.show(made)
    board.flush()  # as a checkpoint does: what a kill then leaves is whole
    assert written(tmp_path / "new" / "folder", "loss") == {0: 10, 1: 9, 2: 8, 3: 7}
    assert written(tmp_path / "new" / "folder", "error") == {1: 0.5, 3: 0.5}
    board.close()


@needs_it
def test_a_restart_goes_on_and_passes_over_what_is_behind_its_file(tmp_path: Path) -> None:
    first = Board(str(tmp_path))
    first.open(history(6))  # into a new folder the whole history
    first.close()
    assert written(tmp_path, "work_level_0") == {i: 2.0 * i for i in range(6)}
    again, made = Board(str(tmp_path)), history(3)  # the file of the run that was killed had three rows
    again.open(made)
    made.append(iteration=3, loss=70)
    again.show(made)
    again.close()
    assert written(tmp_path, "loss") == {0: 10, 1: 9, 2: 8, 3: 70}


@needs_it
def test_a_folder_that_is_none_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="option -tensorboard: cannot write"):
        Board(str(tmp_path / "file")).open(History())
