"""export.py: networks of runs for other programs, equal to those in the run."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from calling import call, check_refusal
from own_data import USER

import ddml
from ddml.errors import InputError
from ddml.runs import exported

HERE = Path(__file__).parent
ROD, COMPLEX = f"{HERE}/scaled_problems.py:Rod", f"{HERE}/field_problems.py:Complex"
ONNX = all(find_spec(package) is not None for package in ("onnx", "onnxscript", "onnxruntime"))
SHORT = ("-max_it", 1, "-points", 60, "-error_points", 50, "-test_points", 0, "-progress", "none")
DIGITS = ("-samples", 60, "-batch_size", 0, "-max_it", 1, "-progress", "none")

USER_NETWORKS = """
import torch
from torch import nn


class Frozen(nn.Module):
    '''with a buffer and a frozen layer, both by chance'''

    def __init__(self, inputs, outputs):
        super().__init__()
        self.first, self.last = nn.Linear(inputs, 6).double(), nn.Linear(6, outputs).double()
        self.first.requires_grad_(False)
        self.register_buffer("shift", torch.rand(6).double())

    def forward(self, x):
        return self.last(torch.tanh(self.first(x) + self.shift))


class Branching(Frozen):
    def forward(self, x):
        return super().forward(x) * (2 if float(x.sum()) > 1e9 else 1)
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, list[str]]]:
    """Run files, and what is given anew with them."""
    folder = tmp_path_factory.mktemp("runs")
    user = folder / "user.py"
    user.write_text(USER + USER_NETWORKS)
    made = {
        "pinn": ("pinn", "-problem", "klein_gordon", "-width", 8, "-depth", 2, *SHORT),
        "scaled": ("pinn", "-problem", ROD, *SHORT),
        "system": ("pinn", "-problem", COMPLEX, *SHORT),
        "frozen": ("pinn", "-problem", "burgers", "-network", f"{user}:Frozen", "-seed", 5, *SHORT),
        "branching": ("pinn", "-problem", "burgers", "-network", f"{user}:Branching", *SHORT),
        "mlp": ("classify", *DIGITS),
        "cnn": ("classify", "-network", "euler_cnn", "-blocks", 2, "-scaling", "unit", *DIGITS),
    }
    for name, (driver, *options) in made.items():
        assert call(driver, *options, "-output", folder / f"{name}.h5") == 0
    anew = {"scaled": ["-problem", ROD], "system": ["-problem", COMPLEX], "branching": ["-trust"]}
    anew["frozen"] = ["-network", f"{user}:Frozen"]
    return {name: (folder / f"{name}.h5", anew.get(name, [])) for name in made}


def keywords(anew: list[str]) -> dict[str, object]:
    return {"trust": True} if anew == ["-trust"] else {o[1:]: v for o, v in zip(anew[::2], anew[1::2], strict=True)}


def inputs(module: torch.nn.Module) -> torch.Tensor:
    some = exported.example(module)
    return torch.cat([some, some.flip(0) * 0.7, some[:1]])  # as many rows as nobody has seen


