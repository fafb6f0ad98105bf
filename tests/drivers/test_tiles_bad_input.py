"""classify.py -tiles refuses what is wrong in one line on all ranks, and no file is touched."""

import time
from pathlib import Path

import h5py
import numpy as np
import pytest
from calling import call, check_refusal, check_refusal_of_a_start, refusal, tree
from launch import started
from mpi4py import MPI
from own_data import USER
from tiled.whole import Whole
from tiled_runs import DIGITS, begun
from tiled_runs import USER as NETWORKS
from torch import nn

from ddml.decomposition.tiles import Tiles
from ddml.networks.local import build_local
from ddml.runs import run_file

# what is wrong: (the options, a text that the error line must contain)
WRONG = {
    "tiles for a volume of images": ("-tiles 2x2x1", "tiles of 2x2x1 does not fit an image (C, H, W)"),
    "tiles for images of volumes": ("-data {user}:solids -tiles 2x2", "tiles of 2x2 does not fit a volume"),
    "more tiles than pixels": ("-tiles 2x9", "9 tiles along W are more than its 8 pixels"),
    "more tiles than planes": ("-data {user}:solids -tiles 1x1x8", "8 tiles along D are more than its 7 pixels"),
    "no tiles": ("-tiles 0", "there must be 1 tile or more along each axis, got 0x0"),
    "no tiles along an axis": ("-tiles 2x0", "1 tile or more along each axis, got 2x0"),
    "fewer than no tiles": ("-tiles -2x2", "1 tile or more along each axis"),
    "tiles in words": ("-tiles four", "option -tiles must be an integer, or one for each axis as in 4x4"),
    "tiles that break off": ("-tiles 2x", "option -tiles must be an integer"),
    "half a tile": ("-tiles 2.5", "option -tiles must be an integer"),
    "tiles by commas": ("-tiles 2,2", "option -tiles must be an integer"),
    "negative overlap": ("-tile_overlap -1", "an overlap of -1 is negative"),
    "overlap as wide as the image": ("-tile_overlap 8", "an overlap of 8 is as wide as the 8 pixels along H"),
    "overlap too wide along an axis": ("-tile_overlap 1x9", "an overlap of 9 is as wide as the 8 pixels along W"),
    "overlap of other axes": ("-tile_overlap 1x1x1", "an overlap of 1x1x1 does not fit an image"),
    "overlap in words": ("-tile_overlap some", "option -tile_overlap must be an integer"),
    "vectors": ("-data {user}:rings", "has samples (2,): tiles are of images"),
    "network too deep for its tile": ("-depth 3", "no local network for tile 0 of shape (1, 5, 5)"),
    "network too deep for the smallest tile": ("-tiles 4x4 -tile_overlap 0 -depth 1", "of shape (1, 2, 2)"),
    "network too large for its tile": ("-network cnn -depth 2", "no local network for tile 0"),
    "no width": ("-local_width 0", "option -local_width must be 1 or more"),
    "negative width": ("-local_width -3", "option -local_width must be 1 or more"),
    "network without a width": ("-network mlp", "'mlp' has no width that local networks could have less of"),
    "network that takes no width": ("-network {user}:narrow", "has no width"),
    "network that ignores its width": ("-network {networks}:tied", "ignores its width"),
    "fusion without tiles": ("-no_tiles -fusion average", "option -fusion is for -tiles"),
    "overlap without tiles": ("-no_tiles -tile_overlap 2", "option -tile_overlap is for -tiles"),
    "padding without tiles": ("-no_tiles -tiles_padded", "option -tiles_padded is for -tiles"),
    "local width without tiles": ("-no_tiles -local_width 2", "option -local_width is for -tiles"),
    "local solver without tiles": ("-no_tiles -local_solver adam -solver tr", "-local_solver"),
    "unknown fusion": ("-fusion vote", "option -fusion must be one of"),
    "coarse phase without a local one": ("-phase coarse", "-phase coarse needs a local phase that is finished"),
    "coarse phase of a local one that is not": ("-restart {mixed} -phase coarse", "a local phase that is finished"),
    "unknown phase": ("-phase local,global", "option -phase must be of"),
    "the same phase twice": ("-phase local,local", "option -phase must be of"),
    "solver of the undivided network": ("-solver lbfgs", "with -tiles it is -local_solver"),
    "type of PETSc": ("-tao_type lmvm", "with -tiles it is -local_solver"),
    "unknown local solver": ("-local_solver sgd", "unknown solver 'sgd'"),
    "local solver for residuals": ("-local_solver gauss_newton", "sums of squares"),
    "local solver over depth": ("-local_solver rmtr", "several depths"),
    "option of another local solver": ("-local_solver lbfgs -rate 1", "unknown option -rate"),
    "unknown option": ("-tile_overlaps 2", "unknown option -tile_overlaps"),
    "batch of too many": ("-batch_size 121", "-batch_size must be at most 120"),
    "rate that is none": ("-rate 0", "-rate must be more than 0"),
    "output exists": ("-output {run}", "-overwrite"),
    "run files of networks exist": ("-output {folder}/left.h5", "left.h5.nets/01.h5 exists, of another run"),
    "folder that is not there": ("-output {folder}/none/run.h5", "cannot write"),
    "restart with other tiles": ("-restart {run} -tiles 4x4", "-tiles cannot change"),
    "restart with another overlap": ("-restart {run} -tile_overlap 0", "-tile_overlap cannot change"),
    "restart with padding": ("-restart {run} -tiles_padded", "-tiles_padded cannot change"),
    "restart with another width": ("-restart {run} -local_width 3", "goes on with the tiles, the widths"),
    "restart with another seed": ("-restart {run} -seed 3", "-seed cannot change"),
    "restart of an undivided network": ("-restart {undivided} -tiles 2x2", "parameters of other networks"),
    "start of other tiles": ("-start {run} -phase coarse -tile_overlap 0", "with other tiles: 2x2 tiles of"),
    "start of another family": ("-start {run} -phase coarse -network resnet", "parameters of other networks"),
    "start of another scaling": ("-start {run} -phase coarse -scaling unit", "with other scaling: standard"),
    "start of other samples": ("-start {run} -phase coarse -samples 119", "written with other samples, or other parts"),
    "start of other classes": ("-start {run} -phase coarse -data {user}:renamed", "written with other classes"),
    "start of an undivided network": ("-start {undivided} -phase coarse", "parameters of other networks"),
    "start of nothing": ("-start {folder}/nothing.h5 -phase coarse", "there is no run file"),
    "start of what is damaged": ("-start {folder}/damaged.h5.nets/02.h5 -phase coherent", "is damaged"),
    "start of what is not finished": ("-start {mixed} -phase coarse", "a local phase that is finished"),
    "start and a local phase": ("-start {run} -phase local,coarse", "leave local out of -phase"),
    "start without tiles": ("-no_tiles -start {run}", "option -start is for -tiles"),
    "frozen without a coherent phase": ("-freeze local", "option -freeze is for -phase coherent"),
    "link without tiles": ("-no_tiles -link logits", "option -link is for -tiles"),
    "unknown link": ("-link squares", "option -link must be one of"),
    "unknown coarse solver": ("-coarse_solver adam", "option -coarse_solver must be one of lbfgs, tr"),
    "held-out samples that there are not": ("-phase local,coarse -coarse_data held_out", "that have held-out samples"),
    "one fold": ("-phase local,coarse -coarse_data folds -folds 1", "option -folds must be 2 or more, got 1"),
    "fewer than no folds": ("-coarse_data folds -folds -2", "option -folds must be 2 or more"),
    "folds in words": ("-coarse_data folds -folds some", "option -folds must be an integer"),
    "more folds than samples": ("-coarse_data folds -folds 121", "121 folds of 120 samples"),
    "folds of a class of one sample": ("-coarse_data folds -samples 10", "class 0 has one sample only"),
    "folds without tiles": ("-no_tiles -folds 4", "option -folds is for -tiles"),
    "outputs of folds without tiles": ("-no_tiles -coarse_data folds", "option -coarse_data is for -tiles"),
    "start of networks without folds": (
        "-start {run} -phase coarse -coarse_data folds", "trained on 3 folds, and these were on all samples only"),
    "restart of networks without folds": (
        "-restart {run} -phase coarse -coarse_data folds -folds 2", "trained on 2 folds, and these were on all"),
    "folds and other outputs": ("-restart {folded}", "folded.h5 has 3 folds and other outputs"),
    "dense net of no neurons": ("-coarse_net dense -coarse_widths 0", "-coarse_widths must be integers above 0"),
    "unknown coherent solver": ("-coherent_solver sgd", "unknown solver 'sgd'"),
    "coherent batch of too many": ("-phase coherent -coherent_batch_size 121", "-coherent_batch_size must be at most"),
    "coarse net eliminated by lbfgs": (
        "-phase coherent -coherent_coarse eliminated -coherent_solver lbfgs", "is for -coherent_solver tr"),
    "coarse net eliminated by adam": (
        "-phase coherent -coherent_coarse eliminated -coherent_solver adam", "evaluated last; got adam"),
    "coarse net eliminated by a Schwarz method": (
        "-phase coherent -coherent_coarse eliminated -coherent_solver apts_weights", "got apts_weights"),
    "coarse net eliminated and frozen": (
        "-phase coherent -coherent_coarse eliminated -freeze coarse", "-freeze coarse leaves one of both as it is"),
    "coarse net eliminated of frozen networks": (
        "-phase coherent -coherent_coarse eliminated -freeze local", "-freeze local leaves one of both"),
    "coarse net eliminated of a large net": (
        "-phase coherent -coherent_coarse eliminated -coarse_net dense -coarse_widths 25000", "keeps no trial point"),
    "coarse net eliminated without tiles": ("-no_tiles -coherent_coarse eliminated", "option -coherent_coarse is for"),
    "coarse net of another word": ("-coherent_coarse solved", "must be one of trained, eliminated"),
    "iterations without elimination": (
        "-phase coherent -coherent_coarse_iterations 5", "-coherent_coarse_iterations is for -coherent_coarse elim"),
    "no iterations": (
        "-coherent_coarse eliminated -coherent_coarse_iterations 0", "coarse_iterations must be 1 or more"),
    "iterations in words": (
        "-coherent_coarse eliminated -coherent_coarse_iterations many", "coarse_iterations must be an integer"),
    "option of another coherent solver": ("-phase coherent -coherent_sub_memory 3", "unknown option -coherent_sub"),
    "a damaged network": ("-restart {damaged}", "damaged.h5.nets/02.h5 is damaged"),
    "networks of another run": ("-restart {mixed}", "mixed.h5.nets/00.h5 is of seed 4, not 0"),
    "a run file that says nothing": ("-restart {silent}", "does not say what its networks have come to"),
    "fewer outputs than networks": ("-restart {fewer}", "has outputs of 3 networks, there are 4"),
    "fewer histories than networks": ("-restart {forgetful}", "has outputs of 3 networks, there are 4"),
}  # fmt: skip
RENAMED = """

def renamed():
    from ddml.data import files

    d = files.digits()
    return {**{n: a[:120] if "test" not in n else a for n, a in d.arrays().items()}, "classes": list("abcdefghij")}
"""
QUIET = ("-progress", "none", "-max_it", 3, "-phase", "local")


