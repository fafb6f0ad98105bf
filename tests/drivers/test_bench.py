"""The bench's map of solvers, on a small network."""

import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import calling  # noqa: F401  # the drivers' folder is on the path then
import pytest
from benches.tile_runs import Case
from launch import ROOT, launch

from ddml.errors import InputError


def bench(*given: str) -> list[list[str]]:
    """The cells of the rows that the bench prints, without the rules below headings."""
    done = launch(0, *given, driver="bench.py", timeout=300)
    assert done.rc == 0, done.out + done.err
    lines = [line for line in done.out.splitlines() if line.startswith("|") and not line.startswith("|-")]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]


@pytest.mark.long
def test_the_map_has_a_row_for_every_solver_and_delay() -> None:
    rows = bench("-only", "map", "-map_cases", "burgers-5x3", "-seconds", "2", "-delays", "0,5")[1:]
    expected = [("1", "0", "ssbroyden"), ("1", "0", "mspqn_dense")]
    expected += [("2", delay, solver) for delay in ("0", "5") for solver in ("ssbroyden", "in colours")]
    assert [tuple(row[2:5]) for row in rows] == expected
    synchronisations = [float(row[-1]) for row in rows]
    assert synchronisations[:2] == [0, 0]
    assert min(synchronisations[2:]) > 0
    assert max(synchronisations[4:]) < 1 / 0.005  # each of them takes that long
    assert all(float(row[-2]) > 0 for row in rows)


@pytest.mark.long
def test_the_map_of_classifiers() -> None:
    rows = bench("-only", "map", "-map_cases", "digits:mlp:400:800", "-seconds", "2", "-delays", "5")[1:]
    expected = [("1", "0", solver) for solver in ("tr", "napts")]
    expected += [(ranks, "5", solver) for ranks in ("2", "4") for solver in ("tr", "napts", "apts_data")]
    assert [tuple(row[2:5]) for row in rows] == expected
    assert max(float(row[-1]) for row in rows[2:]) < 1 / 0.005
    assert all(0.2 < float(row[-2]) <= 1 for row in rows)


@pytest.mark.long
def test_schwarz_methods_on_tiles_have_a_row_for_every_delay(tmp_path: Path) -> None:
    data = str(tmp_path / "images.h5")
    subprocess.run(
        [sys.executable, ROOT / "data" / "synthetic.py", "enlarged", "digits", "-factor", "4", "-o", data], check=True
    )
    given = ("-tiles_cases", "2x2:4", "-tiles_epochs", "2", "-tiles_schwarz_iterations", "3", "-delays", "0,5")
    rows = bench("-only", "tiles_schwarz", "-tiles_data", data, *given)[1:]
    methods = ["tr", "tr, coarse net eliminated", "apts_weights", "apts_weights, coarse phase"]
    assert [tuple(row[:2]) for row in rows] == [(delay, name) for delay in ("0", "5") for name in methods]
    for row in rows:
        assert 0 < float(row[2]) < 10
        assert 10 < float(row[3]) <= 100
        assert float(row[4]) == 3
        assert row[5] == "never" or float(row[5]) >= 0
    for first, second in zip(rows[:4], rows[4:], strict=True):
        assert first[2:8] == second[2:8]  # a delay changes seconds only
    assert float(rows[0][7]) >= 3


def test_classifiers_have_a_row_for_every_method_that_is_asked_for() -> None:
    methods = "napts modular,napts 2-norm,6 parts modular, 0.01"
    rows = bench("-only", "classifiers", "-classifiers", "digits:mlp:500", "-marks", "1,20", "-methods", methods)[1:]
    names = [row[0] for row in rows]
    assert names[:3] == ["apts_data 6 parts modular norm", "napts modular norm", "napts 2-norm"]
    assert names[3:] == [f"torch {name} 0.01" for name in ("adam", "sgd", "muon")]
    for _, first, second, critical, rejected, cost in rows:
        assert 0 <= float(first.split("/")[0]) <= 100
        assert 0 <= float(second.split("/")[0]) <= 100
        assert float(critical) > 0
        assert float(rejected) >= 0
        assert float(cost) > 0
    accuracies = {row[0]: float(row[2].split("/")[0]) for row in rows}
    assert accuracies["napts modular norm"] > 20  # chance is 10


