"""Our solvers behind the interface of ``torch.optim``, for people who have a loop of their own.

::

    optimizer = solvers.Minimizer(network, "ssbfgs", max_iter=20)

    def closure():
        optimizer.zero_grad()
        loss = criterion(network(inputs), targets)
        loss.backward()
        return loss

    for _ in range(10):
        optimizer.step(closure)
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from numbers import Real
from typing import Any

import numpy as np
import torch
from mpi4py import MPI
from petsc4py import PETSc
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ddml.errors import CollectiveError, InputError
from ddml.layout import ParameterLayout
from ddml.losses.modules import check_alike, trained
from ddml.parallel import agreed, cause
from ddml.vectors import owned
from solvers.base import REASONS, Solver
from solvers.minimisation import Minimisation, given, prefixes, refuse_unused
from solvers.registry import PETSC_TYPES, solver_class

from .closure import Closure, ClosureLoss, ClosureObjective
from .states import packed, unpacked

ITERATIONS = 20  # of a step by default, as torch.optim.LBFGS has it


class Minimizer(torch.optim.Optimizer):
    r"""A solver of :data:`solvers.SOLVERS` that needs a loss and its gradient only, as a torch optimizer.

    All methods but ``zero_grad`` and ``add_param_group`` are collective on ``comm``: every rank calls them.

    The loss is the mean over the samples of all ranks. Each rank's closure gives the mean over its own, as under
    DistributedDataParallel, and ``share`` says how many those are: the losses l_r and gradients of the ranks are
    combined to :math:`\sum_r w_r l_r / \sum_r w_r`. Every decision is made on that number.

    A step begins where the last one ended. Where its first call of the closure gives the very loss and gradient known
    there the solver goes on as if it had never stopped; elsewhere, as with another batch or where the parameters have
    been changed, it keeps what it knows of curvature and goes on with the new loss. Parameters in less than double
    precision are rounded ones of those that the solver has.

    Parameters
    ----------
    params
        A module, of which all parameters with ``requires_grad`` are trained; or parameters, named or not, or groups of
        them, as for any torch optimizer. Solvers that divide the network into subdomains, and those in the modular
        norm, need the module.
    solver
        Its name, or ``path/to/file.py:Class``.
    comm
        The ranks. They begin with the parameters of rank 0, and with its buffers where the module is given.
    max_iter
        Iterations of each step.
    share
        Weight of this rank's loss in the mean, as a rule its number of samples; 0: it has none, and its closure is not
        called. The attribute may be changed before any step.
    lr
        Learning rate, of solvers that have one (``adagrad``; ``gradient`` with ``line_search=False``). The others
        choose their steps themselves and refuse it.
    options
        Of the solver and of PETSc, as for :func:`solvers.minimise`.

    Attributes
    ----------
    loss : float
        Where the last step ended.
    reason : str
        PETSc's name of why it ended there, ``DIVERGED_MAXITS`` after ``max_iter`` iterations.
    calls : int
        Of this rank's closure, so far.

    Raises
    ------
    InputError
        On all ranks: solvers or options that there are not, or that need more than gradients; parameters that cannot
        be trained; groups with options of their own.
    """

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        solver: str = "lbfgs",
        comm: MPI.Comm = MPI.COMM_WORLD,
        *,
        max_iter: int = ITERATIONS,
        share: float = 1.0,
        lr: float | None = None,
        **options: Any,
    ) -> None:
        self.comm, self.solver, self.share = comm, solver, share
        self.loss, self.reason = math.nan, ""
        self._prefix = next(prefixes)
        self._options = options if lr is None else {**options, "rate": lr}
        with agreed(comm):
            named = _named(params)
            module = params if isinstance(params, nn.Module) else None
            kind = _usable(solver, module)
        self._closures = loss = ClosureLoss(named, module, comm)
        said = comm.allgather((loss.parameters, loss.dtype, solver, f"{self._options}"))
        if any(other != said[0] for other in said):
            raise CollectiveError("all ranks must train the same parameters with the same solver and options")
        others = [] if module is None else [t for t in (*module.parameters(), *module.buffers()) if not t.requires_grad]
        for tensor, first in zip(others, comm.bcast([t.detach().cpu() for t in others]), strict=True):
            tensor.detach().copy_(first)
        self._synchronise()
        try:
            with given(self._prefix, self._options):
                layout = ParameterLayout(loss.parameters, comm, kind.decompose(loss, self._prefix).ownership(comm.size))
                self._objective = ClosureObjective(loss, layout)
                self._made, self._context = self._build()
                with self._made.building():
                    if lr is not None and not self._context.paced:
                        raise InputError(self._unpaced())
                    refuse_unused(self._prefix, solver)
        except InputError as error:
            raise self._named_anew(error) from error
        self._first = layout.vector()
        self._rate = float(self._context.settings.rate) if self._context.paced else 1.0
        super().__init__([tensor for _, tensor in named], {"lr": self._rate, "max_iter": max_iter})

    def _build(self) -> tuple[Minimisation, Solver]:
        """The solver as it is before its first iteration, at the parameters that the tensors hold."""
        made = Minimisation(self._objective, self.solver, self.comm, self._prefix)
        assert made.context is not None
        return made, made.context

    def destroy(self) -> None:
        """Destroy what PETSc has; the optimizer is of no use then."""
        self._first.destroy()
        self._made.destroy()

    @property
    def calls(self) -> int:
        """Calls of this rank's closure so far."""
        return self._closures.calls

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refuse, once the optimizer is made: what is trained stays what it is.

        Raises
        ------
        InputError
            Always, but where torch calls it itself.
        """
        if self.param_groups:
            raise InputError(f"{self.solver} cannot train more parameters later on: make another Minimizer")
        super().add_param_group(param_group)

    def step(self, closure: Closure | None = None) -> Tensor:  # type: ignore[override]
        """At most ``max_iter`` iterations; the loss where they began, of all ranks, in double precision.

        Parameters
        ----------
        closure
            Zeroes the gradients, computes the mean loss of this rank's samples, calls its ``backward`` and returns it;
            the same for the same parameters, as often as it is called.

        Raises
        ------
        CollectiveError
            On all ranks: a closure that fails, gives no number or no gradient, or a loss that is not finite where the
            step begins. The parameters are those before the step then; the solver begins afresh with the next one,
            unless it was the first call that failed.
        """
        with torch.no_grad(), given(self._prefix, self._options):
            iterations = self._prepare(closure)
            objective, context, tao, x, g = self._objective, self._context, self._made.tao, self._made.x, self._first
            moved = not self._in_place()
            if moved:
                self._synchronise()
                objective.initial(x)
            value = objective.value_gradient(x, g)
            norm = g.norm()
            if not (math.isfinite(value) and math.isfinite(norm)):
                raise CollectiveError(
                    f"the loss is {value:g} and its gradient of norm {norm:g} where the step begins: not finite"
                )
            if norm > tao.getTolerances()[0]:
                context.resumes = None
                if context.iteration > 0:
                    known = np.array_equal(g.array_r, context.vectors["accepted_g"].array_r)
                    context.resumes = moved or value != context.f or not self.comm.allreduce(known, MPI.LAND)
                if context.resumes is not False:
                    objective.know(x, value, g)
                tao.setMaximumIterations(context.iteration + iterations)
                self._solve()
                self.loss, self.reason = context.f, REASONS[tao.getConvergedReason()]
            else:
                self.loss, self.reason = value, "CONVERGED_GATOL"
            objective.load(x)
            return torch.tensor(value, dtype=torch.float64)

    def _solve(self) -> None:
        """Iterate; where that fails the parameters are what they were, and the solver is made anew. Collective."""
        begin = self._made.x.copy()
        try:
            self._made.tao.solve()
        except Exception as error:
            self._made.destroy()
            self._objective.load(begin)
            self._made, self._context = self._build()
            begin.copy(self._made.x)
            ours = cause(error, InputError)
            if ours is None:
                raise
            raise self._named_anew(ours) from error
        finally:
            begin.destroy()

    def _named_anew(self, error: BaseException) -> CollectiveError:
        """An InputError, whose options have no prefix."""
        return CollectiveError(f"{error}".replace(self._prefix, ""))

    def _prepare(self, closure: Closure | None) -> int:
        """Give the loss what is to be evaluated, and the solver its rate; how many iterations. Collective."""
        group = self.param_groups[0]
        with agreed(self.comm):
            if not callable(closure):
                raise InputError(
                    "step() needs a closure, which computes the loss and its gradient and returns the loss"
                )
            if not (isinstance(self.share, Real) and 0 <= self.share < math.inf):
                raise InputError(f"the share of a rank must be 0 or more samples, got {self.share}")
            if not isinstance(group["max_iter"], int) or group["max_iter"] < 1:
                raise InputError(f"max_iter must be an integer of 1 or more, got {group['max_iter']}")
            if not 0 <= group["lr"] < math.inf:
                raise InputError(f"the learning rate must be 0 or more, got {group['lr']}")
            if not self._context.paced and group["lr"] != self._rate:
                raise InputError(self._unpaced())
        said = self.comm.allgather((float(self.share), float(group["lr"]), group["max_iter"]))
        total = sum(share for share, *_ in said)
        if any(rest != list(said[0][1:]) for _, *rest in said):
            raise CollectiveError(f"all ranks must have the same learning rate and max_iter, got {said}")
        if not total > 0:
            raise CollectiveError("no rank has samples: every share is 0")
        self._closures.closure, self._closures.weight = closure, float(self.share) / total
        if self._context.paced:
            self._context.settings.rate = float(group["lr"])
        return int(group["max_iter"])

    def _unpaced(self) -> str:
        return f"{self.solver} chooses its steps itself and has no learning rate: leave lr and schedulers of it out"

    def _synchronise(self) -> None:
        """Give all ranks the parameters of rank 0."""
        if self.comm.size > 1:
            theta = self._closures.initial().double().cpu()
            self.comm.Bcast(theta.numpy())
            self._closures.write(theta)

    def _in_place(self) -> bool:
        """Whether the tensors hold what the solver has, on all ranks."""
        x, loss = self._made.x, self._closures
        begin, end = x.getOwnershipRange()
        mine, same = owned(x), True
        for table, tensor in zip(loss.parameters, loss.tensors, strict=True):
            a, b = max(table.offset, begin), min(table.range.stop, end)
            if a < b:
                here = tensor.detach().reshape(-1)[a - table.offset : b - table.offset].cpu()
                same = same and torch.equal(here, mine[a - begin : b - begin].to(here.dtype))
        return bool(self.comm.allreduce(same, MPI.LAND))

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on but the module's parameters and the closure, on every rank.

        For ``torch.save``; the same whatever the number of ranks, on which ``load_state_dict`` goes on, on the same
        number to the last bit.
        """
        context = self._context
        state = packed(context.state(), self.comm) if context.iteration > 0 else None
        theta = packed(self._made.x, self.comm)
        own = {"name": self.solver, "parameters": self._table(), "theta": theta, "state": state, "loss": self.loss}
        return {**super().state_dict(), "solver": own}

    def _table(self) -> list[tuple[str, tuple[int, ...]]]:
        return [(p.name, p.shape) for p in self._closures.parameters]

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:  # type: ignore[override]
        """Go on from a :meth:`state_dict`; the module's parameters are loaded on their own, before or behind.

        Raises
        ------
        CollectiveError
            If it is of no Minimizer, of another solver or of other parameters, or not whole; nothing has changed then.
        """
        with agreed(self.comm):
            own = state_dict.get("solver")
            if not isinstance(own, dict) or own.keys() != {"name", "parameters", "theta", "state", "loss"}:
                raise InputError("this state_dict is of no Minimizer")
            if own["name"] != self.solver:
                raise InputError(f"this state_dict is of solver {own['name']}, not {self.solver}")
            if [(name, tuple(shape)) for name, shape in own["parameters"]] != self._table():
                raise InputError("this state_dict is of other parameters")
        vectors: list[PETSc.Vec] = []
        with given(self._prefix, self._options):
            new, context = self._build()
            try:
                theta, state = (unpacked(own[name], self._objective.layout, vectors) for name in ("theta", "state"))
                theta.copy(new.x)
                theta.destroy()
                if state is not None:
                    context.restore(state)
                super().load_state_dict({key: value for key, value in state_dict.items() if key != "solver"})
            except Exception as error:
                new.destroy()
                for vec in vectors:
                    vec.destroy()
                raise CollectiveError(f"this state_dict cannot be taken over: {self._named_anew(error)}") from error
        self._made.destroy()
        self._made, self._context, self.loss = new, context, own["loss"]


