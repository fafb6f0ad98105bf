"""Fusions of what several networks say, against numpy; what a coarse net is given, and the coarse nets."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from ddml.errors import InputError
from ddml.networks.classifiers import mlp
from ddml.networks.coarse import OPTIONS, build_coarse, coarse_seed
from ddml.networks.fusions import FUSIONS, LEAST, LINKS, chances, joined, linked
from ddml.networks.local import local_seeds

INF = float("inf")


def softmax(z: Any) -> Any:
    e = np.exp(z - z.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def said(name: str, logits: Any, dtype: torch.dtype = torch.float64) -> list[int]:
    return FUSIONS[name](torch.tensor(np.asarray(logits), dtype=dtype)).tolist()


def by_hand(logits: Any) -> tuple[list[int], list[int]]:
    """Classes by the average and by votes, sample by sample."""
    means, votes = [], []
    for z in np.asarray(logits, dtype=float).transpose(1, 0, 2):
        mean = softmax(z).mean(axis=0)
        counts = np.bincount(z.argmax(axis=1), minlength=z.shape[1])
        most = np.flatnonzero(counts == counts.max())
        means.append(int(np.flatnonzero(mean > mean.max() - 1e-12)[0]))
        votes.append(int(most[mean[most] > mean[most].max() - 1e-12][0]))
    return means, votes


@pytest.mark.parametrize(("networks", "samples", "classes"), [(1, 7, 2), (4, 500, 3), (16, 90, 38), (5, 1, 10)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_fusions_are_those_of_numpy(networks: int, samples: int, classes: int, dtype: torch.dtype) -> None:
    rng = np.random.default_rng(classes)
    # few values, so that votes and averages tie in many samples
    logits = rng.integers(-1, 2, (networks, samples, classes)).astype(np.float32) + np.float32(0.25)
    means, votes = by_hand(logits)
    assert said("average", logits, dtype) == means
    assert said("majority", logits, dtype) == votes
    if networks > 1 and samples > 50:
        assert means != votes
        order = rng.permutation(networks)
        assert (said("average", logits[order], dtype), said("majority", logits[order], dtype)) == (means, votes)


@pytest.mark.parametrize(("networks", "samples", "classes"), [(1, 7, 2), (4, 500, 3), (16, 90, 38), (3, 1, 10)])
def test_the_largest_of_their_probabilities_is_what_fusions_say(networks: int, samples: int, classes: int) -> None:
    rng = np.random.default_rng(classes)
    logits = rng.integers(-1, 2, (networks, samples, classes)) + 0.25  # which tie in many samples
    means, votes = softmax(logits).mean(axis=0), np.zeros((samples, classes))
    for said_of in logits.argmax(axis=2):
        votes[np.arange(samples), said_of] += 1
    for dtype in (torch.float64, torch.float32):
        given = torch.tensor(logits, dtype=dtype)
        eps = 1e-14 if dtype == torch.float64 else 1e-7
        for fusion, expected in (("average", means), ("majority", (votes + means) / (networks + 1))):
            found = chances(given, fusion)
            np.testing.assert_allclose(found, expected, rtol=0, atol=eps)
            assert found.dtype == torch.float64 and found.numpy().argmax(axis=1).tolist() == said(fusion, logits, dtype)


def test_means_that_differ_by_rounding_are_equal_probabilities() -> None:
    logits = torch.tensor([[[0.0, 1e-13, -3e-13, -1.0]], [[1e-13, 0.0, 9e-13, -1.0]]], dtype=torch.float64)
    means = logits.softmax(dim=2).mean(dim=0)[0]
    assert 0 < means.max() - means[0] < 1e-12
    for fusion, first in (("average", 0), ("majority", 1)):  # votes are for 1 and 2
        found = chances(logits, fusion)[0]
        assert int(FUSIONS[fusion](logits)) == int(found.argmax()) == first and found[first] == found.max()


@pytest.mark.parametrize("bad", [float("nan"), INF, -INF])
def test_there_are_no_probabilities_where_there_is_no_class(bad: float) -> None:
    logits = torch.tensor([[[0.0, 1.0], [2.0, 1.0]], [[0.0, bad], [3.0, 1.0]]])
    for fusion in FUSIONS:
        found = chances(logits, fusion)
        assert found[0].isnan().all() and found[1].isfinite().all() and FUSIONS[fusion](logits).tolist() == [-1, 0]


@pytest.mark.parametrize(
    ("logits", "average", "majority"),
    [
        # one net for each class: votes tie, and so do averages of three that are turned round; the first class has it
        ([[5, 0, 0], [0, 5, 0], [0, 0, 5]], 0, 0),
        # two weak votes for class 0 against a strong one for class 1
        ([[0.1, 0, 0], [0.1, 0, 0], [0, 9, 0]], 1, 0),
        # two votes each for 1 and 2: the average decides among them, although class 0 has the largest of all
        ([[2, 2.1, -9], [2, 2.1, -9], [2, -9, 2.2], [2, -9, 2.2]], 0, 2),
        # a net that has equal largest outputs votes for the first
        ([[0, 1, 1], [0, 0, 0.9], [0, 0.2, 0]], 2, 1),
        # nothing is known at all
        ([[0, 0, 0], [0, 0, 0]], 0, 0),
        # numbers of which the exponential overflows
        ([[1e4, -1e4, 0], [0, 1e4, 0], [0, 1e4, 1e4]], 1, 1),
    ],
)  # fmt: skip
def test_ties_and_strong_votes(logits: list[list[float]], average: int, majority: int) -> None:
    one = np.array(logits, dtype=float)[:, None]
    assert (said("average", one), said("majority", one)) == ([average], [majority])


@pytest.mark.parametrize("bad", [float("nan"), INF, -INF])
def test_a_sample_that_a_net_says_no_number_of_has_no_class(bad: float) -> None:
    logits = np.zeros((3, 4, 2))
    logits[:, :, 1] = 1.0
    logits[1, 2, 0] = bad
    for name in FUSIONS:
        assert said(name, logits) == [1, 1, -1, 1]


@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_coarse_net_is_given_the_numbers_of_each_net_in_turn(link: str, dtype: torch.dtype) -> None:
    rng = np.random.default_rng(0)
    logits = 12 * rng.standard_normal((4, 9, 3))
    logits[2, 5] = 800, -800, 0
    p = softmax(logits)
    with np.errstate(divide="ignore"):
        expected = {"probabilities": p, "log_probabilities": np.log(p).clip(min=LEAST), "logits": logits}[link]
    given = torch.tensor(logits, dtype=dtype)
    found = joined(given, link)
    assert found.dtype == dtype and found.shape == (9, 12)
    assert torch.equal(linked(given, link).transpose(0, 1).reshape(9, 12), found)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-4
    np.testing.assert_allclose(found, np.concatenate(list(expected), axis=1), rtol=tolerance, atol=1e-6)
    one_by_one = torch.cat([linked(logit, link) for logit in given], dim=1)  # as networks on several ranks have them
    assert torch.equal(one_by_one, found)


def test_there_are_no_other_links() -> None:
    with pytest.raises(ValueError, match="no link odds"):
        linked(torch.zeros(2, 3), "odds")


def settings(**given: Any) -> SimpleNamespace:
    values = {o.name: o.default for o in OPTIONS} | {"seed": 0, "dtype": "float64"}
    return SimpleNamespace(**values | given)


def test_coarse_nets_are_linear_or_have_hidden_layers() -> None:
    linear, words = build_coarse(settings(), 16, 38)
    assert words == "linear 608-38"
    assert [tuple(p.shape) for p in linear.parameters()] == [(38, 608), (38,)]
    dense, words = build_coarse(settings(coarse_net="dense", coarse_widths="7,5"), 3, 4)
    assert words == "dense 12-7-5-4"
    x = np.random.default_rng(0).standard_normal((6, 12))
    a, b, c, d, e, f = (p.detach().numpy() for p in dense.parameters())
    by_hand = np.maximum(np.maximum(x @ a.T + b, 0) @ c.T + d, 0) @ e.T + f
    np.testing.assert_allclose(dense(torch.from_numpy(x)).detach(), by_hand, rtol=1e-12)
    assert next(build_coarse(settings(dtype="float32"), 2, 2)[0].parameters()).dtype == torch.float32


def test_its_seed_is_drawn_from_the_global_one_and_of_no_local_net() -> None:
    state = torch.random.get_rng_state()
    same, again, other = (build_coarse(settings(seed=seed), 4, 3)[0][1].weight for seed in (7, 7, 8))
    assert torch.equal(same, again) and not torch.equal(same, other)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert coarse_seed(7) not in local_seeds(7, 64)
    plain = mlp((12,), 3, [])[1].weight  # of torch's own, now
    assert not torch.equal(same, plain)


@pytest.mark.parametrize("text", ["", " ", "0", "-3", "16,", "16,x", "1.5"])
def test_hidden_layers_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="option -coarse_widths"):
        build_coarse(settings(coarse_net="dense", coarse_widths=text), 4, 3)
    build_coarse(settings(coarse_widths=text), 4, 3)  # a linear one has none
