"""The coarse phase: the same bits on any number of ranks, scikit-learn's minimum, which samples it uses, notes."""

from types import SimpleNamespace
from typing import Any

import calling  # noqa: F401  # the drivers' folder is on the path then
import numpy as np
import pytest
import torch
from mpi4py import MPI
from one_rank import on_one_rank
from tiled import coarse
from tiled.outputs import Accuracies, Outputs, accuracies, by_heart, few, gap

from ddml.errors import InputError
from ddml.networks.fusions import joined

CLASSES = 4
NAMES = ("ant", "bee", "cat", "dog")


def outputs(samples: int, seed: int, right: float = 2.0, networks: int = 5, dtype: Any = np.float32) -> Outputs:
    """Networks that say something of what is right; every other one means the class behind the one that it says."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(samples) % CLASSES)
    logits = rng.standard_normal((networks, samples, CLASSES)) + right * np.eye(CLASSES)[labels]
    logits[1::2] = np.roll(logits[1::2], -1, axis=2)
    return Outputs(logits.astype(dtype), labels)


def splits(held: int = 0, **given: Any) -> dict[str, Outputs]:
    made = {"train": outputs(201, 0, **given), "test": outputs(80, 1, **given)}
    return made | ({"held_out": outputs(held, 2, **given)} if held else {})


def settings(**given: Any) -> SimpleNamespace:
    values = {o.name: o.default for o in coarse.OPTIONS} | {"seed": 0, "dtype": "float32"}
    return SimpleNamespace(**values | given)


def trained(found: dict[str, Outputs], comm: MPI.Comm = MPI.COMM_SELF, **given: Any) -> coarse.Coarse:
    return coarse.train(settings(**given), found, NAMES, comm)


@pytest.mark.ranks
@pytest.mark.parametrize(
    "given",
    [
        {},
        {"coarse_net": "dense", "coarse_widths": "6,5", "link": "log_probabilities", "coarse_decay": "1e-3"},
        {"coarse_solver": "tr", "coarse_decay": "1e-3", "dtype": "float64"},
        {"coarse_data": "both", "link": "logits", "coarse_decay": "1e-2"},
    ],
)
def test_parameters_have_the_same_bits_on_any_number_of_ranks(comm: MPI.Comm, given: dict[str, str]) -> None:
    found = splits(held=60)
    alone, other = on_one_rank(lambda one: [trained(found, one, **given | {"seed": seed}) for seed in (0, 1)])
    shared = trained(found, comm, **given)  # on one rank again, from the beginning
    assert torch.equal(alone.theta, shared.theta)
    assert (alone.decay, alone.words, alone.operations) == (shared.decay, shared.words, shared.operations)
    assert np.array_equal(alone.losses, shared.losses)
    own = torch.cat([p.detach().reshape(-1) for p in shared.module.parameters()])
    assert torch.equal(own, shared.theta.to(own.dtype))
    assert not torch.equal(other.theta, alone.theta)


@pytest.mark.parametrize("decay", ["1e-3", "0.03"])
def test_a_linear_net_is_scikit_learns_logistic_regression(decay: str) -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    found = splits(dtype=np.float64)
    net = trained(found, coarse_decay=decay, dtype="float64")
    x = joined(torch.from_numpy(found["train"].logits), "probabilities").numpy()
    model = linear_model.LogisticRegression(C=1 / (float(decay) * len(x)), solver="newton-cg", tol=1e-9)
    model.fit(x, found["train"].labels)
    W = net.theta[: model.coef_.size].view(model.coef_.shape).numpy()
    np.testing.assert_allclose(W, model.coef_, atol=0.02 * np.abs(model.coef_).max())
    tests = joined(torch.from_numpy(found["test"].logits), "probabilities")
    with torch.no_grad():
        chances = net.module(tests).softmax(dim=1)
    np.testing.assert_allclose(chances, model.predict_proba(tests.numpy()), atol=0.01)
    right = accuracies(found["test"], "probabilities", net.module).coarse
    assert right == pytest.approx(model.score(tests.numpy(), found["test"].labels), abs=1.5 / len(tests))


def test_it_learns_what_each_local_net_means() -> None:
    found = splits(held=60)
    for kind in ("linear", "dense"):
        net = trained(found, coarse_net=kind)
        measured = accuracies(found["test"], "probabilities", net.module)
        assert measured.coarse > 0.1 + max(measured.average, measured.majority, *measured.local)
        assert net.operations > 0 and len(net.losses) > 1
    assert trained(found).words == "linear 20-4"


def test_which_samples_it_is_trained_on() -> None:
    found = splits(held=60)
    found["folds"] = outputs(201, 5)
    for data, expected in (("train", found["train"]), ("held_out", found["held_out"]), ("folds", found["folds"])):
        alone = {"train": expected, "test": found["test"]}
        assert torch.equal(
            trained(found, coarse_data=data, coarse_decay="0.01").theta, trained(alone, coarse_decay="0.01").theta
        )
    logits = np.concatenate([found["train"].logits, found["held_out"].logits], axis=1)
    both = Outputs(logits, np.concatenate([found["train"].labels, found["held_out"].labels]))
    theta = trained({"train": both, "test": found["test"]}, coarse_decay="0.01").theta
    assert torch.equal(trained(found, coarse_data="both", coarse_decay="0.01").theta, theta)
    assert not trained(found, coarse_data="both", coarse_decay="0.01").notes
    (note,) = trained(splits(held=38), coarse_data="held_out", coarse_decay="0.01").notes
    assert "2 of 4 classes have fewer than 10 held-out samples" in note
    assert not trained(splits(held=38), coarse_decay="0.01").notes


def test_the_decay_is_the_one_that_serves_best_on_a_fifth_of_each_class() -> None:
    for right in (0.7, 6.0):
        found = splits(right=right)
        drawn = coarse.deciding(found["train"].labels, NAMES, 0)
        rest, fifth = found["train"].take(~drawn), found["train"].take(drawn)
        x = joined(torch.from_numpy(fifth.logits), "logits")

        def served(decay: float, rest: Outputs = rest, fifth: Outputs = fifth, x: Any = x) -> float:
            net = trained({"train": rest}, coarse_decay=f"{decay:g}", link="logits")
            with torch.no_grad():
                return -float(net.module(x).log_softmax(dim=1)[np.arange(len(x)), fifth.labels].mean())

        chosen = trained(found, link="logits")
        losses = {decay: served(decay) for decay in coarse.DECAYS}
        assert losses[chosen.decay] < 1.05 * min(losses.values())
        assert max(losses.values()) > 1.05 * min(losses.values())


def test_a_decay_may_be_given() -> None:
    found = splits()
    given = trained(found, coarse_decay="0.003")
    once = 201 * 20 * 4  # multiplications of a pass
    assert len(given.losses) * once <= given.operations < 3 * len(given.losses) * once
    assert given.decay == 0.003
    assert given.operations < trained(found).operations
    assert trained(found, coarse_decay="0").decay == 0
    assert trained(splits(held=60)).theta.equal(trained(found).theta)  # which it is not trained on


def test_samples_that_decide_are_drawn_from_every_class() -> None:
    labels = np.repeat([0, 1, 2, 3], [50, 10, 4, 1])
    drawn = coarse.deciding(labels, NAMES, seed=3)
    assert [int(drawn[labels == k].sum()) for k in range(4)] == [10, 2, 1, 0]
    assert np.array_equal(drawn, coarse.deciding(labels, NAMES, seed=3))
    assert not np.array_equal(drawn, coarse.deciding(labels, NAMES, seed=4))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"coarse_data": "folds"}, "folds needs networks that were trained again, without parts of them"),
        ({"coarse_data": "held_out"}, "-coarse_data held_out is for data that have held-out samples"),
        ({"coarse_data": "both"}, "-coarse_data both is for data that have held-out samples"),
        ({"coarse_decay": "-1"}, "option -coarse_decay must be 'auto', '0' or a number above 0, got '-1'"),
        ({"coarse_decay": "much"}, "option -coarse_decay must be"),
        ({"coarse_decay": "nan"}, "option -coarse_decay must be"),
        ({"coarse_decay": "inf"}, "option -coarse_decay must be"),
        ({"coarse_net": "dense", "coarse_widths": "0"}, "option -coarse_widths must be integers above 0"),
    ],
)
def test_what_cannot_be_is_refused(given: dict[str, str], expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        trained(splits(), **given)


def test_one_sample_a_class_decides_on_no_decay() -> None:
    found = splits() | {"train": outputs(CLASSES, 0)}
    with pytest.raises(InputError, match="give option -coarse_decay"):
        trained(found)
    assert trained(found, coarse_decay="1e-2").losses[-1] > 0


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize(("split", "sample"), [("train", 0), ("train", 150), ("held_out", 59), ("folds", 200)])
def test_outputs_that_are_not_finite_are_refused(bad: float, split: str, sample: int) -> None:
    found = splits(held=60) | {"folds": outputs(201, 5)}
    found[split].logits[2, sample, 1] = bad
    with pytest.raises(InputError, match=f"network 2 gives NaN or infinity for sample {sample} of the {split}"):
        trained(found, coarse_data="folds" if split == "folds" else "both")


def test_accuracies_are_counted_by_hand() -> None:
    logits = np.zeros((2, 4, 2))
    logits[0, :, 1] = [3, 3, -3, -3]
    logits[1, :, 1] = [1, -1, 1, np.nan]
    found = accuracies(Outputs(logits, np.array([1, 1, 1, 0])))
    assert found[:3] == ((0.75, 0.5), 0.5, 0.5)
    assert np.isnan(found.coarse)


def test_the_gap_is_said_and_where_nets_know_their_samples_by_heart_a_note() -> None:
    test = Accuracies((0.5, 0.25, 0.75), 0.8, 0.7)
    found = {"train": Accuracies((0.6, 0.5, 0.98), 0.9, 0.8), "test": test}
    line = gap(found)
    assert "69.3 % of the training samples" in line and "50.0 % of the test" in line
    assert "tile 1, 50.0 and 25.0 %" in line
    assert by_heart(found) == []
    (note,) = by_heart({"train": Accuracies((0.6, 0.995, 1.0), 0.9, 0.8), "test": test})
    assert note.startswith("2 of 3 local networks have 99 %")


@pytest.mark.parametrize(("counts", "said"), [((10, 12), ""), ((9, 12), "1 of 2 classes"), ((0, 3), "2 of 2 classes")])
def test_few_held_out_samples_are_said(counts: tuple[int, ...], said: str) -> None:
    lines = few(np.repeat([0, 1], counts), ("cat", "dog"))
    assert len(lines) == bool(said)
    if said:
        assert said in lines[0] and f"cat has {counts[0]}" in lines[0]
