"""classify.py -tiles: local networks are the same on any number of ranks and in any order, and nobody waits."""

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from calling import call, refusal
from common.device import bind
from launch import kill, launch, start, started, warm
from mpi4py import MPI
from one_rank import on_one_rank
from own_data import USER as SOLIDS
from tiled import options
from tiled.folds import Folds
from tiled.local import LocalPhase
from tiled.nets import Nets
from tiled.queues import Queues
from tiled.relay import Relay
from tiled_runs import DIGITS, SIXTEEN, USER, assert_same, begun, content, train

from ddml.data import files
from ddml.decomposition.tiles import Tiles
from ddml.parallel import StopRequest

TREES = {
    "adam": (),
    "adam, cosine": ("-rate_schedule", "cosine", "-batch_size", 50),
    "tr": ("-local_solver", "tr"),
    "lbfgs, blocks": ("-local_solver", "lbfgs", "-summation_blocks", 4),
}


@pytest.fixture(scope="module")
def user(module_tmp: Path) -> Path:
    """A user's Python file."""
    if MPI.COMM_WORLD.rank == 0:
        (module_tmp / "mine.py").write_text(USER)
    MPI.COMM_WORLD.barrier()
    return module_tmp / "mine.py"


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("solver", "tiles"), [*((name, "2x2") for name in TREES), ("adam, cosine", "1x1"), ("lbfgs, blocks", "1x2")]
)
def test_networks_are_the_same_on_any_number_of_ranks_and_through_a_restart(
    solver: str, tiles: str, comm: MPI.Comm, shared_tmp: Path
) -> None:
    words = (*DIGITS, "-tiles", tiles, *TREES[solver], "-rate_iterations" if "cosine" in solver else "-seed", 9)
    alone, together = shared_tmp / "alone.h5", shared_tmp / "together.h5"
    on_one_rank(lambda one: train(alone, one, 9, *words))
    train(together, comm, 4, *words)
    train(together, comm, 9)
    assert_same(alone, together)
    found = content(together)
    for net in found.state["nets"].values():
        assert list(net["history"]["iteration"]) == list(range(10))
        assert net["history"]["loss"][-1] < net["history"]["loss"][0] or solver.startswith("adam")
    comm.barrier()


@pytest.mark.ranks
def test_volumes_and_padded_tiles(comm: MPI.Comm, shared_tmp: Path) -> None:
    if comm.rank == 0:
        (shared_tmp / "data.py").write_text(SOLIDS)
    comm.barrier()
    words = ("-data", f"{shared_tmp}/data.py:solids", "-tiles", "2x1x2", "-tile_overlap", "1x0x2", "-tiles_padded",
             "-network", "resnet", "-width", 4, "-depth", 1, "-local_width", 3)  # fmt: skip
    alone, together = shared_tmp / "alone.h5", shared_tmp / "together.h5"
    on_one_rank(lambda one: train(alone, one, 30, *words))
    train(together, comm, 30, *words)
    assert_same(alone, together)
    found = content(together)
    assert found.state["logits"]["test"].shape == (4, 20, 3)
    assert found.history["accuracy"][-1] > 0.5


def test_one_tile_is_the_undivided_network(comm: MPI.Comm, shared_tmp: Path) -> None:
    whole, undivided = shared_tmp / "whole.h5", shared_tmp / "undivided.h5"
    train(whole, comm, 12, *DIGITS, "-tiles", 1, "-tile_overlap", 0, "-phase", "local")
    train(undivided, comm, 12, *DIGITS[4:], "-solver", "adam", "-batch_size", 32, "-batch_steps", 1,
          "-summation_blocks", 1)  # fmt: skip
    one, other = content(whole), content(undivided)
    assert one.theta.tobytes() == other.theta.tobytes()
    assert one.state["nets"]["0"]["history"]["loss"].tobytes() == other.history["loss"].tobytes()
    comm.barrier()


class Counting(MPI.Intracomm):
    """A communicator that counts collective calls."""

    calls = 0


def counted(call: Any) -> Any:
    """A method that is counted."""

    def method(self: Any, *arguments: Any, **named: Any) -> Any:
        Counting.calls += 1
        return call(self, *arguments, **named)

    return method


