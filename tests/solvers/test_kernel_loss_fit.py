"""Kernel machines of other losses than the squared one, against dense Newton methods and other libraries."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from mpi4py import MPI
from one_rank import on_one_rank
from scipy import linalg

from ddml.data.files import digits
from ddml.errors import InputError
from ddml.kernel_machines import KernelOperator, SampleDomain, SampleLayout, median_distance, named
from ddml.kernel_machines.losses import LOSSES, class_targets, classes_of, named_loss
from solvers import fit_kernel, fit_kernel_loss
from solvers.kernel_machines.curved import CurvedOperator, CurvedSchwarzPC
from solvers.kernel_machines.newton import LossState

n, CLASSES, MU = 160, 4, 0.05
FOUR = digits().labels < CLASSES
X = digits().inputs[FOUR][:n].reshape(n, -1) / 16.0
LABELS = digits().labels[FOUR][:n]
TEST_FOUR = digits().test_labels < CLASSES
Y = {loss: class_targets(loss, LABELS, CLASSES) for loss in LOSSES}
KERNEL = named("rbf", 0.7 * median_distance(X))
TORCH: dict[str, Any] = {  # of all samples
    "squared": lambda f, y: (f - y).square().sum() / 2,
    "logistic": lambda f, y: torch.nn.functional.softplus(-y * f).sum(),
    "softmax": lambda f, y: torch.logsumexp(f, 1).sum() - (f * y).sum(),
    "squared_hinge": lambda f, y: torch.clamp(1 - y * f, min=0).square().sum() / 2,
}


def slopes(loss: str, f: torch.Tensor, y: torch.Tensor, graph: bool = False) -> torch.Tensor:
    f = f if graph else f.detach().requires_grad_()
    return torch.autograd.grad(TORCH[loss](f, y), f, create_graph=graph)[0]


def curvature(loss: str, f: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """(n, k, k), sample by sample."""
    f = f.detach().requires_grad_()
    g = slopes(loss, f, y, graph=True)
    return torch.stack([torch.autograd.grad(g[:, a].sum(), f, retain_graph=True)[0] for a in range(f.shape[1])], 1)


def made(comm: MPI.Comm, samples: np.ndarray = X, mu: float = MU, **settings: Any) -> KernelOperator:
    count = 4 if len(samples) > 8 else 1
    return KernelOperator(
        KERNEL, samples, mu, SampleLayout(SampleDomain.by_tree(samples, count, 0.1), comm), **settings
    )


def gram(samples: np.ndarray = X) -> torch.Tensor:
    x = torch.tensor(samples)
    return KERNEL(x, x.clone())


def dense_newton(samples: np.ndarray, targets: np.ndarray, loss: str, mu: float) -> tuple[np.ndarray, float]:
    """alpha and J, by Newton's method with dense matrices of all n k unknowns and torch's derivatives."""
    K, y, (m, k) = gram(samples), torch.tensor(targets), targets.shape
    alpha = torch.zeros(m, k, dtype=torch.float64)

    def functional(alpha: torch.Tensor) -> float:
        f = K @ alpha
        return float(TORCH[loss](f, y) + mu / 2 * (alpha * f).sum())

    for _ in range(100):
        f = K @ alpha
        r = slopes(loss, f, y) + mu * alpha
        if r.norm() < 1e-12 * slopes(loss, 0 * f, y).norm():
            break
        system = torch.einsum("iab,ij->iajb", curvature(loss, f, y), K).reshape(m * k, m * k)
        system = system.numpy() + mu * np.eye(m * k)
        step = torch.tensor(linalg.solve(system, -r.numpy().ravel())).reshape(m, k)
        length, here = 1.0, functional(alpha)
        while functional(alpha + length * step) > here * (1 + 1e-14) and length > 1e-4:
            length /= 2
        alpha = alpha + length * step
    return alpha.numpy(), functional(alpha)


@cache
def exact(loss: str) -> tuple[np.ndarray, float]:
    return dense_newton(X, Y[loss], loss, MU)


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("loss", "preconditioner"),
    [(loss, pc) for loss in LOSSES for pc in ("pivots", "schwarz", "none") if (loss, pc) != ("softmax", "schwarz")],
)
def test_minimisers_are_those_of_a_dense_newton_method_with_the_same_bits_on_any_ranks(
    comm: MPI.Comm, loss: str, preconditioner: str
) -> None:
    def fitted(on: MPI.Comm) -> Any:
        return fit_kernel_loss(made(on), Y[loss], loss, preconditioner, ksp_rtol=1e-12)

    together, alone = fitted(comm), on_one_rank(fitted)
    alpha, value = exact(loss)
    assert together.converged
    assert together.gradient <= 1e-12
    assert np.linalg.norm(together.coefficients - alpha) < 1e-10 * np.linalg.norm(alpha)
    assert together.values[-1] == pytest.approx(value, rel=1e-13)
    assert (np.diff(together.values) <= 1e-14 * together.values[0]).all()
    assert together.coefficients.tobytes() == alone.coefficients.tobytes()
    assert together.values.tobytes() == alone.values.tobytes()
    assert together.iterations.tolist() == alone.iterations.tolist()
    assert together.steps == len(together.iterations) == len(together.gradients) - 1
    assert together.products >= together.iterations.sum() + 2 * together.steps


@pytest.mark.ranks
@pytest.mark.parametrize("loss", LOSSES)
def test_what_is_reported_is_true(comm: MPI.Comm, loss: str) -> None:
    """J and its gradient, by differences of J along any direction of alpha."""
    found = fit_kernel_loss(made(comm), Y[loss], loss, steps=2)
    alpha, K, y = torch.tensor(found.coefficients), gram(), torch.tensor(Y[loss])

    def functional(alpha: torch.Tensor) -> torch.Tensor:
        return TORCH[loss](K @ alpha, y) + MU / 2 * (alpha * (K @ alpha)).sum()

    r = slopes(loss, K @ alpha, y) + MU * alpha
    assert found.values[-1] == pytest.approx(float(functional(alpha)), rel=1e-12)
    assert found.gradient == pytest.approx(float(r.norm() / slopes(loss, 0 * alpha, y).norm()), rel=1e-9)
    direction = torch.tensor(np.random.default_rng(1).standard_normal(alpha.shape))
    difference = (functional(alpha + 1e-6 * direction) - functional(alpha - 1e-6 * direction)) / 2e-6
    assert float(difference) == pytest.approx(float((direction * (K @ r)).sum()), rel=1e-6, abs=1e-6)
    assert (found.steps, found.converged) == (2, found.gradient <= 1e-6)


@pytest.mark.ranks
def test_lambda_is_that_of_the_squared_loss(comm: MPI.Comm) -> None:
    found = fit_kernel_loss(made(comm), Y["squared"], "squared", ksp_rtol=1e-12)
    assert np.abs(found.coefficients - fit_kernel(made(comm), Y["squared"], ksp_rtol=1e-13).coefficients).max() < 1e-9
    assert classes_of(made(comm).predict(found.coefficients, X)).tolist() == LABELS.tolist()


@pytest.mark.ranks
@pytest.mark.parametrize("mu", [10.0, 1e-3, 1e-5])
@pytest.mark.parametrize("loss", ["logistic", "softmax", "squared_hinge"])
def test_separable_classes_are_separated_with_any_lambda(comm: MPI.Comm, loss: str, mu: float) -> None:
    """J decreases whatever the length of a Newton step would be; margins grow as mu falls."""
    found = fit_kernel_loss(made(comm, mu=mu), Y[loss], loss, ksp_rtol=1e-8)
    assert found.converged
    assert (np.diff(found.values) <= 1e-14 * found.values[0]).all()
    if mu < 1:
        outputs = made(comm).predict(found.coefficients, digits().test_inputs[TEST_FOUR] / 16.0)
        assert (classes_of(outputs) == digits().test_labels[TEST_FOUR]).mean() > 0.95


@pytest.mark.ranks
@pytest.mark.parametrize("loss", ["logistic", "softmax", "squared_hinge"])
def test_equal_samples_work_also_where_their_classes_differ(comm: MPI.Comm, loss: str) -> None:
    twins, targets = np.concatenate([X[:60]] * 2), np.concatenate([Y[loss][:60], Y[loss][60:120]])
    found = fit_kernel_loss(made(comm, twins), targets, loss, ksp_rtol=1e-11)
    alpha, value = dense_newton(twins, targets, loss, MU)
    assert found.converged
    assert found.values[-1] == pytest.approx(value, rel=1e-12)
    assert np.linalg.norm(found.coefficients - alpha) < 1e-8 * np.linalg.norm(alpha)


@pytest.mark.ranks
@pytest.mark.parametrize("loss", ["logistic", "softmax", "squared_hinge"])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_few_samples_are_solved_on_any_ranks(comm: MPI.Comm, loss: str, count: int) -> None:
    found = fit_kernel_loss(made(comm, X[:count]), Y[loss][:count], loss, ksp_rtol=1e-12)
    alpha, _ = dense_newton(X[:count], Y[loss][:count], loss, MU)
    assert found.coefficients == pytest.approx(alpha, abs=1e-10)


@pytest.mark.ranks
@pytest.mark.parametrize("loss", ["logistic", "squared_hinge"])
def test_one_class_alone_and_one_column_work(comm: MPI.Comm, loss: str) -> None:
    one = np.where(LABELS == 1, 1.0, -1.0)
    column = fit_kernel_loss(made(comm), one, loss, ksp_rtol=1e-10).coefficients
    assert column.shape == (n, 1)
    beside = fit_kernel_loss(made(comm), np.stack([one, np.ones(n), -np.ones(n)], axis=1), loss, ksp_rtol=1e-10)
    assert np.abs(beside.coefficients[:, :1] - column).max() < 1e-8
    assert np.abs(beside.coefficients[:, 1] + beside.coefficients[:, 2]).max() < 1e-8


@pytest.mark.ranks
def test_softmax_of_two_classes_is_the_logistic_loss(comm: MPI.Comm) -> None:
    """Its columns are opposite, and half of the one column's function with twice its mu."""
    labels = (LABELS > 1).astype(int)
    both = fit_kernel_loss(made(comm, mu=2 * MU), class_targets("softmax", labels, 2), "softmax", ksp_rtol=1e-11)
    one = fit_kernel_loss(made(comm), class_targets("logistic", labels, 2), "logistic", ksp_rtol=1e-11)
    assert np.abs(both.coefficients.sum(axis=1)).max() < 1e-12
    assert np.abs(2 * both.coefficients[:, 1:] - one.coefficients).max() < 1e-8


