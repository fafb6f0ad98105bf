"""Run files of classifiers of tiles: opened, predicted with and exported, they say what the run has said."""

import csv
from collections.abc import Callable
from copy import deepcopy
from itertools import pairwise
from pathlib import Path
from shutil import copy
from typing import Any

import numpy as np
import pytest
import torch
from calling import call, check_refusal
from mpi4py import MPI
from own_data import USER as SOLIDS
from petsc4py import PETSc
from tiled_runs import USER as FAILING
from tiled_runs import content

import ddml
from ddml.data import files
from ddml.decomposition.tiles import Tiles
from ddml.errors import InputError
from ddml.networks.fusions import FUSIONS
from ddml.problems.classification import Classifier
from ddml.runs import divided, run_file
from ddml.runs.rebuilt import Anew

SELF = MPI.COMM_SELF
ALL = "local,coarse,coherent"
NETWORK = """
import torch


class Net(nn.Module):
    '''with a frozen layer and a buffer, both by chance'''

    def __init__(self, shape, classes, width=4):
        super().__init__()
        self.first = nn.Conv3d(shape[0], width, 3, padding=1).requires_grad_(False)
        self.register_buffer("shift", torch.rand(width, 1, 1, 1))
        self.last = nn.Linear(width * shape[1] * shape[2] * shape[3], classes)

    def forward(self, x):
        return self.last(torch.tanh(self.first(x) + self.shift).flatten(1))
"""
DIGITS = ("-tiles", "2x3", "-tile_overlap", "1x0", "-tiles_padded", "-network", "vgg", "-depth", 1, "-width", 6,
          "-samples", 120, "-max_it", 25, "-rate", 1e-2, "-progress", "none")  # fmt: skip
COARSE = (
    "-fusion",
    "majority",
    "-coarse_net",
    "dense",
    "-coarse_widths",
    "5",
    "-coarse_decay",
    1e-3,
    "-link",
    "logits",
)
CUTS = {"solids": Tiles((1, 7, 8, 9), (2, 1, 2), (1, 0, 2)), "random": Tiles((1, 8, 8), 2)}
DIGITS_CUT = Tiles((1, 8, 8), (2, 3), (1, 0), padded=True)
# run files, and the classifiers that are in each
THERE = {
    "local": ("average", "majority"),
    "coarse": ("average", "majority", "coarse"),
    "coherent": ("average", "majority", "coarse", "coherent"),
    "solids": ("average", "majority", "coarse", "coherent"),
    "random": ("coherent",),
}
# the row of the history that has its accuracy, where the run's own -fusion is this one
ROWS = {("local", "average"): 1, ("coarse", "majority"): 1, ("coherent", "majority"): 2, ("solids", "coarse"): 2}
EACH = [(name, fusion) for name, there in THERE.items() for fusion in there]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run file behind each phase of a run of images, one of volumes, and one from random values."""
    path = tmp_path_factory.mktemp("tiles")
    user, run = path / "user.py", path / "run.h5"
    user.write_text(SOLIDS + NETWORK)

    def train(where: str, target: Path, *words: object) -> None:
        assert call("classify", where, target, *words, comm=SELF) == 0

    train("-output", run, *DIGITS, "-phase", "local")
    copy(run, path / "local.h5")
    train("-restart", run, "-phase", "local,coarse", *COARSE)
    copy(run, path / "coarse.h5")
    train("-restart", run, "-phase", ALL, "-coherent_max_it", 3)
    copy(run, path / "coherent.h5")
    train("-output", path / "solids.h5", "-data", f"{user}:solids", "-network", f"{user}:Net", "-dtype", "float64",
          "-tiles", "2x1x2", "-tile_overlap", "1x0x2", "-max_it", 25, "-phase", ALL, "-coherent_max_it", 3,
          "-coherent_coarse", "eliminated",
          "-coarse_decay", 1e-3, "-progress", "none")  # fmt: skip
    train("-output", path / "random.h5", "-tiles", 2, "-network", "vgg", "-depth", 1, "-width", 4, "-samples", 60,
          "-scaling", "unit", "-phase", "coherent", "-coherent_max_it", 3, "-coherent_solver", "adam",
          "-coherent_batch_size", 20, "-progress", "none")  # fmt: skip
    return path


def anew(folder: Path, name: str) -> dict[str, str]:
    """What is given anew with a run file."""
    return {"network": f"{folder}/user.py:Net"} if name == "solids" else {}


def words_of(given: dict[str, str]) -> list[str]:
    return [word for name, text in given.items() for word in (f"-{name}", text)]


def samples_of(folder: Path, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The test samples as they are stored, and their classes."""
    dataset = files.load(f"{folder}/user.py:solids", SELF) if name == "solids" else files.digits()
    return torch.from_numpy(dataset.test_inputs), torch.from_numpy(dataset.test_labels)


