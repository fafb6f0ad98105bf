"""Evaluations that are recorded once and replayed: a GPU is often done sooner than it can be told what to do.

Not run on a GPU yet.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ddml.errors import InputError
from ddml.numbers import Number

from .loss import Loss

# our choices: evaluations before the recorded one, in which libraries choose and allocate; where it is recorded, as a
# multiple of the parameters; how much the replay may differ from the plain evaluation, in roundings of 1
WARM, ASIDE, ROUNDINGS = 3, 0.9, 1e4

Recorder = Callable[[Callable[[], Number]], tuple[Number, Callable[[], None]]]
"""From an evaluation: what it gives, in memory that stays, and what computes that anew from what is in memory then."""


def cuda_graph(evaluate: Callable[[], Number]) -> tuple[Number, Callable[[], None]]:
    """Record an evaluation as a CUDA graph, on the current device."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM):
            evaluate()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        value = evaluate()
    return value, graph.replay


class Recorded:
    """The loss and gradient of a loss on the samples that it has, recorded now.

    Parameters
    ----------
    loss
        Whose :meth:`.Loss.value_gradient` does nothing but queue operations that are the same at any parameters.
    theta
        Parameters (n,), where a replay is compared with the plain evaluation.
    record
        How.

    Raises
    ------
    InputError
        If it cannot be recorded, or a replay gives something else than the plain evaluation.
    """

    def __init__(self, loss: Loss, theta: Tensor, record: Recorder = cuda_graph) -> None:
        self._theta, self._row = ASIDE * theta.detach(), torch.zeros_like(theta)

        def evaluate() -> Number:
            self._row.zero_()
            return loss.value_gradient(self._theta, self._row)

        try:
            value, self._replay = record(evaluate)
        except RuntimeError as error:
            line = str(error).splitlines()[0]
            raise InputError(f"an evaluation cannot be recorded: {line}; leave -capture out") from error
        if not isinstance(value, Tensor):
            raise InputError("an evaluation reads numbers before its end and cannot be recorded: leave -capture out")
        self._value = value
        plain, found = torch.zeros_like(theta), torch.zeros_like(theta)
        expected, replayed = torch.as_tensor(loss.value_gradient(theta, plain)), self(theta, found)
        most = ROUNDINGS * torch.finfo(theta.dtype).eps
        # where the plain one is not finite the solver sees to it
        right = (replayed - expected).abs() <= most * expected.abs(), (found - plain).norm() <= most * plain.norm()
        if not all(bool(each) for each in right) and bool(expected.isfinite()):
            raise InputError(
                "a recorded evaluation gives other numbers than the plain one: it does not do the same at all "
                "parameters; leave -capture out"
            )

    def __call__(self, theta: Tensor, gradient: Tensor) -> Tensor:
        """See :meth:`.Loss.value_gradient`."""
        self._theta.copy_(theta)
        self._replay()
        gradient += self._row
        return self._value.clone()
