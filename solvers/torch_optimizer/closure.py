"""Losses that only a closure can evaluate, as a torch optimizer is given them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from numbers import Real
from typing import Any, NoReturn, Self

import torch
from mpi4py import MPI
from petsc4py import PETSc
from torch import Tensor, nn

from ddml.errors import InputError
from ddml.layout import ParameterLayout
from ddml.linalg.compact import Compact
from ddml.losses.loss import Loss
from ddml.losses.modules import grouped
from ddml.objectives.objective import Objective
from ddml.parallel import StopRequest, agreed
from ddml.parameters import parameter_table

Closure = Callable[[], Any]


class ClosureLoss(Loss):
    """The mean over the samples of all ranks, of which this rank's closure knows its own.

    Every evaluation writes parameters into the torch tensors, calls the closure, and reads their gradients. It is
    collective: what goes wrong in one rank's closure is raised on all.

    Parameters
    ----------
    named
        The tensors that are trained, by name.
    module
        That they are of, if that is known: it says what the layers are.
    comm
        The ranks.

    Attributes
    ----------
    closure : callable
        Computes the loss of this rank's samples, calls its ``backward``, and returns it.
    weight : float
        This rank's share of all samples; where that is 0 the closure is not called.
    calls : int
        Of the closure.
    """

    count = 1
    hessian = divisible = False

    def __init__(self, named: Sequence[tuple[str, nn.Parameter]], module: nn.Module | None, comm: MPI.Comm) -> None:
        self.tensors = [tensor for _, tensor in named]
        self.parameters = parameter_table([(name, tensor.shape) for name, tensor in named])
        names = [name for name, _ in named]
        self.layers = (tuple(range(len(named))),) if module is None else tuple(grouped(module, names).values())
        self.costs = tuple(float(sum(self.parameters[i].size for i in layer)) for layer in self.layers)
        self.dtype, self.device = self.tensors[0].dtype, self.tensors[0].device
        self.module, self.comm = module, comm
        self.closure: Closure | None = None
        self.weight, self.calls = 1.0, 0

    def initial(self) -> Tensor:
        """What the tensors hold."""
        return torch.cat([tensor.detach().reshape(-1) for tensor in self.tensors])

    @torch.no_grad()
    def write(self, theta: Tensor) -> None:
        """Write parameters (n,), in any precision, into the tensors."""
        for tensor, table in zip(self.tensors, self.parameters, strict=True):
            tensor.copy_(theta[table.range].view(table.shape))

    def call(self) -> float:
        """This rank's share of the loss where the tensors are; they have their gradients then. Collective.

        Raises
        ------
        CollectiveError
            If the closure of any rank fails, returns no number, or leaves no gradient.
        """
        with agreed(self.comm):
            for tensor in self.tensors:
                tensor.grad = None
            return self.weight * self._called() if self.weight > 0 else 0.0

    def _called(self) -> float:
        assert self.closure is not None
        self.calls += 1
        where = f" on rank {self.comm.rank}" if self.comm.size > 1 else ""
        try:
            with torch.enable_grad():
                found = self.closure()
        except Exception as error:
            said = next(iter(f"{error}".splitlines()), "")
            raise InputError(f"the closure fails{where}: {type(error).__name__}: {said}") from error
        one = isinstance(found, Tensor) and found.numel() == 1 and not found.is_complex()
        if not (one or isinstance(found, Real)):
            shape = f" of shape {tuple(found.shape)}" if isinstance(found, Tensor) else ""
            raise InputError(
                f"the closure must return the loss, one real number; it returns a {type(found).__name__}{shape}{where}"
            )
        if all(tensor.grad is None for tensor in self.tensors):
            raise InputError(
                f"the closure leaves no gradient{where}: it must call backward() on the loss, which must depend on the "
                "parameters"
            )
        return float(found)

    @torch.no_grad()
    def gradient(self, out: Tensor) -> None:
        """Write this rank's share of the gradient behind :meth:`call` to ``out`` (n,), in any precision."""
        for tensor, table in zip(self.tensors, self.parameters, strict=True):
            place = out[table.range].view(table.shape)
            if tensor.grad is None:
                place.zero_()
            else:
                place.copy_(tensor.grad.to_dense() if tensor.grad.is_sparse else tensor.grad)
        if self.weight != 1 and self.weight != 0:
            out *= self.weight

    def value(self, theta: Tensor, kept: Any = None) -> float:
        """See :meth:`ddml.losses.loss.Loss.value`: as dear as with the gradient."""
        self.write(theta)
        return self.call()

    def value_gradient(
        self, theta: Tensor, gradient: Tensor, kept: Any = None, active: frozenset[int] | None = None
    ) -> float:
        """See :meth:`ddml.losses.loss.Loss.value_gradient`."""
        self.write(theta)
        value = self.call()
        found = torch.empty_like(gradient)
        self.gradient(found)
        gradient += found
        return value

    def part(self, begin: int, end: int) -> Loss:
        """See :meth:`ddml.losses.loss.Loss.part`: refused."""
        _refuse("to divide the samples anew")

    def sampled(self, rows: Tensor) -> Loss:
        """See :meth:`ddml.losses.loss.Loss.sampled`: refused."""
        _refuse("samples that it can choose from")

    def of_module(self, module: nn.Module) -> Self:
        """See :meth:`ddml.losses.loss.Loss.of_module`: refused."""
        _refuse("the loss of other networks")

    def terms(self, theta: Tensor, kept: Any = None) -> Iterator[Tensor]:
        """See :meth:`ddml.losses.loss.Loss.terms`: refused."""
        _refuse("derivatives beyond the gradient")


