"""The options that subdomains of parameters are chosen by."""

from __future__ import annotations

from collections.abc import Sequence

from petsc4py import PETSc

from ddml.errors import InputError
from ddml.losses.loss import Loss
from ddml.options import Option, read

from .subdomains import Subdomains

DECOMPOSITION = (
    Option("subdomains", None, "Number of subdomains (default: one a layer); without -decomposition, of layers.",
           kind=int, minimum=1),
    Option("decomposition", "layers", "Subdomains are groups of layers, of parameter tensors, of tensors at random, "
           "all windows of neighbouring layers, or blocks: networks of tiles and the coarse net behind them, which is "
           "the default where there are such.", choices=("layers", "tensors", "random", "windows", "blocks")),
    Option("window", None, "Layers in each window (default: 2, or 1 if there is one).", kind=int, minimum=1),
    Option("window_shift", 1, "Layers by which each window is shifted against the one before.", minimum=1),
    Option("overlap", 0, "Layers (or tensors) that neighbouring subdomains share on each side.", minimum=0),
    Option("balance", "layers", "Groups of equally many layers, or of equal cost of a local gradient.",
           choices=("layers", "cost")),
    Option("decomposition_seed", 0, "Seed of random subdomains."),
)  # fmt: skip


def subdomains(loss: Loss, prefix: str = "", table: Sequence[Option] = DECOMPOSITION) -> Subdomains:
    """The subdomains that the options of a table under a prefix ask for.

    A given number of subdomains is one of groups of layers where no decomposition is given, whatever the table's
    default; without such a number the networks that a loss has side by side are the default.

    Raises
    ------
    InputError
        More subdomains than layers or tensors, a window of more layers than there are, options that do not go together.
    """
    chosen = read(table, prefix)
    if not PETSc.Options().hasName(f"{prefix}decomposition"):
        if chosen.subdomains is not None:
            chosen.decomposition = "layers"
        elif loss.blocks:
            chosen.decomposition = "blocks"
    for kind, remedy in (("windows", "use -window"), ("blocks", "there is one for each network")):
        for name in ("subdomains", "overlap", "balance") if chosen.decomposition == kind else ():
            if getattr(chosen, name) != next(o.default for o in DECOMPOSITION if o.name == name):
                raise InputError(f"option -{prefix}{name} does not go with -{prefix}decomposition {kind}: {remedy}")
    if chosen.decomposition == "blocks":
        return Subdomains.by_blocks(loss)
    if chosen.decomposition == "windows":
        return Subdomains.windows(loss, chosen.window or min(2, len(loss.layers)), chosen.window_shift)
    if chosen.decomposition == "layers":
        return Subdomains.by_layers(loss, chosen.subdomains or len(loss.layers), chosen.overlap, chosen.balance)
    if chosen.balance != "layers":
        raise InputError(f"option -{prefix}balance cost goes with -{prefix}decomposition layers")
    seed = chosen.decomposition_seed if chosen.decomposition == "random" else None
    return Subdomains.by_tensors(loss, chosen.subdomains or len(loss.parameters), chosen.overlap, seed)
