"""Terms that cannot be meant are refused when a problem is loaded, naming the term, or noted."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from mpi4py import MPI
from torch import Tensor

from ddml.errors import InputError
from ddml.networks.tanh import TanhNetwork
from ddml.problems import PDE, Face, Interior, PDELoss, Periodic, Points, Term
from ddml.problems.pde.accuracy import SolutionError, reference

SOME = np.random.default_rng(0).uniform([0.0, -1.0], [3600.0, 1.0], (6, 2))


class Stated(PDE):
    """Time in seconds, so that the axes differ."""

    domain = {"t": (0, 3600), "x": (-1, 1)}

    def __init__(self, *terms: Any) -> None:
        self.stated = terms

    def residual(self, u: Any, t: Tensor, x: Tensor, **data: Tensor) -> Tensor:
        return u.t - u.xx - sum(data.values())

    def terms(self) -> list[Term]:
        return [Term(self.residual), *self.stated]


def term(where: Any = None, weight: Any = 1.0) -> Term:
    return Term(lambda u, t, x, **data: u - sum(data.values()), where or Interior(), weight, "wall")


def loss_of(problem: PDE) -> PDELoss:
    network = TanhNetwork(len(problem.domain), 4, 2, 1).double()
    network.reset_parameters(torch.Generator().manual_seed(0))
    return PDELoss(problem, network, 20)


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        (term(Face(x=2)), r"term wall: the face x = 2 is outside the domain, where x is in \[-1, 1\]"),
        (term(Face(t=-1e-2)), "term wall: the face t = -0.01 is outside"),
        (term(Face(t=3601)), "term wall: the face t = 3601 is outside"),
        (term(Face(x=float("nan"))), "term wall: the face x = nan is outside"),
        (term(Face(x="left")), "term wall: the face x must be a number; got 'left'"),
        (term(Face(y=0)), "term wall: no coordinate 'y', there are t, x"),
        (term(Periodic("y")), "term wall: no coordinate 'y'"),
        (term(Periodic("x", 0)), "term wall: the number of points must be 1 or more; got 0"),
        (term(Interior(-3)), "term wall: the number of points must be 1 or more; got -3"),
        (term(Interior(2.5)), "term wall: the number of points must be 1 or more; got 2.5"),  # type: ignore[arg-type]
        (term(Interior), r"term wall: where must be Interior\(\), .* write Interior\(\.\.\.\)"),
        (term("everywhere"), "term wall: where must be .* got 'everywhere'"),
        (term(weight=-1.0), "term wall: the weight must be a finite number above 0; got -1.0"),
        (term(weight=0), "term wall: the weight must be"),
        (term(weight=float("nan")), "term wall: the weight must be"),
        (term(weight=np.inf), "term wall: the weight must be"),
        (term(weight="1"), "term wall: the weight must be"),
        (term(weight=None), "term wall: the weight must be"),
        (term(Points(np.empty((0, 2)))), "term wall has no points"),
        (term(Points([])), r"term wall: points must be \(M, 2\), got \(1, 0\)"),
        (term(Points(SOME[:, ::-1])), "term wall: points are outside .* the columns must be in the order t, x"),
        (term(Points(SOME * [1000, 1])), "term wall: points are outside .*: are the units the same|units the same"),
        (term(Points([[0.0, 1.1]])), "term wall: points are outside the domain, x from 1.1 to 1.1"),
        (term(Points(SOME.T)), r"term wall: points must be \(M, 2\), got \(2, 6\)"),
        (term(Points(SOME * [1, np.nan])), "term wall: coordinate x is not finite at 6 of 6 points"),
        (term(Points(SOME, c=[0, 1, 2, np.inf, 4, 5])), "term wall: data 'c' is not finite at 1 of 6 points"),
        (term(Points(SOME, c=np.zeros((6, 2)))), r"term wall: data 'c' must be one number a point, got \(6, 2\)"),
        (Term(0.0), "term residual: the residual must be a function, not what it gives; got 0.0"),  # type: ignore[arg-type]
        (Interior(), "Stated.terms must return a list of Term; number 1 is Interior"),
    ],
)
def test_what_cannot_be_meant_is_refused(wrong: Any, expected: str) -> None:
    with pytest.raises(InputError, match=expected) as refused:
        loss_of(Stated(wrong))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (term(Points(SOME, c=np.full(6, 293.0))), "term wall: all 6 values of 'c' are 293"),
        (term(Points(SOME / [3600, 1])), "term wall: t of its points is from .* only, in a domain from 0 to 3600"),
        (term(Points(SOME * [1, 1e-3])), "term wall: x of its points is from .* are the units the same"),
    ],
)
def test_what_may_not_be_meant_is_noted(given: Term, expected: str) -> None:
    (note,) = loss_of(Stated(given)).notes
    assert re.match(expected, note)


@pytest.mark.parametrize(
    "given",
    [
        term(Face(x=-1)),
        term(Face(x=0.25, count=3), np.float64(2)),
        term(Face(x=1 + 1e-9)),
        term(Periodic("x"), 1e-9),
        term(Interior(np.int64(7)), 1e9),
        term(Points([[3600, 1.0]], c=[0.0])),
        term(Points(SOME * [0, 1], c=SOME[:, :1])),
        term(Points(SOME * (1 + 1e-8), c=SOME[:, 1])),
    ],
)
def test_what_may_be_meant_is_taken_in_silence(given: Term) -> None:
    assert loss_of(Stated(given)).notes == []


class Masked(PDE):
    domain = {"x": (0, 1)}

    def __init__(self, exact: Any) -> None:
        self.known = exact

    def residual(self, u: Any, x: Tensor) -> Tensor:
        return u.xx

    def exact(self, x: Tensor) -> Any:
        return self.known(x)


@pytest.mark.ranks
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("blocks", [0, 7])
def test_the_error_is_that_over_the_points_where_the_solution_is_known(comm: MPI.Comm, bad: float, blocks: int) -> None:
    loss = loss_of(Masked(lambda x: torch.where(x < 0.5, torch.cos(x), bad)))
    found = SolutionError(loss, comm, 100, blocks)(loss.initial())["error"]
    points = np.linspace(0, 1, 100)[:50]
    fields = loss.fields(loss.initial(), points[:, None])[:, 0]
    expected = np.linalg.norm(fields - np.cos(points)) / np.linalg.norm(np.cos(points))
    assert found == pytest.approx(expected, rel=1e-12)
    assert loss.notes == ["exact is not finite at 0.5 of the points: the error is that over the others"]
    if blocks:
        assert found == SolutionError(loss, MPI.COMM_SELF, 100, blocks)(loss.initial())["error"]


def test_no_solution_at_all_is_refused_or_noted() -> None:
    with pytest.raises(InputError, match="exact is finite nowhere"):
        SolutionError(loss_of(Masked(lambda x: x * np.nan)), MPI.COMM_SELF, 100)
    loss = loss_of(Masked(lambda x: None))
    assert SolutionError(loss, MPI.COMM_SELF, 100)(loss.initial()) == {}
    assert loss.notes == ["exact gives None (is there a return?): no error is measured"]
    loss = loss_of(Masked(lambda x: 0 * x))
    assert SolutionError(loss, MPI.COMM_SELF, 100)(loss.initial())["error"] == np.inf
    assert loss.notes == ["exact is zero: there are no errors relative to it"]
    unknown = loss_of(Stated())
    assert SolutionError(unknown, MPI.COMM_SELF, 100)(unknown.initial()) == {}
    assert unknown.notes == []


@pytest.mark.parametrize("dimension", [1, 3, 4, 10, 40, 45])
def test_points_of_any_number_of_coordinates_are_inside(dimension: int) -> None:
    letters = "abcdefghijklmnopqrstvwxyzABCDEFGHIJKLMNOPQRST"[:dimension]

    class Laplace(PDE):
        domain = {letter: (-1.0 - k, 2.0) for k, letter in enumerate(letters)}

        def residual(self, u: Any, *x: Tensor) -> Tensor:
            return u.value + getattr(u, letters[0] * 2) + getattr(u, letters[-1])

        def terms(self) -> list[Term]:
            return [Term(self.residual), Term(self.residual, Face(count=7, **{letters[-1]: 2.0}))]

        def exact(self, *x: Tensor) -> Tensor:
            return sum(x)  # type: ignore[return-value]

    problem = Laplace()
    low, high = np.array(problem.bounds).T
    loss = loss_of(problem)
    inner = loss.sets[0].coordinates.numpy().T
    assert inner.shape == (20, dimension)
    assert ((inner > low) & (inner < high)).all()
    assert len(np.unique(inner[:, -1])) == 20
    assert (loss.sets[1].coordinates[-1] == 2.0).all()
    assert np.isfinite(loss.value(loss.initial()))
    measured, values = reference(problem, 500)
    assert values is not None
    assert ((measured >= low) & (measured <= high)).all()
    np.testing.assert_allclose(values[:, 0], measured.sum(axis=1), rtol=1e-12, atol=1e-12)
    outside = ((measured == low) | (measured == high)).any(axis=1)
    assert outside.any() == (dimension <= 3)
    middle = (measured - low) / (high - low)
    assert np.abs(middle.mean(axis=0) - 0.5).max() < 0.2
