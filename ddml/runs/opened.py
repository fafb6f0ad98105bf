"""A run file that is opened to be looked at: its history, its options, and the network that was trained."""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike, fspath
from typing import TYPE_CHECKING, Any

import numpy as np
from mpi4py import MPI
from numpy.typing import NDArray
from petsc4py import PETSc
from torch import Tensor

from ddml.decomposition.tiles import numbers, placed
from ddml.errors import InputError
from ddml.layout import ParameterLayout
from ddml.parameters import parameter_table
from ddml.problems.classification import Classifier
from ddml.problems.pde.loss import PDELoss
from ddml.problems.pde.solution import Solution
from ddml.vectors import owned

from . import divided, machines, rebuilt, run_file
from .extras import extra
from .history import MEASURES, UNITS, History

if TYPE_CHECKING:
    import pandas
    import xarray


@dataclass(frozen=True, eq=False, repr=False)
class OpenedRun:
    """What a run file holds, whatever number of ranks has written it; made by :func:`open_run`.

    Attributes
    ----------
    path : str
        The file.
    attributes : dict of str to str, int, float or bool
        Of the file: problem, network, solver, seed, versions, options.
    history : History
        ``history["loss"]`` is a numpy array with one entry an iteration. What was measured at the end of the run only
        is in the last row, too.
    theta : Tensor
        The parameters (n,), float64.
    """

    path: str
    header: run_file.Header
    history: History
    theta: Tensor

    def __repr__(self) -> str:
        of = (self.attributes.get(name, "unknown") for name in ("driver", "problem", "network", "solver"))
        return f"OpenedRun({self.path}: {', '.join(map(str, of))}; {len(self.history)} rows)"

    @property
    def attributes(self) -> dict[str, str | int | float | bool]:
        """Those of the file."""
        return self.header.attributes

    @property
    def options(self) -> dict[str, str]:
        """The options that were in force, as texts, by name."""
        return rebuilt.options(self.attributes)

    def loss(self, *, trust: bool = False, problem: str | None = None, network: str | None = None) -> PDELoss:
        """The loss of a run of drivers/pinn.py, on few points; parameters as for :meth:`network`.

        Raises
        ------
        InputError
            See :meth:`network`; a run of another driver.
        """
        return rebuilt.pde_loss(self.path, self.header, rebuilt.Anew(trust, problem, network))

    def network(
        self,
        *,
        trust: bool = False,
        problem: str | None = None,
        network: str | None = None,
        data: str | None = None,
        fusion: str | None = None,
    ) -> Solution | Classifier:
        """What was trained, as a torch module: of points to fields, or of stored samples to outputs for the classes.

        Python files that the run file names are run only where they are given anew, or trusted.

        The classifier of a run with -tiles takes whole samples; its ``network.nets`` are those of the tiles, each a
        classifier of its tile.

        Parameters
        ----------
        trust
            Whether to run the Python files that the run file names.
        problem, network, data
            As the options of those names, given anew: the same classes, wherever their files are now.
        fusion
            Of a run with -tiles: ``coherent``, all networks as that phase has left them; or what the phases before it
            have come to, with a ``coarse`` net, by ``average`` or by ``majority``. By default it is the first, where
            there is one, or what the run's -fusion says.

        Raises
        ------
        InputError
            Python files that are named by the run file only; what differs from it; what cannot be built; a fusion that
            the run does not have.
        """
        anew = rebuilt.Anew(trust, problem, network, data)
        if divided.of_tiles(self.path, self.header):
            state = self._state_of_tiles()
            description = divided.described(self.path, self.header, state, fusion)
            theta = divided.parameters(self.path, state, self.theta, description.fusion)
            return divided.classifier(self.path, self.header, theta, anew, description)
        if self.attributes.get("driver") == machines.DRIVER:

            def trained(path: str) -> Solution | Classifier:
                return open_run(path).network(trust=trust, data=data)

            return machines.classifier(self.path, self.header, self.theta, anew, trained)
        if fusion is not None:
            raise InputError(f"{self.path} is of no classifier of tiles: there is no fusion in it")
        return rebuilt.network(self.path, self.header, self.theta, anew)

    def data(self, *, trust: bool = False, data: str | None = None) -> str:
        """The data set of a run of drivers/classify.py, for :func:`ddml.data.files.load`.

        Raises
        ------
        InputError
            A file that is named by the run file only; another data set.
        """
        return rebuilt.dataset_name(self.path, self.header, rebuilt.Anew(trust, data=data))

    def local_accuracies(self, split: str = "test") -> NDArray[np.float64]:
        """How often each network of a run with -tiles is right, where its tile is: (H, W) tiles, of volumes (D, H, W).

        Parameters
        ----------
        split
            Of which samples: ``test``, ``train`` or, where there are some, ``held_out``.

        Raises
        ------
        InputError
            A run of an undivided network, or one whose local phase is not finished; a split that there is not.
        """
        parts, state = self.options.get("tiles", "None"), self._state_of_tiles()
        try:
            return placed([float(net["accuracies"][split]) for net in state["nets"]], numbers(parts, "option -tiles"))
        except (LookupError, TypeError, ValueError) as error:
            raise InputError(
                f"{self.path} has no accuracies of all {parts} local networks for {split} samples: its local phase has "
                "not come to its end, or those are not there"
            ) from error

    def histories(self) -> dict[str, History]:
        """Those of all networks of a run with -tiles, and the losses of its coarse net: by name, as in its parameters.

        That of the coherent phase is in a run file of its own, ``run.h5.nets/coherent.h5``.

        Raises
        ------
        InputError
            A run of an undivided network.
        """
        return divided.histories(self.path, self._state_of_tiles())

    def _state_of_tiles(self) -> dict[str, Any]:
        if not divided.of_tiles(self.path, self.header):
            raise InputError(f"{self.path} is of no classifier of tiles")
        x = _vector(self.header)
        try:
            return run_file.read(self.path, x)[0]
        finally:
            x.destroy()

    def xarray(self) -> xarray.Dataset:
        """The history as a data set over ``iteration``, the options as its attributes.

        Raises
        ------
        InputError
            Without the package xarray.
        """
        columns = {
            name: ("iteration", self.history[name], {"units": UNITS[name]} if name in UNITS else {})
            for name in self.history.used()
            if name != "iteration"
        }
        made = extra("a history as xarray", "xarray")
        dataset: xarray.Dataset = made.Dataset(columns, {"iteration": self.history["iteration"]}, dict(self.attributes))
        return dataset

    def pandas(self) -> pandas.DataFrame:
        """The history as a table with one row an iteration.

        Raises
        ------
        InputError
            Without the package pandas.
        """
        columns = {name: self.history[name] for name in self.history.used() if name != "iteration"}
        made = extra("a history as pandas", "pandas")
        table: pandas.DataFrame = made.DataFrame(columns, made.Index(self.history["iteration"], name="iteration"))
        return table


def _vector(header: run_file.Header) -> PETSc.Vec:
    """A vector for the parameters of a run file, on this process."""
    return ParameterLayout(parameter_table([(p.name, p.shape) for p in header.parameters]), MPI.COMM_SELF).vector()


def open_run(path: str | PathLike[str]) -> OpenedRun:
    """Open a run file on this process alone; nothing is collective, and any number of ranks may have written it.

    Raises
    ------
    RunFileError
        When the file is missing, foreign, of a newer format or damaged, or holds values that no run has.
    """
    path = fspath(path)
    header = run_file.inspect(path, MPI.COMM_SELF)
    x = _vector(header)
    try:
        _, history = run_file.read(path, x, with_state=False)
        run_file.check_values(path, x, history)
        for name, value in header.attributes.items():
            column = name.removeprefix(run_file.MEASURED)
            if column in MEASURES and column != name and isinstance(value, float):
                history.complete(**{column: value})
        return OpenedRun(path, header, history, owned(x).clone())
    finally:
        x.destroy()
