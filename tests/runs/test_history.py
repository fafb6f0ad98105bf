"""The history table."""

import numpy as np
import pytest

from ddml.runs.history import COLUMNS, History


def test_columns_stand_in_their_documented_order() -> None:
    assert COLUMNS == (
        "iteration",
        "time",
        "loss",
        "test_loss",
        "gradient_norm",
        "step",
        "work",
        "work_critical",
        "error",
        "error_network_norm",
        "accuracy",
    )


def test_rows_come_back_in_order_and_what_was_not_given_is_nan() -> None:
    history = History()
    for row in range(1000):
        history.append(iteration=row, loss=1 / (row + 1), **({"error": 0.5} if row % 10 == 0 else {}))
    assert len(history) == 1000
    np.testing.assert_array_equal(history["iteration"], np.arange(1000.0))
    np.testing.assert_array_equal(history["loss"], 1 / np.arange(1.0, 1001))
    np.testing.assert_array_equal(np.isfinite(history["error"]), np.arange(1000) % 10 == 0)
    assert np.isnan(history["accuracy"]).all()
    assert history["loss"].dtype == np.float64


def test_a_column_is_a_copy() -> None:
    history = History.from_columns({"loss": [1.0, 2.0]})
    history["loss"][:] = 0
    np.testing.assert_array_equal(history["loss"], [1, 2])


def test_last() -> None:
    history = History()
    assert np.isnan(history.last("loss"))
    history.append(loss=3.0, error=0.1)
    history.append(loss=2.0)
    assert history.last("loss") == 2.0
    assert np.isnan(history.last("error"))


@pytest.mark.parametrize("use", [lambda h: h.append(los=1), lambda h: h["los"], lambda h: h.last("los")])
def test_an_unknown_name_is_refused_with_the_names_and_changes_nothing(use) -> None:
    history = History.from_columns({"loss": [1.0]})
    with pytest.raises(ValueError, match=r"no column 'los'.*gradient_norm"):
        use(history)
    assert len(history) == 1


def test_truncate_forgets_the_rows_behind() -> None:
    history = History.from_columns({"loss": np.arange(100.0), "error": np.arange(100.0)})
    history.truncate(40)
    history.append(loss=-1)
    np.testing.assert_array_equal(history["loss"], [*range(40), -1])
    assert np.isnan(history.last("error"))
    for rows in (-1, 42):
        with pytest.raises(ValueError, match=f"cannot keep {rows} rows of a history that has 41"):
            history.truncate(rows)


def test_from_columns_goes_on_where_the_columns_end() -> None:
    history = History.from_columns({"work": np.arange(64.0)})
    history.append(work=64)
    np.testing.assert_array_equal(history["work"], np.arange(65.0))
    assert np.isnan(history["loss"]).all()
    assert len(History.from_columns({})) == 0


def test_from_columns_refuses_what_is_no_table() -> None:
    with pytest.raises(ValueError, match=r"same length, not loss \(2,\), work \(3,\)"):
        History.from_columns({"loss": [1, 2], "work": [1, 2, 3]})
    with pytest.raises(ValueError, match="one-dimensional"):
        History.from_columns({"loss": [[1, 2]]})
    with pytest.raises(ValueError, match="no column 'lr'"):
        History.from_columns({"lr": [1]})


def test_repr_names_the_columns_in_use() -> None:
    assert repr(History.from_columns({"loss": [1.0]})) == "History(1 rows: loss)"
