"""Networks of tiles as subdomains: Schwarz methods on coherent nets."""

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from coherent_cases import CASES, CLASSES, coherent, images, in_tiles, losses
from mpi4py import MPI
from one_rank import on_one_rank
from petsc4py import PETSc
from torch import Tensor, nn

from ddml.data.sample_sets import TensorSamples, mapped
from ddml.data.tiled import TiledSamples
from ddml.decomposition.subdomains import Subdomains
from ddml.decomposition.tiles import Tiles
from ddml.errors import InputError
from ddml.losses.branched import BranchedLoss
from ddml.networks import classifiers
from ddml.networks.coherent import Coherent
from ddml.networks.local import build_local
from ddml.norms.norm import TwoNorm
from ddml.objectives.branched import BranchedObjective, branched_layout, tiles_of_ranks
from ddml.problems.classification import cross_entropy
from solvers import minimise
from solvers.schwarz.coarse_phase import CoarsePhase
from solvers.schwarz.schwarz import Schwarz

LOCAL = {"local_steps": 2}
SCHWARZ: dict[str, tuple[str, dict[str, Any]]] = {
    "apts_weights, modular": ("apts_weights", {**LOCAL, "norm": "modular"}),
    "apts_weights, L-BFGS": ("apts_weights", {**LOCAL, "model": "lbfgs", "memory": 2}),
    "aspqn": ("aspqn", LOCAL),
    "mspqn": ("mspqn", LOCAL),
    "asadagrad": ("asadagrad", {}),
    "coarse phase": ("apts_weights", {**LOCAL, "coarse_phase": True}),
}


def mine(name: str, comm: MPI.Comm, count: int = 13) -> BranchedLoss:
    """With the tiles of this rank only."""
    module, samples = coherent(**CASES[name]), images(CASES[name]["shape"], count)
    empty = BranchedLoss(module, cross_entropy, in_tiles(module, samples, []))
    return empty.on(in_tiles(module, samples, tiles_of_ranks(empty, comm.size)[comm.rank]))


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("case", "name"),
    [
        # whole runs of the others on this net: test_coherent_runs.py
        *((case, "2x2, dense") for case in ("apts_weights, modular", "apts_weights, L-BFGS", "mspqn", "asadagrad")),
        ("apts_weights, modular", "a frozen net"),
        ("coarse phase", "2x2, linear, logits"),
        ("aspqn", "1x3, linear"),
    ],
)
def test_schwarz_methods_have_the_same_bits_on_any_number_of_ranks(case: str, name: str, comm: MPI.Comm) -> None:
    solver, options = SCHWARZ[case]
    found = minimise(mine(name, comm), solver, comm, options, iterations=3, blocks=4)
    alone = on_one_rank(lambda one: minimise(mine(name, one), solver, one, options, iterations=3, blocks=4))
    assert found.losses.tolist() == alone.losses.tolist()
    assert torch.equal(found.theta, alone.theta)
    assert (found.work, found.critical) == pytest.approx((alone.work, alone.critical), rel=1e-12)
    assert found.losses[-1] < found.losses[0]
    assert found.critical < 0.95 * found.work


@pytest.mark.parametrize(
    ("solver", "options", "words"),
    [
        ("apts_weights", {"decomposition": "windows"}, "subdomains must be the single networks"),
        ("mspqn", {"subdomains": 2}, "subdomains must be the single networks"),
        ("apts_data", {}, "subdomains must be the single networks"),
        ("tr", {"model": "hessian"}, "needs Hessian products, which this loss has not"),
        ("tr", {"norm": "kfac"}, "a BranchedLoss has no K-FAC norm"),
        ("ntr", {}, "have no Hessian or Gauss-Newton products"),
    ],
)
def test_what_needs_all_tiles_is_refused_on_several_ranks(
    solver: str, options: dict[str, Any], words: str, comm: MPI.Comm
) -> None:
    if comm.size == 1 and "single" in words:
        found = minimise(mine("2x2, dense", comm), solver, comm, {**options, **LOCAL}, iterations=2)
        assert found.losses[-1] < found.losses[0]
        return
    with pytest.raises(InputError, match=words):
        minimise(mine("2x2, dense", comm), solver, comm, options, iterations=2)


