"""What a trained network says: python drivers/predict.py run.h5 -at points.csv|-grid 200x200 -o out.csv|.npz|.vti|...

Of a PINN its fields, their derivatives, the residual, and the solution and the error where they are known; of a
classifier the probabilities of the classes, of test samples unless others are given.
"""

from __future__ import annotations

from common.program import run_program  # first: it initialises PETSc

import math
from typing import Any

import numpy as np
import torch
from mpi4py import MPI

from common.arguments import ANEW, FUSION, run_and_options
from ddml.data import files, tables
from ddml.data.tables import Table
from ddml.errors import InputError
from ddml.options import Option
from ddml.parallel import check_memory
from ddml.problems import PDELoss
from ddml.problems.classification import Classifier
from ddml.problems.pde.solution import tabulated, within
from ddml.runs.opened import OpenedRun, open_run
from ddml.runs.progress import say

COPIES = 4  # of the whole table that there must be memory for (our choice)
BATCH, VALUES = 1024, 1 << 25  # samples, and their values, that go through a classifier at a time (our choice)

OPTIONS = (
    Option("at", None, "Points: a .csv file with a line of names, among them the coordinates, or an .npz file with an "
           "array for each. Of a classifier samples: a .csv file with a line of names and a line for each sample, an "
           ".npy file, or inputs of an .npz file, with the values as they were stored in the data (default: the "
           "data's test samples)."),
    Option("grid", None, "Points: so many along each coordinate, ends included, as in 200x200; one number is for all."),
    Option("o", None, f"File to write, {', '.join(tables.WRITERS)}, in the place of one that is there. The last three "
           "are for ParaView, with up to three coordinates as x, y and z; .vti and .vtr need -grid."),
    FUSION,
    *ANEW,
)  # fmt: skip


def main(comm: MPI.Comm) -> int:
    """Predict what the command line says; the exit code."""
    path, settings = run_and_options(__doc__ or "", OPTIONS)
    if comm.size > 1:
        raise InputError("predict.py runs on one rank")
    if settings.o is None:
        raise InputError("option -o is missing: the file to write; -help explains the options")
    suffix = tables.check_target(settings.o, list(tables.WRITERS), [path, *([settings.at] if settings.at else [])])
    run = open_run(path)
    if run.attributes.get("driver") in ("classify", "logistic", "kernel"):
        table = classified(run, settings, suffix)
    else:
        if settings.fusion is not None:
            raise InputError(f"option -fusion is for runs with -tiles; {path} is of no classifier")
        if (settings.at is None) == (settings.grid is None):
            raise InputError("give the points, either -at points.csv or -grid, as in 200x200")
        if settings.grid is None and suffix in (".vti", ".vtr"):
            raise InputError(f"option -o: {suffix} holds a grid: give -grid, or write .vtu")
        loss = run.loss(trust=settings.trust, problem=settings.problem, network=settings.network)
        if len(loss.problem.domain) > 3 and suffix.startswith(".vt"):
            raise InputError(f"option -o: {suffix} holds three coordinates, there are {len(loss.problem.domain)}")
        table = evaluated(run, loss, settings, comm)
    tables.write(settings.o, table)
    count = len(next(iter(table.columns.values())))
    say(f"wrote {settings.o}: {', '.join([*table.coordinates, *table.columns])} at {count} points")
    return 0


def evaluated(run: OpenedRun, loss: PDELoss, settings: Any, comm: MPI.Comm) -> Table:
    """What can be said at the points that the settings ask for."""
    letters, axes = list(loss.problem.domain), None
    width = len(letters) + 3 * len(loss.problem.fields) + len(loss.derivatives) + len(loss.problem_terms)
    if settings.grid is not None:
        numbers = sizes(settings.grid, letters)
        said = " x ".join(map(str, numbers))
        check_memory(comm, COPIES * 8 * width * math.prod(numbers), f"a grid of {said} points", "give a smaller one")
        axes = [np.linspace(low, high, n) for (low, high), n in zip(loss.problem.bounds, numbers, strict=True)]
        points = np.stack([m.ravel() for m in np.meshgrid(*axes, indexing="ij")], axis=1)
    else:
        points = tables.points(settings.at, letters)
        outside = int(np.sum(~within(loss.problem, points)))
        if outside:
            say(f"note: {outside} of {len(points)} points are outside of the domain, where nothing was trained")
    columns = tabulated(loss, run.theta, points)
    for name, values in columns.items():
        if not (name.endswith((" exact", " error")) or np.isfinite(values).all()):
            say(f"note: {name} is not finite at {np.sum(~np.isfinite(values))} of {len(points)} points")
    for name in loss.problem.fields:
        if f"{name} error" in columns:
            known = np.isfinite(columns[f"{name} exact"])
            error, exact = (np.linalg.norm(columns[f"{name} {what}"][known]) for what in ("error", "exact"))
            say(f"relative error of {name} {error / exact:.4e}" if exact else f"error of {name} {error:.4e}")
    for name, value in zip(loss.coefficients, run.theta[loss.tail].tolist(), strict=True):
        say(f"{name} = {value:.8g}")
    return Table({letter: points[:, i] for i, letter in enumerate(letters)}, columns, axes)


def sizes(text: str, letters: list[str]) -> list[int]:
    """The numbers of points along each coordinate.

    Raises
    ------
    InputError
        What is none, below 2, or too few or too many numbers.
    """
    words = text.split("x")
    if not all(word.isascii() and word.isdecimal() and len(word) < 19 and int(word) > 1 for word in words):
        raise InputError(f"option -grid must be numbers of 2 or more, as in 200x200; got '{text}'")
    if len(words) not in (1, len(letters)):
        raise InputError(f"option -grid must be {len(letters)} numbers, for {', '.join(letters)}, or one; got '{text}'")
    return [int(word) for word in words] * (len(letters) // len(words))


def classified(run: OpenedRun, settings: Any, suffix: str) -> Table:
    """The classes of the samples that the settings ask for, and their probabilities."""
    if settings.grid is not None or suffix.startswith(".vt"):
        raise InputError(f"{run.path} is of a classifier: give samples with -at, and write .csv or .npz")
    anew = {name: getattr(settings, name) for name in ("trust", "network", "data", "fusion")}
    labels = None
    if settings.at is None and run.attributes["driver"] == "logistic":
        raise InputError("option -at is missing: samples for the model of a run of logistic.py")
    if settings.at is None:
        dataset = files.load(run.data(trust=settings.trust, data=settings.data), MPI.COMM_SELF)
        samples, labels = dataset.test_inputs, dataset.test_labels
    module = run.network(**anew)
    assert isinstance(module, Classifier)
    if settings.at is not None:
        samples = tables.samples(settings.at, module.shape)
    elif samples.shape[1:] != module.shape:
        raise InputError(
            f"the data have samples of shape {samples.shape[1:]}, the network was trained for {module.shape}"
        )
    rows = max(min(BATCH, VALUES // math.prod(module.shape)), 1)
    found = [module.probabilities(torch.tensor(samples[i : i + rows])) for i in range(0, len(samples), rows)]
    chances, names = torch.cat(found).numpy(), np.array(module.classes)
    columns = {"class": names[chances.argmax(axis=1)]}
    if labels is not None:
        columns["label"] = names[labels]
        say(f"accuracy {(columns['class'] == columns['label']).mean():.4f}")
    columns |= {f"probability {name}": chances[:, i] for i, name in enumerate(module.classes)}
    return Table({}, columns)


if __name__ == "__main__":
    run_program(main)
