"""Try a GPU: python drivers/gpu.py [-device cuda:1] [-points 20000]; make gpu does it, in minutes, on one card.

What it computes is compared with the CPU, what is copied is counted, and evaluations are timed against plain torch on
the same card. Where torch has no CUDA device it says so and ends with 0. With ``-device cpu`` the program tries itself:
torch's code against the compiled kernels. Exit code 1 if a comparison fails; a goal that is missed is only shown.
"""

from __future__ import annotations

from common.program import run_program  # first: it initialises PETSc

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from benches.evaluations import nested_autograd
from benches.tools import CASES, LAUNCH, medians, network, without_mpi
from common.device import bind
from mpi4py import MPI
from petsc4py import PETSc
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from ddml import options
from ddml.data.sample_sets import TensorSamples
from ddml.losses.loss import Loss
from ddml.losses.recorded import cuda_graph
from ddml.numbers import read
from ddml.options import Option
from ddml.problems import PROBLEMS, PDELoss
from ddml.problems.classification import ClassificationLoss
from ddml.vectors import CPU, entries
from solvers import Minimisation, minimise

OPTIONS = (
    Option("device", "cuda", "What is tried: cuda, cuda:K, or cpu, which tries this program."),
    Option("points", 100_000, "Collocation points of the timings; a fiftieth of them in the comparisons.", minimum=50),
    Option("samples", 10_000, "Samples of the classifier's batch; a fiftieth of them in the comparisons.", minimum=50),
    Option("iterations", 10, "Of each solver.", minimum=1),
    Option("repeats", 7, "Of each timing.", minimum=1),
    Option("ranks_worker", False, "What the program starts two of."),
)  # fmt: skip

# largest relative differences of the loss and the gradient; of the loss behind the first iteration of a run, in which
# rounding errors grow; of sums over two ranks (our choices)
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5}
FIRST, TOGETHER = 1e-6, 1e-11
ALIKE = 1e-10  # of the losses of runs whose vectors are on the card and on the host
FEW = {"local_steps": 5}
# one or more of each family of solvers
FAMILIES: dict[str, dict[str, dict[str, Any]]] = {
    "burgers": {
        **{name: {} for name in ("lbfgs", "ssbroyden", "gauss_newton", "newton")},
        **dict.fromkeys(("aspqn", "mspqn", "mspqn_dense"), FEW),
    },
    "mlp": {
        **{name: {} for name in ("tr", "apts_weights", "apts_data", "napts", "astrom")},
        "tr -norm kfac": {"norm": "kfac"},
    },
}


