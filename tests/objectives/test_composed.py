"""Objectives made of objectives made of objectives, against dense evaluations of what they shall be."""

import os

import numpy as np
import pytest
import torch
from compositions import LOSSES, WORDS, Node, assert_is, classifier, numbers, put, whole
from mpi4py import MPI

from ddml.decomposition.decomposition import Decomposition
from ddml.decomposition.subdomains import Subdomains
from ddml.errors import InputError
from ddml.layout import ParameterLayout
from ddml.objectives.composed import sampled, shifted
from ddml.objectives.linearisation import Linearisation
from ddml.objectives.objective import Objective
from ddml.objectives.residual import ResidualObjective
from ddml.objectives.restricted import RestrictedObjective, restricted

# on several ranks each letter inside each other one; words of three add what happens between two of their letters
SEVERAL = MPI.COMM_WORLD.size > 1
ON_RANKS = [word for word in WORDS if len(word) < 3] if SEVERAL and not os.environ.get("DDML_LONG") else WORDS


def often(word: str, i: int, j: int) -> bool:
    """Words of three, every second one, and on several ranks all others, have one of the losses by turns."""
    return (i + 2 * j) % 4 == 0 if len(word) == 3 else not SEVERAL or (i + j) % 2 == 0


@pytest.mark.parametrize(
    ("letters", "name"),
    [
        pytest.param(word, name, marks=[pytest.mark.long] * (not often(word, i, j)))
        for i, word in enumerate(ON_RANKS)
        for j, name in enumerate(LOSSES)
    ],
)
def test_compositions_are_what_they_say(comm: MPI.Comm, letters: str, name: str) -> None:
    objective, dense = whole(name, comm, 0 if letters.count("S") % 2 else 5)
    top = Node(objective, dense, letters)
    for seed in (0, 1):  # what was made before a point was frozen goes with it
        top.freeze(seed)
        for leaf in top.leaves():
            assert_is(leaf.objective, leaf.dense, seed, points=2 if len(letters) == 1 else 1)
    top.destroy()


@pytest.mark.parametrize("letters", [word for word in WORDS if "C" not in word])
def test_residuals_are_those_of_the_composition_or_refused_in_words(comm: MPI.Comm, letters: str) -> None:
    objective, dense = whole("burgers", comm, 0)
    top = Node(objective, dense, letters)
    top.freeze(0)
    for leaf in top.leaves():
        composed, layout = leaf.objective, leaf.objective.layout
        assert isinstance(composed, ResidualObjective)
        x, v = numbers(composed.layout.size, 3), numbers(composed.layout.size, 4)
        at, direction, back = put(layout, x), put(layout, v), layout.vector()
        r, Jv = composed.residual_vector(), composed.residual_vector()
        J = torch.autograd.functional.jacobian(lambda y, d=leaf.dense: d.outputs(d.embed(y), d.rows), x)
        outputs = leaf.dense.outputs(leaf.dense.embed(x), leaf.dense.rows).detach()
        mine = slice(*r.getOwnershipRange())
        composed.jacobian_product(at, direction, Jv)
        assert np.allclose(Jv.array_r, (J @ v)[mine], rtol=1e-10, atol=1e-12)
        composed.jacobian_transpose_product(at, Jv, back)
        assert np.allclose(layout.gather(back), J.T @ (J @ v), rtol=1e-10, atol=1e-12)
        if "T" in letters:
            with pytest.raises(InputError, match="linear term is no sum of squared residuals"):
                composed.residual(at, r)
            with pytest.raises(InputError, match="linear term is no sum of squared residuals"):
                composed.linear_model(at, [direction])
            with pytest.raises(InputError, match="linear term is no sum of squared residuals"):
                Linearisation(composed, at, assembled=True)
        else:
            composed.residual(at, r)
            assert np.allclose(r.array_r, outputs[mine], rtol=1e-10, atol=1e-12)
            W = torch.stack([J @ v, outputs])
            assert np.allclose(composed.linear_model(at, [direction]), W @ W.T, rtol=1e-10, atol=1e-12)
    top.destroy()


def test_a_restriction_is_not_frozen_without_the_linear_terms(comm: MPI.Comm) -> None:
    objective, dense = whole("classifier", comm, 5)
    top = Node(objective, dense, "TR")
    for node in top.children[0].children:
        with pytest.raises(InputError, match=r"has 1 linear terms, and freeze\(\) got 0: pass its linear_terms"):
            node.objective.freeze(numbers(objective.layout.size, 0))  # type: ignore[attr-defined]
    top.destroy()


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("letters", ["T", "TT", "RT"])
def test_a_shifted_objective_follows_its_objective(comm: MPI.Comm, name: str, letters: str) -> None:
    """And what is then restricted, sampled and shifted again is the new one."""
    objective, dense = whole(name, comm, 5)
    top = Node(objective, dense, letters)
    rows = torch.arange(2, 12)
    old = objective.loss
    objective.replace(old.sampled(rows), 0.5, np.arange(4))
    if letters == "RT":
        parts = objective.parts.split_over(top.decomposition.group)  # type: ignore[union-attr]
        for child in top.children:
            child.objective.follow(objective, parts)  # type: ignore[attr-defined]
    top.freeze(0)
    for leaf in top.leaves():
        followed = leaf.objective
        assert followed.version == 1
        assert followed.loss.count == 10
        assert followed.fraction == 0.5
        moved = leaf.dense.but(rows=rows)
        assert_is(followed, moved, 0)
        part = sampled(followed, [0, 3, 5])
        assert part.fraction == pytest.approx(0.15, rel=1e-13)
        assert_is(part, moved.but(rows=rows[[0, 3, 5]]), 0)
        if letters != "RT":
            assert np.array_equal(followed.replacement.overlap, np.arange(4))
    top.destroy()


@pytest.mark.parametrize("letters", ["T", "S", "ST", "TS", "RS", "RT", "RST"])
def test_all_work_is_charged_to_one_counter(comm: MPI.Comm, letters: str) -> None:
    """A gradient its fraction, a shift nothing, and a prefix once each time that it is computed."""
    loss = classifier()[0]
    layout = ParameterLayout(loss.parameters, comm)
    objective: Objective = Objective(loss, layout)
    kept, gradient = 0.0, 1.0
    made = [objective]
    if letters.startswith("R"):
        decomposition = Decomposition(Subdomains.of_layers(loss, [[1]]), layout, parallel=True)
        made = list(restricted(objective, decomposition).values())
        kept, gradient = loss.charges.prefix(1), loss.charges.evaluation(1, frozenset({1}))
    fraction = 7 / 13 if "S" in letters else 1.0
    for base in made:
        composed = base
        for letter in letters.removeprefix("R"):
            x, g = composed.layout.vector(), composed.layout.vector()
            composed = sampled(composed, range(0, 13, 2)) if letter == "S" else shifted(composed, x, x)
        for _ in range(2):
            base.work.reset()
            spent = kept
            if isinstance(base, RestrictedObjective):
                base.freeze(loss.initial())
                assert base.work.total == pytest.approx(kept, rel=1e-13)
            for evaluation in range(3):
                composed.value_gradient(x, g)
                again = fraction * kept if evaluation == 0 and "S" in letters else 0.0
                spent += fraction * gradient + again
                assert base.work.total == pytest.approx(spent, rel=1e-13)
            assert base.work.gradients == 3
            assert composed.work is base.work
