"""The programs as commands of an installed ddml, ddml-pinn and others; this folder is its package ``ddml_drivers``."""

from __future__ import annotations

import sys
from functools import partial
from importlib import import_module
from pathlib import Path

from mpi4py.run import set_abort_status

TRAINING = ("pinn", "classify", "logistic", "kernel")  # what signals stop with a run file written


def start(name: str) -> None:
    """Run a program as ``python -m mpi4py name.py`` does: what ends one rank, while it imports too, ends all."""
    sys.path.insert(0, str(Path(__file__).parent))  # as of a script
    if name in TRAINING:
        import_module("common.signals").remember()
    try:
        program = import_module(name)
        program.run_program(program.main)
    except BaseException as error:
        set_abort_status(error)
        raise


pinn = partial(start, "pinn")
classify = partial(start, "classify")
logistic = partial(start, "logistic")
kernel = partial(start, "kernel")
plot = partial(start, "plot")
predict = partial(start, "predict")
export = partial(start, "export")
