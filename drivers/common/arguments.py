"""The command line of programs that read run files: files, and options that are no options of PETSc."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, NoReturn

from ddml.errors import InputError
from ddml.options import Option

# what a run file names and does not hold
ANEW = (
    Option("problem", None, "The run's problem given anew, as path/to/file.py:Class."),
    Option("network", None, "The run's network given anew, as path/to/file.py:Class."),
    Option("data", None, "The run's data given anew, where its samples are needed."),
    Option("trust", False, "Whether files that the run file names are used, and run, where they are not given anew."),
)
FUSION = Option("fusion", None, "Of a run with -tiles: coherent, all networks as that phase has left them; or what the "
                "phases before it have come to, with the coarse net, by the average or by the majority (default: the "
                "first, where there is one, or what the run's -fusion says).",
                choices=("coherent", "coarse", "average", "majority"))  # fmt: skip


class Parser(argparse.ArgumentParser):
    """A parser whose complaints are those of all drivers."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; -help explains the options")


def run_and_options(title: str, table: Sequence[Option]) -> tuple[str, SimpleNamespace]:
    """The run file that the command line names, and the values of its options.

    Raises
    ------
    InputError
        Unknown words, options without a value or with one that they cannot have.
    SystemExit
        After -help.
    """
    parser = Parser(description=title, formatter_class=argparse.RawDescriptionHelpFormatter, add_help=False,
                    allow_abbrev=False)  # fmt: skip
    parser.add_argument("-h", "-help", "--help", action="help", help="explain the options")
    parser.add_argument("run", metavar="run.h5")
    for option in table:
        how: dict[str, Any] = {"action": "store_true"} if option.type is bool else {"metavar": "..."}
        parser.add_argument(f"-{option.name}", dest=option.name, help=option.help.replace("%", "%%"), **how)
    given = vars(parser.parse_args(sys.argv[1:]))
    values = {o.name: _value(o, given[o.name]) for o in table}
    return given["run"], SimpleNamespace(**values)


def _value(option: Option, given: Any) -> Any:
    return option.parse(given) if isinstance(given, str) else given or option.default
