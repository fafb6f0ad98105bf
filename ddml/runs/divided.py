"""The classifier of a run with tiles, built again: the networks of all tiles, and what fuses them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ddml import plugins
from ddml.data.inputs import Inputs
from ddml.decomposition import tiles
from ddml.decomposition.tiles import build_tiles, numbers
from ddml.errors import InputError, RunFileError
from ddml.networks import classifiers, local
from ddml.networks.coherent import Coherent, Fused
from ddml.networks.fusions import FUSIONS
from ddml.problems.classification import Classifier

from . import rebuilt
from .history import History
from .run_file import Header

COHERENT, COARSE = "coherent", "coarse"  # fusions that are trained


@dataclass(frozen=True)
class Description:
    """What the classifier of a run with tiles is, beyond the options of the run.

    Attributes
    ----------
    fusion : str
        ``coherent``, ``coarse``, or one of :data:`ddml.networks.fusions.FUSIONS`.
    link : str
        What a coarse net is given.
    image : str
        The whole samples, see :class:`ddml.data.inputs.Inputs`.
    inputs : list of str
        What the network of each tile is given.

    Raises
    ------
    ValueError
        A fusion that there is not; what is no text.
    """

    fusion: str
    link: str
    image: str
    inputs: list[str]

    def __post_init__(self) -> None:
        texts = (self.fusion, self.link, self.image, *self.inputs)
        if not all(isinstance(text, str) for text in texts) or self.fusion not in (*FUSIONS, COARSE, COHERENT):
            raise ValueError(f"{texts[:2]} describe no classifier of tiles")

    def part_of(self, header: Header) -> Header:
        """The part of a run's header that is of this classifier: without a coarse net, where it has none."""
        if self.fusion not in FUSIONS:
            return header
        entries = tuple(p for p in header.parameters if p.name.startswith("nets."))
        return replace(header, parameters=entries, size=sum(math.prod(p.shape) for p in entries))


def of_tiles(path: str, header: Header) -> bool:
    """Whether a run file is of a run with -tiles.

    Raises
    ------
    InputError
        If it is of a part of such a run alone.
    """
    whole = rebuilt.options(header.attributes).get("tiles", "None") != "None"
    if "tiles" in header.attributes and not whole:
        raise InputError(
            f"{path} is of a part of a run with -tiles and has its history: open the run file that its folder is named "
            "after"
        )
    return whole and header.attributes.get("driver") == "classify"


def described(path: str, header: Header, state: Mapping[str, Any], fusion: str | None) -> Description:
    """The classifier that a run with this state has, of the fusion that is asked for, or that it has come to.

    Raises
    ------
    InputError
        A run of which no phase has come to its end; a fusion that it does not have; a state that is of no such run.
    """
    options = rebuilt.options(header.attributes)
    with _blamed(path):
        phases = state["phases"].split(",")
        link, given = state["coarse"].get("link", options.get("link")), state.get("inputs")
    there = [*FUSIONS] if "local" in phases else []
    there += [name for name in (COARSE, COHERENT) if name in phases]
    if not there:
        raise InputError(
            f"{path} has no classifier yet, no phase of its run has come to an end: -restart {path} goes on with it; "
            f"the run files of single networks are in {path}.nets"
        )
    if fusion is None:
        wanted, best = options.get("fusion", "None"), COARSE if COARSE in there else "average"
        fusion = COHERENT if COHERENT in there else best if wanted == "None" else wanted
    if fusion not in there:
        raise InputError(f"{path} has no classifier by -fusion {fusion!r}: it has {', '.join(there)}")
    if not given:
        raise InputError(
            f"{path} is of an older ddml and does not describe what its networks are given; run.theta has their "
            "parameters, one behind the other"
        )
    with _blamed(path):
        return Description(fusion, link, given["image"], given["tiles"])


def described_by(module: nn.Module) -> Description | None:
    """What a module of :func:`classifier` is; None for others."""
    if not isinstance(module, Classifier) or not isinstance(module.network, Coherent | Fused):
        return None
    whole, inputs = module.network, [str(net.inputs) for net in module.network.nets]
    if isinstance(whole, Fused):
        return Description(whole.fusion, "", str(module.inputs), inputs)
    return Description(COARSE, whole.link, str(module.inputs), inputs)


