"""The loss of a PDE problem and a network: residuals of network jets, chunk by chunk of points."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ddml.errors import InputError
from ddml.jets.compiled import CompiledJets, evaluator, known
from ddml.jets.jets import Index, closure
from ddml.losses import work
from ddml.losses.modules import evaluated, trained
from ddml.losses.residual import ResidualLoss
from ddml.networks.tanh import TanhNetwork
from ddml.parameters import parameter_table

from .charges import PDECharges
from .fields import Field
from .pde import PDE, Array, Term
from .points import TermPoints, product_rule, term_points
from .program import NotElementwise, Prepared, Program

_Leaves = dict[tuple[int, int, int], Tensor]  # by position of the derivative, side and field

# points of a term on which its residual is traced, and on which it is checked (our choice)
TRACED, CHECKED = 16, 64


def rows_to_trace(count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Numbers of points, of ``count``, on which to trace a residual and on which to check it.

    One at random of each of equal parts of the set, a fifth of them for the trace: at equal distances the points of a
    Hammersley set may have nearly one value of a coordinate. Few points are all checked.
    """
    parts = TRACED + CHECKED
    if count < parts:
        every = np.arange(count)
        return np.resize(every, TRACED), every
    edges = np.arange(parts + 1) * count // parts
    rows = np.random.default_rng(0).integers(edges[:-1], edges[1:])
    chosen = np.arange(TRACED) * parts // TRACED
    return rows[chosen], np.delete(rows, chosen)