@pytest.mark.ranks
@pytest.mark.parametrize("loss", ["squared", "logistic", "squared_hinge"])
def test_the_preconditioner_is_its_dense_formula(comm: MPI.Comm, loss: str) -> None:
    """That of a column: two levels on the weighed kernel, by their definitions."""
    operator, F = CurvedOperator(made(comm)), np.random.default_rng(3).standard_normal((n, CLASSES))
    layout, domain = operator.layout, operator.layout.domain
    K = gram().numpy()
    curvature = named_loss(loss).curvature(Y[loss], F)
    weights = np.stack([curvature.entry(c, c) for c in range(CLASSES)], axis=1)
    context = CurvedSchwarzPC(CLASSES, False)
    context.settings.coarse_rank = 20
    context.build(operator)
    operator.move(named_loss(loss).curvature(Y[loss][layout.rows], F[layout.rows]))
    context.renew(operator.curvature)
    V = np.random.default_rng(4).standard_normal((n, CLASSES))
    found = layout.everywhere(context.solve(V[layout.rows]))[layout.places]
    product = layout.everywhere(operator.multiply(V[layout.rows]))[layout.places]
    low = layout.everywhere(context.F)[layout.places]
    for c in range(CLASSES):
        G = np.diag(np.sqrt(weights[:, c]))
        left, D = MU * np.eye(n) + G @ (K - low @ low.T) @ G, np.zeros((n, n))
        for i, wide in enumerate(domain.sets):
            W = np.diag(np.sqrt(domain.weights(i)))
            D[np.ix_(wide, wide)] += W @ np.linalg.inv(left[np.ix_(wide, wide)]) @ W
        M = np.linalg.inv(D) + G @ low @ low.T @ G
        assert np.abs(M @ found[:, c] - V[:, c]).max() < 1e-9
        assert np.abs(product[:, c] - (MU * np.eye(n) + G @ K @ G) @ V[:, c]).max() < 1e-12 * n


