"""Levels that see coarser images: what they take, on all samples and on batches, and what is refused."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from depth_cases import classification, images, objective_of
from mpi4py import MPI
from test_depth_levels import Own
from torch import Tensor

from ddml.errors import InputError
from ddml.hierarchy.depth import depth_hierarchy
from ddml.losses.module import ModuleLoss
from ddml.networks.depth import Source
from ddml.networks.euler import euler
from ddml.sampling import batches


def square(side: int, factor: int, blocks: int = 16) -> ModuleLoss:
    return classification(euler((1, side, side), 3, blocks, 3, 1.0, factor), (1, side, side), 20)


def summed(x: Tensor, cell: int) -> np.ndarray:
    """The sum over cells of a side, over that side."""
    count, channels, rows, columns = x.shape
    found = np.zeros((count, channels, rows // cell, columns // cell))
    for row, column in np.ndindex(rows, columns):
        found[:, :, row // cell, column // cell] += x[:, :, row, column].numpy() / cell
    return found


@pytest.mark.parametrize(
    ("side", "factor", "sides"),
    [(28, 2, [7, 7, 7, 14, 28]), (16, 2, [4, 4, 4, 8, 16]), (8, 2, [4, 4, 4, 4, 8]), (28, 4, [7, 7, 7, 7, 28]),
     (36, 3, [4, 4, 4, 12, 36]), (28, 7, [4, 4, 4, 4, 28]), (20, 2, [5, 5, 5, 10, 20]), (9, 2, None), (6, 2, None)],
)  # fmt: skip
def test_images_get_coarser_as_long_as_they_can(
    comm: MPI.Comm, side: int, factor: int, sides: list[int] | None
) -> None:
    if sides is None:
        with pytest.raises(InputError, match=f"-image_refinement {factor} must divide the sides .* leave 4 pixels"):
            square(side, factor)
        return
    loss = square(side, factor)
    hierarchy = depth_hierarchy(objective_of(loss, comm))
    for level, expected in zip(hierarchy.levels, sides, strict=True):
        coarse = level.objective.loss
        assert coarse.parameters[0].shape == (3, expected**2)
        assert coarse.inputs.numpy() == pytest.approx(summed(loss.inputs, side // expected), rel=1e-13, abs=1e-13)
    shares = [level.share for level in hierarchy.levels]
    assert shares == sorted(shares) and shares[0] < 0.5
    hierarchy.destroy()


def test_a_coarser_first_layer_gives_what_the_finer_one_does() -> None:
    """Its weights of cells, for pixels of equal weights."""
    coarse = images(12).module.coarsened(2)
    fine = images(12).module
    x = images(12).inputs
    with torch.no_grad():
        pixels = coarse.open.layer.weight.view(5, 2, 4, 8).repeat_interleave(2, 2).repeat_interleave(2, 3)
        fine.open.layer.weight.copy_(pixels.flatten(1) / 2)
        fine.open.layer.bias.copy_(coarse.open.layer.bias)
        assert torch.allclose(fine.open(x), coarse.open(coarse.coarse_inputs(x)), rtol=1e-12)
    again = fine.coarsened(2)
    assert torch.allclose(again.open.layer.weight, coarse.open.layer.weight, rtol=1e-14)


def test_images_of_batches_are_coarser_too(comm: MPI.Comm) -> None:
    loss = images()
    objective = objective_of(loss, comm, 3)
    values = {o.name: o.default for o in batches.OPTIONS} | {"batch_size": 10, "batch_overlap": 0.2, "batch_steps": 1}
    moving = batches.Batches(objective, SimpleNamespace(**values), seed=2)
    hierarchy = depth_hierarchy(objective, 3)
    seen = []
    for _ in range(3):
        hierarchy.follow()
        rows = torch.as_tensor(moving.rows)
        seen.append(tuple(moving.rows.tolist()))
        for level in hierarchy.levels[:-1]:
            expected = summed(loss.inputs[rows], 2)
            assert level.objective.loss.inputs.numpy() == pytest.approx(expected, rel=1e-13, abs=1e-13)
            assert torch.equal(level.objective.loss.targets, loss.targets[rows])
        assert torch.equal(hierarchy.levels[-1].objective.loss.inputs, loss.inputs[rows])
        moving.move(torch.empty(0))
    assert len(set(seen)) == 3
    hierarchy.destroy()


def test_shapes_that_are_no_images_are_refused() -> None:
    for shape in ((64,), (8, 8), (1, 8, 12, 2)):
        with pytest.raises(InputError, match="-image_refinement 2 must divide the sides of images"):
            euler(shape, 3, 4, 5, 1.0, 2)


class Pairs(Own):
    """A user's, whose coarser networks see 3 sums of 2 inputs."""

    entries: Any = torch.arange(15).view(5, 3).repeat_interleave(2, 1)

    def coarsened(self, factor: int) -> Any:
        coarse = type(self)(self.blocks // factor, self.gain / factor**0.5)
        coarse.start = torch.nn.Linear(3, 5)
        return coarse.double()

    def sources(self, factor: int) -> Any:
        return {"start.weight": Source("start.weight", 1.0, self.entries)} if self.blocks == 4 else {}

    def coarse_inputs(self, x: Any) -> Any:
        return x.view(-1, 3, 2).sum(dim=2)


class FailsOnInputs(Pairs):
    def coarse_inputs(self, x: Any) -> Any:
        raise OSError("no memory")


class FewerInputs(Pairs):
    def coarse_inputs(self, x: Any) -> Any:
        return super().coarse_inputs(x)[1:]


class NoInputs(Pairs):
    def coarse_inputs(self, x: Any) -> Any:
        return None


class OftenCopied(Pairs):
    entries = torch.zeros(5, 6, dtype=torch.int64)


class OutOfRange(Pairs):
    entries = Pairs.entries + 1


class FewEntries(Pairs):
    entries = torch.arange(15)


class Fractions(Pairs):
    entries = Pairs.entries.double()


def test_a_users_network_may_see_coarser_samples(comm: MPI.Comm) -> None:
    loss = classification(Pairs(), (6,))
    hierarchy = depth_hierarchy(objective_of(loss, comm), 2)
    coarse = hierarchy.levels[0].objective.loss
    assert torch.equal(coarse.inputs, loss.inputs[:, ::2] + loss.inputs[:, 1::2])
    assert hierarchy.transfers[0].stretch == pytest.approx(2**0.5)
    hierarchy.destroy()


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (FailsOnInputs, "coarse_inputs raised OSError: no memory"),
        (FewerInputs, r"coarse_inputs must give a tensor of 8 samples, it gave \(7, 3\)"),
        (NoInputs, "coarse_inputs must give a tensor of 8 samples, it gave NoneType"),
        (OftenCopied, "entries of start.weight .* must be 30 numbers from 0 to 14, each as often"),
        (OutOfRange, "must be 30 numbers from 0 to 14, each as often"),
        (FewEntries, "must be 30 numbers from 0 to 14, each as often"),
        (Fractions, "must be 30 numbers from 0 to 14, each as often"),
    ],
)
def test_a_users_mistakes_are_refused_in_words(comm: MPI.Comm, kind: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        depth_hierarchy(objective_of(classification(kind(), (6,)), comm), 2)