COLLECTIVE = """allgather allreduce bcast gather reduce scatter alltoall barrier Allgather Allgatherv Allreduce Alltoall
                Alltoallv Barrier Bcast Gather Gatherv Iallreduce Ibarrier Reduce Reduce_scatter Scan Scatter Split
                Split_type Dup Create"""
for name in COLLECTIVE.split():
    setattr(Counting, name, counted(getattr(MPI.Intracomm, name)))


@pytest.mark.ranks
@pytest.mark.parametrize("order", ["dearest first", "reversed", "by number", "folds"])
def test_nobody_waits_for_others_and_the_order_does_not_matter(order: str, comm: MPI.Comm, shared_tmp: Path) -> None:
    words = (*DIGITS, "-tiles", "2x3", "-local_width", 2, "-phase", "local")
    with begun(comm, *words, "-max_it", 6) as (settings, limits, begin):
        options.check(settings, "tr")
        settings.samples = 120
        source = files.source("digits", comm, 120)
        options.batches(settings, source.count)
        tiles = Tiles(source.shape, (2, 3), 1)
        nets = Nets.built(settings, limits, source, tiles, bind(comm, "cpu"))
        if order == "folds":
            nets = replace(nets, folds=Folds.drawn(2, source.labels, source.classes, 0))
        queues = Queues.of(nets.job_costs, comm.size)
        if order == "reversed":
            queues = Queues(tuple(queue[::-1] for queue in queues.nets[::-1]), queues.edges)
        if order == "by number":
            queues = Queues(tuple(tuple(range(i, 6, comm.size)) for i in range(comm.size)), queues.edges)
        world = Counting(comm)
        phase = LocalPhase(nets, world, begin, queues)
        Counting.calls = 0
        outcomes, failures = phase.train()
        assert Counting.calls == 0 and not failures
        assert [outcome.job for outcome in outcomes] == [nets.jobs[number] for number in phase.queue]
        assert not phase.tiles
        everything = {o.tile: o.theta.tobytes() for here in comm.allgather(outcomes) for o in here if not o.job.fold}
        phase.destroy()
        path = shared_tmp / "run.h5"
        train(path, comm, 6, *words)
        assert b"".join(everything[tile] for tile in range(6)) == content(path).theta.tobytes()
        comm.barrier()


@pytest.mark.parametrize("costs", [[5, 4, 3, 3, 3], [1], [2, 2, 2, 2], [7, 1, 1, 1, 1, 1, 1], list(range(16))])
@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 20])
def test_queues_are_balanced(costs: list[float], ranks: int) -> None:
    queues = Queues.of(costs, ranks)
    assert sorted(net for queue in queues.nets for net in queue) == list(range(len(costs)))
    assert all(queues.nets) and len(queues.nets) == min(ranks, len(costs))
    assert all([costs[n] for n in q] == sorted((costs[n] for n in q), reverse=True) for q in queues.nets)
    members = [queues.group(rank) for rank in range(ranks)]
    sizes = [members.count(group) for group in range(len(queues.nets))]
    assert members == sorted(members) and max(sizes) - min(sizes) <= 1
    if ranks <= len(costs):
        best = max(max(costs), sum(costs) / ranks)
        assert queues.critical(costs) <= 4 / 3 * best + max(costs) / 3
    assert queues.critical([0.0] * len(costs)) == 0