class PDELoss(ResidualLoss):
    """Sum over the terms of a problem of weight * mean over points of the squared residual.

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

    The parameters are the network's and behind them the problem's coefficients, which belong to
    the last layer. Samples are numbered term by term. Frozen parameters of the network, those with ``requires_grad``
    False, are not among them and stay as they are; tied ones are there once. A
    :class:`ddml.networks.tanh.TanhNetwork` with such ones is evaluated as any other module.

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
    ) -> None:
        problem.check()
        if points < 1:
            raise InputError(f"the number of points must be 1 or more, got {points}")
        self.problem, self.network = problem, network.to(dtype=dtype, device=device)
        self.dtype, self.device = dtype, torch.device(device)
        chosen = trained(self.network)
        self.trained = [p for _, p in chosen]
        named = [(name, p.shape) for name, p in chosen]
        self.coefficients = tuple(problem.coefficients)
        table = parameter_table([*named, *((f"coefficients.{name}", ()) for name in self.coefficients)])
        self.parameters = table
        self.offsets = {p.name: (p.offset, torch.Size(p.shape)) for p in table[: len(named)]}
        self.tail = slice(table[len(named)].offset if self.coefficients else table[-1].range.stop, table[-1].range.stop)
        self._layers()
        self.problem_terms = list(problem.terms())
        sets = [problem.points(term, points) for term in self.problem_terms]
        asked = set[Index]().union(
            *(self._dry_run(t, *points) for t, points in zip(self.problem_terms, sets, strict=True))
        )
        for points_of_term, _ in sets[:1]:
            places = torch.as_tensor(points_of_term[:3, 0], dtype=dtype, device=device)
            evaluated(self.network, torch.stack(tuple(problem.embed(*places.T)), dim=1))
        self.indices = closure(asked)
        self.position = {index: k for k, index in enumerate(self.indices)}
        self.rule = product_rule(self.indices, len(problem.fields))
        self.besides = self._besides()
        self.evaluator = evaluator(network, self.offsets, self.indices)
        self.plain = evaluator(network, self.offsets, ((),))
        self.chunk = chunk or self.evaluator.chunk
        self.sets = [
            self._points(i, term.weight / len(x), x, data)
            for i, (term, (x, data)) in enumerate(zip(self.problem_terms, sets, strict=True))
        ]
        self.programs: dict[int, Program] = {}
        self.in_torch: dict[int, str] = {}
        for number, made in enumerate(self.sets):
            try:
                self.programs[number] = self._compiled(number, made)
            except NotElementwise as reason:
                self.in_torch[number] = str(reason)
        self._finish()

    def _finish(self) -> None:
        self.count = sum(len(s) for s in self.sets)
        self.chunks = [c for s in self.sets for c in s.chunks(self.chunk)]
        self.inputs = [c.inputs.flatten(1, 2) for c in self.chunks]
        self._prepared: dict[int, Prepared] = {}  # by chunk, once it is evaluated

    def _fixed(self, points: TermPoints) -> list[Tensor]:
        """What a residual may depend on besides fields and coefficients: coordinates, data, lift, product rule."""
        lift = [] if points.lift is None else list(points.lift[:, :, 0].permute(0, 2, 1).flatten(0, 1))
        mix = [] if points.mix is None else [points.mix[k, j, :, 0, f] for k, j, f in self.rule]
        return [*points.coordinates, *points.data.values(), *lift, *mix]

    def _compiled(self, number: int, points: TermPoints) -> Program:
        """A term's residual for the kernels, traced on some points and checked on others.

        Raises
        ------
        NotElementwise
            If the kernels do not know the network or something that the residual does: torch evaluates it.
        """
        if not self.problem.compiled:
            raise NotElementwise("compiled = False")
        if not isinstance(self.evaluator, CompiledJets):
            raise NotElementwise("as the network is")
        if points.inputs.shape[2] == 2:
            raise NotElementwise("periodic pairs")
        if len(points) == 0:
            raise NotElementwise("no points")
        traced, checked = (points.rows(torch.from_numpy(rows)) for rows in rows_to_trace(len(points)))
        try:
            program = self._trace(number, traced)
            if not self._agrees(number, program, checked):
                raise NotElementwise("other values than in torch on points that were not traced")
        except NotElementwise:
            raise
        except Exception as error:  # of the user's code, or of torch on what the code does there
            raise NotElementwise(f"{type(error.__cause__ or error).__name__} in the trace") from error
        return program

    def _trace(self, number: int, points: TermPoints) -> Program:
        places = [(k, f) for k in range(len(self.indices)) for f in range(len(self.problem.fields))]
        names = list(points.data)

        def residual(fixed: list[Tensor], jets: list[Tensor], coefficients: list[Tensor]) -> list[Tensor]:
            coordinates, fixed = fixed[: len(self.problem.domain)], fixed[len(self.problem.domain) :]
            data, fixed = dict(zip(names, fixed, strict=False)), fixed[len(names) :]
            lift = dict(zip(places, fixed, strict=False)) if points.lift is not None else {}
            mix = dict(zip(self.rule, fixed[len(lift) :], strict=True)) if points.mix is not None else {}
            network = dict(zip(places, jets, strict=True))

            def get(index: Index, f: int, side: int) -> Tensor:
                k = self.position[index]
                value = network[k, f]
                if mix:
                    parts = [mix[k, j, f] * network[j, f] for j in range(len(self.indices)) if (k, j, f) in mix]
                    value = sum(parts[1:], parts[0])
                return value + lift[k, f] if lift else value

            return self._residual(self.problem_terms[number], get, coordinates, data, coefficients, len(jets[0]), False)

        return Program(residual, self._fixed(points), places, len(self.coefficients))

    def _agrees(self, number: int, program: Program, points: TermPoints) -> bool:
        """Whether a program gives torch's loss and gradient at the initial parameters, up to rounding."""
        torchs, compiled = self._with([points]), self._with([points])
        torchs.programs, compiled.programs = {}, {number: program}
        theta, found = self.initial(), []
        for loss in (torchs, compiled):
            gradient = torch.zeros(self.size, dtype=self.dtype)
            found.append((loss.value_gradient(theta, gradient), gradient))
        tolerance = 1e3 * torch.finfo(self.dtype).eps
        (expected, expected_gradient), (value, gradient) = found
        difference = float((gradient - expected_gradient).abs().max())
        return abs(value - expected) <= tolerance * expected and difference <= tolerance * float(
            expected_gradient.abs().max()
        )

    def _layers(self) -> None:
        numbers = {p.name: i for i, p in enumerate(self.parameters)}
        if isinstance(self.network, TanhNetwork) and known(self.network, self.offsets):
            groups = [[numbers[name] for name in layer] for layer in self.network.layers]
            stage_of = {
                name: i for i, s in enumerate(self.network.stages) for name in (s.weight, s.bias, s.slope) if name
            }
            self.layer_stages = [sorted({stage_of[n] for n in layer}) for layer in self.network.layers]
            shapes = [self.offsets[s.weight][1] for s in self.network.stages]
            self.costs = tuple(float(sum(shapes[i].numel() + shapes[i][0] for i in own)) for own in self.layer_stages)
        else:
            leaves: dict[str, list[int]] = {}
            for name, number in list(numbers.items())[: len(self.offsets)]:
                leaves.setdefault(name.rpartition(".")[0], []).append(number)
            groups = list(leaves.values())
            self.layer_stages = []
            self.costs = tuple(float(sum(self.parameters[i].size for i in g)) for g in groups)
        groups[-1] = groups[-1] + list(range(len(self.offsets), len(self.parameters)))
        self.layers = tuple(tuple(g) for g in groups)

    def _besides(self) -> work.Besides:
        """What a point takes besides products with weights, for each derivative that is propagated."""
        if not isinstance(self.network, TanhNetwork) or not self.layer_stages:
            return work.Besides(repeats=len(self.indices))
        stages, sizes = self.network.stages, [self.offsets[s.weight][1] for s in self.network.stages]
        bent = [size[0] if stage.activation else 0 for stage, size in zip(stages, sizes, strict=True)]
        return work.Besides(
            tuple(work.TANH * sum(bent[i] for i in own) for own in self.layer_stages),
            tuple(work.KEPT * sizes[own[0]][1] for own in self.layer_stages),
            work.TANH * len(self.problem.fields),
            len(self.indices),
        )

    def _dry_run(self, term: Term, x: Array, data: dict[str, Array]) -> set[Index]:
        """The derivatives that a term asks for; also checks the user's code on the first, a middle and the last point.

        Fields and coefficients are to be differentiated, as in a gradient: code that changes them in place is refused.
        """
        asked: set[Index] = set()
        rows = sorted({0, len(x) // 2, max(len(x) - 1, 0)}) if len(x) else []
        tensor = partial(torch.tensor, dtype=self.dtype, device=self.device)
        probe, count = tensor(x[rows]), len(rows)

        def get(index: Index, f: int, side: int) -> Tensor:
            asked.add(index)
            return tensor([0.5] * count).requires_grad_()

        values = {name: tensor(v[rows]) for name, v in data.items()}
        coefficients = [tensor(v).requires_grad_() for v in self.problem.coefficients.values()]
        self._residual(term, get, probe[:, 0].T, values, coefficients, count, probe.shape[1] == 2)
        return asked

    def _residual(
        self,
        term: Term,
        get: Callable[..., Tensor],
        coordinates: Iterable[Tensor],
        data: dict[str, Tensor],
        coefficients: Sequence[Tensor],
        count: int,
        pair: bool,
    ) -> list[Tensor]:
        letters, fields = list(self.problem.domain), []
        for f, name in enumerate(self.problem.fields):
            far = Field(name, letters, partial(get, f=f, side=1)) if pair else None
            fields.append(Field(name, letters, partial(get, f=f, side=0), far))
        named = dict(zip(self.coefficients, coefficients, strict=True))
        try:
            result = term.residual(*fields, *coordinates, **named, **data)
        except (InputError, NotElementwise):
            raise
        except Exception as error:
            raise InputError(f"term {term.label} raised {type(error).__name__}: {error}") from error
        pieces = list(result) if isinstance(result, tuple | list) else [result]
        pieces = [p.value if isinstance(p, Field) else p for p in pieces]
        for piece in pieces:
            if not isinstance(piece, Tensor) or piece.shape != (count,):
                got = tuple(piece.shape) if isinstance(piece, Tensor) else type(piece).__name__
                raise InputError(f"term {term.label} must give one number a point, shape ({count},), got {got}")
        return pieces

    def _points(self, term: int, scale: float, x: Array, data: dict[str, Array]) -> TermPoints:
        tensor = partial(torch.as_tensor, dtype=self.dtype, device=self.device)
        values = {name: tensor(v) for name, v in data.items()}
        return term_points(self.problem, self.indices, term, scale, tensor(x), values)

    def _with(self, sets: list[TermPoints]) -> PDELoss:
        other = object.__new__(PDELoss)
        other.__dict__.update(self.__dict__, sets=sets)  # the evaluator, too: its buffers serve all parts in turn
        other._finish()
        return other

    def part(self, begin: int, end: int) -> PDELoss:
        """See :meth:`ddml.losses.loss.Loss.part`."""
        sets, start = [], 0
        for s in self.sets:
            a, b = max(begin - start, 0), min(end - start, len(s))
            if b > a:
                sets.append(s.rows(slice(a, b)))
            start += len(s)
        return self._with(sets)

    def sampled(self, rows: Tensor) -> PDELoss:
        """See :meth:`ddml.losses.loss.Loss.sampled`; each term is the mean over its own chosen points."""
        sets, start = [], 0
        for s in self.sets:
            chosen = rows[(rows >= start) & (rows < start + len(s))] - start
            if len(chosen):
                sets.append(replace(s.rows(chosen), scale=self.problem_terms[s.term].weight / len(chosen)))
            start += len(s)
        return self._with(sets)

    def with_points(self, points: Mapping[int, Array]) -> PDELoss:
        """The same loss with other points (N, d) for some of its terms, by their numbers."""
        sets = [
            self._points(s.term, self.problem_terms[s.term].weight / len(points[s.term]), points[s.term][:, None], {})
            if s.term in points else s
            for s in self.sets
        ]  # fmt: skip
        return self._with(sets)

    @torch.no_grad()
    def residual_size(self, term: int, points: Array, theta: Tensor) -> Array:
        """The residual's absolute value at points (N, d) of one term, the 2-norm of its pieces if there are several."""
        if not len(points):
            return np.zeros(0)
        moved = self._with([self._points(term, 1.0, points[:, None], {})])
        theta = theta.to(device=self.device, dtype=self.dtype)
        squares = torch.cat([sum(r * r for r in pieces) for pieces in moved._pieces(theta)])  # type: ignore[misc]
        return np.asarray(squares.sqrt().to(torch.float64).cpu().numpy())

    def _pieces(self, theta: Tensor) -> Iterator[list[Tensor]]:
        """The residual's pieces chunk by chunk, not weighted and not differentiable."""
        self.evaluator.bind(theta)
        for chunk, inputs in self._inputs(None):
            fields = self._transformed(chunk, self.evaluator.forward(inputs))
            yield self._chunk_residual(chunk, fields, list(theta[self.tail]))

    @torch.no_grad()
    def residual(self, theta: Tensor) -> Tensor:
        """See :meth:`ddml.losses.residual.ResidualLoss.residual`."""
        weighted = zip(self.chunks, self._pieces(theta), strict=True)
        return self._joined([chunk.scale**0.5 * r for chunk, pieces in weighted for r in pieces])

    def initial(self) -> Tensor:
        """The network's parameters and the coefficients' initial values."""
        values = [p.detach().reshape(-1) for p in self.trained]
        coefficients = torch.tensor(list(self.problem.coefficients.values()), dtype=self.dtype, device=self.device)
        return torch.cat([*values, coefficients])

    def residual_count(self) -> int:
        """m, the length of r."""
        theta = self.initial()
        return sum(len(r) for r in self.residuals(theta))

    def _first_stage(self, kept: Any) -> int:
        return 0 if kept is None else int(kept[0])

    def keeps(self, first: int) -> bool:
        """See :meth:`ddml.losses.loss.Loss.keeps`."""
        return bool(self.layer_stages) and self.layer_stages[first][0] > 0

    def prefix(self, theta: Tensor, first: int) -> Any:
        """The jets that enter a layer, per chunk; None for networks of unknown structure."""
        if not self.keeps(first):
            return None
        stage = self.layer_stages[first][0]
        self.evaluator.bind(theta)
        return stage, [self.evaluator.prefix(inputs, stage) for inputs in self.inputs]

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
            program = self._prepared[number] = self.programs[chunk.term].at(self._fixed(chunk))
        count = len(self.coefficients)
        if count:
            program.scalars[:count] = theta[self.tail]
            program.by_scalars.zero_()
        value = self.evaluator.squares(inputs, first, program, chunk.scale)
        if gradient is not None and count:
            gradient[self.tail] += program.by_scalars[:count]
        return value

    def _inputs(self, kept: Any) -> Iterator[tuple[TermPoints, Tensor]]:
        if kept is None:
            return zip(self.chunks, self.inputs, strict=True)
        return zip(self.chunks, kept[1], strict=True)

    def _transformed(self, chunk: TermPoints, jets: Tensor) -> Tensor:
        """Jets (K, N, G, F) of the fields from those of the network (K, N * G, F)."""
        jets = jets.view(len(self.indices), *chunk.inputs.shape[1:3], -1)
        if chunk.mix is not None:
            jets = (chunk.mix * jets).sum(1)
        return jets if chunk.lift is None else jets + chunk.lift

    def residuals(self, theta: Tensor, kept: Any = None) -> Iterator[Tensor]:
        """See :meth:`ddml.losses.residual.ResidualLoss.residuals`."""
        coefficients = list(theta[self.tail])
        first = self._first_stage(kept)
        for chunk, inputs in self._inputs(kept):
            fields = self._transformed(chunk, self.evaluator.jets(theta, inputs, first))
            for r in self._chunk_residual(chunk, fields, coefficients):
                yield chunk.scale**0.5 * r

    def _chunk_residual(self, chunk: TermPoints, fields: Tensor, coefficients: Sequence[Tensor]) -> list[Tensor]:
        def get(index: Index, f: int, side: int) -> Tensor:
            return fields[self.position[index], :, side, f]

        return self._residual_at(chunk, get, coefficients)

    def _residual_at(
        self, chunk: TermPoints, get: Callable[..., Tensor], coefficients: Sequence[Tensor]
    ) -> list[Tensor]:
        # copies: code that changes its arguments in place, as in x -= 0.5, would move the points
        data = {name: values.clone() for name, values in chunk.data.items()}
        return self._residual(
            self.problem_terms[chunk.term], get, chunk.coordinates.clone(), data, coefficients,
            len(chunk), chunk.inputs.shape[2] == 2,
        )  # fmt: skip

    @torch.no_grad()
    def explain(self, theta: Tensor) -> str:
        """See :meth:`ddml.losses.loss.Loss.explain`: the first term and point."""
        for chunk, pieces in zip(self.chunks, self._pieces(theta), strict=True):
            for r in pieces:
                bad = torch.nonzero(~torch.isfinite(r))
                if len(bad):
                    where = [
                        f"{c} = {float(v[bad[0, 0]]):.6g}"
                        for c, v in zip(self.problem.domain, chunk.coordinates, strict=True)
                    ]
                    label = self.problem_terms[chunk.term].label
                    return f"term {label} gives {float(r[bad[0, 0]])} at {', '.join(where)}"
        return super().explain(theta)

    @torch.no_grad()
    def value(self, theta: Tensor, kept: Any = None) -> float:
        """The loss at theta."""
        total, first, coefficients = 0.0, self._first_stage(kept), list(theta[self.tail])
        self.evaluator.bind(theta)
        for number, (chunk, inputs) in enumerate(self._inputs(kept)):
            value = self._squares(theta, first, number, inputs)
            if value is not None:
                total += value
                continue
            fields = self._transformed(chunk, self.evaluator.forward(inputs, first))
            total += chunk.scale * sum(float((r * r).sum()) for r in self._chunk_residual(chunk, fields, coefficients))
        return total

    def _leaves(
        self, chunk: TermPoints, fields: Tensor, coefficients: Sequence[Tensor]
    ) -> tuple[list[Tensor], _Leaves]:
        """The residuals of a chunk and what they are made of, for torch to differentiate."""
        leaves: _Leaves = {}

        def get(index: Index, f: int, side: int) -> Tensor:
            key = self.position[index], side, f
            if key not in leaves:
                leaves[key] = fields[key[0], :, side, f].detach().requires_grad_()
            return leaves[key]

        return self._residual_at(chunk, get, coefficients), leaves

    def _adjoint(self, chunk: TermPoints, leaves: Iterable[tuple[int, int, int]], gradients: Sequence[Any]) -> Tensor:
        """The adjoint (K, N * G, F) of the network's jets from that of the residual's arguments."""
        adjoint = torch.zeros(
            (len(self.indices), *chunk.inputs.shape[1:3], len(self.problem.fields)),
            dtype=self.dtype, device=self.device,
        )  # fmt: skip
        for (k, side, f), g in zip(leaves, gradients, strict=True):
            if g is not None:
                adjoint[k, :, side, f] = g
        if chunk.mix is not None:
            adjoint = (chunk.mix * adjoint.unsqueeze(1)).sum(0)
        return adjoint.flatten(1, 2)

    def value_gradient(
        self, theta: Tensor, gradient: Tensor, kept: Any = None, active: frozenset[int] | None = None
    ) -> float:
        """See :meth:`ddml.losses.loss.Loss.value_gradient`: only the residuals go through autograd."""
        total, first = 0.0, self._first_stage(kept)
        stages = None if active is None or not self.layer_stages else [s for i in active for s in self.layer_stages[i]]
        coefficients = [c.detach().requires_grad_() for c in theta[self.tail]] if self.coefficients else []
        self.evaluator.bind(theta, gradient, stages)
        for number, (chunk, inputs) in enumerate(self._inputs(kept)):
            value = self._squares(theta, first, number, inputs, gradient)
            if value is not None:
                total += value
                continue
            fields = self._transformed(chunk, self.evaluator.forward(inputs, first))
            pieces, leaves = self._leaves(chunk, fields, coefficients)
            loss = chunk.scale * sum((r.square().sum() for r in pieces[1:]), pieces[0].square().sum())
            total += float(loss.detach())
            if not loss.requires_grad:
                continue
            gradients = torch.autograd.grad(loss, [*leaves.values(), *coefficients], allow_unused=True)
            for k, g in enumerate(gradients[len(leaves) :]):
                if g is not None:
                    gradient[self.tail.start + k] += g
            self.evaluator.backward(self._adjoint(chunk, leaves, gradients[: len(leaves)]))
        self.evaluator.finish()
        return total

    def _linearised(self, theta: Tensor) -> Iterator[tuple[TermPoints, Tensor, Tensor, Tensor]]:
        """For each piece of r: chunk, network inputs, adjoint of the jets, derivatives (c, N) by the coefficients.

        The residual at a point depends on the fields at that point only; the evaluator is bound and
        has done its forward pass.
        """
        coefficients = [c.detach().requires_grad_() for c in theta[self.tail]]
        for chunk, inputs in self._inputs(None):
            fields = self._transformed(chunk, self.evaluator.forward(inputs))
            pieces, leaves = self._leaves(chunk, fields, coefficients)
            for r in pieces:
                weights = torch.ones_like(r, requires_grad=True)
                if not r.requires_grad:
                    r = r + 0 * weights
                by_coefficient = torch.zeros(len(coefficients), len(r), dtype=self.dtype, device=self.device)
                gradients = torch.autograd.grad(
                    r, [*leaves.values(), *coefficients], weights, create_graph=bool(coefficients),
                    retain_graph=True, allow_unused=True,
                )  # fmt: skip
                for row, g in zip(by_coefficient, gradients[len(leaves) :], strict=True):
                    if g is not None and g.requires_grad:
                        row += torch.autograd.grad(g, weights, retain_graph=True)[0]
                found = [None if g is None else g.detach() for g in gradients[: len(leaves)]]
                scale = chunk.scale**0.5
                yield chunk, inputs, scale * self._adjoint(chunk, leaves, found), scale * by_coefficient

    def jacobian_product(self, theta: Tensor, direction: Tensor) -> Tensor:
        """See :meth:`ddml.losses.residual.ResidualLoss.jacobian_product`."""
        self.evaluator.bind(theta)
        pieces = []
        for chunk, inputs, adjoint, by_coefficient in self._linearised(theta):
            moved = (adjoint * self.evaluator.tangent(direction, inputs)).sum((0, 2))
            pieces.append(moved.view(len(chunk), -1).sum(1) + direction[self.tail] @ by_coefficient)
        return self._joined(pieces)

    def jacobian_transpose_product(self, theta: Tensor, weights: Tensor, product: Tensor) -> None:
        """See :meth:`ddml.losses.residual.ResidualLoss.jacobian_transpose_product`."""
        self.evaluator.bind(theta, product)
        begin = 0
        for chunk, _, adjoint, by_coefficient in self._linearised(theta):
            w = weights[begin : begin + len(chunk)]
            begin += len(chunk)
            self.evaluator.backward(adjoint * w.repeat_interleave(chunk.inputs.shape[2])[None, :, None])
            product[self.tail] += by_coefficient @ w
        self.evaluator.finish()

    def jacobian(self, theta: Tensor) -> Tensor:
        """See :meth:`ddml.losses.residual.ResidualLoss.jacobian`."""
        self.evaluator.bind(theta)
        pieces = []
        for chunk, _, adjoint, by_coefficient in self._linearised(theta):
            rows = self.evaluator.rows(adjoint)
            if chunk.inputs.shape[2] > 1:
                rows = rows.reshape(len(chunk), -1, rows.shape[1]).sum(1)
            rows[:, self.tail] = by_coefficient.T
            pieces.append(rows.T)
        if not pieces:
            return super().jacobian(theta)
        return (torch.cat(pieces, dim=1) if len(pieces) > 1 else pieces[0]).T

    @property
    def charges(self) -> PDECharges:
        """See :attr:`ddml.losses.loss.Loss.charges`."""
        return PDECharges(self, self.evaluator)

    @torch.no_grad()
    def fields(self, theta: Tensor, points: Array) -> Array:
        """The fields (N, F) at points (N, d)."""
        x = torch.as_tensor(np.asarray(points), dtype=self.dtype, device=self.device)
        self.plain.bind(theta)
        result = []
        for piece in x.split(4 * self.chunk):
            inputs = torch.stack(tuple(self.problem.embed(*piece.T.clone())), dim=1)
            value = self.plain.forward(inputs[None])[0]
            for function, combine in ((self.problem.factor, torch.mul), (self.problem.lift, torch.add)):
                term = function(*piece.T.clone())
                term = torch.stack(term, dim=1) if isinstance(term, tuple) else term[:, None]
                value = combine(value, term)
            result.append(value.to(torch.float64).cpu().clone())
        return np.asarray(torch.cat(result).numpy())
