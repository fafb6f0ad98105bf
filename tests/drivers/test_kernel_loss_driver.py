"""kernel.py -loss: machines of other losses stop, go on on any number of ranks and predict; refusals."""

from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from calling import call, check_refusal, refusal
from launch import assert_same, content
from mpi4py import MPI
from scipy.spatial.distance import cdist
from test_ranks import needs_three, train

from ddml.data.files import digits
from ddml.runs.opened import open_run
from solvers.kernel_machines.newton import PRECONDITIONERS

RUN = ("-data", "digits", "-samples", 300, "-subdomains", 4, "-lambda", 0.1, "-progress", "none", "-error_interval", 1)
KINDS = [(loss, pc) for loss in ("logistic", "squared_hinge") for pc in PRECONDITIONERS] + [("softmax", "pivots")]
STOPS = """
import os
import signal
import torch

calls = 0


def k(x, y):
    global calls
    calls += 1
    if calls == 900:
        os.kill(os.getpid(), signal.SIGTERM)
    return torch.exp(-torch.cdist(x, y) ** 2 / 4)
"""

TWO = """
import numpy as np


def two():
    x = np.random.default_rng(0).standard_normal((80, 3))
    y = (x[:, 0] > 0).astype(int)
    return {"inputs": x, "labels": y, "test_inputs": x, "test_labels": y, "classes": ["a", "b"]}
"""