@pytest.mark.long
def test_a_large_network_has_a_row_for_one_and_two_ranks_and_is_trained_in_little_memory() -> None:
    """In vectors of float64: 11.7 and 8.5 with all of a first-order method's, 6.3 and 4.4 without what can wait."""
    rows = bench("-only", "large", "-large_widths", "1200,1200", "-large_batch", "250", "-repeats", "1")[1:]
    assert [row[:2] for row in rows] == [["1", "2,395,210"], ["2", "2,395,210"]]
    for row in rows:
        assert all(float(cell) >= 0 for cell in row[2:5])
        assert float(row[5]) > 0
    assert float(rows[0][6]) < 7.5
    assert float(rows[1][6]) < 5.5


def test_levels_have_a_row_for_every_method_that_is_asked_for() -> None:
    methods = "0.01,refinement 16,no cascade, modular"
    case = "digits:euler:0:200:blocks=16:width=8"
    rows = bench("-only", "levels", "-levels_cases", case, "-marks", "2,12", "-levels_methods", methods)[1:]
    names = ["tr L-SR1, gamma y'y / s'y", "tr modular norm", "torch adam 0.01", "rmtr, refinement 16"]
    names += [f"rmtr, no cascade, {what}" for what in ("3 levels", "refinement 16", "shared radius, 3 levels")]
    names += ["cascade modular norm"]
    assert [row[0] for row in rows] == [*names, "mladagrad, refinement 16"]
    for row in rows:
        for cell in row[1:3]:
            accuracy, loss = (float(word) for word in cell.split("/"))
            assert 0 <= accuracy <= 100 and loss > 0
        for cell in row[3:5]:
            assert cell == "-" or 1 <= float(cell.split()[0]) <= 25
        assert float(row[-1]) > 0
    assert [row[3].split()[1] for row in rows[:1]] == ["(1.00)"]
    cycles = {row[0]: [int(word) for word in row[-2].split(",")] for row in rows}
    assert cycles["rmtr, no cascade, 3 levels"][0] > 0 == cycles["cascade modular norm"][0]


def test_a_case_of_levels_that_is_none_is_refused() -> None:
    done = launch(0, "-only", "levels", "-levels_cases", "digits:euler:0:nothing=3", driver="bench.py", fresh=True)
    assert done.rc == 1 and done.err.count("\n") == 1 and "a case has the option 'nothing'" in done.err


@pytest.mark.long
def test_what_optimizers_take_beside_the_closure() -> None:
    rows = bench("-only", "closures", "-repeats", "1")
    assert [row[:3] for row in rows[-8:-6]] == [["85614", "float64", "3"], ["85614", "float64", "10"]]
    assert all(float(number) > 0 for row in rows[-8:] for number in row[3:])


def test_prices_of_logistic_models_stand_beside_what_is_charged() -> None:
    rows = bench("-only", "prices", "-logistic_data", "digits:4:9,digits:0:1", "-repeats", "1")
    assert [row[0] for row in rows[1:3]] == [row[0] for row in rows[4:]] == ["digits:4:9", "digits:0:1"]
    assert rows[1][1:3] == ["287 x 64", "51%"]
    for row in rows[1:3]:
        assert all(float(cell) > 0 for cell in row[3:])
        assert float(row[8]) == 0.5
    assert all(cell.count(" + ") == 1 for row in rows[4:] for cell in row[1:])


