"""Norms of distributed vectors against those of gathered ones."""

import numpy as np
import pytest
import torch
from mpi4py import MPI
from torch import nn

from ddml.data.sample_sets import TensorSamples, spread_rows
from ddml.errors import InputError
from ddml.layout import ParameterLayout
from ddml.losses.work import DOUBLE, FRESH
from ddml.norms.build import modular_norm
from ddml.norms.kronecker import BLOCKS, KroneckerNorm
from ddml.norms.norm import DistributedModularNorm, InfinityNorm, Norm, TwoNorm
from ddml.objectives.objective import Objective
from ddml.parameters import Parameter
from ddml.problems.classification import ClassificationLoss


def make_loss() -> ClassificationLoss:
    torch.manual_seed(3)
    network = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 9), nn.Tanh(), nn.Linear(9, 4)
    ).double()
    rng = np.random.default_rng(1)
    inputs, targets = torch.as_tensor(rng.standard_normal((12, 1, 6, 6))), torch.arange(12) % 4
    return ClassificationLoss(network, TensorSamples(inputs, targets), 4)


@pytest.mark.parametrize("kind", ["2", "infinity", "modular"])
def test_steepest_directions(kind: str, comm: MPI.Comm) -> None:
    loss = make_loss()
    layout = ParameterLayout(loss.parameters, comm)
    modular = modular_norm(loss)
    norm: Norm = {"2": TwoNorm(), "infinity": InfinityNorm()}.get(kind) or DistributedModularNorm(modular, layout)
    g, direction = layout.vector(), layout.vector()
    full = np.random.default_rng(0).standard_normal(loss.size)
    full[5] = 0.0
    begin, end = g.getOwnershipRange()
    g.setArray(full[begin:end])
    dual = norm.steepest(g, direction)
    found = layout.gather(direction).numpy().copy()
    expected = {
        "2": full / np.linalg.norm(full), "infinity": np.sign(full),
        "modular": modular.dualize(torch.as_tensor(full)).numpy(),
    }[kind]  # fmt: skip
    assert np.abs(found - expected).max() < 1e-14
    assert norm(direction) == pytest.approx(1, rel=1e-12)
    assert dual == pytest.approx(full @ expected, rel=1e-13)
    if kind == "modular":  # to the last bit
        assert found.tobytes() == (expected + 0.0).tobytes()
        assert dual == modular.dual_norm(torch.as_tensor(full))
        assert norm(g) == modular.norm(torch.as_tensor(full))
    g.set(0.0)
    assert norm.steepest(g, direction) == 0
    assert layout.gather(direction).abs().max() == 0
    g.destroy()
    direction.destroy()


@pytest.mark.ranks
def test_large_matrices_have_the_same_bits_on_any_number_of_ranks(comm: MPI.Comm) -> None:
    loss = make_loss()
    layout = ParameterLayout(loss.parameters, comm)
    modular = modular_norm(loss, tolerance=0.1, exact=2)
    assert sum(modular.large(block) for block in modular.blocks) == 3
    norm = DistributedModularNorm(modular, layout)
    g, direction = layout.vector(), layout.vector()
    full = np.random.default_rng(0).standard_normal(loss.size)
    g.setArray(full[slice(*g.getOwnershipRange())])
    expected = modular.dualize(torch.as_tensor(full)) + 0.0
    dual = norm.steepest(g, direction)
    assert layout.gather(direction).numpy().tobytes() == expected.numpy().tobytes()
    assert dual == modular.dual_norm(torch.as_tensor(full))
    assert dual == pytest.approx(float(torch.as_tensor(full) @ expected), rel=1e-13)
    assert 0.9 * modular_norm(loss).dual_norm(torch.as_tensor(full)) < dual
    assert norm(g) == modular.norm(torch.as_tensor(full))
    assert layout.gather(g).numpy().tobytes() == full.tobytes()
    for vec in (g, direction):
        vec.destroy()


