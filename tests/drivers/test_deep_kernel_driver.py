"""kernel.py -solver deep: features go on to the last bit on any number of ranks; their machine is in the file."""

from pathlib import Path

import numpy as np
import pytest
import torch
from calling import call, refusal
from launch import assert_same, content
from mpi4py import MPI
from scipy.spatial.distance import cdist
from test_ranks import needs_three, train

from ddml.data.files import digits
from ddml.errors import InputError
from ddml.kernel_machines.expansion import KernelExpansion
from ddml.runs.opened import open_run

DEEP = ("-solver", "deep", "-network", "expansion", "-data", "digits", "-samples", 300, "-centres", 40, "-features", 4)


@pytest.mark.ranks
@needs_three
@pytest.mark.parametrize(
    "options",
    [
        (), ("-deep_solver", "ssbroyden", "-deep_objective", "held_out", "-subdomains", 4),
        ("-deep_solver", "lbfgs", "-deep_objective", "leave_one_out"), ("-samples", 120),
    ],
    ids=str,
)  # fmt: skip
def test_deep_kernels_go_on_to_the_last_bit_on_other_numbers_of_ranks(
    options: tuple[object, ...], comm: MPI.Comm, shared_tmp: Path
) -> None:
    whole, parts = shared_tmp / "whole.h5", shared_tmp / "parts.h5"
    train("kernel", whole, 1, 4, *DEEP, *options)
    for ranks, iterations in ((1, 2), (3, 4)):
        train("kernel", parts, ranks, iterations, *DEEP, *options)
    assert_same(whole, parts)
    losses = content(whole).history["loss"]
    assert losses[-1] < 0.8 * losses[0]
    comm.barrier()


@pytest.mark.skipif(MPI.COMM_WORLD.size > 1, reason="one rank is enough")
def test_the_hidden_layer_of_a_classifier_is_trained_on(tmp_path: Path) -> None:
    classifier, path = tmp_path / "classifier.h5", tmp_path / "deep.h5"
    words = ("-data", "digits", "-samples", 300, "-progress", "none", "-max_it", 4)
    assert call("classify", *words, "-widths", "32,16", "-output", classifier) == 0
    assert call("kernel", *words, "-solver", "deep", "-network", classifier, "-error_interval", 1, "-output", path) == 0
    run = open_run(path)
    assert run.theta.numel() == 64 * 32 + 32 + 32 * 16 + 16
    assert run.history["accuracy"][-1] > open_run(classifier).history["accuracy"][-1]
    assert (np.diff(run.history["loss"]) <= 0).all()
    assert call("plot", path, "-o", tmp_path / "figure.png") == 0
    with pytest.raises(InputError, match="names a file"):
        run.network()
    inputs = digits().test_inputs
    outputs = run.network(network=str(classifier))(torch.from_numpy(inputs))
    right = float((outputs.argmax(dim=1).numpy() == digits().test_labels).mean())
    assert run.history["accuracy"][-1] == right
    assert call("predict", path, "-trust", "-o", tmp_path / "out.csv") == 0
    assert len((tmp_path / "out.csv").read_text().splitlines()) == len(inputs) + 1
    restart = ("-restart", path, "-progress", "none", "-max_it", 5)
    assert "a class of the run" not in refusal("kernel", *restart, "-network", tmp_path / "other.h5")
    assert call("kernel", *restart, "-trust") == 0


MODULE = """
import os
import signal
import torch


class Features(torch.nn.Sequential):
    def __init__(self, size):
        super().__init__(torch.nn.Linear(size, 6, dtype=torch.float64), torch.nn.Tanh())


calls = 0


class Stopped(Features):
    def forward(self, x):
        global calls
        calls += 1
        if calls == 60:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().forward(x)
"""


@pytest.mark.skipif(MPI.COMM_WORLD.size > 1, reason="one rank is enough")
@pytest.mark.parametrize("network", ["expansion", "module.py:Features"])
def test_the_machine_of_a_deep_run_is_in_its_file(network: str, tmp_path: Path) -> None:
    (tmp_path / "module.py").write_text(MODULE)
    path, name = tmp_path / "run.h5", network.replace("module", f"{tmp_path}/module")
    words = (*DEEP[:2], "-network", name, *DEEP[4:], "-max_it", 3, "-error_interval", 1, "-progress", "none")
    assert call("kernel", *words, "-output", path) == 0
    run, data = open_run(path), digits()
    module = run.network(trust=True)
    assert not isinstance(module.network.features, KernelExpansion)
    outputs = module(torch.from_numpy(data.test_inputs))
    assert run.history["accuracy"][-1] == float((outputs.argmax(dim=1).numpy() == data.test_labels).mean()) > 0.5
    x, test = (torch.from_numpy(v.reshape(len(v), -1) / 16.0) for v in (data.inputs[:300], data.test_inputs))
    with torch.no_grad():
        phi, there = (module.network.features(part).numpy() for part in (x, test))
    width, shift = (float(run.options[key]) for key in ("kernel_width", "lambda"))
    K, across = (np.exp(-(cdist(a, phi) ** 2) / (2 * width**2)) for a in (phi, there))
    exact = across @ np.linalg.solve(K + shift * np.eye(300), np.eye(10)[data.labels[:300]] - 0.1)
    assert np.abs(outputs.detach().numpy() - exact).max() < 1e-2 * np.abs(exact).max()
    if network == "expansion":  # its rounding (5e-14 of the outputs) is more than an export may differ by: refused
        return
    assert call("export", path, "-trust", "-o", tmp_path / "machine.pt2") == 0
    exported = torch.export.load(tmp_path / "machine.pt2").module()
    given = torch.from_numpy(data.test_inputs).double()
    assert (exported(given) - outputs).abs().max() < 1e-9 * outputs.abs().max()


@pytest.mark.skipif(MPI.COMM_WORLD.size > 1, reason="one rank is enough")
def test_a_deep_run_that_was_stopped_has_no_machine_until_it_has_gone_on(tmp_path: Path) -> None:
    (tmp_path / "module.py").write_text(MODULE)
    path = tmp_path / "run.h5"
    words = (*DEEP[:2], "-network", f"{tmp_path / 'module.py'}:Stopped", *DEEP[4:], "-max_it", 8, "-progress", "none")
    assert call("kernel", *words, "-output", path) == 0
    assert 0 < len(content(path).history["loss"]) < 9
    with pytest.raises(InputError, match="has not come to its end"):
        open_run(path).network(trust=True)
    assert call("kernel", "-restart", path, "-trust", "-progress", "none") == 0
    assert len(content(path).history["loss"]) == 9
    assert open_run(path).network(trust=True).classes == tuple("0123456789")