def test_samples_are_counted_and_gaps_reached() -> None:
    rows = bench("-only", "samples", "-logistic_data", "digits:0:1", "-sample_fractions", "0.25:0.5")
    tables = [number for number, row in enumerate(rows) if row[0] == ""]
    assert [rows[number][1:] for number in tables[:2]] == [["TR", "ASTROM 25%", "SSN 25%"], ["TR", "ASTROM 25%"]]
    for begin, end in pairwise(tables):
        cells = {row[0]: [float(cell) for cell in row[1:]] for row in rows[begin + 1 : end] if row[0] != "not reached"}
        for iterations, G, H, C, F, W in zip(
            *(cells[name] for name in ("iterations", "gradients G", "Hessians H", "CG iterations C", "losses F",
                                       "W = G + 2 C + F / 3")), strict=True
        ):  # fmt: skip
            assert 1 < G <= iterations + 1 and 0 < H <= iterations and H <= C <= 20 * H
            assert abs(G + 2 * C + F / 3 - W) <= 0.02 * W
        assert cells["work / TR's"][0] == cells["W / TR's"][0] == 1.0
        assert cells["work / TR's"][1] == cells["of each seed"][1]
    found = {row[0]: row[1:] for row in rows[tables[2] + 1 :]}
    assert {"L-BFGS, 10 pairs", "TR", "ASTROM", "SSN 25%", "**MLVR**", "scipy's L-BFGS-B, 10 pairs"} < set(found)
    assert any(name.startswith("SVRG, rate") for name in found)
    for name in ("L-BFGS, 10 pairs", "TR", "**MLVR**", "scipy's L-BFGS-B, 10 pairs"):
        work = [float(cell) for cell in found[name][:4]]
        assert 1 < work[0] <= work[1] <= work[2] <= work[3] < 400
        assert work[2] == float(found[name][4])  # of one seed the worst is the median
    assert found["L-BFGS, 10 pairs"][6:] == ["1.00"] * 4
    ours, theirs = (float(found[name][2]) for name in ("L-BFGS, 10 pairs", "scipy's L-BFGS-B, 10 pairs"))
    assert 0.5 < ours / theirs < 2


DATA = """
import numpy as np

from ddml.data import files
from ddml.data.data_set import DataSet


def Enlarged():
    digits, ones = files.digits(), np.ones((1, 1, 4, 4), np.uint8)
    inputs, tests = np.kron(digits.inputs[:200], ones), np.kron(digits.test_inputs[:60], ones)
    return DataSet(inputs, digits.labels[:200], tests, digits.test_labels[:60], digits.classes, maximum=16)
"""


@pytest.mark.long
def test_tiles_have_rows_for_splits_and_coarse_nets_and_for_coherent_nets(tmp_path: Path) -> None:
    (tmp_path / "data.py").write_text(DATA)
    given = ("-tiles_data", f"{tmp_path}/data.py:Enlarged", "-tiles_cases", "2x2:1,2x2:2", "-tiles_epochs", "2")
    coherent = ("-tiles_transfer_epochs", "1", "-tiles_links", "logits", "-tiles_figures", str(tmp_path / "figures"))
    rows = bench("-only", "tiles", *given, *coherent)
    cases = ["2x2, overlap 1", "2x2, overlap 2"]
    assert [row[0] for row in rows] == ["tiles, overlap", *(c for c in cases for _ in range(2)), "tiles, overlap", *(
        c for c in cases for _ in range(2)
    )]  # fmt: skip
    for kind, row in zip(("linear", "dense") * 2, rows[1:5], strict=True):
        assert row[4] == kind
        assert all(0 <= float(row[i]) <= 100 for i in (2, 3, 5))
        assert float(row[8]) == pytest.approx(float(row[6]) + float(row[7]), abs=0.11)  # medians of one seed, rounded
        assert float(row[-1]) > 10  # vgg of half the width on a third of the pixels
    assert [row[1] for row in rows[6:]] == ["random values", "finished phases"] * 2
    assert sorted(path.name for path in (tmp_path / "figures").iterdir()) == ["tiles_fusions.png", "tiles_time.png"]


@pytest.mark.parametrize("case", ["4x4", ":2", "4x4:", "4x4:1,"])
def test_splits_without_an_overlap_are_refused(case: str) -> None:
    with pytest.raises(InputError, match="option -tiles_cases must be splits and overlaps as in 4x4:8,2x2:0"):
        [Case.parse(text) for text in case.split(",")]
