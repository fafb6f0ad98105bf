"""Print docs/options.md, which is made of the option tables: python drivers/document.py > docs/options.md."""

from __future__ import annotations

from common.program import run_program  # first: it initialises PETSc

from collections.abc import Iterable, Sequence

from mpi4py import MPI

import classify
import export
import kernel
import logistic
import pinn
import predict
from common.training import PREFIXES
from ddml.options import Option
from solvers import SOLVERS, KernelNystromPC, KernelSchwarzPC, NystromPC, SchwarzPC
from solvers.kernel_machines.curved import CurvedPivotsPC

HEAD = """# Options

`make docs` makes this page of the tables in the code; `-help` prints them, too. A name with a prefix before it, as in
`-sub_memory`, is for a solver inside of another. All of PETSc's options apply besides, such as `-tao_fmin`,
`-tao_ls_gtol`, `-sub_tao_type`, `-log_view` and `-options_file`, with these exceptions: `-tao_max_it` is `-max_it`
here; `-tao_max_funcs`, `-tao_trust0` and others of TAO that only solvers of PETSc follow are refused with a solver of
ours.

Options may stand on the command line, in a file that `-options_file` names there, in the variable `PETSC_OPTIONS` and
in `~/.petscrc`, `.petscrc` and `petscrc` (not with `-skip_petscrc`); the command line wins, then the variable. The
header of a run names those that do not stand on the command line, `-view` all with their places, and the run file keeps
both. An unknown option is refused; in `PETSC_OPTIONS` or `.petscrc`, which may be of another program, it is noted.

The last column says what `-restart` does with an option: the run file's value is in force unless another stands beside
`-restart`, which is taken *freely*, only *with* another *solver* that begins there, too, or *never*; what belongs to
*each start* is not passed on. More in [run_file.md](run_file.md)."""


OF_RUN_FILES = """The first word is a run file; see [out_of_a_run.md](out_of_a_run.md). These are no options of PETSc
and stand on the command line only."""


def page() -> str:
    """The whole page."""
    of_pinn, of_classify = (*pinn.OPTIONS, *pinn.LIMITS), (*classify.OPTIONS, *classify.LIMITS)
    parts = [HEAD, "## drivers/pinn.py", table(of_pinn)]
    gone = ", ".join(f"`-{name}`" for name in _gone(of_pinn, of_classify))
    parts += ["## drivers/classify.py", _and(of_classify, of_pinn, "drivers/pinn.py", gone)]
    of_logistic = (*logistic.OPTIONS, *logistic.LIMITS)
    gone = ", ".join(f"`-{name}`" for name in _gone(of_classify, of_logistic))
    parts += ["## drivers/logistic.py", _and(of_logistic, of_classify, "drivers/classify.py", gone)]
    of_kernel = table((*kernel.OPTIONS, *kernel.LIMITS))
    parts += ["## drivers/kernel.py", "See [kernel machines](kernel_machines.md).", of_kernel]
    parts += ["## drivers/predict.py", OF_RUN_FILES, table(predict.OPTIONS, of_runs=False)]
    parts += ["## drivers/export.py", OF_RUN_FILES, table(export.OPTIONS, of_runs=False)]
    before: list[str] = []
    for name, solver in SOLVERS.items():
        parts.append(f"## -solver {name}")
        if name in PREFIXES:
            text = PREFIXES[name].strip(" ()").removesuffix(", ...")
            parts.append(f"{text[0].upper()}{text[1:]}.")
        like = [other for other in before if not _gone(SOLVERS[other].options, solver.options)]
        nearest = min(like, key=lambda other: len(_new(solver.options, SOLVERS[other].options)), default=None)
        if nearest is None:
            parts.append(table(solver.options))
        else:
            parts.append(_and(solver.options, SOLVERS[nearest].options, f"-solver {nearest}"))
        before.append(name)
    for pc in (NystromPC, SchwarzPC):
        parts += [f"## -gn_pc_type python -gn_pc_python_type solvers.{pc.__name__}", "With `gn_` before them."]
        parts.append(table(pc.options))
    for kind in (KernelSchwarzPC, KernelNystromPC):
        name = f"## solvers.{kind.__name__}"
        parts += [name, "Of [kernel machines](kernel_machines.md), also of `drivers/kernel.py`.", table(kind.options)]
    parts += ["## solvers.fit_kernel_loss", "Of [kernel machines](kernel_machines.md).", table(CurvedPivotsPC.options)]
    return "\n\n".join(parts) + "\n"


def table(options: Iterable[Option], of_runs: bool = True) -> str:
    """The options as a Markdown table; those of runs with what a restart does."""
    rows = ["| option | | default | restart |", "| --- | --- | --- | --- |"]
    if not of_runs:
        rows = [row.removesuffix(" restart |").removesuffix(" --- |") for row in rows]
    for o in options:
        choices = f" One of {', '.join(f'`{c}`' for c in o.choices)}." if o.choices else ""
        default = "" if o.default is None else f"`{str(o.default).lower() if o.type is bool else o.default}`"
        text = (o.help + choices).replace("|", "\\|")
        rows.append(f"| `-{o.name}` | {text} | {default} |" + f" {o.changes} |" * of_runs)
    return "\n".join(rows)


def _new(options: Sequence[Option], others: Sequence[Option]) -> list[Option]:
    """Those that are not the same among the others."""
    return [o for o in options if o not in others]


def _gone(options: Sequence[Option], others: Sequence[Option]) -> list[str]:
    """Names that the others do not have."""
    return [o.name for o in options if o.name not in {other.name for other in others}]


def _and(options: Sequence[Option], others: Sequence[Option], where: str, without: str = "") -> str:
    """What differs from others, in words and as a table."""
    new = _new(options, others)
    words = f"Those of `{where}`" + (f" without {without}" if without else "")
    return f"{words}, and\n\n{table(new)}" if new else f"{words}."


def main(comm: MPI.Comm) -> int:
    """Print the page; the exit code."""
    if comm.rank == 0:
        print(page(), end="")
    return 0


if __name__ == "__main__":
    run_program(main)