@pytest.mark.ranks
def test_subdomains_save_iterations(comm: MPI.Comm) -> None:
    counts = {
        (loss, name): fit_kernel_loss(made(comm, mu=2e-3), Y[loss], loss, name, ksp_rtol=1e-4).iterations.sum()
        for loss in ("squared_hinge", "logistic")
        for name in ("none", "pivots", "schwarz")
    }
    assert counts["squared_hinge", "schwarz"] < counts["squared_hinge", "none"] / 3
    assert counts["logistic", "schwarz"] < counts["logistic", "pivots"] / 2 < counts["logistic", "none"] / 2


@pytest.mark.ranks
def test_a_start_saves_steps(comm: MPI.Comm) -> None:
    first = fit_kernel_loss(made(comm), Y["softmax"], "softmax")
    again = fit_kernel_loss(made(comm), Y["softmax"], "softmax", start=first.coefficients)
    assert (again.steps, again.products, again.converged) == (0, 1, True)
    assert again.coefficients.tobytes() == first.coefficients.tobytes()
    near = fit_kernel_loss(made(comm, mu=0.9 * MU), Y["softmax"], "softmax", start=first.coefficients)
    afresh = fit_kernel_loss(made(comm, mu=0.9 * MU), Y["softmax"], "softmax")
    assert near.converged
    assert near.products < afresh.products
    assert near.values[-1] == pytest.approx(afresh.values[-1], rel=1e-9)


