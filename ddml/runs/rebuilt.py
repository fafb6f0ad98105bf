"""The network of a run file, built again: what it names, and what is given in its place.

The Python files that a run file names are somebody's program, and data files may be anybody's. They are used only where
they are given anew, or trusted.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import torch
from mpi4py import MPI
from torch import Tensor, nn

from ddml import plugins
from ddml.data import files
from ddml.data.inputs import Inputs
from ddml.data.scaling import SCALINGS, Scaling
from ddml.errors import InputError, RunFileError
from ddml.losses.modules import trained
from ddml.networks import build, classifiers
from ddml.networks.families import FAMILIES
from ddml.options import Option, same_reference
from ddml.parameters import Parameter, parameter_table
from ddml.problems import PROBLEMS
from ddml.problems.build import build_problem
from ddml.problems.classification import Classifier
from ddml.problems.logistic import LogisticModel
from ddml.problems.pde.loss import PDELoss
from ddml.problems.pde.scales import parsed
from ddml.problems.pde.solution import Solution

from .run_file import Header

_PREFIX = "option "
_POINTS = 16  # of the interior: what is asked for are others (our choice)
_PRECISIONS = ("float64", "float32")


@dataclass(frozen=True)
class Anew:
    """What is given in the place of names in a run file, and whether the others are trusted."""

    trust: bool = False
    problem: str | None = None
    network: str | None = None
    data: str | None = None


def options(attributes: Mapping[str, object]) -> dict[str, str]:
    """The options in force when a run file was written, by name."""
    return {k.removeprefix(_PREFIX): str(v) for k, v in attributes.items() if k.startswith(_PREFIX)}


def network(path: str, header: Header, theta: Tensor, anew: Anew) -> Solution | Classifier:
    """What a run has trained, with parameters theta (n,); errors as for the functions of each kind."""
    if header.attributes.get("driver") == "logistic":
        return logistic(path, header, theta)
    if header.attributes.get("driver") == "classify":
        return classifier(path, header, theta, anew)
    return Solution(pde_loss(path, header, anew), theta)


def pde_loss(path: str, header: Header, anew: Anew) -> PDELoss:
    """The loss of a run of drivers/pinn.py, of the same precision, on the CPU and few points.

    Raises
    ------
    InputError
        A run of another driver; a file that is not trusted; what cannot be built, or is of other parameters.
    """
    settings = settings_of(path, header, "pinn", build.OPTIONS)
    settings.problem = chosen(path, "problem", str(header.attributes.get("problem")), anew.problem, anew)
    settings.network = chosen(path, "network", settings.network, anew.network, anew)
    if ":" not in settings.network:
        width, depth = settings.width or 1, settings.depth or 1
        check_size(path, header, (depth - 1) * width**2 + width)
    scales = options(header.attributes).get("scales", "none")
    with plugins.blamed(settings.problem, PROBLEMS, "problem"):
        problem, network, _ = build_problem(settings)
        dtype = getattr(torch, settings.dtype)
        loss = PDELoss(problem, network, _POINTS, dtype, scales=parsed("none" if scales == "None" else scales, problem))
    _check(path, header, loss.parameters)
    return loss


def classifier(path: str, header: Header, theta: Tensor, anew: Anew) -> Classifier:
    """The network of a run of drivers/classify.py with parameters theta (n,), and the scaling of its inputs.

    Raises
    ------
    InputError
        As for :func:`pde_loss`; where an older run file does not describe the inputs, data that cannot be read.
    """
    settings = settings_of(path, header, "classify", classifiers.OPTIONS)
    settings.network = chosen(path, "network", settings.network, anew.network, anew)
    inputs = _inputs(path, header, anew)
    check_size(path, header, least_size(settings, inputs.shape, len(inputs.classes)))
    with plugins.blamed(settings.network, classifiers.KNOWN, "network"):
        network, _ = classifiers.build_classifier(settings, inputs.shape, len(inputs.classes))
    assign(path, header, network, theta)
    return Classifier(network, inputs)


def least_size(settings: Any, shape: tuple[int, ...], classes: int) -> int:
    """Parameters that a network of ours for samples of that shape has, or fewer; of a user's 0."""
    if settings.network == "mlp":
        neurons = [math.prod(shape), *(int(n) for n in settings.widths.split(",") if n.isdecimal())]
        return sum(a * b for a, b in pairwise(neurons))
    if settings.network.startswith("euler"):
        return int(settings.blocks * (settings.width or 0) ** 2)
    if settings.network in FAMILIES:
        family = FAMILIES[settings.network]
        return family.plan(shape, classes, *family.sizes(shape, settings.width, settings.depth)).parameters
    return 0