@pytest.mark.ranks
@pytest.mark.parametrize("options", [{}, {"norm": "infinity"}])
@pytest.mark.parametrize(("name", "zero"), [("2x2, dense", True), ("1x3, linear", True), ("frozen nets", False)])
def test_without_local_steps_and_with_one_subdomain_apts_is_the_trust_region_on_any_number_of_ranks(
    name: str, zero: bool, options: dict[str, Any], comm: MPI.Comm
) -> None:
    """The nets of one are frozen, and the coarse net is the one subdomain."""
    more = {"local_steps": 0} if zero else {"local_steps": 3}
    undivided = minimise(mine(name, comm), "tr", comm, options, iterations=7)
    decomposed = minimise(mine(name, comm), "apts_weights", comm, {**options, **more}, iterations=7)
    assert decomposed.losses.tolist() == undivided.losses.tolist()
    assert torch.equal(decomposed.theta, undivided.theta)
    assert (decomposed.work, decomposed.critical) == (undivided.work, undivided.critical)


def separable(comm: MPI.Comm) -> BranchedLoss:
    """Squares of linear networks, each with targets of its own: the coarse net is the identity, and frozen."""
    tiles = Tiles((1, 4, 6), (2, 2), 1)
    samples = images((1, 4, 6), 30)
    nets = [nn.Sequential(nn.Flatten(), nn.Linear(torch.Size(s).numel(), CLASSES)).double() for s in tiles.shapes]
    coarse = nn.Linear(4 * CLASSES, 4 * CLASSES).double().requires_grad_(False)
    coarse.weight.copy_(torch.eye(4 * CLASSES))
    coarse.bias.zero_()
    for k, p in enumerate(p for net in nets for p in net.parameters()):
        p.data = torch.cos(torch.arange(p.numel(), dtype=torch.float64) + k).view(p.shape)
    module = Coherent(nets, coarse, tiles, "logits")
    targets = torch.sin(torch.arange(30.0 * 4 * CLASSES, dtype=torch.float64)).view(30, -1)
    whole = TensorSamples(samples.inputs, targets)

    def squares(outputs: Tensor, wanted: Tensor) -> Tensor:
        return (outputs - wanted).square().sum(dim=1)

    empty = BranchedLoss(module, squares, TiledSamples({}, targets))
    held = tiles_of_ranks(empty, comm.size)[comm.rank]
    return empty.on(TiledSamples({i: mapped(whole, partial(module.tile, tile=i)) for i in held}, targets))


@pytest.mark.ranks
def test_on_a_separable_problem_one_iteration_is_enough_on_any_number_of_ranks(comm: MPI.Comm, prefix: str) -> None:
    loss = separable(comm)
    assert len(loss.blocks) == 4
    objective = BranchedObjective(loss, branched_layout(loss, comm), blocks=4)
    x = objective.layout.vector()
    objective.initial(x)
    g, correction = x.duplicate(), x.duplicate()
    f = objective.value_gradient(x, g)
    before = g.norm()
    domains = Subdomains.by_blocks(loss)
    PETSc.Options().setValue(f"{prefix}sub_memory", 40)
    schwarz = Schwarz(objective, domains, True, f"{prefix}sub_", [50] * len(domains), "lbfgs")
    schwarz.additive(x, f, g, correction)
    x.axpy(1.0, correction)
    assert objective.value_gradient(x, g) < f
    assert g.norm() < 1e-7 * before
    schwarz.destroy()
    for vec in (x, g, correction):
        vec.destroy()
    found = minimise(separable(comm), "aspqn", comm, {"local_steps": 50, "sub_memory": 40}, iterations=2)
    assert found.gradient_norm < 1e-7 * before