def build_modules() -> list[nn.Module]:
    """The networks of these digits."""
    with begun(MPI.COMM_SELF, *DIGITS) as (settings, _, _):
        tiles = Tiles((1, 8, 8), 2, 1)
        return [module for module, _ in build_local(settings, tiles.shapes, 10, tiles.narrowing)]


@pytest.fixture(scope="module")
def made(module_tmp: Path) -> Path:
    """A folder with run files that are good, and such that are not."""
    comm = MPI.COMM_WORLD
    assert call("classify", *DIGITS, *QUIET, "-output", module_tmp / "run.h5") == 0
    assert call("classify", *DIGITS[4:], *QUIET[:-2], "-output", module_tmp / "undivided.h5") == 0
    assert call("classify", *DIGITS, *QUIET, "-seed", 4, "-output", module_tmp / "mixed.h5") == 0
    comm.barrier()
    if comm.rank == 0:
        (module_tmp / "mine.py").write_text(USER + RENAMED)
        (module_tmp / "networks.py").write_text(NETWORKS)
        nets = {path.name: path.read_bytes() for path in sorted((module_tmp / "run.h5.nets").glob("*.h5"))}
        header = run_file.inspect(str(module_tmp / "run.h5"), MPI.COMM_SELF)
        modules = build_modules()
        for name in ("damaged", "mixed", "silent", "fewer", "forgetful", "folded", "left"):
            whole = Whole.read(str(module_tmp / "run.h5"), modules, MPI.COMM_SELF)
            if name in ("damaged", "mixed"):
                whole.phases = []
            if name == "fewer":
                whole.logits["test"] = whole.logits["test"][:3]
            if name == "forgetful":
                whole.nets = whole.nets[:3]
            if name == "folded":
                whole.folds = 3
            if name == "silent":
                whole.nets = None  # type: ignore[assignment]
            attributes = {k: v for k, v in header.attributes.items() if not k.endswith("version") and k != "ranks"}
            attributes.pop("format", None)
            if name != "left":
                whole.write(str(module_tmp / f"{name}.h5"), modules, modules[0], attributes, MPI.COMM_SELF)
            (module_tmp / f"{name}.h5.nets").mkdir(exist_ok=True)
            for file, data in nets.items():
                if name == "damaged" and file == "02.h5":
                    data = data[:-9] + bytes([data[-9] ^ 1]) + data[-8:]
                if (name, file) != ("left", "00.h5") and name != "mixed":
                    (module_tmp / f"{name}.h5.nets" / file).write_bytes(data)
    comm.barrier()
    return module_tmp


