"""Fit a kernel machine: mpiexec -n P python -m mpi4py drivers/kernel.py [options].

Where ddml is installed, it is mpiexec -n P ddml-kernel [options].

The samples are cut into overlapping subdomains, and (K + lambda I) alpha = Y is solved to any tolerance: the exact
machine of all samples, and no approximation by some of them. The loss is |Y - f(X)|^2 + lambda |f|^2 over the number of
samples; a unit of work is a product with the kernel matrix.
"""

from __future__ import annotations

from common import signals

if __name__ == "__main__":
    signals.remember()  # what comes during the imports, which take seconds

from common.program import run_program  # it initialises PETSc

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from mpi4py import MPI
from petsc4py import PETSc
from torch import Tensor

import ddml.runs.run
from common import training
from common.start import INTERRUPTED_CODE
from ddml import options as tables
from ddml.data import classified, files, libsvm
from ddml.data.classified import Classified, targets
from ddml.data.scaling import SCALINGS
from ddml.errors import InputError
from ddml.kernel_machines import KernelOperator, SampleDomain, SampleLayout, functions, median_distance
from ddml.kernel_machines.cuts import PARTITIONERS, Array
from ddml.kernel_machines.domain import DIRECTIONS
from ddml.kernel_machines.rules import WIDTH, best_shift
from ddml.kernel_machines.system import KernelSystem
from ddml.options import NEVER, Option
from ddml.parallel import agreed
from ddml.plugins import blamed, load
from ddml.runs import machines
from solvers import PETSC_TYPES
from solvers.kernel_machines.fit import PRECONDITIONERS
from solvers.kernel_machines.iterations import RTOL, KernelIterations
from solvers.kernel_machines.krylov import CYCLE, ConjugateGradients, KrylovCycles
from solvers.kernel_machines.sweeps import NO_SOLUTION, ExchangeInTurn

SOLVERS = ("ksp", "d3l")
EXCHANGES = ("turn", "once", "none")
CORE, MOST = 512, 64  # samples of a subdomain's core by default, and subdomains at most (our choices)
OF_TRAINING = ("seed", "threads", "view", "check")

OPTIONS = (
    Option("data", "digits", f"One of {', '.join(files.DATA)}; a data file .h5 (see data/README.md); "
           "path/to/file.py:Name; or a LIBSVM file.", changes=NEVER),
    Option("test_data", None, "A LIBSVM file to test with."),
    Option("samples", None, "Train on the first so many samples only (default: all).", kind=int, minimum=1,
           changes=NEVER),
    Option("scaling", "unit", "Samples divided by the data set's maximum, or of mean 0 and deviation 1 in each "
           "channel, or as they are, as those of LIBSVM files always.", choices=SCALINGS, changes=NEVER),
    Option("index_base", "auto", "Index of the first feature in LIBSVM files; auto: 0 if an index 0 occurs.",
           choices=libsvm.BASES, changes=NEVER),
    Option("kernel", "rbf", f"One of {', '.join(functions.NAMES)}; or path/to/file.py:Name, a torch function of tables "
           "(a, d) and (b, d).", changes=NEVER),
    Option("kernel_width", None, "Its width (default: half of the median distance of the samples).", kind=float,
           above=0.0, changes=NEVER),
    Option("kernel_degree", 3, "Degree of the polynomial kernel.", minimum=1, changes=NEVER),
    Option("lambda", None, "Of the regularisation (default: the one of 1 to 1e-4 with the least leave-one-out error on "
           "a thousand training samples).", kind=float, minimum=0.0, changes=NEVER),
    Option("subdomains", None, "How many, a power of two for trees; or boxes along principal directions, as in 4x4 "
           f"(default: of {CORE} samples, {MOST} at most).", kind=str, changes=NEVER),
    Option("cut", None, f"Along what trees cut: {', '.join(DIRECTIONS)}; boxes; one of PETSc's partitioners, "
           f"{', '.join(PARTITIONERS)}, where it has them; or path/to/file.py:Name, a function from samples (n, d) to "
           "the number (n,) of the subdomain of each (default: principal, or boxes where -subdomains says so).",
           kind=str, changes=NEVER),
    Option("overlap", 0.1, "Share of its own samples that a subdomain has beyond each cut; 0 to below 1.", minimum=0.0,
           changes=NEVER),
    Option("solver", "ksp", "Krylov methods with a Schwarz preconditioner (ksp), conjugate gradients unless -ksp_type "
           "says otherwise; or local minimisers that exchange what they share (d3l).", choices=SOLVERS),
    Option("rtol", RTOL, "Of the norm of the residual over that of Y; -ksp_rtol is the same.", minimum=0.0),
    Option("preconditioner", "schwarz", "Of -solver ksp: two-level Schwarz, the randomised Nystrom approximation, or "
           "none.", choices=(*PRECONDITIONERS, "none"), changes=tables.WITH_SOLVER),
    Option("exchange", "turn", "Of -solver d3l: one subdomain after another; all at once, which is PETSc's Richardson "
           "iteration with -preconditioner schwarz; or no exchange, which gives no solution of the whole.",
           choices=EXCHANGES, changes=tables.WITH_SOLVER),
    Option("omega", "0", "How much d3l asks for agreement in overlaps: one number, or one for each subdomain, as in "
           "0,1,0,1.", changes=tables.WITH_SOLVER),
    Option("agreement", math.inf, "Of -exchange turn: the disagreement in overlaps must be below this, too.",
           minimum=0.0),
    Option("kernel_memory", 2e9, "Bytes a rank for the kernel matrix, which is kept if it fits, or else computed by "
           "blocks in every product.", above=0.0),
    Option("dtype", "float64", "What the kernel matrix is computed in; residuals are computed anew in float64.",
           choices=("float64", "float32"), changes=NEVER),
    *(replace(o, help="Of the choice of pivots and of samples that rules look at.") if o.name == "seed" else o
      for o in training.OPTIONS if o.name in OF_TRAINING),
    INTERRUPTED_CODE,
)  # fmt: skip