def test_blocks_are_the_default_and_go_with_no_number() -> None:
    loss = mine("2x2, dense", MPI.COMM_SELF)
    with pytest.raises(InputError, match=r"overlap does not go with .*decomposition blocks"):
        minimise(loss, "apts_weights", MPI.COMM_SELF, {"overlap": 1}, iterations=1)
    with pytest.raises(InputError, match="has no networks side by side"):
        minimise(losses("2x2, dense")[0], "apts_weights", MPI.COMM_SELF, {"decomposition": "blocks"}, iterations=1)
    layers = minimise(loss, "apts_weights", MPI.COMM_SELF, {"subdomains": 3, **LOCAL}, iterations=2)
    assert layers.losses[-1] < layers.losses[0]


@pytest.mark.parametrize("shape", ["linear", "dense"])
def test_a_local_step_costs_one_network_and_a_sliver_of_the_coarse_net(shape: str) -> None:
    """The networks of 4x4 tiles with overlap of faces; critical are the largest of them and the coarse net."""
    tiles = Tiles((1, 96, 84), 4, 8)
    settings = SimpleNamespace(**{o.name: o.default for o in classifiers.OPTIONS})
    settings.network, settings.seed, settings.dtype = "vgg", 0, "float32"
    nets = [net for net, _ in build_local(settings, tiles.shapes, 38, tiles.narrowing)]
    behind = classifiers.mlp((16 * 38,), 38, [] if shape == "linear" else [128])
    empty = TiledSamples({}, torch.zeros(100, dtype=torch.int64))
    loss = BranchedLoss(Coherent(nets, behind, tiles), cross_entropy, empty)
    costs, charges = Subdomains.by_blocks(loss).costs, loss.charges
    assert 0.99 < sum(costs[:16]) < 1.07  # the criterion of each
    assert max(costs) == costs[5]
    assert costs[5] < charges.critical() < costs[5] + costs[16]
    assert costs[16] < 0.011


@pytest.mark.ranks
@pytest.mark.parametrize("name", ["2x2, dense", "1x3, linear", "a frozen net", "a frozen coarse net"])
def test_the_coarse_phase_never_increases_the_loss_on_any_number_of_ranks(name: str, comm: MPI.Comm) -> None:
    options = {"local_steps": 3, "coarse_phase": True, "delta0": 2.0}
    found = minimise(mine(name, comm), "apts_weights", comm, options, iterations=5)
    assert (found.losses[1:] <= found.losses[:-1]).all()
    assert found.losses[-1] < found.losses[0]


@pytest.mark.ranks
def test_the_coarse_phase_finds_whole_steps_of_separate_networks_on_any_number_of_ranks(comm: MPI.Comm) -> None:
    """Half a step promises three quarters of the decrease of a whole one; each network needs a whole one."""
    loss = separable(comm)
    objective = BranchedObjective(loss, branched_layout(loss, comm), blocks=4)
    x = objective.layout.vector()
    objective.initial(x)
    best = minimise(separable(comm), "lbfgs", comm, {"memory": 40}, iterations=80)
    s = x.duplicate()
    s.array[:] = best.theta.numpy()[slice(*x.getOwnershipRange())] - x.array_r
    whole = s.copy()
    f = objective.value(x)
    promised, size = CoarsePhase(objective, 30, "-coarse_phase").combine(x, f, s, TwoNorm())
    assert promised == pytest.approx(f - best.loss, rel=1e-9)
    assert size == pytest.approx(whole.norm(), rel=1e-6)
    whole.axpy(-1.0, s)
    assert whole.norm() < 1e-5 * size
    for vec in (x, s, whole):
        vec.destroy()


def test_a_coarse_phase_is_for_networks_of_tiles() -> None:
    with pytest.raises(InputError, match=r"coarse_phase is for networks of tiles"):
        minimise(losses("2x2, dense")[0], "apts_weights", MPI.COMM_SELF, {"coarse_phase": True}, iterations=1)
