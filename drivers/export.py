"""A trained network for other programs: python drivers/export.py run.h5 -o net.pt|net.pt2|net.onnx.

Of a PINN the fields at points (N, d) in the problem's coordinates, lift, factor, scales and embedding included; of a
classifier the outputs for stored samples, their scaling included.
"""

from __future__ import annotations

from common.program import run_program  # first: it initialises PETSc

from mpi4py import MPI

from common.arguments import ANEW, FUSION, run_and_options
from ddml.data.tables import check_target
from ddml.errors import InputError
from ddml.options import Option
from ddml.runs import exported
from ddml.runs.opened import open_run
from ddml.runs.progress import say

OPTIONS = (
    Option("o", None, "File to write, in the place of one that is there: .pt, tensors by name with what builds the "
           "module (ddml.open_network, or torch.load); .pt2, a program of torch.export, for which neither ddml nor "
           "your classes are needed; .onnx, in single precision."),
    FUSION,
    *ANEW,
)  # fmt: skip


def main(comm: MPI.Comm) -> int:
    """Export what the command line says; the exit code."""
    path, settings = run_and_options(__doc__ or "", OPTIONS)
    if comm.size > 1:
        raise InputError("export.py runs on one rank")
    if settings.o is None:
        raise InputError("option -o is missing: the file to write; -help explains the options")
    check_target(settings.o, list(exported.KINDS), [path])
    run = open_run(path)
    module = run.network(
        trust=settings.trust, problem=settings.problem, network=settings.network, data=settings.data,
        fusion=settings.fusion,
    )  # fmt: skip
    exported.save(settings.o, run, module)
    count = sum(p.numel() for p in module.parameters())
    say(f"wrote {settings.o}: {type(module).__name__} of {count} parameters, of {path}")
    return 0


if __name__ == "__main__":
    run_program(main)
