"""Layers inserted into a network: against dense matrices, and that they change nothing it computes."""

import re
from typing import Any

import numpy as np
import pytest
import torch
from depth_cases import all_of, applied, dense, objective_of, pinn, put, random
from mpi4py import MPI
from torch import nn

from ddml.errors import InputError
from ddml.hierarchy.depth import DepthHierarchy, Insertion, depth_hierarchy
from ddml.losses.loss import Loss
from ddml.networks.tanh import TanhNetwork
from ddml.problems import Burgers, PDELoss

factors = pytest.mark.parametrize(("factor", "levels"), [(2, 3), (3, 2), (12, 2)])


def inserted(comm: MPI.Comm, factor: int, levels: int) -> DepthHierarchy:
    return depth_hierarchy(objective_of(pinn(12), comm, 3), levels, factor, inserts=True)


def written_out(fine: Loss, coarse: Loss, factor: int) -> tuple[np.ndarray, np.ndarray]:
    """Of parameters, and of steps: layer 1 + factor * i is layer 1 + i, what is between has zeros and its slope."""
    places = {p.name: p.range for p in coarse.parameters}
    of_parameters, of_steps = np.zeros((2, fine.size, coarse.size))
    for p in fine.parameters:
        number = int(re.findall(r"\d+", p.name)[0])
        if p.name.startswith("slopes"):
            found = of_parameters[p.range, places[f"slopes.{number // factor}"]] = np.eye(1)
            if number % factor == 0:
                of_steps[p.range, places[f"slopes.{number // factor}"]] = found
        elif number == 0 or (number - 1) % factor == 0:
            name = p.name.replace(str(number), str(0 if number == 0 else 1 + (number - 1) // factor))
            of_parameters[p.range, places[name]] = of_steps[p.range, places[name]] = np.eye(p.size)
    return of_parameters, of_steps


@factors
def test_insertions_are_dense_matrices(comm: MPI.Comm, factor: int, levels: int) -> None:
    hierarchy = inserted(comm, factor, levels)
    assert len(hierarchy.insertions) == levels - 1
    for number, transfer in enumerate(hierarchy.insertions):
        coarse, fine = (hierarchy.levels[k].objective for k in (number, number + 1))
        s, g = random(coarse.loss.size, 1), random(fine.loss.size, 2)
        of_parameters, of_steps = written_out(fine.loss, coarse.loss, factor)
        assert np.array_equal(of_steps.T @ of_parameters, np.eye(len(s)))
        for act, values, source, target, matrix in (
            (transfer.prolong, s, coarse, fine, of_parameters),
            (transfer.prolong_step, s, coarse, fine, of_steps),
            (transfer.restrict, g, fine, coarse, of_steps.T),
            (transfer.project, g, fine, coarse, of_steps.T),
        ):
            assert np.array_equal(applied(act, source, target, values), matrix @ values)  # on any number of ranks
    hierarchy.destroy()


@factors
def test_they_change_neither_loss_nor_gradient(comm: MPI.Comm, factor: int, levels: int) -> None:
    hierarchy = inserted(comm, factor, levels)
    theta, values, gradients = 0.5 * random(hierarchy.levels[0].objective.loss.size, 3), list[float](), list[Any]()
    for number, level in enumerate(hierarchy.levels):
        objective = level.objective
        x, g = put(objective, theta), objective.layout.vector()
        values.append(objective.value_gradient(x, g))
        gradients.append(all_of(objective, g))
        if number:
            below = hierarchy.levels[number - 1].objective
            restricted = applied(hierarchy.insertions[number - 1].restrict, objective, below, gradients[-1])
            assert restricted == pytest.approx(gradients[-2], rel=1e-9, abs=1e-11 * np.abs(gradients[-2]).max())
            assert np.linalg.norm(gradients[-1]) > 1.001 * np.linalg.norm(gradients[-2])  # new layers learn
        if number + 1 < levels:
            above = hierarchy.levels[number + 1].objective
            theta = applied(hierarchy.insertions[number].prolong, objective, above, theta)
    assert values == pytest.approx([values[0]] * levels, rel=1e-12)
    hierarchy.destroy()


class Wrong(TanhNetwork):
    """A network that says of its insertions what is wrong."""

    said: Any = {}

    def coarsened(self, factor: int) -> TanhNetwork:
        inputs, width, depth, outputs = self.sizes
        return TanhNetwork(inputs, width, depth // factor, outputs, True, True).double()

    def insertions(self, factor: int) -> dict[str, str | None]:
        return super().insertions(factor) | self.said


class Elsewhere(Wrong):
    said = {"maps.1.bias": "maps.9.bias"}


class OtherShape(Wrong):
    said = {"maps.1.bias": "maps.1.weight"}


class Forgotten(Wrong):
    said = {"maps.1.bias": None}


class Fails(Wrong):
    @property
    def said(self) -> Any:  # type: ignore[override]
        raise ValueError("not today")


def user(kind: type[nn.Module]) -> PDELoss:
    return PDELoss(Burgers(), kind(2, 5, 4, 1, residual=True, adaptive=True).double(), 20)


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("make", "said"),
    [
        (dense, "no layers can be inserted into a"),
        (lambda: user(Elsewhere), "maps.1.bias is equal to no maps.9.bias"),
        (lambda: user(OtherShape), "maps.1.bias is equal to no maps.1.weight of its shape"),
        (lambda: user(Forgotten), "no parameter is equal to maps.1.bias"),
        (lambda: user(Fails), r"insertions\(2\) raised ValueError: not today"),
    ],
)
def test_networks_without_them_are_refused_in_words(comm: MPI.Comm, make: Any, said: str) -> None:
    with torch.random.fork_rng(), pytest.raises(InputError, match=said):
        depth_hierarchy(objective_of(make(), comm), 2, inserts=True)


def test_there_are_none_unless_they_are_asked_for(comm: MPI.Comm) -> None:
    hierarchy = depth_hierarchy(objective_of(pinn(4), comm), 2)
    assert hierarchy.insertions == [] and not any(isinstance(one, Insertion) for one in hierarchy.transfers)
    hierarchy.destroy()
