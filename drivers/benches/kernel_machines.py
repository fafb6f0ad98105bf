"""Sections kernels and kernels_iterations: kernel machines against other methods, by seconds and by iterations."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from mpi4py import MPI
from scipy import sparse

from ddml.data import files, libsvm
from ddml.errors import InputError
from ddml.kernel_machines import KernelOperator, SampleDomain, SampleLayout, costs, median_distance
from ddml.kernel_machines.functions import DISTANCES
from solvers import fit_kernel

from .kernel_rivals import (
    MOST, Array, Problem, Watch, averaged, block_descent, eigenpro, falkon, kernel_ridge, plain,
)  # fmt: skip
from .samples import row

# our choices: samples of a core and subdomains at least, where their number is not given, and the overlap
CORE, FEWEST, OVERLAP = 512, 4, 0.1
SHARE = 0.1  # the rank over n where iterations are compared
NEAR = 0.001  # of the exact solution's accuracy
ROOM = 1e12  # bytes: no limit
BLOCKS = 16  # iterates that are judged together
ROUNDING = 1 + 1e-6  # of a residual that two programs compute


@dataclass(frozen=True)
class Task:
    """A problem, the norms of its columns of Y, and samples to test with (m, d) and their labels."""

    problem: Problem
    scales: Array
    tests: Array
    labels: Array

    @classmethod
    def of(cls, data: str, size: int, kernel: str, share: float, shift: float, tests: int) -> Task:
        """The first so many samples of a data set, with a width that is a share of their median distance.

        Raises
        ------
        InputError
            If there are not so many, they are of one class, or the kernel has no width.
        """
        if kernel not in DISTANCES:
            raise InputError(f"kernels are compared that depend on distances: {', '.join(DISTANCES)}; got '{kernel}'")
        X, labels, others, known = tables(data, size, tests)
        mean = X.mean(axis=0)
        classes = np.unique(labels)
        if len(classes) == 1:
            raise InputError(f"the first {size} samples of '{data}' are of one class: take more")
        columns = np.eye(len(classes))[np.searchsorted(classes, labels)] - 1 / len(classes)
        Y = columns if len(classes) > 2 else np.sign(columns[:, 1:])
        scales = np.linalg.norm(Y, axis=0)
        problem = Problem(X - mean, Y / scales, kernel, share * median_distance(X), shift)
        places = np.where(np.isin(known, classes), np.searchsorted(classes, known), -1)
        return cls(problem, scales, others - mean, places)

    def accuracy(self, scores: Array) -> float:
        """Of scores (m, k) of columns of norm 1."""
        classes = (scores * self.scales).argmax(axis=1) if len(self.scales) > 1 else (scores[:, 0] > 0).astype(int)
        return float((classes == self.labels).mean())


def tables(data: str, size: int, tests: int) -> tuple[Array, Array, Array, Array]:
    """So many samples (n, d) and labels, and at most so many to test with: of a data set, or LIBSVM files train:test.

    Raises
    ------
    InputError
        If they cannot be read, or there are fewer than ``size``.
    """
    if data in files.DATA or ".py:" in data or data.endswith((".h5", ".hdf5")):
        found = files.load(data, MPI.COMM_SELF, size)
        X, others = (a.reshape(len(a), -1) / found.maximum for a in (found.inputs, found.test_inputs[:tests]))
        return X, found.labels, others, found.test_labels[:tests]
    names = data.split(":")
    if len(names) != 2:
        raise InputError(f"LIBSVM files are named as in a9a.gz:a9a.t.gz, to train and to test; got '{data}'")
    train, test = libsvm.read(names, MPI.COMM_SELF)
    if size > len(train.labels):
        raise InputError(f"{size} samples were asked for, '{data}' has {len(train.labels)}")
    counts = size, min(tests, len(test.labels))
    X, others = (sparse.csr_array(t.matrix(slice(0, m))).toarray() for t, m in zip((train, test), counts, strict=True))
    return X, train.labels[:size], others, test.labels[: counts[1]]


def numbers(settings: Any, name: str, kind: type[int] | type[float] = int) -> list[Any]:
    """The positive numbers that an option names.

    Raises
    ------
    InputError
        If it names anything else.
    """
    text = getattr(settings, name)
    try:
        found = [kind(word) for word in text.split(",")]
    except ValueError:
        found = [0]
    if not all(0 < number < math.inf for number in found):
        raise InputError(f"option -{name} must be numbers above 0, as in 4,16; got '{text}'")
    return found


def cell(number: float) -> str:
    """Three digits; - for what there is not."""
    return f"{number:#.3g}".rstrip(".") if math.isfinite(number) else "-"


def subdomains(n: int) -> int:
    """How many there are by default."""
    return max(2 ** round(math.log2(n / CORE)), FEWEST)


def ours(
    problem: Problem, watch: Watch, count: int = 0, dtype: str = "float64", kept: bool = True, **options: Any
) -> None:
    """``fit_kernel``, with p subdomains (0: what the model of cost chooses) and options of it."""
    n, d = problem.X.shape
    overlap = OVERLAP
    if not count:
        choice = costs.choices(costs.Task(n, d, problem.Y.shape[1], problem.shift, kept=kept, dtype=dtype))
        count, overlap = choice.subdomains, choice.overlap
    layout = SampleLayout(SampleDomain.by_tree(problem.X, count, overlap), MPI.COMM_SELF)
    operator = KernelOperator(problem.kernel, problem.X, problem.shift, layout, ROOM, dtype, kept)

    def monitor(alpha: Array) -> None:
        if not watch.times:
            watch.ready()
        watch.keep(operator.products / problem.Y.shape[1], np.copy, alpha)

    fit_kernel(operator, problem.Y, monitor=monitor, ksp_rtol=problem.rtol, ksp_max_it=MOST, **options)


def nystrom(problem: Problem, watch: Watch, share: float, **given: Any) -> None:
    """``fit_kernel`` with Nystrom's preconditioner of rank share x n, without subdomains."""
    ours(problem, watch, 1, preconditioner="nystrom", rank=max(round(share * len(problem.X)), 1), **given)


