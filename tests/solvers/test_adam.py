"""Adam is torch's, on all samples and on batches, and evaluates once an iteration."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from classifiers import classifier, value_gradient
from mpi4py import MPI
from numpy.typing import NDArray
from petsc4py import PETSc
from torch.optim.lr_scheduler import CosineAnnealingLR
from whole_runs import Training, assert_goes_on, make_batches

import solvers
from ddml.errors import InputError
from ddml.problems.classification import ClassificationLoss

Train = Callable[..., SimpleNamespace]
SETTINGS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "another rate": {"rate": 0.1},
    "no memory of gradients": {"beta1": 0.0, "rate": 1e-2},
    "no memory of squares": {"beta2": 0.0, "eps": 1e-2},
    "eps that counts": {"eps": 0.5, "beta1": 0.5},
}


class Torch:
    """torch.optim.Adam on the parameters of a loss."""

    def __init__(self, start: NDArray[np.float64], rate: float = 3e-3, beta1: float = 0.9, beta2: float = 0.999,
                 eps: float = 1e-8) -> None:  # fmt: skip
        self.theta = torch.tensor(start, requires_grad=True)
        self.optimizer = torch.optim.Adam([self.theta], lr=rate, betas=(beta1, beta2), eps=eps)

    def step(self, loss: Any) -> NDArray[np.float64]:
        """The parameters behind a step."""
        self.theta.grad = torch.as_tensor(value_gradient(loss, self.theta.detach().numpy())[1])
        self.optimizer.step()
        return self.theta.detach().numpy().copy()


@pytest.mark.parametrize("name", SETTINGS)
def test_iterates_are_those_of_torch(train: Train, name: str) -> None:
    loss = classifier()
    run, other = train(loss, "adam", 40, **SETTINGS[name]), Torch(loss.initial().numpy(), **SETTINGS[name])
    for k in range(1, 41):
        assert np.abs(run.theta[k] - other.step(loss)).max() <= 1e-12
    assert run.gradients[-1] == 41


@pytest.mark.parametrize(("given", "length"), [({}, 20), ({"rate_iterations": 9}, 9), ({"rate_iterations": 50}, 50)])
def test_the_rate_goes_down_as_torch_has_it(train: Train, given: dict[str, int], length: int) -> None:
    loss = classifier()
    run = train(loss, "adam", 20, rate=0.05, rate_schedule="cosine", **given)
    other = Torch(loss.initial().numpy(), 0.05)
    schedule = CosineAnnealingLR(other.optimizer, length)
    for k in range(1, min(length, 20) + 1):
        assert run.steps[k] == pytest.approx(schedule.get_last_lr()[0], rel=1e-12, abs=1e-15)
        assert np.abs(run.theta[k] - other.step(loss)).max() <= 1e-12
        schedule.step()
    assert np.array_equal(run.theta[min(length, 20)], run.theta[20])  # the schedule is over


@pytest.mark.ranks
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("size", [12, 25, 41])
def test_batches_are_those_of_torch(comm: MPI.Comm, prefix: str, size: int, steps: int) -> None:
    settings = {"blocks": 4, "batch_size": size, "batch_steps": steps, "batch_overlap": 0.1}
    loss, moving = classifier(), make_batches(classifier(), comm, **settings)
    run, batches = Training(moving, prefix, "adam", max_it=14), make_batches(loss, comm, **settings)
    other, rows = Torch(loss.initial().numpy()), []
    for k in range(14):
        expected = other.step(loss.sampled(torch.as_tensor(batches.rows)))
        rows.append(len(batches.rows))
        if (k + 1) % steps == 0:
            batches.move(torch.as_tensor(expected))
    work = run.run.history["work"]
    theta = np.frombuffer(run.result()[1])
    assert np.abs(theta - expected).max() <= 1e-12
    assert moving.objective.work.gradients == 15
    assert work[-1] == pytest.approx((sum(rows) + rows[0]) / 60)


@pytest.mark.ranks
@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("stop", [1, 4, 7])
def test_a_restart_between_batches_is_exact(
    comm: MPI.Comm, prefix: str, shared_tmp: Path, steps: int, stop: int
) -> None:
    def made(comm: MPI.Comm) -> Any:
        return make_batches(classifier(), comm, batch_size=25, batch_steps=steps)

    for name, value in (("rate_schedule", "cosine"), ("rate_iterations", 12)):
        PETSc.Options().setValue(prefix + name, value)

    def trained(comm: MPI.Comm, **limits: Any) -> Training:
        return Training(made(comm), prefix, "adam", **limits)

    assert_goes_on(trained, comm, str(shared_tmp / "run.h5"), 11, [stop])


def test_minimizer_follows_a_schedule_of_torch_or_a_given_length() -> None:
    network, inputs = torch.nn.Linear(3, 1).double(), torch.randn(9, 3, dtype=torch.float64)

    def closure() -> torch.Tensor:
        loss = network(inputs).square().mean()
        loss.backward()
        return loss

    optimizer = solvers.Minimizer(network, "adam", MPI.COMM_SELF, max_iter=1, lr=0.1)
    schedule = CosineAnnealingLR(optimizer, 5)
    losses = []
    for _ in range(5):
        losses.append(float(optimizer.step(closure)))
        schedule.step()
    assert losses == sorted(losses, reverse=True)
    own = solvers.Minimizer(network, "adam", MPI.COMM_SELF, max_iter=1, rate_schedule="cosine")
    own.step(closure)
    with pytest.raises(InputError, match="cosine over several solves needs -rate_iterations"):
        own.step(closure)
    with pytest.raises(InputError, match="no learning rate"):
        solvers.Minimizer(network, "adam", MPI.COMM_SELF, lr=0.1, rate_schedule="cosine")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"beta1": 1}, "option -beta1 must be below 1, got 1"),
        ({"beta2": 1.5}, "option -beta2 must be below 1"),
        ({"beta1": "nan"}, "option -beta1 must be 0 or more"),
        ({"beta2": -0.1}, "option -beta2 must be 0 or more"),
        ({"rate": 0}, "option -rate must be more than 0"),
        ({"eps": 0}, "option -eps must be more than 0"),
        ({"rate_schedule": "linear"}, "option -rate_schedule must be one of constant, cosine"),
        ({"rate_iterations": 0}, "option -rate_iterations must be 1 or more"),
    ],
)
def test_settings_that_cannot_be_are_refused(comm: MPI.Comm, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        solvers.minimise(classifier(), "adam", comm, settings)


@pytest.mark.parametrize("batches", [{}, {"batch_size": 20, "batch_steps": 1}])
def test_a_loss_that_is_not_finite_ends_it_where_it_was(comm: MPI.Comm, batches: dict[str, int]) -> None:
    class Steep(ClassificationLoss):
        """Not finite far from where it begins."""

        def value(self, theta: Any, kept: Any = None) -> Any:
            return super().value(theta, kept) if self._near(theta) else float("nan")

        def value_gradient(self, theta: Any, gradient: Any, kept: Any = None, active: Any = None) -> Any:
            found = super().value_gradient(theta, gradient, kept, active)
            return found if self._near(theta) else float("nan")

        def _near(self, theta: Any) -> bool:
            return bool((theta - START).abs().max() < 0.35)

    like = classifier()
    START = like.initial()
    loss = Steep(like.module, like.samples, 3)
    result = solvers.minimise(loss, "adam", comm, {"rate": 0.1, **batches}, iterations=50)
    assert result.reason == "DIVERGED_NAN" and not result.success
    assert 1 <= result.iterations < 6
    assert np.isfinite(result.losses).all() and result.theta.isfinite().all()
