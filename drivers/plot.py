"""Draw run files: python drivers/plot.py run.h5 [more.h5 ...] -o figure.png [-no_maps].

Convergence of all runs against work, critical work and time; for a PINN's first run file, unless
-no_maps is given, also the solution, the reference and the error; of a first run file with levels what these took.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from mpi4py import MPI
from common.program import run_program

from common.arguments import Parser
from ddml.data.sequences import grid
from ddml.errors import InputError
from ddml.parallel import agreed
from ddml.problems.pde.accuracy import reference
from ddml.runs import figures
from ddml.runs.opened import OpenedRun, open_run


def main(comm: MPI.Comm) -> int:
    """Draw what the command line says; the exit code."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, add_help=False)
    parser.add_argument("-h", "-help", "--help", action="help", help="explain the options")
    parser.add_argument("runs", nargs="+", metavar="run.h5")
    parser.add_argument("-o", "--output", default="figure.png", help="figure to write; a .maps file goes beside it")
    parser.add_argument("-labels", nargs="*", default=None, help="names of the runs in the legend")
    parser.add_argument("-no_maps", action="store_true", help="leave out the maps of the solution")
    arguments = parser.parse_args()
    if comm.size > 1:
        raise InputError("plot.py runs on one rank")
    labels = arguments.labels or [Path(run).stem for run in arguments.runs]
    if len(labels) != len(arguments.runs):
        raise InputError(f"{len(arguments.runs)} run files need as many labels, got {len(labels)}")
    output = Path(arguments.output)
    opened = [open_run(path) for path in arguments.runs]
    runs = [
        (f"{name} ({run.attributes.get('solver', '')})", run.history) for name, run in zip(labels, opened, strict=True)
    ]
    figure = figures.new_figure()
    figures.convergence(figure, runs)
    with agreed(comm):
        try:
            figure.savefig(output)
        except (OSError, ValueError) as error:
            raise InputError(f"cannot write {output}: {error}") from error
    print(f"wrote {output}")
    if runs[0][1].used()[-1].startswith("work_level"):
        target = output.with_name(f"{output.stem}.levels{output.suffix}")
        figure = figures.new_figure()
        figures.levels(figure, runs[0][1])
        figure.savefig(target)
        print(f"wrote {target}")
    if not arguments.no_maps and opened[0].attributes.get("driver") == "pinn":
        target = output.with_name(f"{output.stem}.maps{output.suffix}")
        draw_maps(opened[0], target)
        print(f"wrote {target}")
    return 0


def draw_maps(run: OpenedRun, target: Path) -> None:
    """Solution, reference and error of a PINN's run file."""
    loss = run.loss(trust=True)
    if len(loss.problem.domain) > 2:
        raise InputError("maps are drawn for one or two coordinates; use -no_maps")
    axes = grid(20_000, loss.problem.bounds)
    mesh, exact = reference(loss.problem, 20_000)
    fields = loss.fields(run.theta.to(loss.dtype), mesh)
    shape = tuple(len(a) for a in axes)
    panels = [
        (name, fields[:, f].reshape(shape), None if exact is None else exact[:, f].reshape(shape))
        for f, name in enumerate(loss.problem.fields)
    ]
    figure = figures.new_figure()
    figures.maps(figure, axes[0], axes[1] if len(axes) == 2 else None, list(loss.problem.domain), panels)
    figure.savefig(target)


if __name__ == "__main__":
    run_program(main)
