"""Draw run files: plot.py run.h5 [more.h5 ...] -o figure.png [-no_maps|-trust|-problem file.py:Class|-data file].

Convergence of all runs against work, critical work and time; for a PINN's first run file, unless
-no_maps is given, also the solution, the reference and the error; of a first run file with levels what these took, of
one with tiles how often the network of each is right, and of a kernel machine its residual and its subdomains.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from mpi4py import MPI
from common.program import run_program

from common.arguments import ANEW, Parser
from ddml.data.sequences import grid
from ddml.data.tables import written
from ddml.errors import InputError
from ddml.problems import PDELoss
from ddml.problems.pde.accuracy import reference
from ddml.runs import figures, machine_figures, machines, tile_figures
from ddml.runs.opened import OpenedRun, open_run
from ddml.runs.progress import say
from ddml.runs.rebuilt import Anew

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def main(comm: MPI.Comm) -> int:
    """Draw what the command line says; the exit code."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, add_help=False)
    parser.add_argument("-h", "-help", "--help", action="help", help="explain the options")
    parser.add_argument("runs", nargs="+", metavar="run.h5")
    parser.add_argument("-o", "--output", default="figure.png", help="figure to write; a .maps file goes beside it")
    parser.add_argument("-labels", nargs="*", default=None, help="names of the runs in the legend")
    parser.add_argument("-no_maps", action="store_true", help="leave out maps of the solution or of samples")
    for option in ANEW[:3]:
        parser.add_argument(f"-{option.name}", help=option.help)
    parser.add_argument("-trust", action="store_true", help=ANEW[-1].help)
    arguments = parser.parse_args()
    if comm.size > 1:
        raise InputError("plot.py runs on one rank")
    labels = arguments.labels or [Path(run).stem for run in arguments.runs]
    if len(labels) != len(arguments.runs):
        raise InputError(f"{len(arguments.runs)} run files need as many labels, got {len(labels)}")
    output = Path(arguments.output)
    output = output if output.suffix else output.with_name(f"{output.name}.png")
    opened = [open_run(path) for path in arguments.runs]
    runs = [
        (f"{name} ({run.attributes.get('solver', '')})", run.history) for name, run in zip(labels, opened, strict=True)
    ]
    drawn = {output: figures.new_figure()}
    figures.convergence(drawn[output], runs)
    if runs[0][1].used()[-1].startswith("work_level"):
        target = output.with_name(f"{output.stem}.levels{output.suffix}")
        drawn[target] = figures.new_figure()
        figures.levels(drawn[target], runs[0][1])
    if opened[0].options.get("tiles", "None") != "None":
        target = output.with_name(f"{output.stem}.tiles{output.suffix}")
        drawn[target] = figures.new_figure()
        tile_figures.local_accuracies(drawn[target], opened[0].local_accuracies())
    kind = [opened[0].attributes.get(name) for name in ("driver", "solver")]
    if not arguments.no_maps and kind[0] == machines.DRIVER and kind[1] != machines.DEEP:
        target = output.with_name(f"{output.stem}.machine{output.suffix}")
        drawn[target] = figures.new_figure()
        anew = Anew(arguments.trust, data=arguments.data)
        samples = machines.samples_of(opened[0].path, opened[0].header, anew).samples
        machine_figures.machine(drawn[target], opened[0].history, samples, machines.domain_of(opened[0].path))
    if not arguments.no_maps and opened[0].attributes.get("driver") == "pinn":
        loss = opened[0].loss(trust=arguments.trust, problem=arguments.problem, network=arguments.network)
        drawn[output.with_name(f"{output.stem}.maps{output.suffix}")] = maps(opened[0], loss)
    for target, figure in drawn.items():
        with written(target) as disk:
            try:
                figure.savefig(disk, format=target.suffix[1:])
            except ValueError as error:
                raise InputError(f"cannot write {target}: {error}") from error
        say(f"wrote {target}")
    return 0


def maps(run: OpenedRun, loss: PDELoss) -> Figure:
    """Solution, reference and error of a PINN's run file, whose loss is this one."""
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
    return figure


if __name__ == "__main__":
    run_program(main)
