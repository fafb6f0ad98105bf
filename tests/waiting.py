"""A device without a GPU: torch's ``meta`` computes shapes only, and what a process would wait for is answered here."""

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

ROOT = Path(__file__).parents[1]
OURS = tuple(str(ROOT / room) for room in ("ddml", "solvers", "drivers"))


def ones(tensor: Tensor) -> Tensor:
    """On the host, of the same shape and type."""
    return torch.ones(tensor.shape, dtype=tensor.dtype)


# what reads from a device, and what it is told
ANSWERS: dict[str, Callable[..., Any]] = {
    "__int__": lambda t: 1,
    "__index__": lambda t: 1,
    "__bool__": lambda t: True,
    "is_nonzero": lambda t: True,
    "item": lambda t: ones(t).item(),
    "tolist": lambda t: ones(t).tolist(),
    "cpu": ones,
    "allclose": lambda *_, **__: True,
    "equal": lambda *_: True,
    "nonzero": lambda t, **_: t.new_zeros((0, t.dim()), dtype=torch.int64),
}
MOVES = {"to", "copy_", "cpu", "type_as", "new_tensor", "as_tensor", "_has_compatible_shallow_copy_type", "__set__"}
REFUSED = {"numpy", "__array__", "__dlpack__"}  # no device hands these out
INDEXED = {"__getitem__", "__setitem__", "index_select", "index_add_"}  # numbers on the host serve on any device


class Waiting(TorchFunctionMode):
    """Counts by place what would wait for a device, and refuses operations that mix devices.

    Attributes
    ----------
    waits, uploads : Counter of str
        Reads from the device and copies to it, by file and function of ours.
    operations : int
        All others with a tensor on the device: what a device is told to do, about.

    Parameters
    ----------
    value
        What ``float`` is told.
    """

    def __init__(self, value: float = 1.0) -> None:
        super().__init__()
        self.value = value
        self.clear()

    def clear(self) -> None:
        """Forget what has been counted."""
        self.waits, self.uploads, self.operations = Counter[str](), Counter[str](), 0

    @property
    def total(self) -> int:
        """How many times it would have waited."""
        return sum(self.waits.values())

    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        named = named or {}
        name = getattr(function, "__name__", "")
        devices = {t.device.type for t in tensors((arguments, named)) if t.dim()}
        first = arguments[0] if arguments else None
        if isinstance(first, Tensor) and first.device.type == "meta":
            if name in REFUSED:
                raise RuntimeError(f"{name} of a tensor on a device at {place()}")
            if name == "__float__":
                self.waits[place()] += 1
                return self.value
            if name in ANSWERS:
                self.waits[place()] += 1
                return ANSWERS[name](*arguments, **named)
            if name == "to" and goes_to("cpu", arguments[1:], named):
                self.waits[place()] += 1
                found = ones(first)
                return found.to(*arguments[1:], **named)
        if name == "copy_" and first.device.type == "cpu" and arguments[1].device.type == "meta":
            self.waits[place()] += 1
            return first.fill_(1)
        if len(devices) > 1 and name not in MOVES | INDEXED:
            raise RuntimeError(f"{name} mixes devices at {place()}")
        result = function(*arguments, **named)
        if isinstance(result, Tensor) and result.device.type == "meta":
            if name in MOVES and isinstance(first, Tensor) and "cpu" in {t.device.type for t in tensors(arguments[:2])}:
                self.uploads[place()] += 1
            elif name not in {"detach", "__get__"}:
                self.operations += 1
        return result


def goes_to(kind: str, arguments: Any, named: Any) -> bool:
    """Whether these arguments of ``Tensor.to`` name that kind of device."""
    for given in (*arguments, *named.values()):
        if isinstance(given, Tensor):
            given = given.device
        if isinstance(given, str | torch.device) and torch.device(given).type == kind:
            return True
    return False


def tensors(given: Any) -> Iterator[Tensor]:
    """All tensors in nested arguments."""
    if isinstance(given, Tensor):
        yield given
    elif isinstance(given, dict):
        yield from tensors(list(given.values()))
    elif isinstance(given, list | tuple):
        for each in given:
            yield from tensors(each)


def place() -> str:
    """File and function of ours that is at work."""
    frame = sys._getframe(1)
    while frame is not None and not frame.f_code.co_filename.startswith(OURS):
        frame = frame.f_back
    if frame is None:
        return "elsewhere"
    return f"{Path(frame.f_code.co_filename).relative_to(ROOT)}:{frame.f_code.co_name}"
