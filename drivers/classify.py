"""Train a classifier: mpiexec -n P python -m mpi4py drivers/classify.py [options].

Where ddml is installed, it is mpiexec -n P ddml-classify [options].

One data set, one network, one solver; -help explains every option. The loss is the mean cross entropy, of the batch
where there are batches; accuracy and test_loss are those of the test samples.
"""

from __future__ import annotations

from common import signals

if __name__ == "__main__":
    signals.remember()  # what comes during the imports, which take seconds

from common.program import run_program  # it initialises PETSc

import math
from typing import Any

import torch
from mpi4py import MPI

from common import batches, training
from ddml.data import data_set, files
from ddml.data.inputs import Inputs
from ddml import plugins
from ddml.sampling.batches import Batches
from ddml.networks import classifiers
from ddml.options import NEVER, Option, with_defaults
from ddml.parallel import agreed
from ddml.problems.classification import ClassificationLoss, TestSet
from ddml.data.scaling import SCALINGS, Samples, Scaling
from solvers import solver_class
from common.device import Device, bind, short_of_memory
from tiled import main as divided
from tiled import options as tiled

CPU = torch.device("cpu")
LONGEST = 32_000  # characters; HDF5 has attributes of up to 64 kB (our choice)

OPTIONS = (
    Option("data", "digits", f"One of {', '.join(files.DATA)}; or a data file .h5 (see data/README.md); or "
           "path/to/file.py:Name, called without arguments for a ddml.data.data_set.DataSet.", changes=NEVER),
    Option("samples", None, "Train on the first so many samples only (default: all).", kind=int, minimum=1,
           changes=NEVER),
    Option("scaling", "standard", "Inputs divided by the data set's maximum, or of mean 0 and deviation 1 in each "
           "channel, or as they are.", choices=SCALINGS, changes=NEVER),
    *classifiers.OPTIONS,
    *batches.options("", with_defaults(training.OPTIONS, dtype="float32"), {
        "chunk": "Samples that go through the network at a time; 0: what suits the widest layer.",
    }),
    *tiled.OPTIONS,
)  # fmt: skip

LIMITS = batches.limits(
    "Iterations between evaluations of the test samples (default: whole batches, as many as let that take about a "
    "tenth of the time)."
)


def main(comm: MPI.Comm) -> int:
    """Run what the options say; the exit code. Collective."""
    if training.HELP:
        if comm.rank == 0:
            print(training.help_text(__doc__ or "", (*OPTIONS, *LIMITS), training.RESIDUALS_ONLY))
        return 0
    with training.started(comm, "classify", OPTIONS, LIMITS) as (settings, limits, start):
        if settings.tiles is not None:
            default = next(o.default for o in OPTIONS if o.name == "solver")
            return divided.train(comm, settings, limits, start, default)
        tiled.refuse_without_tiles(settings)
        return train(comm, settings, limits, start)


def train(comm: MPI.Comm, settings: Any, limits: Any, start: training.Start) -> int:
    """Run what has been read; the exit code. Collective."""
    training.refuse_residuals_only(settings.solver)
    device = bind(comm, settings.device)
    dataset = files.load(settings.data, comm, settings.samples)
    settings.samples = dataset.count
    batches.check(settings, dataset.count)
    scaling = Scaling(dataset, settings.scaling, comm)
    with agreed(comm), plugins.blamed(settings.network, classifiers.KNOWN, "network"), short_of_memory():
        loss, network, test = build(settings, dataset, scaling, device.torch)
        chosen = solver_class(settings.solver).decompose(loss)
    made = training.Training(comm, settings, start, loss, chosen, 0.0, settings.batch_size, device.vectors)
    moving = made.batches()
    interval = moving.interval if moving is not None else 1
    if not limits.error_interval:
        between = 10 * len(test) / 3  # a test sample costs a third of a training sample
        limits.error_interval = interval * math.ceil(between / (interval * made.objective.loss.count))
    attributes = {
        "driver": "classify", "problem": "classification", "network": network, "data": settings.data,
        "samples": dataset.count, "scaling": settings.scaling, **described(dataset, scaling),
        **batches.attributes(settings, moving),
    }  # fmt: skip
    measure = TestSet(loss, test, comm, made.blocks)
    code = made.run(
        limits, attributes, measure, moving,
        header(settings, dataset, loss, network, moving, made.summation(), device), shown="accuracy",
    )  # fmt: skip
    dataset.free()
    return code


def described(dataset: data_set.DataSet, scaling: Scaling) -> dict[str, str]:
    """What the network is given, for who opens the run file without the data; nothing where that would be too long."""
    text = str(Inputs.of(dataset, scaling))
    return {"inputs": text} if len(text) < LONGEST else {}


def build(
    settings: Any, dataset: data_set.DataSet, scaling: Scaling, device: torch.device = CPU
) -> tuple[ClassificationLoss, str, Samples]:
    """The loss on the training samples, the network in words, and the test samples."""
    network, words = classifiers.build_classifier(settings, dataset.shape, len(dataset.classes))
    dtype = getattr(torch, settings.dtype)
    train = Samples(dataset.inputs, dataset.labels, scaling, dtype, device)
    test = Samples(dataset.test_inputs, dataset.test_labels, scaling, dtype, device)
    loss = ClassificationLoss(network.to(device), train, len(dataset.classes), settings.chunk or None)
    return loss, words, test


def header(
    settings: Any,
    dataset: data_set.DataSet,
    loss: ClassificationLoss,
    network: str,
    moving: Batches | None,
    summation: str,
    device: Device,
) -> str:
    """What is about to run, in words."""
    kind = solver_class(settings.solver)
    batch = batches.in_words(settings, dataset.count, moving)
    return (
        f"data {settings.data}, {dataset!r}, scaling {settings.scaling}; {batch}\n"
        f"network {network}, {loss.size} parameters in {len(loss.layers)} layers, {settings.dtype} on"
        f" {settings.device}\n"
        f"solver {settings.solver} {summation}\n"
        + "".join(f"{line}\n" for line in device.words().splitlines())
        + (f"{kind.decompose(loss)!r}" if kind.subdomains_of == "parameters" else "")
    ).rstrip()


if __name__ == "__main__":
    run_program(main)
