"""Losses of the outputs of kernel machines, against differences and the functions of others."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy import optimize, special

from ddml.errors import InputError
from ddml.kernel_machines.losses import LOSSES, OutputLoss, class_targets, classes_of, named_loss

rng = np.random.default_rng(5)
LABELS = rng.integers(0, 4, 30)
F = 3 * rng.standard_normal((30, 4))
CASES = list(LOSSES)
KNOWN = {
    "squared": lambda f, y: (f - y).square().sum(dim=1) / 2,
    "logistic": lambda f, y: -special.log_expit((y * f).numpy()).sum(axis=1),
    "softmax": lambda f, y: torch.nn.functional.cross_entropy(f, y.argmax(dim=1), reduction="none"),
    "squared_hinge": lambda f, y: torch.clamp(1 - y * f, min=0).square().sum(dim=1) / 2,
}


def targets(name: str) -> np.ndarray:
    return rng.standard_normal((30, 4)) if name == "squared" else class_targets(name, LABELS, 4)


def dense(loss: OutputLoss, Y: np.ndarray, at: np.ndarray) -> np.ndarray:
    """H of each sample, (n, k, k), from its entries."""
    curvature, k = loss.curvature(Y, at), at.shape[1]
    return np.array([[curvature.entry(a, b) for b in range(k)] for a in range(k)]).transpose(2, 0, 1)


@pytest.mark.parametrize("name", CASES)
def test_derivatives_are_those_of_differences(name: str) -> None:
    loss, Y = named_loss(name), targets(name)
    for column in range(4):
        step = np.zeros_like(F)
        step[:, column] = 1e-6
        slopes = (loss.values(Y, F + step) - loss.values(Y, F - step)) / 2e-6
        assert np.abs(slopes - loss.slopes(Y, F)[:, column]).max() < 1e-8
        curved = (loss.slopes(Y, F + step) - loss.slopes(Y, F - step)) / 2e-6
        assert np.abs(curved - dense(loss, Y, F)[:, :, column]).max() < 1e-8


@pytest.mark.parametrize("name", CASES)
def test_factors_are_those_of_the_second_derivatives(name: str) -> None:
    loss, Y = named_loss(name), targets(name)
    H, curvature = dense(loss, Y, F), loss.curvature(Y, F)
    V, W = rng.standard_normal((2, *F.shape))
    product = curvature.factor(curvature.transposed(V))
    assert np.abs(product - np.einsum("nab,nb->na", H, V)).max() < 1e-14
    assert (W * curvature.factor(V)).sum() == pytest.approx((curvature.transposed(W) * V).sum())
    assert np.linalg.eigvalsh(H).min() > -1e-15
    assert np.linalg.eigvalsh(H).max() <= loss.largest + 1e-15
    assert loss.coupled == bool(np.abs(H[:, 0, 1]).max() > 0)


@pytest.mark.parametrize("name", CASES)
def test_values_are_those_of_torch_and_scipy_and_never_overflow(name: str) -> None:
    loss, Y = named_loss(name), targets(name)
    for outputs in (F, 1e4 * F, 1e140 * np.sign(F)):
        at, y = torch.tensor(outputs), torch.tensor(Y)
        known = KNOWN[name](at, y)
        assert loss.values(Y, outputs) == pytest.approx(np.asarray(known), rel=1e-13)
        assert np.isfinite(loss.slopes(Y, outputs)).all()
        assert np.isfinite(dense(loss, Y, outputs)).all()


@pytest.mark.parametrize("name", CASES)
def test_they_are_convex(name: str) -> None:
    loss, Y = named_loss(name), targets(name)
    G = F + rng.standard_normal(F.shape)
    middle = loss.values(Y, (F + G) / 2)
    assert (middle <= (loss.values(Y, F) + loss.values(Y, G)) / 2 + 1e-14).all()
    bregman = loss.values(Y, G) - loss.values(Y, F) - (loss.slopes(Y, F) * (G - F)).sum(axis=1)
    assert (bregman >= -1e-14).all()


def test_the_best_constant_output_is_what_scipy_finds() -> None:
    Y = class_targets("softmax", LABELS, 4)
    loss = named_loss("softmax")
    found = optimize.minimize(lambda c: loss.values(Y, np.tile(c, (30, 1))).sum(), np.zeros(4)).x
    assert special.softmax(found) == pytest.approx(np.bincount(LABELS) / 30, abs=1e-4)


def test_targets_and_classes_belong_together() -> None:
    for name in CASES:
        for classes in (2, 3, 7):
            labels = rng.integers(0, classes, 50)
            Y = class_targets(name, labels, classes)
            named_loss(name).check(Y)
            assert Y.shape == (50, 1 if classes == 2 and name != "softmax" else classes)
            assert (classes_of(Y) == labels).all()
    assert class_targets("squared", np.array([0, 2]), 3) == pytest.approx(np.array([[2, -1, -1], [-1, -1, 2]]) / 3)
    assert (class_targets("logistic", np.array([1, 0]), 2) == [[1], [-1]]).all()


REFUSED: list[tuple[Any, Any, int, str]] = [
    ("logistic", [0, 1, 2], 2, "integer from 0 to 1"),
    ("logistic", [-1, 1], 2, "integer from 0 to 1"),
    ("softmax", [0.0, 1.0], 2, "integer from 0 to 1"),
    ("softmax", [[0], [1]], 2, "array of one dimension"),
    ("softmax", [], 2, "integer from 0 to 1"),
    ("squared_hinge", [0, 0], 1, "integer from 0 to 0"),
    ("hinge", [0, 1], 2, "unknown loss 'hinge'; there are squared, logistic, softmax, squared_hinge"),
]


@pytest.mark.parametrize(("loss", "labels", "classes", "words"), REFUSED)
def test_labels_of_no_class_are_refused(loss: str, labels: Any, classes: int, words: str) -> None:
    with pytest.raises(InputError, match=words):
        class_targets(loss, np.array(labels), classes)


WRONG: list[tuple[str, Any, str]] = [
    ("logistic", [[0.37], [1]], "loss logistic is of classes, -1 or 1 in each column of Y; sample 0 has 0.37"),
    ("logistic", [[1.0], [0]], "sample 1 has 0: for numbers use the squared loss"),
    ("squared_hinge", [[1, -1], [1, 1 + 1e-12]], "sample 1 has 1.000000000001: for"),
    ("squared_hinge", [[3.0]], "sample 0 has 3"),
    ("softmax", [[1.0], [0.0]], "two columns of Y or more"),
    ("softmax", [[1, 0], [1, 1]], "a 1 and else 0; sample 1 has"),
    ("softmax", [[1, 0], [0, 0]], "sample 1 has"),
    ("softmax", [[0.5, 0.5]], "sample 0 has"),
    ("softmax", [[1, -1]], "sample 0 has"),
    ("softmax", np.eye(20) - 1 / 20, "sample 0 has"),
]


@pytest.mark.parametrize(("name", "Y", "words"), WRONG)
def test_targets_of_another_kind_are_refused_in_one_line(name: str, Y: Any, words: str) -> None:
    with pytest.raises(InputError, match=words) as raised:
        named_loss(name).check(np.array(Y, dtype=float))
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 200
