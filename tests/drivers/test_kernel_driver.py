"""kernel.py: fits, stops, goes on on any number of ranks, predicts and draws, and refuses what is wrong."""

import re
import signal
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from calling import call, check_refusal, check_refusal_of_a_start, refusal
from launch import assert_same, content, finish, kill, launch, start, started
from mpi4py import MPI
from scipy.spatial.distance import cdist
from test_ranks import needs_three, train

from ddml.data.files import digits
from ddml.errors import InputError
from ddml.runs.opened import open_run

RUN = ("-data", "digits", "-samples", 300, "-subdomains", 4, "-progress", "none",
       "-error_interval", 1)  # fmt: skip
MINE = """
import numpy as np
import torch


def k(x, y):
    return torch.exp(-torch.cdist(x, y) / 2)


def unsymmetric(x, y):
    return torch.exp(-torch.cdist(x, y) / 2) * torch.arange(1, len(y) + 1).to(y)


def indefinite(x, y):
    return 1 - torch.cdist(x, y)


def nan(x, y):
    return torch.log(x @ y.T - 1e9)


def thirds(samples):
    return np.arange(len(samples)) % 3


def short(samples):
    return np.zeros(3, int)


def twice():
    x = np.repeat(np.random.default_rng(0).standard_normal((40, 3)), 2, axis=0)
    y = (x[:, 0] > 0).astype(int)
    return {"inputs": x, "labels": y, "test_inputs": x, "test_labels": y, "classes": ["a", "b"]}
"""


