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
        If a derivative of order above two is asked for, or the kernels were not built.
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

    def __repr__(self) -> str:
        return f"{type(self).__name__} ({self.name})"

    def _call(self, function: str, dtype: torch.dtype, *arguments: object) -> float:
        """Call a function of the kernels."""
        converted = [_argument(a) for a in (self._network, *arguments, self._space)]
        return float(getattr(self.library, f"{function}_{SUFFIXES[dtype]}")(*converted))

    def bind(self, theta: Tensor, gradient: Tensor | None = None, active: Sequence[int] | None = None) -> None:
        """See :class:`ddml.jets.evaluator.Evaluator`."""
        self.leaf, self.gradient = theta.detach().contiguous(), gradient
        wanted = range(len(self.stages)) if active is None else active
        for number, stage in enumerate(self._stages):
            stage.active = number in wanted

    def _forward(self, inputs: Tensor, first: int, last: int) -> Tensor:
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
        self._call(
            "backward", inputs.dtype, self.leaf, first, _array(inputs), inputs.shape[1], _array(adjoint), target, rows
        )

    def squares(self, inputs: Tensor, first: int, program: Squares, scale: float) -> float:
        """Scale times the sum of squares that a program computes from the jets, all in one pass.

        If the evaluator was bound with a gradient, that by theta is added to it and that by the scalars
        to ``program.by_scalars``.
        """
        return self._call(
            "squares", inputs.dtype, self.leaf, first, _array(inputs), inputs.shape[1], program.code, program.pointers,
            program.scalars, ctypes.c_double(scale), self.gradient, program.by_scalars,
        )  # fmt: skip

    def tangent(self, direction: Tensor, inputs: Tensor) -> Tensor:
        """See :class:`ddml.jets.evaluator.Evaluator`."""
        shape = len(self.indices), self._stages[len(self.stages) - 1].outputs, inputs.shape[1]
        result = torch.empty(shape, dtype=inputs.dtype).permute(0, 2, 1)
        self._call(
            "tangent", inputs.dtype, self.leaf, direction.contiguous(), _array(inputs), inputs.shape[1], _array(result)
        )
        return result

    def finish(self) -> None:
        """See :class:`ddml.jets.evaluator.Evaluator`."""
