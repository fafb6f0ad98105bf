"""The bench of kernel machines: its rivals against dense solutions, its tables on a few digits."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import calling
import numpy as np
import pytest
from mpi4py import MPI
from scipy import linalg
from test_bench import bench

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "drivers"))
import bench as program
from benches import kernel_rivals as rivals
from benches.kernel_machines import Judge, Method, Task, cell, methods, nystrom, ours, subdomains
from benches.kernel_rivals import Problem, Watch
from benches.kernel_scaling import WorkClock, modelled, sizes_of, solved

from ddml.errors import InputError

Run = Callable[[Problem, Watch], None]
TASKS = {
    "rbf": Task.of("digits", 700, "rbf", 0.5, 1.0, 200),  # more than a block
    "laplace": Task.of("digits", 301, "laplace", 1.0, 0.1, 200),
    "matern32": Task.of("digits", 128, "matern32", 1.0, 0.3, 1),
}
EXACT: dict[str, Run] = {
    "KernelRidge": rivals.kernel_ridge,
    "conjugate gradients": rivals.plain,
    "Nystrom": partial(nystrom, share=0.1),
    "EigenPro": partial(rivals.eigenpro, epochs=400),
    "block descent": partial(rivals.block_descent, blocks=7, accelerated=False, epochs=2000),
    "ASkotch": partial(rivals.block_descent, blocks=7, accelerated=True, epochs=2000),
    "one part": partial(rivals.averaged, parts=1),
    "ours": ours,
    "ours, p = 16, float32": partial(ours, count=16, dtype="float32"),
    "ours, not kept": partial(ours, kept=False),
}


def dense(problem: Problem) -> tuple[np.ndarray, np.ndarray]:
    """K by its formula, and the solution."""
    d = np.sqrt(((problem.X[:, None] - problem.X[None]) ** 2).sum(axis=2)) / problem.width
    s = np.sqrt(3) * d
    K = {"rbf": np.exp(-(d**2) / 2), "laplace": np.exp(-d), "matern32": (1 + s) * np.exp(-s)}[problem.name]
    return K, linalg.solve(K + problem.shift * np.eye(len(K)), problem.Y, assume_a="pos")


@pytest.mark.parametrize("task", TASKS)
def test_matrices_are_those_of_the_kernel(task: str) -> None:
    problem = TASKS[task].problem
    K, _ = dense(problem)
    rows = np.random.default_rng(0).permutation(len(K))[:90]
    assert np.abs(problem.gram() - K).max() < 1e-12
    assert np.abs(problem.gram(rows) - K[np.ix_(rows, rows)]).max() < 1e-12
    assert np.abs(problem.gram(dtype="float32") - K).max() < 1e-5
    assert np.abs(problem.between(problem.X[:9], problem.X) - K[:9]).max() < 1e-12
    assert np.abs(problem.gram() - problem.gram().T).max() < 1e-14


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("name", EXACT)
def test_what_solves_the_problem_ends_at_the_dense_solution(name: str, task: str) -> None:
    problem = TASKS[task].problem
    watch = Method(name, EXACT[name]).watched(problem)
    _, exact = dense(problem)
    errors = [np.linalg.norm(alpha - exact) / np.linalg.norm(exact) for alpha in watch.iterates]
    assert errors[-1] < 1e-4
    assert errors[-1] == min(errors) or len(errors) > 5
    residuals, _ = Judge(TASKS[task]).of(watch.iterates)
    assert residuals[-1] <= 1.05e-6
    assert len(watch.times) == len(watch.products) == len(watch.iterates)
    assert watch.times == sorted(watch.times) and watch.products == sorted(watch.products)
    assert watch.times[-1] <= watch.total
    assert np.isnan(watch.setup) or 0 < watch.setup <= watch.times[0]


def test_eigenpro_in_float32_comes_as_near_as_that_allows() -> None:
    problem = TASKS["rbf"].problem
    watch = Method("", partial(rivals.eigenpro, dtype="float32", epochs=60)).watched(problem)
    residuals, _ = Judge(TASKS["rbf"]).of(watch.iterates)
    assert residuals[-1] < 1e-5
    assert watch.iterates[0].dtype == np.float32


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("centres", [20, 60])
def test_falkon_solves_the_equations_of_its_centres(centres: int, task: str) -> None:
    problem = replace(TASKS[task].problem, rtol=1e-12)
    watch = Method("", partial(rivals.falkon, centres=centres)).watched(problem)
    alpha = watch.iterates[-1]
    chosen = np.flatnonzero(alpha.any(axis=1))
    assert len(chosen) == centres
    K = dense(problem)[0][:, chosen]
    normal = K.T @ K + problem.shift * K[chosen]
    assert np.abs(normal @ alpha[chosen] - K.T @ problem.Y).max() < 1e-6 * np.abs(K.T @ problem.Y).max()
    assert watch.products == pytest.approx(2 * centres / len(K) * np.arange(1, len(watch.products) + 1))


def test_averaged_machines_are_means_of_their_own() -> None:
    problem = TASKS["laplace"].problem
    K, _ = dense(problem)
    (alpha,) = Method("", partial(rivals.averaged, parts=4)).watched(problem).iterates
    found = 0
    for part in np.array_split(np.random.default_rng(0).permutation(len(K)), 4):
        A = K[np.ix_(part, part)] + problem.shift / 4 * np.eye(len(part))
        found = found + K[:, part] @ np.linalg.solve(A, problem.Y[part]) / 4
    assert K @ alpha == pytest.approx(found, abs=1e-10)


def test_each_column_of_conjugate_gradients_has_its_own_steps() -> None:
    rng = np.random.default_rng(0)
    A = np.diag(np.arange(1.0, 9.0))
    Y = np.stack([np.eye(8)[2], np.zeros(8), rng.standard_normal(8)], axis=1)
    iterates = [x.copy() for x in rivals.conjugate_gradients(A.__matmul__, Y, 1e-12, 20)]
    assert iterates[0][:, 0] == pytest.approx(np.eye(8)[2] / 3)  # an eigenvector takes one
    assert (iterates[-1][:, 1] == 0).all()
    assert iterates[-1] == pytest.approx(Y / np.arange(1.0, 9.0)[:, None], abs=1e-10)
    assert len(iterates) == 8
    assert len(list(rivals.conjugate_gradients(A.__matmul__, Y, 1e-12, 3))) == 3


def test_the_stopwatch_stands_still_while_an_iterate_is_put_aside() -> None:
    def spin(seconds: float) -> np.ndarray:
        end = time.process_time() + seconds
        while time.process_time() < end:
            pass
        return np.zeros(3)

    watch = Watch()
    spin(0.02)
    watch.ready()
    watch.keep(1, spin, 0.3)
    spin(0.02)
    watch.keep(2, np.ones, 3)
    watch.stop()
    assert 0.02 <= watch.setup <= watch.times[0] < 0.15
    assert watch.times[0] + 0.02 <= watch.times[1] <= watch.total < 0.25
    assert [x.tolist() for x in watch.iterates] == [[0, 0, 0], [1, 1, 1]]


def test_judges_know_residuals_and_accuracies() -> None:
    task = TASKS["rbf"]
    K, exact = dense(task.problem)
    alphas = [scale * exact for scale in (0.0, 0.5, 1.0)] * 7  # more than are judged together
    residuals, accuracies = Judge(task).of(alphas)
    expected = [np.linalg.norm(task.problem.Y - (K + np.eye(len(K))) @ a) / np.sqrt(10) for a in alphas]
    assert residuals == pytest.approx(expected, abs=1e-12)
    x = task.problem.between(task.tests, task.problem.X)
    right = ((x @ exact * task.scales).argmax(axis=1) == task.labels).mean()
    assert accuracies[2::3] == pytest.approx(right)
    assert accuracies[1::3] == pytest.approx(right)
    assert right > 0.9


def test_classes_that_no_sample_is_of_are_never_right() -> None:
    task = Task.of("digits", 5, "rbf", 1.0, 0.1, 300)  # 0 to 4
    assert task.problem.Y.shape == (5, 5)
    assert set(task.labels) == {-1, 0, 1, 2, 3, 4}
    assert sum(task.accuracy(np.tile(np.eye(5)[i], (300, 1))) for i in range(5)) < 0.7


def libsvm(folder: Path) -> str:
    """Files of two classes, in a circle and outside."""
    rng = np.random.default_rng(0)
    for name, count in (("train", 80), ("test", 40)):
        points = rng.uniform(-1, 1, (count, 2))
        signs = np.where((points**2).sum(axis=1) < 0.6, 1, -1)
        lines = [f"{s:+d} 1:{x} 2:{y}" for s, (x, y) in zip(signs, points, strict=True)]
        (folder / name).write_text("\n".join(lines) + "\n")
    return f"{folder}/train:{folder}/test"


def test_two_classes_of_libsvm_files_are_one_column(tmp_path: Path) -> None:
    task = Task.of(libsvm(tmp_path), 70, "rbf", 0.3, 0.1, 30)
    assert task.problem.Y.shape == (70, 1) and len(task.labels) == len(task.tests) == 30
    watch = Method("", ours).watched(task.problem)
    residuals, accuracies = Judge(task).of(watch.iterates)
    assert residuals[-1] < 1e-6
    assert accuracies[-1] > 0.8
    with pytest.raises(InputError, match="81 samples were asked for"):
        Task.of(libsvm(tmp_path), 81, "rbf", 0.3, 0.1, 30)
    assert task.accuracy(np.where(task.labels == 1, 1.0, -1.0)[:, None]) == 1.0


def test_the_section_kernels_has_a_row_for_every_method(capsys: pytest.CaptureFixture[str]) -> None:
    rows = printed(capsys, "-only", "kernels", "-kernels_sizes", "300", "-kernels_repeats", "2")[1:]
    found = {row[0]: row[1:] for row in rows}
    assert list(found) == [method.name for method in methods(300, [0.025, 0.05, 0.1, 0.2])]
    for name, (setup, solve, total, products, residual, accuracy, near, small) in found.items():
        if setup != "-":
            assert float(setup) + float(solve) == pytest.approx(float(total), rel=0.02)
        assert float(products) >= 0 and 50 < float(accuracy) <= 100
        other = name.startswith(("Falkon", "averaged"))
        assert (residual == "-") == other
        assert small == "-" if other or float(residual) > 1e-6 else float(small) <= 1.001 * float(total)
        if residual != "-" and float(residual) < 1e-4:
            assert accuracy == found["KernelRidge"][5]
            assert 0 < float(near) <= 1.001 * float(total)
    assert float(found["KernelRidge"][4]) < 1e-12


def test_methods_are_chosen_by_words(capsys: pytest.CaptureFixture[str]) -> None:
    rows = printed(capsys, "-only", "kernels", "-kernels_sizes", "120,140", "-kernels_methods", "gradients,16**")
    names = ["", "KernelRidge", "conjugate gradients", "**ours, p = 16**"]
    assert [row[0] for row in rows] == names * 2


def test_iterations_by_sets_kernels_lambdas_and_subdomains(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    rows = printed(
        capsys, "-only", "kernels_iterations", "-kernels_sizes", "80", "-kernels_counts", "2,8",
        "-kernels_sets", f"digits,{libsvm(tmp_path)}", "-kernels_kernels", "rbf:0.5,laplace:1",
        "-kernels_lambdas", "0.1",
    )  # fmt: skip
    assert rows[0][2:] == ["none", "Nystrom", "p = 2", "p = 8"]
    labels = [f"{name}, {kernel}" for name in ("digits", "train") for kernel in ("rbf 0.5", "laplace 1")]
    assert [row[0] for row in rows[1:5]] == [row[0] for row in rows[6:]] == labels
    for row in rows[1:5]:
        none, rank, *counts = map(int, row[2:])
        assert 2 < max(counts) <= none and 2 < rank <= none
    for row in rows[6:]:
        ours_kept, rival_kept = row[2].split()[1], row[3].split()[1]
        assert ours_kept == row[6].split()[1]  # the same iterations, kept or not
        assert rival_kept[0] == "(" and row[4].endswith(" n")
        assert float(row[5]) > 0 and float(row[8]) > 0


@pytest.mark.long
def test_scaling_has_rows_for_ranks_and_its_models() -> None:
    rows = bench("-only", "kernels_scaling", "-kernels_sizes", "400")
    kinds = [kind for kind in ("strong", "n^2 / p", "n / p") for _ in range(3)]
    assert [row[0] for row in rows[1:10]] == kinds
    assert [row[1:4] for row in rows[1:4]] == [["1", "400", "1.00"], ["2", "400", "0.50"], ["4", "400", "0.25"]]
    assert [row[2] for row in rows[4:10]] == ["200", "283", "400", "100", "200", "400"]
    assert [float(row[3]) for row in rows[4:10]] == [1, 1, 1, 1, 2, 4]
    assert len({row[-1] for row in rows[1:4]}) == 1  # iterations do not depend on ranks
    for row in rows[1:10]:
        assert all(float(number) > 0 for number in row[4:])
        assert sum(map(float, row[4:7])) == pytest.approx(float(row[7]), rel=0.02)
    assert [row[0] for row in rows[11:15]] == ["build", "set-up", "iterations", "sum"]
    surfaces = {row[0]: list(map(float, row[1:])) for row in rows[16:19]}
    assert surfaces["4"][0] == pytest.approx(surfaces["4"][2], rel=0.1)
    assert [row[0] for row in rows[20:23]] == ["2", "4", "8"] and [row[0] for row in rows[24:]] == ["2", "4"]


def test_phases_are_timed_on_a_communicator_that_counts_what_is_spent_in_it() -> None:
    comm, problem = WorkClock(MPI.COMM_SELF), TASKS["laplace"].problem
    begin, aside = time.process_time(), comm.aside
    phases = solved(problem, comm)
    taken = time.process_time() - begin
    watch = Method("", partial(ours, count=16)).watched(problem)
    assert phases.iterations == len(watch.times) - 1
    assert min(phases.work) > 0 and all(work < 2 * clock + 0.05 for work, clock in zip(*phases[:2], strict=True))
    assert sum(phases.work) <= taken
    assert aside < comm.aside < aside + taken
    first = comm.now()
    with comm:
        end = time.process_time() + 0.1
        while time.process_time() < end:
            pass
    assert comm.now() < first + 0.05


def test_models_say_what_the_last_number_of_ranks_takes(capsys: pytest.CaptureFixture[str]) -> None:
    def seconds(ranks: int) -> list[float]:
        return [8 / ranks + 1, 4 / ranks, 2.0]

    modelled([seconds(1), seconds(2), [2 * t for t in seconds(4)]])
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    found = {row[0].strip(): [float(cell) for cell in row[1:]] for row in rows[1:]}
    assert found["build"] == [8, 1, 3, 6, 0.5]
    assert found["set-up"] == [4, 0, 1, 2, 0.5]
    assert found["iterations"] == [0, 2, 2, 4, 0.5]
    assert found["sum"] == [12, 3, 6, 12, 0.5]


def test_sizes_grow_with_the_ranks() -> None:
    assert [sizes_of(20_000, ranks)["n^2 / p"] for ranks in (1, 2, 4)] == [10_000, 14_142, 20_000]
    assert [sizes_of(20_000, ranks)["n / p"] for ranks in (1, 2, 4)] == [5_000, 10_000, 20_000]
    assert [subdomains(n) for n in (300, 2_048, 8_192, 20_000)] == [4, 4, 16, 32]
    assert [cell(x) for x in (1.0, 0.01234, 12345.0, float("nan"))] == ["1.00", "0.0123", "1.23e+04", "-"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["-kernels_sizes", "1438"], "1438 training samples were asked for, 'digits' has 1437"),
        (["-kernels_sizes", "1"], "the first 1 samples of 'digits' are of one class: take more"),
        (["-kernels_sizes", "some"], "option -kernels_sizes must be numbers above 0, as in 4,16; got 'some'"),
        (["-kernels_sizes", "0"], "option -kernels_sizes must be numbers above 0"),
        (["-kernels_sizes", "100,"], "option -kernels_sizes must be numbers above 0"),
        (["-kernels_kernel", "polynomial"], "kernels are compared that depend on distances: rbf, laplace"),
        (["-kernels_data", "a9a.gz"], "LIBSVM files are named as in a9a.gz:a9a.t.gz, to train and to test; got 'a9a"),
        (["-kernels_data", "no:such"], "no"),
        (["-kernels_width", "0"], "option -kernels_width must be more than 0"),
        (["-kernels_lambda", "0"], "option -kernels_lambda must be more than 0"),
        (["-only", "kernels_iterations", "-kernels_kernels", "rbf"], "must be kernels with widths as in rbf:0.5"),
        (["-only", "kernels_iterations", "-kernels_kernels", "rbf:wide"], "must be kernels with widths as in rbf:0.5"),
        (["-only", "kernels_iterations", "-kernels_lambdas", "-1"], "option -kernels_lambdas must be numbers above 0"),
        (["-only", "kernels_iterations", "-kernels_counts", "4.5"], "option -kernels_counts must be numbers above 0"),
        (["-only", "kernels_scaling", "-kernels_sizes", "2e3"], "option -kernels_sizes must be numbers above 0"),
    ],
)
def test_what_cannot_be_compared_is_refused(words: list[str], expected: str) -> None:
    given = words if words[0] == "-only" else ["-only", "kernels", *words]
    with calling.command_line("bench", given), pytest.raises(InputError) as raised:
        program.main(MPI.COMM_SELF)
    assert expected in str(raised.value)
    assert str(raised.value).count("\n") == 0


def printed(capsys: pytest.CaptureFixture[str], *given: str) -> list[list[str]]:
    """The cells of the rows that sections print, without the rules below headings."""
    with calling.command_line("bench", list(given)):
        assert program.main(MPI.COMM_SELF) == 0
    lines = [
        line for line in capsys.readouterr().out.splitlines() if line.startswith("|") and not line.startswith("|-")
    ]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
