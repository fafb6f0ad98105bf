"""Options of drivers/kernel.py."""

from __future__ import annotations

from common import training  # first: it initialises PETSc

import math
from collections.abc import Sequence
from dataclasses import replace

from petsc4py import PETSc

import ddml.runs.run
from common.start import INTERRUPTED_CODE
from ddml import options as tables
from ddml.data import files, libsvm
from ddml.data.scaling import SCALINGS
from ddml.errors import InputError
from ddml.kernel_machines import functions
from ddml.kernel_machines.cuts import PARTITIONERS
from ddml.kernel_machines.domain import DIRECTIONS
from ddml.kernel_machines.losses import LOSSES
from ddml.options import EACH_START, NEVER, Option
from ddml.runs.feature_maps import EXPANSION
from solvers import solver_class
from solvers.kernel_machines.fit import PRECONDITIONERS
from solvers.kernel_machines.iterations import RTOL
from solvers.kernel_machines.krylov import CYCLE
from solvers.kernel_machines.newton import PRECONDITIONERS as ALL_CURVED

SOLVERS = ("ksp", "d3l", "deep")
SQUARED = "squared"
ALONE = ("start", "balance", "later")  # options that are not for deep kernels
EXCHANGES = ("turn", "once", "none")
BALANCE = 0.98  # of a cut that has grown (our choice)
OVERLAP = 0.1  # of subdomains whose number is given (our choice)
CURVED = {name: kind for name, kind in ALL_CURVED.items() if name not in PRECONDITIONERS}  # of other losses alone
OF_TRAINING = ("seed", "threads", "view", "check")

