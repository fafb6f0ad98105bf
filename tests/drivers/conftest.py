"""What the tests of the drivers share."""

from pathlib import Path

import pytest
from launch import SMALL, launch


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run file of a few iterations."""
    path = tmp_path_factory.mktemp("trained") / "run.h5"
    result = launch(2, "-solver", "lbfgs", *SMALL, "-max_it", 5, "-output", path)
    assert result.rc == 0, result.err
    return path