@pytest.mark.parametrize("kind", ["2", "infinity", "modular"])
def test_a_direction_may_take_the_place_of_the_gradient(kind: str, comm: MPI.Comm) -> None:
    loss = make_loss()
    layout = ParameterLayout(loss.parameters, comm)
    modular = DistributedModularNorm(modular_norm(loss), layout)
    norm: Norm = {"2": TwoNorm(), "infinity": InfinityNorm()}.get(kind) or modular
    g, direction = layout.vector(), layout.vector()
    g.setArray(np.random.default_rng(0).standard_normal(loss.size)[slice(*g.getOwnershipRange())])
    dual = norm.steepest(g, direction)
    assert norm.steepest(g, g) == dual
    assert layout.gather(g).numpy().copy().tobytes() == layout.gather(direction).numpy().tobytes()
    g.destroy()
    direction.destroy()


def test_a_norm_of_some_parameters_only_is_refused(comm: MPI.Comm) -> None:
    loss = make_loss()
    with pytest.raises(InputError, match="of all"):
        DistributedModularNorm(
            modular_norm(loss).restricted([loss.parameters[0].range]), ParameterLayout(loss.parameters, comm)
        )


def dense(norm: KroneckerNorm) -> np.ndarray:
    """The norm's matrix."""
    size = norm.objective.layout.size
    M = np.zeros((size, size))
    for number, layer in enumerate(norm.layers):
        factors = []
        for i, rows in enumerate(layer.sizes):
            begin, end = norm.places[2 * number + i], norm.places[2 * number + i + 1]
            factor = norm.factors[begin:end].reshape(rows, rows)
            factors.append(factor + np.trace(factor) / rows * np.eye(rows))
        entries = layer.entries.ravel()
        M[np.ix_(entries, entries)] = np.kron(factors[1], factors[0])
    return M


