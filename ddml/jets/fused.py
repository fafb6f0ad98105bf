"""Second-order jets by a hand-written forward and backward pass in torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from ddml.networks.tanh import TanhNetwork

from .evaluator import Index
from .taylor import TaylorJets

ORDER = 2  # of the derivatives that are written by hand, here and in the kernels; mixed ones are among them


def second_order(indices: Sequence[Index]) -> list[tuple[int, int, int]]:
    """Positions of the jets ij, i and j, for each second derivative.

    Raises
    ------
    ValueError
        If there is a derivative of higher order.
    """
    if max(len(i) for i in indices) > ORDER:
        raise ValueError("hand-written jets go to second order")
    position = {index: k for k, index in enumerate(indices)}
    return [(position[i], position[i[:1]], position[i[1:]]) for i in indices if len(i) == 2]


class _Buffers:
    """Everything that one stage writes for one shape of chunk, with its slices cut once.

    ``scratch`` gives what is not needed once the stage's turn in the backward pass is over.
    """

    def __init__(
        self,
        like: Tensor,
        widths: tuple[int, int],
        residual: bool,
        second: int,
        scratch: Callable[..., Tensor],
        parity: int,
    ) -> None:
        k, n, _ = like.shape
        inputs, outputs = widths
        new = partial(torch.empty, dtype=like.dtype, device=like.device)
        self.z = new(k, n, outputs)  # jets before the activation
        self.y = new(k, n, outputs)  # jets behind the stage
        self.s = new(n, outputs)  # 1 - tanh^2
        self.t = new(n, outputs) if residual else self.y[0]  # tanh
        self.q = [new(n, outputs) for _ in range(second)]  # t z_i of each second derivative (i, j)
        self.zbar = scratch("zbar", k, n, outputs)  # adjoint of z
        self.hbar = scratch(f"hbar{parity}", k, n, inputs)  # adjoint of the jets that enter
        self.work, self.room = scratch("work", n, outputs), scratch("room", n, outputs)
        self.h: Tensor | None = None  # what entered, and as a matrix
        self.h_flat = self.hbar
        self.z_flat, self.zbar_flat = self.z.view(k * n, outputs), self.zbar.view(k * n, outputs)
        self.hbar_flat = self.hbar.view(k * n, inputs)
        self.zs, self.zbars, self.ys = list(self.z), list(self.zbar), list(self.y)
        self.z_rest, self.y_rest = self.z[1:], self.y[1:]


class FusedJets(TaylorJets):
    r"""Second-order jets of a :class:`TanhNetwork` with a hand-written forward and backward pass.

    With t = tanh z and s = 1 - t^2, the jets of tanh z are t, s z_i, s (z_ij - 2 t z_i z_j). From
    the adjoint b of those, c_k = s b_k is the adjoint of z_ij; c_i - 2 t z_j c_ij that of z_i, twice
    the second term where i = j; and c_0 - 2 t (sum c_k z_k - 3 t sum c_ij z_i z_j)
    - 2 sum c_ij z_i z_j that of z.

    Buffers live as long as the evaluator and serve chunk after chunk, so that they stay in the
    cache: a forward pass is followed by its backward passes.

    Raises
    ------
    ValueError
        If a derivative of order above two is asked for: :class:`ddml.jets.taylor.TaylorJets` has those.
    """

    def __init__(
        self, network: TanhNetwork, offsets: Mapping[str, tuple[int, torch.Size]], indices: Sequence[Index]
    ) -> None:
        super().__init__(network, offsets, indices)
        self.second = second_order(self.indices)
        self.buffers: dict[tuple[int, int], _Buffers] = {}
        self.scratch: dict[tuple[str | int, ...], Tensor] = {}
        self.active: frozenset[int] = frozenset()

    def _scratch(self, like: Tensor, name: str, *shape: int) -> Tensor:
        key: tuple[str | int, ...] = (name, *shape)
        if key not in self.scratch:
            self.scratch[key] = torch.empty(shape, dtype=like.dtype, device=like.device)
        return self.scratch[key]

    @torch.no_grad()
    def bind(self, theta: Tensor, gradient: Tensor | None = None, active: Sequence[int] | None = None) -> None:
        """See :class:`ddml.jets.evaluator.Evaluator`."""
        self.leaf, self.gradient = theta, gradient
        # copies: what the product library rounds may depend on how its arguments are aligned
        self.bound = [(w.clone(), b) for w, b in (self.affine(theta, stage) for stage in self.stages)]
        self.transposed = [weight.T.contiguous() for weight, _ in self.bound]
        if gradient is None:
            return
        self.active = frozenset(range(len(self.stages)) if active is None else active)
        # a slope takes part in weight and bias, so these gradients are collected apart
        self.gradients = {
            i: (self.view(gradient, stage.weight), self.view(gradient, stage.bias))
            if stage.slope is None
            else tuple(torch.zeros_like(p) for p in self.bound[i])
            for i, stage in enumerate(self.stages)
            if i in self.active
        }

    @torch.no_grad()
    def prefix(self, inputs: Tensor, first: int) -> Tensor:
        """See :class:`ddml.jets.evaluator.Evaluator`."""
        h = inputs
        for number in range(first):
            h = self._stage(number, h)
        return h.clone() if first else h

    @torch.no_grad()
    def forward(self, inputs: Tensor, first: int = 0) -> Tensor:
        """See :class:`ddml.jets.evaluator.Evaluator`."""
        h = inputs
        for number in range(first, len(self.stages)):
            h = self._stage(number, h)
        self.last = inputs, first
        return h

    def _stage(self, number: int, h: Tensor) -> Tensor:
        stage, n = self.stages[number], h.shape[1]
        b = self.buffers.get((number, n))
        if b is None:
            widths = self.bound[number][0].shape[1], self.bound[number][0].shape[0]
            scratch = partial(self._scratch, h)
            b = _Buffers(h, widths, stage.residual, len(self.second), scratch, number % 2)
            self.buffers[number, n] = b
        if b.h is not h:
            b.h, b.h_flat = h, h.view(-1, h.shape[2])
        torch.mm(b.h_flat, self.transposed[number], out=b.z_flat)
        b.zs[0].add_(self.bound[number][1])
        if not stage.activation:
            return b.z
        torch.tanh(b.zs[0], out=b.t)
        torch.mul(b.t, b.t, out=b.s).neg_().add_(1.0)
        torch.mul(b.z_rest, b.s, out=b.y_rest)
        for (p, i, j), q in zip(self.second, b.q, strict=True):
            torch.mul(b.zs[i], b.t, out=q)
            b.ys[p].addcmul_(q, b.ys[j], value=-2.0)
        if stage.residual:
            torch.add(h[0], b.t, out=b.ys[0])
            b.y_rest.add_(h[1:])
        return b.y

    @torch.no_grad()
    def backward(self, adjoint: Tensor) -> None:
        """See :class:`ddml.jets.evaluator.Evaluator`."""
        lowest = min((a for a in self.active if a >= self.last[1]), default=len(self.stages))
        for number, b in self._adjoints(adjoint, lowest):
            if number in self.active:
                weight, bias = self.gradients[number]
                weight.addmm_(b.zbar_flat.T, b.h_flat)
                bias.add_(b.zbars[0].sum(0))

    @torch.no_grad()
    def rows(self, adjoint: Tensor) -> Tensor:
        """See :class:`ddml.jets.evaluator.Evaluator`; all points in one backward pass."""
        rows = adjoint.new_zeros(adjoint.shape[1], self.leaf.numel())

        def write(name: str, values: Tensor) -> None:
            begin, shape = self.offsets[name]
            rows[:, begin : begin + shape.numel()] = values.reshape(len(rows), -1)

        for number, b in self._adjoints(adjoint, self.last[1]):
            assert b.h is not None
            stage, bias = self.stages[number], b.zbars[0]
            weight = torch.einsum("kno,kni->noi", b.zbar, b.h)
            scale: Tensor | float = 1.0
            if stage.slope is not None:  # as in finish
                scale = 10 * self.view(self.leaf, stage.slope)
                own_weight, own_bias = self.view(self.leaf, stage.weight), self.view(self.leaf, stage.bias)
                write(stage.slope, 10 * ((weight * own_weight).sum((1, 2)) + bias @ own_bias))
            write(stage.weight, scale * weight)
            write(stage.bias, scale * bias)
        return rows

    def _adjoints(self, adjoint: Tensor, lowest: int) -> Iterator[tuple[int, _Buffers]]:
        """The stages from the last one down to ``lowest``, each with the adjoint of its affine map in its buffers."""
        n, ybar = self.last[0].shape[1], adjoint
        for number in range(len(self.stages) - 1, lowest - 1, -1):
            stage, b = self.stages[number], self.buffers[number, n]
            if stage.activation:
                self._activation_adjoint(b, ybar)
            else:
                b.zbar.copy_(ybar)
            yield number, b
            if number > lowest:
                torch.mm(b.zbar_flat, self.bound[number][0], out=b.hbar_flat)
                if stage.residual:
                    b.hbar.add_(ybar)
                ybar = b.hbar

    def _activation_adjoint(self, b: _Buffers, ybar: Tensor) -> None:
        torch.mul(ybar, b.s, out=b.zbar)
        c, z, work = b.zbars, b.zs, b.work
        if len(c) > 1:
            torch.mul(c[1], z[1], out=work)
            for k in range(2, len(c)):
                work.addcmul_(c[k], z[k])
            for (p, i, j), q in zip(self.second, b.q, strict=True):
                r = torch.mul(c[p], z[j], out=b.room)
                work.addcmul_(r, q, value=-3.0)
                c[0].addcmul_(r, z[i], value=-2.0)
                if i == j:
                    c[i].addcmul_(c[p], q, value=-4.0)
                else:
                    c[j].addcmul_(c[p], q, value=-2.0)
                    c[i].addcmul_(r, b.t, value=-2.0)
            c[0].addcmul_(work, b.t, value=-2.0)

    @torch.no_grad()
    def finish(self) -> None:
        """See :class:`ddml.jets.evaluator.Evaluator`."""
        assert self.gradient is not None
        for number, (weight, bias) in self.gradients.items():
            stage = self.stages[number]
            if stage.slope is None:
                continue
            # the stage is h (c W)^T + c b with c = 10 a
            scale = 10 * self.view(self.leaf, stage.slope)
            own_weight, own_bias = self.view(self.leaf, stage.weight), self.view(self.leaf, stage.bias)
            by_scale = torch.sum(weight * own_weight) + torch.dot(bias, own_bias)
            self.view(self.gradient, stage.weight).add_(weight * scale)
            self.view(self.gradient, stage.bias).add_(bias * scale)
            self.view(self.gradient, stage.slope).add_(10 * by_scale)
