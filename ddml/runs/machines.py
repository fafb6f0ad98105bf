"""Kernel machines of run files: how their samples were cut, and the machine as a torch module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from mpi4py import MPI
from numpy.typing import NDArray
from petsc4py import PETSc
from torch import Tensor

from ddml.data import classified
from ddml.data.inputs import Inputs
from ddml.errors import InputError, RunFileError
from ddml.kernel_machines import functions
from ddml.kernel_machines.domain import SampleDomain
from ddml.kernel_machines.expansion import DeepExpansion, KernelExpansion
from ddml.kernel_machines.features import FeatureLoss
from ddml.kernel_machines.shapes import carried
from ddml.layout import ParameterLayout
from ddml.parameters import parameter_table
from ddml.problems.classification import Classifier
from ddml.states import vectors_in

from . import run_file
from .feature_maps import feature_map
from .rebuilt import Anew, assign, chosen, options
from .run_file import Header

DRIVER, DEEP, MACHINE = "kernel", "deep", "machine"


def domain_of(path: str) -> SampleDomain:
    """How the samples of a run of drivers/kernel.py were cut; nothing is collective.

    Raises
    ------
    InputError
        A file that is missing, foreign or damaged, or does not say it.
    """
    try:
        return SampleDomain.restored(_state(path)["solver"]["domain"])
    except (LookupError, TypeError, ValueError) as error:
        raise RunFileError(f"{path} does not say how its samples were cut") from error


def coefficients_of(path: str, size: int, columns: int) -> NDArray[np.float64]:
    """The coefficients (size, k), by sample, of a run of drivers/kernel.py, 0 for samples behind its own.

    Raises
    ------
    InputError
        See :func:`domain_of`; a machine of another number of columns k.
    """
    domain, x = domain_of(path), _vector(path)
    try:
        run_file.read(path, x, with_state=False)
        theta = x.array_r.reshape(domain.size, -1)
        if theta.shape[1] != columns:
            raise InputError(f"the machine of {path} has {theta.shape[1]} outputs, and this one {columns}")
        found = np.empty_like(theta)
        found[domain.order] = theta
        return carried(found, size)
    finally:
        x.destroy()


def _state(path: str) -> dict[str, Any]:
    """What a run file holds besides parameters and history; vectors in it are of no use."""
    x = _vector(path)
    try:
        state: dict[str, Any] = run_file.read(path, x)[0]
        for vec in vectors_in(state, "state", x).values():
            vec.destroy()
        return state
    finally:
        x.destroy()


def _vector(path: str) -> PETSc.Vec:
    """A vector for the coefficients of a run file, on this process."""
    header = run_file.inspect(path, MPI.COMM_SELF)
    return ParameterLayout(parameter_table([(p.name, p.shape) for p in header.parameters]), MPI.COMM_SELF).vector()


def samples_of(path: str, header: Header, anew: Anew) -> classified.Classified:
    """The samples that a run of drivers/kernel.py was trained on, read again; nothing is collective.

    Raises
    ------
    InputError
        Data that are not trusted, cannot be read, or are others than those of the run.
    """
    texts = options(header.attributes)
    name = chosen(path, "data", texts.get("data", ""), anew.data, anew)
    try:
        count = int(str(header.attributes["samples"]))
        scaling, base = texts["scaling"], texts["index_base"]
    except (LookupError, ValueError) as error:
        raise RunFileError(f"{path} does not say what its samples were") from error
    later = texts.get("later", "None")
    found = classified.load(name, MPI.COMM_SELF, None if later != "None" else count, scaling, base=base)
    if later != "None":
        found = classified.joined(found, name, chosen(path, "later", later, None, anew), MPI.COMM_SELF, base)
    if found.problem != header.attributes.get("problem"):
        raise InputError(f"{path} was written for {header.attributes.get('problem')}, {name} has {found.problem}")
    return found


def classifier(path: str, header: Header, theta: Tensor, anew: Anew, trained: Callable[[str], object]) -> Classifier:
    """The machine of a run of drivers/kernel.py, for samples as they are stored.

    Parameters
    ----------
    path, header, anew
        Of the run file.
    theta
        Coefficients (n k,), or of a deep kernel the parameters of its features.
    trained
        From the name of another run file to what was trained.

    Raises
    ------
    InputError
        See :func:`samples_of`; a kernel or features in a file that is not trusted; a deep kernel whose machine was not
        solved for.
    """
    if header.attributes.get("solver") == DEEP:
        return _deep(path, header, theta, anew, trained)
    attributes = header.attributes
    if "inputs" not in attributes or len(header.parameters) != 1 or len(header.parameters[0].shape) != 2:
        raise RunFileError(f"{path} does not describe a kernel machine")
    kernel = _kernel(path, header, anew)
    points = samples_of(path, header, anew).samples[domain_of(path).order]
    module = KernelExpansion(kernel, torch.as_tensor(points), header.parameters[0].shape[1])
    assign(path, header, module, theta)
    return Classifier(module, Inputs.parsed(str(attributes["inputs"])))


def _deep(path: str, header: Header, theta: Tensor, anew: Anew, trained: Callable[[str], object]) -> Classifier:
    texts, attributes = options(header.attributes), header.attributes
    alpha = _state(path).get("samples", {}).get(MACHINE)
    if alpha is None:
        raise InputError(
            f"{path} is of a deep kernel whose run has not come to its end: its machine was not solved for; to go on, "
            f"the same driver with -restart {path}"
        )
    data = samples_of(path, header, anew)
    try:
        centres, width = (int(texts[name]) for name in ("centres", "features"))
        inputs, seed = Inputs.parsed(str(attributes["inputs"])), int(str(attributes["seed"]))
    except (LookupError, ValueError) as error:
        raise RunFileError(f"{path} does not say what its features were") from error
    name = chosen(path, "network", texts.get("network", ""), anew.network, anew)
    features, _ = feature_map(name, centres, width, seed, data, trained)
    assign(path, header, features, theta)
    kernel = _kernel(path, header, anew)
    loss = FeatureLoss(features, data.samples)
    points = loss.features(theta.to(loss.dtype))
    if len(alpha) != len(points):
        raise RunFileError(f"{path} has {len(alpha)} coefficients for {len(points)} samples")
    expansion = KernelExpansion(kernel, points, alpha.shape[1])
    with torch.no_grad():
        expansion.alpha.copy_(torch.as_tensor(alpha))
    return Classifier(DeepExpansion(features, expansion), inputs)


def _kernel(path: str, header: Header, anew: Anew) -> functions.Kernel:
    """The kernel of a run."""
    texts, width = options(header.attributes), float(header.attributes.get("width") or 1.0)
    name = texts.get("kernel", "")
    if ":" in name and not anew.trust:
        raise InputError(f"{path} names a program, '{name}': -trust runs what it names")
    return functions.named(name, width, int(texts.get("kernel_degree", "3")))
