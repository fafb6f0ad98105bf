"""Who creates a thing destroys it: the last first, each once, and all of it where a set-up fails."""

from typing import Any

import numpy as np
import pytest
import torch
from mpi4py import MPI
from petsc4py import PETSc

from ddml.errors import InputError
from ddml.layout import ParameterLayout
from ddml.networks.tanh import TanhNetwork
from ddml.objectives.residual import ResidualObjective
from ddml.problems import Burgers, PDELoss
from solvers import SOLVERS, TrustRegion
from solvers.owner import Owner

MODEL, LOCAL = {"norm": "2"}, {"local_steps": 2, "coarse_step": True, "local_memory": "keep"}
SETTINGS = {
    "tr": MODEL,
    "apts_weights": MODEL,
    "apts_data": MODEL,
    "napts": MODEL,
    "aspqn": LOCAL,
    "mspqn": LOCAL,
    "gauss_newton": {"form": "primal", "preconditioner": "schwarz"},
}


class Thing:
    """Notes when it is destroyed."""

    def __init__(self, log: list["Thing"]) -> None:
        self.log = log

    def destroy(self) -> None:
        self.log.append(self)


def test_an_owner_destroys_the_last_first_and_each_once() -> None:
    owner, log = Owner(), list[Thing]()
    first, second, third = (owner.own(Thing(log)) for _ in range(3))
    owner.release(second)
    assert log == [second]
    owner.destroy()
    owner.destroy()
    assert log == [second, third, first]
    with pytest.raises(ArithmeticError), owner.building():
        last = owner.own(Thing(log))
        raise ArithmeticError
    assert log[3:] == [last]
    with owner.building():
        kept = owner.own(Thing(log))
    assert kept not in log


def burgers() -> PDELoss:
    network = TanhNetwork(2, 5, 4, 1, residual=True).double()
    network.reset_parameters(torch.Generator().manual_seed(0))
    return PDELoss(Burgers(), network, 30)


def made(comm: MPI.Comm, prefix: str, context: Any) -> tuple[PETSc.TAO, PETSc.Vec]:
    loss = burgers()
    objective = ResidualObjective(loss, ParameterLayout(loss.parameters, comm))
    x, tao = objective.layout.vector(), PETSc.TAO().create(comm)
    objective.initial(x)
    tao.setOptionsPrefix(prefix)
    tao.setType("python")
    tao.setPythonContext(context)
    objective.attach(tao)
    tao.setSolution(x)
    tao.setMaximumIterations(2)
    tao.setFromOptions()
    return tao, x