LIMITS = tuple(
    replace(
        o,
        help="Iterations between evaluations of the test samples (default: so many that it costs less than half of a "
        "product with the kernel an iteration).",
    )
    if o.name == "error_interval"
    else o
    for o in ddml.runs.run.OPTIONS
    if o.name != "target_error"
)


def options_of(solver: str) -> Sequence[Option]:
    """Those of a solver that are not in :data:`OPTIONS`."""
    if solver not in SOLVERS:
        raise InputError(f"option -solver must be one of {', '.join(SOLVERS)}; got '{solver}'")
    return [option for kind in PRECONDITIONERS.values() for option in kind.options]


def help_text() -> str:
    """What -help prints."""
    lines = [__doc__ or "", "Options of this driver:", *map(str, (*OPTIONS, *LIMITS))]
    for name, kind in PRECONDITIONERS.items():
        lines += ["", f"Options of -preconditioner {name}:", *map(str, kind.options)]
    return "\n".join(
        [*lines, "", f"All of PETSc's options of a KSP apply, such as -ksp_type (a cycle of {CYCLE} iterations an "
         "iteration of the run), -ksp_monitor, -log_view, -options_file."]
    )  # fmt: skip


def main(comm: MPI.Comm) -> int:
    """Run what the options say; the exit code. Collective."""
    if training.HELP:
        if comm.rank == 0:
            print(help_text())
        return 0
    if PETSc.Options().hasName("tao_type"):
        raise InputError(f"option -tao_type asks for one of {', '.join(PETSC_TYPES[:3])}, ...: kernel.py has -ksp_type")
    with training.started(comm, "kernel", OPTIONS, LIMITS, options_of) as (settings, limits, start):
        return train(comm, settings, limits, start)


def train(comm: MPI.Comm, settings: Any, limits: Any, start: training.Start) -> int:
    """Run what has been read; the exit code. Collective."""
    data = classified.load(
        settings.data, comm, settings.samples, settings.scaling, settings.test_data, settings.index_base
    )
    settings.samples = len(data.samples)
    start.stop.check(comm)
    wanted = targets(data.labels, len(data.inputs.classes))
    with agreed(comm):
        kernel = build_kernel(settings, data.samples)
        domain = cut(settings, data.samples) if limits.restart is None else machines.domain_of(limits.restart)
    vars(settings)["lambda"] = shift = chosen_shift(settings, kernel, data.samples, wanted, comm)
    layout = SampleLayout(domain, comm)
    operator = KernelOperator(kernel, data.samples, shift, layout, settings.kernel_memory, settings.dtype)
    system = KernelSystem(operator, wanted, start.stop)
    context = build_solver(settings, system)
    tao, x = PETSc.TAO().create(comm), system.vector()
    try:
        tao.setType("python")
        tao.setPythonContext(context)
        tao.setSolution(x)
        tao.setTolerances(gatol=0.0, grtol=0.0, gttol=0.0)
        with tables.understood():
            tao.setUp()
        measure = Test(data, system)
        limits.error_interval = limits.error_interval or measure.interval
        made = training.Conducted(comm, settings, start, system, tao, x, context, layout.tree.count)
        attributes = {
            "driver": "kernel", "network": f"kernel machine, {kernel!r}, lambda {shift:g}", "data": settings.data,
            "problem": data.problem, "samples": settings.samples, "inputs": str(data.inputs),
            "width": settings.kernel_width or 0.0,
        }  # fmt: skip
        return made.run(
            limits, attributes, measure, None, header(settings, data, operator, context), shown="accuracy",
            more=context.columns,
        )  # fmt: skip
    finally:
        tao.destroy()
        context.destroy()
        x.destroy()


