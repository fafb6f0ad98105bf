"""The local phase: all local networks are trained, each on ranks of its own, and none waits for another."""

from __future__ import annotations

from common import training  # noqa: F401  # first: it initialises PETSc

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from mpi4py import MPI

from common.start import Start
from ddml.errors import CollectiveError, InputError, NonFiniteError
from ddml.parallel import Interrupted, agreed
from ddml.runs.progress import say

from .nets import LocalNet, Nets, Outcome, check_file, tile_of
from .queues import Queues
from .relay import Relay

NAMED = 3  # networks that failed and are named (our choice)


class LocalPhase:
    """Trains the local networks in queues; collective on ``comm`` at its beginning and its end, and not between.

    Parameters
    ----------
    nets
        The networks.
    comm
        All ranks.
    start
        Of the run.
    queues
        Who trains which of the jobs of the networks, in what order.

    Raises
    ------
    InputError
        On all ranks: tiles that cannot be read, or with numbers that are not finite; a solver that refuses its options
        or a network; run files of networks that are damaged, or of others.

    Attributes
    ----------
    group : Intracomm
        The ranks that train what this one does; none waits for others.
    tiles : dict of int to DataSet
        Those of the networks that this rank has not trained.
    first : LocalNet or None
        The network that this rank begins with: where it is made, the solver's options have been read.
    gained : bool
        Whether any network has been trained any further; once all is done, of all ranks.
    """

    def __init__(self, nets: Nets, comm: MPI.Comm, start: Start, queues: Queues) -> None:
        self.nets, self.comm, self.queues = nets, comm, queues
        number = queues.group(comm.rank)
        self.alone = len(queues.nets) == comm.size
        self.group = MPI.COMM_SELF if self.alone else comm.Split(number, comm.rank)
        self.queue = queues.nets[number]
        self.jobs = [nets.jobs[i] for i in self.queue]
        self.stop = Relay(start.stop, comm)
        self.start = replace(start, stop=self.stop)
        self.first: LocalNet | None = None
        self.gained = False
        with agreed(comm):
            # all of them before anything is changed
            self.tiles = {tile: tile_of(nets.source, nets.tiles, tile) for tile in {job.tile for job in self.jobs}}
            self.first = self._net(0)
            common = self.first.attributes()
            common.pop("fold", None)
            for job in self.jobs:
                path = nets.earlier(job)
                if path is not None:
                    check_file(path, common | nets.named(job), self.group)

    def destroy(self) -> None:
        """Free the groups and what the first network has. Collective."""
        if self.first is not None:
            self.first.destroy()
        if not self.alone:
            self.group.Free()

    def _net(self, place: int) -> LocalNet:
        """That of a place in the queue; a tile that no later one needs is given back."""
        job, later = self.jobs[place], self.jobs[place + 1 :]
        dataset = self.tiles[job.tile]
        if all(other.tile != job.tile for other in later):
            del self.tiles[job.tile]
        return LocalNet(self.nets, job, dataset, self.group, self.start)

    def train(self, done: Callable[[Outcome], Any] = lambda outcome: None) -> tuple[list[Outcome], dict[int, str]]:
        """Train this rank's networks: those that have come to their end, and what others failed of, by job.

        Nothing is collective but on ``group``; a network that fails is no reason to leave out the next one.
        """
        outcomes, failures = list[Outcome](), dict[int, str]()
        for place, (number, job) in enumerate(zip(self.queue, self.jobs, strict=True)):
            net, self.first = self.first, None
            try:
                self.stop.check(self.group)
                net = net or self._net(place)
                outcome = net.train()
                if outcome is None:
                    break
                outcomes.append(outcome)
                done(outcome)
            except Interrupted:
                break
            except (InputError, NonFiniteError) as error:
                failures[number] = f"{job}: {error}"
            finally:
                if net is not None:
                    self.gained |= net.gained
                    net.destroy()
        return outcomes, failures

    def execute(self) -> list[Outcome] | None:
        """Train all networks; None where a signal has stopped some. Collective on all ranks at its end.

        They are in the order of the jobs.

        Raises
        ------
        CollectiveError
            On all ranks, once all are done: networks that could not be trained. The run files of the others are whole.
        """
        mine: tuple[list[Outcome], dict[int, str]] = [], {}
        with agreed(self.comm):
            mine = self.train(self._show)
        stopped = self.stop.end()
        self.gained = self.comm.allreduce(self.gained, MPI.LOR)
        found = self.comm.allgather(mine if self.group.rank == 0 else ([], {}))
        failures = {number: text for _, here in found for number, text in here.items()}
        if failures:
            named = "; ".join(failures[number] for number in sorted(failures)[:NAMED])
            more = f" (and {len(failures) - NAMED} others)" if len(failures) > NAMED else ""
            kept = "" if self.nets.folder is None else f"; the others are in {self.nets.folder}"
            raise CollectiveError(f"{named}{more}{kept}")
        outcomes = {outcome.job: outcome for here, _ in found for outcome in here}
        return None if stopped and len(outcomes) < len(self.nets.jobs) else [outcomes[job] for job in self.nets.jobs]

    def _show(self, outcome: Outcome) -> None:
        """A line for a network that is trained."""
        if self.group.rank == 0:
            say(outcome.line())
