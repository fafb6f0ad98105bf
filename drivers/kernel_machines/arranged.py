"""How the samples of a run of drivers/kernel.py are arranged: cut, taken over, grown, balanced."""

from __future__ import annotations

from common import training  # noqa: F401  # first: it initialises PETSc

from typing import Any

import numpy as np
import torch
from mpi4py import MPI
from petsc4py import PETSc

from ddml.data.classified import Classified
from ddml.errors import InputError
from ddml.kernel_machines import SampleDomain
from ddml.kernel_machines.balance import balanced
from ddml.kernel_machines.costs import Task, choices, coarse_rank
from ddml.kernel_machines.cuts import Array
from ddml.kernel_machines.domain import DIRECTIONS
from ddml.kernel_machines.functions import Kernel
from ddml.kernel_machines.shapes import grown
from ddml.kernel_machines.speeds import seconds_of
from ddml.parallel import agreed
from ddml.plugins import blamed, load
from ddml.runs import machines, run_file
from ddml.runs.rebuilt import options

from .options import BALANCE, OPTIONS, OVERLAP, SQUARED


def take_over(settings: Any) -> None:
    """Put width and lambda of the machine to start with into the settings, where they leave them open."""
    then = options(run_file.inspect(settings.start, MPI.COMM_SELF).attributes)
    for name in ("kernel_width", "lambda"):
        if vars(settings)[name] is None and then.get(name, "None") != "None":
            vars(settings)[name] = next(o for o in OPTIONS if o.name == name).parse(then[name])


def task_of(settings: Any, kernel: Kernel, samples: Array, columns: int, ranks: int) -> Task:
    """What the model of cost is to choose for."""
    largest = float(kernel.diagonal(torch.as_tensor(samples)).max())
    shift = vars(settings)["lambda"] / largest
    return Task.within(settings.kernel_memory, *samples.shape, columns, shift, ranks, settings.dtype)


def settle_pivots(settings: Any, domain: SampleDomain, task: Task) -> None:
    """Make the model's number of pivots an option of the run, if there are some: a restart has as many."""
    database = PETSc.Options()
    schwarz = settings.preconditioner == "schwarz" and database.getString("coarse", "woodbury") != "none"
    krylov = (settings.solver == "ksp" and settings.loss == SQUARED) or settings.exchange == "once"
    if schwarz and krylov and not database.hasName("coarse_rank"):
        database.setValue("coarse_rank", coarse_rank(task, [len(wide) for wide in domain.sets]))


def arranged(
    settings: Any, data: Classified, restart: str | None, task: Task, kernel: Kernel, comm: MPI.Comm
) -> tuple[SampleDomain, list[str]]:
    """The subdomains of a run, as they are in its file, have grown or are cut anew, balanced; and what to know of them.

    Collective.

    Raises
    ------
    InputError
        See :func:`cut`; a machine to start with of other samples.
    """
    with agreed(comm):
        domain, wanted, notes = _placed(settings, data, restart, task)
    if wanted is None:
        return domain, notes
    costs = None
    if settings.loads == "operations":
        sizes = np.array([len(wide) for wide in domain.sets], np.float64)
        costs = sizes**2 * (sizes / 6 + data.samples.shape[1])
    elif settings.loads == "seconds":
        costs = seconds_of(domain, kernel, data.samples, vars(settings)["lambda"], comm)
        notes.append(f"matrices and factors of subdomains took {costs.min():.3g} to {costs.max():.3g} s")
    with agreed(comm):
        found = balanced(domain, data.samples, costs, wanted=wanted)
    return found.domain, [*notes, repr(found)]


def _placed(
    settings: Any, data: Classified, restart: str | None, task: Task
) -> tuple[SampleDomain, float | None, list[str]]:
    """The subdomains, the balance that is wanted of them, if one is, and what to know."""
    if restart is not None:
        return machines.domain_of(restart), None, []
    if settings.start is None:
        return cut(settings, data.samples, task), settings.balance, []
    before = machines.domain_of(settings.start)
    then = run_file.inspect(settings.start, MPI.COMM_SELF).attributes
    if before.size > len(data.samples) or data.first(before.size).problem != then.get("problem"):
        raise InputError(
            f"{settings.start} is a machine of {then.get('problem')}, which these {len(data.samples)} do not begin with"
        )
    domain = grown(before, data.samples)
    notes = [f"{domain.size - before.size} samples have come since {settings.start}"]
    return domain, BALANCE if settings.balance is None else settings.balance, notes


def cut(settings: Any, samples: Array, task: Task) -> SampleDomain:
    """The subdomains that the settings ask for, or where they leave it open the model of cost; put into them.

    Raises
    ------
    InputError
        Numbers and cuts that there are not, or do not go together.
    """
    n, text = len(samples), settings.subdomains
    if text is None:
        choice = choices(task)
        parts, overlap = [choice.subdomains], choice.overlap if settings.solver == "ksp" else OVERLAP
    else:
        parts, overlap = numbers(text), OVERLAP
    if settings.overlap is None:
        settings.overlap = overlap
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
