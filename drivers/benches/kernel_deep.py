"""Section kernels_deep: features that are trained under a kernel machine, and what comes of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from mpi4py import MPI
from numpy.typing import NDArray
from torch import Tensor, nn

from ddml.data import files
from ddml.kernel_machines import SampleDomain, SampleLayout, median_distance
from ddml.kernel_machines.features import FeatureLoss, Penalty, kernel_expansion, last_hidden, native_penalty
from ddml.kernel_machines.gradients import smooth
from ddml.kernel_machines.inexact import FIRST, LEAST, InexactSystem
from ddml.kernel_machines.leave_one_out import LeaveOneOut
from ddml.kernel_machines.operator import KernelOperator
from ddml.kernel_machines.reduced import HeldOut, ReducedFunctional, ReducedTikhonov
from ddml.layout import ParameterLayout
from ddml.losses.module import ModuleLoss
from ddml.objectives.deep import DeepKernelObjective
from solvers import fit_kernel, minimise
from solvers.kernel_machines.inner import InnerSolver

# the study's (docs/results/kernel_machines.md): lambda, widths over the median distance, centres, features, the inner
# Tikhonov term, subdomains, evaluations
MU, WIDTH, CENTRES, FEATURES, RHO, PARTS, EVALUATIONS = 0.1, 0.5, 300, 12, 1e-4, 16, 30
HELD = 0.25  # part of the samples that is held out (our choice)
LEFT = 2000  # samples above which the first cases are run only (our choice)

Array = NDArray[Any]


class Images(NamedTuple):
    """Samples from 0 to 1, their targets and labels, to train on and to test with."""

    x: Array
    y: Array
    labels: Array
    test_x: Array
    test_labels: Array


@dataclass
class Run:
    """A deep kernel, trained."""

    values: list[float]
    products: list[int]
    before: float
    after: float
    seconds: float


def images(path: str, count: int) -> Images:
    """The first samples of a data file."""
    data = files.load(path, MPI.COMM_SELF, count)
    classes = len(data.classes)
    x, test = (np.asarray(a, float) / data.maximum for a in (data.inputs[:count], data.test_inputs))
    return Images(x, np.eye(classes)[data.labels[:count]] - 1 / classes, data.labels[:count], test, data.test_labels)


def machine(x: Array, y: Array, points: Array, mu: float = MU, width: float = WIDTH) -> Array:
    """The classes (m,) of points by a kernel machine of x, rbf of so many median distances."""
    x, points = x.reshape(len(x), -1), points.reshape(len(points), -1)
    layout = SampleLayout(SampleDomain.by_tree(x, PARTS), MPI.COMM_SELF)
    operator = KernelOperator(smooth("rbf", width * median_distance(x)), x, mu, layout)
    return np.asarray(operator.predict(fit_kernel(operator, y).coefficients, points).argmax(axis=1))


def deep(
    data: Images, module: nn.Module, penalty: Penalty, kind: str, rtol: float, least: float
) -> tuple[DeepKernelObjective, Callable[[Tensor], float]]:
    """The objective of a kind, and the accuracy of the machine of all samples on test samples, of theta."""
    loss = FeatureLoss(module, data.x)
    phi = loss.features(loss.initial()).numpy()
    width, n = WIDTH * median_distance(phi), len(phi)
    kernel = smooth("rbf", width)
    count = n - int(HELD * n) if kind == "held out" else n
    layout = SampleLayout(SampleDomain.by_tree(phi[:count], PARTS), MPI.COMM_SELF)
    functional: ReducedFunctional
    if kind == "leave one out":
        functional = LeaveOneOut(kernel, MU, layout, data.y)
    else:
        system = InexactSystem(kernel, MU, layout, InnerSolver(), rtol=rtol, least=least)
        if kind == "held out":
            functional = HeldOut(system, data.y, np.arange(count), np.arange(count, n))
        else:
            functional = ReducedTikhonov(system, data.y)

    def accuracy(theta: Tensor) -> float:
        found, points = loss.features(theta).numpy(), loss.of_inputs(theta, data.test_x).numpy()
        whole = SampleLayout(SampleDomain.by_tree(found, PARTS), MPI.COMM_SELF)
        operator = KernelOperator(kernel, found, MU, whole)
        said = operator.predict(fit_kernel(operator, data.y).coefficients, points).argmax(axis=1)
        return float((said == data.test_labels).mean())

    return DeepKernelObjective(loss, ParameterLayout(loss.parameters, MPI.COMM_SELF), functional, penalty), accuracy


def layer(data: Images, centres: int, features: int, seed: int) -> nn.Sequential:
    """A concatenated layer on samples that are drawn."""
    rows = np.sort(np.random.default_rng(seed).choice(len(data.x), centres, replace=False))
    inner = smooth("rbf", WIDTH * median_distance(data.x))
    return kernel_expansion(inner, data.x[rows], features)


def trained(
    data: Images, solver: str, kind: str = "tikhonov", rtol: float = FIRST, least: float = LEAST, rho: float = RHO
) -> Run:
    """The concatenated layer, trained for as many evaluations as the study took."""
    module = layer(data, CENTRES, FEATURES, 0)
    made, accuracy = deep(data, module, native_penalty(module, rho), kind, rtol, least)
    before, begin = accuracy(made.loss.initial()), time.process_time()
    values, products = list[float](), list[int]()

    def watch(iteration: int, value: float, norm: float) -> bool:
        values.append(value)
        products.append(made.functional.products // made.functional.columns)
        return made.work.gradients >= EVALUATIONS

    found = minimise(made, solver, MPI.COMM_SELF, iterations=EVALUATIONS, monitor=watch)
    seconds = time.process_time() - begin
    return Run(values, products, before, accuracy(found.theta), seconds)


def deep_kernels(settings: Any) -> None:
    """Print the tables."""
    for count in map(int, settings.deep_samples.split(",")):
        data = images(settings.deep_data, count)
        print(f"\nConcatenated layer, {CENTRES} centres x {FEATURES}, {count} samples, {EVALUATIONS} evaluations\n")
        print("| objective, inner term | solver | inner solves | value | products with K | accuracy | seconds |")
        print("| --- | --- | --- | --- | --- | --- | --- |")
        runs: dict[tuple[str, float, str, float], Run] = {}
        for kind, rho, solver, rtol, least in _cases(count):
            run = runs[kind, rho, solver, rtol] = trained(data, solver, kind, rtol, least, rho)
            ended = f"{run.values[0]:.4f} -> {run.values[-1]:.4f}"
            accuracy = f"{100 * run.before:.2f} -> {100 * run.after:.2f}"
            inner = "direct" if kind == "leave one out" else f"{rtol:.0e}" + (" at first" if least < rtol else "")
            products = run.products[-1] if run.products[-1] else "-"
            row = f"{kind}, {rho:g} | {solver} | {inner} | {ended} | {products} | {accuracy} | {run.seconds:.1f}"
            print(f"| {row} |", flush=True)
        right = machine(data.x, data.y, data.test_x) == data.test_labels
        print(f"| single kernel | | | | | {100 * right.mean():.2f} | |", flush=True)
        for solver in ("tr", "ssbroyden"):
            pair = [runs.get(("tikhonov", RHO, solver, rtol)) for rtol in (FIRST, LEAST)]
            if pair[1] is not None:
                _compare(solver, [run for run in pair if run is not None])
        if settings.deep_networks:
            hidden_layers(data, settings)


def _compare(solver: str, pair: Sequence[Run]) -> None:
    """Print the products of inexact and of exact solves to the same value: the lowest that both reach."""
    value = max(run.values[-1] for run in pair)
    loose, exact = (next(p for v, p in zip(r.values, r.products, strict=True) if v <= value) for r in pair)
    print(f"\n{solver} to {value:.5f}: {loose} products by inexact solves, {exact} by exact ones ({loose / exact:.2f})")


def _cases(count: int) -> Sequence[tuple[str, float, str, float, float]]:
    found = [("tikhonov", RHO, solver, FIRST, LEAST) for solver in ("tr", "ssbroyden")]
    if count > LEFT:
        return found
    found += [("tikhonov", RHO, solver, LEAST, LEAST) for solver in ("tr", "ssbroyden")]
    further = (("tikhonov", 10 * RHO), ("held out", RHO), ("held out", 10 * RHO), ("leave one out", RHO))
    return found + [(kind, rho, "ssbroyden", FIRST, LEAST) for kind, rho in further]


def classifier(kind: str, seed: int) -> nn.Sequential:
    """A network of the study (mlp), or two convolutions and two linear layers (cnn; our choice)."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if kind == "mlp":
            sizes = (nn.Flatten(), nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
            return nn.Sequential(*sizes).double()
        convolutions = [
            layer
            for inputs, outputs in ((1, 8), (8, 16))
            for layer in (nn.Conv2d(inputs, outputs, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2))
        ]
        return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 10))