def by_hand(path: Path, fusion: str) -> Any:
    """The classes of the test samples by what a run file has, and the outputs of a coarse net, of numpy."""
    found = content(path)
    logits = found.state["logits"]["test"]
    if fusion != "coarse":
        return FUSIONS[fusion](torch.from_numpy(logits)).numpy()
    begin = next(p.offset for p in ddml.open_run(path).header.parameters if p.name.startswith("coarse."))
    theta = found.state["coarse_theta"] if b"coherent" in found.state["phases"] else found.theta[begin:]
    linked = logits.astype(float)
    if found.state["coarse"]["link"] == b"probabilities":
        linked = np.exp(linked) / np.exp(linked).sum(axis=2, keepdims=True)
    x, begin = linked.transpose(1, 0, 2).reshape(logits.shape[1], -1), 0
    classes = logits.shape[2]
    sizes = [x.shape[1], *([5] if found.attributes["option coarse_net"] == "dense" else []), classes]
    for number, (a, b) in enumerate(pairwise(sizes)):
        x = np.maximum(x, 0) if number else x
        x = x @ theta[begin : begin + a * b].reshape(b, a).T + theta[begin + a * b : begin + a * b + b]
        begin += a * b + b
    assert begin == len(theta)
    return x.argmax(axis=1)


@pytest.mark.parametrize(("name", "fusion"), EACH)
def test_it_says_what_the_run_has_said(name: str, fusion: str, folder: Path) -> None:
    path = folder / f"{name}.h5"
    run, (images, labels) = ddml.open_run(path), samples_of(folder, name)
    module, stored = run.network(fusion=fusion, **anew(folder, name)), content(path)
    assert isinstance(module, Classifier) and module.shape == tuple(images.shape[1:])
    with torch.no_grad():
        outputs = module(images)
    classes = outputs.argmax(dim=1)
    if fusion == "coherent":
        loss = torch.nn.functional.cross_entropy(outputs.double(), labels)
        assert float(loss) == pytest.approx(stored.history["test_loss"][-1], rel=1e-13 if name == "solids" else 1e-6)
        assert float((classes == labels).double().mean()) == stored.history["accuracy"][-1]
        return
    # what each network says of its tile, to the last bit
    cuts = CUTS.get(name, DIGITS_CUT)
    for tile, expected in enumerate(stored.state["logits"]["test"]):
        net = module.network.nets[tile]
        with torch.no_grad():
            found = net(cuts.cut(images, tile))
        assert isinstance(net, Classifier) and found.numpy().tobytes() == expected.tobytes()
    assert classes.tolist() == by_hand(path, fusion).tolist()
    if (name, fusion) in ROWS:
        row = list(stored.history["iteration"]).index(ROWS[name, fusion])
        assert float((classes == labels).double().mean()) == stored.history["accuracy"][row]
    chances = module.probabilities(images)
    np.testing.assert_allclose(chances.sum(1), 1, rtol=1e-13)
    assert torch.equal(chances.argmax(dim=1), classes)


@pytest.mark.parametrize(
    ("name", "option", "expected"),
    [("local", "None", "average"), ("local", "majority", "majority"), ("coarse", "None", "coarse"),
     ("coarse", "majority", "majority"), ("coarse", "average", "average"), ("coherent", "majority", "coherent"),
     ("random", "None", "coherent"), ("random", "average", "coherent")],
)  # fmt: skip
def test_without_a_word_it_is_what_the_run_has_come_to(name: str, option: str, expected: str, folder: Path) -> None:
    run, (images, _) = ddml.open_run(folder / f"{name}.h5"), samples_of(folder, name)
    run.attributes["option fusion"] = option
    assert torch.equal(run.network()(images), run.network(fusion=expected)(images))