@pytest.mark.ranks
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("loss", ["logistic", "softmax", "squared_hinge"])
def test_a_run_goes_on_from_any_state_to_the_last_bit(comm: MPI.Comm, loss: str, dtype: str) -> None:
    states: list[LossState] = []
    whole = fit_kernel_loss(made(comm, dtype=dtype), Y[loss], loss, monitor=states.append, ksp_rtol=1e-11)
    assert len(states) == whole.steps
    assert [state.gradient for state in states[:-1]] == whole.gradients[1:-1].tolist()
    for number, state in list(enumerate(states, 1))[::2]:

        def rest_of(on: MPI.Comm, state: LossState = state) -> Any:
            return fit_kernel_loss(made(on, dtype=dtype), Y[loss], loss, start=state, ksp_rtol=1e-11)

        rest = on_one_rank(rest_of) if number % 4 == 1 else rest_of(comm)
        assert rest.coefficients.tobytes() == whole.coefficients.tobytes()
        assert rest.iterations.tolist() == whole.iterations[number:].tolist()
        assert rest.values[1:].tolist() == whole.values[number + 1 :].tolist()
    stopped = fit_kernel_loss(made(comm), Y[loss], loss, monitor=lambda state: state.gradient < 0.1)
    assert stopped.gradients[-2] >= 0.1 > stopped.gradient


@pytest.mark.ranks
def test_float32_and_kernels_that_are_not_kept_lead_to_the_same_minimiser(comm: MPI.Comm) -> None:
    alpha, _ = exact("softmax")
    for settings in ({"dtype": "float32"}, {"keep": False}):
        operator = made(comm, **settings)
        assert (operator.kept is None) == ("keep" in settings)
        found = fit_kernel_loss(operator, Y["softmax"], "softmax", ksp_rtol=1e-11)
        assert found.converged
        assert np.linalg.norm(found.coefficients - alpha) < 1e-9 * np.linalg.norm(alpha)
        assert operator.products == found.products * CLASSES


@pytest.mark.parametrize(("loss", "C"), [("logistic", 1 / MU), ("squared_hinge", 1 / (2 * MU))])
def test_outputs_are_those_of_scikit_learn_on_the_kernels_own_features(loss: str, C: float) -> None:
    svm, linear = (pytest.importorskip(f"sklearn.{name}") for name in ("svm", "linear_model"))
    labels = LABELS > 1
    values, vectors = np.linalg.eigh(gram().numpy())
    features = vectors * np.sqrt(np.maximum(values, 0))  # whose inner products are K
    common = {"C": C, "fit_intercept": False, "tol": 1e-10, "max_iter": 100_000}
    model = (
        linear.LogisticRegression(**common) if loss == "logistic" else svm.LinearSVC(loss=loss, dual=False, **common)
    )
    known = model.fit(features, labels).decision_function(features)
    operator = made(MPI.COMM_SELF)
    found = fit_kernel_loss(operator, np.where(labels, 1.0, -1.0), loss, ksp_rtol=1e-10)
    assert np.abs(operator.predict(found.coefficients, X)[:, 0] - known).max() < 1e-5


