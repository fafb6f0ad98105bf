"""What the tests of divided classifiers share: runs of digits and of solids, and what they leave."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import h5py
import numpy as np
from calling import call, classify, command_line
from common import training
from mpi4py import MPI

DIGITS = ("-tiles", "2x2", "-tile_overlap", "1", "-network", "vgg", "-depth", "1", "-width", "4", "-samples", "120")
SIXTEEN = (*DIGITS[4:], "-tiles", "4x4", "-tile_overlap", "2")

# networks that stop their process after so many calls of all of them, or one that fails, where a file asks for it
USER = """
import os
import signal
from pathlib import Path

from torch import nn

HERE = Path(__file__).parent
CALLS = []


class Net(nn.Sequential):
    def __init__(self, shape, classes, width):
        pixels = shape[1] * shape[2]
        super().__init__(nn.Flatten(), nn.Linear(pixels, width), nn.Tanh(), nn.Linear(width, classes))
        self.shape, self.calls = shape, 0

    def forward(self, x):
        self.calls += 1
        stop = HERE / f"stop_{os.getpid()}"
        if stop.exists():
            CALLS.append(self)
        if len(CALLS) > 0 and len(CALLS) >= int(stop.read_text()):
            stop.unlink()
            CALLS.clear()
            os.kill(os.getpid(), signal.SIGTERM)
        poison = HERE / "poison"
        bad = self.calls > 30 and poison.exists() and poison.read_text() == str(self.shape)
        return super().forward(x) * (float("nan") if bad else 1.0)


def tied(shape, classes, width=4, depth=1):
    return nn.Sequential(nn.Flatten(), nn.Linear(shape[0] * shape[1] * shape[2], classes))
"""


def train(path: Path, comm: MPI.Comm, iterations: int, *options: object) -> None:
    """Run so many iterations a network, or to so many from a run file that is there. Collective on ``comm``."""
    where = comm.bcast("-restart" if path.exists() else "-output")
    phase = ("-phase", "local") if "-tiles" in options else ()
    assert call("classify", where, path, *phase, *options, "-max_it", iterations, comm=comm) == 0
    comm.barrier()


def state(node: Any) -> Any:
    """What a group of a run file holds."""
    if isinstance(node, h5py.Group):
        return {name: state(child) for name, child in node.items()}
    return node[()] if node.shape is not None else None


def content(path: Path) -> SimpleNamespace:
    """Parameters, history, state and attributes of a run file."""
    with h5py.File(path, "r") as file:
        history = {name: column[()] for name, column in file["history"].items()}
        return SimpleNamespace(
            theta=file["parameters/theta"][()], names=[n.decode() for n in file["parameters/names"][()]],
            history=history, state=state(file["solver"]), attributes=dict(file.attrs),
        )  # fmt: skip


def flattened(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """All arrays and numbers in a state by their names, but for times."""
    if isinstance(value, dict):
        for key, child in value.items():
            yield from flattened(child, f"{name}/{key}")
    elif not name.endswith("/time"):
        yield name, value


def assert_same(one: Path, other: Path) -> None:
    """Two run files hold the same networks, which came about in the same way, to the last bit."""
    a, b = content(one), content(other)
    assert a.theta.tobytes() == b.theta.tobytes() and a.names == b.names
    first, second = (dict(flattened(found.state)) for found in (a, b))
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert np.asarray(value).tobytes() == np.asarray(second[name]).tobytes(), name
    for name in ("iteration", "accuracy", "work"):
        assert a.history[name].tobytes() == b.history[name].tobytes(), name


@contextmanager
def begun(comm: MPI.Comm, *options: object) -> Iterator[tuple[Any, Any, Any]]:
    """Settings, limits and the start of a run, as the driver has them."""
    words = [str(option) for option in options]
    with command_line("classify", words), training.started(comm, "classify", classify.OPTIONS, classify.LIMITS) as all_:
        yield all_
