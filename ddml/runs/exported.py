"""Networks of run files for other programs: as a torch file with how to build it, as torch.export's, as ONNX."""

from __future__ import annotations

import copy
import io
import logging
import math
import pickle
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from ddml.data.tables import check_target, written
from ddml.data.unpacking import opened, readable
from ddml.errors import InputError
from ddml.problems.classification import Classifier
from ddml.problems.pde.solution import Solution

from . import divided, rebuilt
from .extras import extra
from .opened import OpenedRun
from .run_file import Header, ParameterEntry

FORMAT = "ddml network"
ROWS = 5  # of the example that a network is traced with (our choice; torch treats 0 and 1 apart)
ROUNDING = 100  # units in the last place by which a program may differ (our choice)
HOW = """With ddml: module = ddml.open_network(path); a class of yours is given anew, as in problem="heat.py:Heat".
Without: torch.load(path)["state_dict"] holds tensors by name; those of the network are network.<name>, in the order in
which data pass through them, and "attributes" say what it is: network, problem or scaling, options."""


def save(path: str | Path, run: OpenedRun, module: Solution | Classifier) -> None:
    """Write the network of a run; the suffix, one of :data:`KINDS`, says how.

    Parameters
    ----------
    path
        The file, in the place of one that may be there.
    run
        Where the network is of.
    module
        What :meth:`ddml.runs.opened.OpenedRun.network` gives.

    Raises
    ------
    InputError
        Another suffix, a package that is missing, a network that cannot be traced, a file that cannot be written; what
        was there is unchanged.
    """
    content = KINDS[check_target(path, list(KINDS), [run.path])](run, module)
    with written(path) as disk:
        disk.write(content)


def open_network(
    path: str | Path,
    *,
    trust: bool = False,
    problem: str | None = None,
    network: str | None = None,
) -> Solution | Classifier:
    """The network of a ``.pt`` file that drivers/export.py has written.

    Parameters are those of :meth:`ddml.runs.opened.OpenedRun.network`.

    Raises
    ------
    InputError
        A file that is none of those; see :meth:`ddml.runs.opened.OpenedRun.network`.
    """
    with opened(path) as file:
        _check_archive(path, file)
        try:
            found: Any = torch.load(file, weights_only=True)
        except pickle.UnpicklingError as error:
            raise InputError(f"cannot read {path}: it is no torch file of tensors, numbers and words alone") from error
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            raise InputError(f"{path} is no network that drivers/export.py has written as .pt")
        parameters = tuple(ParameterEntry(name, tuple(shape), offset) for name, shape, offset in found["parameters"])
        description = divided.Description(**found["tiles"]) if "tiles" in found else None
        header = Header(dict(found["attributes"]), parameters, sum(math.prod(p.shape) for p in parameters), 0)
        stored = sum(t.untyped_storage().nbytes() // t.element_size() for t in found["state_dict"].values())
        if header.size > stored or any(size < 0 for p in parameters for size in p.shape):
            raise InputError(f"cannot read {path}: it is to hold {header.size} parameters, and has {stored}")
    zeros, anew = torch.zeros(header.size), rebuilt.Anew(trust, problem, network)
    module: Solution | Classifier
    if description is None:
        module = rebuilt.network(str(path), header, zeros, anew)
    else:
        module = divided.classifier(str(path), header, zeros, anew, description)
    with readable(path):
        module.load_state_dict(found["state_dict"])  # frozen parameters and buffers, too
    return module


def _check_archive(path: str | Path, file: IO[bytes]) -> None:
    """Refuse what torch.save does not write: other than archives, and members that are compressed."""
    if not zipfile.is_zipfile(file):
        raise InputError(f"cannot read {path}: it is no torch file of tensors, numbers and words alone")
    with zipfile.ZipFile(file) as archive:
        if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):
            raise InputError(f"cannot read {path}: it is compressed")
    file.seek(0)


def _torch(run: OpenedRun, module: Solution | Classifier) -> bytes:
    attributes = {name: value for name, value in run.attributes.items() if not name.startswith("origin ")}
    description, header, file = divided.described_by(module), run.header, io.BytesIO()
    if description is not None:
        header = description.part_of(header)
    torch.save(
        {
            "format": FORMAT,
            "how": HOW,
            "state_dict": module.state_dict(),
            "attributes": attributes,
            "parameters": [(p.name, tuple(p.shape), p.offset) for p in header.parameters],
            **({} if description is None else {"tiles": asdict(description)}),
        },
        file,
    )
    return file.getvalue()


def _traced(module: Solution | Classifier) -> tuple[torch.export.ExportedProgram, Tensor]:
    """The program of a module for any number of rows, and an example, on which it gives the same as the module.

    Raises
    ------
    InputError
        Where torch.export cannot follow the module.
    """
    inputs = example(module)
    try:
        with torch.no_grad():
            program = torch.export.export(module, (inputs,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
            expected = module(inputs)
            near = ROUNDING * torch.finfo(expected.dtype).eps * float(expected.abs().max())
            same = torch.allclose(program.module()(inputs), expected, rtol=0, atol=near)
    except Exception as error:  # of torch, or of a user's code
        said = next(iter(str(error).strip().splitlines()), "")
        raise InputError(
            f"torch.export cannot follow this network: {type(error).__name__}: {said:.200}; a .pt file can hold it"
        ) from error
    if not same:
        raise InputError(
            "torch.export gives other numbers than this network: chance, or a state? A .pt file can hold it"
        )
    return program, inputs


def example(module: Solution | Classifier) -> Tensor:
    """Some inputs of a module, of its precision."""
    like = next(module.network.parameters())
    if isinstance(module, Classifier):
        return (
            torch.linspace(0, 1, ROWS)
            .to(like)[:, None]
            .expand(ROWS, math.prod(module.shape))
            .reshape(ROWS, *module.shape)
        )
    low, high = torch.tensor(module.problem.bounds).to(like).T
    return low + torch.linspace(0.1, 0.9, ROWS).to(like)[:, None] * (high - low)


def _program(run: OpenedRun, module: Solution | Classifier) -> bytes:
    file = io.BytesIO()
    torch.export.save(_traced(module)[0], file)
    return file.getvalue()


def _onnx(run: OpenedRun, module: Solution | Classifier) -> bytes:
    extra("a network as .onnx", "onnx", "onnxscript")
    program, inputs = _traced(copy.deepcopy(module).float())
    with warnings.catch_warnings():  # of torch's own code, and of packages that it would like
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            made = torch.onnx.export(program, (inputs,), dynamo=True, verbose=False)
        except Exception as error:
            said = next(iter(str(error).strip().splitlines()), "")
            raise InputError(f"ONNX cannot hold this network: {type(error).__name__}: {said:.200}") from error
        finally:
            logging.disable(logging.NOTSET)
    assert made is not None
    return bytes(made.model_proto.SerializeToString())


KINDS: dict[str, Callable[[OpenedRun, Any], bytes]] = {".pt": _torch, ".pt2": _program, ".onnx": _onnx}