@pytest.mark.parametrize("case", ["pinn", "scaled", "system", "frozen", "mlp", "cnn"])
def test_torch_files_give_the_same(
    case: str, runs: dict[str, tuple[Path, list[str]]], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run, anew = runs[case]
    module = ddml.open_run(run).network(**keywords(anew))
    x = inputs(module)
    expected = module(x).detach()
    assert call("export", run, "-o", tmp_path / "net.pt", *anew) == 0
    assert f"wrote {tmp_path / 'net.pt'}" in capfd.readouterr().out
    again = ddml.open_network(tmp_path / "net.pt", **keywords(anew))
    assert torch.equal(again(x), expected)
    stored = torch.load(tmp_path / "net.pt", weights_only=True)
    assert stored["state_dict"].keys() == module.state_dict().keys() and "open_network" in stored["how"]
    if case == "frozen":  # not the initial ones of this start, but those of the file
        stored["state_dict"]["network.shift"] += 1
        torch.save(stored, tmp_path / "other.pt")
        assert not torch.equal(ddml.open_network(tmp_path / "other.pt", **keywords(anew))(x), expected)
    if case in ("pinn", "system", "scaled", "cnn"):
        assert call("export", run, "-o", tmp_path / "net.pt2", *anew) == 0
        found = torch.export.load(tmp_path / "net.pt2").module()(x)
        eps = 1e-14 if expected.dtype == torch.float64 else 1e-6
        assert float((found - expected).abs().max()) <= eps * float(expected.abs().max())


@pytest.mark.long
def test_a_program_needs_neither_ddml_nor_the_users_file(
    runs: dict[str, tuple[Path, list[str]]], tmp_path: Path
) -> None:
    run, anew = runs["scaled"]
    module = ddml.open_run(run).network(**keywords(anew))
    exported.save(tmp_path / "net.pt2", ddml.open_run(run), module)
    text = (
        "import sys, torch; net = torch.export.load('net.pt2').module();"
        "print(net(torch.tensor([[600, 0.05]] * 3, dtype=torch.float64)).tolist()); assert 'ddml' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", text], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    expected = float(module(torch.tensor([[600, 0.05]], dtype=torch.float64)).detach())
    assert float(done.stdout.strip("[]\n").split("]")[0]) == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize("case", ["pinn", "cnn"])
def test_onnx_gives_the_same_in_single_precision(
    case: str, runs: dict[str, tuple[Path, list[str]]], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run, _ = runs[case]
    words = [str(run), "-o", str(tmp_path / "net.onnx")]
    if not ONNX:
        check_refusal("export", words, "pip install onnx onnxscript", tmp_path, capfd)
        return
    import onnxruntime

    assert call("export", *words) == 0
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx")
    module = ddml.open_run(run).network()
    x = inputs(module)
    (found,) = session.run(None, {session.get_inputs()[0].name: x.float().numpy()})
    expected = module(x).detach().numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * abs(expected).max())


def test_bad_input_is_named_in_one_line(
    runs: dict[str, tuple[Path, list[str]]], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (pinn, _), (scaled, _), (branching, _) = runs["pinn"], runs["scaled"], runs["branching"]
    (tmp_path / "net.pt2").write_text("of before")
    for words, expected in (
        ([pinn], "-o is missing"),
        ([pinn, "-o", "net.tflite"], "-o must be a file .pt, .pt2, .onnx"),
        ([pinn, "-o", "/dev/full"], "-o must be a file"),
        ([pinn, "-o", f"{tmp_path}/none/net.pt"], "no folder"),
        ([scaled, "-o", f"{tmp_path}/net.pt2"], "names a file"),
        ([scaled, "-o", f"{tmp_path}/net.pt2", "-problem", "heat.py:Rod"], "there is no file 'heat.py'"),
        ([branching, "-o", f"{tmp_path}/net.pt2", "-trust"], "torch.export cannot follow this network"),
        ([tmp_path / "net.pt2", "-o", f"{tmp_path}/net.pt"], "not a run file"),
        ([pinn, "-o"], "-o"),
    ):
        check_refusal("export", [str(word) for word in words], expected, tmp_path, capfd)


def test_torch_files_of_others_are_refused(runs: dict[str, tuple[Path, list[str]]], tmp_path: Path) -> None:
    path = tmp_path / "net.pt"
    run = ddml.open_run(runs["mlp"][0])
    exported.save(path, run, run.network())
    good = torch.load(path, weights_only=True)
    (tmp_path / "text.pt").write_text("weights")
    (tmp_path / "short.pt").write_bytes(path.read_bytes()[:900])
    torch.save({"weight": torch.ones(2)}, tmp_path / "other.pt")
    torch.save(good | {"parameters": [("a",)]}, tmp_path / "table.pt")
    torch.save(good | {"parameters": []}, tmp_path / "none.pt")
    torch.save(good | {"state_dict": {}}, tmp_path / "state.pt")
    torch.save({"format": Path("x")}, tmp_path / "objects.pt")
    torch.save({"format": "ddml network"}, tmp_path / "nothing.pt")
    for name in ("text", "short", "other", "table", "none", "state", "objects", "nothing", "missing"):
        with pytest.raises(InputError, match=f"{name}.pt") as said:
            ddml.open_network(tmp_path / f"{name}.pt")
        assert "\n" not in str(said.value)
