"""classify.py -tiles -phase local,coarse,coherent: in one go, one by one, elsewhere and after a stop it is the same."""

from pathlib import Path

import numpy as np
import pytest
import torch
from calling import call, refusal
from mpi4py import MPI
from one_rank import on_one_rank
from own_data import USER as SOLIDS
from tiled.nets import tile_of
from tiled_runs import DIGITS, assert_same, begun, content

from ddml.data import files
from ddml.data.scaling import Scaling
from ddml.decomposition.tiles import Tiles
from ddml.networks.coarse import build_coarse
from ddml.networks.coherent import Coherent
from ddml.networks.local import build_local

LOCAL = (*DIGITS, "-max_it", 12, "-rate", 1e-2, "-progress", "none")
LATER = ("-link", "log_probabilities", "-coarse_decay", 1e-2, "-coherent_max_it", 6)
KINDS = {
    "tr": (),
    "adam on batches": ("-coherent_solver", "adam", "-coherent_batch_size", 25, "-coherent_batch_steps", 1),
    "dense, coarse net frozen": ("-coarse_net", "dense", "-coarse_widths", 5, "-freeze", "coarse"),
    "local nets frozen": ("-freeze", "local", "-coherent_solver", "lbfgs"),
}


def run(path: Path, comm: MPI.Comm, *options: object, where: str = "-output") -> None:
    """The driver; all ranks see what it leaves. Collective on ``comm``."""
    assert call("classify", where, path, *options, comm=comm) == 0
    comm.barrier()


@pytest.mark.ranks
@pytest.mark.parametrize("kind", KINDS)
def test_phases_in_one_go_one_by_one_and_elsewhere_are_the_same(kind: str, comm: MPI.Comm, shared_tmp: Path) -> None:
    words, all_ = (*LATER, *KINDS[kind]), "local,coarse,coherent"
    alone, parts, started = (shared_tmp / f"{name}.h5" for name in ("alone", "parts", "started"))
    on_one_rank(lambda one: run(alone, one, *LOCAL, *words, "-phase", all_))
    run(parts, comm, *LOCAL, "-phase", "local")
    first = content(parts)
    comm.barrier()
    free = [w for w in words if w != "-freeze" and w not in ("local", "coarse")]
    run(started, comm, *LOCAL, *free, "-phase", "coarse", "-start", parts)
    run(parts, comm, *free, "-phase", "local,coarse", where="-restart")
    second = content(parts)
    comm.barrier()
    run(parts, comm, *(w if w != 6 else 2 for w in words), "-phase", all_, where="-restart")
    assert content(parts).history["accuracy"].shape == (4,)
    comm.barrier()
    run(parts, comm, "-coherent_max_it", 6, where="-restart")
    run(started, comm, *words, "-phase", "coarse,coherent", where="-restart")
    for path in (parts, started):
        assert_same(alone, path)
    comm.barrier()
    found = content(parts)
    size = len(first.theta)
    assert np.array_equal(second.theta[:size], first.theta)
    changed = found.theta != second.theta
    assert changed[:size].any() == ("local nets" not in kind) and changed[size:].any() == ("net frozen" not in kind)
    assert found.state["phases"] == all_.encode()
    assert list(found.history["iteration"]) == [0, 1, 2, 3]
    assert (np.diff(found.history["work_critical"]) > 0).all() and (np.diff(found.history["time"]) > 0).all()
    comm.barrier()


@pytest.mark.ranks
def test_a_coarse_net_is_eliminated_on_any_number_of_ranks_and_through_a_restart(
    comm: MPI.Comm, shared_tmp: Path
) -> None:
    first, alone, parts = (shared_tmp / f"{name}.h5" for name in ("first", "alone", "parts"))
    run(first, comm, *LOCAL, *LATER)
    words = ("-phase", "coherent", "-start", first, "-coherent_coarse", "eliminated", "-coherent_coarse_iterations", 3)
    on_one_rank(lambda one: run(alone, one, *LOCAL, *LATER, *words))
    run(parts, comm, *LOCAL, *LATER, *words, "-coherent_max_it", 2)
    run(parts, comm, "-coherent_max_it", 6, where="-restart")
    assert_same(alone, parts)
    assert_same(*(path.with_name(f"{path.name}.nets") / "coherent.h5" for path in (alone, parts)))
    found, before = content(parts), content(first)
    assert (found.theta != before.theta).any() and found.attributes["option coherent_coarse"] == "eliminated"
    comm.barrier()


def test_a_coarse_net_that_was_trained_is_eliminated_from_then_on(comm: MPI.Comm, shared_tmp: Path) -> None:
    path, net = shared_tmp / "run.h5", shared_tmp / "run.h5.nets/coherent.h5"
    run(path, comm, *LOCAL, *LATER, "-phase", "local,coarse,coherent", "-coherent_max_it", 2)
    before = content(net)
    comm.barrier()
    run(path, comm, "-coherent_coarse", "eliminated", "-coherent_max_it", 4, where="-restart")
    after = content(net)
    assert list(after.history["iteration"]) == [0, 1, 2, 3, 4]
    assert after.history["loss"][-1] < before.history["loss"][-1]
    assert after.attributes["solver"].startswith("tr, coarse net eliminated by 5")
    assert after.history["work"][-1] - after.history["work"][-2] > 1.1  # the coarse net's, too
    comm.barrier()


