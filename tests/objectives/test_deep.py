"""Reduced functionals of deep kernels: values and gradients against dense torch, and what is refused."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from deep_cases import HELD, MU, N, X, Y, evaluated, expansion, functional, network, objective, width
from mpi4py import MPI
from torch import Tensor, nn

from ddml.errors import InputError
from ddml.kernel_machines.features import FeatureLoss, decay, kernel_expansion, last_hidden, native_penalty
from ddml.kernel_machines.functions import squared_distances
from ddml.kernel_machines.gradients import smooth
from ddml.layout import ParameterLayout
from ddml.objectives.deep import DeepKernelObjective
from ddml.parallel import Interrupted, StopRequest

KINDS = ("tikhonov", "held", "left")
TIGHT = {"rtol": 1e-12, "least": 1e-12}
MAPS = {"expansion": expansion, "network": network}


def kernel(name: str, w: float, z: Tensor) -> Tensor:
    """The kernel matrix, by its formula, with a derivative where samples are equal."""
    if name == "polynomial":
        return (z @ z.T / w**2 + 1) ** 3
    squares = (z[:, None] - z).square().sum(-1)
    if name == "rbf":
        return torch.exp(-squares / (2 * w**2))
    d = torch.where(squares > 0, squares, 1.0).sqrt() * (squares > 0)
    if name == "laplace":
        return torch.exp(-d / w)
    return (1 + 3**0.5 * d / w) * torch.exp(-(3**0.5) * d / w)


def dense(kind: str, loss: FeatureLoss, theta: Tensor, name: str) -> Tensor:
    """The functional through the Cholesky factor."""
    if isinstance(loss.module[0], nn.Linear):
        first, second = theta[:390], theta[390:]
        hidden = torch.tanh(torch.as_tensor(X) @ first[:384].view(6, 64).T + first[384:])
        z = hidden @ second[:24].view(4, 6).T + second[24:]
    else:
        z = loss.module[0](torch.as_tensor(X)) @ theta.view(4, -1).T
    A = kernel(name, width(loss, name), z) + MU * torch.eye(N, dtype=torch.float64)
    y, m = torch.as_tensor(Y), N - HELD
    if kind == "tikhonov":
        return MU * (y * torch.cholesky_solve(y, torch.linalg.cholesky(A))).sum() / N
    if kind == "left":
        B = torch.cholesky_inverse(torch.linalg.cholesky(A))
        return ((B @ y) / B.diagonal()[:, None]).square().sum() / N
    alpha = torch.cholesky_solve(y[:m], torch.linalg.cholesky(A[:m, :m]))
    return (y[m:] - A[m:, :m] @ alpha).square().sum() / HELD


@pytest.mark.ranks
@pytest.mark.parametrize("name", ["rbf", "laplace", "matern32", "polynomial"])
@pytest.mark.parametrize("features", MAPS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_that_through_the_cholesky_factor(comm: MPI.Comm, kind: str, features: str, name: str) -> None:
    made = objective(kind, comm, MAPS[features](), decay(1e-3), name=name, **({} if kind == "left" else TIGHT))
    theta = made.loss.initial().requires_grad_()
    expected = dense(kind, made.loss, theta, name) + 1e-3 * theta.square().sum()
    (slope,) = torch.autograd.grad(expected, theta)
    value, gradient = evaluated(made)
    assert value == pytest.approx(float(expected.detach()), rel=1e-12)
    assert np.abs(gradient - slope.numpy()).max() <= 1e-10 * np.abs(slope.numpy()).max()


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_that_of_finite_differences(comm: MPI.Comm, kind: str) -> None:
    made = objective(kind, comm, **({} if kind == "left" else TIGHT))
    theta, h = made.loss.initial(), 1e-5
    direction = torch.randn(len(theta), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    slope = evaluated(made)[1] @ direction.numpy()
    ahead, behind = (evaluated(made, theta + step * direction)[0] for step in (h, -h))
    assert slope == pytest.approx((ahead - behind) / (2 * h), rel=1e-6)


@pytest.mark.parametrize("kind", KINDS[:2])
def test_inexact_values_have_errors_of_second_order_and_the_gradient_is_theirs(comm: MPI.Comm, kind: str) -> None:
    exact, slope = evaluated(objective(kind, comm, **TIGHT))
    errors = []
    for rtol in (1e-2, 1e-3):
        value, gradient = evaluated(objective(kind, comm, rtol=rtol))
        errors.append(abs(value - exact))
        assert errors[-1] <= 2 * rtol**2
        assert np.linalg.norm(gradient - slope) <= 10 * rtol * np.linalg.norm(slope)
        if kind == "tikhonov":
            assert value <= exact  # the dual functional
    assert errors[1] < errors[0] / 10


@pytest.mark.ranks
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients_have_the_same_bits_on_any_number_of_ranks(comm: MPI.Comm, kind: str) -> None:
    here, alone = objective(kind, comm), objective(kind, MPI.COMM_SELF)
    theta = here.loss.initial()
    for step in (0.0, 0.02, 0.3):
        moved = theta * (1 + step * torch.cos(torch.arange(len(theta))))
        (value, gradient), (same, expected) = evaluated(here, moved), evaluated(alone, moved)
        assert value == same
        assert gradient.tobytes() == expected.tobytes()
    assert here.work == alone.work


@pytest.mark.parametrize("kind", KINDS)
def test_a_point_that_was_evaluated_last_takes_no_products(comm: MPI.Comm, kind: str) -> None:
    made = objective(kind, comm)
    x, g = made.layout.vector(), made.layout.vector()
    made.initial(x)
    value, before = made.value(x), made.functional.products
    assert (made.value_gradient(x, g), made.functional.products) == (value, before)
    assert (made.work.losses, made.work.gradients, made.work.products) == (1, 1, before // 10)
    assert made.work.total > made.work.products
    for vec in (x, g):
        vec.destroy()


def test_a_request_to_stop_is_noticed_before_anything_changes(comm: MPI.Comm) -> None:
    made = objective("tikhonov", comm)
    made.stop = StopRequest()
    evaluated(made)
    before, work = made.functional.products, made.work.state()
    made.stop.requested = comm.rank == 0
    with pytest.raises(Interrupted):
        evaluated(made, 2 * made.loss.initial())
    assert (made.functional.products, made.work.state()) == (before, work)


@pytest.mark.parametrize("kind", KINDS)
def test_features_that_are_not_finite_give_no_finite_value(comm: MPI.Comm, kind: str) -> None:
    made = objective(kind, comm)
    value, gradient = evaluated(made, torch.full_like(made.loss.initial(), torch.nan))
    assert np.isnan(value)
    assert np.isnan(gradient).all()
    assert np.isfinite(evaluated(made)[0])


class Counted(nn.Module):
    """A module that counts its calls, those of copies among them."""

    calls: ClassVar[list[int]] = [0]

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        self.calls[0] += 1
        return self.module(x)


def test_what_stands_before_the_first_trained_layer_is_computed_once(comm: MPI.Comm) -> None:
    frozen = network()
    first = frozen[0] = Counted(frozen[0])
    frozen[0].requires_grad_(False)
    made = objective("tikhonov", comm, frozen, decay(1e-3), **TIGHT)
    before = first.calls[0]
    whole = objective("tikhonov", comm, network(), decay(1e-3), **TIGHT)
    assert [p.name for p in made.loss.parameters] == ["2.weight", "2.bias"]
    theta = whole.loss.initial()
    part = evaluated(made, theta[390:])[1] - 2e-3 * theta[390:].numpy()
    expected = evaluated(whole, theta)[1][390:] - 2e-3 * theta[390:].numpy()
    assert np.allclose(part, expected, rtol=1e-9, atol=1e-12)
    assert first.calls[0] == before > 0


def test_single_precision_features(comm: MPI.Comm) -> None:
    made, double = (objective("tikhonov", comm, network().to(t), decay(0.0)) for t in (torch.float32, torch.float64))
    assert evaluated(made)[0] == pytest.approx(evaluated(double)[0], rel=1e-4)


def test_inner_layers_begin_with_principal_components() -> None:
    made = expansion()
    gram = made[0](torch.as_tensor(X[::5])).numpy()
    C = made[1].weight.detach().numpy().T
    assert np.allclose(C.T @ gram @ C, np.eye(4), atol=1e-8)
    centred = gram @ C - (gram @ C).mean(axis=0)
    assert np.allclose(centred.T @ centred, np.diag(np.diagonal(centred.T @ centred)), atol=1e-8)
    assert native_penalty(made, 0.5)(made[1].weight.detach().reshape(-1)).item() == pytest.approx(2.0)


def test_squares_of_distances_are_those_of_features() -> None:
    z = torch.as_tensor(X[:20])
    assert torch.allclose(squared_distances(z, z), (z[:, None] - z).square().sum(-1), atol=1e-12)


def bad_map(case: str) -> Any:
    return {
        "vector": lambda: FeatureLoss(nn.Sequential(nn.Linear(64, 1), nn.Flatten(0)).double(), X),
        "fails": lambda: FeatureLoss(nn.Linear(63, 2).double(), X),
        "frozen": lambda: FeatureLoss(nn.Linear(64, 2).double().requires_grad_(False), X),
        "dropout": lambda: FeatureLoss(nn.Sequential(nn.Linear(64, 2), nn.Dropout()).double(), X),
        "outputs": lambda: kernel_expansion(smooth("rbf"), X[:5], 6),
        "none": lambda: kernel_expansion(smooth("rbf"), X[:5], 0),
        "equal": lambda: kernel_expansion(smooth("rbf"), np.repeat(X[:1], 9, axis=0), 3),
        "negative": lambda: native_penalty(expansion(), -1.0),
        "decay": lambda: decay(float("nan")),
        "no expansion": lambda: native_penalty(network(), 1e-3),
        "one layer": lambda: last_hidden(nn.Sequential(nn.Linear(3, 2))),
        "no chain": lambda: last_hidden(nn.Linear(3, 2)),
    }[case]


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("vector", "row of features for each sample"),
        ("fails", "the network fails on inputs"),
        ("frozen", "do not depend on any parameter"),
        ("dropout", "depends on others"),
        ("outputs", "has 1 to 5 outputs, got 6"),
        ("none", "has 1 to 5 outputs, got 0"),
        ("equal", "fewer than 3 principal components"),
        ("negative", "factor of 0 or more"),
        ("decay", "factor of 0 or more"),
        ("no expansion", "is that of a kernel expansion"),
        ("one layer", "two layers and more"),
        ("no chain", "two layers and more"),
    ],
)
def test_feature_maps_that_cannot_be_are_refused(case: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        bad_map(case)()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"targets": Y[:5]}, "a row of finite numbers for each of 150 samples"),
        ({"targets": Y[:, 0]}, "a row of finite numbers"),
        ({"targets": np.where(Y > 0, np.nan, Y)}, "a row of finite numbers"),
        ({"rtol": 0.0}, "tolerances of inner solves"),
        ({"rtol": 1e-9, "least": 1e-8}, "tolerances of inner solves"),
        ({"kind": "held", "targets": Y[:5]}, "a row of finite numbers"),
        ({"kind": "left", "targets": Y[:5]}, "a row of finite numbers"),
    ],
)
def test_functionals_that_cannot_be_are_refused(comm: MPI.Comm, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        functional(settings.pop("kind", "tikhonov"), FeatureLoss(expansion(), X), comm, **settings)


def test_a_functional_of_other_samples_is_refused(comm: MPI.Comm) -> None:
    loss = FeatureLoss(expansion(), X[:140])
    with pytest.raises(InputError, match="of 150 samples, the feature map has 140"):
        DeepKernelObjective(
            loss,
            ParameterLayout(loss.parameters, comm),
            functional("tikhonov", FeatureLoss(expansion(), X), comm),
        )
