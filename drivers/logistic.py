"""Fit a logistic model of two classes: mpiexec -n P python -m mpi4py drivers/logistic.py -data file [options].

Where ddml is installed, it is mpiexec -n P ddml-logistic [options].

The loss is the mean of log(1 + exp(-y x.w)) with lambda/2 |w|^2, of the batch where there are batches; accuracy and
test_loss, which is without the penalty, are those of the test samples; without any accuracy is that of the training
samples.
"""

from __future__ import annotations

from common import signals

if __name__ == "__main__":
    signals.remember()  # what comes during the imports, which take seconds

from common.program import run_program  # it initialises PETSc

import math
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from mpi4py import MPI
from petsc4py import PETSc

from common import batches, training
from ddml.data import data_set, files, libsvm, wide
from ddml.data.inputs import Inputs
from ddml.data.rows import DENSE, DenseRows, Table, TwoClasses, two_labels
from ddml.sampling.batches import Batches
from ddml.errors import InputError
from ddml.options import NEVER, Option
from ddml.parallel import agreed, check_memory
from ddml.problems.logistic import LogisticLoss, TwoClassTest
from solvers import solver_class

# of solvers, here: the loss is convex, and its Hessian cheap
DEFAULTS = {name: {"model": "hessian", "delta0": "1.0"} for name in ("tr", "apts_weights", "apts_data", "napts")}
VECTORS = 12  # of the parameters that a rank must have memory for (our choice)
_DATA = f"wide, {', '.join(files.DATA)}, a data file .h5, path/to/file.py:Name"

OPTIONS = (
    Option("data", None, f"A LIBSVM file, plain, .gz, .bz2 or .xz; or wide, a generated set of the shape of Gisette; "
           f"or two -classes of {', '.join(files.DATA)}, of a data file .h5 (see data/README.md) or of "
           "path/to/file.py:Name, divided by the set's maximum.", changes=NEVER),
    Option("test_data", None, "A LIBSVM file to test with."),
    Option("classes", None, "Two labels or classes, as in 4,9, of which samples are taken (default: all, if there are "
           "two).", changes=NEVER),
    Option("samples", None, "Train on the first so many samples of the two classes only (default: all; of -data wide: "
           f"how many are made, {wide.SAMPLES}).", kind=int, minimum=1, changes=NEVER),
    Option("features", None, "Features of LIBSVM files (default: those of the training file).", kind=int, minimum=1,
           changes=NEVER),
    Option("index_base", "auto", "Index of the first feature in LIBSVM files; auto: 0 if an index 0 occurs.",
           choices=libsvm.BASES, changes=NEVER),
    Option("lambda", 1e-3, "Of the penalty lambda/2 |w|^2.", minimum=0.0, changes=NEVER),
    Option("intercept", False, "Whether the model has one; it is not penalised.", changes=NEVER),
    *batches.options(
        " Trust regions, tr, apts_weights, apts_data and napts, have -model hessian -delta0 1 here.",
        (
            replace(o, choices=("float64",)) if o.name == "dtype" else o
            for o in training.OPTIONS if o.name not in ("device", "capture", "chunk")
        ),
        {"dtype": "Precision of data and parameters."},
    ),
)  # fmt: skip

LIMITS = batches.limits(
    "Iterations between evaluations of the test samples (default: 1; with batches whole ones, so many that it costs "
    "less than half of a gradient an iteration)."
)


def main(comm: MPI.Comm) -> int:
    """Run what the options say; the exit code. Collective."""
    if training.HELP:
        if comm.rank == 0:
            print(training.help_text(__doc__ or "", (*OPTIONS, *LIMITS), training.RESIDUALS_ONLY))
        return 0
    with training.started(comm, "logistic", OPTIONS, LIMITS) as (settings, limits, start):
        return train(comm, settings, limits, start)


