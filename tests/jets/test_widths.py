"""The kernels refuse what they were not built for: they read memory by the widths that they know."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ddml import kernels
from ddml.jets.compiled import CompiledJets
from ddml.jets.evaluator import closure
from ddml.networks.tanh import TanhNetwork
from ddml.parameters import parameter_table

pytestmark = pytest.mark.skipif(kernels.library() is None, reason="the kernels were not built")


class Setting:
    """A network of 2 inputs and 3 outputs with derivatives t, xx, and tensors for it, all right."""

    def __init__(self) -> None:
        network = TanhNetwork(2, 5, 2, 3)
        named = [(name, p.shape) for name, p in network.named_parameters()]
        offsets = {p.name: (p.offset, torch.Size(p.shape)) for p in parameter_table(named)}
        self.evaluator = CompiledJets(network, offsets, closure([(0,), (1, 1)]))
        self.theta = torch.cat([p.detach().reshape(-1) for p in network.parameters()]).double()
        self.inputs = torch.rand(4, 7, 2, dtype=torch.float64)
        self.adjoint = torch.rand(4, 7, 3, dtype=torch.float64)


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x[:, :, :1], lambda x: x[:3], lambda x: x[0], lambda x: x.float(), lambda x: x.long(),
        lambda x: torch.cat([x, x], dim=2), lambda x: torch.cat([x, x]), lambda x: x.to(torch.complex128),
    ],
)  # fmt: skip
def test_jets_of_other_shapes_and_types_are_refused(change: Any) -> None:
    s = Setting()
    s.evaluator.bind(s.theta, torch.zeros_like(s.theta))
    expected = s.evaluator.forward(s.inputs).clone()
    calls = (
        lambda: s.evaluator.forward(change(s.inputs)),
        lambda: s.evaluator.prefix(change(s.inputs), 1),
        lambda: s.evaluator.tangent(s.theta, change(s.inputs)),
        lambda: s.evaluator.backward(change(s.adjoint)),
        lambda: s.evaluator.rows(change(s.adjoint)),
    )
    for call in calls:
        s.evaluator.forward(s.inputs)
        with pytest.raises(ValueError, match="must be"):
            call()
    assert torch.equal(s.evaluator.forward(s.inputs), expected)


def test_adjoints_of_other_points_are_refused() -> None:
    s = Setting()
    s.evaluator.bind(s.theta, torch.zeros_like(s.theta))
    s.evaluator.forward(s.inputs[:, :6].contiguous())
    with pytest.raises(ValueError, match=r"the adjoint must be \(4, 6, 3\); got \(4, 7, 3\)"):
        s.evaluator.backward(s.adjoint)


@pytest.mark.parametrize("change", [lambda v: v[:-1], lambda v: v.half(), lambda v: v[None], lambda v: v.long()])
def test_vectors_that_are_too_short_or_of_other_types_are_refused(change: Any) -> None:
    s = Setting()
    with pytest.raises(ValueError, match=r"must be|the kernels compute in"):
        s.evaluator.bind(change(s.theta))
    with pytest.raises(ValueError, match="gradient must be"):
        s.evaluator.bind(s.theta, change(torch.zeros_like(s.theta)))
    s.evaluator.bind(s.theta)
    with pytest.raises(ValueError, match="direction must be"):
        s.evaluator.tangent(change(s.theta), s.inputs)


def test_stages_have_widths_of_their_own() -> None:
    s = Setting()
    s.evaluator.bind(s.theta)
    entering = s.evaluator.prefix(s.inputs, 1)
    assert entering.shape == (4, 7, 5)
    torch.testing.assert_close(s.evaluator.forward(entering, 1), s.evaluator.forward(s.inputs))
    with pytest.raises(ValueError, match=r"inputs must be \(4, N, 5\); got \(4, 7, 2\)"):
        s.evaluator.forward(s.inputs, 1)