@pytest.mark.ranks
@pytest.mark.parametrize("blocks", [0, 6])
def test_kronecker_norm(blocks: int, comm: MPI.Comm) -> None:
    loss = make_loss()
    layout = ParameterLayout(loss.parameters, comm)
    objective = Objective(loss, layout, blocks=blocks)
    norm = KroneckerNorm(objective, 0.7)
    vectors = [layout.vector() for _ in range(4)]
    x, g, first, second = vectors
    objective.initial(x)
    theta = loss.initial()
    norm.refresh(x)
    # the same factors as without ranks, and a running mean of two
    expected = []
    for version in (0, 1):
        part = loss.sampled(torch.as_tensor(spread_rows(12, 0.7, version)))
        draws = torch.as_tensor(np.random.default_rng([1, version]).random(part.count))
        pairs = part.kronecker_statistics(theta, draws)
        expected.append(np.concatenate([m.reshape(-1).numpy() for pair in pairs for m in pair]))
    assert norm.factors == pytest.approx(expected[0], rel=1e-12, abs=1e-14)
    norm.refresh(x)
    assert norm.factors == pytest.approx(0.9 * expected[0] + 0.1 * expected[1], rel=1e-12, abs=1e-14)
    # a gradient and the products of rows with themselves on 8 samples of 12, and the sums over blocks, twice
    squares = [10**2 + 3**2, 49**2 + 9**2, 10**2 + 4**2]  # with 16 rows of patches for each sample in the first layer
    products = 8 * (loss.charges.operations + 16 * squares[0] + squares[1] + squares[2])
    factors = DOUBLE * sum(side**3 for side in (10, 3, 49, 9, 10, 4)) / 6
    refresh = products + factors + FRESH * (max(min(blocks, BLOCKS), 1) + 1) * sum(squares)
    assert objective.work.total == pytest.approx(2 * refresh / (12 * loss.charges.operations), rel=1e-13)
    M, rng = dense(norm), np.random.default_rng(5)
    begin, end = x.getOwnershipRange()
    full_x, full_g = rng.standard_normal((2, loss.size))
    x.setArray(full_x[begin:end])
    g.setArray(full_g[begin:end])
    assert norm(x) == pytest.approx(np.sqrt(full_x @ M @ full_x), rel=1e-12)
    solved = np.linalg.solve(M, full_g)
    dual = norm.steepest(g, first)
    g.copy(second)
    assert norm.steepest(second, second) == dual
    assert layout.gather(second).numpy().copy().tobytes() == layout.gather(first).numpy().tobytes()
    assert dual == pytest.approx(np.sqrt(full_g @ solved), rel=1e-11)
    assert layout.gather(first).numpy() == pytest.approx(solved / dual, rel=1e-10, abs=1e-12)
    assert norm(first) == pytest.approx(1, rel=1e-12)
    norm.inverse(g, first)
    assert layout.gather(first).numpy() == pytest.approx(solved, rel=1e-10, abs=1e-12)
    norm.coordinates(x, first)
    norm.covector(g, second)
    assert float(first.dot(second)) == pytest.approx(full_x @ full_g, rel=1e-10)
    norm.vector(first, second)
    assert layout.gather(second).numpy() == pytest.approx(full_x, rel=1e-11, abs=1e-13)
    # restricted to a bias and the whole of another layer, and to that layer's weight
    weight, bias = loss.parameters[2], loss.parameters[3]
    for ranges in ([loss.parameters[1].range, slice(weight.offset, bias.range.stop)], [weight.range]):
        inside = np.concatenate([np.arange(r.start, r.stop) for r in ranges])
        small = ParameterLayout((Parameter("part", (len(inside),), 0),), comm)
        part, vec, image = norm.restricted(small, ranges), small.vector(), small.vector()
        vec.setArray(full_x[inside][slice(*vec.getOwnershipRange())])
        block = M[np.ix_(inside, inside)]
        assert part(vec) == pytest.approx(np.sqrt(full_x[inside] @ block @ full_x[inside]), rel=1e-12)
        part.inverse(vec, image)
        assert small.gather(image).numpy() == pytest.approx(np.linalg.solve(block, full_x[inside]), rel=1e-9, abs=1e-12)
        vec.destroy()
        image.destroy()
    with pytest.raises(InputError, match="layer 3 is cut"):
        cut = ParameterLayout((Parameter("part", (50,), 0),), comm)
        norm.restricted(cut, [slice(weight.offset, weight.offset + 50)])
    again = KroneckerNorm(objective, 0.7)
    again.restore(norm.state())
    assert again(x) == norm(x)
    for vec in vectors:
        vec.destroy()


def test_a_layer_without_gradients_does_not_move(comm: MPI.Comm) -> None:
    torch.manual_seed(3)
    network = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    with torch.no_grad():
        network[0].bias.fill_(-1e3)
    inputs = torch.as_tensor(np.random.default_rng(1).standard_normal((9, 3)))
    loss = ClassificationLoss(network, TensorSamples(inputs, torch.arange(9) % 2), 2)
    layout = ParameterLayout(loss.parameters, comm)
    objective = Objective(loss, layout)
    norm = KroneckerNorm(objective, 1.0)
    x, g, direction = (layout.vector() for _ in range(3))
    objective.initial(x)
    objective.value_gradient(x, g)
    norm.refresh(x)
    assert norm.steepest(g, direction) > 0
    assert norm(direction) == pytest.approx(1)
    assert layout.gather(direction)[:16].abs().max() == 0
    for vec in (x, g, direction):
        vec.destroy()


def test_spread_rows() -> None:
    for count, fraction, number in ((10, 0.3, 0), (7, 1.0, 4), (1, 0.01, 2), (1000, 0.1, 9)):
        rows = spread_rows(count, fraction, number)
        assert len(rows) == max(round(count * fraction), 1) and rows.min() >= 0 and rows.max() < count
        assert (np.diff(rows) > 0).all()
    assert (spread_rows(7, 1.0, 4) == np.arange(7)).all()
    assert len({tuple(spread_rows(1000, 0.1, number)) for number in range(5)}) > 1