def hidden_layers(data: Images, settings: Any) -> None:
    """Print what a kernel on the last hidden layer of a classifier trained by ``tr`` gains."""
    count, seeds = len(data.x), [int(seed) for seed in settings.seeds.split(",")]
    print(f"\nKernel on the last hidden layer of a classifier trained by tr, {count} samples, seeds {settings.seeds}\n")
    print("| network | classifier | kernel on its hidden layer | single kernel |\n| --- | --- | --- | --- |")
    single = (machine(data.x, data.y, data.test_x) == data.test_labels).mean()
    for kind in settings.deep_networks.split(","):
        pairs = [_pair(data, classifier(kind, seed), settings.deep_iterations) for seed in seeds]
        alone, under = (100 * statistics.median(column) for column in zip(*pairs, strict=True))
        print(f"| {kind} | {alone:.2f} | {under:.2f} | {100 * single:.2f} |", flush=True)


def _pair(data: Images, network: nn.Sequential, iterations: int) -> tuple[float, float]:
    """The accuracy of a classifier, trained, and of a kernel machine on its last hidden layer."""
    dtype = next(network.parameters()).dtype
    x, points = (torch.as_tensor(a, dtype=dtype) for a in (data.x, data.test_x))
    criterion = nn.CrossEntropyLoss(reduction="none")
    loss = ModuleLoss(network, criterion, x, torch.as_tensor(data.labels.astype(np.int64)))
    loss.assign(minimise(loss, "tr", MPI.COMM_SELF, iterations=iterations).theta)
    hidden = last_hidden(network)
    with torch.no_grad():
        said = network(points).argmax(dim=1).numpy()
        phi, at = (hidden(a).double().numpy() for a in (x, points))
    return float((said == data.test_labels).mean()), float((machine(phi, data.y, at) == data.test_labels).mean())