def test_it_is_a_module_as_any_other(folder: Path) -> None:
    run, (images, _) = ddml.open_run(folder / "coarse.h5"), samples_of(folder, "coarse")
    drawn = torch.get_rng_state()
    module, other = run.network(fusion="coarse"), ddml.open_run(folder / "coherent.h5").network()
    assert torch.equal(torch.get_rng_state(), drawn)
    expected = module(images)
    other.load_state_dict(module.state_dict())  # scalings, too
    assert torch.equal(other(images), expected)
    double = module.to(torch.float64)
    assert double(images).dtype == torch.float64
    assert 0 < float((double(images) - expected).abs().max()) < 1e-4 * float(expected.abs().max())
    expected.sum().backward()
    with pytest.raises(InputError, match="these are tiles of samples"):
        module(torch.zeros(2, 1, 8, 9))


def test_histories_of_every_network(folder: Path) -> None:
    found, stored = ddml.open_run(folder / "coarse.h5").histories(), content(folder / "coarse.h5")
    assert list(found) == [*(f"nets.{i}" for i in range(6)), "coarse"]
    for tile in range(6):
        for column, values in stored.state["nets"][str(tile)]["history"].items():
            np.testing.assert_array_equal(found[f"nets.{tile}"][column], values)
        assert found[f"nets.{tile}"].last("iteration") == 25
    assert found["coarse"]["loss"].tolist() == stored.state["coarse"]["losses"].tolist()
    assert list(ddml.open_run(folder / "local.h5").histories()) == [f"nets.{i}" for i in range(6)]
    assert ddml.open_run(folder / "random.h5").histories() == {}
    assert ddml.open_run(folder / "run.h5.nets/coherent.h5").history.last("iteration") == 3


