"""What a run shows: a bar, or a line an iteration, and the line at its end."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import numpy as np

from ddml.errors import printable
from ddml.options import Option

from .history import History

OPTIONS = (
    Option("progress", "auto", "A bar, a line per iteration, or a bar on a terminal and elsewhere ten lines a second.",
           choices=("auto", "bar", "lines", "none")),
)  # fmt: skip

# Our choices. A run of thousands of short iterations would fill the log; and mpiexec, which does not forward what is
# printed while it ends its ranks, would leave them waiting with their last checkpoint unwritten.
PACE = 0.1  # seconds from line to line
AT_FIRST = 10  # lines without that distance

_WIDTHS = (6, 13, 11, 9, 11, 10, 10, 8)  # of a line's columns


class Progress:
    """Shows the rows of a history as they come; nothing is collective.

    Parameters
    ----------
    mode
        Value of ``-progress``; ``none`` on ranks that print nothing.
    shown
        The history column that is shown beside the loss.
    first, last
        Iteration where the run begins, and where it ends at the latest.
    """

    def __init__(self, mode: str, shown: str, first: int, last: int) -> None:
        self.pace = PACE if mode == "auto" else 0.0
        if mode == "auto":
            mode = "bar" if sys.stderr.isatty() else "lines"
        self.mode, self.shown, self.first = mode, shown, first
        self.due = 0.0  # when the next line is
        self.waiting = ""  # the last line, if it was not due
        self.bar: Any = None
        if mode == "bar":
            from tqdm import tqdm

            self.bar = tqdm(total=last, initial=first, unit="it", dynamic_ncols=True)
        if mode == "lines":
            columns = ("it", "loss", "|gradient|", "step", shown, "work", "critical", "time")
            names = zip(columns, _WIDTHS, strict=True)
            say(" ".join(f"{name:>{width}}" for name, width in names))

    def show(self, history: History) -> None:
        """Show the last row."""
        if self.mode == "none":
            return
        row = {
            name: history.last(name)
            for name in ("loss", "gradient_norm", "step", self.shown, "work", "work_critical", "time")
        }
        iteration = int(history.last("iteration"))
        if self.bar is not None:
            self.bar.set_postfix_str(f"loss {row['loss']:.3e} {self.shown} {row[self.shown]:.3e}")
            self.bar.update(iteration - self.bar.n)
            return
        line = (
            f"{iteration:6d} {row['loss']:13.6e} {row['gradient_norm']:11.3e} {row['step']:9.2e}"
            f" {row[self.shown]:11.4e} {row['work']:10.1f} {row['work_critical']:10.1f} {row['time']:8.1f}"
        )
        now = time.monotonic()
        if now < self.due and iteration - self.first > AT_FIRST:
            self.waiting = line
            return
        self.due, self.waiting = now + self.pace, ""
        say(line)

    def note(self, text: str) -> None:
        """Show something else that a user should know at once."""
        if self.bar is not None:
            self.bar.clear()
        say(f"note: {text}")

    def close(self) -> None:
        """Leave the bar as it is; show the last line."""
        if self.waiting:
            say(self.waiting)
        if self.bar is not None:
            self.bar.close()


def say(text: str) -> None:
    """Print a line, as :func:`ddml.errors.printable` has it.

    A full disk behind the output, or a reader who has left, is no reason to end a run.
    """
    with suppress(OSError):
        print(printable(text), flush=True)


def summary(
    history: History, measured: Mapping[str, float], reason: str, shown: str = "error", output: str | None = None
) -> str:
    """The last line of a run.

    Parameters
    ----------
    history
        Of the run.
    measured
        Columns that were measured at its end, where the history's last row lacks them.
    reason
        Why it stopped.
    shown
        The history column that is shown beside the loss; with ``accuracy`` there are samples, not points.
    output
        The run file.
    """
    if len(history) == 0:
        return f"stopped before the first iteration: {reason}; nothing was written"
    parts = [f"{int(history.last('iteration'))} iterations", f"loss {history.last('loss'):.6e}"]
    found = {name: measured.get(name, history.last(name)) for name in ("test_loss", "error", "accuracy")}
    if np.isfinite(found["test_loss"]):
        parts[-1] += f" (on other {'samples' if shown == 'accuracy' else 'points'} {found['test_loss']:.6e})"
    if np.isfinite(found["accuracy"]):
        parts.append(f"accuracy {found['accuracy']:.4f}")
    if np.isfinite(found["error"]):
        parts.append(f"relative error {found['error']:.4e}")
    parts.append(f"work {history.last('work'):.1f} (critical {history.last('work_critical'):.1f})")
    parts.append(f"{history.last('time'):.1f} s")
    where = f"; run file {output}" if output else ""
    return f"stopped: {reason}. {', '.join(parts)}{where}"
