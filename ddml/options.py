"""Options as tables: one line an option, read from PETSc's database under a prefix, shown by ``-help``."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from petsc4py import PETSc

from .errors import InputError
from .parallel import cause, release, words_of

# Whether a restart may change an option: freely; only where another solver begins, too; never. What each start has for
# itself a run file does not pass on.
FREELY, WITH_SOLVER, NEVER, EACH_START = "freely", "with the solver", "never", "each start"

# What PetscInitialize and PetscFinalize read, which is before or after anybody can ask who used it.
_PETSC_OWN = re.compile(
    r"^(log_|malloc|memory_view|options_|info|on_error|no_signal|fp_trap|mpi_|viewfromoptions|help|check_|checkfunc"
    r"|debug|start_in|stop_for|saws|version|error_output|get_total|objects_dump|citations|now|use_gpu|device_|vec_|mat_"
    r"|cuda_|hip_|python|nox|prefix_).*$"
)

_AT_THE_END = re.compile(r"^(\w+_)?tao_view(_\w+)?$")  # what PETSc reads behind a solve

# what opens files: of PETSc, and ours
_LOOKS = re.compile(r"(^|_)(view|monitor|draw|plot|history|save|load|file|library|tensorboard)(_|$)")

_REFUSALS = {62, 63, 86}  # PETSC_ERR_ARG_WRONG, _ARG_OUTOFRANGE, _UNKNOWN_TYPE
_TRUE, _FALSE = {"", "1", "true", "yes", "on"}, {"0", "false", "no", "off"}


@dataclass(frozen=True)
class Option:
    """One option ``-name``: its type (of ``default``, or ``kind`` where that is None), bounds and meaning.

    ``changes`` says whether a restart may change it: :data:`FREELY`, :data:`WITH_SOLVER`, :data:`NEVER`; with
    :data:`EACH_START` it is no part of the run.
    """

    name: str
    default: Any
    help: str
    kind: type = str
    choices: Sequence[str] = ()
    minimum: float | None = None
    above: float | None = None
    changes: str = FREELY

    @property
    def type(self) -> type:
        """The type of a value."""
        return self.kind if self.default is None else type(self.default)

    def parse(self, text: str, prefix: str = "") -> Any:
        """The value that a text stands for.

        Raises
        ------
        InputError
            If it stands for none, or for one out of bounds.
        """
        what = f"option -{prefix}{self.name}"
        if self.type is bool:
            if text.lower() not in _TRUE | _FALSE:
                raise InputError(f"{what} must be true or false, got '{text}'")
            return text.lower() in _TRUE
        if self.type is str and not text and self.default != "":
            raise InputError(f"{what} has no value")
        try:
            value = self.type(text)
        except ValueError:
            noun = {int: "an integer", float: "a number"}.get(self.type, "a text")
            raise InputError(f"{what} must be {noun}, got '{text}'") from None
        if self.type is int and abs(value) >= 2**63:
            raise InputError(f"{what} must be an integer of 64 bits, got {text}")
        if self.choices and value not in self.choices:
            raise InputError(f"{what} must be one of {', '.join(self.choices)}; got '{text}'")
        if self.minimum is not None and not value >= self.minimum:
            raise InputError(f"{what} must be {self.minimum:g} or more, got {text}")
        if self.above is not None and not value > self.above:
            raise InputError(f"{what} must be more than {self.above:g}, got {text}")
        return value

    def __str__(self) -> str:
        default = (
            ""
            if self.default is None
            else f" (default {str(self.default).lower() if self.type is bool else self.default})"
        )
        choices = f" One of {', '.join(self.choices)}." if self.choices else ""
        return f"  -{self.name:<20} {self.help}{choices}{default}"


def with_defaults(table: Iterable[Option], **defaults: Any) -> tuple[Option, ...]:
    """The same options with other defaults."""
    return tuple(replace(o, default=defaults.get(o.name, o.default)) for o in table)


def read(table: Iterable[Option], prefix: str | None = "") -> SimpleNamespace:
    """The values of some options under a prefix, defaults where they are not given."""
    database, prefix = PETSc.Options(), prefix or ""
    return SimpleNamespace(
        **{
            o.name: o.parse(database.getString(prefix + o.name), prefix)
            if database.hasName(prefix + o.name)
            else o.default
            for o in table
        }
    )


def number_or_word(prefix: str, name: str, text: str, *words: str) -> float | None:
    """The positive number that an option's text is, or None if it is one of ``words``.

    Raises
    ------
    InputError
        If it is neither.
    """
    if text in words:
        return None
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < math.inf:
        named = ", ".join(f"'{word}'" for word in words)
        raise InputError(f"option -{prefix}{name} must be {named} or a number above 0, got '{text}'")
    return value


def for_runs(key: str) -> bool:
    """Whether an option of that name is for what a program does, not for what PETSc does when a program starts."""
    return key.startswith(("vec_", "mat_")) or not _PETSC_OWN.match(key)


def given() -> dict[str, str]:
    """What is in the database for what the program does, by name; a flag's text is empty."""
    return {key: text or "" for key, text in PETSc.Options().getAll().items() if for_runs(key)}