OPTIONS = (
    Option("data", "digits", f"One of {', '.join(files.DATA)}; a data file .h5 (see data/README.md); "
           "path/to/file.py:Name; or a LIBSVM file.", changes=NEVER),
    Option("test_data", None, "A LIBSVM file to test with."),
    Option("later", None, "More data, whose samples to train on come behind those of -data, scaled as those.",
           changes=NEVER),
    Option("start", None, "Run file of a machine of the first ones of these samples, to begin with: its cut grows by "
           "those that have come since, which -balance (0.98 by default then) evens out, its coefficients are the "
           "first guess, and its width and lambda are taken where none is given.", changes=EACH_START),
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
           "(default: by a model of cost).", kind=str, changes=NEVER),
    Option("cut", None, f"Along what trees cut: {', '.join(DIRECTIONS)}; boxes; one of PETSc's partitioners, "
           f"{', '.join(PARTITIONERS)}, where it has them; or path/to/file.py:Name, a function from samples (n, d) to "
           "the number (n,) of the subdomain of each (default: principal, or boxes where -subdomains says so).",
           kind=str, changes=NEVER),
    Option("overlap", None, "Share of its own samples that a subdomain has beyond each cut; 0 to below 1 (default: "
           f"{OVERLAP:g}; where the number of subdomains is left open, too, by a model of cost).", kind=float,
           minimum=0.0, changes=NEVER),
    Option("balance", None, "Least load of a subdomain over the largest one that is wanted, as in 0.98: samples move "
           "to neighbours until it is there (default: they stay where the cut has put them).", kind=float, minimum=0.0,
           changes=NEVER),
    Option("loads", "samples", "What -balance evens out: numbers of samples, operations of factors and solves, or "
           "measured seconds of factors, which are others each time.", choices=("samples", "operations", "seconds"),
           changes=NEVER),
    Option("rank_speeds", False, "Whether a product is timed before the run, and ranks get rows by their speed. The "
           "numbers stay the same."),
    Option("solver", "ksp", "Krylov methods with a Schwarz preconditioner (ksp), conjugate gradients unless -ksp_type "
           "says otherwise; local minimisers that exchange what they share (d3l); or features that are trained "
           "under a machine (deep): then -kernel, -subdomains and -preconditioner are of the features.",
           choices=SOLVERS),
    Option("rtol", RTOL, "Of the norm of the residual over that of Y; -ksp_rtol is the same.", minimum=0.0),
    Option("loss", SQUARED, "Of the outputs: squared, by a linear system; of the others, by Newton's method and "
           "-solver ksp, logistic and squared_hinge each class against the rest, softmax all together.",
           choices=tuple(LOSSES), changes=NEVER),
    Option("preconditioner", None, "Of -solver ksp: two-level Schwarz, the randomised Nystrom approximation (of the "
           "squared loss), the pivots of other losses, or none (default: schwarz, but pivots of a loss that is less "
           "curved than the squared one or couples classes).", kind=str,
           choices=(*PRECONDITIONERS, *CURVED, "none"), changes=tables.WITH_SOLVER),
    Option("exchange", "turn", "Of -solver d3l: one subdomain after another; all at once, which is PETSc's Richardson "
           "iteration with -preconditioner schwarz; or no exchange, which gives no solution of the whole.",
           choices=EXCHANGES, changes=tables.WITH_SOLVER),
    Option("omega", "0", "How much d3l asks for agreement in overlaps: one number, or one for each subdomain, as in "
           "0,1,0,1.", changes=tables.WITH_SOLVER),
    Option("agreement", math.inf, "Of -exchange turn: the disagreement in overlaps must be below this, too.",
           minimum=0.0),
    Option("kernel_memory", 2e9, "Bytes a rank for the kernel matrix, which is kept if it fits, or else computed by "
           "blocks in every product and leaves the bytes to the preconditioner.", above=0.0),
    Option("dtype", "float64", "What the kernel matrix is computed in; residuals are computed anew in float64.",
           choices=("float64", "float32"), changes=NEVER),
    Option("network", None, f"Of -solver deep, the features: {EXPANSION}, concatenated kernels on -centres; "
           "path/to/file.py:Name, which makes a torch module for samples of so many numbers; or the run file of a "
           "classifier, whose last hidden layer is taken.", kind=str, changes=NEVER),
    Option("centres", 300, "Samples that an expansion is on, drawn at random.", minimum=1, changes=NEVER),
    Option("features", 12, "Outputs of an expansion.", minimum=1, changes=NEVER),
    Option("inner_decay", 1e-4, "Factor of the features' own Tikhonov term: of an expansion in its kernel's norm, of a "
           "network the sum of squares of its parameters.", minimum=0.0, changes=NEVER),
    Option("deep_objective", "tikhonov", "What the features are to lower: the functional of the machine, its errors on "
           "a held-out part, or leave-one-out errors in closed form.", changes=NEVER,
           choices=("tikhonov", "held_out", "leave_one_out")),
    Option("held", 0.25, "Share of the samples, the last ones, that held_out holds out.", above=0.0, changes=NEVER),
    Option("deep_solver", "tr", "Which solver of values and gradients trains the features, with its own options: tr, "
           "ssbroyden, lbfgs, adagrad, PETSc's lmvm, ...", changes=NEVER),
    Option("inner_rtol", 1e-2, "First tolerance of inner solves.", above=0.0, changes=NEVER),
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
    if solver == "deep":
        return list(solver_class(PETSc.Options().getString("deep_solver", "tr")).options)
    return [option for kind in {**PRECONDITIONERS, **CURVED}.values() for option in kind.options]


def help_text(title: str) -> str:
    """What -help prints."""
    lines = [title, "Options of this driver:", *map(str, (*OPTIONS, *LIMITS))]
    for name, kind in {**PRECONDITIONERS, **CURVED}.items():
        lines += ["", f"Options of -preconditioner {name}:", *map(str, kind.options)]
    return "\n".join(
        [*lines, "", f"All of PETSc's options of a KSP apply, such as -ksp_type (a cycle of {CYCLE} iterations an "
         "iteration of the run), -ksp_monitor, -log_view, -options_file."]
    )  # fmt: skip