@started
def test_a_kill_in_the_middle_of_a_network_is_no_loss(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole.h5", tmp_path / "killed.h5"
    words = (*SIXTEEN, "-max_it", 40, "-checkpoint_interval", 15, "-phase", "local")
    train(whole, MPI.COMM_SELF, 40, *SIXTEEN)
    folder = tmp_path / "killed.h5.nets"
    warm()
    process = start(1, *words, "-output", killed, driver="classify.py", fresh=False)
    while len(list(folder.glob("*.h5"))) < 7:
        assert process.poll() is None, process.communicate()
    kill(process)
    process.communicate()
    left = sorted(folder.glob("??.h5"))
    assert 7 <= len(left) < 16
    result = launch(2, "-restart", killed, "-checkpoint_interval", 0, driver="classify.py", fresh=False)
    assert result.rc == 0, result.err
    assert result.out.count("tile ") >= 16
    assert_same(whole, killed)


@pytest.mark.parametrize("folds", [(), ("-coarse_data", "folds", "-folds", 2)], ids=["", "in a fold"])
def test_a_signal_stops_the_queue_and_a_restart_goes_on(
    folds: tuple[object, ...], user: Path, comm: MPI.Comm, shared_tmp: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = (*DIGITS[:4], "-samples", 120, "-network", f"{user}:Net", "-width", 8, "-max_it", 30, "-phase", "local",
             *folds)  # fmt: skip
    whole, parts = shared_tmp / "whole.h5", shared_tmp / "parts.h5"
    train(whole, comm, 30, *words)
    if comm.rank == 0:  # of 50 calls of each of 12 networks, or 4
        (user.parent / f"stop_{os.getpid()}").write_text(str(480 // comm.size if folds else 40))
    comm.barrier()
    assert call("classify", *words, "-output", parts, "-interrupted_code", 40) == 40
    assert not list(user.parent.glob("stop*"))
    assert any(shared_tmp.glob("parts.h5.nets/*of2.h5")) == bool(folds)
    said = capfd.readouterr().out
    assert (
        comm.rank
        or f"stopped: a signal asked to stop in the local phase; to go on: the same driver with -restart {parts}"
        in said
    )
    assert content(parts).state["phases"] == b""
    train(parts, comm, 30, "-network", f"{user}:Net")
    assert_same(whole, parts)
    comm.barrier()


def test_a_request_to_stop_reaches_all_ranks_without_a_collective_call(comm: MPI.Comm) -> None:
    own = StopRequest()
    relay = Relay(own, Counting(comm))
    Counting.calls = 0
    assert not relay.requested and not relay.due
    comm.barrier()
    own.requested = comm.rank == comm.size - 1
    if own.requested:
        assert relay.requested
    comm.barrier()
    while not relay.requested:
        pass
    with relay.deferred():
        assert not relay.due
    assert relay.due and Counting.calls == 0
    assert relay.end()
    assert not Relay(StopRequest(), comm).end()


def test_a_network_that_fails_is_named_and_the_others_stay(
    user: Path, comm: MPI.Comm, shared_tmp: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = (*DIGITS[:2], "-samples", 120, "-network", f"{user}:Net", "-width", 8, "-tile_overlap", "2x1")
    whole, parts = shared_tmp / "whole.h5", shared_tmp / "parts.h5"
    train(whole, comm, 60, *words, "-tiles", "1x3")
    if comm.rank == 0:
        (user.parent / "poison").write_text("(1, 8, 5)")  # the second of three
    comm.barrier()
    line = refusal("classify", *words, "-tiles", "1x3", "-max_it", 60, "-output", parts, "-phase", "local")
    assert line.startswith("tile 1: the loss is not finite") and line.endswith(f"; the others are in {parts}.nets")
    assert comm.rank or "Traceback" not in "".join(capfd.readouterr())
    comm.barrier()
    if comm.rank == 0:
        (user.parent / "poison").unlink()
    comm.barrier()
    train(parts, comm, 60, "-network", f"{user}:Net")
    assert_same(whole, parts)


@pytest.mark.parametrize("limit", [("-max_it", 7, 11), ("-max_work", 1.9, 3.1), ("-target_accuracy", 0.15, 2)])
def test_each_network_has_limits_of_its_own_and_goes_on_from_where_they_were(
    limit: tuple[str, float, float], comm: MPI.Comm, shared_tmp: Path
) -> None:
    name, first, second = limit
    whole, parts = shared_tmp / "whole.h5", shared_tmp / "parts.h5"
    words = (*DIGITS, "-phase", "local", "-error_interval", 1, *(() if name == "-max_it" else ("-max_it", 14)))
    assert call("classify", *words, name, first, "-output", parts) == 0
    reached = content(parts)
    lengths = {len(net["history"]["loss"]) for net in reached.state["nets"].values()}
    assert lengths == {8} or name != "-max_it"
    before = content(parts)
    assert call("classify", "-restart", parts) == 0  # nothing is left to do
    comm.barrier()
    assert content(parts).theta.tobytes() == before.theta.tobytes()
    comm.barrier()
    assert call("classify", "-restart", parts, name, second) == 0
    comm.barrier()
    if name == "-max_it":
        assert call("classify", *words, name, second, "-output", whole) == 0
        comm.barrier()
        assert_same(whole, parts)
    else:
        assert content(parts).history["work"][-1] > before.history["work"][-1]
    comm.barrier()


def test_the_run_file_says_what_every_network_and_every_fusion_has_come_to(
    comm: MPI.Comm, shared_tmp: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = shared_tmp / "run.h5"
    train(path, comm, 200, *DIGITS, "-batch_size", 40, "-rate", 1e-2, "-phase", "local", "-fusion", "majority")
    out, found = capfd.readouterr().out, content(path)
    dataset = files.digits()
    for split, labels in (("train", dataset.labels[:120]), ("test", dataset.test_labels)):
        logits = found.state["logits"][split]
        assert np.array_equal(found.state["labels"][split], labels)
        local = [float((one.argmax(axis=1) == labels).mean()) for one in logits]
        assert [net["accuracies"][split] for net in found.state["nets"].values()] == local
        chances = np.exp(logits.astype(float)) / np.exp(logits.astype(float)).sum(axis=2, keepdims=True)
        average = float((chances.mean(axis=0).argmax(axis=1) == labels).mean())
        votes = (logits.argmax(axis=2)[:, :, None] == np.arange(10)).sum(axis=0) + 1e-6 * chances.mean(axis=0)
        majority = float((votes.argmax(axis=1) == labels).mean())
        if split == "test":
            assert found.history["accuracy"][-1] == majority
            assert average > max(local) > 0.3
            if comm.rank == 0:
                assert f"{average:.4f}\n" in out.split("\naverage")[1][:30]
                assert f"{majority:.4f}\n" in out.split("\nmajority")[1][:30]
    spent = [net["history"]["work"][-1] for net in found.state["nets"].values()]
    assert found.history["work"][-1] == pytest.approx(np.mean(spent))  # tiles of one shape
    assert list(found.history["iteration"]) == [0, 1]
    assert comm.rank or "2x2 tiles of 1x8x8, overlap 1x1: 1x5x5" in out
    assert len(list((shared_tmp / "run.h5.nets").glob("*.h5"))) == 4
    theta, end = torch.as_tensor(found.theta), 0
    for i in range(4):
        names = [name for name in found.names if name.startswith(f"nets.{i}.")]
        assert names
        end += len(names)
    assert end == len(found.names) and theta.isfinite().all()
    comm.barrier()


def test_a_copy_is_written_where_another_output_is_given(comm: MPI.Comm, shared_tmp: Path) -> None:
    first, second, third = (shared_tmp / f"{name}.h5" for name in ("first", "second", "third"))
    train(first, comm, 5, *DIGITS)
    kept = content(first).theta.tobytes()
    comm.barrier()
    assert call("classify", "-restart", first, "-output", second, "-max_it", 9) == 0
    comm.barrier()
    assert content(first).theta.tobytes() == kept
    train(third, comm, 9, *DIGITS)
    assert_same(second, third)
    comm.barrier()
    if comm.rank == 0:
        shutil.rmtree(f"{first}.nets")
    comm.barrier()
    assert call("classify", "-restart", first) == 0  # done, and that is in the file
    assert "go on with other options from their own run files only" in refusal(
        "classify", "-restart", first, "-max_it", 12
    )


@pytest.mark.parametrize("words", ["aspqn", "aspqn -local_solver ssbroyden", "mlvr", "mlvr -coarse_solver lbfgs"])
def test_undivided_networks_have_solvers_with_local_and_coarse_ones_as_ever(
    words: str, comm: MPI.Comm, shared_tmp: Path
) -> None:
    whole, parts = shared_tmp / "whole.h5", shared_tmp / "parts.h5"
    options = ("-solver", *words.split(), "-samples", 90, "-widths", 6, "-summation_blocks", 4, "-dtype", "float64")
    train(whole, comm, 3, *options)
    train(parts, comm, 2, *options)
    train(parts, comm, 3)
    one, other = content(whole), content(parts)
    assert one.theta.tobytes() == other.theta.tobytes()
    assert one.history["loss"].tobytes() == other.history["loss"].tobytes()
    comm.barrier()
