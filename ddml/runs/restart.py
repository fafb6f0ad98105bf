"""The options of a run that goes on: those of its run file, and what stands beside ``-restart``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mpi4py import MPI
from petsc4py import PETSc

from ddml.errors import InputError
from ddml.options import (
    EACH_START,
    FREELY,
    NEVER,
    WITH_SOLVER,
    Option,
    for_runs,
    given,
    names_code,
    same_reference,
    unused,
)
from ddml.parallel import agreed

from . import run, run_file

_PREFIX, _ORIGIN = "option ", "origin "
# what a driver works out where the option leaves it open, under the same name in the attributes: a later ddml might
# choose otherwise
_RESOLVED = ("summation_blocks", "samples")


@dataclass
class Restart:
    """What a run takes over from its file.

    Attributes
    ----------
    options : dict of str to str
        Those of the file that are in force.
    changed : dict of str to str
        Those that stand beside ``-restart`` and are others in the file, with their values there.
    notes : list of str
        What a user should know of them.
    origins : dict of str to str
        Where those came from when the file was written; empty where they were defaults, or it does not say.
    same_samples : bool
        Whether nothing has changed that decides which samples the objective has when.
    """

    options: dict[str, str] = field(default_factory=dict)
    changed: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    origins: dict[str, str] = field(default_factory=dict)
    same_samples: bool = True

    def unread(self) -> list[str]:
        """Notes on options of the file that nothing has asked for, as those of an older ddml may be."""
        left = [key for key in unused() if key in self.options]
        return [f"{_shown(key, self.options[key])} of the run file is read by nothing here" for key in left]

    def unknown(self) -> list[str]:
        """Names that nothing has asked for and that the run file does not have."""
        return [key for key in unused() if key not in self.options]


def _shown(name: str, text: str) -> str:
    return f"-{name} {text}".rstrip()


def take_over(
    path: str,
    comm: MPI.Comm,
    driver: str,
    table: Sequence[Option],
    options_of: Callable[[str], Iterable[Option]],
    weak: Mapping[str, str] = {},
    trust: bool = False,
) -> Restart:
    """Put the options of a run file into PETSc's database, where they are not given beside ``-restart``.

    Where another solver is given, the file's options of its own solver, which are all that the driver does not have
    itself, are left out. Nothing is written or changed where an error is raised. Collective on `comm`.

    Parameters
    ----------
    path : str
        The run file.
    driver : str
        Who goes on; the run file must be of the same.
    table : sequence of Option
        The driver's options, those of :data:`ddml.runs.run.OPTIONS` included.
    options_of : callable
        From the name of a solver to its options.
    weak : mapping of str to str
        Options in the database that give way to the run file, with where they come from.
    trust : bool
        Whether programs that the run file names may run.

    Returns
    -------
    Restart
        What was taken over and what has changed.

    Raises
    ------
    InputError
        A run file that is missing, damaged, or of another driver; an option beside it that cannot change, as
        :class:`ddml.options.Option` says; a class of the run whose file is not there any more, or which is named by the
        run file only and not trusted.
    """
    header = run_file.inspect(path, comm)
    attributes = {name: str(value) for name, value in header.attributes.items()}
    if attributes.get("driver") != driver:
        raise InputError(f"{path} was written for driver '{attributes.get('driver')}', not '{driver}'")
    if "solver" not in attributes:
        raise InputError(f"{path} does not say which solver it is of")
    own = {o.name: o for o in table}
    then = _texts(attributes, own)
    found = Restart()
    for name, origin in weak.items():
        option = own.get(name)
        if for_runs(name) and (option is None or option.changes != EACH_START):
            text = given().get(name, "")
            PETSc.Options().delValue(name)
            if text != then.get(name):
                found.notes.append(f"{_shown(name, text)} of {origin} gives way to the run file")
    now = given()
    solver = _solver(now)
    old_solver = attributes["solver"]
    if solver is None:
        now.pop("solver", None)  # auto: the run's own
        PETSc.Options().delValue("solver")
    other = solver is not None and not same_reference(solver, old_solver)
    if solver is not None:  # -solver and -tao_type are two names of one thing
        then = {name: text for name, text in then.items() if name not in ("solver", "tao_type")}
        if solver != old_solver:
            found.changed["solver"] = old_solver
            found.notes.append(f"-solver {solver} in the place of {old_solver}")
    left = [name for name in then if other and name not in own]
    if left:
        found.notes.append(f"without {', '.join(_shown(name, then[name]) for name in left)}, options of {old_solver}")
    then = {name: text for name, text in then.items() if name not in left}
    named = [(name, text) for name, text in then.items() if name not in now]
    with agreed(comm):
        _check_files(path, named)
        if not trust:
            _check_programs(path, [*named, *([("solver", old_solver)] if solver is None else [])])
    known = own if other else {**{o.name: o for o in options_of(solver or old_solver)}, **own}
    for name, text in now.items():
        option = known.get(name)
        if name in ("solver", "tao_type") or (option is not None and option.changes == EACH_START):
            continue
        if option is not None and option.changes != FREELY and text == option.default == "auto":
            PETSc.Options().delValue(name)  # the run's own
        elif _changes(path, name, option, then, text, other):
            found.changed[name] = then.get(name, "")
            before = then.get(name, "the default" if option is None or option.default is None else str(option.default))
            found.notes.append(f"{_shown(name, text)} in the place of {before or 'true'}")
            found.same_samples &= option is None or option.changes != WITH_SOLVER or name not in own
    for name, text in then.items():
        if not PETSc.Options().hasName(name):
            PETSc.Options().setValue(name, text)
            found.options[name] = text
            found.origins[name] = attributes.get(f"{_ORIGIN}{name}", "")
    return found


def _check_programs(path: str, named: Sequence[tuple[str, str]]) -> None:
    """Raise an InputError for a program that a run file names, or a file of any name that it would open."""
    for name, text in named:
        if names_code(name, text):
            raise InputError(
                f"{path} names a program or a file to open, {_shown(name, repr(text))}: give it anew with -{name}, or "
                "-trust to use what it names"
            )


def _texts(attributes: dict[str, str], own: dict[str, Option]) -> dict[str, str]:
    """The options of a run file that say something about the run, as texts for the database; flags are empty."""
    foreign = {o.name for o in run.OPTIONS} - own.keys()  # older files of one driver have targets of the other
    texts = {}
    for key, text in attributes.items():
        name = key.removeprefix(_PREFIX)
        if name == key or name in foreign:
            continue
        option = own.get(name)
        if text == "None":  # a flag, or left open
            if option is not None and option.type is not bool:
                continue
            text = ""
        if option is None or option.changes != EACH_START:
            texts[name] = text
    texts |= {name: attributes[name] for name in _RESOLVED if name in own and name in attributes and name not in texts}
    return {name: text for name, text in texts.items() if name in own or for_runs(name)}


def _solver(now: dict[str, str]) -> str | None:
    """The solver that stands beside -restart, if one does."""
    name = now.get("tao_type", now.get("solver", "auto"))
    return None if name == "auto" else name


def _changes(path: str, name: str, option: Option | None, then: dict[str, str], text: str, other: bool) -> bool:
    """Whether a given text is another value than that of the file; an InputError if it may not be."""
    if option is None:
        return then.get(name) != text
    value = option.parse(text)
    if name in then:
        before = option.parse(then[name])
    elif option.default is None:
        return option.changes == FREELY  # left open in the file: parameters and state say whether it fits
    else:
        before = option.default
    if value == before:
        return False
    if option.changes == NEVER and not same_reference(str(value), str(before)):
        raise InputError(f"option -{name} cannot change: {path} was written with -{name} {before}, not {value}")
    if option.changes == WITH_SOLVER and not other:
        raise InputError(
            f"option -{name} changes only where another -solver begins, too: {path} was written with -{name} {before}, "
            f"not {value}"
        )
    return True


def _check_files(path: str, named: Sequence[tuple[str, str]]) -> None:
    """Raise an InputError if a class or a data file that a run file names has gone."""
    for name, text in named:
        file = text.rpartition(":")[0] if text.rpartition(":")[0].endswith(".py") else text
        if file.endswith((".py", ".h5")) and not Path(file).is_file():
            raise InputError(
                f"{path} was written with -{name} {text}, and there is no file '{file}' here: "
                f"give the new path as -{name} path/to/{Path(text).name}"
            )
