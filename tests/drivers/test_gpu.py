"""The program that tries a GPU, without one."""

import os
import re
import shutil
import subprocess

import gpu
import pytest
import torch
from calling import MAIN, command_line, refusal  # first: drivers are on the path behind it
from launch import ROOT, launch, started
from mpi4py import MPI

MAIN["gpu"] = gpu.main

NO_CUDA = not torch.cuda.is_available()
SMALL = ["-device", "cpu", "-points", "1000", "-samples", "500", "-iterations", "1", "-repeats", "1"]


@pytest.mark.skipif(not NO_CUDA, reason="there is a GPU: make gpu tries it")
def test_without_cuda_it_says_so_in_one_line_and_ends_with_0(capfd: pytest.CaptureFixture[str]) -> None:
    for words in ([], ["-device", "cuda:3"], ["-points", "100"]):
        with command_line("gpu", words):
            assert gpu.main(MPI.COMM_WORLD) == 0
        said = capfd.readouterr().out
        assert MPI.COMM_WORLD.rank > 0 or re.fullmatch("no CUDA device, .*: nothing was tried\n", said), said


@pytest.mark.skipif(not NO_CUDA, reason="there is a GPU: make gpu tries it")
@started
def test_make_gpu_takes_an_interpreter_as_it_is() -> None:
    python, make = ROOT / ".venv" / "bin" / "python", shutil.which("make")
    if not python.exists() or make is None:
        pytest.skip("needs make and .venv")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("OMPI_", "PMIX_", "MAKE"))}
    done = subprocess.run(
        [make, "gpu", f"GPU_PYTHON={python}"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "nothing was tried" in done.stdout


@started
def test_on_the_cpu_the_program_tries_itself() -> None:
    done = launch(1, *SMALL, driver="gpu.py")
    assert done.rc == 0, done.out + done.err
    sections = re.findall("^## (.*)$", done.out, re.MULTILINE)
    assert len(sections) == 7
    assert "FAILS" not in done.out and "all right in" in done.out
    for said in ("| klein_gordon | float32 |", "| burgers | gauss_newton | 1 |", "| mlp | apts_data | 1 |"):
        assert said in done.out
    row = re.search(r"burgers 20x8, nested autograd \| 1000 \|(.*)", done.out)
    assert row and re.fullmatch(r"( ([\d.]+|-) \|){4} 1.5: (reached|missed) \|", row[1])
    together = done.out.partition("## Two ranks on one card")[2].partition("##")[0]
    assert together.count("at most 1e-11") == 4


@pytest.mark.skipif(NO_CUDA, reason="no GPU")
@started
def test_on_a_card_all_is_right() -> None:
    done = launch(1, "-device", "cuda", *SMALL[2:], driver="gpu.py")
    assert done.rc == 0 and "all right in" in done.out, done.out + done.err


def test_copies_are_read_from_a_trace_whoever_makes_them() -> None:
    def event(name: str, size: int) -> dict[str, object]:
        return {"ph": "X", "cat": "gpu_memcpy", "name": name, "args": {"device": 0, "bytes": size}}

    events = [
        event("Memcpy HtoD (Pageable -> Device)", 800), event("Memcpy DtoH (Device -> Pinned)", 8),
        event("Memcpy HtoD (Pinned -> Device)", 24), event("Memcpy DtoD (Device -> Device)", 9),
        {"ph": "X", "name": "aten::copy_", "args": {}}, {"ph": "M", "args": {"labels": "CPU"}},
    ]  # fmt: skip
    assert gpu.copied(events, "HtoD") == [800, 24] and gpu.copied(events, "DtoH") == [8]
    assert gpu.copied(events[4:], "HtoD") == []


def test_a_comparison_that_fails_is_shown_and_remembered() -> None:
    trial = gpu.Trial(None, torch.device("cpu"))
    assert trial.judge(1e-13, 1e-12) == "1.0e-13 (at most 1e-12)" and trial.right
    for wrong in (1e-3, float("nan"), float("inf")):
        trial.right = True
        assert "FAILS" in trial.judge(wrong, 1e-12) and not trial.right


@pytest.mark.parametrize(
    ("words", "expected"), [("-points 3", "-points"), ("-device gpu", "-device"), ("-iterations none", "-iterations")]
)
def test_wrong_options_are_named(words: str, expected: str) -> None:
    assert expected in refusal("gpu", *words.split())
