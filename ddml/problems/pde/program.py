"""A residual and its derivatives as straight-line code that the kernels run point by point.

The user's residual is ordinary torch code. It is traced once, with its backward pass; what depends on the
coordinates alone is computed by torch for each point and given to the code as arrays, the rest becomes
operations on numbered values (``program`` in ``ddml/kernels/jets.c``). Residuals that use anything but
elementwise arithmetic, that read the values of a tensor (to branch on them, or to compute in numpy), or that
use a tensor of more than one number from elsewhere, stay in torch.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

# in the order of `enum code`
_CODES = ("ADD", "SUB", "MUL", "DIV", "NEG", "WHERE", "GT", "GE", "LT", "LE", "EQ", "POW", "SQRT", "ABS", "SGN", "TANH",
          "SIN", "COS", "EXP", "LOG", "SINH", "COSH")  # fmt: skip
_ELEMENTWISE = {code.lower(): code for code in _CODES} | {"rsub": "SUB", "sign": "SGN"}
_SAME = {"detach", "alias", "clone", "lift_fresh_copy", "lift_fresh", "_to_copy", "view", "expand", "squeeze"}

# methods of tensors through which numbers leave torch; what is computed from them cannot be traced
_READS = {"numpy", "tolist", "item", "data_ptr", "storage", "untyped_storage"} | {
    f"__{name}__"
    for name in ("array", "dlpack", "float", "int", "index", "bool", "complex", "contains", "format", "repr",
                 "deepcopy", "reduce_ex")
}  # fmt: skip


class _Operation(ctypes.Structure):
    _fields_ = [(name, ctypes.c_long) for name in ("code", "a", "b", "c")]


class _Program(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_long) for name in ("leaves", "arrays", "scalars", "operations", "forward", "residuals")),
        ("leaf", ctypes.POINTER(ctypes.c_long)),
        ("operation", ctypes.POINTER(_Operation)),
        *((name, ctypes.POINTER(ctypes.c_long)) for name in ("residual", "leaf_bar", "scalar_bar")),
    ]


class NotElementwise(Exception):
    """The traced code is not a sequence of operations that the kernels know; the text says why in a few words."""


class _Node:
    """A call of a torch function in the trace, or with no function one of the inputs or a constant."""

    def __init__(self, result: Tensor, function: Any = None, arguments: Any = (), keywords: Any = None) -> None:
        self.result, self.function, self.arguments, self.keywords = result, function, arguments, keywords or {}
        parents = [a for a in tree_leaves((arguments, self.keywords)) if isinstance(a, _Node)]
        self.moving: bool = any(n.moving for n in parents)  # depends on what the optimiser changes
        self.fixed: bool = any(n.fixed for n in parents)  # depends on the points

    @property
    def name(self) -> str:
        """The function's name without overload."""
        return self.function._schema.name.removeprefix("aten::") if self.function else "input"


class _Trace(TorchDispatchMode):  # type: ignore[misc]
    """Records what torch computes inside the context, backward passes included."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # torch would import its compiler, which takes a second, to keep it out of here

    def __init__(self, moving: Sequence[Tensor], fixed: Sequence[Tensor]) -> None:
        super().__init__()
        self.nodes: dict[int, _Node] = {}  # by the identity of their results, which they keep alive
        for tensor in (*moving, *fixed):
            self.nodes[id(tensor)] = _Node(tensor)
        for tensor in moving:
            self.nodes[id(tensor)].moving = True
        for tensor in fixed:
            self.nodes[id(tensor)].fixed = True

    def node(self, value: Any) -> Any:
        """The node of a tensor; other values as they are.

        A tensor that nothing in the trace has made is one number, the same at all points.

        Raises
        ------
        NotElementwise
            If such a tensor has more: they may belong to the points of the trace.
        """
        if not isinstance(value, Tensor):
            return value
        if id(value) not in self.nodes:
            if value.numel() != 1:
                raise NotElementwise("a tensor from elsewhere")
            self.nodes[id(value)] = _Node(value)
        return self.nodes[id(value)]

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        arguments, keywords = tree_map(self.node, (list(args), kwargs or {}))
        if function._schema.is_mutable:
            raise NotElementwise("a change in place")
        if torch.Tag.nondeterministic_seeded in function.tags:
            raise NotElementwise("random numbers")
        result = function(*args, **(kwargs or {}))
        node = _Node(result, function, arguments, keywords)
        if not isinstance(result, Tensor):
            raise NotElementwise(f"operation {node.name}")
        if result.is_complex():
            raise NotElementwise("complex numbers")
        self.nodes[id(result)] = node
        return result

    def check_constants(self) -> None:
        """Raise NotElementwise if a tensor that no input enters has different numbers, as ``torch.linspace`` has."""
        for node in self.nodes.values():
            if not node.moving and not node.fixed and not bool((node.result == node.result.flatten()[:1]).all()):
                raise NotElementwise(f"different numbers from {node.name}")


class _Closed(TorchFunctionMode):  # type: ignore[misc]
    """Refuses to take numbers out of tensors."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(function, "__name__", "") in _READS:
            raise NotElementwise(f"values read by {function.__name__}")
        return function(*args, **(kwargs or {}))


