"""Where PETSc's options come from: ``.petscrc`` files, ``PETSC_OPTIONS``, ``-options_file`` and the command line."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from .errors import InputError

COMMAND_LINE, VARIABLE = "the command line", "PETSC_OPTIONS"
GPU_AWARE_MPI = "use_gpu_aware_mpi", "sf_use_gpu_aware_mpi"  # two names of one option
_RC = ".petscrc", "petscrc"


@dataclass
class Origins:
    """Who has given which option last, which is what PETSc takes.

    Attributes
    ----------
    of : dict of str to str
        From the names of options to :data:`COMMAND_LINE`, :data:`VARIABLE` or the path of a file.
    ambient : set of str
        Origins that hold for every program that is started here: :data:`VARIABLE` and ``.petscrc`` files.
    """

    of: dict[str, str] = field(default_factory=dict)
    ambient: set[str] = field(default_factory=set)

    def around(self) -> dict[str, str]:
        """The options that nobody has given to this program in particular, with where they stand."""
        return {name: origin for name, origin in self.of.items() if origin in self.ambient}


def origins(arguments: Sequence[str], environment: Mapping[str, str]) -> Origins:
    """Read what PETSc reads when it starts, in its order, behind which later ones win.

    Parameters
    ----------
    arguments
        Of the command line, without the program.
    environment
        Variables, of which ``HOME`` and ``PETSC_OPTIONS`` matter.

    Raises
    ------
    InputError
        A file that cannot be read, or a line in one that PETSc refuses.
    """
    found = Origins()
    variable = environment.get(VARIABLE, "").split()
    flags = [*variable, *arguments]
    if not _given(flags, "skip_petscrc"):
        home = Path(environment["HOME"], _RC[0]) if "HOME" in environment else None
        for path in (*([home] if home else []), *map(Path, _RC)):
            with suppress(OSError):  # PETSc passes over what it cannot read
                text = path.read_text(errors="replace")
                found.ambient.add(str(path))
                _record(_words(text, str(path)), str(path), found)
    found.ambient.add(VARIABLE)
    _record(variable, VARIABLE, found)
    _record(arguments, COMMAND_LINE, found)
    return found


def refuse_words(arguments: Sequence[str], environment: Mapping[str, str]) -> None:
    """Raise an InputError for a word that PETSc passes over, as it is neither an option nor the value of one."""
    for words, where in ((environment.get(VARIABLE, "").split(), f" in {VARIABLE}"), (arguments, "")):
        for before, word in zip(["", *words], words, strict=False):
            if not is_key(before) and not is_key(word):
                raise InputError(f"'{word}'{where} is neither an option nor the value of one; -help lists the options")


def is_key(text: str) -> bool:
    """Whether a word is the name of an option for PETSc."""
    with suppress(ValueError):
        float(text)  # also -inf
        return False
    return re.match("--?[a-z]", text, re.IGNORECASE) is not None


def _pairs(words: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """Options and their values."""
    for number, word in enumerate(words):
        if is_key(word):
            value = words[number + 1] if number + 1 < len(words) and not is_key(words[number + 1]) else None
            yield word.lstrip("-"), value


def _given(words: Sequence[str], name: str) -> bool:
    return any(key == name and value not in ("0", "false", "no", "off") for key, value in _pairs(words))


def _record(words: Sequence[str], origin: str, found: Origins) -> None:
    prefixes: list[str] = []
    for name, value in _pairs(words):
        if name == "prefix_push":
            prefixes.append(value or "")
        elif name == "prefix_pop":
            del prefixes[-1:]
        elif name == "options_file":
            _record(_file(value, origin), value or "", found)
        else:
            found.of["".join((*prefixes, name))] = origin


def _file(path: str | None, origin: str) -> list[str]:
    """The words of a file that ``-options_file`` names; none of YAML, which PETSc reads its own way."""
    if path is None:
        raise InputError(f"option -options_file of {origin} must name a file")
    try:
        text = Path(path).expanduser().read_text(errors="replace")
    except OSError as error:
        raise InputError(f"option -options_file of {origin}: cannot read {path}: {error.strerror}") from error
    return [] if Path(path).suffix in (".yml", ".yaml") else _words(text, path)


def _words(text: str, path: str) -> list[str]:
    """The words of a file with an option on each line, which ``#`` ends."""
    words: list[str] = []
    for number, line in enumerate(text.splitlines(), 1):
        tokens = line.partition("#")[0].split()
        if tokens and tokens[0] == "alias" and len(tokens) == 3:
            continue
        if tokens and not (is_key(tokens[0]) and (len(tokens) < 2 or (len(tokens) == 2 and not is_key(tokens[1])))):
            raise InputError(
                f"{path}, line {number}: '{' '.join(tokens)}' is not one option with its value, if it has one"
            )
        words += tokens
    return words
