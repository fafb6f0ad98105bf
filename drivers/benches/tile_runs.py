"""What the bench runs of classifiers of tiles: splits, and drivers/classify.py on one rank."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, NamedTuple

import classify

from ddml.errors import InputError

from .tools import LAUNCH, Finished, finished_run


class Case(NamedTuple):
    """A split into tiles and its overlap, as options have them."""

    parts: str
    overlap: str

    @classmethod
    def parse(cls, text: str) -> Case:
        """From 4x4:8, say.

        Raises
        ------
        InputError
            For anything else.
        """
        parts, colon, overlap = text.partition(":")
        if not (parts and colon and overlap):
            raise InputError(f"option -tiles_cases must be splits and overlaps as in 4x4:8,2x2:0; got '{text}'")
        return cls(parts, overlap)

    def __str__(self) -> str:
        return f"{self.parts}, overlap {self.overlap}"

    @property
    def options(self) -> tuple[str, ...]:
        """Of drivers/classify.py."""
        return "-tiles", self.parts, "-tile_overlap", self.overlap

    def file(self, folder: str, seed: int) -> str:
        """The run file of its local networks."""
        return f"{folder}/{self.parts}-{self.overlap}-{seed}.h5"


def common(settings: Any, seed: int) -> dict[str, Any]:
    """Options of every run."""
    return {
        "data": settings.tiles_data, "network": settings.tiles_network, "seed": seed, "progress": "none",
        "checkpoint_interval": 0,
    }  # fmt: skip


def run(settings: Any, steps: int, seed: int, output: str | None, *given: str) -> Finished:
    """A run of drivers/classify.py on one rank, tested once an epoch."""
    chosen = {
        **common(settings, seed), "batch_size": settings.tiles_batch, "batch_steps": 1, "rate_schedule": "cosine",
        "max_it": settings.tiles_epochs * steps, "error_interval": steps,
    }  # fmt: skip
    words = [word for name, value in chosen.items() for word in (f"-{name}", str(value))]
    program = str(Path(classify.__file__))
    return finished_run([*LAUNCH, "-n", "1", sys.executable, "-m", "mpi4py", program, *words, *given], output)
