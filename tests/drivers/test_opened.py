"""Run files opened from Python: history, options, and the network as it was in the run."""

import sys
from importlib.util import find_spec
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from calling import call
from launch import content
from mpi4py import MPI
from own_data import USER

import ddml
from ddml.data import files
from ddml.errors import InputError, RunFileError
from ddml.problems.pde.accuracy import SolutionError
from ddml.problems.pde.solution import Solution, tabulated
from ddml.runs.opened import OpenedRun

HERE = Path(__file__).parent
SCALED, FIELDS = f"{HERE}/scaled_problems.py", f"{HERE}/field_problems.py"
QUICK = ("-max_it", 1, "-points", 60, "-error_points", 50, "-test_points", 0, "-summation_blocks", 2,
         "-resample", "never", "-error_interval", 1, "-progress", "none")  # fmt: skip
SELF = MPI.COMM_SELF
WIDE_IMAGES = '{"shape":[1,1000000,1000000],"classes":["a","b"],"scaling":"none","shift":[0.0],"scale":[1.0]}'
WIDE = '{"shape":[1000000000],"classes":["a","b"],"scaling":"none","shift":[0.0],"scale":[1.0]}'

CASES = {
    "burgers": ("burgers",),
    "klein_gordon": ("klein_gordon", "-network", "residual", "-width", 8, "-depth", 2),
    "diffusion_advection": ("diffusion_advection", "-seed", 3),
    "allen_cahn": ("allen_cahn", "-dtype", "float32"),
    "a system": (f"{SCALED}:Lorenz",),
    "a complex system": (f"{FIELDS}:Complex",),
    "mapped inputs": (f"{SCALED}:Rod",),
    "mapped inputs and a sized field": (f"{SCALED}:RodOfTerms",),
    "an embed of its own": (f"{SCALED}:OwnEmbed",),
    "a coefficient": (f"{SCALED}:Measured",),
    "all inputs mapped": (f"{FIELDS}:MaskedExact", "-map_inputs", "always"),
}


def opened(folder: Path, *options: object, driver: str = "pinn") -> OpenedRun:
    """The run file of a short run."""
    path = folder / "run.h5"
    assert call(driver, *options, "-output", path, comm=SELF) == 0
    return ddml.open_run(path)


@pytest.mark.parametrize("case", CASES)
def test_the_network_is_that_of_the_run(case: str, tmp_path: Path) -> None:
    problem, *options = CASES[case]
    run = opened(tmp_path, "-problem", problem, *options, *QUICK)
    given = {"problem": str(problem)} if ":" in str(problem) else {}
    module, loss = run.network(**given), run.loss(**given)
    assert isinstance(module, Solution)
    low, high = np.array(loss.problem.bounds).T
    points = np.random.default_rng(0).uniform(low, high, (40, len(low)))
    found = module(torch.from_numpy(points).to(loss.dtype)).detach().numpy()
    expected = loss.fields(run.theta.to(loss.dtype), points)
    eps = 1e-14 if loss.dtype == torch.float64 else 1e-6
    np.testing.assert_allclose(found, expected, rtol=0, atol=eps * abs(expected).max())
    table = tabulated(loss, run.theta, points)
    for number, name in enumerate(loss.problem.fields):
        np.testing.assert_allclose(table[name], expected[:, number], rtol=0, atol=eps * abs(expected).max())
    # and the loss is that of the run: what was measured there comes out to the last bit
    error = SolutionError(loss, SELF, 50, 2)(run.theta.to(loss.dtype))
    assert all(value == run.history.last(name) for name, value in error.items())
    assert list(module.coefficients.values()) == run.theta[loss.tail].tolist()


def test_an_mlp_by_hand(tmp_path: Path) -> None:
    run = opened(tmp_path, "-problem", "klein_gordon", "-width", 5, "-depth", 2, *QUICK)
    theta, h = run.theta.numpy(), np.random.default_rng(0).uniform(0, 1, (2, 30))
    t, x = h * [[12], [1]]
    h, begin = np.stack([t, x]), 0
    for inputs, outputs in ((2, 5), (5, 5), (5, 1)):
        weight = theta[begin : begin + inputs * outputs].reshape(outputs, inputs)
        begin += inputs * outputs + outputs
        h = weight @ h + theta[begin - outputs : begin, None]
        h = np.tanh(h) if outputs == 5 else h
    problem = run.loss().problem
    lift, factor = (
        problem.lift(torch.from_numpy(t), torch.from_numpy(x)),
        problem.factor(*map(torch.from_numpy, (t, x))),
    )
    expected = lift.numpy() + factor.numpy() * h[0]
    found = run.network()(torch.from_numpy(np.stack([t, x], axis=1)))[:, 0].detach().numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-14 * abs(expected).max())


