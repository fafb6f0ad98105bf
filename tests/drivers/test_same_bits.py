"""A run is the same to the last bit on 1, 2, 3, 4 and 8 ranks, with every solver of ours."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from launch import HERE, content, launch
from same_bits import CASES, MAINS, file_of


@pytest.fixture(scope="module")
def computed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], Path]:
    """The folder of what so many ranks compute of the cases of a problem."""

    @cache
    def folder(problem: str, ranks: int) -> Path:
        path = tmp_path_factory.mktemp(f"{problem}_{ranks}")
        result = launch(ranks, path, problem, driver=str(HERE / "same_bits.py"), timeout=500)
        assert result.rc == 0, result.out + result.err
        return path

    return folder


@pytest.mark.long
@pytest.mark.parametrize("problem", MAINS)
@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
def test_every_solver_computes_the_same_bits(computed: Callable[[str, int], Path], problem: str, ranks: int) -> None:
    alone, together = computed(problem, 1), computed(problem, ranks)
    differ = []
    for case in CASES[problem]:
        one, other = content(alone / file_of(case)), content(together / file_of(case))
        assert len(one.history["loss"]) > 2 and np.isfinite(one.theta).all(), case
        same = [one.history[name].tobytes() == other.history[name].tobytes() for name in ("loss", "gradient_norm")]
        if not (all(same) and one.theta.tobytes() == other.theta.tobytes()):
            differ.append(case)
    assert not differ
