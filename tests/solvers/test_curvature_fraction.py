"""Second-order APTS with curvature measured on a part of the samples."""

from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
from classifiers import classifier
from mpi4py import MPI

Train = Callable[..., SimpleNamespace]


@pytest.mark.ranks
@pytest.mark.parametrize("model", ["hessian", "gauss_newton"])
@pytest.mark.parametrize("solver", ["apts_weights", "apts_data"])
def test_it_runs_and_is_the_same_on_one_rank(train: Train, solver: str, model: str) -> None:
    settings = {"model": model, "curvature_fraction": 0.5, "blocks": 6, "gathered": True}
    together = train(classifier(), solver, 5, **settings)
    alone = train(classifier(), solver, 5, comm=MPI.COMM_SELF, **settings)
    assert together.losses[-1] < 0.9 * together.losses[0] and (np.diff(together.losses) <= 0).all()
    assert together.losses == pytest.approx(alone.losses, rel=1e-8)
    whole = train(classifier(), solver, 5, **{**settings, "curvature_fraction": 1.0})
    assert np.abs(whole.losses - together.losses).max() > 1e-6  # half of the samples is another curvature