def build_kernel(settings: Any, samples: Array) -> functions.Kernel:
    """The kernel that the settings ask for; its width is put into them where they leave it open."""
    own = ":" in settings.kernel
    if settings.kernel_width is None and not own:
        settings.kernel_width = WIDTH * median_distance(samples, settings.seed)
    return functions.named(settings.kernel, settings.kernel_width or 1.0, settings.kernel_degree)


def chosen_shift(settings: Any, kernel: functions.Kernel, samples: Array, wanted: Array, comm: MPI.Comm) -> float:
    """The lambda that the settings ask for, or the rule gives: rank 0's, so that all have the same. Collective."""
    given = vars(settings)["lambda"]
    if given is not None and not given < math.inf:
        raise InputError(f"option -lambda must be finite, got {given}")
    found = given
    with agreed(comm):
        functions.check_symmetry(kernel, functions.torch.as_tensor(samples))
        if given is None and comm.rank == 0:
            found = best_shift(kernel, samples, wanted, settings.seed)
    return float(comm.bcast(found))


def cut(settings: Any, samples: Array) -> SampleDomain:
    """The subdomains that the settings ask for.

    Raises
    ------
    InputError
        Numbers and cuts that there are not, or do not go together.
    """
    n, text = len(samples), settings.subdomains
    count = min(1 << max(int(math.log2(n / CORE)), 0), MOST) if n >= CORE else 1
    parts = [count] if text is None else numbers(text)
    how = settings.cut or ("boxes" if len(parts) > 1 else "principal")
    if len(parts) > 1 and how != "boxes":
        raise InputError(f"option -subdomains {text} is for -cut boxes, not for -cut {how}")
    if how == "boxes":
        return SampleDomain.by_boxes(samples, parts, settings.overlap)
    if how in DIRECTIONS:
        return SampleDomain.by_tree(samples, parts[0], settings.overlap, how)
    if ":" not in how:
        return SampleDomain.partitioned(samples, parts[0], how)
    function = load(how, {}, "cut")
    with blamed(how, {}, "cut"):
        labels = np.asarray(function(samples.copy()))
    if labels.shape != (n,):
        raise InputError(f"cut '{how}' must give a number for each of {n} samples, got {labels.shape}")
    return SampleDomain.of_labels(labels, f"cut {how}")


def numbers(text: str) -> list[int]:
    """The numbers of subdomains in the value of -subdomains."""
    words = text.split("x")
    if not all(word.isascii() and word.isdecimal() and 0 < len(word) < 10 and int(word) for word in words):
        raise InputError(f"option -subdomains must be a number, or boxes as in 4x4; got '{text}'")
    return [int(word) for word in words]


def build_solver(settings: Any, system: KernelSystem) -> KernelIterations:
    """The solver that the settings ask for."""
    if settings.solver == "d3l" and settings.exchange != "once":
        try:
            omega = [float(word) for word in settings.omega.split(",")]
        except ValueError:
            raise InputError(f"option -omega must be numbers, as in 0 or 0,1,0,1; got '{settings.omega}'") from None
        each = omega[0] if len(omega) == 1 else omega
        return ExchangeInTurn(system, settings.rtol, settings.agreement, each, settings.exchange == "turn")
    database = PETSc.Options()
    kind = database.getString("ksp_type", "cg")
    if settings.solver == "d3l":
        kind = "richardson"
        database.setValue("ksp_type", kind)
    made = ConjugateGradients if kind == "cg" else KrylovCycles
    return made(system, settings.rtol, settings.preconditioner)


class Test:
    """How often the machine is right on the test samples, if there are some. Collective."""

    def __init__(self, data: Classified, system: KernelSystem) -> None:
        self.system, self.labels = system, data.test_labels
        self.samples = data.test_samples
        count = 0 if self.samples is None else len(self.samples)
        self.interval = max(math.ceil(2 * count / len(data.samples)), 1)

    def __call__(self, theta: Tensor) -> dict[str, float]:
        """The accuracy at coefficients (n k,)."""
        if self.samples is None:
            return {}
        outputs = self.system.operator.predict(self.system.by_sample(theta), self.samples)
        found = (outputs[:, 0] > 0) if outputs.shape[1] == 1 else outputs.argmax(axis=1)
        return {"accuracy": float((found == self.labels).mean())}


def header(settings: Any, data: Classified, operator: KernelOperator, context: KernelIterations) -> str:
    """What is about to run, in words."""
    tested = "none to test with" if data.test_labels is None else f"{len(data.test_labels)} to test with"
    how = f"-exchange {settings.exchange}" if settings.solver == "d3l" else f"-preconditioner {settings.preconditioner}"
    lines = [
        f"data {settings.data}, {data.origin}: {len(data.samples)} samples, {tested}, scaling {data.inputs.scaling}",
        repr(operator),
        repr(operator.layout.domain),
        f"solver {settings.solver}, {how}: until the residual is below {context.rtol:g}",
    ]
    if settings.solver == "d3l" and settings.exchange == "none":
        lines.append(f"note: {NO_SOLUTION}")
    return "\n".join(lines)


if __name__ == "__main__":
    run_program(main)