def command(made: Path, text: str) -> list[str]:
    """The command line."""
    names = ("run", "undivided", "damaged", "mixed", "silent", "fewer", "forgetful", "folded")
    files = {name: made / f"{name}.h5" for name in names}
    words = text.format(folder=made, user=made / "mine.py", networks=made / "networks.py", **files).split()
    pairs = [] if "-restart" in words else list(zip(DIGITS[::2], DIGITS[1::2], strict=True))
    if "-no_tiles" in words:
        words.remove("-no_tiles")
        pairs = pairs[2:]
    left_out = {*words, *(["-samples"] if "-data" in words else [])}
    settings = [word for pair in pairs if pair[0] not in left_out for word in pair]
    overwrite = [] if {"-restart", "-output"} & set(words) else ["-output", str(made / "run.h5"), "-overwrite"]
    return [*settings, *words, *overwrite, "-max_it", "3"]


@pytest.mark.parametrize("name", WRONG)
def test_bad_input_is_named_in_one_line_on_all_ranks(name: str, made: Path, capfd: pytest.CaptureFixture[str]) -> None:
    options, expected = WRONG[name]
    begin = time.monotonic()
    check_refusal("classify", command(made, options), expected, made, capfd)
    assert time.monotonic() - begin < 30  # of a machine that does other things


