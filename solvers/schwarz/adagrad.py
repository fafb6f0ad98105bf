"""AdaGrad with additive Schwarz corrections."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

from petsc4py import PETSc

from ddml.decomposition.options import DECOMPOSITION
from ddml.errors import InputError
from ddml.options import Option, preset
from ddml.states import vectors_in
from solvers.owner import Owner
from solvers.trust_region.adagrad import AdaGrad

from .schwarz import Schwarz


class SchwarzAdaGrad(AdaGrad):
    r"""AdaGrad whose steps begin with local ones on all subdomains at once (after arXiv 2507.11513).

    Each subdomain takes some steps of AdaGrad from :math:`\theta_k`, whose sums of squares are its own and are kept;
    the sum of the corrections is cut, entry by entry, to as many times the bound of the whole network's step as there
    were local steps, and a step of the whole network follows. No loss decides anything. The paper has more than one
    form, of which an abstract and a talk were at hand: this one is our reading.
    """

    subdomains_of = "parameters"
    paced = False  # the local solvers have the rate, too
    options: ClassVar[Sequence[Option]] = (
        *AdaGrad.options,
        *DECOMPOSITION,
        Option("local_steps", 3, "Steps on each subdomain; 0 is AdaGrad.", minimum=0),
    )

    def prepare(self, tao: PETSc.TAO) -> None:
        """Build the decomposition and the local solvers. Collective."""
        super().prepare(tao)
        settings = self.settings
        self.whole_iterations = True
        self.subdomains = self.decompose(self.objective.loss, self.prefix)
        if len(self.subdomains) == 1:
            self.notes.append("there is one subdomain: local steps are of the undivided network")
        self.local: Schwarz | None = None
        self.written = self.own(Owner())
        if settings.local_steps == 0:
            return
        steps = [settings.local_steps] * len(self.subdomains)
        own = {f"{self.prefix}sub_rate": settings.rate, f"{self.prefix}sub_sigma": settings.sigma}
        with preset(**own):
            self.local = self.own(
                Schwarz(self.objective, self.subdomains, True, f"{self.prefix}sub_", steps, "adagrad", True)
            )
        self.correction, self.limit = (self.own(tao.getSolution().duplicate()) for _ in range(2))

    @property
    def inner_types(self) -> frozenset[str]:
        """See :attr:`solvers.base.Solver.inner_types`."""
        return self.local.types if self.local is not None else frozenset()

    def advance(self, x: PETSc.Vec) -> float:
        """See :meth:`.AdaGrad.advance`."""
        if self.local is not None:
            self.bounds(self.g, self.limit)
            self.limit.scale(float(self.settings.local_steps))
            self.local.additive(x, self.f, self.g, self.correction)
            _cut(self.correction, self.limit)
            x.axpy(1.0, self.correction)
            value = self.objective.value_gradient(x, self.g)
            if not (math.isfinite(value) and math.isfinite(self.g.norm())):
                return math.inf
        return super().advance(x)

    def inner_state(self) -> dict[str, Any]:
        """See :meth:`solvers.base.Solver.inner_state`: what the local solvers keep."""
        self.written.destroy()
        if self.local is None:
            return {}
        states = self.local.state(self.g)
        for vec in vectors_in(states, "local", self.g).values():
            self.written.own(vec)
        return {"local": states}

    def take_state(self, state: dict[str, Any]) -> None:
        """See :meth:`solvers.base.Solver.take_state`.

        Raises
        ------
        InputError
            If it is that of other subdomains.
        """
        kinds = self.local.kinds() if self.local is not None else []
        if [(item["solver"], item["size"]) for item in state.get("local", [])] != kinds:
            raise InputError("the run file is of other subdomains: the same -decomposition goes on from it")
        if self.local is not None:
            self.local.restore(state["local"])


def _cut(s: PETSc.Vec, limit: PETSc.Vec) -> None:
    """Cut the entries of s to at most ``limit`` in size."""
    s.pointwiseMin(s, limit)
    limit.scale(-1.0)
    s.pointwiseMax(s, limit)