def parameters(path: str, state: Mapping[str, Any], theta: Tensor, fusion: str) -> Tensor:
    """Those (n,) of the fusion's phase: the run's theta, or what a coherent phase began with.

    Raises
    ------
    RunFileError
        A state that has none.
    """
    with _blamed(path):
        if COHERENT not in state["phases"].split(",") or fusion == COHERENT:
            return theta
        before = np.concatenate([np.asarray(state[name], dtype=np.float64) for name in ("local", "coarse_theta")])
    return torch.from_numpy(before)


def classifier(path: str, header: Header, theta: Tensor, anew: rebuilt.Anew, description: Description) -> Classifier:
    """The networks of all tiles and what fuses them, with parameters theta (n,), for whole samples as they are stored.

    Raises
    ------
    InputError
        See :func:`ddml.runs.rebuilt.classifier`; a description of other tiles.
    """
    table = (*classifiers.OPTIONS, *tiles.OPTIONS, *local.OPTIONS)
    settings = rebuilt.settings_of(path, header, "classify", table)
    settings.network = rebuilt.chosen(path, "network", settings.network, anew.network, anew)
    image, inputs = Inputs.parsed(description.image), [Inputs.parsed(text) for text in description.inputs]
    parts, classes = numbers(settings.tiles, "option -tiles"), len(image.classes)
    if math.prod(parts if len(parts) > 1 else parts * (len(image.shape) - 1)) != len(inputs):
        raise RunFileError(f"{path} describes the inputs of {len(inputs)} networks, its tiles are {settings.tiles}")
    cuts = build_tiles(settings, image.shape)
    if [(given.shape, given.classes) for given in inputs] != [(shape, image.classes) for shape in cuts.shapes]:
        raise RunFileError(f"{path} describes the inputs of other networks than those of {cuts!r}")
    with plugins.blamed(settings.network, classifiers.KNOWN, "network"):
        width = local.width_of(settings, cuts.shapes[0], cuts.narrowing, settings.local_width)
        narrow = SimpleNamespace(**vars(settings) | {"width": width})
        rebuilt.check_size(path, header, sum(rebuilt.least_size(narrow, shape, classes) for shape in cuts.shapes))
        nets = [net for net, _ in local.build_local(settings, cuts.shapes, classes, cuts.narrowing, width)]
    module: Coherent | Fused
    if description.fusion in FUSIONS:
        module = Fused(nets, cuts, description.fusion)
    else:
        module = Coherent(nets, _coarse(path, header, len(nets), classes, nets[0]), cuts, description.link)
    rebuilt.assign(path, description.part_of(header), module, theta)
    for tile, given in enumerate(inputs):  # each is a classifier of its tile as it is stored
        module.nets[tile] = Classifier(nets[tile], given)
    return Classifier(module, image)


def histories(path: str, state: Mapping[str, Any]) -> dict[str, History]:
    """Those of all networks that a run with this state has trained alone, by their names in the file.

    Raises
    ------
    RunFileError
        A state of no run with tiles.
    """
    with _blamed(path):
        found = {f"nets.{tile}": History.from_columns(net["history"]) for tile, net in enumerate(state["nets"])}
        if "losses" in state["coarse"]:
            losses = np.asarray(state["coarse"]["losses"])
            found[COARSE] = History.from_columns({"iteration": np.arange(len(losses)), "loss": losses})
    return found


def _coarse(path: str, header: Header, networks: int, classes: int, like: nn.Module) -> nn.Module:
    """A coarse net with the hidden layers that the file has, of the precision of another net."""
    widths = [p.shape[0] for p in header.parameters if p.name.startswith("coarse.") and len(p.shape) == 2][:-1]
    sizes = [networks * classes, *widths, classes]
    rebuilt.check_size(path, header, sum(a * b for a, b in pairwise(sizes)))
    with torch.random.fork_rng(devices=[]):
        made = classifiers.mlp((networks * classes,), classes, widths)
    return made.to(next(like.parameters())).eval()


@contextmanager
def _blamed(path: str) -> Iterator[None]:
    """Refuse a state in words that does not have what is asked of it within this block."""
    try:
        yield
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise RunFileError(f"{path} does not say what its networks have come to: {error}") from error