def test_derivatives_and_residuals_are_those_of_autograd(tmp_path: Path) -> None:
    run = opened(tmp_path, "-problem", f"{SCALED}:Rod", *QUICK)
    points = torch.tensor([[600.0, 0.02], [3000.0, 0.07], [10.0, 0.05]], dtype=torch.float64, requires_grad=True)
    u = run.network(trust=True)(points)
    (slope,) = torch.autograd.grad(u.sum(), points, create_graph=True)
    (bend,) = torch.autograd.grad(slope[:, 1].sum(), points)
    table = tabulated(run.loss(trust=True), run.theta, points.detach().numpy())
    by_t, by_xx = slope[:, 0].detach().numpy(), bend[:, 1].numpy()
    np.testing.assert_allclose(table["u.t"], by_t, rtol=1e-11)
    np.testing.assert_allclose(table["u.xx"], by_xx, rtol=1e-11)
    np.testing.assert_allclose(table["residual"], by_t - 1e-6 * by_xx, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("network", ["mlp", "euler_cnn", "resnet", "own", "older"])
def test_the_classifier_is_that_of_the_run(network: str, tmp_path: Path) -> None:
    user = tmp_path / "user.py"
    user.write_text(USER)
    data = ("-data", "digits", "-samples", 60, "-network", "mlp" if network == "older" else network)
    if network == "resnet":
        data = (*data, "-depth", 2)
    if network == "own":
        data = ("-data", f"{user}:rings", "-network", f"{user}:net", "-dtype", "float64")
    short = ("-batch_size", 0, "-max_it", 2, "-error_interval", 1, "-solver", "lbfgs", "-progress", "none")
    scaling = "unit" if network == "mlp" else "standard"
    run = opened(tmp_path, *data, "-scaling", scaling, *short, driver="classify")
    if network == "older":  # files that do not describe the inputs: the data are read again
        del run.attributes["inputs"]
    module = run.network(trust=network == "own")
    test = _test_samples(run, network)
    with torch.no_grad():
        outputs = module(torch.from_numpy(test[0]))
    found = float((outputs.argmax(1).numpy() == test[1]).mean())
    loss = torch.nn.functional.cross_entropy(outputs, torch.from_numpy(test[1]))
    assert found == run.history.last("accuracy")
    assert float(loss) == pytest.approx(run.history.last("test_loss"), rel=1e-14 if network == "own" else 1e-6)
    chances = module.probabilities(torch.from_numpy(test[0]))
    np.testing.assert_allclose(chances.sum(1), 1, rtol=1e-14)


@pytest.mark.parametrize("intercept", [False, True])
def test_the_logistic_model_is_that_of_the_run(intercept: bool, tmp_path: Path) -> None:
    words = ("-data", "digits", "-classes", "4,9", *["-intercept"] * intercept, "-batch_size", 0, "-max_it", 3)
    run = opened(tmp_path, *words, "-solver", "lbfgs", "-progress", "none", driver="logistic")
    dataset, module = files.load("digits", SELF), run.network()
    rows = np.isin(dataset.test_labels, [4, 9])
    samples, labels = torch.from_numpy(dataset.test_inputs[rows]), dataset.test_labels[rows]
    with torch.no_grad():
        found = np.array(module.classes)[module(samples).argmax(1).numpy()]
        loss = torch.nn.functional.cross_entropy(module(samples), torch.from_numpy((labels == 9).astype(int)))
    assert (found == labels.astype(str)).mean() == run.history.last("accuracy") > 0.5
    assert float(loss) == pytest.approx(run.history.last("test_loss"), rel=1e-13)


def _test_samples(run: OpenedRun, network: str) -> tuple[np.ndarray, np.ndarray]:
    dataset = files.load(run.data(trust=network == "own"), SELF)
    return dataset.test_inputs, dataset.test_labels


def test_any_number_of_ranks_writes_what_one_process_reads(good: Path) -> None:
    run, stored = ddml.open_run(good), content(good)
    assert run.attributes["ranks"] == MPI.COMM_WORLD.size
    assert run.theta.numpy().tobytes() == stored.theta.tobytes()
    found = run.network()(torch.tensor([[0.3, 0.4]], dtype=torch.float64))
    assert found.item() == pytest.approx(run.loss().fields(run.theta, np.array([[0.3, 0.4]]))[0, 0], rel=1e-14)


def test_history_and_options(good: Path) -> None:
    run, stored = ddml.open_run(str(good)), content(good)
    for name, column in stored.history.items():
        np.testing.assert_array_equal(run.history[name], column)
    assert run.options["width"] == "8" and run.options["problem"] == "burgers"
    for package, make in (("xarray", run.xarray), ("pandas", run.pandas)):
        if find_spec(package) is None:
            with pytest.raises(InputError, match=f"pip install {package}"):
                make()
        else:
            np.testing.assert_array_equal(np.asarray(make()["loss"]), stored.history["loss"])


def test_iteration_is_the_dimension_scale_of_all_columns(good: Path) -> None:
    with h5py.File(good) as file:
        history = file["history"]
        assert h5py.h5ds.is_scale(history["iteration"].id)
        assert h5py.h5ds.get_scale_name(history["iteration"].id) == b"iteration"
        for name in history.keys() - {"iteration"}:
            assert list(history[name].dims[0].values()) == [history["iteration"]]
        assert history["time"].attrs["units"] == "s"


@pytest.mark.skipif(find_spec("xarray") is None or find_spec("h5netcdf") is None, reason="needs xarray, h5netcdf")
def test_xarray_opens_the_file_by_itself(good: Path) -> None:
    import xarray

    with xarray.open_dataset(good, group="history", engine="h5netcdf") as history:
        assert dict(history.sizes) == {"iteration": 6} and history["time"].dtype == np.float64


def test_code_is_run_only_where_it_is_given_anew_or_trusted(tmp_path: Path) -> None:
    problem, trace = tmp_path / "user.py", tmp_path / "trace"
    text = f"import pathlib\npathlib.Path({str(trace)!r}).touch()\n" + Path(FIELDS).read_text()
    problem.write_text(text)
    run = opened(tmp_path, "-problem", f"{problem}:Base", *QUICK)
    trace.unlink()
    for name in [name for name in sys.modules if name.startswith("ddml_user")]:
        del sys.modules[name]
    with pytest.raises(InputError, match=r"names a file.*-problem.*-trust"):
        run.network()
    with pytest.raises(InputError, match="was written with -problem"):
        run.network(problem=f"{problem}:ScaledInput")
    assert not trace.exists()
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    problem.rename(moved / "user.py")
    with pytest.raises(InputError, match="there is no file"):
        run.network(trust=True)
    assert run.network(problem=f"{moved}/user.py:Base")(torch.zeros(1, 1).double()).shape == (1, 1)
    assert trace.exists()


def test_what_differs_is_refused(good: Path, tmp_path: Path) -> None:
    with pytest.raises(RunFileError, match="there is no run file"):
        ddml.open_run(tmp_path / "none.h5")
    for change, expected in (
        ({"option width": "9"}, "parameters of another network"),
        ({"option width": "100000"}, "its options ask for 10000100000 or more"),
        ({"option depth": "1000000000000"}, "its options ask for"),
        ({"driver": "classify", "inputs": WIDE, "option network": "mlp"}, "its options ask for 3200"),
        ({"driver": "classify", "inputs": WIDE, "option network": "euler", "option width": "99999"}, "options ask for"),
        ({"driver": "classify", "inputs": WIDE_IMAGES, "option network": "vgg"}, "its options ask for"),
        ({"driver": "classify", "inputs": WIDE_IMAGES, "option network": "cnn"}, "its options ask for"),
        (
            {"driver": "classify", "inputs": WIDE_IMAGES, "option network": "resnet", "option width": "9999999999999"},
            "its options ask for",
        ),
        (
            {"driver": "classify", "inputs": WIDE_IMAGES, "option network": "vgg", "option depth": "9999999999999"},
            "too deep for samples .* -depth 18",
        ),
        ({"option depth": "none"}, "-depth must be an integer"),
        ({"dtype": "float8"}, "dtype 'float8'"),
        ({"seed": "x"}, "seed 'x'"),
        ({"problem": "heat"}, "unknown problem"),
        ({"problem": "\x1b[31m.py:Evil"}, r"'\\x1b\[31m.py:Evil'"),
        ({"driver": "logistic"}, "does not describe its samples"),
        ({"driver": "logistic", "inputs": "{}"}, "not described by '{}'"),
        ({"driver": "rivals"}, "of driver 'rivals', not of 'pinn'"),
        ({"option scales": "[1]"}, "-scales must be"),
        ({"option width": "8\x1b[31m"}, r"-width '8\\x1b\[31m'"),
        ({"driver": "classify", "samples": "x", "option network": "mlp"}, "samples 'x'"),
        ({"driver": "classify", "samples": 60, "scaling": "x", "option network": "mlp"}, "scaling 'x'"),
    ):
        run = ddml.open_run(good)
        run.attributes.update(change)
        with pytest.raises(InputError, match=expected):
            run.network()
