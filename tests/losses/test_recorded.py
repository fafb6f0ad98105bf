"""Recorded evaluations, with recorders that need no GPU."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from loss_cases import digits, sequential
from mpi4py import MPI
from torch import Tensor

from ddml.errors import InputError
from ddml.losses.module import ModuleLoss
from ddml.losses.recorded import Recorded
from ddml.numbers import Number, read
from solvers import Minimisation

COMM = MPI.COMM_SELF


class Queued(ModuleLoss):
    """Its numbers are tensors, as those of a GPU."""

    calls = 0

    def value_gradient(self, *arguments: Any) -> Number:
        type(self).calls += 1
        return torch.as_tensor(super().value_gradient(*arguments), dtype=torch.float64)


def queued() -> Queued:
    made = digits(sequential)
    return Queued(made.module, made.criterion, made.inputs, made.targets, 32)


class Memory:
    """A recorder that computes anew what it has seen, into memory that stays."""

    def __init__(self) -> None:
        self.recordings = self.replays = 0

    def __call__(self, evaluate: Callable[[], Number]) -> tuple[Number, Callable[[], None]]:
        self.recordings += 1
        value = evaluate()
        assert isinstance(value, Tensor)

        def replay() -> None:
            self.replays += 1
            value.copy_(torch.as_tensor(evaluate()))

        return value, replay


def near(loss: Queued, seed: int) -> Tensor:
    return loss.initial() + 0.1 * torch.randn(loss.size, generator=torch.Generator().manual_seed(seed)).double()


def test_a_replay_gives_the_plain_numbers_and_adds_the_gradient() -> None:
    loss, memory = queued(), Memory()
    recorded = Recorded(loss, near(loss, 0), memory)
    kept = []
    for seed in range(3):
        theta, found = near(loss, seed), torch.ones(loss.size, dtype=torch.float64)
        expected = torch.ones(loss.size, dtype=torch.float64)
        kept.append((recorded(theta, found), loss.value_gradient(theta, expected)))
        assert float((found - expected).abs().max()) < 1e-14
    assert len({float(value) for value, _ in kept}) == 3
    assert all(float(value) == float(plain) for value, plain in kept)  # none has been overwritten by the next
    assert memory.recordings == 1


def stale(evaluate: Callable[[], Number]) -> tuple[Number, Callable[[], None]]:
    return evaluate(), lambda: None


def refusing(evaluate: Callable[[], Number]) -> tuple[Number, Callable[[], None]]:
    raise RuntimeError("operation not permitted when stream is capturing\nCUDA kernel errors might be ...")


def reading(evaluate: Callable[[], Number]) -> tuple[Number, Callable[[], None]]:
    return read([evaluate()])[0], lambda: None


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (stale, "other numbers than the plain one"),
        (refusing, "cannot be recorded: operation not permitted when stream is capturing; leave -capture out"),
        (reading, "reads numbers before its end"),
    ],
)
def test_what_cannot_be_replayed_is_refused_in_one_line(record: Any, expected: str) -> None:
    loss = queued()
    with pytest.raises(InputError, match=expected) as refused:
        Recorded(loss, near(loss, 0), record)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("blocks", [0, 3])
def test_an_objective_records_parts_that_come_again(blocks: int) -> None:
    memory = Memory()
    made = Minimisation(queued(), "lbfgs", COMM, blocks=blocks, record=memory)
    plain = Minimisation(queued(), "lbfgs", COMM, blocks=blocks)
    g, h = made.x.duplicate(), made.x.duplicate()
    for step in range(4):
        made.x.shift(0.01)
        plain.x.shift(0.01)
        assert made.objective.value_gradient(made.x, g) == plain.objective.value_gradient(plain.x, h)
        assert (g.array_r == h.array_r).all()
        assert memory.recordings == (max(blocks, 1) if step else 0)
    assert memory.replays > 0
    # other samples are not those that were recorded
    made.objective.replace(made.objective.loss.sampled(torch.arange(0, 90, 2)))
    before = made.objective.value_gradient(made.x, g)
    assert made.objective.value_gradient(made.x, h) == before
    assert memory.recordings == 2 * max(blocks, 1)


def test_what_is_made_of_an_objective_records_nothing() -> None:
    memory = Memory()
    made = Minimisation(queued(), "lbfgs", COMM, blocks=0, record=memory)
    other, g = made.objective.derived(made.objective.loss), made.x.duplicate()
    for _ in range(3):
        other.value_gradient(made.x, g)
    assert memory.recordings == 0


def test_a_solver_finds_the_same_on_recordings() -> None:
    losses = []
    for record in (None, Memory()):
        made = Minimisation(queued(), "ssbroyden", COMM, blocks=0, record=record)
        made.tao.setMaximumIterations(5)
        made.tao.solve()
        losses.append(made.tao.getObjectiveValue())
        made.destroy()
    assert losses[0] == losses[1]