class Trial:
    """The comparisons of one device, and whether they have all been right so far."""

    def __init__(self, settings: Any, device: torch.device, vectors: torch.device = CPU) -> None:
        self.settings, self.device, self.vectors, self.right = settings, device, vectors, True

    def made(self, name: str, comm: MPI.Comm = MPI.COMM_SELF) -> Minimisation:
        """A case's loss for lbfgs, on what is tried; the caller destroys it."""
        loss = self.loss(name, self.device, torch.float64)
        return Minimisation(loss, "lbfgs", comm, blocks=0, vectors=self.vectors)

    def loss(self, name: str, device: torch.device, dtype: torch.dtype, share: int = 50) -> Loss:
        """A case's loss; on what is tried, if that is the CPU, without kernels."""
        if name in PROBLEMS:
            width, depth = next(case[1:] for case in CASES if case[0] == name)
            if share > 1:
                width, depth = width // 2, depth // 2
            kind = "residual" if name == "klein_gordon" else "mlp"
            made, points = network(kind, width, depth).to(dtype), self.settings.points // share
            return PDELoss(PROBLEMS[name](), made, points, dtype, device, compiled=device is not self.device)
        generator = torch.Generator().manual_seed(0)
        count = self.settings.samples // share
        inputs = torch.rand(count, 1, 28, 28, generator=generator).to(device=device, dtype=dtype)
        targets = torch.randint(10, (count,), generator=generator).to(device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            if name == "cnn":
                layers: list[nn.Module] = [nn.Conv2d(1, 6, 5), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten()]
                layers.append(nn.Linear(864, 10))
            else:
                layers = [nn.Flatten(), nn.Linear(784, 128), nn.Tanh(), nn.Linear(128, 10)]
        return ClassificationLoss(
            nn.Sequential(*layers).to(device=device, dtype=dtype), TensorSamples(inputs, targets), 10
        )

    def judge(self, found: float, most: float) -> str:
        """A difference in a cell of a table, and in the exit code."""
        passed = found <= most  # not where it is NaN
        self.right &= passed
        return f"{found:.1e} ({'at most' if passed else '**FAILS**:'} {most:.0e})"

    def waited(self, call: Callable[[], object]) -> Callable[[], None]:
        """The call until the device is done."""

        def complete() -> None:
            call()
            if self.device.type == "cuda":
                torch.cuda.synchronize()

        return complete


def main(comm: MPI.Comm) -> int:
    """Try what the options say; the exit code. Collective."""
    settings = options.read(OPTIONS)
    if settings.device.startswith("cuda") and not torch.cuda.is_available():
        if comm.rank == 0:
            print(f"no CUDA device, or torch {torch.__version__} was built without CUDA: nothing was tried")
        return 0
    device = bind(comm, settings.device)
    trial = Trial(settings, device.torch, device.vectors)
    if settings.ranks_worker:
        return ranks_worker(trial, comm)
    start = time.perf_counter()
    print(device.words() or "device cpu: the program tries itself, torch's code against the compiled kernels")
    for section in (numbers, families, pointers, homes, copies, ranks, ratios):
        print(f"\n## {(section.__doc__ or '').splitlines()[0].rstrip('.')}\n")
        for line in section(trial):
            print(line, flush=True)
    print(f"\n{'all right' if trial.right else 'NOT right'} in {time.perf_counter() - start:.0f} s")
    return 0 if trial.right else 1


def evaluated(loss: Loss, theta: Tensor | None = None) -> tuple[float, Tensor]:
    """Loss and gradient (n,) in float64 on the CPU, at some parameters (default: the initial ones)."""
    theta = loss.initial() if theta is None else theta.to(device=loss.device, dtype=loss.dtype)
    gradient = torch.zeros_like(theta)
    (value,) = read([loss.value_gradient(theta, gradient)])
    return value, gradient.double().cpu()


def numbers(trial: Trial) -> Iterator[str]:
    """Loss and gradient against the CPU: relative differences."""
    yield "| case | precision | loss | gradient |\n|---|---|---|---|"
    for name in ("burgers", "klein_gordon", "mlp", "cnn"):
        for dtype, most in TOLERANCES.items():
            known = trial.loss(name, torch.device("cpu"), dtype)
            value, gradient = evaluated(known)
            found, slope = evaluated(trial.loss(name, trial.device, dtype), known.initial())
            by_gradient = float((slope - gradient).norm() / gradient.norm())
            cells = trial.judge(abs(found - value) / value, most), trial.judge(by_gradient, most)
            yield f"| {name} | {str(dtype).removeprefix('torch.')} | {' | '.join(cells)} |"


def families(trial: Trial) -> Iterator[str]:
    """Some iterations of each family of solvers, and the loss behind the first one against the CPU's."""
    yield "| case | solver | iterations | difference | loss before, after, and on the CPU |\n|---|---|---|---|---|"
    for name, solvers in FAMILIES.items():
        for words, given in solvers.items():
            known, found = (
                minimise(
                    trial.loss(name, device, torch.float64), words.split()[0], MPI.COMM_SELF, given, blocks=0,
                    iterations=trial.settings.iterations,
                ).losses
                for device in (torch.device("cpu"), trial.device)
            )  # fmt: skip
            fell = bool(found[-1] < found[0])
            trial.right &= fell
            yield (
                f"| {name} | {words} | {len(found) - 1} | {trial.judge(abs(found[1] / known[1] - 1), FIRST)} | "
                f"{found[0]:.3e} {found[-1]:.3e} {known[-1]:.3e}{'' if fell else ' **FAILS**'} |"
            )


def pointers(trial: Trial) -> Iterator[str]:
    """Where vectors live: torch sees each where PETSc has it."""
    made = trial.made("mlp")
    g = made.x.duplicate()
    made.objective.value_gradient(made.x, g)
    for name, vec, seen, where in (
        ("parameters", made.x, entries(made.x), trial.vectors),
        ("gradient", g, entries(g), trial.vectors),
        ("parameters of an evaluation", made.x, made.objective.parameters(made.x), trial.device),
    ):
        shared = seen.data_ptr() == address(vec, trial.vectors)
        right = seen.device.type == where.type and (shared or where.type != trial.vectors.type)
        trial.right &= right
        how = "in place" if shared else "as a copy"
        yield f"{name}: {vec.getType()}, torch sees them on {seen.device} {how}{'' if right else ' **FAILS**'}"
    g.destroy()
    made.destroy()
    yield f"PETSc {'has' if PETSc.Sys.hasExternalPackage('cuda') else 'has no'} CUDA"


def address(vec: PETSc.Vec, where: torch.device) -> int:
    """Where PETSc says that it has the entries of a vector."""
    if where.type == "cpu":
        return int(vec.array_r.ctypes.data)
    handle = vec.getCUDAHandle("r")
    vec.restoreCUDAHandle(handle, "r")
    return int(handle)


def homes(trial: Trial) -> Iterator[str]:
    """Runs with vectors where they are by default against such with vectors on the host: the losses."""
    yield "| case | solver | iterations | largest difference |\n|---|---|---|---|"
    most_solvers = None if trial.vectors.type == "cuda" else 1  # else both are the same
    for name, solvers in FAMILIES.items():
        for words, given in islice(solvers.items(), most_solvers):
            found, known = (
                run(trial.loss(name, trial.device, torch.float64), words.split()[0], given, trial, where)
                for where in (trial.vectors, CPU)
            )
            alike = len(found) == len(known)
            most = max((abs(a / b - 1) for a, b in zip(found, known, strict=False)), default=0.0)
            cell = trial.judge(most if alike else float("inf"), ALIKE)
            yield f"| {name} | {words} | {len(found) - 1} | {cell} |"


def run(loss: Loss, solver: str, given: dict[str, Any], trial: Trial, where: torch.device) -> list[float]:
    """The losses of some iterations of a solver, with vectors on some device."""
    return list(
        minimise(
            loss, solver, MPI.COMM_SELF, given, blocks=0, iterations=trial.settings.iterations, vectors=where
        ).losses
    )


def copies(trial: Trial) -> Iterator[str]:
    """Copies in an evaluation of loss and gradient, and in an iteration of lbfgs; those as large as the parameters."""
    at_most = "none" if trial.vectors.type == "cuda" else "one to the device and one from it an evaluation"
    yield f"As large as the parameters: {at_most}.\n"
    yield "| case | what | to the device, large | from it, large | operations of torch |\n|---|---|---|---|---|"
    for name in ("burgers", "mlp"):
        made = trial.made(name)
        g = made.x.duplicate()
        made.tao.setMaximumIterations(2)
        calls = {"evaluation": partial(made.objective.value_gradient, made.x, g), "2 iterations": made.tao.solve}
        for what, call in calls.items():
            before = made.objective.work.gradients
            sizes, operations = profiled(trial, call)
            evaluations = made.objective.work.gradients - before
            large = [len([s for s in found if s >= made.layout.size * 4]) for found in sizes]
            allowed = 0 if trial.vectors.type == "cuda" else evaluations
            trial.right &= max(large) <= allowed
            if what == "evaluation":
                trial.right &= len(sizes[0]) <= 1 and len(sizes[1]) <= 2
            cells = [f"{len(found)}, {count}" for found, count in zip(sizes, large, strict=True)]
            yield f"| {name} | {what} | {' | '.join(cells)} | {operations} |"
        g.destroy()
        made.destroy()


def profiled(trial: Trial, call: Callable[[], object]) -> tuple[tuple[list[int], list[int]], int]:
    """Bytes of each copy to the device and from it, and torch's operations, in what has been done once before."""
    complete = trial.waited(call)
    complete()
    cuda = [ProfilerActivity.CUDA] if trial.device.type == "cuda" else []
    with profile(activities=[ProfilerActivity.CPU, *cuda]) as seen:
        complete()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        seen.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    operations = sum(e.name.startswith("aten::") for e in seen.events() or ())
    return (copied(events, "HtoD"), copied(events, "DtoH")), operations


def copied(events: Sequence[Mapping[str, Any]], way: str) -> list[int]:
    """Bytes of each copy one way, whoever made it, in the events of a trace of torch's profiler."""
    names = f"Memcpy {way}"
    return [int(e["args"]["bytes"]) for e in events if str(e.get("name", "")).startswith(names)]


def ranks(trial: Trial) -> Iterator[str]:
    """Two ranks on one card."""
    name = trial.device.type if trial.device.index is None else f"{trial.device.type}:{trial.device.index}"
    own = [f"-{o.name}={getattr(trial.settings, o.name)}" for o in OPTIONS if o.name not in ("device", "ranks_worker")]
    own.append(f"-vec_type={'cuda' if trial.vectors.type == 'cuda' else 'standard'}")
    words = [word for option in own for word in option.split("=", 1)]
    done = subprocess.run(
        [*LAUNCH, "-n", "2", sys.executable, "-m", "mpi4py", __file__, *words, "-device", name, "-ranks_worker"],
        env=without_mpi(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    alone = list(both(trial, MPI.COMM_SELF))
    lines = [line.split() for line in done.stdout.splitlines() if line.startswith("worker ")]
    if done.returncode or len(lines) != len(alone):
        trial.right = False
        yield f"**FAILS**: {(done.stderr or done.stdout).strip()}"
        return
    yield "| case | loss | norm of the gradient |\n|---|---|---|"
    for (case, *known), (_, _, *found) in zip(alone, lines, strict=True):
        cells = [trial.judge(abs(float(f) / k - 1), TOGETHER) for k, f in zip(known, found, strict=True)]
        yield f"| {case} | {' | '.join(cells)} |"


def both(trial: Trial, comm: MPI.Comm) -> Iterator[tuple[str, float, float]]:
    """Case, loss and norm of the gradient, as the ranks of ``comm`` compute them together."""
    for name in ("burgers", "mlp"):
        made = trial.made(name, comm)
        g = made.x.duplicate()
        value = made.objective.value_gradient(made.x, g)
        yield name, value, float(g.norm())
        g.destroy()
        made.destroy()


def ranks_worker(trial: Trial, comm: MPI.Comm) -> int:
    """Print what the ranks compute. Collective."""
    for name, value, norm in both(trial, comm):
        if comm.rank == 0:
            print("worker", name, repr(value), repr(norm), flush=True)
    return 0


def ratios(trial: Trial) -> Iterator[str]:
    """A loss and gradient against plain torch on the same device (ms, medians)."""
    yield "| case | samples | plain torch | ddml | with -capture | ratio | goal |\n|---|---|---|---|---|---|---|"
    for name, width, depth in CASES:
        loss = trial.loss(name, trial.device, torch.float64, 1)
        assert isinstance(loss, PDELoss)
        points = loss.sets[0].coordinates.T.contiguous()
        plain = partial(nested_autograd, name, loss.network, points)
        yield from compared(trial, f"{name} {width}x{depth}, nested autograd", loss, plain, 1.5)
    loss = trial.loss("mlp", trial.device, torch.float32, 1)
    assert isinstance(loss, ClassificationLoss)
    module = nn.Sequential(nn.Flatten(), nn.Linear(784, 128), nn.Tanh(), nn.Linear(128, 10)).to(trial.device)
    adam = torch.optim.Adam(module.parameters())

    def step() -> None:
        adam.zero_grad()
        nn.functional.cross_entropy(module(loss.inputs), loss.targets).backward()
        adam.step()

    yield from compared(trial, "mlp of 28x28 pixels, float32, a step of Adam", loss, step, 1.0)


def compared(trial: Trial, words: str, loss: Loss, plain: Callable[[], object], goal: float) -> Iterator[str]:
    """A row of the table: an evaluation of the whole objective, copies included, and of something else."""
    record = cuda_graph if trial.device.type == "cuda" else None
    calls = [trial.waited(plain)]
    for each in (None, record):
        made = Minimisation(loss, "lbfgs", MPI.COMM_SELF, blocks=0, record=each, vectors=trial.vectors)
        calls.append(trial.waited(partial(made.objective.value_gradient, made.x, made.x.duplicate())))
    calls[-1]()  # with capture what has been evaluated once is recorded
    theirs, ours, replayed = medians(trial.settings.repeats, *calls)
    reached = "reached" if theirs / min(ours, replayed) >= goal else "missed"
    with_capture = f"{replayed:.2f}" if record else "-"
    yield (
        f"| {words} | {loss.count} | {theirs:.2f} | {ours:.2f} | {with_capture} | {theirs / min(ours, replayed):.2f} | "
        f"{goal:g}: {reached} |"
    )


if __name__ == "__main__":
    run_program(main)
