"""What all our TAO contexts share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any, ClassVar

from petsc4py import PETSc

from ddml.errors import InputError
from ddml.objective import Objective
from ddml.options import Option, read, with_defaults
from ddml.restricted import RestrictedObjective

from .line_search import LineSearch, SearchResult

REASONS = {v: k for k, v in vars(PETSc.TAO.ConvergedReason).items() if not k.startswith("_")}


class Solver(ABC):
    """Python context of a TAO solver (``-tao_type python -tao_python_type solvers.<name>``).

    A subclass defines :meth:`iterate`, and if it keeps more than vectors from one iteration to the
    next also :meth:`begin`, :meth:`kept` and :meth:`restore`: then its runs restart to the last bit.

    The objective must have been given with :meth:`ddml.objective.Objective.attach`. Options are
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
    moves_points : int
        Iterations between new collocation points by default; 0: they stay.
    measures_error : int
        Iterations between evaluations of the error by default.
    failure : int
        PETSc's reason where :meth:`iterate` cannot go on.
    whole_iterations : bool
        Whether a request to stop waits for the end of an iteration, which changes what :meth:`kept` gives meanwhile.
    notes : list of str
        What a user should know of the method as it has been set up.
    spares_memory : bool
        Whether it works in as little memory as it can, as the network is large; set by :meth:`setUp`.
    remembers : bool
        Whether :meth:`solve` begins with what the last one, of an objective that may have changed since, has
        learnt of curvature, instead of afresh.
    """

    options: ClassVar[Sequence[Option]] = ()
    local_defaults: ClassVar[Mapping[str, Any]] = {}
    work_vectors: ClassVar[Sequence[str]] = ()
    saved: ClassVar[Sequence[str]] = ()
    moves_points: ClassVar[int] = 0
    measures_error: ClassVar[int] = 1
    failure: int = PETSc.TAO.ConvergedReason.DIVERGED_LS_FAILURE

    def __init__(self) -> None:
        self.settings = SimpleNamespace(**{o.name: o.default for o in self.options})
        self.prefix = ""
        self.notes: list[str] = []
        self.objective: Objective
        self.vectors: dict[str, PETSc.Vec] = {}
        self.f, self.iteration, self._version = 0.0, 0, 0
        self._resume: dict[str, Any] | None = None
        self.remembers = self.whole_iterations = self.spares_memory = False

    def setFromOptions(self, tao: PETSc.TAO) -> None:
        """Read the options; of an objective on a subdomain with :attr:`local_defaults`. Collective."""
        self.prefix = tao.getOptionsPrefix() or ""
        inside = isinstance(tao.getAppCtx(), RestrictedObjective)
        self.settings = read(with_defaults(self.options, **self.local_defaults if inside else {}), self.prefix)

    def setUp(self, tao: PETSc.TAO) -> None:
        """Build what the solver needs. Collective."""
        self.objective = tao.getAppCtx()
        self.search = LineSearch(self.objective, self.prefix)
        # g: at the current point, which moves within an iteration; accepted_g and what is saved change at its end only
        shared = self.shared_vectors()
        names = [name for name in ("g", "accepted_g", *self.needed_vectors()) if name not in shared]
        self.vectors = {name: tao.getSolution().duplicate() for name in names}
        self.vectors |= {name: self.vectors[other] for name, other in shared.items()}

    def needed_vectors(self) -> Sequence[str]:
        """Names of the vectors that there are besides the gradient's (default: :attr:`work_vectors`)."""
        return self.work_vectors

    def shared_vectors(self) -> Mapping[str, str]:
        """Vectors, by name, that are no vectors of their own, and which they are."""
        return {}

    @property
    def needed(self) -> int:
        """Bytes of the dense matrices that :meth:`setUp` has made on this rank, and the solver will fill."""
        return 0

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
            result = self._iterate(x)
            if not result.success:
                tao.setConvergedReason(self.failure)
                return
            self.f = result.value
            self.g.copy(self.vectors["accepted_g"])
            self.iteration += 1
            going = self.report(tao, self.iteration, self.f, self.g.norm(), result.step)
        if tao.getConvergedReason() == PETSc.TAO.ConvergedReason.CONTINUE_ITERATING:
            tao.setConvergedReason(PETSc.TAO.ConvergedReason.DIVERGED_MAXITS)

    def _iterate(self, x: PETSc.Vec) -> SearchResult:
        if not self.whole_iterations:
            return self.iterate(x)
        stop, self.objective.stop = self.objective.stop, None
        try:
            return self.iterate(x)
        finally:
            self.objective.stop = stop

    @property
    def outdated(self) -> bool:
        """Whether the objective has changed since its value and gradient were computed at the current point."""
        return self._version != self.objective.version

    def _start(self, tao: PETSc.TAO) -> bool:
        """Begin at the initial point, or where :meth:`resume` says; True to go on."""
        x, accepted = tao.getSolution(), self.vectors["accepted_g"]
        self._version = self.objective.version
        if self._resume is None:
            self.iteration = 0
            if self.remembers:
                self.renew(x)
            else:
                self.f = self.objective.value_gradient(x, self.g)
                self.g.copy(accepted)
                self.begin()
            return self.report(tao, 0, self.f, self.g.norm(), 0.0)
        state, self._resume = self._resume, None
        self.iteration, self.f = state["iteration"], state["f"]
        if state["outdated"]:
            self._version = -1
        self._take(state)
        accepted.copy(self.g)
        tao.setIterationNumber(self.iteration)
        return tao.getMaximumIterations() > self.iteration

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

    def kept(self) -> dict[str, Any]:
        """What the next iteration needs besides :attr:`saved` and the parameters."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`kept` gave; the vectors have been. Collective."""
        return

    def _take(self, state: dict[str, Any]) -> None:
        for name, vec in state["vectors"].items():
            vec.copy(self.vectors[name])
            vec.destroy()
        self.restore(state)

    def memory(self) -> dict[str, Any]:
        """What a solve that :attr:`remembers` begins with; the vectors are this object's. Collective."""
        return {"vectors": {name: self.vectors[name] for name in self.saved}, **self.kept()}

    def recall(self, memory: dict[str, Any]) -> None:
        """Take over a :meth:`memory`, and its vectors, for the next solve. Collective."""
        self._take(memory)
        self.remembers = True

    def state(self) -> dict[str, Any]:
        """What the next iteration needs besides the parameters, as it was after the last complete one. Collective."""
        return {
            "iteration": self.iteration,
            "f": self.f,
            "outdated": self.outdated,
            "vectors": self.saved_vectors(),
            **self.kept(),
        }

    def saved_vectors(self) -> dict[str, PETSc.Vec]:
        """The vectors of :meth:`state`, this object's, which are read before the next iteration. Collective."""
        return {name: self.vectors[name] for name in ("accepted_g", *self.saved)}

    def resume(self, state: dict[str, Any]) -> None:
        """Make the next :meth:`solve` go on from :meth:`state` instead of starting anew.

        Raises
        ------
        InputError
            If the state is not one of this version of ddml.
        """
        if "outdated" not in state:
            raise InputError(
                "the solver's state in the run file is of an older ddml: another -solver begins afresh there"
            )
        self._resume = state

    def destroy(self, tao: PETSc.TAO) -> None:
        """Destroy what :meth:`setUp` made."""
        for vec in self.vectors.values():
            vec.destroy()
        self.vectors = {}
        if hasattr(self, "search"):
            self.search.destroy()

    def report(self, tao: PETSc.TAO, iteration: int, f: float, residual: float, step: float) -> bool:
        """Set the iteration number, call the monitors, test convergence; True to go on. Collective."""
        tao.setIterationNumber(iteration)
        tao.monitor(its=iteration, f=f, res=residual, cnorm=0.0, step=step)
        if tao.getConvergedReason() == PETSc.TAO.ConvergedReason.CONTINUE_ITERATING:
            tao.checkConverged()
        return bool(tao.getConvergedReason() == PETSc.TAO.ConvergedReason.CONTINUE_ITERATING)
