"""The optimisers of torch as reference loops on the same data, batches and counts of work; only the bench uses them."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from ddml.sampling.batches import Batches
from ddml.errors import InputError
from ddml.runs.history import History
from ddml.problems.classification import ClassificationLoss

REST = 3e-3  # rate of the Adam that takes what Muon does not


def _muon(module: nn.Module, rate: float) -> list[torch.optim.Optimizer]:
    """Muon on the matrices but the output layer's, which it is not meant for; Adam on everything else."""
    parameters = list(module.parameters())
    matrices = [i for i, p in enumerate(parameters) if p.ndim == 2][:-1]
    if not matrices:
        raise InputError("Muon needs a matrix besides the output layer's, this network has none")
    rest = [p for i, p in enumerate(parameters) if i not in matrices]
    muon = torch.optim.Muon([parameters[i] for i in matrices], lr=rate, weight_decay=0.0)
    return [muon, torch.optim.Adam(rest, lr=REST)]


def _lbfgs(module: nn.Module, rate: float, steps: int) -> list[torch.optim.Optimizer]:
    return [
        torch.optim.LBFGS(
            module.parameters(), lr=rate, max_iter=steps, history_size=10, line_search_fn="strong_wolfe",
            tolerance_grad=0.0, tolerance_change=0.0,
        )
    ]  # fmt: skip


FIRST_ORDER: dict[str, Callable[[nn.Module, float], list[torch.optim.Optimizer]]] = {
    "adam": lambda module, rate: [torch.optim.Adam(module.parameters(), lr=rate)],
    "sgd": lambda module, rate: [torch.optim.SGD(module.parameters(), lr=rate, momentum=0.9)],
    "muon": _muon,
}
RIVALS = (*FIRST_ORDER, "lbfgs")


def train(
    name: str,
    rate: float,
    loss: ClassificationLoss,
    batches: Batches | None,
    max_work: float,
    measure: Callable[[Tensor], Mapping[str, float]],
    marks: Sequence[float] = (),
) -> tuple[History, Tensor]:
    """Train a copy of a loss's network by a rival, on one process.

    SGD (momentum 0.9), Adam and Muon take one step on each batch; L-BFGS (10 pairs, strong-Wolfe search) as many
    iterations as a solver of ours does, its memory carried on from batch to batch. A loss and gradient of a batch is
    charged its fraction of the samples, wherever a search evaluates it.

    Parameters
    ----------
    name, rate
        One of :data:`RIVALS` and its learning rate (L-BFGS: first trial step).
    loss
        Of the whole training set.
    batches
        That give the samples, from their first batch on, of an objective on one rank; None: all samples.
    max_work
        Work units after which no further step begins.
    measure
        From all parameters (n,) to further history columns.
    marks
        Work units: once spent, ``measure`` is called, as at the end.

    Returns
    -------
    history : History
        A row for each step: its work, its seconds without the measurements, the batch's loss before the step.
    theta : Tensor
        The parameters (n,) at the end.

    Raises
    ------
    InputError
        Another name, or a network that the rival is not for.
    """
    if name not in RIVALS:
        raise InputError(f"unknown rival '{name}'; there are {', '.join(RIVALS)}")
    module = copy.deepcopy(loss.module)
    interval = 1 if batches is None or name != "lbfgs" else batches.interval
    optimisers = _lbfgs(module, rate, interval) if name == "lbfgs" else FIRST_ORDER[name](module, rate)
    history, left = History(), sorted(marks)
    work = spent = 0.0
    seen = float("nan")

    def parameters() -> Tensor:
        return torch.cat([p.detach().reshape(-1) for p in module.parameters()])

    def evaluate() -> Tensor:
        """The batch's loss, its gradient left in the parameters."""
        nonlocal work
        now = loss if batches is None else batches.objective.loss
        assert isinstance(now, ClassificationLoss)
        for optimiser in optimisers:
            optimiser.zero_grad()
        total = torch.zeros((), dtype=loss.dtype, device=loss.device)
        for x, y in zip(now.inputs.split(now.batch), now.targets.split(now.batch), strict=True):
            part = now.criterion(module(x), y).sum() / now.count
            part.backward()
            total += part.detach()
        work += now.count / loss.count
        return total

    while work < max_work:
        started = time.perf_counter()
        if name == "lbfgs":
            seen = float(optimisers[0].step(evaluate))  # type: ignore[arg-type]
        else:
            seen = float(evaluate())
            for optimiser in optimisers:
                optimiser.step()
        if batches is not None:
            batches.move(loss.initial())
        spent += time.perf_counter() - started
        columns: Mapping[str, float] = {}
        if (left and work >= left[0]) or work >= max_work:
            left = [mark for mark in left if mark > work]
            columns = measure(parameters())
        history.append(
            iteration=len(history) + 1, time=spent, loss=seen, work=work, work_critical=work, **columns,
        )  # fmt: skip
    return history, parameters()