def test_outputs_are_those_of_scikit_learns_multinomial_regression() -> None:
    linear = pytest.importorskip("sklearn.linear_model")
    values, vectors = np.linalg.eigh(gram().numpy())
    features = vectors * np.sqrt(np.maximum(values, 0))
    model = linear.LogisticRegression(C=1 / MU, fit_intercept=False, tol=1e-10, max_iter=100_000)
    known = model.fit(features, LABELS).decision_function(features)
    operator = made(MPI.COMM_SELF)
    found = operator.predict(fit_kernel_loss(operator, Y["softmax"], "softmax", ksp_rtol=1e-10).coefficients, X)
    assert np.abs(found - (known - known.mean(axis=1, keepdims=True))).max() < 1e-5


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"Y": Y["squared"]}, "loss logistic is of classes, -1 or 1 in each column of Y"),
    ({"Y": Y["logistic"], "loss": "softmax"}, "loss softmax is of classes, in each row of Y a 1 and else 0"),
    ({"Y": np.sin(X[:, :2]), "loss": "squared_hinge"}, "for numbers use the squared loss"),
    ({"Y": LABELS}, "loss logistic is of classes"),
    ({"loss": "hinge"}, "unknown loss 'hinge'; there are squared, logistic, softmax, squared_hinge"),
    ({"Y": Y["logistic"][:-1]}, f"a row for each of {n} samples"),
    ({"Y": np.where(Y["logistic"] > 0, np.nan, -1)}, "Y has values that are not finite"),
    ({"start": Y["logistic"][:, :2]}, "start must be"),
    ({"start": LossState(Y["logistic"], Y["logistic"][:, 1:], True, 1.0, 1.0, 1.0)}, "start must be"),
    ({"start": LossState(Y["logistic"], np.nan * Y["logistic"], True, 1.0, 1.0, 1.0)}, "start has values that are not"),
    ({"start": Y["logistic"] * np.inf}, "start has values that are not finite"),
    ({"preconditioner": "nystrom"}, "unknown preconditioner 'nystrom' of losses; there are pivots, schwarz, none"),
    ({"Y": Y["softmax"], "loss": "softmax", "preconditioner": "schwarz"}, "couples columns, .* use pivots"),
    ({"steps": -1}, "steps must be 0 or more, got -1"),
    ({"coarse_rank": n + 1}, f"{n} samples have 1 to {n} pivots"),
    ({"pivots": "best"}, "pivots must be one of uniform, cholesky"),
    ({"omega": 1.0}, "there is no option omega"),
    ({"ksp_type": "conjugate"}, "PETSc refuses an option"),
    ({"mu": 0.0}, "loss logistic needs a lambda above 0"),
]


@pytest.mark.ranks
@pytest.mark.parametrize(("settings", "words"), REFUSED)
def test_what_cannot_be_minimised_is_refused_on_all_ranks(
    comm: MPI.Comm, prefix: str, settings: dict[str, Any], words: str
) -> None:
    given = {"Y": Y["logistic"], "prefix": prefix} | settings
    with pytest.raises(InputError, match=words):
        fit_kernel_loss(made(comm, mu=given.pop("mu", MU)), **given)


@pytest.mark.ranks
def test_what_is_not_minimised_says_so(comm: MPI.Comm) -> None:
    found = fit_kernel_loss(made(comm), Y["logistic"], steps=0)
    assert (found.steps, found.products, found.converged, found.gradient) == (0, 0, False, 1.0)
    assert not found.coefficients.any()
    for most in (1, 2, 5):  # however early the systems' solver ends, J decreases
        short = fit_kernel_loss(made(comm, mu=1e-4), Y["logistic"], preconditioner="none", steps=4, ksp_max_it=most)
        assert not short.converged
        assert short.iterations.tolist() == [most] * 4
        assert (np.diff(short.values) < 0).all()
    rounding = fit_kernel_loss(made(comm), Y["logistic"], ksp_rtol=1e-30)
    assert not rounding.converged
    assert rounding.gradient < 1e-13
    assert rounding.steps < 20
