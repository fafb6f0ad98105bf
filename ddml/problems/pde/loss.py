"""The loss of a PDE problem and a network: compiled programs where residuals can be traced, torch elsewhere."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn

from ddml.jets.compiled import CompiledJets
from ddml.jets.fused import ORDER
from ddml.jets.taylor import TaylorJets
from ddml.numbers import Number, as_number, read

from .charges import PDECharges
from .pde import PDE
from .points import TermPoints
from .program import NotElementwise, Prepared, Program
from .residuals import PDEResiduals
from .scales import Scales
from .tracing import Tracing

# about how many times longer a loss and gradient takes in torch than in the kernels: 27, 26 and 13 with u.tx and u.xx
# on tanh networks 20x4, 20x8 and 50x6 (measured on one core of an Intel Xeon, our choice); derivatives of third order
# take longer than that
TORCH_JETS = 20.0


class PDELoss(PDEResiduals):
    """Sum over the terms of a problem of weight * mean over points of the squared residual.

    The parameters are the network's and behind them the problem's coefficients, which belong to
    the last layer. Samples are numbered term by term. Frozen parameters of the network, those with ``requires_grad``
    False, are not among them and stay as they are; tied ones are there once. A
    :class:`ddml.networks.tanh.TanhNetwork` with such ones is evaluated as any other module.

    Parameters
    ----------
    problem
        What to solve.
    network
        Any torch module (N, inputs) -> (N, fields), a :class:`ddml.networks.tanh.TanhNetwork` for speed.
    points
        Interior points.
    dtype, device
        Of everything that torch computes.
    chunk
        Points that go through the network at a time; 0 for what suits the evaluator.
    compiled
        Whether the compiled kernels may be used, for jets and residuals.
    scales
        Of coordinates, fields and terms, as :func:`ddml.problems.pde.magnitudes.find` makes them; none by default.

    Attributes
    ----------
    programs : mapping of numbers of terms to Program
        Residuals that the compiled kernels evaluate.
    in_torch : mapping of numbers of terms to str
        Why torch evaluates the others, in a few words.

    Raises
    ------
    InputError
        If a residual raises, asks for a derivative that does not exist or has the wrong shape;
        if there are no points; if the network fails or nothing in it is trained.
    """

    once = 1.5e7, 3000.0  # with the compiled kernels

    def __init__(
        self,
        problem: PDE,
        network: nn.Module,
        points: int,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str = "cpu",
        chunk: int = 0,
        compiled: bool = True,
        scales: Scales | None = None,
    ) -> None:
        super().__init__(problem, network, points, dtype, device, chunk, compiled, scales)
        self.tracing = Tracing(self.statement, self.indices, self.rule)
        self.programs: dict[int, Program] = {}
        self.in_torch: dict[int, str] = {}
        for points_of_term in self.sets:
            try:
                if not problem.compiled:
                    raise NotElementwise("compiled = False")
                if not isinstance(self.evaluator, CompiledJets):
                    raise NotElementwise(
                        f"derivatives beyond order {ORDER}" if self.beyond_kernels else "as the network is"
                    )
                self.programs[points_of_term.term] = self.tracing.program(points_of_term, self._agrees)
            except NotElementwise as reason:
                self.in_torch[points_of_term.term] = str(reason)

    @property
    def beyond_kernels(self) -> list[str]:
        """Derivatives that residuals ask for and the kernels do not have, as in ``u.xxx``.

        Torch evaluates all jets of a network of which there is one; of networks that the kernels do not know it does
        anyway, and none is named.
        """
        if not isinstance(self.evaluator, TaylorJets):
            return []
        return [self.statement.name(d) for d in self.derivatives if len(d[1]) > ORDER]

    def of_module(self, module: nn.Module) -> Self:
        """See :meth:`ddml.losses.loss.Loss.of_module`: residuals that are compiled stay so, for networks in kernels."""
        other = super().of_module(module)
        if self.programs and not isinstance(other.evaluator, CompiledJets):
            other.in_torch = self.in_torch | dict.fromkeys(self.programs, "as the network is")
            other.programs = {}
        return other

    def _take(self, sets: list[TermPoints]) -> None:
        super()._take(sets)
        self._prepared: dict[int, Prepared] = {}  # by chunk, once it is evaluated

    def _agrees(self, program: Program, points: TermPoints) -> bool:
        """Whether a program gives torch's loss and gradient at the initial parameters, up to rounding."""
        theta, found = self.initial(), []
        for programs in ({}, {points.term: program}):
            loss, gradient = self.with_sets([points]), torch.zeros(self.size, dtype=self.dtype)
            loss.programs = programs
            found.append((read([loss.value_gradient(theta, gradient)])[0], gradient))
        tolerance = 1e3 * torch.finfo(self.dtype).eps
        (expected, expected_gradient), (value, gradient) = found
        difference = float((gradient - expected_gradient).abs().max())
        return abs(value - expected) <= tolerance * expected and difference <= tolerance * float(
            expected_gradient.abs().max()
        )

    def _squares(
        self, theta: Tensor, first: int, number: int, inputs: Tensor, gradient: Tensor | None = None
    ) -> float | None:
        """The loss of a chunk if its term is compiled; its gradient by the coefficients is added to ``gradient``."""
        chunk = self.chunks[number]
        if chunk.term not in self.programs:
            return None
        assert isinstance(self.evaluator, CompiledJets)
        program = self._prepared.get(number)
        if program is None:
            program = self._prepared[number] = self.programs[chunk.term].at(self.tracing.fixed(chunk))
        count = len(self.coefficients)
        if count:
            program.scalars[:count] = theta[self.tail]
            program.by_scalars.zero_()
        value = self.evaluator.squares(inputs, first, program, chunk.scale)
        if gradient is not None and count:
            gradient[self.tail] += program.by_scalars[:count]
        return value

    @torch.no_grad()
    def value(self, theta: Tensor, kept: Any = None) -> Number:
        """See :meth:`ddml.losses.loss.Loss.value`."""
        total: Number = 0.0
        coefficients = list(theta[self.tail].clone())
        first, entering = kept or (0, self.inputs)
        self.evaluator.bind(theta)
        for number, (chunk, inputs) in enumerate(zip(self.chunks, entering, strict=True)):
            value = self._squares(theta, first, number, inputs)
            if value is not None:
                total += value
                continue
            pieces = self.chunk_residual(chunk, self.evaluator.forward(inputs, first), coefficients)
            total += chunk.scale * sum(as_number((r * r).sum()) for r in pieces)
        return total

    def value_gradient(
        self, theta: Tensor, gradient: Tensor, kept: Any = None, active: frozenset[int] | None = None
    ) -> Number:
        """See :meth:`ddml.losses.loss.Loss.value_gradient`: only the residuals go through autograd."""
        total: Number = 0.0
        coefficients = self.leaves(theta)
        first, entering = kept or (0, self.inputs)
        stages = None if active is None or not self.layer_stages else [s for i in active for s in self.layer_stages[i]]
        self.evaluator.bind(theta, gradient, stages)
        for number, (chunk, inputs) in enumerate(zip(self.chunks, entering, strict=True)):
            value = self._squares(theta, first, number, inputs, gradient)
            if value is not None:
                total += value
                continue
            graph = self.graph(chunk, self.evaluator.forward(inputs, first), coefficients)
            squares = (r.square().sum() for r in graph.pieces[1:])
            loss = chunk.scale * sum(squares, graph.pieces[0].square().sum())
            total += as_number(loss)
            if not loss.requires_grad:
                continue
            gradients = torch.autograd.grad(loss, graph.inputs, allow_unused=True)
            for k, g in enumerate(gradients[len(graph.places) :]):
                if g is not None:
                    gradient[self.tail.start + k] += g
            self.evaluator.backward(graph.adjoint(gradients))
        self.evaluator.finish()
        return total

    @property
    def charges(self) -> PDECharges:
        """See :attr:`ddml.losses.loss.Loss.charges`."""
        return PDECharges(self, self.evaluator)