@dataclass(frozen=True)
class Method:
    """A name; what runs it; whether it solves the whole problem in the end."""

    name: str
    run: Callable[[Problem, Watch], None]
    exact: bool = True

    def watched(self, problem: Problem) -> Watch:
        """Run it."""
        watch = Watch()
        self.run(problem, watch)
        watch.stop()
        return watch


REFERENCE = Method("KernelRidge", kernel_ridge)


def methods(n: int, shares: Sequence[float]) -> list[Method]:
    """All that are compared, the reference first; Nystrom-CG of some ranks over n."""
    blocks = subdomains(n)
    ranks = [Method(f"Nystrom-CG, rank {share:g} n", partial(nystrom, share=share)) for share in shares]
    return [
        REFERENCE,
        Method("conjugate gradients", plain),
        *ranks,
        Method(f"Nystrom-CG, rank {SHARE:g} n, float32", partial(nystrom, share=SHARE, dtype="float32")),
        Method(f"Nystrom-CG, rank {SHARE:g} n, not kept", partial(nystrom, share=SHARE, kept=False)),
        *(Method(f"Falkon-style, n / {d} centres", partial(falkon, centres=n // d), False) for d in (8, 4, 2)),
        Method("EigenPro-2-style", eigenpro),
        Method("EigenPro-2-style, float32", partial(eigenpro, dtype="float32")),
        Method(f"block descent, {blocks} blocks", partial(block_descent, blocks=blocks, accelerated=False)),
        Method(f"the same, accelerated as ASkotch, {blocks}", partial(block_descent, blocks=blocks, accelerated=True)),
        *(Method(f"averaged, {parts} parts", partial(averaged, parts=parts), False) for parts in (4, 16, 64)),
        Method("**ours, default options**", ours),
        Method("**ours, p = 16**", partial(ours, count=16)),
        Method("**ours, float32**", partial(ours, dtype="float32")),
        Method("**ours, not kept**", partial(ours, kept=False)),
    ]


class Judge:
    """True residuals and test accuracies of iterates, with matrices that are computed once."""

    def __init__(self, task: Task) -> None:
        self.task, problem = task, task.problem
        self.A = problem.gram()
        self.A[np.diag_indices(len(self.A))] += problem.shift
        self.cross = problem.between(task.tests, problem.X)

    def of(self, iterates: Sequence[Array]) -> tuple[Array, Array]:
        """Of each iterate (n, k): the norm of the residual over that of Y, and the accuracy."""
        Y = self.task.problem.Y
        residuals, accuracies = [], []
        for some in (iterates[i : i + BLOCKS] for i in range(0, len(iterates), BLOCKS)):
            together = np.hstack(some)
            for image, scores in zip(
                np.split(self.A @ together, len(some), axis=1),
                np.split(self.cross @ together, len(some), axis=1),
                strict=True,
            ):
                residuals.append(np.linalg.norm(Y - image) / np.linalg.norm(Y))
                accuracies.append(self.task.accuracy(scores))
        return np.array(residuals), np.array(accuracies)


def kernels(settings: Any) -> None:
    """The same problem by all methods, in turn: seconds, products, residual, accuracy."""
    words, shares = settings.kernels_methods.split(","), numbers(settings, "kernels_ranks", float)
    for size in numbers(settings, "kernels_sizes"):
        task = Task.of(settings.kernels_data, size, settings.kernels_kernel, settings.kernels_width,
                       settings.kernels_lambda, settings.kernels_tests)  # fmt: skip
        problem = task.problem
        chosen = [m for m in methods(size, shares) if m is REFERENCE or any(word in m.name for word in words)]
        print(
            f"\n### {Path(settings.kernels_data).name}, {size} samples, {problem.Y.shape[1]} columns, "
            f"{len(task.labels)} to test with; {problem.kernel}, lambda {problem.shift:g}\n\n"
            f"Processor seconds of one core, medians of {settings.kernels_repeats}; products with K of all columns. "
            f"Accuracy within {NEAR:.1%} of KernelRidge's; a true residual of {problem.rtol:g}.\n"
        )
        row(["", "set-up s", "solve s", "total s", "products", "residual", "accuracy %", "accuracy after s",
             "residual after s"])  # fmt: skip
        row(["-"] * 9)
        kernel_ridge(replace(problem, X=problem.X[:9], Y=problem.Y[:9]), Watch())  # which imports scikit-learn
        judge, runs = Judge(task), {m.name: list[Watch]() for m in chosen}
        wanted = math.nan
        for repeat in range(settings.kernels_repeats):
            for method in chosen:
                watch = method.watched(problem)
                runs[method.name].append(watch)
                if repeat == settings.kernels_repeats - 1:
                    residuals, accuracies = judge.of(watch.iterates)
                    wanted = accuracies[-1] - NEAR if method is REFERENCE else wanted
                    print_row(method, runs[method.name], residuals, accuracies, wanted, problem.rtol)
                watch.iterates.clear()


def print_row(
    method: Method, runs: Sequence[Watch], residuals: Array, accuracies: Array, wanted: float, rtol: float
) -> None:
    """A method: medians over the runs, which all had the same iterates."""
    setup, total = (statistics.median(getattr(w, name) for w in runs) for name in ("setup", "total"))
    times = np.median([w.times for w in runs], axis=0)

    def first(there: Array) -> str:
        return cell(float(times[there.argmax()])) if there.any() else "-"

    row([
        method.name, cell(setup), cell(total - setup), cell(total), cell(runs[0].products[-1]),
        f"{residuals[-1]:.1e}" if method.exact else "-", f"{100 * accuracies[-1]:.2f}", first(accuracies >= wanted),
        first(residuals <= rtol * ROUNDING) if method.exact else "-",
    ])  # fmt: skip


def kernels_iterations(settings: Any) -> None:
    """Iterations to 1e-6 by sets, kernels, lambdas and subdomains; and seconds against Nystrom-CG of the best rank."""
    counts = numbers(settings, "kernels_counts")
    for size in numbers(settings, "kernels_sizes"):
        tasks = [
            (f"{Path(data.split(':')[0]).name}, {name} {share}", Task.of(data, size, name, float(share), shift, 1))
            for data, (name, share), shift in itertools.product(
                settings.kernels_sets.split(","),
                [_pair(word) for word in settings.kernels_kernels.split(",")],
                numbers(settings, "kernels_lambdas", float),
            )
        ]
        print(f"\n### Iterations to 1e-6, {size} samples, rank {SHARE:g} n, overlap {OVERLAP:g}\n")
        row(["samples, kernel, width", "lambda", "none", "Nystrom", *(f"p = {count}" for count in counts)])
        row(["-"] * (4 + len(counts)))
        for label, task in tasks:
            rank = max(round(SHARE * size), 1)
            tried = [
                partial(ours, count=1, preconditioner="none"),
                partial(nystrom, share=SHARE),
                *(partial(ours, count=count, coarse_rank=rank) for count in counts),
            ]
            row([label, f"{task.problem.shift:g}", *(_iterations(Method("", run), task) for run in tried)])
        _against_nystrom(settings, size, tasks)


def _pair(word: str) -> tuple[str, str]:
    name, _, share = word.partition(":")
    try:
        float(share)
    except ValueError:
        raise InputError(f"option -kernels_kernels must be kernels with widths as in rbf:0.5; got '{word}'") from None
    return name, share


def _iterations(method: Method, task: Task) -> str:
    found = len(method.watched(task.problem).times) - 1
    return f"{found}" if found < MOST else f"> {MOST}"


def _against_nystrom(settings: Any, size: int, tasks: Sequence[tuple[str, Task]]) -> None:
    """Default options against the rank that is fastest; where K is not kept, against the one of fewest iterations."""
    shares = numbers(settings, "kernels_ranks", float)
    print(
        f"\n### Default options against Nystrom-CG of the best of the ranks {', '.join(f'{s:g}' for s in shares)} n, "
        f"{size} samples\n\nProcessor seconds to 1e-6 with the kernel's (iterations), medians of "
        f"{settings.kernels_repeats}; where the kernel is not kept, against the rank of fewest iterations.\n"
    )
    row(["samples, kernel, width", "lambda", "ours", "Nystrom-CG", "its rank", "Nystrom / ours", "not kept: ours",
         "Nystrom-CG", "Nystrom / ours"])  # fmt: skip
    row(["-"] * 9)
    for label, task in tasks:
        kept = [Method("", ours), *(Method("", partial(nystrom, share=share)) for share in shares)]
        (our, our_count), *others = _timed(kept, task.problem, settings.kernels_repeats)
        best = min(range(len(shares)), key=lambda i: others[i][0])
        fewest = min(range(len(shares)), key=lambda i: others[i][1])
        rival = partial(nystrom, share=shares[fewest], kept=False)
        (far, far_count), (rivals, count) = _timed(
            [Method("", partial(ours, kept=False)), Method("", rival)], task.problem, settings.kernels_repeats
        )
        row([
            label, f"{task.problem.shift:g}", f"{cell(our)} ({our_count})",
            f"{cell(others[best][0])} ({others[best][1]})", f"{shares[best]:g} n", f"{others[best][0] / our:.2f}",
            f"{cell(far)} ({far_count})", f"{cell(rivals)} ({count})", f"{rivals / far:.2f}",
        ])  # fmt: skip


def _timed(run: Sequence[Method], problem: Problem, repeats: int) -> list[tuple[float, int]]:
    """The median seconds and the iterations of methods that are run in turn."""
    seconds: list[list[float]] = [[] for _ in run]
    counts = [0] * len(run)
    for _ in range(repeats):
        for i, method in enumerate(run):
            watch = method.watched(problem)
            seconds[i].append(watch.total)
            counts[i] = len(watch.times) - 1
    return [(statistics.median(taken), count) for taken, count in zip(seconds, counts, strict=True)]
