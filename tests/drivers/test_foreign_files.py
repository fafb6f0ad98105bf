"""Files of somebody else, given to the programs: nothing of them runs, nothing waits, no device is replaced."""

import os
import shutil
import stat
import sys
from collections.abc import Callable
from pathlib import Path

import h5py
import pytest
from calling import call, refusal, tree
from mpi4py import MPI
from own_data import USER
from sealing import seal_anew

HERE = Path(__file__).parent
SHORT = ("-points", 40, "-error_points", 16, "-test_points", 0, "-progress", "none", "-max_it", 1)
DIGITS = ("-samples", 60, "-batch_size", 0, "-max_it", 1, "-progress", "none")
SELF = MPI.COMM_SELF
NETWORK = """
class Net(torch.nn.Linear):
    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs, dtype=torch.float64)
"""


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """What Python files of users in this test leave where they run."""
    return tmp_path / "trace"


def program(path: Path, trace: Path, text: str) -> Path:
    """A user's file that leaves a trace."""
    path.write_text(f"import pathlib\npathlib.Path({str(trace)!r}).touch()\nimport torch\n{text}")
    return path


def forget(trace: Path) -> None:
    """Let users' files run anew."""
    trace.unlink(missing_ok=True)
    for name in [name for name in sys.modules if name.startswith("ddml_user")]:
        del sys.modules[name]


def renamed(path: Path, **attributes: str) -> None:
    """Give a run file other attributes, and a seal that fits."""
    with h5py.File(path, "r+") as file:
        file.attrs.update({name.replace("option_", "option "): text for name, text in attributes.items()})
    seal_anew(path)


def test_a_problem_that_a_run_file_names_runs_where_it_is_given_or_trusted(tmp_path: Path, trace: Path) -> None:
    user = program(tmp_path / "user.py", trace, (HERE / "field_problems.py").read_text())
    run, figure = tmp_path / "run.h5", tmp_path / "figure.png"
    assert call("pinn", "-problem", f"{user}:Base", *SHORT, "-output", run, comm=SELF) == 0
    forget(trace)
    before = tree(tmp_path)
    assert "names a file" in refusal("plot", run, "-o", figure, comm=SELF)
    for more in ((), ("-output", tmp_path / "more.h5"), ("-solver", "lbfgs")):
        said = refusal("pinn", "-restart", run, "-max_it", 2, *more, comm=SELF)
        assert "names a program or a file to open, -problem" in said and "-trust" in said
    assert tree(tmp_path) == before
    assert call("plot", run, "-o", figure, "-no_maps", comm=SELF) == 0
    assert not trace.exists()
    for given in (("-trust",), ("-problem", f"{user}:Base")):
        assert call("plot", run, "-o", figure, *given, comm=SELF) == 0
        assert trace.exists()
        forget(trace)
        assert call("pinn", "-restart", run, *given, "-max_it", 2, comm=SELF) == 0
        assert trace.exists()
        forget(trace)
    assert (tmp_path / "figure.maps.png").exists()
    assert "-problem cannot change" in refusal("pinn", "-restart", run, "-problem", f"{user}:Cubic", comm=SELF)


def test_networks_data_and_solvers_likewise(tmp_path: Path, trace: Path) -> None:
    user, run = program(tmp_path / "user.py", trace, USER), tmp_path / "run.h5"
    words = ("-data", f"{user}:rings", "-network", f"{user}:net", *DIGITS)
    assert call("classify", *words, "-output", run, comm=SELF) == 0
    net, other = program(tmp_path / "net.py", trace, NETWORK), tmp_path / "other.h5"
    assert call("pinn", "-network", f"{net}:Net", *SHORT, "-output", other, comm=SELF) == 0
    forget(trace)
    assert "names a program" in refusal("classify", "-restart", run, "-max_it", 2, comm=SELF)
    said = refusal("classify", "-restart", run, "-data", f"{user}:rings", "-max_it", 2, comm=SELF)
    assert "names a program or a file to open, -network" in said
    assert "names a program or a file to open, -network" in refusal("pinn", "-restart", other, "-max_it", 2, comm=SELF)
    assert "names a file" in refusal("plot", other, "-o", tmp_path / "a.png", comm=SELF)
    assert not trace.exists()
    assert call("classify", "-restart", run, "-trust", "-max_it", 2, comm=SELF) == 0
    assert call("plot", other, "-network", f"{net}:Net", "-o", tmp_path / "a.png", comm=SELF) == 0


@pytest.mark.parametrize(
    ("attributes", "expected"),
    [
        ({"solver": "{user}:Evil", "option_solver": "{user}:Evil"}, "-solver"),
        ({"solver": "{user}:Evil"}, "-solver"),
        ({"option_solver": "{user}:Evil"}, "-solver"),
        ({"option_sub_solver": "{user}:Evil"}, "-sub_solver"),
        ({"option_gn_pc_python_type": "user.Evil"}, "-gn_pc_python_type"),
        ({"option_tao_view": "ascii:{folder}/other.txt"}, "-tao_view"),
        ({"option_gn_ksp_monitor": "ascii:{folder}/other.txt"}, "-gn_ksp_monitor"),
        ({"option_mat_view": "binary:{folder}/other.txt"}, "-mat_view"),
        ({"option_tensorboard": "{folder}/board"}, "-tensorboard"),
        ({"option_network": "{user}:Evil"}, "-network"),
    ],
)  # fmt: skip
def test_what_else_runs_or_opens_files(
    good: Path, tmp_path: Path, trace: Path, attributes: dict[str, str], expected: str
) -> None:
    user, run = program(tmp_path / "user.py", trace, "class Evil: pass"), Path(shutil.copy(good, tmp_path / "run.h5"))
    (tmp_path / "other.txt").write_text("other")
    renamed(run, **{name: text.format(user=user, folder=tmp_path) for name, text in attributes.items()})
    before = tree(tmp_path)
    said = refusal("pinn", "-restart", run, "-max_it", 7, comm=SELF)
    assert f"names a program or a file to open, {expected} '" in said
    assert tree(tmp_path) == before and not trace.exists()