def slopes(loss: str, f: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The derivatives of a loss by outputs, independently."""
    there = torch.tensor(f, requires_grad=True)
    signs = torch.tensor(2.0 * (labels[:, None] == np.arange(10)) - 1)
    value = {
        "logistic": lambda: torch.nn.functional.softplus(-signs * there).sum(),
        "squared_hinge": lambda: (torch.relu(1 - signs * there) ** 2).sum() / 2,
        "softmax": lambda: torch.nn.functional.cross_entropy(there, torch.tensor(labels), reduction="sum"),
    }[loss]()
    return torch.autograd.grad(value, there)[0].numpy()


@pytest.mark.ranks
@pytest.mark.parametrize(("loss", "preconditioner"), KINDS)
def test_the_gradient_of_the_machine_is_zero_on_any_number_of_ranks(
    loss: str, preconditioner: str, comm: MPI.Comm, shared_tmp: Path
) -> None:
    path = shared_tmp / "run.h5"
    words = ("-loss", loss, "-preconditioner", preconditioner, "-kernel_width", 1.2, "-rtol", 1e-11)
    assert call("kernel", *RUN, *words, "-output", path) == 0
    comm.barrier()
    run, data = open_run(path), digits()
    x, test = (values.reshape(len(values), -1) / 16 for values in (data.inputs[:300], data.test_inputs))
    K, there = (np.exp(-(cdist(a, x) ** 2) / (2 * 1.2**2)) for a in (x, test))
    alpha = run.theta.numpy().reshape(300, 10)[np.argsort(h5py.File(path)["solver/solver/domain/cores"][:])]
    labels = data.labels[:300]
    gradient, scale = (slopes(loss, f, labels) for f in (K @ alpha, 0 * alpha))
    assert np.linalg.norm(gradient + 0.1 * alpha) < 2e-11 * np.linalg.norm(scale)
    right = ((there @ alpha).argmax(axis=1) == data.test_labels).mean()
    assert right > 0.85
    assert run.history["accuracy"][-1] == pytest.approx(right)
    module = run.network()
    assert (module(torch.from_numpy(data.test_inputs)).argmax(dim=1).numpy() == (there @ alpha).argmax(axis=1)).all()
    assert (np.diff(run.history["loss"]) <= 0).all()
    assert (np.diff(run.history["work"]) > 0).all()
    comm.barrier()


@pytest.mark.ranks
@needs_three
@pytest.mark.parametrize(("loss", "preconditioner"), [KINDS[0], KINDS[3], KINDS[4]])
def test_other_numbers_of_ranks_go_on_to_the_last_bit(
    loss: str, preconditioner: str, comm: MPI.Comm, shared_tmp: Path
) -> None:
    whole, parts = shared_tmp / "whole.h5", shared_tmp / "parts.h5"
    words = (*RUN[:8], "-loss", loss, "-preconditioner", preconditioner, "-dtype", "float32")
    train("kernel", whole, 1, 1000, *words)
    for ranks, iterations in ((1, 2), (3, 3), (2, 1000)):
        train("kernel", parts, ranks, iterations, *words)
    assert_same(whole, parts)
    comm.barrier()


@pytest.mark.skipif(MPI.COMM_WORLD.size > 1, reason="one rank is enough")
def test_a_signal_in_a_step_stops_and_a_smaller_tolerance_goes_on(tmp_path: Path) -> None:
    (tmp_path / "stops.py").write_text(STOPS)
    whole, parts = tmp_path / "whole.h5", tmp_path / "parts.h5"
    words = (*RUN, "-loss", "logistic", "-kernel_memory", 3e5, "-preconditioner", "none", "-kernel")
    assert call("kernel", *words, f"{tmp_path / 'stops.py'}:k", "-output", parts) == 0
    steps = len(content(parts).history["loss"])
    assert call("kernel", "-restart", parts, "-trust", "-progress", "none") == 0
    (tmp_path / "stops.py").write_text(STOPS.replace("== 900", "< 0"))
    assert call("kernel", *words, f"{tmp_path / 'stops.py'}:k", "-output", whole) == 0
    assert 1 < steps < len(content(whole).history["loss"])
    for name in ("loss", "work", "residual"):
        assert (content(whole).history[name] == content(parts).history[name]).all()
    assert open_run(whole).theta.tolist() == open_run(parts).theta.tolist()
    assert call("kernel", "-restart", parts, "-trust", "-rtol", 1e-10, "-progress", "none") == 0
    assert content(parts).history["residual"][-1] < 1e-10


@pytest.mark.skipif(MPI.COMM_WORLD.size > 1, reason="one rank is enough")
def test_a_machine_of_another_loss_is_a_first_guess(tmp_path: Path) -> None:
    begun, afresh, path = (tmp_path / f"{name}.h5" for name in ("begun", "afresh", "run"))
    words = (*RUN, "-kernel_width", 1.2)
    assert call("kernel", *words, "-output", path) == 0
    assert call("kernel", *words, "-loss", "squared_hinge", "-start", path, "-output", begun) == 0
    assert call("kernel", *words, "-loss", "squared_hinge", "-output", afresh) == 0
    first, other = (content(name).history["loss"] for name in (begun, afresh))
    assert first[0] < 0.9 * other[0]
    assert first[-1] == pytest.approx(other[-1], rel=1e-6)


@pytest.mark.skipif(MPI.COMM_WORLD.size > 1, reason="one rank is enough")
def test_two_classes_in_one_column_or_two(tmp_path: Path) -> None:
    (tmp_path / "two.py").write_text(TWO)
    words = ("-data", f"{tmp_path / 'two.py'}:two", "-subdomains", 2, "-lambda", 0.1, "-progress", "none")
    path, other = tmp_path / "run.h5", tmp_path / "other.h5"
    assert call("kernel", *words, "-loss", "logistic", "-output", path) == 0
    assert call("kernel", *words, "-loss", "softmax", "-output", other) == 0
    assert [open_run(p).theta.numel() for p in (path, other)] == [80, 160]
    for found in (path, other):
        assert open_run(found).history["accuracy"][-1] > 0.9
    assert "has 1 outputs, and this one 2" in refusal("kernel", *words, "-loss", "softmax", "-start", path)


BAD = {
    "loss": (("-loss", "nonsense"), "one of squared, logistic"),
    "no lambda": (("-loss", "logistic", "-lambda", 0), "needs a lambda above 0"),
    "solver": (("-loss", "logistic", "-solver", "d3l"), "is for -solver ksp"),
    "coupled": (("-loss", "softmax", "-preconditioner", "schwarz"), "couples columns"),
    "preconditioner of a loss": (
        ("-loss", "logistic", "-preconditioner", "nystrom"),
        "there are pivots, schwarz",
    ),
    "preconditioner": (("-preconditioner", "pivots"), "is for other losses"),
    "pivots": (("-loss", "softmax", "-coarse_rank", 301), "1 to 300 pivots"),
    "memory": (("-loss", "squared_hinge", "-kernel_memory", 3e5), "memory limit leaves"),
    "options of others": (("-loss", "logistic", "-schwarz", "plain"), "-schwarz"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_named_in_one_line_on_all_ranks(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    options, words = BAD[name]
    check_refusal("kernel", [*map(str, RUN), *map(str, options)], words, tmp_path, capfd)