def train(comm: MPI.Comm, settings: Any, limits: Any, start: training.Start) -> int:
    """Run what has been read; the exit code. Collective."""
    training.refuse_residuals_only(settings.solver)
    penalty = vars(settings)["lambda"]
    if not penalty < math.inf:
        raise InputError(f"option -lambda must be finite, got {penalty}")
    for name, value in DEFAULTS.get(settings.solver, {}).items():
        if not PETSc.Options().hasName(name):
            PETSc.Options().setValue(name, value)
    data = load(settings, comm)
    check_memory(comm, 8 * VECTORS * data.train.features, f"a model of {data.train.features} features", "is that so?")
    settings.samples = count = len(data.train)
    batches.check(settings, count)
    loss = LogisticLoss(data.train, penalty, settings.intercept)
    chosen = solver_class(settings.solver).decompose(loss)
    made = training.Training(comm, settings, start, loss, chosen, 0.0, settings.batch_size)
    moving = made.batches()
    interval = moving.interval if moving is not None else 1
    tested = data.train if data.test is None else data.test
    if not limits.error_interval:
        between = 2 * len(tested) * loss.charges.evaluation(gradient=False)
        limits.error_interval = interval * math.ceil(between / (interval * made.objective.loss.count))
    attributes = {
        "driver": "logistic", "problem": data.problem, "network": "logistic model", "data": settings.data,
        "samples": count, "lambda": penalty, "intercept": settings.intercept, **batches.attributes(settings, moving),
        "hessian_charge": loss.charges.hessian(), "inputs": str(data.inputs),
    }  # fmt: skip
    test = TwoClassTest(loss, tested, comm, made.blocks)

    def measure(theta: Any) -> dict[str, float]:
        found = test(theta)
        return found if data.test is not None else {"accuracy": found["accuracy"]}

    code = made.run(
        limits, attributes, measure, moving, header(settings, data, loss, moving, made.summation()),
        shown="accuracy",
    )  # fmt: skip
    data.free()
    return code


@dataclass
class Data:
    """What is fitted, and what it is tested on, if anything.

    Attributes
    ----------
    train, test : TwoClasses
    inputs : Inputs
        What the model is given, and the names of the two classes.
    problem : str
        What a restart must find again: the shape and a check sum of the training samples.
    """

    train: TwoClasses
    test: TwoClasses | None
    inputs: Inputs
    problem: str
    owners: tuple[data_set.DataSet | Table, ...]

    def free(self) -> None:
        """Give shared memory back. Collective."""
        for owner in self.owners:
            owner.free()


def load(settings: Any, comm: MPI.Comm) -> Data:
    """The samples that the options ask for. Collective.

    Raises
    ------
    InputError
        On all ranks: data that there are not, or that cannot be read; classes that are not two.
    """
    name = settings.data
    if name is None:
        raise InputError(f"option -data is missing: a LIBSVM file, or {_DATA}")
    stored = name in files.DATA or name.endswith((".h5", ".hdf5")) or ".py:" in name
    if stored or name == "wide":
        values = {"test_data": settings.test_data, "features": settings.features}
        for option in (o for o, v in values.items() if v is not None):
            raise InputError(f"option -{option} is for LIBSVM files, not for -data {name}")
    if stored:
        train, test, inputs, owners = _stored(settings, comm)
    elif name == "wide":
        if settings.classes is not None:
            raise InputError("option -classes is for data of several classes: -data wide has two")
        tables = wide.generate(settings.seed, comm, settings.samples or wide.SAMPLES)
        train, test = (TwoClasses(table, (-1.0, 1.0)) for table in tables)
        inputs, owners = _inputs((train.features,), ("-1", "+1")), tuple(tables)
    else:
        train, test, inputs, owners = _libsvm(settings, comm)
    count = settings.samples or len(train)
    if count > len(train):
        raise InputError(f"{count} training samples were asked for, {name} has {len(train)} of the two classes")
    train = train.part(0, count)
    if len(np.unique(train.signs)) < 2:
        raise InputError(f"the first {count} samples of {name} are of one class: a logistic model has two")
    sum_ = comm.bcast(_check_sum(train) if comm.rank == 0 else None)
    problem = f"logistic regression of {count} samples x {train.features}, check sum {sum_:08x}"
    return Data(train, test, inputs, problem, owners)


Loaded = tuple[TwoClasses, TwoClasses | None, Inputs, tuple[data_set.DataSet | Table, ...]]


def _inputs(shape: tuple[int, ...], names: tuple[str, str], maximum: float | None = None) -> Inputs:
    """What the model is given: values as they are, or divided by a maximum."""
    return Inputs(shape, names, "none" if maximum is None else "unit", (0.0,), (maximum or 1.0,))


