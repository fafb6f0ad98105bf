"""Draw run files: python drivers/plot.py run.h5 [more.h5 ...] -o figure.png [-no_maps].

Convergence of all runs against work, critical work and time; for a PINN's first run file, unless
-no_maps is given, also the solution, the reference and the error; of a first run file with levels what these took.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn

from mpi4py import MPI
from common.program import run_program

import pinn

from ddml.data.sequences import grid
from ddml.runs import run_file, figures
from ddml.errors import InputError
from ddml.layout import ParameterLayout, owned
from ddml.parameters import parameter_table
from ddml.networks.build import OPTIONS as NETWORK_OPTIONS
from ddml.parallel import agreed
from ddml.problems.pde.accuracy import reference


def main(comm: MPI.Comm) -> int:
    """Draw what the command line says; the exit code."""
    parser = _Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, add_help=False)
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
    runs, first = [], None
    for label, path in zip(labels, arguments.runs, strict=True):
        header = run_file.inspect(path, comm)
        layout = ParameterLayout(parameter_table([(p.name, p.shape) for p in header.parameters]), comm)
        theta = layout.vector()
        _, history = run_file.read(path, theta)
        runs.append((f"{label} ({header.attributes.get('solver', '')})", history))
        first = first or (header, theta)
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
    if not arguments.no_maps and first is not None and first[0].attributes.get("driver") == "pinn":
        target = output.with_name(f"{output.stem}.maps{output.suffix}")
        draw_maps(first[0], owned(first[1]), target)
        print(f"wrote {target}")
    return 0


def draw_maps(header: run_file.Header, theta: object, target: Path) -> None:
    """Solution, reference and error of a PINN's run file."""
    options = {k.removeprefix("option "): v for k, v in header.attributes.items() if k.startswith("option ")}
    network = {o.name: None if options[o.name] == "None" else o.parse(str(options[o.name])) for o in NETWORK_OPTIONS}
    settings = SimpleNamespace(
        problem=str(header.attributes["problem"]),
        seed=0,
        dtype="float64",
        device="cpu",
        points=16,
        chunk=1024,
        scales=str(options.get("scales", "none")),
        **network,
    )
    loss, *_ = pinn.build(settings, training=False)
    if len(loss.problem.domain) > 2:
        raise InputError("maps are drawn for one or two coordinates; use -no_maps")
    axes = grid(20_000, loss.problem.bounds)
    mesh, exact = reference(loss.problem, 20_000)
    fields = loss.fields(theta, mesh)  # type: ignore[arg-type]
    shape = tuple(len(a) for a in axes)
    panels = [
        (name, fields[:, f].reshape(shape), None if exact is None else exact[:, f].reshape(shape))
        for f, name in enumerate(loss.problem.fields)
    ]
    figure = figures.new_figure()
    figures.maps(figure, axes[0], axes[1] if len(axes) == 2 else None, list(loss.problem.domain), panels)
    figure.savefig(target)


class _Parser(argparse.ArgumentParser):
    """A parser whose complaints are those of all drivers."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; -help explains the options")


if __name__ == "__main__":
    run_program(main)
