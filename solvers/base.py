"""What all our TAO contexts share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any, ClassVar, Literal

from petsc4py import PETSc

from ddml.decomposition.options import DECOMPOSITION, subdomains
from ddml.decomposition.subdomains import Subdomains
from ddml.errors import InputError
from ddml.losses.loss import Loss
from ddml.objectives.objective import Objective
from ddml.objectives.restricted import RestrictedObjective
from ddml.options import Option, read, with_defaults

from .line_search import LineSearch, SearchResult
from .owner import Owner

# what PETSc reads for each solver and only its own follow
_PETSC_ONLY = ("max_funcs", "trust0", "catol", "crtol", "fd_gradient", "fd_hessian", "mf_hessian", "ksp_ew",
               "recycle_history", "add_terms")  # fmt: skip

REASONS = {v: k for k, v in vars(PETSc.TAO.ConvergedReason).items() if not k.startswith("_")}


class Solver(Owner, ABC):
    """Python context of a TAO solver (``-tao_type python -tao_python_type solvers.<name>``).

    A subclass defines :meth:`iterate`, and names the vectors that an iteration needs; if it keeps more than vectors
    from one iteration to the next also :meth:`begin`, :meth:`inner_state` and :meth:`take_state`: then its runs restart
    to the last bit. What needs the objective is made in :meth:`prepare`. One that knows something of the point where an
    iteration ended also defines :meth:`resume`.

    The objective must have been given with :meth:`ddml.objectives.objective.Objective.attach`. Options are
    read once, under the prefix of the TAO object.

    Attributes
    ----------
    options : tuple of Option
        What the solver reads.
    local_defaults : dict
        Defaults of options that are others where the solver is a local one.
    settings : namespace
        The values in force.
    work_vectors, saved : tuple of str
        Names of the vectors that an iteration needs, and which of them are part of :meth:`state`.
    subdomains_of : str
        What the solver divides into subdomains: ``parameters``, ``samples`` or nothing.
    levels_of : str
        What its levels differ in, if it has some: ``depth`` of a network, or ``samples``.
    judges_batches : bool
        Whether the solver says, in the objective's ``agreement``, how well one batch stands for the next.
    moves_points : int
        Iterations between new collocation points by default; 0: they stay.
    measures_error : int
        Iterations between evaluations of the error by default.
    failure : int
        PETSc's reason where :meth:`iterate` cannot go on.
    whole_iterations : bool
        Whether a request to stop waits for the end of an iteration, which changes what :meth:`inner_state` gives
        meanwhile.
    paced : bool
        Whether the setting ``rate`` is the length of all steps, which a schedule may change.
    resumes : bool or None
        Where the next :meth:`solve` begins: None, afresh; else behind the last complete iteration, or the one that
        :meth:`restore` has set, False on the same objective, True on one that has changed since.
    needed : int
        Bytes of the dense matrices that :meth:`prepare` has made on this rank, and the solver will fill.
    spent : list of float
        Work units on each level so far, the coarsest first; none where there are no levels.
    spares_memory : bool
        Whether it works in as little memory as it can, as the network is large; set by :meth:`prepare`.
    notes : list of str
        What a user should know of the method as it has been set up.
    reason : str
        Why it has ended, where PETSc has no reason for that.
    remembers : bool
        Whether :meth:`solve` begins with what the last one, of an objective that may have changed since, has
        learnt of curvature, instead of afresh; :meth:`state` is then that alone.
    """

    options: ClassVar[Sequence[Option]] = ()
    local_defaults: ClassVar[Mapping[str, Any]] = {}
    work_vectors: Sequence[str] = ()
    saved: Sequence[str] = ()
    subdomains_of: ClassVar[Literal["parameters", "samples", ""]] = ""
    levels_of: ClassVar[Literal["depth", "samples", ""]] = ""
    judges_batches: ClassVar[bool] = False
    moves_points: ClassVar[int] = 0
    measures_error: ClassVar[int] = 1
    paced: bool = False
    failure: int = PETSc.TAO.ConvergedReason.DIVERGED_LS_FAILURE

    def __init__(self) -> None:
        self.settings = SimpleNamespace(**{o.name: o.default for o in self.options})
        self.prefix = ""
        self.notes: list[str] = []
        self.reason = ""
        self.objective: Objective
        self.vectors: dict[str, PETSc.Vec] = {}
        self.f, self.iteration, self._version = 0.0, 0, 0
        self.resumes: bool | None = None
        self.remembers = self.whole_iterations = self.spares_memory = False
        self.needed, self.spent = 0, list[float]()

    @classmethod
    def decompose(cls, loss: Loss, prefix: str = "") -> Subdomains:
        """Subdomains of the parameters, whose ownership follows them: the solver's, if it has some, or by the options.

        Raises
        ------
        InputError
            See :func:`ddml.decomposition.options.subdomains`.
        """
        if cls.subdomains_of == "samples":
            return Subdomains.by_layers(loss, 1)
        return subdomains(loss, prefix, cls.options if cls.subdomains_of else DECOMPOSITION)

    def setFromOptions(self, tao: PETSc.TAO) -> None:
        """Read the options; of an objective on a subdomain with :attr:`local_defaults`. Collective."""
        self.prefix = tao.getOptionsPrefix() or ""
        for name in _PETSC_ONLY:
            if PETSc.Options().hasName(f"{self.prefix}tao_{name}"):
                kind = type(self).__name__
                raise InputError(
                    f"option -{self.prefix}tao_{name} is for PETSc's own solvers: {kind} does not follow it"
                )
        inside = isinstance(tao.getAppCtx(), RestrictedObjective)
        self.settings = read(with_defaults(self.options, **self.local_defaults if inside else {}), self.prefix)

    def setUp(self, tao: PETSc.TAO) -> None:
        """Build what the solver needs, by :meth:`prepare`; where that fails nothing is left of it. Collective."""
        with self.building():
            self.prepare(tao)

    def prepare(self, tao: PETSc.TAO) -> None:
        """Build what the solver needs, and register with :meth:`own` what is to be destroyed. Collective."""
        self.objective = tao.getAppCtx()
        self.search = self.own(LineSearch(self.objective, self.prefix))
        # g: at the current point, which moves within an iteration; accepted_g and what is saved change at its end only
        shared = self.shared_vectors()
        names = [name for name in ("g", "accepted_g", *self.work_vectors) if name not in shared]
        self.vectors = {name: self.own(tao.getSolution().duplicate()) for name in names}
        self.vectors |= {name: self.vectors[other] for name, other in shared.items()}

    def shared_vectors(self) -> Mapping[str, str]:
        """Vectors, by name, that are no vectors of their own, and which they are."""
        return {}

    @property
    def inner_types(self) -> frozenset[str]:
        """TAO types of the solvers inside this one, and of those inside them, that work on this rank."""
        return frozenset()

    @property
    def g(self) -> PETSc.Vec:
        """The gradient at the current point."""
        return self.vectors["g"]

    def view(self, tao: PETSc.TAO, viewer: PETSc.Viewer) -> None:
        """Print the values in force. Collective."""
        viewer.printfASCII(f"  {type(self).__name__}\n")
        for name, value in vars(self.settings).items():
            viewer.printfASCII(f"    {self.prefix}{name}: {value}\n")

    def solve(self, tao: PETSc.TAO) -> None:
        """Minimise. Collective."""
        x = tao.getSolution()
        going = self._start(tao)
        while going:
            if self.outdated:
                self.renew(x)
                self._version = self.objective.version
                self.objective.work.settle()  # a state from here on does not renew again
            with self.objective.uninterrupted() if self.whole_iterations else nullcontext():
                result = self.iterate(x)
            if not isinstance(result, SearchResult):
                raise InputError(
                    f"iterate of {type(self).__name__} must return a SearchResult, as self.search does, got a "
                    f"{type(result).__name__}"
                )
            if not result.success:
                tao.setConvergedReason(self.failure)
                return
            self.f = result.value
            self.g.copy(self.vectors["accepted_g"])
            self.iteration += 1
            going = _report(tao, self.iteration, self.f, self.g.norm(), result.step)
        if tao.getConvergedReason() == PETSc.TAO.ConvergedReason.CONTINUE_ITERATING:
            tao.setConvergedReason(PETSc.TAO.ConvergedReason.DIVERGED_MAXITS)

    @property
    def outdated(self) -> bool:
        """Whether the objective has changed since its value and gradient were computed at the current point."""
        return self._version != self.objective.version

    def _start(self, tao: PETSc.TAO) -> bool:
        """Begin at the initial point, or where :meth:`restore` says; True to go on."""
        x, accepted = tao.getSolution(), self.vectors["accepted_g"]
        outdated, self.resumes = self.resumes, None
        self._version = -1 if outdated else self.objective.version
        if outdated is not None:
            accepted.copy(self.g)
            tao.setIterationNumber(self.iteration)
            return tao.getMaximumIterations() > self.iteration
        self.iteration = 0
        if self.remembers:
            self.renew(x)
        else:
            self.f = self.objective.value_gradient(x, self.g)
            self.g.copy(accepted)
            self.begin()
        return _report(tao, 0, self.f, self.g.norm(), 0.0)

    def renew(self, x: PETSc.Vec) -> None:
        """Evaluate the objective, which has changed, at the current point. Collective."""
        self.f = self.objective.value_gradient(x, self.g)
        self.g.copy(self.vectors["accepted_g"])

    @abstractmethod
    def iterate(self, x: PETSc.Vec) -> SearchResult:
        """Move x and ``self.g`` by one iteration, from where ``self.f`` is the loss. Collective."""

    def begin(self) -> None:
        """Forget everything: the loss and gradient at the initial point are known. Collective."""
        return

    def resume(self, x: PETSc.Vec) -> None:
        """Go on from x, to which somebody else has moved, or with another linear term in the objective. Collective.

        The loss and the gradient there are known; what has been learnt of curvature stays.
        """
        return

    def inner_state(self) -> dict[str, Any]:
        """What the next iteration needs besides :attr:`saved` and the parameters. Collective.

        Of the kinds that :mod:`ddml.states` can write; its vectors are this object's.
        """
        return {}

    def take_state(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`inner_state` gave; the vectors :attr:`saved` have been. Collective.

        The vectors that it gave are to be kept or destroyed.

        Raises
        ------
        InputError
            If it is that of other options; nothing has been taken then.
        """
        return

    def state(self) -> dict[str, Any]:
        """What the next iteration needs besides the parameters, as it was after the last complete one. Collective.

        Of a solver that :attr:`remembers`, what its next solve begins with. The vectors are this object's.
        """
        if self.remembers:
            return {"vectors": {name: self.vectors[name] for name in self.saved}, **self.inner_state()}
        return {
            "iteration": self.iteration,
            "f": self.f,
            "outdated": self.outdated,
            "vectors": {name: self.vectors[name] for name in ("accepted_g", *self.saved)},
            **self.inner_state(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Make the next :meth:`solve` go on from a :meth:`state`, whose vectors are taken over. Collective.

        Raises
        ------
        InputError
            If the state is not one of this version of ddml, or of other options; its vectors are the caller's then.
        """
        complete = "iteration" in state
        if complete and "outdated" not in state:
            raise InputError(
                "the solver's state in the run file is of an older ddml: another -solver begins afresh there"
            )
        if complete and not (isinstance(state["iteration"], int) and state["iteration"] >= 0):
            raise InputError(f"the solver's state in the run file is of iteration {state['iteration']}")
        for name, vec in state["vectors"].items():
            vec.copy(self.vectors[name])
        self.take_state(state)
        for vec in state["vectors"].values():
            vec.destroy()
        self.remembers = not complete
        if complete:
            self.iteration, self.f, self.resumes = state["iteration"], state["f"], state["outdated"]


class Stepper(Solver):
    """A solver that can also make steps without an evaluation where they end, as the samples are others by then."""

    @property
    @abstractmethod
    def searches(self) -> bool:
        """Whether it looks at the loss to choose a step, so that it cannot."""

    @abstractmethod
    def step(self, x: PETSc.Vec) -> None:
        """Move x by one iteration; neither ``self.f`` nor ``self.g`` is known there. Collective."""


def _report(tao: PETSc.TAO, iteration: int, f: float, residual: float, step: float) -> bool:
    """Set the iteration number, call the monitors, test convergence; True to go on. Collective."""
    tao.setIterationNumber(iteration)
    tao.monitor(its=iteration, f=f, res=residual, cnorm=0.0, step=step)
    if tao.getConvergedReason() == PETSc.TAO.ConvergedReason.CONTINUE_ITERATING:
        tao.checkConverged()
    return bool(tao.getConvergedReason() == PETSc.TAO.ConvergedReason.CONTINUE_ITERATING)
