"""Advice on runs that stalled, by what their histories show."""

import re
from pathlib import Path

import numpy as np
import pytest

from ddml.runs.advice import REMEDIES, advise
from ddml.runs.history import History
from ddml.runs.limits import SIGNAL, in_words

FALLING = np.geomspace(1.0, 1e-3, 300)
STUCK = np.concatenate([np.geomspace(10.0, 1.0, 100), np.linspace(1.0, 0.9, 200)])
TIME = "max_time is reached"
DOCS = Path(__file__).parents[2] / "docs" / "convergence.md"


def history(losses: np.ndarray, **last: float) -> History:
    columns = {name: np.full(len(losses), value) for name, value in last.items()}
    return History.from_columns({"iteration": np.arange(len(losses)), "loss": losses, **columns})


@pytest.mark.parametrize(
    ("losses", "last", "reason", "rounding", "expected"),
    [
        (STUCK, {}, TIME, 0.0, "flat"),
        (STUCK, {"error": 0.65, "test_loss": 2.0}, "max_it is reached", 0.0, "flat"),
        (np.repeat(FALLING, 3), {}, TIME, 0.0, "steps refused"),
        (FALLING, {}, in_words(-6), 0.0, "steps refused"),
        (FALLING, {}, in_words(6), 0.0, "steps refused"),
        (FALLING, {"test_loss": 5.0}, TIME, 0.0, "loss on other points"),
        (FALLING * 1e-3, {"test_loss": 5.0, "error": 0.1}, in_words(-6), 0.0, "loss on other points"),
        (FALLING, {}, in_words(-6), 1e-2, "floor of rounding"),
        (np.concatenate([np.geomspace(1, 1e-6, 300), np.full(300, 1e-6) * np.linspace(1, 0.9, 300)]), {"error": 0.8},
         TIME, 0.0, "flat"),
    ],
)  # fmt: skip
def test_what_was_seen_has_a_name(
    losses: np.ndarray, last: dict[str, float], reason: str, rounding: float, expected: str
) -> None:
    found = advise(history(losses, **last), {}, reason, rounding)
    assert found is not None
    assert found.name == expected
    assert REMEDIES[expected] in str(found)


@pytest.mark.parametrize(
    ("losses", "last", "reason"),
    [
        (FALLING, {}, TIME),
        (STUCK, {"error": 1e-4}, TIME),
        (STUCK, {}, SIGNAL),
        (STUCK[:40], {}, TIME),
        (np.geomspace(1, 1e-8, 300), {"test_loss": 1e-6}, in_words(-6)),
        (np.geomspace(1, 1e-30, 300), {}, in_words(6)),
        (np.concatenate([np.geomspace(1, 1e-6, 300), np.full(300, 1e-6)]), {}, TIME),
        (STUCK[:0], {}, TIME),
    ],
)
def test_no_advice_where_it_went_well_or_has_hardly_begun(
    losses: np.ndarray, last: dict[str, float], reason: str
) -> None:
    assert advise(history(losses, **last), {}, reason) is None


def test_what_was_measured_at_the_end_counts() -> None:
    assert advise(history(STUCK), {"error": 1e-5}, TIME) is None
    found = advise(history(FALLING), {"test_loss": 1.0}, TIME)
    assert found is not None and found.name == "loss on other points"


def test_the_page_has_these_names() -> None:
    headings = re.findall(r"^## (.*)$", DOCS.read_text(), re.MULTILINE)
    assert [name for name in REMEDIES if name not in headings] == []
