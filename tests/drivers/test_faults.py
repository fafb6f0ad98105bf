"""Faults while a run is under way."""

from __future__ import annotations

import re
import time
from pathlib import Path

import numpy as np
import pytest
from launch import HERE, SMALL, content, launch

FAULTY = HERE / "faulty_problems.py"
LOCAL = HERE / "faulty_solvers.py"


def test_exception_on_one_rank_ends_all() -> None:
    options = ("-problem", f"{FAULTY}:RaisesOnOneRank", *SMALL, "-solver", "lbfgs", "-max_it", 1000)
    result = launch(2, *options, timeout=40, fresh=True)
    assert result.rc != 0
    assert "the second rank had enough" in result.err


SCRIPT = """
import torch
from mpi4py import MPI

import ddml
import solvers

x = torch.linspace(-1, 1, 200, dtype=torch.float64)[:, None]
network = torch.nn.Sequential(torch.nn.Linear(1, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)).double()
calls = 0


def criterion(found, given):
    global calls
    calls += 1
    if calls > 40 and MPI.COMM_WORLD.rank == 1:
        raise ValueError("the second rank had enough")
    return (found - given).square().sum(1)


loss = ddml.ModuleLoss(network, criterion, x, torch.sin(3 * x))
try:
    solvers.minimise(loss, "lbfgs", iterations=1000)
except HANDLED:
    pass
"""


@pytest.mark.parametrize("handled", ["Exception", "MemoryError"])
def test_a_script_ends_on_all_ranks_where_one_has_an_error(tmp_path: Path, handled: str) -> None:
    (script := tmp_path / "script.py").write_text(SCRIPT.replace("HANDLED", handled))
    result = launch(2, driver=str(script), timeout=40, fresh=True)
    assert result.rc != 0
    assert ("the second rank had enough" in result.err) == (handled == "MemoryError")


def test_trials_that_are_not_finite_are_rejected(tmp_path: Path) -> None:
    path = tmp_path / "run.h5"
    options = (*SMALL, "-solver", "aspqn", "-local_steps", "5", "-max_it", 10, "-output", path)
    result = launch(2, "-problem", f"{FAULTY}:NotEverywhereDefined", *options)
    assert result.rc == 0, result.err
    run = content(path)
    assert np.isfinite(run.theta).all() and np.isfinite(run.history["loss"]).all()
    assert run.history["loss"][-1] < run.history["loss"][0]
    assert (np.diff(run.history["loss"]) <= 0).all()


def test_state_that_is_not_finite_stops_with_the_last_good_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "run.h5"
    options = (*SMALL, "-solver", "lbfgs", "-max_it", 1000, "-output", path)
    result = launch(2, "-problem", f"{FAULTY}:BecomesNotANumber", *options)
    assert "no step along the direction decreases the loss" in result.out + result.err
    run = content(path)
    assert len(run.history["loss"]) > 1
    assert np.isfinite(run.theta).all() and np.isfinite(run.history["loss"]).all()


REFUSALS = (
    (f"-solver aspqn -local_solver {LOCAL}:CannotBeMade", 3),
    (f"-solver apts_weights -decomposition layers -local_solver {LOCAL}:Faulty -sub_fault 3", 4),
    (f"-solver apts_data -local_solver {LOCAL}:Faulty -sub_fault 0 -sub_alone", 2),
    (f"-solver mspqn -local_solver {LOCAL}:Faulty -sub_fault 2 -sub_alone", 3),
)


@pytest.mark.parametrize(
    ("options", "ranks"),
    [
        pytest.param(options, ranks, marks=[pytest.mark.long] * (ranks != often))
        for options, often in REFUSALS
        for ranks in (2, 3, 4)
    ],
)
def test_what_one_local_solver_refuses_ends_all(options: str, ranks: int) -> None:
    """On its group or on one rank of it, in the set-up or under way: one line, and nobody waits for ever."""
    result = launch(ranks, "-widths", 16, "-max_it", 50, *options.split(), driver="classify.py", timeout=60)
    end = time.time()
    assert result.rc == 1, result.err
    assert len(re.findall("^error: ", result.err, re.MULTILINE)) == 1, result.err
    assert "a local solver has had enough" in result.err and "Traceback" not in result.err
    assert end - min(map(float, re.findall(r"fault ([\d.]+)", result.err))) < 10