@pytest.fixture(scope="module")
def folder(module_tmp: Path) -> Path:
    """Data, good and bad, and a run file."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((60, 4)).round(3)
    rows = [" ".join(f"{i + 1}:{v}" for i, v in enumerate(row)) for row in x]
    kinds = {"two": np.where(x[:, 0] > 0, 1, -1), "many": x[:, 0], "one": np.ones(60, int)}
    if MPI.COMM_WORLD.rank == 0:
        (module_tmp / "mine.py").write_text(MINE)
        for name, labels in kinds.items():
            (module_tmp / name).write_text("".join(f"{y} {row}\n" for y, row in zip(labels, rows, strict=True)))
        (module_tmp / "nan").write_text((module_tmp / "two").read_text().replace(rows[7], "1:nan"))
        (module_tmp / "damaged.h5").write_bytes(b"not a run file")
    MPI.COMM_WORLD.barrier()
    assert call("kernel", *RUN, "-output", module_tmp / "run.h5") == 0
    MPI.COMM_WORLD.barrier()
    return module_tmp


def dense(width: float, shift: float, count: int) -> tuple[np.ndarray, float]:
    """The coefficients and the accuracy of the machine of the first digits, independently."""
    data = digits()
    x, test = (values.reshape(len(values), -1) / 16 for values in (data.inputs[:count], data.test_inputs))
    Y = np.eye(10)[data.labels[:count]] - 0.1
    alpha = np.linalg.solve(np.exp(-(cdist(x, x) ** 2) / (2 * width**2)) + shift * np.eye(count), Y)
    found = (np.exp(-(cdist(test, x) ** 2) / (2 * width**2)) @ alpha).argmax(axis=1)
    return alpha, float((found == data.test_labels).mean())


@pytest.mark.ranks
@pytest.mark.parametrize(
    "options",
    [
        (), ("-ksp_type", "fgmres", "-schwarz", "restricted", "-overlap", 0.3), ("-preconditioner", "nystrom"),
        ("-dtype", "float32", "-preconditioner", "none"), ("-solver", "d3l", "-agreement", 1e-9),
        ("-solver", "d3l", "-omega", "0,1,0.5,2", "-cut", "coordinate"), ("-subdomains", "2x2"),
        ("-solver", "d3l", "-exchange", "once", "-omega", 5), ("-kernel_memory", 2e5, "-preconditioner", "none"),
    ],
    ids=str,
)  # fmt: skip
def test_the_machine_is_that_of_a_dense_solution_on_any_number_of_ranks(
    options: tuple[object, ...], comm: MPI.Comm, shared_tmp: Path
) -> None:
    path = shared_tmp / "run.h5"
    given = ("-kernel_width", 1.2, "-lambda", 0.3, "-rtol", 1e-11, "-max_it", 5000)
    assert call("kernel", *RUN, *given, *options, "-output", path) == 0
    comm.barrier()
    run = open_run(path)
    exact, accuracy = dense(1.2, 0.3, 300)
    order = np.argsort(h5py.File(path)["solver/solver/domain/cores"][:])
    found = run.theta.numpy().reshape(300, 10)[order]
    assert np.linalg.norm(found - exact) < 1e-10 * np.linalg.norm(exact)
    assert run.history["accuracy"][-1] == pytest.approx(accuracy)
    assert run.history["residual"][-1] < 1e-11
    assert (np.diff(run.history["communication"]) > 0).all()
    comm.barrier()


@pytest.mark.ranks
@needs_three
@pytest.mark.parametrize(
    "options",
    [("-lambda", 0.01), ("-solver", "d3l", "-lambda", 0.5), ("-ksp_type", "gmres", "-ksp_max_it", 2)],
    ids=str,
)
def test_other_numbers_of_ranks_go_on_to_the_last_bit(
    options: tuple[object, ...], comm: MPI.Comm, shared_tmp: Path
) -> None:
    whole, parts = shared_tmp / "whole.h5", shared_tmp / "parts.h5"
    given = (*RUN[:6], *options)
    train("kernel", whole, 1, 1000, *given)
    for ranks, iterations in ((1, 2), (3, 4), (2, 1000)):
        train("kernel", parts, ranks, iterations, *given)
    assert_same(whole, parts)
    comm.barrier()


@pytest.mark.ranks
def test_a_smaller_tolerance_goes_on_from_what_was_solved(comm: MPI.Comm, shared_tmp: Path) -> None:
    path = shared_tmp / "run.h5"
    assert call("kernel", *RUN, "-lambda", 0.1, "-rtol", 1e-3, "-output", path) == 0
    before = len(content(path).history["loss"])
    comm.barrier()
    assert call("kernel", "-restart", path, "-progress", "none") == 0
    assert len(content(path).history["loss"]) == before
    comm.barrier()
    assert call("kernel", "-restart", path, "-rtol", 1e-8, "-progress", "none") == 0
    history = content(path).history
    assert before < len(history["loss"])
    assert history["residual"][before - 1] > 1e-8 > history["residual"][-1]
    comm.barrier()


@pytest.mark.skipif(MPI.COMM_WORLD.size > 1, reason="one rank is enough")
def test_local_minimisers_alone_are_no_solution(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.h5"
    words = ("-solver", "d3l", "-exchange", "none", "-kernel_width", 1.2, "-lambda", 1, "-output", path)
    assert call("kernel", *RUN, *words) == 0
    assert capfd.readouterr().out.count("NO solution of the whole") == 2
    exact, _ = dense(1.2, 1.0, 300)
    order = np.argsort(h5py.File(path)["solver/solver/domain/cores"][:])
    error = np.linalg.norm(open_run(path).theta.numpy().reshape(300, 10)[order] - exact) / np.linalg.norm(exact)
    assert error > 0.2


@pytest.mark.skipif(MPI.COMM_WORLD.size > 1, reason="one rank is enough")
def test_it_is_predicted_exported_and_drawn(folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = folder / "run.h5"
    run = open_run(path)
    module = run.network()
    data = digits()
    outputs = module(torch.from_numpy(data.test_inputs))
    right = float((outputs.argmax(dim=1).numpy() == data.test_labels).mean())
    assert run.history["accuracy"][-1] == pytest.approx(right)
    assert call("predict", path, "-o", tmp_path / "out.csv") == 0
    assert f"accuracy {right:.4f}" in capfd.readouterr().out
    np.save(tmp_path / "some.npy", data.test_inputs[:5])
    assert call("predict", path, "-at", tmp_path / "some.npy", "-o", tmp_path / "some.csv") == 0
    assert len((tmp_path / "some.csv").read_text().splitlines()) == 6
    assert call("plot", path, "-o", tmp_path / "figure.png") == 0
    assert (tmp_path / "figure.machine.png").stat().st_size > 10_000
    assert call("export", path, "-o", tmp_path / "machine.pt2") == 0
    exported = torch.export.load(tmp_path / "machine.pt2").module()
    for count in (1, 7, 360):
        given = torch.from_numpy(data.test_inputs[:count]).double()
        assert (exported(given) - module(given)).abs().max() < 1e-9 * outputs.abs().max()


@pytest.mark.skipif(MPI.COMM_WORLD.size > 1, reason="one rank is enough")
def test_two_classes_of_a_libsvm_file_and_a_users_kernel_and_cut(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "run.h5"
    mine = folder / "mine.py"
    words = ("-data", folder / "two", "-test_data", folder / "two", "-kernel", f"{mine}:k", "-cut", f"{mine}:thirds")
    assert call("kernel", *words, "-lambda", 0.1, "-progress", "none", "-output", path) == 0
    run = open_run(path)
    assert run.theta.shape == (60,)
    assert run.history["accuracy"][-1] > 0.9
    with pytest.raises(InputError, match="names a program"):
        run.network(data=str(folder / "two"))
    assert run.network(data=str(folder / "two"), trust=True).classes == ("-1", "1")


@pytest.mark.skipif(MPI.COMM_WORLD.size > 1, reason="one rank is enough")
def test_equal_samples_need_a_lambda(folder: Path) -> None:
    words = ("-data", f"{folder / 'mine.py'}:twice", "-subdomains", 2, "-scaling", "none", "-progress", "none")
    assert call("kernel", *words, "-lambda", 1e-3) == 0
    assert "not positive definite to rounding with lambda 0" in refusal("kernel", *words, "-lambda", 0)


@pytest.mark.ranks
def test_samples_that_come_later_are_balanced_and_the_machine_goes_on_on_any_number_of_ranks(
    folder: Path, comm: MPI.Comm, shared_tmp: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ("-data", "digits", "-subdomains", "4x2", "-progress", "none", "-kernel_width", 1.2, "-lambda", 0.3)
    grown, whole = shared_tmp / "grown.h5", shared_tmp / "whole.h5"
    assert call("kernel", *words, "-samples", 500, "-balance", 0.98, "-output", shared_tmp / "then.h5") == 0
    assert call("kernel", *words, "-samples", 600, "-output", whole) == 0
    capfd.readouterr()
    kept = (*words[:6], "-samples", 600, "-start", shared_tmp / "then.h5", "-rank_speeds", "-output", grown)
    assert call("kernel", *kept) == 0
    out = capfd.readouterr().out
    assert comm.rank > 0 or ("100 samples have come since" in out and "samples in another subdomain" in out)
    comm.barrier()
    exact, _ = dense(1.2, 0.3, 600)
    order = np.argsort(h5py.File(grown)["solver/solver/domain/cores"][:])
    found = open_run(grown).theta.numpy().reshape(600, 10)[order]
    assert np.linalg.norm(found - exact) < 1e-5 * np.linalg.norm(exact)
    sizes = h5py.File(grown)["solver/solver/domain/core_sizes"][:]
    assert sizes.min() >= 0.98 * sizes.max()
    first, other = (content(path).history["residual"] for path in (grown, whole))
    assert first[0] < 0.8 < other[0]
    assert call("kernel", *words, "-samples", 600, "-balance", 0.9, "-loads", "seconds", "-max_it", 1) == 0
    assert comm.rank > 0 or "factors of subdomains took" in capfd.readouterr().out
    assert "do not begin with" in refusal("kernel", *words, "-samples", 400, "-start", shared_tmp / "then.h5")
    assert "has the class" in refusal("kernel", *words, "-later", folder / "two")
    comm.barrier()


@pytest.mark.skipif(MPI.COMM_WORLD.size > 1, reason="one rank is enough")
def test_a_second_file_is_as_if_the_first_one_had_its_samples(folder: Path, tmp_path: Path) -> None:
    lines = (folder / "two").read_text().splitlines(keepends=True)
    (tmp_path / "a").write_text("".join(lines[:40]))
    (tmp_path / "b").write_text("".join(lines[40:]))
    # of one class, without the last feature
    (tmp_path / "c").write_text("".join(line.rpartition(" ")[0] + "\n" for line in lines if line.startswith("1 ")))
    assert call("kernel", "-data", tmp_path / "a", "-later", tmp_path / "c", "-progress", "none", "-lambda", 1) == 0
    words = ("-kernel_width", 2, "-lambda", 0.1, "-progress", "none")
    for name, data in (("whole", (folder / "two",)), ("parts", (tmp_path / "a", "-later", tmp_path / "b"))):
        assert call("kernel", "-data", *data, *words, "-output", tmp_path / f"{name}.h5") == 0
    assert_same(tmp_path / "whole.h5", tmp_path / "parts.h5")
    run = open_run(tmp_path / "parts.h5")
    module = run.network(data=str(tmp_path / "a"), trust=True)
    values = torch.tensor([[float(word.split(":")[1]) for word in line.split()[1:]] for line in lines])
    signs = torch.tensor([float(line.split()[0]) for line in lines])
    assert float((module(values).diff(dim=1)[:, 0].sign() == signs).double().mean()) > 0.95


DEEP = ("-solver", "deep", "-network", "expansion", "-data", "digits", "-samples", 300, "-centres", 40, "-features", 4)


BAD = {
    "deep without a network": (("-solver", "deep"), "-network is missing"),
    "deep from a machine": ((*DEEP, "-start", "run.h5"), "-start is not for -solver deep"),
    "deep without a lambda": ((*DEEP, "-lambda", 0), "lambda above 0"),
    "deep with Hessians": ((*DEEP, "-deep_solver", "newton"), "needs Hessian products"),
    "centres": ((*DEEP[:6], "-samples", 30), "must be at most 30"),
    "network": (("-solver", "deep", "-network", "nonsense"), "unknown network 'nonsense'"),
    "more subdomains than samples": (("-samples", 3, "-subdomains", 4), "can be cut into 1 to 3"),
    "no number of a tree": (("-subdomains", 3), "must be 2 or 4"),
    "no number": (("-subdomains", "4y4"), "or boxes as in 4x4"),
    "overlap of 1": (("-overlap", 1), "from 0 to below 1"),
    "negative overlap": (("-overlap", -0.1), "-overlap must be 0 or more"),
    "negative lambda": (("-lambda", -1), "-lambda must be 0 or more"),
    "negative omega": (("-solver", "d3l", "-omega", -1), "omega must be 0 or more"),
    "omega of others": (("-solver", "d3l", "-omega", "1,2,3"), "one for each of 4"),
    "zero width": (("-kernel_width", 0), "-kernel_width must be more than 0"),
    "unsymmetric kernel": (("-kernel", "mine.py:unsymmetric"), "is not symmetric"),
    "kernel of NaN": (("-kernel", "mine.py:nan"), "not finite"),
    "indefinite kernel": (("-kernel", "mine.py:indefinite", "-preconditioner", "none"), "not positive definite"),
    "memory": (("-kernel_memory", 100), "of the memory limit 100 bytes a rank are left"),
    "rank": (("-coarse_rank", 301), "1 to 300 pivots"),
    "labels of regression": (("-data", "many"), "and no classes"),
    "one class": (("-data", "one"), "are of one class"),
    "NaN": (("-data", "nan"), "line 8"),
    "partitioner that fails": (("-cut", "hierarch"), "'hierarch' does not cut these samples"),
    "partitioner": (("-cut", "parmetis"), "no partitioner 'parmetis'"),
    "cut of others": (("-cut", "mine.py:short"), "a number for each of 300"),
    "damaged": (("-restart", "damaged.h5"), "damaged.h5"),
    "other data": (("-restart", "run.h5", "-data", "two"), "-data cannot change"),
    "other subdomains": (("-restart", "run.h5", "-subdomains", 8), "-subdomains cannot change"),
    "unknown option": (("-widths", 3), "unknown option -widths"),
    "unknown method": (("-ksp_type", "nonsense"), "nonsense"),
    "unsymmetric": (("-schwarz", "restricted"), "use gmres or fgmres"),
    "solver": (("-solver", "tr"), "one of ksp, d3l, deep"),
    "tao": (("-tao_type", "lmvm"), "has -ksp_type"),
    "in the way": (("-output", "run.h5"), "exists"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_named_in_one_line_on_all_ranks(
    name: str, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    options, words = BAD[name]
    files = {path.name for path in folder.iterdir()}
    given = [f"{folder}/{word}" if str(word).partition(":")[0] in files else str(word) for word in options]
    run = [] if "-restart" in given else [str(word) for word in RUN if "-data" not in given or word != 300]
    if "-data" in given and "-restart" not in given:
        run = ["-progress", "none"]
    check_refusal("kernel", [*run, *given], words, folder, capfd)


@started
def test_a_wrong_start_ends_with_one_line(folder: Path) -> None:
    check_refusal_of_a_start("kernel", ["-subdomains", "3"], "must be 2 or 4", folder)


@started
def test_a_run_is_stopped_by_a_signal_or_killed_and_goes_on(tmp_path: Path) -> None:
    slow = ("-samples", 700, "-solver", "d3l", "-subdomains", 8, "-lambda", 1e-3, "-max_it", 60)
    parts, whole = tmp_path / "parts.h5", tmp_path / "whole.h5"
    assert launch(2, *slow, "-output", whole, driver="kernel.py").rc == 0
    for restart in ("-output", "-restart"):
        process = start(2, *(slow if restart == "-output" else ()), restart, parts, "-checkpoint_interval", 1,
                        "-progress", "lines", driver="kernel.py")  # fmt: skip
        assert process.stdout
        assert any(re.match(r" +\d+ ", line) for line in process.stdout)
        if restart == "-output":
            process.send_signal(signal.SIGTERM)
        else:
            kill(process)
        finish(process)
    assert launch(3, "-restart", parts, driver="kernel.py").rc == 0
    assert_same(whole, parts)