@pytest.mark.parametrize(("name", "fusion"), [("local", None), ("coarse", "coarse"), ("solids", "majority")])
def test_tables_of_test_samples_and_of_others(
    name: str, fusion: str | None, folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path, given = folder / f"{name}.h5", anew(folder, name)
    words = [*words_of(given), *([] if fusion is None else ["-fusion", fusion])]
    data = ("-data", f"{folder}/user.py:solids") if name == "solids" else ()
    assert call("predict", path, "-o", tmp_path / "out.csv", *words, *data) == 0
    with (tmp_path / "out.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    module, (images, labels) = ddml.open_run(path).network(fusion=fusion, **given), samples_of(folder, name)
    expected = by_hand(path, fusion or "average")
    assert [row["class"] for row in rows] == [module.classes[k] for k in expected]
    assert f"accuracy {(expected == labels.numpy()).mean():.4f}" in capfd.readouterr().out
    np.save(tmp_path / "some.npy", images[3:9].numpy())
    assert call("predict", path, "-at", tmp_path / "some.npy", "-o", tmp_path / "some.npz", *words) == 0
    with np.load(tmp_path / "some.npz") as arrays:
        assert "label" not in arrays
        for number, label in enumerate(module.classes):
            chances = module.probabilities(images[3:9])[:, number]
            np.testing.assert_array_equal(arrays[f"probability {label}"], chances)


@pytest.mark.parametrize(
    ("name", "fusion", "suffixes"),
    [("coherent", "majority", ("pt", "pt2")), ("coherent", None, ("pt",)),
     ("solids", "coarse", ("pt", "pt2"))],
)  # fmt: skip
def test_other_programs_get_the_same(
    name: str, fusion: str | None, suffixes: tuple[str, ...], folder: Path, tmp_path: Path
) -> None:
    given, (images, _) = anew(folder, name), samples_of(folder, name)
    words = [*words_of(given), *([] if fusion is None else ["-fusion", fusion])]
    with torch.no_grad():
        expected = ddml.open_run(folder / f"{name}.h5").network(fusion=fusion, **given)(images)
    for suffix in suffixes:
        assert call("export", folder / f"{name}.h5", "-o", tmp_path / f"net.{suffix}", *words) == 0
    again = ddml.open_network(tmp_path / "net.pt", **given)
    assert torch.equal(again(images), expected)
    assert not again.network.nets[0].network.training
    if name == "solids":
        with pytest.raises(InputError, match="names a file"):
            ddml.open_network(tmp_path / "net.pt")
    if "pt2" in suffixes:
        found = torch.export.load(tmp_path / "net.pt2").module()(images.to(next(again.parameters())))
        eps = 1e-13 if expected.dtype == torch.float64 and fusion == "coarse" else 1e-6
        assert found.dtype == expected.dtype
        assert float((found - expected).abs().max()) <= eps * float(expected.abs().max())


def test_torch_files_of_others_are_refused(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "net.pt"
    assert call("export", folder / "coarse.h5", "-o", path) == 0
    good = torch.load(path, weights_only=True)
    changes: tuple[dict[str, Any], ...] = (
        {"link": "x", "fusion": "coarse"}, {"fusion": "x", "link": "logits"}, {"fusion": ["coarse"]}, {"image": "x"},
        {"inputs": []}, {"inputs": [1] * 6},
    )  # fmt: skip
    for number, tiles in enumerate(({}, {"fusion": "coarse"}, 5, *(good["tiles"] | change for change in changes))):
        torch.save(good | {"tiles": tiles}, tmp_path / f"other{number}.pt")
        with pytest.raises(InputError) as said:
            ddml.open_network(tmp_path / f"other{number}.pt")
        assert "\n" not in str(said.value)


@pytest.fixture(scope="module")
def state(folder: Path) -> dict[str, Any]:
    """That of the run file behind all phases."""
    x = ddml.open_run(folder / "coherent.h5").theta
    vector = PETSc.Vec().createSeq(len(x))
    found, _ = run_file.read(str(folder / "coherent.h5"), vector)
    vector.destroy()
    return found


STATES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "older": (lambda s: s.pop("inputs"), "is of an older ddml"),
    "no phases": (lambda s: s.pop("phases"), "does not say what its networks have come to"),
    "phases of numbers": (lambda s: s.update(phases=3), "does not say what its networks have come to"),
    "no parameters of before": (lambda s: s.pop("local"), "does not say what its networks have come to"),
    "parameters of words": (lambda s: s.update(local="x"), "does not say what its networks have come to"),
    "fewer parameters": (lambda s: s.update(local=s["local"][1:]), "holds 2752 parameters where there should be 2753"),
    "fewer inputs": (lambda s: s["inputs"]["tiles"].pop(), "describes the inputs of 5 networks, its tiles are 2x3"),
    "inputs of another tile": (lambda s: s["inputs"]["tiles"].__setitem__(1, s["inputs"]["image"]), "inputs of other"),
    "a number of inputs": (lambda s: s["inputs"].update(tiles=5), "does not say what its networks have come to"),
    "inputs of numbers": (lambda s: s["inputs"].update(tiles=[5] * 6), "does not say what its networks have come to"),
    "no image": (lambda s: s["inputs"].pop("image"), "does not say what its networks have come to"),
    "inputs that are a number": (lambda s: s.update(inputs=5), "does not say what its networks have come to"),
    "no inputs": (lambda s: s["inputs"]["tiles"].__setitem__(1, "{}"), "not described by '{}'"),
    "another image": (lambda s: s["inputs"].update(image=s["inputs"]["tiles"][0]), "inputs of other networks"),
    "another link": (lambda s: s["coarse"].update(link="x"), "the link must be one of"),
}


@pytest.mark.parametrize("case", STATES)
def test_states_of_others_are_refused(case: str, state: dict[str, Any], folder: Path) -> None:
    change, expected = STATES[case]
    run, other = ddml.open_run(folder / "coherent.h5"), deepcopy(state)
    change(other)
    with pytest.raises(InputError, match=expected) as said:
        what = divided.described(run.path, run.header, other, "coarse")
        theta = divided.parameters(run.path, other, run.theta, "coarse")
        divided.classifier(run.path, run.header, theta, Anew(), what)
    assert "\n" not in str(said.value)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"option tiles": "3x3"}, "inputs of 6 networks, its tiles are 3x3"),
        ({"option tiles": "1000000x1000000"}, "its tiles are 1000000x1000000"),
        ({"option tiles": "2x3x1"}, "does not fit an image"),
        ({"option tiles": "x"}, "-tiles must be an integer"),
        ({"option tile_overlap": "2"}, "inputs of other networks"),
        ({"option tiles_padded": "false"}, "inputs of other networks"),
        ({"option tiles_padded": "perhaps"}, "-tiles_padded must be true or false"),
        ({"option local_width": "99999999"}, "its options ask for"),
        ({"option width": "4"}, "parameters of another network"),
        ({"option depth": "9"}, "too deep for samples"),
        ({"option network": "mlp"}, "has no width that local networks"),
        ({"option network": "other.py:Net"}, "names a file"),
        ({"dtype": "float8"}, "dtype 'float8'"),
        ({"driver": "pinn"}, "of driver 'pinn'|unknown problem"),
    ],
)
def test_what_differs_is_refused(change: dict[str, str], expected: str, folder: Path) -> None:
    run = ddml.open_run(folder / "coarse.h5")
    run.attributes.update(change)
    with pytest.raises(InputError, match=expected) as said:
        run.network()
    assert "\n" not in str(said.value)