def same_reference(one: str, other: str) -> bool:
    """Whether two values name the same thing: equal, or a class or a data file that has moved to another folder."""
    if ":" in one and ":" in other:
        return one.rpartition(":")[2] == other.rpartition(":")[2]
    if one.endswith(".h5") and other.endswith(".h5"):
        return Path(one).name == Path(other).name
    return one == other or ("/" in one + other and Path(one).name == Path(other).name)


def names_code(name: str, text: str) -> bool:
    """Whether an option of that name and text makes somebody's program run, or opens a file of any name.

    These are ``path/to/file.py:Class``; of PETSc its types in Python, those of ``solvers`` apart, and what looks at
    something or keeps it: viewers and monitors write to files of any name, as ``-tensorboard`` does.
    """
    if text == "None":
        return False
    if ".py" in text and ":" in text:
        return True
    if name.endswith("python_type"):
        return not text.startswith("solvers.")
    return _LOOKS.search(name) is not None and text.lower() not in _TRUE | _FALSE


def unused() -> list[str]:
    """Keys in the database that nothing has asked for yet, PETSc's own general ones apart."""
    database = PETSc.Options()
    return [
        key
        for key in database.getAll()
        if not database.used(key) and not _PETSC_OWN.match(key) and not _AT_THE_END.match(key)
    ]


@contextmanager
def understood() -> Iterator[None]:
    """Make what PETSc, or a solver that PETSc calls, says of an option in this block an InputError."""
    try:
        yield
    except PETSc.Error as error:
        release(error)
        ours = cause(error, InputError)
        if ours is not None:
            raise ours from error
        inner = error
        while isinstance(inner.__cause__, PETSc.Error):
            inner = inner.__cause__
        missing = cause(error, ImportError) or cause(error, AttributeError)
        if missing is not None and any(str(v) in str(missing) for v in PETSc.Options().getAll().values() if v):
            raise InputError(f"there is no such Python type: {missing}") from error
        if inner.__cause__ is not None or inner.ierr not in _REFUSALS:
            raise
        text = words_of(inner)
        given = [f" (-{k} {v})" for k, v in PETSc.Options().getAll().items() if v and v in text.split()]
        raise InputError(f"PETSc refuses an option: {text}{''.join(given)}") from error


@contextmanager
def preset(**values: Any) -> Iterator[None]:
    """Put options into the database where they are not given already, while PETSc reads them."""
    database = PETSc.Options()
    added = [name for name in values if not database.hasName(name)]
    for name in added:
        database.setValue(name, values[name])
    try:
        yield
    finally:
        for name in added:
            database.delValue(name)
