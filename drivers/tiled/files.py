"""Where a run of phases reads and writes: its run file, and the folder of those of its networks."""

from __future__ import annotations

from common import training  # noqa: F401  # first: it initialises PETSc

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from mpi4py import MPI

from ddml.errors import InputError
from ddml.parallel import agreed_file
from ddml.runs import run_file
from ddml.runs.checkpoints import check_new

from .folds import PATTERN, Job

COHERENT = "coherent"  # the name of its run file


@dataclass(frozen=True)
class Files:
    """Where a run reads and writes.

    Attributes
    ----------
    output, source : str or None
        The run file, and the one that it goes on from.
    overwrite : bool
        Whether what is there already may be replaced.
    networks : int
        How many there are.
    """

    output: str | None
    source: str | None
    overwrite: bool
    networks: int

    @property
    def folder(self) -> str | None:
        """That of the run files of local networks."""
        return None if self.output is None else f"{self.output}.nets"

    @property
    def before(self) -> str | None:
        """That of those which the local networks go on from."""
        return None if self.source is None else f"{self.source}.nets"

    @property
    def fresh(self) -> bool:
        """Whether nothing in the folder is of this run."""
        return self.source is None or Path(self.output or "").resolve() != Path(self.source).resolve()

    def _there(self) -> list[str]:
        if self.folder is None:
            return []
        folder = Path(self.folder)
        found = [*(folder / Job(tile).file for tile in range(self.networks)), folder / f"{COHERENT}.h5"]
        return [str(path) for path in [*found, *sorted(folder.glob(PATTERN))] if path.is_file()]

    def of(self, name: str) -> tuple[str | None, str | None]:
        """The run file of something else that is trained, and the one that it goes on from, if there is one."""
        before = None if self.before is None else f"{self.before}/{name}.h5"
        return (
            None if self.folder is None else f"{self.folder}/{name}.h5",
            before if before is not None and Path(before).is_file() else None,
        )

    def check(self, comm: MPI.Comm) -> None:
        """Refuse what is in the way, or cannot be written. Collective.

        Raises
        ------
        InputError
            If it is, or cannot.
        """
        if self.output is None:
            return
        if not self.overwrite:
            check_new(self.output, self.source, comm)
            left = comm.bcast(self._there() if comm.rank == 0 and self.fresh else [])
            if left:
                raise InputError(f"{left[0]} exists, of another run: replace it with -overwrite, or remove its folder")
        run_file.check_writable(self.output, comm)

    def check_all(self, comm: MPI.Comm) -> None:
        """Refuse to train any further where the run files of local networks have gone. Collective.

        Raises
        ------
        InputError
            If one has.
        """
        paths = [f"{self.before}/{Job(tile).file}" for tile in range(self.networks)]
        gone = comm.bcast([path for path in paths if not Path(path).is_file()] if comm.rank == 0 else [])
        if gone:
            raise InputError(
                f"there is no {gone[0]} any more: local networks that have come to their end go on with other options "
                "from their own run files only"
            )

    def prepare(self, comm: MPI.Comm, anew: bool, outdated: int | None) -> None:
        """Make the folder, and empty it of what another run has left; of a coherent net that is anew. Collective.

        Parameters
        ----------
        anew
            Whether it is.
        outdated
            Folds whose networks go on with those of tiles, as options are others now; those of other numbers of folds,
            which do not, go. None: nothing is other.
        """
        if self.folder is None:
            return
        with agreed_file(comm, f"cannot write {self.folder}", "give -output a file in a folder that is yours to write"):
            if comm.rank == 0:
                os.makedirs(self.folder, exist_ok=True)
                for path in self._there():
                    left = outdated is not None and Path(path).match(PATTERN) and not path.endswith(f"of{outdated}.h5")
                    if self.fresh or left or (anew and path.endswith(f"/{COHERENT}.h5")):
                        os.unlink(path)
        with suppress(OSError):
            os.listdir(self.folder)  # of a file system that remembers what was not there