READERS: dict[str, Callable[[Path], tuple[object, ...]]] = {
    "plot": lambda path: ("plot", path, "-o", "figure.png"),
    "predict": lambda path: ("predict", path, "-grid", 3, "-o", "out.csv"),
    "export": lambda path: ("export", path, "-o", "net.pt"),
    "a restart": lambda path: ("pinn", "-restart", path),
    "a restart into another file": lambda path: ("classify", "-restart", path, "-output", "more.h5"),
    "data": lambda path: ("classify", "-data", path, "-max_it", 1),
    "data of text": lambda path: ("logistic", "-data", path.with_suffix(".txt"), "-max_it", 1),
}


@pytest.mark.parametrize("kind", ["fifo", "device", "folder"])
@pytest.mark.parametrize("reader", READERS)
def test_what_is_no_regular_file_is_not_read(
    reader: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "given.h5"
    for place in (path, path.with_suffix(".txt")):
        {"fifo": os.mkfifo, "folder": os.mkdir, "device": lambda p: p.symlink_to("/dev/zero")}[kind](place)
    said = refusal(*READERS[reader](path), comm=SELF)
    assert "given." in said and ("no regular file" in said or "is a folder" in said)
    assert len(os.listdir(tmp_path)) == 2


WRITERS: dict[str, Callable[[Path, Path], tuple[object, ...]]] = {
    "plot": lambda good, path: ("plot", good, "-no_maps", "-o", path.with_suffix(".png")),
    "predict": lambda good, path: ("predict", good, "-grid", 3, "-o", path.with_suffix(".csv")),
    "export": lambda good, path: ("export", good, "-o", path.with_suffix(".pt")),
    "a run": lambda good, path: ("pinn", *SHORT, "-output", path.with_suffix(".h5"), "-overwrite"),
    "a restart": lambda good, path: ("pinn", "-restart", good, "-max_it", 9, "-output", path.with_suffix(".h5")),
}  # fmt: skip


@pytest.mark.parametrize("kind", ["fifo", "device", "link to a device", "folder"])
@pytest.mark.parametrize("writer", WRITERS)
def test_what_is_no_regular_file_is_not_replaced(writer: str, kind: str, good: Path, tmp_path: Path) -> None:
    device, words = tmp_path / "full", WRITERS[writer](good, tmp_path / "made")
    target = next(w for w in words if isinstance(w, Path) and w.stem == "made")
    try:
        os.mknod(device, stat.S_IFCHR | 0o666, os.makedev(1, 7))
    except PermissionError:
        pytest.skip("makes a device node")
    if kind == "device":
        device.rename(target)
    else:
        {"fifo": os.mkfifo, "folder": os.mkdir, "link to a device": lambda p: p.symlink_to(device)}[kind](target)
    before = target.stat()
    said = refusal(*words, comm=SELF)
    assert f"cannot write {target}: what is there is no regular file" in said
    assert (target.stat().st_mode, target.stat().st_ino) == (before.st_mode, before.st_ino)


@pytest.mark.parametrize("writer", WRITERS)
def test_a_name_that_is_too_long_is_one_line(writer: str, good: Path, tmp_path: Path) -> None:
    assert "File name too long" in refusal(*WRITERS[writer](good, tmp_path / ("made" * 70)), comm=SELF)


def test_trust_is_advised_where_a_restart_asks_for_it(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run.h5"  # of PETSc's own options none is in it
    assert call("pinn", *SHORT, "-log_view", f":{tmp_path}/log.txt", "-output", run, comm=SELF) == 0
    assert f"-restart {run} and a larger limit" in capfd.readouterr().out
    assert call("pinn", "-restart", run, "-max_it", 2, comm=SELF) == 0


def test_texts_of_a_run_file_are_printed_without_control_characters(
    good: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copy(good, tmp_path / "run.h5"))
    renamed(run, option_memory="7\x1b]0;title\x07", problem="burgers\x1b[2J\u202e")
    assert r"-problem 'burgers\x1b[2J" in refusal("plot", run, "-o", tmp_path / "a.png", comm=SELF)
    renamed(run, option_memory="7", problem="burgers", option_unread="\x1b[31m\x9b2J")
    assert call("pinn", "-restart", run, "-output", tmp_path / "more.h5", "-max_it", 6, comm=SELF) == 0
    said = capfd.readouterr().out
    assert r"-unread \x1b[31m\x9b2J of the run file is read by nothing here" in said
    assert said.replace("\n", "").isprintable()
