"""Depth hierarchies: transfers against dense matrices, coarse objectives against networks written out, and ranks."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from depth_cases import (
    HORIZON,
    Diffusion,
    all_of,
    applied,
    cases,
    dense,
    factors,
    made,
    objective_of,
    pinn,
    prolongation,
    put,
    random,
    written_out,
)
from mpi4py import MPI

from ddml.hierarchy.depth import depth_hierarchy
from ddml.jets.compiled import CompiledJets
from ddml.losses.loss import Loss
from ddml.norms.build import modular_norm
from ddml.objectives.composed import shifted
from ddml.objectives.residual import ResidualObjective
from ddml.problems import Burgers, PDELoss


@factors
@cases
def test_transfers_are_dense_matrices(comm: MPI.Comm, name: str, factor: int, levels: int) -> None:
    hierarchy = made(name, comm, levels, factor)
    assert len(hierarchy) == levels
    for number, transfer in enumerate(hierarchy.transfers):
        coarse, fine = (hierarchy.levels[k].objective for k in (number, number + 1))
        s, g = random(coarse.loss.size, 1), random(fine.loss.size, 2)
        matrix = prolongation(fine.loss, coarse.loss, factor)
        if name in ("dense", "conv", "images"):
            assert np.allclose(matrix.T @ matrix, np.eye(len(s)), rtol=0, atol=1e-14)  # isometries
        along = applied(transfer.prolong, coarse, fine, s)
        back = applied(transfer.restrict, fine, coarse, g)
        mean = applied(transfer.project, fine, coarse, g)
        assert along == pytest.approx(matrix @ s, rel=1e-13, abs=1e-13)
        assert back == pytest.approx(matrix.T @ g, rel=1e-13, abs=1e-13)
        assert mean == pytest.approx(np.linalg.pinv(matrix) @ g, rel=1e-12, abs=1e-12)
        assert along @ g == pytest.approx(s @ back, rel=1e-13)
        assert applied(transfer.project, fine, coarse, along) == pytest.approx(s, rel=1e-14, abs=1e-14)
        assert transfer.stretch == pytest.approx(np.linalg.norm(matrix, 2), rel=1e-14)
    hierarchy.destroy()


@cases
def test_gradients_agree_to_first_order_on_all_levels(comm: MPI.Comm, name: str) -> None:
    """<grad h_l(theta_0), s> = <grad h_l+1, I s>, h_l = L_l + <R grad h_l+1 - grad L_l(theta_0), theta - theta_0>."""
    hierarchy = made(name, comm, 3)
    finest = hierarchy.levels[-1].objective
    h, theta = finest, put(finest, finest.loss.initial().numpy() + 0.1 * random(finest.loss.size, 3))
    for number in (1, 0):
        coarse, transfer = hierarchy.levels[number].objective, hierarchy.transfers[number]
        g, theta0, dg, found = h.layout.vector(), *(coarse.layout.vector() for _ in range(3))
        h.value_gradient(theta, g)
        transfer.project(theta, theta0)
        transfer.restrict(g, dg)
        coarse.value_gradient(theta0, found)
        dg.axpy(-1.0, found)
        below = shifted(coarse, dg, theta0)
        below.value_gradient(theta0, found)
        s = random(coarse.loss.size, 4 + number)
        along = applied(transfer.prolong, coarse, h, s)
        expected = all_of(h, g) @ along
        assert all_of(coarse, found) @ s == pytest.approx(expected, rel=1e-12)
        assert abs(expected) > 1e-4
        h, theta = below, theta0
    hierarchy.destroy()


@pytest.mark.parametrize("name", ["dense", "conv", "images", "pinn"])
def test_a_prolonged_network_differs_by_a_step_which_halves_with_depth(comm: MPI.Comm, name: str) -> None:
    hierarchy = made(name, comm, 5, depth=32)
    coarsest = hierarchy.levels[0].objective.loss
    theta = (0.2 if name == "pinn" else 0.4) * random(coarsest.size, 7)
    for p in coarsest.parameters:
        if p.name.startswith("slopes"):
            theta[p.range] = 0.1
    points = np.random.default_rng(0).uniform(0, 1, (20, 2))
    outputs = []
    for number, level in enumerate(hierarchy.levels):
        loss = level.objective.loss
        if isinstance(loss, PDELoss):
            outputs.append(loss.fields(torch.tensor(theta), points))
        else:
            outputs.append(torch.cat([o for o, _ in loss.outputs(torch.tensor(theta))]).numpy().copy())
        if number < 4:
            above = hierarchy.levels[number + 1].objective
            theta = applied(hierarchy.transfers[number].prolong, level.objective, above, theta)
    steps = [np.abs(b - a).max() for a, b in itertools.pairwise(outputs)]
    ratios = [b / a for a, b in itertools.pairwise(steps)]
    assert steps[0] > 1e-3 * np.abs(outputs[0]).max()
    assert ratios == pytest.approx([0.5] * 3, abs=0.12)
    assert ratios[-1] == pytest.approx(0.5, abs=0.04)
    hierarchy.destroy()


@pytest.mark.parametrize("name", ["dense", "conv", "images"])
def test_coarse_objectives_are_networks_written_out(comm: MPI.Comm, name: str) -> None:
    hierarchy = made(name, comm, 3)
    for number, level in enumerate(hierarchy.levels):
        objective, loss = level.objective, level.objective.loss
        leaf = torch.tensor(random(loss.size, 6), requires_grad=True)
        value = written_out(leaf, loss, 2.0 ** (-(2 - number) / 2), 12 // 2 ** (2 - number))
        gradient = torch.autograd.grad(value, leaf)[0].numpy()
        x, g = put(objective, leaf.detach()), objective.layout.vector()
        assert objective.value_gradient(x, g) == pytest.approx(float(value.detach()), rel=1e-12)
        assert all_of(objective, g) == pytest.approx(gradient, rel=1e-10, abs=1e-12)
        assert objective.value(x) == pytest.approx(float(value.detach()), rel=1e-12)
    hierarchy.destroy()


@pytest.mark.parametrize("problem", [Burgers, Diffusion])
def test_coarse_losses_of_a_pde_are_losses_of_smaller_networks(comm: MPI.Comm, problem: Any) -> None:
    hierarchy = depth_hierarchy(objective_of(pinn(12, problem), comm), 3)
    for depth, level in zip((3, 6, 12), hierarchy.levels, strict=True):
        loss, expected = level.objective.loss, pinn(depth, problem)
        assert isinstance(loss, PDELoss) and isinstance(level.objective, ResidualObjective)
        assert loss.parameters == expected.parameters
        assert loss.layers == expected.layers
        theta = torch.tensor(0.5 * random(loss.size, 7))
        gradients = [torch.zeros(loss.size, dtype=torch.float64) for _ in range(2)]
        values = [one.value_gradient(theta, g) for one, g in zip((loss, expected), gradients, strict=True)]
        assert values[0] == values[1]
        assert torch.equal(*gradients)
        assert isinstance(loss.evaluator, CompiledJets) == isinstance(expected.evaluator, CompiledJets)
        assert set(loss.programs) == set(expected.programs)
        assert repr(level.words) == f"'{depth} layers'"
    hierarchy.destroy()


@cases
def test_coarse_networks_begin_at_the_projection(comm: MPI.Comm, name: str) -> None:
    hierarchy = made(name, comm, 3)
    for number in (1, 0):
        coarse, fine = (hierarchy.levels[k].objective for k in (number, number + 1))
        begin = applied(hierarchy.transfers[number].project, fine, coarse, fine.loss.initial().numpy())
        assert coarse.loss.initial().numpy() == pytest.approx(begin, rel=1e-13, abs=1e-15)
    hierarchy.destroy()


@pytest.mark.parametrize("name", ["dense", "conv", "images"])
def test_the_modular_norm_of_a_coarse_step_is_that_of_its_prolongation(comm: MPI.Comm, name: str) -> None:
    hierarchy = made(name, comm, 3)
    for seed in range(4):
        s = random(hierarchy.levels[0].objective.loss.size, seed)
        if seed > 1:  # the blocks decide, or the ends
            for p in hierarchy.levels[0].objective.loss.parameters:
                s[p.range] *= 10.0 if p.name.startswith("block") == (seed == 2) else 0.1
        for convolution in ("unfolded", "slices"):
            step, norms = s, []
            for number, level in enumerate(hierarchy.levels):
                loss = level.objective.loss
                norm = modular_norm(loss, convolution=convolution)
                norms.append(norm.norm(torch.tensor(step)))
                gain = 2.0 ** (-(2 - number) / 2)
                if name == "dense":
                    assert norms[-1] == pytest.approx(by_hand(loss, step, gain), rel=1e-12)
                    assert norm.dual_norm(torch.tensor(step)) > 0
                if number < 2:
                    above = hierarchy.levels[number + 1].objective
                    step = applied(hierarchy.transfers[number].prolong, level.objective, above, step)
            assert norms == pytest.approx([norms[0]] * 3, rel=1e-13)
    hierarchy.destroy()


def by_hand(loss: Loss, step: np.ndarray, gain: float) -> float:
    """max(3 s(open), 3 T g s(block), 3 s(close)) with s the operator norm from RMS to RMS."""
    found = []
    for weight, bias in zip(loss.parameters[::2], loss.parameters[1::2], strict=True):
        matrix = np.column_stack([step[weight.range].reshape(weight.shape), step[bias.range]])
        s = math.sqrt(matrix.shape[1] / matrix.shape[0]) * np.linalg.norm(matrix, 2)
        found.append(3 * s * (HORIZON * gain if weight.name.startswith("block") else 1.0))
    return max(found)


def test_masses_of_a_user_come_in_the_place_of_those_by_time() -> None:
    loss = dense(2)
    s = random(loss.size, 0)
    norms = []
    for number in range(4):
        masses = [0.0] * 4
        masses[number] = 5.0
        norms.append(modular_norm(loss, masses).norm(torch.tensor(s)))
    first, second, third = ([0.0] * k + [1.0] + [0.0] * (3 - k) for k in range(3))
    assert norms[0] == modular_norm(loss, first).norm(torch.tensor(s))
    assert norms[1] == modular_norm(loss, second).norm(torch.tensor(s))
    block = s[loss.parameters[4].offset : loss.parameters[6].offset]
    matrix = np.column_stack([block[:25].reshape(5, 5), block[25:]])
    expected = HORIZON / 2 * math.sqrt(6 / 5) * np.linalg.norm(matrix, 2)
    assert modular_norm(loss, third).norm(torch.tensor(s)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.ranks
@factors
@cases
def test_all_has_the_same_bits_on_any_number_of_ranks(comm: MPI.Comm, name: str, factor: int, levels: int) -> None:
    found = []
    for ranks in (comm, MPI.COMM_SELF):
        hierarchy, bits = made(name, ranks, levels, factor, blocks=3), list[Any]()
        for number, transfer in enumerate(hierarchy.transfers):
            coarse, fine = (hierarchy.levels[k].objective for k in (number, number + 1))
            bits.append(applied(transfer.prolong, coarse, fine, random(coarse.loss.size, 1)))
            bits.append(applied(transfer.restrict, fine, coarse, random(fine.loss.size, 2)))
            bits.append(applied(transfer.project, fine, coarse, random(fine.loss.size, 3)))
            x, g = put(coarse, 0.5 * random(coarse.loss.size, 4)), coarse.layout.vector()
            bits += [np.array(coarse.value_gradient(x, g)), all_of(coarse, g)]
        found.append([one.tobytes() for one in bits])
        hierarchy.destroy()
    assert found[0] == found[1]
