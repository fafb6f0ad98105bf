"""classify.py refuses what is wrong in one line on all ranks, and no file is touched."""

from pathlib import Path

import h5py
import numpy as np
import pytest
from calling import call, check_refusal, check_refusal_of_a_start, refusal
from launch import launch, started
from mpi4py import MPI
from own_data import BATCHES, USER

# what is wrong: (the options, a text that the error line must contain)
WRONG = {
    "unknown option": ("-batchsize 8", "-batchsize"),
    "option of PINNs": ("-points 100", "-points"),
    "unknown solver": ("-solver sgd", "'sgd'"),
    "solver for residuals": ("-solver gauss_newton", "sums of squares"),
    "unknown data": ("-data imagenet", "'imagenet'; there are digits"),
    "missing data file": ("-data nothing.h5", "nothing.h5"),
    "data file that is none": ("-data {folder}/text.h5", "no data file"),
    "labels out of range": ("-data {user}:wrong_labels", "labels must be from 0 to 0"),
    "too many samples": ("-samples 5000", "has 1437"),
    "unknown scaling": ("-scaling log", "-scaling"),
    "unknown network": ("-network transformer", "'transformer'"),
    "network that does not fit": ("-network cnn", "at least 16 x 16"),
    "user's network that does not fit": ("-network {user}:narrow", "narrow"),
    "widths are no numbers": ("-widths 32,x", "-widths"),
    "no blocks": ("-network euler -blocks 0", "-blocks must be 1 or more"),
    "blocks of no width": ("-network euler_cnn -width 0", "-width must be 1 or more"),
    "network too deep for its images": ("-network vgg", "too deep for samples (1, 8, 8): it has room for -depth 2"),
    "stages without an end": ("-network resnet -depth 99999999999", "has room for -depth 2"),
    "network of images on vectors": ("-network resnet -data {user}:rings", "the samples are (2,)"),
    "stages of no channels": ("-network vgg -width 0", "-width must be 1 or more"),
    "no stages": ("-network cnn -depth 0", "-depth must be 1 or more"),
    "depth of a network that has none": ("-network euler -depth 2", "'euler' takes no depth"),
    "width of a network that has none": ("-width 8", "'mlp' takes no width"),
    "width that a user's network does not take": ("-network {user}:narrow -width 8", "give it an argument width"),
    "restart with another depth": ("-restart {run} -depth 2", "takes no depth"),
    "no time": ("-network euler -horizon 0", "-horizon must be more than 0"),
    "time without an end": ("-network euler -horizon inf", "-horizon must be a number"),
    "images that do not get coarser": ("-network euler -image_refinement 3", "-image_refinement 3 must divide"),
    "coarser convolutions": ("-network euler_cnn -image_refinement 2", "is for -network euler, got euler_cnn"),
    "images that get larger": ("-network euler -image_refinement 0", "-image_refinement must be 1 or more"),
    "restart with coarser images": ("-restart {run} -image_refinement 2", "-image_refinement cannot change"),
    "restart with other blocks": ("-restart {run} -blocks 9", "-blocks cannot change"),
    "batch of too many": ("-batch_size 2000", "-batch_size"),
    "overlap of too many": ("-batch_size 300 -batch_overlap 2", "-batch_overlap"),
    "batches that grow for a line search": ("-solver lbfgs -batch_growth 2", "trust region"),
    "no steps on a batch": ("-batch_steps 0", "-batch_steps"),
    "too many subdomains": ("-solver aspqn -subdomains 9", "9"),
    "no such device": ("-device cuda:99", "-device"),
    "restart with another network": ("-restart {run} -widths 9", "-widths cannot change"),
    "restart of other samples": ("-restart {run} -samples 900 -batch_size 300", "-samples"),
    "output exists": ("-output {run}", "-overwrite"),
}


@pytest.fixture(scope="module")
def files(module_tmp: Path) -> Path:
    """A folder with a run file of classify.py, a user's Python file and a text."""
    assert call("classify", *BATCHES, "-max_it", 3, "-output", module_tmp / "run.h5", "-progress", "none") == 0
    if MPI.COMM_WORLD.rank == 0:
        (module_tmp / "mine.py").write_text(USER)
        (module_tmp / "text.h5").write_text("1 2 3\n")
    MPI.COMM_WORLD.barrier()
    return module_tmp


def command(files: Path, options: str) -> list[str]:
    """The command line; what a run file has options of is given once."""
    words = options.format(folder=files, user=files / "mine.py", run=files / "run.h5").split()
    pairs = zip(BATCHES[::2], BATCHES[1::2], strict=True)
    settings = [word for pair in pairs if pair[0] not in words for word in pair]
    overwrite = [] if {"-restart", "-output"} & set(words) else ["-output", str(files / "run.h5"), "-overwrite"]
    return [*settings, "-max_it", "3", *words, *overwrite]


@pytest.mark.parametrize("name", WRONG)
def test_bad_input_is_named_in_one_line_on_all_ranks(name: str, files: Path, capfd: pytest.CaptureFixture[str]) -> None:
    options, expected = WRONG[name]
    check_refusal("classify", command(files, options), expected, files, capfd)


@started
def test_a_driver_that_refuses_prints_one_line_and_ends_with_1(files: Path) -> None:
    options, expected = WRONG["labels out of range"]
    check_refusal_of_a_start("classify", command(files, options), expected, files)


def test_a_data_file_that_is_damaged_is_refused(shared_tmp: Path, comm: MPI.Comm) -> None:
    path = shared_tmp / "data.h5"
    if comm.rank == 0:
        with h5py.File(path, "w") as file:
            file.attrs["classes"] = ["a", "b"]
            for name, count in (("inputs", 8), ("test_inputs", 4)):
                file[name] = np.full((count, 3), np.nan if name == "test_inputs" else 1.0)
                file[name.replace("inputs", "labels")] = np.zeros(count, int)
    comm.barrier()
    line = refusal("classify", "-data", path)
    assert line == f"data file {path}: test_inputs must be finite; sample 0 has NaN or infinity"


@started
def test_help_lists_the_options() -> None:
    result = launch(2, "-help", driver="classify.py")
    assert result.rc == 0, result.err
    options = """data samples scaling network widths solver batch_size batch_overlap batch_steps seed dtype subdomains
                 max_it max_work max_time target_accuracy checkpoint_interval output restart"""
    for option in options.split():
        assert f"  -{option} " in result.out
    assert "-points" not in result.out
    assert "-solver gauss_newton" not in result.out