@pytest.fixture
def owned(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What owners have registered since."""
    things: list[Any] = []
    own = Owner.own

    def noted(self: Owner, thing: Any) -> Any:
        things.append(thing)
        return own(self, thing)

    monkeypatch.setattr(Owner, "own", noted)
    return things


def alive(things: list[Any]) -> list[Any]:
    return [thing for thing in things if isinstance(thing, PETSc.Object) and thing.handle != 0]


@pytest.mark.parametrize("name", SOLVERS)
def test_a_solver_leaves_nothing(comm: MPI.Comm, prefix: str, owned: list[Any], name: str) -> None:
    for key, value in SETTINGS.get(name, {}).items():
        PETSc.Options().setValue(prefix + key, value)
    context = SOLVERS[name]()
    tao, x = made(comm, prefix, context)
    tao.setUp()
    tao.solve()
    context.state()
    assert alive(owned)
    tao.destroy()
    x.destroy()
    assert not alive(owned)


@pytest.mark.parametrize("name", SOLVERS)
def test_a_set_up_that_fails_leaves_nothing(comm: MPI.Comm, prefix: str, owned: list[Any], name: str) -> None:
    for key, value in SETTINGS.get(name, {}).items():
        PETSc.Options().setValue(prefix + key, value)

    class Fails(SOLVERS[name]):  # type: ignore[misc,name-defined]
        def prepare(self, tao: PETSc.TAO) -> None:
            super().prepare(tao)
            assert alive(owned)
            raise ArithmeticError("no more")

    tao, x = made(comm, prefix, Fails())
    with pytest.raises(PETSc.Error):
        tao.setUp()
    assert not alive(owned)
    tao.destroy()
    x.destroy()


@pytest.mark.parametrize("name", ["aspqn", "apts_weights"])
def test_local_solvers_that_are_refused_leave_nothing(comm: MPI.Comm, prefix: str, owned: list[Any], name: str) -> None:
    """The first subdomains' are there when a later one fails, which stands for all."""
    settings = {"local_solver": "lbfgs", "sub_first_step": "neither", **({"norm": "2"} if name != "aspqn" else {})}
    for key, value in settings.items():
        PETSc.Options().setValue(prefix + key, value)
    tao, x = made(comm, prefix, SOLVERS[name]())
    with pytest.raises(PETSc.Error):
        tao.setUp()
    assert owned and not alive(owned)
    tao.destroy()
    x.destroy()


def test_a_refused_state_stays_the_callers(train: Any, copied: Any) -> None:
    """And the solver begins afresh behind it."""
    states: list[Any] = []
    train(burgers(), "tr", 3, norm="2", watch=lambda context, _: states.append(copied(context.state())))

    class Tried(TrustRegion):
        def prepare(self, tao: PETSc.TAO) -> None:
            super().prepare(tao)
            with pytest.raises(InputError, match="-norm goes on from it"):
                self.restore(states[-1])

    plain, tried = (train(burgers(), kind(), 3, norm="infinity") for kind in (TrustRegion, Tried))
    assert np.array_equal(plain.theta, tried.theta)
    assert all(vec.handle for vec in states[-1]["vectors"].values())


BASE = {"iteration", "f", "outdated", "vectors"}
PAIRS, DENSE = {"pair_pending", "pairs"}, {"fresh", "trial", "wear", "quotients", "form", "dtype", "matrix", "pending"}
RADIUS = {"radius", "model", "model_state", "norm", "norm_state"}
LEVELS = {"sizes", "levels", "cycle", "spent"}
CASCADE = LEVELS | {"phase", "entered", "phase_began", "stuck", "x", "g"}
KEYS = {
    "lbfgs": PAIRS,
    "aspqn": PAIRS | {"local"},
    "mspqn": PAIRS | {"local"},
    "mspqn_dense": PAIRS | {"local"},
    "ssbroyden": DENSE,
    "ssbfgs": DENSE,
    "tr": RADIUS,
    "astrom": RADIUS | {"sets"},
    "newton": set(),
    "apts_weights": RADIUS,
    "apts_data": RADIUS,
    "napts": RADIUS | {"coarse"},
    "gradient": {"step"},
    "adam": {"count", "behind", "lags"},
    "adagrad": set(),
    "asadagrad": {"local"},
    **dict.fromkeys(("rmtr", "mgopt"), CASCADE | {"growing"}),
    "cascade": CASCADE,
    "mladagrad": LEVELS | {"phase", "entered", "phase_began", "growing"},
    **dict.fromkeys(("mlvr", "ssn", "svrg", "sarah"), LEVELS | {"refusals"}),
    "gauss_newton": {"damping", "growth", "limit", "kind", "preconditioner"},
}


@pytest.mark.parametrize("name", SOLVERS)
def test_states_keep_their_keys(train: Any, name: str) -> None:
    """Run files of before go on."""
    found: list[dict[str, Any]] = []
    train(burgers(), name, 2, watch=lambda context, _: found.append(dict(context.state())), **SETTINGS.get(name, {}))
    assert found[-1].keys() == BASE | KEYS[name]
    for local in found[-1].get("local", ()):
        assert local.keys() == {"solver", "size", "memory"}
        inner = {"LBFGS": PAIRS, "SSBroyden": DENSE, "AdaGrad": set()}[local["solver"]]
        assert local["memory"].keys() == {"vectors"} | inner
    assert set(found[-1]["vectors"]) == {"accepted_g", *SOLVERS[name].saved}
