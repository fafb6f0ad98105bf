"""What samples are to a network, as a text in run files: to the last bit, or refused in one line."""

import json

import numpy as np
import pytest
from mpi4py import MPI

from ddml.data.data_set import DataSet
from ddml.data.inputs import Inputs
from ddml.data.scaling import SCALINGS, Scaling
from ddml.errors import InputError

GOOD = {"shape": [3, 2, 2], "classes": ["a", "b"], "scaling": "standard", "shift": [0.1], "scale": [1, 2, 3]}


@pytest.mark.parametrize("kind", SCALINGS)
def test_a_text_holds_it_to_the_last_bit(kind: str) -> None:
    x = np.random.default_rng(0).normal(size=(20, 3, 2, 2))
    labels = np.arange(20) % 2
    dataset = DataSet(x, labels, x, labels, classes=["a, b", 'c "d" \u00e9'], maximum=1 / 3)
    scaling = Scaling(dataset, kind, MPI.COMM_SELF)
    made = Inputs.of(dataset, scaling)
    assert Inputs.parsed(str(made)) == made
    assert made.shape == (3, 2, 2) and made.classes == dataset.classes
    assert made.scale == tuple(np.atleast_1d(scaling.scale).tolist())


@pytest.mark.parametrize(
    "text",
    [
        *("", "none", "[]", "3", "{}", "[" * 100_000, "\x1b[31m"),
        *(json.dumps({k: v for k, v in GOOD.items() if k != left_out}) for left_out in GOOD),
        *(json.dumps(GOOD | change) for change in (
            {"shape": []}, {"shape": [0, 2]}, {"shape": [-3, 2]}, {"shape": "x"}, {"shape": [1e400, 2]}, {"shape": 3},
            {"classes": []}, {"classes": ["\x1b[31m"]}, {"scaling": "other"},
            {"shift": [float("nan")]}, {"scale": [0.0]}, {"scale": [1, 0]},
            {"shift": [1, 2]}, {"shift": []}, {"scale": {}}, {"more": 1},
        )),
    ],
)  # fmt: skip
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="the inputs of a network are not described by") as said:
        Inputs.parsed(text)
    assert len(str(said.value)) < 300 and str(said.value).isprintable()


def test_what_is_changed_above_is_good() -> None:
    assert Inputs.parsed(json.dumps(GOOD)).scale == (1.0, 2.0, 3.0)
