"""Section kernels_balance: boxes of samples before and after balancing, samples that arrive later, a slow rank."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from mpi4py import MPI
from numpy.typing import NDArray
from scipy import linalg, sparse

from ddml.data import files, libsvm
from ddml.errors import InputError
from ddml.kernel_machines import KernelOperator, SampleDomain, SampleLayout, median_distance, named
from ddml.kernel_machines.balance import balanced
from ddml.kernel_machines.shapes import carried, grown, reshaped
from ddml.kernel_machines.speeds import Speeds
from solvers import fit_kernel

from .samples import row
from .tools import BENCH, LAUNCH, without_mpi

Array = NDArray[np.float64]
GRIDS = ((4, 4), (8, 8))
SHIFT, WIDTH, SHARE = 0.1, 0.5, 10  # lambda, width over the median distance, n over the rank
TOLERANCES = (1e-3, 1e-6)
# our choices: parts of the samples that are late; delays of a product in seconds; products that are measured; digits
# that are solved for then
WORTH = 0.9  # of the time of a product: above, rows are left where they are
LATE, SLOW, FIRST, DIGITS = (0.1, 0.02), (0.1, 0.3), 3, 1024


def table(data: str) -> tuple[Array, Array]:
    """All training samples (n, d) of a data set and columns (n, k) to fit.

    Raises
    ------
    InputError
        If they cannot be read.
    """
    if data in files.DATA or data.endswith((".h5", ".hdf5")):
        found = files.load(data, MPI.COMM_SELF)
        X, labels = found.inputs.reshape(len(found.inputs), -1) / float(found.maximum), found.labels
    else:
        sparsely = libsvm.read([data, data], MPI.COMM_SELF)[0]
        X = sparse.csr_array(sparsely.matrix(slice(0, len(sparsely.labels)))).toarray()
        labels = sparsely.labels
    classes = np.unique(labels)
    return X, np.eye(len(classes))[np.searchsorted(classes, labels)] - 1 / len(classes)


def kernels_balance(settings: Any) -> None:
    """Rounds, samples moved, seconds of solves; and on two ranks what a slow one costs."""
    sets = {data: table(data) for data in settings.kernels_balance_data.split(",")}
    row(["samples", "boxes", "empty", "min / max load", "rounds", "moved over n", "in another core", "norm of the flow",
         "s"])  # fmt: skip
    row(["-"] * 9)
    for data, (X, _) in sets.items():
        X = X[: settings.kernels_balance_samples]
        for parts in GRIDS:
            domain = SampleDomain.by_boxes(X, parts)
            begun = time.process_time()
            found = balanced(domain, X)
            taken = time.process_time() - begun
            moved = [round(r.moved / len(X), 3) for r in found.rounds]
            row([f"{data}, {len(X)}", f"{parts[0]} x {parts[1]}", str(sum(not len(core) for core in domain.cores)),
                 f"{found.before:.4f} -> {found.after:.4f}", str(len(found.rounds)), " + ".join(map(str, moved)),
                 f"{found.resettled / len(X):.2f}", " + ".join(f"{r.flow:.4g}" for r in found.rounds),
                 f"{taken:.2f}"])  # fmt: skip
    print()
    row(["samples", "subdomains", "largest set", "local factors, all (s)", "the largest", "iterations", "set-up and "
         "iterations (s)", "coefficients differ by"])  # fmt: skip
    row(["-"] * 8)
    for data, (X, Y) in sets.items():
        some = slice(0, settings.kernels_balance_solved)
        _solves(data, X[some], Y[some], settings.repeats)
    print()
    row(["samples", "late", "to 1e-3 from zero", "from the old coefficients", "to 1e-6 from zero",
         "from the old coefficients", "first residual"])  # fmt: skip
    row(["-"] * 7)
    for data, (X, Y) in sets.items():
        some = slice(0, settings.kernels_balance_solved)
        _late(data, X[some], Y[some])
    print()
    command = [*LAUNCH, "-n", "2", sys.executable, "-m", "mpi4py", BENCH, "-only", "kernels_balance_worker"]
    subprocess.run([*command, "-repeats", str(settings.repeats)], check=True, env=without_mpi())


def _operator(X: Array, domain: SampleDomain) -> KernelOperator:
    return KernelOperator(named("rbf", WIDTH * median_distance(X)), X, SHIFT, SampleLayout(domain, MPI.COMM_SELF))


def _fit(operator: KernelOperator, Y: Array, **given: Any) -> Any:
    return fit_kernel(operator, Y, coarse_rank=len(Y) // SHARE, **({"ksp_rtol": TOLERANCES[-1]} | given))


def _solves(data: str, X: Array, Y: Array, repeats: int) -> None:
    boxes = SampleDomain.by_boxes(X, GRIDS[0])
    cuts = {"boxes": boxes, "balanced boxes": balanced(boxes, X).domain, "tree": SampleDomain.by_tree(X, len(boxes))}
    cuts["tree, sets as of balancing"] = reshaped(cuts["tree"], X, cuts["tree"].cores, "tree")
    operators = {name: _operator(X, domain) for name, domain in cuts.items()}
    seconds: dict[str, list[float]] = {name: [] for name in cuts}
    fits: dict[str, Any] = {}
    for _ in range(repeats):
        for name, operator in operators.items():
            begun = time.process_time()
            fits[name] = _fit(operator, Y)
            seconds[name].append(time.process_time() - begun)
    exact = _fit(operators["tree"], Y, ksp_rtol=1e-13).coefficients
    for name, operator in operators.items():
        local = _local(operator)
        alpha = _fit(operator, Y, ksp_rtol=1e-13).coefficients
        error = float(np.linalg.norm(alpha - exact) / np.linalg.norm(exact))
        row([f"{data}, {len(X)}", name, str(max(map(len, cuts[name].sets))), f"{sum(local):.2f}", f"{max(local):.3f}",
             str(fits[name].iterations), f"{statistics.median(seconds[name]):.2f}", f"{error:.0e}"])  # fmt: skip


def _local(operator: KernelOperator) -> list[float]:
    """Seconds of the Cholesky factor of each subdomain."""
    found = []
    for wide in filter(len, operator.layout.domain.sets):
        samples = operator.samples[operator.layout.places[wide]]
        system = operator.kernel(samples, samples.clone()).numpy() + SHIFT * np.eye(len(wide))
        begun = time.process_time()
        linalg.cholesky(system, lower=True, check_finite=False)
        found.append(time.process_time() - begun)
    return found


def _late(data: str, X: Array, Y: Array) -> None:
    for late in LATE:
        n = round(len(X) * (1 - late))
        before = SampleDomain.by_tree(X[:n], 16)
        old = _fit(_operator(X[:n], before), Y[:n])
        operator = _operator(X, balanced(grown(before, X), X).domain)
        start = carried(old.coefficients, len(X))
        cells = [f"{data}, {n}", str(len(X) - n)]
        for rtol in TOLERANCES:
            whole, on = (_fit(operator, Y, ksp_rtol=rtol, start=guess) for guess in (None, start))
            cells += [str(whole.iterations), str(on.iterations)]
        row([*cells, f"{on.history[0]:.3f}"])


class SlowedOperator(KernelOperator):
    """K + mu I, of which rank 0 takes longer in each product: a known time for each of its rows, and one for all."""

    each, fixed = 0.0, 0.0

    def multiply(self, V: Array) -> Array:
        """See :meth:`KernelOperator.multiply`."""
        rows = self.layout.end - self.layout.begin
        begun = time.perf_counter()
        if self.layout.comm.rank == 0 and rows:
            time.sleep(self.fixed + self.each * rows)
        slept = time.perf_counter() - begun
        product = super().multiply(V)
        self.seconds[-1] += slept / V.shape[1]
        return product


def kernels_balance_worker(settings: Any) -> None:
    """What two ranks do, one of them slowed down.

    Raises
    ------
    InputError
        If there are not two.
    """
    comm = MPI.COMM_WORLD
    if comm.size != 2:
        raise InputError(f"the section kernels_balance_worker takes 2 ranks, got {comm.size}")
    X, Y = (part[:DIGITS] for part in table("digits"))
    kernel = named("rbf", WIDTH * median_distance(X))
    domain = SampleDomain.by_tree(X, 16)

    def made(shares: Any, delay: float, kind: str) -> KernelOperator:
        operator = SlowedOperator(kernel, X, SHIFT, SampleLayout(domain, comm, shares), memory=1e7)
        operator.fixed = delay if kind == "product" else 0.0
        operator.each = delay / (len(X) // 2) if kind == "rows" else 0.0
        return operator

    operator = made(None, 0.0, "rows")
    for _ in range(FIRST):
        operator.multiply(Y[operator.layout.rows])
    usual = comm.allreduce(sum(operator.seconds) / FIRST) * Y.shape[1] / 2
    if not comm.rank:
        print(f"{len(X)} digits, K never kept, {1e3 * usual:.1f} ms a product and rank; rank 0 is slower\n")
        row(["by (ms a product)", "which", "seconds of a solve", "with rows moved before", "ratio", "of the next",
             "ratio", "rows of rank 0"])  # fmt: skip
        row(["-"] * 8)
    for delay in SLOW:
        for kind in ("rows", "product"):
            _moved(partial(made, delay=delay, kind=kind), Y, kind, delay, settings.repeats)


def _moved(made: Callable[..., KernelOperator], Y: Array, kind: str, delay: float, repeats: int) -> None:
    """A solve with equal rows; one before which rows are moved twice, after a few products each; and another then."""
    seconds: list[list[float]] = [[], [], []]
    for _ in range(repeats):
        still = made(None)
        comm = still.layout.comm
        seconds[0].append(_clock(comm, partial(_fit, still, Y)))
        moved = [made(None)]
        seconds[1].append(_clock(comm, partial(_moving, made, moved, Y)))
        seconds[2].append(_clock(comm, partial(_fit, moved[-1], Y)))
    if not comm.rank:
        first, second, third = map(statistics.median, seconds)
        words = "in proportion to its rows" if kind == "rows" else "whatever its rows"
        row([f"{1e3 * delay:.0f}", words, f"{first:.2f}", f"{second:.2f}", f"{second / first:.2f}",
             f"{third:.2f}", f"{third / first:.2f}", str(moved[-1].layout.ranges[1])])  # fmt: skip


def _moving(made: Callable[..., KernelOperator], operators: list[KernelOperator], Y: Array) -> None:
    speeds = None
    for _ in range(2):
        for _ in range(FIRST):
            operators[-1].multiply(Y[operators[-1].layout.rows])
        speeds = Speeds.measured(operators[-1], speeds)
        if speeds.gain > WORTH:
            break
        operators.append(made(speeds.shares))
    _fit(operators[-1], Y)


def _clock(comm: MPI.Comm, work: Callable[[], object]) -> float:
    comm.Barrier()
    begun = time.perf_counter()
    work()
    comm.Barrier()
    return time.perf_counter() - begun
