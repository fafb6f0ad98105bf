"""Second-order jets by the compiled kernels (``ddml/kernels/jets.c``)."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ddml import kernels
from ddml.networks.tanh import TanhNetwork

from .evaluator import Index
from .fused import second_order
from .taylor import TaylorJets


class _Stage(ctypes.Structure):
    """A stage, as in the kernels; ``slope`` -1: none."""

    _fields_ = [
        (name, ctypes.c_long)
        for name in ("inputs", "outputs", "activation", "residual", "weight", "bias", "slope", "active")
    ]


class _Network(ctypes.Structure):
    """A chain of stages and the derivatives to propagate."""

    _fields_ = [
        ("jets", ctypes.c_long),
        ("seconds", ctypes.c_long),
        ("second", ctypes.POINTER(ctypes.c_long)),
        ("stages", ctypes.c_long),
        ("stage", ctypes.POINTER(_Stage)),
    ]


class _Array(ctypes.Structure):
    """A tensor (jets, points, features) of any strides."""

    _fields_ = [("data", ctypes.c_void_p), *((name, ctypes.c_long) for name in ("jet", "point", "feature"))]


def _array(tensor: Tensor) -> _Array:
    return _Array(tensor.data_ptr(), *tensor.stride())


def _argument(value: Any) -> Any:
    """What C gets: pointers for tensors and structures, integers for numbers."""
    if isinstance(value, Tensor):
        return ctypes.c_void_p(value.data_ptr())
    if isinstance(value, ctypes.Structure):
        return ctypes.byref(value)
    return ctypes.c_long(value) if isinstance(value, int) else value


class Squares(Protocol):
    """What :meth:`CompiledJets.squares` works with (:class:`ddml.problems.pde.program.Prepared`)."""

    points: int
    code: ctypes.Structure
    pointers: ctypes.Array[ctypes.c_void_p]
    scalars: Tensor
    by_scalars: Tensor


SUFFIXES = {torch.float64: "double", torch.float32: "float"}


class CompiledJets(TaylorJets):
    """The evaluator of :class:`ddml.jets.fused.FusedJets` in C: about four times as fast.

    Nothing but the points' jets is kept between forward and backward pass; the backward pass
    repeats the forward one on 64 points at a time (128 in single precision), which stay in the cache.

    Raises
    ------
    ValueError
        If a derivative of order above two is asked for, or the kernels were not built; by evaluations, for tensors of
        other shapes or another precision than the kernels would read.
    """

    chunk = 1 << 14

    def __init__(
        self, network: TanhNetwork, offsets: Mapping[str, tuple[int, torch.Size]], indices: Sequence[Index]
    ) -> None:
        super().__init__(network, offsets, indices)
        found = kernels.library()
        if found is None:
            raise ValueError("the kernels of ddml/kernels were not built for this machine")
        self.name, self.library = found
        pairs = [place for triple in second_order(self.indices) for place in triple[1:]]
        self._second = (ctypes.c_long * len(pairs))(*pairs)
        self._stages = (_Stage * len(self.stages))()
        for made, stage in zip(self._stages, self.stages, strict=True):
            weight, shape = offsets[stage.weight]
            made.outputs, made.inputs = shape
            made.activation, made.residual = stage.activation, stage.residual
            made.weight, made.bias = weight, offsets[stage.bias][0]
            made.slope = -1 if stage.slope is None else offsets[stage.slope][0]
        self._network = _Network(len(self.indices), len(pairs) // 2, self._second, len(self.stages), self._stages)
        needed = []
        for suffix in SUFFIXES.values():
            getattr(self.library, f"squares_{suffix}").restype = ctypes.c_double
            size = getattr(self.library, f"workspace_{suffix}")
            size.restype = ctypes.c_long
            needed.append(size(ctypes.byref(self._network)))
        self._space = torch.empty(max(needed), dtype=torch.uint8)
        self._size = max(begin + shape.numel() for begin, shape in offsets.values())

    def __repr__(self) -> str:
        return f"{type(self).__name__} ({self.name})"

    def _call(self, function: str, dtype: torch.dtype, *arguments: object) -> float:
        """Call a function of the kernels."""
        converted = [_argument(a) for a in (self._network, *arguments, self._space)]
        return float(getattr(self.library, f"{function}_{SUFFIXES[dtype]}")(*converted))

    def bind(self, theta: Tensor, gradient: Tensor | None = None, active: Sequence[int] | None = None) -> None:
        """See :class:`ddml.jets.evaluator.Evaluator`."""
        if theta.dtype not in SUFFIXES:
            raise ValueError(f"the kernels compute in {' and '.join(map(str, SUFFIXES))}, not in {theta.dtype}")
        self.leaf, self.gradient = theta.detach().contiguous(), gradient
        for name, vector in (("theta", self.leaf), ("gradient", gradient)):
            if vector is not None:
                self._check_vector(name, vector)
        wanted = range(len(self.stages)) if active is None else active
        for number, stage in enumerate(self._stages):
            stage.active = number in wanted

    def _check_vector(self, name: str, vector: Tensor) -> None:
        """Refuse a vector with fewer numbers than the network has parameters, of another type, or with gaps."""
        if vector.dim() != 1 or len(vector) < self._size or not vector.is_contiguous():
            raise ValueError(f"{name} must be contiguous, of {self._size} numbers or more; got {tuple(vector.shape)}")
        self._check_type(name, vector)

    def _check_type(self, name: str, tensor: Tensor) -> None:
        if tensor.dtype != self.leaf.dtype or tensor.device.type != "cpu":
            raise ValueError(f"{name} must be of {self.leaf.dtype} on the CPU; got {tensor.dtype} on {tensor.device}")

    def _check_inputs(self, inputs: Tensor, first: int) -> None:
        """Refuse jets of other width or number than stage ``first`` reads."""
        expected = len(self.indices), self._stages[first].inputs
        if inputs.dim() != 3 or (inputs.shape[0], inputs.shape[2]) != expected:
            raise ValueError(f"inputs must be ({expected[0]}, N, {expected[1]}); got {tuple(inputs.shape)}")
        self._check_type("inputs", inputs)

    def _forward(self, inputs: Tensor, first: int, last: int) -> Tensor:
        self._check_inputs(inputs, first)
        shape = len(self.indices), self._stages[last - 1].outputs, inputs.shape[1]
        result = torch.empty(shape, dtype=inputs.dtype).permute(0, 2, 1)
        self._call("forward", inputs.dtype, self.leaf, first, last, _array(inputs), inputs.shape[1], _array(result))
        return result

    def prefix(self, inputs: Tensor, first: int) -> Tensor:
        """See :class:`ddml.jets.evaluator.Evaluator`."""
        return self._forward(inputs, 0, first) if first else inputs

    def forward(self, inputs: Tensor, first: int = 0) -> Tensor:
        """See :class:`ddml.jets.evaluator.Evaluator`."""
        self.last = inputs, first
        return self._forward(inputs, first, len(self.stages))

    def backward(self, adjoint: Tensor) -> None:
        """See :class:`ddml.jets.evaluator.Evaluator`."""
        assert self.gradient is not None
        self._backward(adjoint, self.gradient, False)

    def rows(self, adjoint: Tensor) -> Tensor:
        """See :class:`ddml.jets.evaluator.Evaluator`."""
        result = torch.zeros(len(self.leaf), adjoint.shape[1], dtype=adjoint.dtype)
        self._backward(adjoint, result, True)
        return result.T

    def _backward(self, adjoint: Tensor, target: Tensor, rows: bool) -> None:
        inputs, first = self.last
        expected = len(self.indices), inputs.shape[1], self._stages[len(self.stages) - 1].outputs
        if adjoint.shape != expected:
            raise ValueError(f"the adjoint must be {expected}; got {tuple(adjoint.shape)}")
        self._check_type("the adjoint", adjoint)
        self._call(
            "backward", inputs.dtype, self.leaf, first, _array(inputs), inputs.shape[1], _array(adjoint), target, rows
        )

    def squares(self, inputs: Tensor, first: int, program: Squares, scale: float) -> float:
        """Scale times the sum of squares that a program computes from the jets, all in one pass.

        If the evaluator was bound with a gradient, that by theta is added to it and that by the scalars
        to ``program.by_scalars``.
        """
        self._check_inputs(inputs, first)
        if program.points != inputs.shape[1]:
            raise ValueError(f"the program is prepared for {program.points} points; got inputs {tuple(inputs.shape)}")
        self._check_type("the program", program.scalars)
        return self._call(
            "squares", inputs.dtype, self.leaf, first, _array(inputs), inputs.shape[1], program.code, program.pointers,
            program.scalars, ctypes.c_double(scale), self.gradient, program.by_scalars,
        )  # fmt: skip

    def tangent(self, direction: Tensor, inputs: Tensor) -> Tensor:
        """See :class:`ddml.jets.evaluator.Evaluator`."""
        direction = direction.contiguous()
        self._check_inputs(inputs, 0)
        self._check_vector("direction", direction)
        shape = len(self.indices), self._stages[len(self.stages) - 1].outputs, inputs.shape[1]
        result = torch.empty(shape, dtype=inputs.dtype).permute(0, 2, 1)
        self._call("tangent", inputs.dtype, self.leaf, direction, _array(inputs), inputs.shape[1], _array(result))
        return result

    def finish(self) -> None:
        """See :class:`ddml.jets.evaluator.Evaluator`."""
