"""Objectives of losses that are sums of squares: residuals and Jacobian products on all ranks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from petsc4py import PETSc
from torch import Tensor

from ddml.errors import InputError
from ddml.losses.residual import ResidualLoss
from ddml.numbers import host

from .objective import Objective


class ResidualObjective(Objective):
    """An objective that also gives r, J v and J^T w; all collective.

    Residual vectors are PETSc vectors of m entries; each rank owns those of its samples.
    """

    loss: ResidualLoss

    def residual_vector(self) -> PETSc.Vec:
        """A new zero vector for residuals; the caller destroys it."""
        local = sum(self.part(i).residual_count() for i in range(len(self.parts)))
        vec = PETSc.Vec().createMPI((local, PETSc.DETERMINE), comm=self.comm)
        vec.set(0.0)
        return vec

    def part(self, number: int) -> ResidualLoss:
        """The loss on a part of this rank's samples."""
        part = self.parts[number]
        assert isinstance(part, ResidualLoss)
        return part

    def check_squares(self) -> None:
        """Refuse to be what it is not.

        Raises
        ------
        InputError
            If the objective has linear terms.
        """
        if self.linear:
            raise InputError(
                "an objective with a linear term is no sum of squared residuals: what needs residuals must have it "
                "without the term, or use another solver"
            )

    def residual(self, x: PETSc.Vec, r: PETSc.Vec) -> None:
        """Write r at x; charged as a loss.

        Raises
        ------
        InputError
            If the objective has linear terms.
        """
        self.check_squares()
        theta = self.parameters(x)
        self.work.add(self.fraction * self.loss.charges.evaluation(gradient=False), losses=1)
        self._write(r, [self.part(i).residual(theta) for i in range(len(self.parts))])

    def jacobian_product(self, x: PETSc.Vec, direction: PETSc.Vec, product: PETSc.Vec) -> None:
        """Write J(x) v to ``product``."""
        theta = self.parameters(x).clone()
        v = self.parameters(direction)
        self.work.add(self.fraction * self.loss.charges.jacobian(), products=1)
        self._write(product, [self.part(i).jacobian_product(theta, v) for i in range(len(self.parts))])

    def jacobian_transpose_product(self, x: PETSc.Vec, weights: PETSc.Vec, product: PETSc.Vec) -> None:
        """Write J(x)^T w to ``product``."""
        theta = self.parameters(x)
        self.work.add(self.fraction * self.loss.charges.transpose(), products=1)
        w = torch.from_numpy(np.array(weights.array_r)).to(device=self.loss.device, dtype=self.loss.dtype)
        edges = np.cumsum([0, *(self.part(i).residual_count() for i in range(len(self.parts)))])
        self.parts.sum_rows(
            lambda i, row: self.part(i).jacobian_transpose_product(theta, w[edges[i] : edges[i + 1]], row), product
        )

    def linear_model(self, x: PETSc.Vec, directions: Sequence[PETSc.Vec]) -> NDArray[np.float64]:
        """W^T W (k + 1, k + 1) for W = [J(x) d_1, ..., J(x) d_k, r(x)]; charged as k products and a loss.

        |r + J D a|^2 is then a quadratic function of a (k,). The sum over the samples is the same to the last bit
        where the objective's are.

        Raises
        ------
        InputError
            If the objective has linear terms.
        """
        self.check_squares()
        theta = self.parameters(x).clone()
        columns = [self.parameters(d).clone() for d in directions]
        count = len(columns)
        self.work.add(self.fraction * count * self.loss.charges.jacobian(), products=count)
        self.work.add(self.fraction * self.loss.charges.evaluation(gradient=False), losses=1)
        found = []
        for i in range(len(self.parts)):
            part = self.part(i)
            W = torch.stack([*(part.jacobian_product(theta, d) for d in columns), part.residual(theta)])
            found.append(W @ W.T)
        products = np.zeros((len(found), count + 1, count + 1))
        for product, square in zip(products, host(found, torch.float64), strict=True):
            product[:] = square.numpy()
        return self.parts.sum_everywhere(products)

    @staticmethod
    def _write(vec: PETSc.Vec, pieces: list[Tensor]) -> None:
        with vec as array:
            if pieces:
                array[:] = torch.cat(pieces).to(dtype=torch.float64, device="cpu").numpy()