def _usable(solver: str, module: nn.Module | None) -> type[Solver]:
    """The class of a solver that needs no more than gradients.

    Raises
    ------
    InputError
        If it needs more.
    """
    if solver in PETSC_TYPES:
        raise InputError(f"PETSc's {solver} begins afresh at every step: choose one of solvers.SOLVERS")
    kind = solver_class(solver)
    if kind.levels_of == "depth":
        raise InputError(f"{solver} needs networks of several depths: a closure knows one only")
    if kind.levels_of or kind.subdomains_of == "samples":
        raise InputError(f"{solver} needs samples that it can choose from: a closure has its own")
    if kind.subdomains_of and module is None:
        raise InputError(f"{solver} needs to know the layers: pass the module in the place of its parameters")
    return kind


def _named(params: nn.Module | Iterable[Any]) -> list[tuple[str, nn.Parameter]]:
    """The parameters that are trained, with their names, or numbers where they have none.

    Raises
    ------
    InputError
        Parameters that cannot be trained, or groups with options of their own.
    """
    if isinstance(params, DistributedDataParallel):
        raise InputError(
            "pass the module within DistributedDataParallel, here and in the closure: Minimizer sums itself"
        )
    if isinstance(params, nn.Module):
        return trained(params)
    found: list[tuple[str, Any]] = []
    for number, entry in enumerate([params] if isinstance(params, Tensor) else params):
        group = entry if isinstance(entry, dict) else {"params": [entry]}
        own = sorted(group.keys() - {"params", "param_names"})
        if own:
            raise InputError(
                f"parameter group {number} has {', '.join(own)}: one solver has the same for all parameters"
            )
        inside = group.get("params", [])
        for one in [inside] if isinstance(inside, Tensor) else inside:
            name, tensor = one if isinstance(one, tuple) else (f"{len(found)}", one)
            if not isinstance(tensor, Tensor) or not tensor.is_leaf:
                raise InputError(f"parameter {name} must be a tensor that is a leaf, got {type(tensor).__name__}")
            found.append((name, tensor))
    named = list({id(tensor): (name, tensor) for name, tensor in reversed(found) if tensor.requires_grad}.values())[
        ::-1
    ]
    if not named:
        raise InputError("there are no parameters to train: none has requires_grad")
    check_alike(named)
    return named