def _libsvm(settings: Any, comm: MPI.Comm) -> Loaded:
    """Samples of LIBSVM files."""
    with agreed(comm):
        if not Path(settings.data).exists() and not {"/", "."} & set(settings.data):
            raise InputError(f"there is no LIBSVM file {settings.data}; -data is one, or {_DATA}")
    paths = [settings.data, *([settings.test_data] if settings.test_data is not None else [])]
    tables = libsvm.read(paths, comm, settings.index_base, settings.features)
    with agreed(comm):
        labels = tables[0].labels
        remedy = "; -classes a,b takes the samples of two"
        if settings.classes is None:
            pair = two_labels(labels, f"data file {settings.data}", remedy)
        else:
            pair = _numbers(settings.classes, labels)
        for table in tables[1:]:
            others = np.setdiff1d(table.labels, pair)
            if settings.classes is None and len(others):
                known = " and ".join(f"{v:g}" for v in pair)
                raise InputError(f"test file {paths[1]} has the label {others[0]:g}, the training file {known}")
    samples = [TwoClasses(table, pair) for table in tables]
    if len(samples) > 1 and not len(samples[1]):
        raise InputError(f"test file {paths[1]} has no samples of the classes {settings.classes}")
    names = tuple(f"{v:+g}" if min(pair) < 0 else f"{v:g}" for v in pair)
    inputs = _inputs((samples[0].features,), (names[0], names[1]))
    return samples[0], samples[1] if len(samples) > 1 else None, inputs, tuple(tables)


def _pair(text: str) -> tuple[str, str]:
    """The two names in the value of -classes."""
    words = [word.strip() for word in text.split(",")]
    if len(words) != 2 or words[0] == words[1]:
        raise InputError(f"option -classes must be two classes with a comma between them, as in 4,9; got '{text}'")
    return words[0], words[1]


def _numbers(text: str, labels: Any) -> tuple[float, float]:
    """The two labels of a file that -classes asks for."""
    try:
        first, second = map(float, _pair(text))
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"option -classes must be two labels of the file, as in 1,2; got '{text}'") from None
    for label in (first, second):
        if label not in labels:
            raise InputError(f"option -classes: no sample has the label {label:g}")
    return first, second


def _stored(settings: Any, comm: MPI.Comm) -> Loaded:
    """Samples of a data set, divided by its maximum."""
    dataset = files.load(settings.data, comm)
    known = dataset.classes
    if settings.classes is None:
        if len(known) != 2:
            raise InputError(
                f"data {settings.data} has {len(known)} classes: a logistic model has two; -classes a,b takes two of "
                + ", ".join(known)
            )
        names = (known[0], known[1])
    else:
        names = _pair(settings.classes)
        for name in names:
            if name not in known:
                raise InputError(f"option -classes: {settings.data} has no class '{name}', but {', '.join(known)}")
    pair = float(known.index(names[0])), float(known.index(names[1]))
    tables = [
        DenseRows(dataset.inputs, dataset.labels, dataset.maximum),
        DenseRows(dataset.test_inputs, dataset.test_labels, dataset.maximum),
    ]
    chosen = [TwoClasses(table, pair) for table in tables]
    if not len(chosen[1]):
        raise InputError(f"data {settings.data} has no test samples of the classes {', '.join(names)}")
    inputs = _inputs(dataset.shape, names, dataset.maximum)
    if tables[0].density > DENSE:
        return chosen[0], chosen[1], inputs, (dataset,)
    packed = [table.compressed(np.asarray(samples.rows), comm) for table, samples in zip(tables, chosen, strict=True)]
    dataset.free()
    return TwoClasses(packed[0], pair), TwoClasses(packed[1], pair), inputs, tuple(packed)


def _check_sum(samples: TwoClasses) -> int:
    """CRC-32 of the samples' numbers and classes, as they are stored."""
    found = zlib.crc32(samples.signs.tobytes())
    for begin in range(0, len(samples), 1000):
        matrix = samples.part(begin, begin + 1000).matrix
        pieces = (matrix,) if isinstance(matrix, np.ndarray) else (matrix.data, matrix.indices.astype(np.int64))
        for piece in pieces:
            found = zlib.crc32(np.ascontiguousarray(piece).tobytes(), found)
    return found


def header(settings: Any, data: Data, loss: LogisticLoss, moving: Batches | None, summation: str) -> str:
    """What is about to run, in words."""
    kind = solver_class(settings.solver)
    batch = batches.in_words(settings, loss.count, moving)
    test = "accuracy of the training samples" if data.test is None else f"{len(data.test)} to test with"
    stored = f"{data.train.table.density:.1%} not 0, {'dense' if data.train.dense else 'sparse'} products"
    return (
        f"data {settings.data}: {loss.count} samples of {loss.features} features, {stored}; classes "
        f"{' and '.join(data.inputs.classes)}; {test}; {batch}\n"
        f"logistic model, lambda {loss.penalty:g}, {'with' if loss.intercept else 'no'} intercept, {loss.size} "
        f"parameters; a product with the Hessian is charged {loss.charges.hessian():.2f} gradients\n"
        f"solver {settings.solver} {summation}\n"
        + (f"{kind.decompose(loss)!r}" if kind.subdomains_of == "parameters" else "")
    ).rstrip()


if __name__ == "__main__":
    run_program(main)
