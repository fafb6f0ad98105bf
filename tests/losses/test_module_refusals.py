"""Modules that cannot be trained, and samples that are not finite."""

import math
from collections.abc import Callable

import pytest
import torch
from hand_modules import INPUTS, LABELS, seeded, tied
from torch import Tensor, nn

from ddml.data.sample_sets import TensorSamples
from ddml.errors import InputError
from ddml.losses.module import ModuleLoss
from ddml.problems.classification import ClassificationLoss, cross_entropy


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


def squared(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).square().sum(1)


NETWORK, X, Y = seeded(lambda: nn.Linear(5, 2)), INPUTS, INPUTS[:, :2]


class Uncertain(nn.Module):
    """A criterion with parameters of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.log = nn.Parameter(torch.zeros(2, dtype=torch.float64))

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return ((outputs - targets).square() * torch.exp(-self.log) + self.log).sum(1)


CRITERIA: dict[str, tuple[Callable[..., object], str]] = {
    "penalty": (lambda o, t: squared(o, t) + NETWORK.weight.square().sum(), "beside the network's outputs"),
    "its own": (Uncertain(), "beside the network's outputs"),
    "errors": (lambda o, t: (o.argmax(1) != t.argmax(1)).double(), "no derivative by the network's outputs"),
    "detached": (lambda o, t: squared(o.detach(), t), "no derivative by the network's outputs"),
    "mean": (lambda o, t: squared(o, t).mean(), r"of 8 samples a tensor \(8,\), it gives \(\)"),
    "float": (lambda o, t: 1.0, "a tensor, it gives a float"),
    "complex": (lambda o, t: torch.complex(o[:, 0], t[:, 0]), "a real number, it gives torch.complex128"),
    "fails": (lambda o, t: squared(o, t[:, :1].T), r"fails on outputs \(8, 2\) and targets \(8, 2\) of torch.float64"),
    "spread": (lambda o, t: (o[:, :1] - t[:, 0]).square().mean(1), r"another loss .* shapes are \(8, 2\) and \(8, 2\)"),
}


@pytest.mark.parametrize("name", CRITERIA)
def test_criteria_that_make_no_loss_are_refused_in_words(name: str) -> None:
    criterion, words = CRITERIA[name]
    with pytest.raises(InputError, match=words):
        ModuleLoss(NETWORK, criterion, X, Y)


def test_criteria_may_have_what_is_not_trained() -> None:
    criterion = Uncertain().requires_grad_(False)
    loss = ModuleLoss(NETWORK, criterion, X, Y)
    assert loss.value(loss.initial()) == pytest.approx(float(squared(NETWORK(X), Y).mean()))


@pytest.mark.parametrize(
    ("inputs", "targets", "words"),
    [
        (X, Y[:29], r"as many samples, in their first dimension; got \(30, 5\) and \(29, 2\)"),
        (X[:9], Y, r"got \(9, 5\) and \(30, 2\)"),
        (X.tolist(), Y, "inputs must be a torch tensor, got a list"),
        (X, Y.numpy(), "targets must be a torch tensor, got a ndarray"),
    ],
)
def test_samples_that_do_not_fit_are_refused_in_words(inputs: Tensor, targets: Tensor, words: str) -> None:
    with pytest.raises(InputError, match=words):
        ModuleLoss(NETWORK, squared, inputs, targets)


class Shifting(nn.Linear):
    """Changes what it is given."""

    def forward(self, x: Tensor) -> Tensor:
        x -= 0.5
        return super().forward(x)


def test_a_network_that_changes_its_inputs_is_refused_and_they_stay() -> None:
    inputs = X.clone()
    with pytest.raises(InputError, match="changes its inputs"):
        ModuleLoss(seeded(lambda: Shifting(5, 2)), squared, inputs, Y)
    assert torch.equal(inputs, X)


@pytest.mark.parametrize(("evaluating", "remedy"), [(False, r"call the module's eval\(\)"), (True, "take out")])
def test_batch_statistics_are_refused_and_stay(evaluating: bool, remedy: str) -> None:
    norm = nn.BatchNorm1d(4, track_running_stats=not evaluating)
    network = seeded(lambda: nn.Sequential(nn.Linear(5, 4), norm, nn.Linear(4, 2)))
    network.train(not evaluating)
    before = [buffer.clone() for buffer in network.buffers()]
    with pytest.raises(InputError, match=f"depends on others .*{remedy}"):
        ModuleLoss(network, squared, X, Y)
    with pytest.raises(InputError, match="depends on others"):
        ClassificationLoss(network, TensorSamples(X, LABELS % 2), 2)
    assert all(torch.equal(*pair) for pair in zip(before, network.buffers(), strict=True))
