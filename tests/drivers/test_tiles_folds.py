"""classify.py -tiles -coarse_data folds: networks trained again without parts of the samples are asked for these."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from calling import call, refusal
from mpi4py import MPI
from one_rank import on_one_rank
from tiled import coarse, options
from tiled.folds import Folds
from tiled.outputs import Outputs
from tiled_runs import DIGITS, assert_same, begun, content, train

from ddml.data import files

REST = """
from pathlib import Path

import numpy as np

from ddml.data import files


def rest():
    d, left = files.digits(), np.load(Path(__file__).parent / "left.npy")
    x, y = d.inputs[:120], d.labels[:120]
    test = {"test_inputs": x[left], "test_labels": y[left]}
    return {"inputs": x[~left], "labels": y[~left], **test, "classes": d.classes}
"""

FOLDS = ("-coarse_data", "folds", "-folds")
# tiles, what trains their networks, folds, and what has been done before
BEFORE = {
    "all samples": ("1x2", ("-local_solver", "tr"), 2, (7, "-coarse_data", "train")),
    "fewer iterations of fewer folds": ("1x1", ("-rate_schedule", "cosine", "-rate_iterations", 7), 3, (3, *FOLDS, 2)),
    "fewer iterations": ("1x1", ("-rate_schedule", "cosine", "-rate_iterations", 7), 2, (3, *FOLDS, 2)),
}


@pytest.mark.ranks
@pytest.mark.parametrize("before", BEFORE)
def test_networks_of_folds_are_the_same_on_any_number_of_ranks_and_by_restarts(
    before: str, comm: MPI.Comm, shared_tmp: Path
) -> None:
    tiles, more, number, (iterations, *done) = BEFORE[before]
    words, folds = (*DIGITS, "-tiles", tiles, *more), (*FOLDS, number)
    alone, together = shared_tmp / "alone.h5", shared_tmp / "together.h5"
    on_one_rank(lambda one: train(alone, one, 7, *words, *folds))
    train(together, comm, iterations, *words, *done)
    train(together, comm, 7, *folds)
    assert_same(alone, together)
    left = {path.name.partition(".")[2] for path in (shared_tmp / "together.h5.nets").glob("*of*.h5")}
    assert left == {f"{fold}of{number}.h5" for fold in range(1, number + 1)}  # those of another number have gone
    comm.barrier()


def test_a_network_of_a_fold_is_that_of_the_other_samples(comm: MPI.Comm, shared_tmp: Path) -> None:
    """Whose outputs for those left out, and whose work, are in the run file."""
    path, other = shared_tmp / "run.h5", shared_tmp / "other.h5"
    left = Folds.drawn(3, files.digits().labels[:120], "0123456789", 0).left_out == 2
    if comm.rank == 0:
        (shared_tmp / "rest.py").write_text(REST)
        np.save(shared_tmp / "left.npy", left)
    comm.barrier()
    words = (*DIGITS, "-scaling", "none", "-summation_blocks", 1, "-error_interval", 8)
    train(path, comm, 8, *words, "-coarse_data", "folds")
    train(other, comm, 8, *words, "-data", f"{shared_tmp}/rest.py:rest", "-samples", 80)
    found, rest = content(path), content(other)
    for tile in range(4):
        fold = content(shared_tmp / f"run.h5.nets/{tile:02d}.2of3.h5")
        assert fold.theta.tobytes() == content(shared_tmp / f"other.h5.nets/{tile:02d}.h5").theta.tobytes()
        assert fold.attributes["samples"] == 80 and fold.attributes["fold"] == "2 of 3"
        said = found.state["logits"]["folds"][tile]
        assert said[left].tobytes() == rest.state["logits"]["test"][tile].tobytes()
        assert said[~left].tobytes() != found.state["logits"]["train"][tile][~left].tobytes()
    assert np.array_equal(found.state["labels"]["folds"], found.state["labels"]["train"])
    assert found.state["folds"] == 3
    spent = {p.name: content(p) for p in (shared_tmp / "run.h5.nets").glob("*.h5")}
    assert len(spent) == 16
    work = sum(net.history["work"][-1] * net.attributes["samples"] for net in spent.values()) / 4 / 120
    assert found.history["work"][-1] == pytest.approx(work)  # tiles of one shape
    assert work / comm.size * 0.99 < found.history["work_critical"][-1] <= work * 1.0001
    comm.barrier()
    if comm.rank == 0:
        shutil.copy(shared_tmp / "run.h5.nets/01.1of3.h5", shared_tmp / "run.h5.nets/01.2of3.h5")
    comm.barrier()
    assert "01.2of3.h5 is of fold 1 of 3, not 2 of 3" in refusal("classify", "-restart", path, "-max_it", 9)


def run(path: Path, comm: MPI.Comm, *options: object, where: str = "-output") -> None:
    """The driver; all ranks see what it leaves. Collective on ``comm``."""
    assert call("classify", where, path, *options, comm=comm) == 0
    comm.barrier()


@pytest.mark.ranks
def test_a_coarse_net_of_outputs_of_folds(comm: MPI.Comm, shared_tmp: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words, folds = (*DIGITS, "-tiles", "1x2", "-max_it", 20, "-rate", 1e-2, "-progress", "none"), (*FOLDS, 2)
    alone, started = shared_tmp / f"alone_{comm.rank}.h5", shared_tmp / "started.h5"
    run(alone, MPI.COMM_SELF, *words, *folds, "-coarse_decay", 1e-3)
    said = capfd.readouterr().out
    assert "6 networks on 1 rank" in said and "as many without each of 2 folds" in said
    assert said.split("\naccuracy")[1].split()[:3] == ["train", "test", "folds"]
    found = content(alone)
    with begun(MPI.COMM_SELF, *words, "-coarse_decay", 1e-3, "-coarse_data", "folds") as (settings, _, _):
        options.check(settings, "tr")
        splits = {n: Outputs(found.state["logits"][n], found.state["labels"][n]) for n in found.state["logits"]}
        made = coarse.train(settings, splits, list("0123456789"), MPI.COMM_SELF)
    assert np.array_equal(found.theta[-len(made.theta) :], made.theta.numpy())
    comm.barrier()
    run(started, comm, *words, *folds, "-coarse_decay", 1e-3, "-phase", "coarse", "-start", shared_tmp / "alone_0.h5")
    assert_same(alone, started)
    before = found.theta
    comm.barrier()
    run(started, comm, "-coarse_data", "train", "-phase", "coarse", where="-restart")
    assert content(started).theta.tobytes() != before.tobytes()
    comm.barrier()
    run(started, comm, "-coarse_data", "folds", where="-restart")
    assert_same(alone, started)
    assert "and these were on 2 folds: -phase local,coarse" in refusal("classify", "-restart", started, "-folds", 4)
