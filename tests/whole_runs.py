"""Runs with samples that change, in this process and as drivers make them."""

import os
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
from mpi4py import MPI
from one_rank import on_one_rank

import ddml.runs.run
from ddml.layout import ParameterLayout
from ddml.losses.loss import Loss
from ddml.objectives.objective import Objective
from ddml.sampling.batches import OPTIONS, Batches
from solvers import Minimisation


def make_batches(loss: Loss, comm: MPI.Comm, blocks: int = 4, seed: int = 5, **settings: Any) -> Batches:
    """Batches of an objective."""
    layout = ParameterLayout(loss.parameters, comm)
    values = {o.name: o.default for o in OPTIONS} | {"batch_size": 30} | settings
    return Batches(Objective(loss, layout, blocks=blocks), SimpleNamespace(**values), seed)


class Training:
    """A run of a solver, from beginning to end."""

    def __init__(self, moving: Any, prefix: str, solver: str, **limits: Any) -> None:
        self.moving, self.objective = moving, moving.objective
        made = Minimisation(self.objective, solver, prefix=prefix)
        self.x, self.tao = made.x, made.tao
        settings = {o.name: o.default for o in ddml.runs.run.OPTIONS} | {"progress": "none"} | limits
        self.run = ddml.runs.run.Run(
            self.objective, self.tao, self.x, SimpleNamespace(**settings),
            {"solver": solver, "driver": "t", "problem": "b"}, lambda theta: {}, moving,
            solver=made.context,
        )  # fmt: skip
        self.good = self.run.execute()

    def result(self) -> tuple[bytes, bytes, bytes]:
        """History, parameters and what samples are drawn from, to the last bit; the run's objects are destroyed."""
        history = self.run.history
        values = np.array([history[name] for name in ("iteration", "loss", "gradient_norm", "step", "work")])
        full = self.objective.layout.gather(self.x).numpy().copy()
        self.tao.destroy()
        self.x.destroy()
        return values.tobytes(), full.tobytes(), _bytes(self.moving.state())


def assert_goes_on(trained: Callable[..., Training], comm: MPI.Comm, file: str, end: int, stops: Sequence[int]) -> None:
    """Runs that stop at these iterations and go on to the end have the bits of one, on one rank, that does not stop.

    ``trained`` takes a communicator and limits. On several ranks one stop is enough; ``make test-long`` has them all,
    and a run that does not stop. Collective.
    """
    expected = on_one_rank(lambda one: trained(one, max_it=end).result())
    if comm.size > 1:
        if os.environ.get("DDML_LONG"):
            assert trained(comm, max_it=end).result() == expected
        else:
            stops = stops[len(stops) // 2 :][:1]
    for stop in stops:
        trained(comm, max_it=stop, output=file, overwrite=True).result()
        assert trained(comm, max_it=end, restart=file).result() == expected


def _bytes(state: Any) -> bytes:
    if isinstance(state, dict):
        return b"".join(_bytes(state[name]) for name in sorted(state))
    return np.asarray(state).tobytes()