@pytest.mark.ranks
def test_a_coherent_net_of_volumes_from_random_values(comm: MPI.Comm, shared_tmp: Path) -> None:
    if comm.rank == 0:
        (shared_tmp / "data.py").write_text(SOLIDS)
    comm.barrier()
    words = ("-data", f"{shared_tmp}/data.py:solids", "-tiles", "2x1x2", "-tile_overlap", 1, "-tiles_padded",
             "-network", "vgg", "-width", 8, "-depth", 1, "-phase", "coherent", "-link", "logits")  # fmt: skip
    alone, together = shared_tmp / "alone.h5", shared_tmp / "together.h5"
    on_one_rank(lambda one: run(alone, one, *words, "-coherent_max_it", 30))
    run(together, comm, *words, "-coherent_max_it", 30)
    assert_same(alone, together)
    found = content(together)
    assert found.history["accuracy"][-1] > 0.6 and found.state["phases"] == b"coherent"
    assert list(found.history["iteration"]) == [0, 3]
    comm.barrier()


NETWORK = """
from torch import nn


def net(shape, classes, width=4):
    pixels = shape[1] * shape[2]
    first = nn.Linear(pixels, pixels).requires_grad_(False)
    return nn.Sequential(nn.Flatten(), first, nn.Tanh(), nn.Linear(pixels, width), nn.Tanh(), nn.Linear(width, classes))
"""


@pytest.mark.ranks
@pytest.mark.parametrize("freeze", ["local", "coarse"])
def test_layers_that_a_users_network_holds_fixed(freeze: str, comm: MPI.Comm, shared_tmp: Path) -> None:
    if comm.rank == 0:
        (shared_tmp / "user.py").write_text(NETWORK)
    comm.barrier()
    words = ("-tiles", 2, "-network", f"{shared_tmp}/user.py:net", "-samples", 60, "-max_it", 10, "-coarse_decay", 1e-3)
    more = ("-phase", "local,coarse,coherent", "-coherent_max_it", 3, "-freeze", freeze)
    alone, together = shared_tmp / "alone.h5", shared_tmp / "together.h5"
    on_one_rank(lambda one: run(alone, one, *words, *more))
    run(together, comm, *words, "-phase", "local,coarse")
    comm.barrier()
    run(together, comm, *more, "-trust", where="-restart")
    assert_same(alone, together)
    found = content(together)
    assert not [name for name in found.names if name.startswith("nets.0.1.")] and "nets.0.3.weight" in found.names
    size = len(found.state["local"])
    assert np.array_equal(found.theta[:size], found.state["local"]) == (freeze == "local")
    assert np.array_equal(found.theta[size:], found.state["coarse_theta"]) == (freeze == "coarse")
    comm.barrier()


def test_the_run_file_has_the_coherent_net(comm: MPI.Comm, shared_tmp: Path) -> None:
    path = shared_tmp / "run.h5"
    run(path, comm, *LOCAL, *LATER, "-phase", "local,coarse,coherent")
    found = content(path)
    with begun(comm, *LOCAL, *LATER) as (settings, _, _):
        source = files.source("digits", comm, 120)
        tiles = Tiles(source.shape, 2, 1)
        nets = [net for net, _ in build_local(settings, tiles.shapes, 10, tiles.narrowing)]
        coarse, _ = build_coarse(settings, 4, 10)
        scalings = [Scaling(tile_of(source, tiles, i), "standard", MPI.COMM_SELF) for i in range(4)]
        module = Coherent(nets, coarse, tiles, "log_probabilities", scalings)
    assert [name for name, _ in module.named_parameters()] == found.names
    torch.nn.utils.vector_to_parameters(torch.as_tensor(found.theta).float(), module.parameters())
    data = files.digits()
    with torch.no_grad():
        outputs = module(torch.as_tensor(data.test_inputs).float())
    right = float((outputs.argmax(dim=1).numpy() == data.test_labels).mean())
    assert found.history["accuracy"][-1] == pytest.approx(right, abs=1e-12)
    loss = torch.nn.functional.cross_entropy(outputs, torch.as_tensor(data.test_labels))
    assert found.history["test_loss"][-1] == pytest.approx(float(loss), rel=1e-5)
    comm.barrier()


def test_a_change_does_anew_what_depends_on_it_and_nothing_else(comm: MPI.Comm, shared_tmp: Path) -> None:
    one, other = shared_tmp / "one.h5", shared_tmp / "other.h5"
    run(one, comm, *LOCAL, *LATER, "-phase", "local,coarse,coherent")
    before = content(one)
    comm.barrier()
    run(one, comm, "-fusion", "majority", where="-restart")
    assert content(one).theta.tobytes() == before.theta.tobytes()
    comm.barrier()
    said = "is of the coarse net, which is trained already, with -link log_probabilities"
    for change in (
        ("-phase", "local", "-link", "logits"), ("-phase", "local", "-coarse_net", "dense"),
        ("-phase", "local,coherent", "-coarse_decay", 0.1), ("-phase", "local,coherent", "-coarse_widths", 3),
    ):  # fmt: skip
        assert said in refusal("classify", "-restart", one, *change, comm=comm)
    assert f"-link {said}" in refusal(
        "classify", "-start", one, "-output", other, *LOCAL, "-phase", "coherent", comm=comm
    )
    assert content(one).theta.tobytes() == before.theta.tobytes() and not other.exists()
    comm.barrier()
    for change in (("-coarse_decay", 0.1), ("-link", "logits"), ("-coarse_net", "dense"), ("-max_it", 16)):
        run(one, comm, *change, where="-restart")
    after = content(one)
    assert after.theta.shape != before.theta.shape and list(after.history["iteration"]) == [0, 1, 2, 3]
    comm.barrier()
    words = ("-link", "logits", "-coarse_net", "dense", "-coarse_decay", 0.1, "-coherent_max_it", 6)
    run(other, comm, *LOCAL, *words, "-max_it", 16, "-phase", "local,coarse,coherent", "-fusion", "majority")
    assert_same(one, other)
