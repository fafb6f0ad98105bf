"""Which evaluator a network gets."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import nn

from ddml import kernels
from ddml.networks.tanh import TanhNetwork

from .compiled import SUFFIXES, CompiledJets
from .evaluator import Evaluator, Index
from .fused import ORDER, FusedJets
from .nested import NestedJets
from .taylor import TaylorJets


def all_stages_trained(module: nn.Module, names: Collection[str]) -> bool:
    """Whether a module is a :class:`ddml.networks.tanh.TanhNetwork` as it was made: all parameters trained, none tied.

    Parameters
    ----------
    module
        Any.
    names
        Its parameters that are trained.
    """
    if not isinstance(module, TanhNetwork) or type(module).forward is not TanhNetwork.forward:
        return False
    return all(name in names for s in module.stages for name in (s.weight, s.bias, s.slope) if name)


def build_evaluator(
    module: nn.Module,
    offsets: Mapping[str, tuple[int, torch.Size]],
    indices: Sequence[Index],
    compiled: bool = True,
) -> Evaluator:
    """The fastest evaluator that has the module, where it is and the derivatives.

    Parameters
    ----------
    module
        Maps (N, inputs) to (N, outputs), each row on its own.
    offsets
        Begin and shape of each trained parameter in the vector theta.
    indices
        Derivatives, closed as by :func:`ddml.jets.evaluator.closure`.
    compiled
        Whether it may be the compiled kernels.
    """
    if not (isinstance(module, TanhNetwork) and all_stages_trained(module, offsets)):
        return NestedJets(module, offsets, indices)
    if max(len(i) for i in indices) > ORDER:
        return TaylorJets(module, offsets, indices)
    parameter = next(module.parameters())
    if compiled and parameter.device.type == "cpu" and parameter.dtype in SUFFIXES and kernels.library():
        return CompiledJets(module, offsets, indices)
    return FusedJets(module, offsets, indices)