def test_bad_input_is_named_in_one_line(
    folder: Path, good: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    np.save(tmp_path / "wide.npy", np.ones((2, 1, 8, 9)))
    np.save(tmp_path / "volumes.npy", np.ones((2, 1, 8, 8, 8)))
    (tmp_path / "user.py").write_text(FAILING)
    (tmp_path / "poison").write_text("(1, 4, 4)")
    short = ("-network", f"{tmp_path}/user.py:Net", "-width", 4, "-tiles", 2, "-samples", 60, "-progress", "none")
    with pytest.raises(InputError, match="loss"):
        call("classify", "-output", tmp_path / "begun.h5", *short, "-max_it", 40, comm=SELF)
    (tmp_path / "out.csv").write_text("of before")
    out, begun = ["-o", str(tmp_path / "out.csv")], tmp_path / "begun.h5"
    for path, more, expected in (
        (folder / "local.h5", ["-fusion", "coarse"], "no classifier by -fusion 'coarse': it has average, majority"),
        (folder / "coarse.h5", ["-fusion", "coherent"], "it has average, majority, coarse"),
        (folder / "random.h5", ["-fusion", "average"], "it has coherent"),
        (folder / "local.h5", ["-fusion", "vote"], "option -fusion must be one of coherent, coarse, average, majority"),
        (folder / "local.h5", ["-grid", "3"], "is of a classifier"),
        (folder / "local.h5", ["-at", f"{tmp_path}/wide.npy"], "must hold numbers (N, 1, 8, 8) or (N, 64)"),
        (folder / "local.h5", ["-at", f"{tmp_path}/volumes.npy"], "must hold numbers (N, 1, 8, 8) or (N, 64)"),
        (folder / "solids.h5", ["-at", f"{tmp_path}/wide.npy"], "names a file"),
        (folder / "solids.h5", words_of(anew(folder, "solids")), "names a file"),  # the data
        (folder / "run.h5.nets", [], "is a folder, not a run file"),
        (folder / "run.h5.nets/03.h5", ["-data", "digits"], "is of a part of a run with -tiles"),
        (folder / "run.h5.nets/coherent.h5", ["-at", f"{tmp_path}/wide.npy"], "is of a part of a run with -tiles"),
        (begun, ["-trust"], "has no classifier yet"),
        (good, ["-grid", "3", "-fusion", "average"], "option -fusion is for runs with -tiles"),
    ):
        check_refusal("predict", [str(path), *out, *more], expected, tmp_path, capfd)
    for path, more, expected in (
        (folder / "local.h5", ["-fusion", "coarse"], "no classifier by -fusion 'coarse'"),
        (folder / "solids.h5", [], "names a file"),
        (folder / "run.h5.nets/00.h5", [], "is of a part of a run with -tiles"),
        (begun, ["-trust"], "has no classifier yet"),
        (good, ["-fusion", "average"], "is of no classifier of tiles"),
    ):
        check_refusal("export", [str(path), "-o", f"{tmp_path}/net.pt", *more], expected, tmp_path, capfd)
    run = ddml.open_run(folder / "local.h5")
    run.attributes["option fusion"] = "coarse"
    with pytest.raises(InputError, match="no classifier by -fusion 'coarse'"):
        run.network()
    with pytest.raises(InputError, match="is of no classifier of tiles"):
        ddml.open_run(good).histories()