def logistic(path: str, header: Header, theta: Tensor) -> Classifier:
    """The model of a run of drivers/logistic.py, for samples as they are stored.

    Raises
    ------
    InputError
        A run file of before, which does not describe the samples; another size.
    """
    if "inputs" not in header.attributes:
        raise InputError(f"{path} is of an older ddml and does not describe its samples; run.theta has the weights")
    inputs = Inputs.parsed(str(header.attributes["inputs"]))
    sizes = {p.name: math.prod(p.shape) for p in header.parameters}
    if sizes.get("weights") != math.prod(inputs.shape):
        raise InputError(f"{path} holds {sizes.get('weights')} weights for samples of shape {inputs.shape}")
    model = LogisticModel(sizes["weights"], "intercept" in sizes)
    assign(path, header, model, theta)
    return Classifier(model, inputs)


def dataset_name(path: str, header: Header, anew: Anew) -> str:
    """The data set of a run of drivers/classify.py, for ``ddml.data.files.load``.

    Raises
    ------
    InputError
        A Python file that is not trusted; another data set.
    """
    return chosen(path, "data", str(header.attributes.get("data")), anew.data, anew)


def _inputs(path: str, header: Header, anew: Anew) -> Inputs:
    if "inputs" in header.attributes:
        return Inputs.parsed(str(header.attributes["inputs"]))
    samples, scaling, comm = header.attributes.get("samples"), header.attributes.get("scaling"), MPI.COMM_SELF
    if scaling not in SCALINGS or not isinstance(samples, int):
        raise RunFileError(f"{path} does not say what its data were: samples {samples!r}, scaling {scaling!r}")
    dataset = files.load(dataset_name(path, header, anew), comm, samples)
    try:
        return Inputs.of(dataset, Scaling(dataset, scaling, comm))
    finally:
        dataset.free()


def settings_of(path: str, header: Header, driver: str, table: Iterable[Option]) -> SimpleNamespace:
    """Seed, precision and the values of some options of a run file of a driver."""
    attributes, texts = header.attributes, options(header.attributes)
    if attributes.get("driver") != driver:
        raise InputError(f"{path} is of driver {attributes.get('driver')!r}, not of '{driver}'")
    dtype = str(attributes.get("dtype"))
    if dtype not in _PRECISIONS or not isinstance(attributes.get("seed"), int):
        raise RunFileError(
            f"{path} does not say what its network was: dtype {dtype!r}, seed {attributes.get('seed')!r}"
        )
    given = {o: texts.get(o.name, str(o.default)) for o in table}
    for option, text in given.items():
        _check_text(path, option.name, text)
    values = {o.name: _value(o, text) for o, text in given.items()}
    return SimpleNamespace(seed=attributes["seed"], dtype=dtype, **values)


def _value(option: Option, text: str) -> Any:
    """What a text of a run file stands for; None is a flag, or what was left open."""
    if text == "None":
        return True if option.type is bool else option.default
    return option.parse(text)


def chosen(path: str, option: str, named: str, given: str | None, anew: Anew) -> str:
    """What is given in the place of a name of the run file, if it is the same; the name itself, if it may be used."""
    _check_text(path, option, named)
    if given is not None and not same_reference(named, given):
        raise InputError(f"{path} was written with -{option} {named!r}, not with {given!r}")
    if given is None and {".", ":"} & set(named) and not anew.trust:
        raise InputError(
            f"{path} names a file, {named!r}: give it anew with -{option} path/to/it, or -trust to use what it names"
        )
    return named if given is None else given


def _check_text(path: str, option: str, text: str) -> None:
    """Refuse a text of a run file that a terminal would not show as it is."""
    if not text.isprintable():
        raise RunFileError(f"{path} was not written with -{option} {text!r}, or is damaged")


def check_size(path: str, header: Header, least: int) -> None:
    """Refuse options that ask for more parameters than the file holds, before there is memory for them."""
    if least > header.size:
        raise InputError(f"{path} holds {header.size} parameters, its options ask for {least} or more")


def _check(path: str, header: Header, table: tuple[Parameter, ...]) -> None:
    if [(p.name, p.shape, p.offset) for p in header.parameters] != [(p.name, p.shape, p.offset) for p in table]:
        size = table[-1].range.stop
        raise InputError(f"{path} holds {header.size} parameters of another network than the one built of it, {size}")


def assign(path: str, header: Header, module: nn.Module, theta: Tensor) -> None:
    """Write parameters (n,) into the trained ones of a module, if they are of the file."""
    named = trained(module)
    table = parameter_table([(name, p.shape) for name, p in named])
    _check(path, header, table)
    if len(theta) < header.size:
        raise RunFileError(f"{path} holds {len(theta)} parameters where there should be {header.size}")
    with torch.no_grad():
        for (_, parameter), place in zip(named, table, strict=True):
            parameter.copy_(theta[place.range].view(place.shape))
