"""A run's history for TensorBoard, written while it runs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from ddml.errors import InputError
from ddml.options import Option

from .extras import extra
from .history import COLUMNS, WORK_OF_LEVELS, History

OPTIONS = (
    Option("tensorboard", None, "Folder to which the columns of the history are written for TensorBoard while the run "
           "goes (default: none; needs pip install tensorboard)."),
)  # fmt: skip

SECONDS = 10  # after which what has been written is on the disk at the latest (our choice)
_EVENTS = "events.out.tfevents.*"


class Board:
    """Event files of TensorBoard in a folder; nothing is collective.

    Parameters
    ----------
    folder
        Where they are; None: nothing is written.

    Attributes
    ----------
    failure : str
        Why nothing is written any more, in a line.

    Raises
    ------
    InputError
        Without the package tensorboard.
    """

    def __init__(self, folder: str | None) -> None:
        self.folder, self.failure = folder, ""
        self.writer: Any = None
        self.made: Any = None
        if folder is not None:
            extra("option -tensorboard", "tensorboard")
            self.made = extra("option -tensorboard", "torch.utils.tensorboard")

    def open(self, history: History) -> None:
        """Go on behind a history, which is written, too, where the folder has no events yet.

        What the folder has of later iterations, which a run that was killed has left, TensorBoard passes over.

        Raises
        ------
        InputError
            A folder that cannot be written.
        """
        if self.made is None or self.folder is None:
            return
        try:
            new = not any(Path(self.folder).glob(_EVENTS))
            behind = int(history.last("iteration")) + 1 if len(history) else 0
            self.writer = self.made.SummaryWriter(self.folder, purge_step=0 if new else behind, flush_secs=SECONDS)
        except OSError as error:
            raise InputError(f"option -tensorboard: cannot write {self.folder}: {error.strerror or error}") from error
        for row in range(len(history) if new else 0):
            self._add({name: float(history[name][row]) for name in history.used()})

    def show(self, history: History) -> None:
        """Write the last row."""
        if self.writer is not None:
            self._add({name: history.last(name) for name in (*COLUMNS, *WORK_OF_LEVELS)})

    def _add(self, row: dict[str, float]) -> None:
        iteration = int(row.pop("iteration"))
        for name, value in row.items():
            if not math.isnan(value):
                self._try("add_scalar", name, value, iteration)

    def flush(self) -> None:
        """Bring all to the disk."""
        self._try("flush")

    def close(self) -> None:
        """Write no more."""
        self._try("close")
        self.writer = None

    def _try(self, method: str, *arguments: Any) -> None:
        if self.writer is None:
            return
        try:
            getattr(self.writer, method)(*arguments)
        except (OSError, RuntimeError, ValueError) as error:
            self.writer, self.failure = None, f"{self.folder} is written no more: {error}"
