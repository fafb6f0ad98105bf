"""Several backward passes behind one forward pass, as residuals of several pieces ask for."""

from typing import Any

import pytest
import torch
from test_jets import CASES, Case, assert_close

from ddml.jets.compiled import CompiledJets
from ddml.jets.fused import FusedJets
from ddml.jets.nested import NestedJets
from ddml.jets.taylor import TaylorJets

SMALL = [case for case in CASES if case[1] <= 9 and max(map(len, case[-1]), default=0) == 2]


@pytest.mark.parametrize("kind", [FusedJets, TaylorJets, CompiledJets, NestedJets])
@pytest.mark.parametrize("case", SMALL)
def test_a_forward_pass_serves_several_backward_passes(case: Any, kind: Any) -> None:
    c = Case(case, points=5)
    made, gradient = kind(c.network, c.offsets, c.indices), torch.zeros_like(c.theta)
    made.bind(c.theta, gradient)
    made.forward(c.inputs)
    for share in (0.3, 0.5, 0.2):
        made.backward(share * c.weights)
    made.finish()
    assert_close(gradient, c.independent()[1], 1e-11)


@pytest.mark.parametrize("kind", [TaylorJets, NestedJets])
def test_one_graph_at_a_time_is_in_memory(kind: Any) -> None:
    class Watched(kind):  # type: ignore[misc]
        """Notes whether there is the graph of another pass where one is made."""

        found: list[bool] = []

        def jets(self, *arguments: Any) -> torch.Tensor:
            self.found.append(self.output is not None)
            return super().jets(*arguments)

    c = Case(SMALL[0], points=5)
    made = Watched(c.network, c.offsets, c.indices)
    made.bind(c.theta, torch.zeros_like(c.theta))
    for _ in range(2):
        made.forward(c.inputs)
        made.backward(c.weights)
    made.finish()
    assert made.found == [False, False] and made.output is None
