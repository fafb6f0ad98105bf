"""The rivals of the bench: what they compute and what they are charged."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from launch import ROOT
from mpi4py import MPI
from torch import nn

from ddml.data import files
from ddml.data.scaling import Samples, Scaling
from ddml.errors import InputError
from ddml.layout import ParameterLayout
from ddml.networks.classifiers import mlp
from ddml.objectives.objective import Objective
from ddml.problems.classification import ClassificationLoss, TestSet
from ddml.sampling.batches import OPTIONS, Batches

sys.path.insert(0, str(ROOT / "drivers"))
import rivals

CPU = torch.device("cpu")


def made(batch_size: int = 300) -> tuple[ClassificationLoss, Batches | None, TestSet]:
    digits = files.digits()
    scaling = Scaling(digits, "unit", MPI.COMM_SELF)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = mlp((1, 8, 8), 10, [16]).double()
    train, test = (
        Samples(x, y, scaling, torch.float64, CPU)
        for x, y in ((digits.inputs, digits.labels), (digits.test_inputs, digits.test_labels))
    )
    loss = ClassificationLoss(module, train, 10, batch=100)
    objective = Objective(loss, ParameterLayout(loss.parameters, MPI.COMM_SELF))
    values = {option.name: option.default for option in OPTIONS}
    settings = SimpleNamespace(**{**values, "batch_size": batch_size, "batch_overlap": 0.1})
    batches = Batches(objective, settings, 3) if batch_size else None
    return loss, batches, TestSet(loss, test, MPI.COMM_SELF)


@pytest.mark.parametrize(("name", "rate"), [("adam", 1e-2), ("sgd", 0.1), ("muon", 0.02), ("lbfgs", 1.0)])
def test_rivals_learn_and_measure_at_the_marks(name: str, rate: float) -> None:
    loss, batches, test = made()
    before = loss.initial()
    history, theta = rivals.train(name, rate, loss, batches, 12, test, marks=(2, 6))
    work, accuracy = history["work"], history["accuracy"]
    assert work[-1] >= 12 > work[-2]
    assert np.array_equal(np.flatnonzero(np.isfinite(accuracy)), [*np.searchsorted(work, [2, 6]), len(work) - 1])
    assert loss.value(theta) < 0.8 * loss.value(before)
    assert history.last("test_loss") == test(theta)["test_loss"]
    assert torch.equal(loss.initial(), before)
    assert np.all(np.diff(history["time"]) > 0)


def test_gradient_descent_on_batches_is_what_it_says() -> None:
    loss, batches, test = made()
    _, others, _ = made()
    assert others is not None
    history, theta = rivals.train("sgd", 0.05, loss, batches, 0.9, test)
    expected, momentum, work = loss.initial(), torch.zeros(loss.size, dtype=torch.float64), []
    for value in history["loss"]:
        batch = loss.sampled(torch.as_tensor(others.rows))
        gradient = torch.zeros(loss.size, dtype=torch.float64)
        assert batch.value_gradient(expected, gradient) == pytest.approx(value, rel=1e-12)
        momentum = 0.9 * momentum + gradient
        expected = expected - 0.05 * momentum
        work.append(len(others.rows) / loss.count)
        others.move(expected)
    np.testing.assert_allclose(theta, expected, rtol=1e-10, atol=1e-13)
    np.testing.assert_allclose(history["work"], np.cumsum(work), rtol=1e-13)


def test_every_evaluation_of_a_search_is_charged() -> None:
    loss = made(0)[0]
    calls = []
    inner = loss.criterion

    def counting(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        calls.append(len(targets))
        return inner(outputs, targets)

    loss.criterion = counting
    history, _ = rivals.train("lbfgs", 1.0, loss, None, 8, lambda theta: {})
    assert history["work"][-1] == pytest.approx(sum(calls) / loss.count)


def test_what_is_refused() -> None:
    loss, batches, test = made()
    with pytest.raises(InputError, match="unknown rival 'rmsprop'; there are adam, sgd, muon, lbfgs"):
        rivals.train("rmsprop", 1e-3, loss, batches, 1, test)
    with pytest.raises(InputError, match="Muon needs a matrix"):
        rivals._muon(nn.Linear(3, 2), 0.1)
