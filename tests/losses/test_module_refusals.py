"""Modules that cannot be trained, and samples that are not finite."""

import math
from collections.abc import Callable

import pytest
import torch
from hand_modules import INPUTS, LABELS, seeded, tied
from torch import Tensor, nn

from ddml.errors import InputError
from ddml.losses.module import ModuleLoss
from ddml.problems.classification import cross_entropy


def mixed() -> nn.Module:
    network = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3)).double()
    network[1].float()
    return network


def all_frozen() -> nn.Module:
    return nn.Linear(5, 3).double().requires_grad_(False)


class Aside(nn.Module):
    """Has parameters that nothing depends on."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :3]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (mixed, r"0.weight is of torch.float64, 1.weight of torch.float32"),
        (all_frozen, "no parameters to train: all have requires_grad False"),
        (lambda: nn.Identity(), "no parameters to train: it has none at all"),
        (Aside, "outputs do not depend on any parameter that is trained"),
        (lambda: nn.Linear(4, 3).double(), r"fails on inputs \(8, 5\) of torch.float64: RuntimeError: mat1 and mat2"),
        (lambda: nn.LazyLinear(3), "parameter weight has no shape yet"),
        (lambda: nn.Linear(5, 3).to(torch.complex128), "parameter weight is of torch.complex128: only real"),
    ],
)
def test_modules_that_cannot_be_trained_are_refused_in_words(make: Callable[[], nn.Module], words: str) -> None:
    with pytest.raises(InputError, match=words):
        ModuleLoss(make(), cross_entropy, INPUTS, LABELS)


@pytest.mark.parametrize(("bad", "said"), [(math.nan, "NaN"), (math.inf, "infinity")])
@pytest.mark.parametrize("row", [0, 5])
def test_a_sample_that_is_not_finite_is_named(bad: float, said: str, row: int) -> None:
    inputs = INPUTS.clone()
    inputs[row, 2] = bad
    with pytest.raises(InputError, match=f"^sample {row} has {said} in its inputs$"):
        ModuleLoss(seeded(lambda: nn.Linear(5, 3)), cross_entropy, inputs, LABELS)


def test_outputs_and_criteria_that_are_not_finite_are_named() -> None:
    class Root(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).sqrt()

    def criterion(outputs: Tensor, targets: Tensor) -> Tensor:
        return outputs.sum(dim=1) / (targets - 2)

    with pytest.raises(InputError, match=r"^sample 0 has finite inputs, but NaN in the network's outputs$"):
        ModuleLoss(seeded(lambda: Root(5, 3)), cross_entropy, INPUTS, LABELS)
    with pytest.raises(InputError, match=r"^sample 2 has finite outputs, but the criterion gives infinity$"):
        ModuleLoss(seeded(lambda: nn.Linear(5, 3)), criterion, INPUTS, LABELS)


def test_samples_behind_the_first_are_named_when_the_loss_is_not_finite() -> None:
    inputs, labels = INPUTS.repeat(2, 1), LABELS.repeat(2)
    inputs[44, 2] = math.nan
    loss = ModuleLoss(seeded(tied), cross_entropy, inputs, labels, batch=10)
    assert math.isnan(loss.value(loss.initial()))
    assert loss.explain(loss.initial()) == "sample 44 has NaN in its inputs"
    assert loss.explain(loss.initial() * math.nan) == "the parameters are NaN or infinite"
