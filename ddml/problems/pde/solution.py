"""What a trained network says of a problem: its fields as a torch module, and tables of what can be said at points."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from . import calling
from .loss import PDELoss
from .pde import PDE, Array, Interior


class Solution(nn.Module):
    """The fields lift + factor * network(embed(coordinates)), scales included, as a torch module.

    Parameters
    ----------
    loss
        Of the problem; its network is copied.
    theta
        Parameters (n,).

    Attributes
    ----------
    network : Module
        The copy, with the parameters in it.
    """

    numbers: Tensor

    def __init__(self, loss: PDELoss, theta: Tensor) -> None:
        super().__init__()
        self.problem, self.scales = loss.problem, loss.statement.scales
        self.network = copy.deepcopy(loss.network)
        known = dict(self.network.named_parameters())
        with torch.no_grad():
            for name, (offset, shape) in loss.offsets.items():
                known[name].copy_(theta[offset : offset + shape.numel()].view(shape))
        self.names = loss.coefficients
        self.register_buffer("numbers", theta[loss.tail].to(torch.float64, copy=True))

    @property
    def coefficients(self) -> dict[str, float]:
        """The problem's trained numbers by name."""
        return dict(zip(self.names, self.numbers.tolist(), strict=True))

    def forward(self, points: Tensor) -> Tensor:
        """The fields (N, F) at points (N, d), a column for each coordinate in the order of the problem's domain."""
        coordinates = points.T
        found = self.network(self.scales.embed(self.problem, coordinates))
        return calling.lift(self.problem, coordinates) + found * self.scales.factor(self.problem, coordinates)


def within(problem: PDE, points: Array) -> NDArray[np.bool_]:
    """Which points (N, d) lie in a problem's domain, ends included."""
    low, high = np.array(problem.bounds, dtype=float).T
    return np.asarray(((points >= low) & (points <= high)).all(axis=1))


@torch.no_grad()
def tabulated(loss: PDELoss, theta: Tensor, points: Array) -> dict[str, Array]:
    """Columns (N,) of what can be said at points (N, d), by name.

    The fields; their derivatives that the equation asks for, as in ``u.xx``; the pieces of its residuals, not weighted;
    and where the solution is known, that and the error, as in ``u exact`` and ``u error``, NaN outside of the domain.
    """
    theta = theta.to(loss.dtype)
    loss.evaluator.bind(theta)
    coefficients, names = list(theta[loss.tail].clone()), list(loss.problem.fields)
    equations = [i for i, term in enumerate(loss.problem_terms) if isinstance(term.where, Interior)]
    derivatives = [d for d in loss.derivatives if d[1]]
    columns: dict[str, list[Tensor]] = {}
    for piece in np.array_split(points, max(-(-len(points) // loss.chunk), 1)):
        at = loss.statement.points(loss.indices, 0, 1.0, piece[:, None], {})
        jets = loss.evaluator.forward(at.inputs.flatten(1, 2)).clone()
        fields = at.fields(jets)
        found = {name: fields[loss.position[()], :, 0, f] for f, name in enumerate(names)}
        found |= {loss.statement.name((f, i)): fields[loss.position[i], :, 0, f] for f, i in derivatives}
        for term in equations:
            residuals = loss.chunk_residual(replace(at, term=term), jets, coefficients)
            label = loss.problem_terms[term].label
            label += f" {term}" * any(loss.problem_terms[other].label == label for other in equations if other != term)
            found |= {f"{label} {k + 1}" if len(residuals) > 1 else label: r for k, r in enumerate(residuals)}
        for name, values in found.items():
            columns.setdefault(name, []).append(values.to(device="cpu", dtype=torch.float64))
    table = {name: np.asarray(torch.cat(values).numpy()) for name, values in columns.items()}
    inside = within(loss.problem, points)
    exact = calling.exact(loss.problem, torch.from_numpy(points[inside].T.copy())) if inside.any() else None
    if exact is not None:
        known = np.full((len(points), len(names)), np.nan)
        known[inside] = exact
        table |= {f"{name} exact": known[:, f] for f, name in enumerate(names)}
        table |= {f"{name} error": table[name] - known[:, f] for f, name in enumerate(names)}
    return table