def _refuse(needed: str) -> NoReturn:
    raise InputError(f"this solver, with these options, needs {needed}: a closure gives a loss and its gradient only")


class ClosureObjective(Objective):
    """The objective of a :class:`ClosureLoss`; parameters go to the tensors and gradients to PETSc in one copy each.

    Parameters
    ----------
    loss, layout, stop, blocks, parts
        See :class:`ddml.objectives.objective.Objective`; the only part is the loss itself.
    """

    loss: ClosureLoss

    def __init__(
        self,
        loss: ClosureLoss,
        layout: ParameterLayout,
        stop: StopRequest | None = None,
        blocks: int = 0,
        parts: Sequence[Loss] | None = None,
    ) -> None:
        super().__init__(loss, layout, stop, blocks, [loss] if parts is None else parts)
        self._known: tuple[tuple[int, int], float, PETSc.Vec] | None = None
        self._numbers = torch.float32 if loss.dtype == torch.float32 else torch.float64

    def know(self, x: PETSc.Vec, value: float, g: PETSc.Vec) -> None:
        """Tell the loss and gradient at x, so that evaluating there next costs nothing; g stays the caller's."""
        self._known = (x.handle, x.stateGet()), value, g

    def _told(self, x: PETSc.Vec) -> tuple[float, PETSc.Vec] | None:
        """What is known at x; it is forgotten."""
        known, self._known = self._known, None
        return known[1:] if known is not None and known[0] == (x.handle, x.stateGet()) else None

    def load(self, x: PETSc.Vec) -> None:
        """Write x into the tensors of all ranks. Collective."""
        self.loss.write(self.layout.gather(x, torch.float64 if self.comm.size == 1 else self._numbers))

    def _evaluate(self, x: PETSc.Vec) -> float:
        """This rank's share of the loss at x."""
        self.load(x)
        self.work.add(self.fraction, gradients=1)
        return self.loss.call()

    def value_gradient(self, x: PETSc.Vec, g: PETSc.Vec) -> float:
        """See :meth:`ddml.objectives.objective.Objective.value_gradient`."""
        if self.linear:
            return super().value_gradient(x, g)
        told = self._told(x)
        if told is not None:
            told[1].copy(g)
            return told[0]
        share = self._evaluate(x)
        if self.comm.size == 1:
            with g as array:
                self.loss.gradient(torch.from_numpy(array))
        else:
            self.layout.reduce(self._row(), g)
        return self.sum_parts([share])

    def value_compact(self, x: PETSc.Vec, ready: Callable[[], None] = lambda: None) -> tuple[float, Compact]:
        """See :meth:`ddml.objectives.objective.Objective.value_compact`."""
        told = self._told(x)
        if told is not None:
            ready()
            return told[0], Compact.of(told[1])
        self.load(x)
        ready()
        self.work.add(self.fraction, gradients=1)
        share = self.loss.call()
        mine = self.layout.summed(self._row().numpy())
        return self.sum_parts([share]), Compact(mine)

    def _row(self) -> Tensor:
        """This rank's share of the gradient."""
        row = torch.empty(self.loss.size, dtype=self._numbers)
        self.loss.gradient(row)
        return row