@dataclass
class Prepared:
    """A program and the numbers that it works with at some points."""

    points: int
    code: ctypes.Structure
    arrays: list[Tensor]  # (N,) each, and their addresses
    pointers: ctypes.Array[ctypes.c_void_p]
    scalars: Tensor  # room for the coefficients, and behind them the constants of the code
    by_scalars: Tensor  # room for the gradient by them


class Program:
    """Traced code of residual pieces and of the derivatives of half their weighted squares.

    Parameters
    ----------
    function
        From fixed tensors, leaves and scalars (lists of (N,) tensors) to residual pieces (N,).
    fixed
        Examples of these tensors.
    places
        Which jet and output of the network each leaf is.
    scalars
        Their number.

    Raises
    ------
    NotElementwise
        If the kernels cannot run the code.
    """

    def __init__(
        self,
        function: Callable[[list[Tensor], list[Tensor], list[Tensor]], list[Tensor]],
        fixed: list[Tensor],
        places: Sequence[tuple[int, int]],
        scalars: int,
    ) -> None:
        self.constants: list[float] = []
        self._inputs = [f.clone() for f in fixed]  # tensors are told apart by their identity
        like = fixed[0]
        leaves = [torch.ones_like(like).requires_grad_() for _ in places]
        numbers = [torch.ones_like(like).requires_grad_() for _ in range(scalars)]
        weight = torch.ones_like(like)
        self._names: dict[_Node, tuple[str, int]] = {}
        self._lines: list[tuple[str, list[tuple[str, int]]]] = []
        self._arrays: list[_Node] = []
        self._scalars = scalars
        trace = _Trace([weight, *leaves, *numbers], self._inputs)
        with trace, torch.enable_grad():
            with _Closed():
                pieces = function(self._inputs, leaves, numbers)
            live = [r for r in pieces if r.requires_grad]
            if not live:
                raise NotElementwise("the residual does not depend on the fields")
            # a sum needs no gradient to begin with: for one torch would import sympy, half a second
            total = sum(
                ((weight * r.detach() * r).sum() for r in live[1:]), (weight * live[0].detach() * live[0]).sum()
            )
            bars = torch.autograd.grad(total, [*leaves, *numbers], allow_unused=True)
        trace.check_constants()
        for kind, tensors in (("weight", [weight]), ("leaf", leaves), ("scalar", numbers)):
            self._names |= {trace.node(t): (kind, i) for i, t in enumerate(tensors)}
        residuals = [self._name(trace.node(r)) for r in pieces]
        forward = len(self._lines)
        adjoints = [None if b is None else self._name(trace.node(b)) for b in bars]
        self._pack(places, residuals, forward, adjoints)

    def _constant(self, value: float) -> tuple[str, int]:
        self.constants.append(value)
        return "scalar", self._scalars + len(self.constants) - 1

    def _name(self, value: Any) -> tuple[str, int]:
        """The name of a traced value, after the operations that compute it."""
        if isinstance(value, int | float):
            return self._constant(float(value))
        if not isinstance(value, _Node):
            raise NotElementwise(f"an argument {value!r}")
        if value in self._names:
            return self._names[value]
        if value.moving:
            name = self._emit(value)
        elif value.fixed:
            self._arrays.append(value)
            name = "array", len(self._arrays) - 1
        else:
            name = self._constant(float(value.result.flatten()[0]))
        self._names[value] = name
        return name

    def _line(self, code: str, *arguments: Any) -> tuple[str, int]:
        named = [a if isinstance(a, tuple) else self._name(a) for a in arguments]
        self._lines.append((code, named))
        return "result", len(self._lines) - 1

    def _emit(self, node: _Node) -> tuple[str, int]:
        name, arguments = node.name, list(node.arguments)
        if node.result.shape not in (self._inputs[0].shape, ()):
            raise NotElementwise(f"{name} with a result of shape {tuple(node.result.shape)}")
        if name in _SAME:
            return self._name(arguments[0])
        if name == "tanh_backward":
            return self._line(
                "MUL", arguments[0], self._line("SUB", 1.0, self._line("MUL", arguments[1], arguments[1]))
            )
        if name in ("relu", "threshold_backward"):
            argument, bound = (arguments[0], 0.0) if name == "relu" else arguments[1:]
            return self._line("WHERE", self._line("GT", argument, bound), arguments[0], 0.0)
        if name == "reciprocal":
            return self._line("DIV", 1.0, arguments[0])
        if name == "rsub":
            arguments.reverse()
        if name in ("zeros_like", "ones_like"):
            return self._constant(float(name == "ones_like"))
        if name == "pow" and arguments[1] in (0, 1, 2, 3):
            base, exponent = self._name(arguments[0]), int(arguments[1])
            if exponent < 2:
                return base if exponent else self._constant(1.0)
            square = self._line("MUL", base, base)
            return square if exponent == 2 else self._line("MUL", square, base)
        if name not in _ELEMENTWISE or set(node.keywords) - {"alpha"}:
            raise NotElementwise(f"operation {name}")
        if "alpha" in node.keywords:
            arguments[1] = self._line("MUL", arguments[1], node.keywords["alpha"])
        return self._line(_ELEMENTWISE[name], *arguments)

    def _pack(
        self,
        places: Sequence[tuple[int, int]],
        residuals: list[tuple[str, int]],
        forward: int,
        adjoints: Sequence[tuple[str, int] | None],
    ) -> None:
        """Number all values and lay the code out for C."""
        starts = {"weight": 0, "leaf": 1, "array": 1 + len(places)}
        starts["scalar"] = starts["array"] + len(self._arrays)
        starts["result"] = starts["scalar"] + self._scalars + len(self.constants)

        def number(named: tuple[str, int] | None) -> int:
            return -1 if named is None else starts[named[0]] + named[1]

        operations = (_Operation * len(self._lines))()
        for made, (code, arguments) in zip(operations, self._lines, strict=True):
            made.code = _CODES.index(code)
            made.a, made.b, made.c = ([number(a) for a in arguments] + [0, 0])[:3]
        bars = [number(a) for a in adjoints]
        self.code = _Program(
            len(places), len(self._arrays), self._scalars + len(self.constants), len(self._lines), forward,
            len(residuals), _longs([x for place in places for x in place]), operations,
            _longs([number(r) for r in residuals]), _longs(bars[: len(places)]),
            _longs(bars[len(places) :] + [-1] * len(self.constants)),
        )  # fmt: skip

    def at(self, fixed: Sequence[Tensor]) -> Prepared:
        """The code with its numbers at some points, from the fixed tensors (N,) there."""
        arrays = self._at(fixed)
        pointers = (ctypes.c_void_p * len(arrays))(*(a.data_ptr() for a in arrays))
        scalars = fixed[0].new_tensor([0.0] * self._scalars + self.constants)
        return Prepared(len(fixed[0]), self.code, arrays, pointers, scalars, torch.zeros_like(scalars))

    def _at(self, fixed: Sequence[Tensor]) -> list[Tensor]:
        """The numbers (N,) for each point that the code asks for."""
        known: dict[_Node, Any] = {}
        inputs = dict(zip(map(id, self._inputs), fixed, strict=True))

        def find(value: Any) -> Any:
            if not isinstance(value, _Node):
                return value
            if value not in known:
                if value.function is None:
                    known[value] = inputs.get(id(value.result), value.result)
                elif value.name in ("view", "expand"):  # to the number of points of the example
                    known[value] = find(value.arguments[0])
                elif not value.fixed:
                    known[value] = value.result.flatten()[0]
                else:
                    arguments, keywords = tree_map(find, (value.arguments, value.keywords))
                    known[value] = value.function(*arguments, **keywords)
            return known[value]

        like = fixed[0]
        return [find(node).to(like.dtype).expand(len(like)).contiguous() for node in self._arrays]


def _longs(values: Sequence[int]) -> Any:
    return (ctypes.c_long * len(values))(*values)