@started
def test_a_driver_that_refuses_prints_one_line_and_ends_with_1(made: Path) -> None:
    options, expected = WRONG["a damaged network"]
    check_refusal_of_a_start("classify", command(made, options), expected, made)


@pytest.mark.parametrize(("name", "row"), [("inputs", 3), ("test_inputs", 1), ("held_inputs", 0)])
def test_numbers_that_are_not_finite_are_refused_before_anything_is_changed(
    name: str, row: int, comm: MPI.Comm, shared_tmp: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """In the last tile, of a file that each rank reads its tiles of."""
    path, output = shared_tmp / "data.h5", shared_tmp / "run.h5"
    words = ("-data", str(path), "-network", "vgg", "-depth", "1", "-width", "2", "-tiles", "2x2", "-max_it", "2")
    if comm.rank == 0:
        rng = np.random.default_rng(0)
        with h5py.File(path, "w") as file:
            file.attrs["classes"] = ["a", "b"]
            for part, count in (("inputs", 8), ("test_inputs", 4), ("held_inputs", 4)):
                file[part] = rng.standard_normal((count, 1, 9, 8))
                file[part.replace("inputs", "labels")] = np.arange(count) % 2
    comm.barrier()
    assert call("classify", *words, "-output", output) == 0
    comm.barrier()
    if comm.rank == 0:
        with h5py.File(path, "r+") as file:
            file[name][row, 0, 8, 7] = np.nan
    comm.barrier()
    expected = f"data, tile 4:9 x 4:8: {name} must be finite; sample {row} has NaN or infinity"
    check_refusal("classify", [*words, "-output", str(output), "-overwrite"], expected, shared_tmp, capfd)


def test_what_is_in_the_way_goes_with_overwrite(comm: MPI.Comm, shared_tmp: Path) -> None:
    path = shared_tmp / "run.h5"
    assert call("classify", *DIGITS, *QUIET, "-seed", 2, "-output", path) == 0
    comm.barrier()
    before = tree(shared_tmp)
    comm.barrier()
    assert "-overwrite" in refusal("classify", *DIGITS, *QUIET, "-output", path)
    assert call("classify", *DIGITS, *QUIET, "-check", "-overwrite", "-output", path) == 0
    comm.barrier()
    assert tree(shared_tmp) == before
    comm.barrier()
    assert call("classify", *DIGITS, *QUIET, "-overwrite", "-output", path) == 0
    comm.barrier()
    after = tree(shared_tmp)
    assert after.keys() == before.keys()
    assert not any(after[name] == before[name] for name in before if name.endswith(".h5"))
    comm.barrier()
