"""Classes that a user gives as ``path/to/file.py:Name``."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import InputError


def load(reference: str, known: dict[str, Any], what: str) -> Any:
    """The object of that name: one of ``known``, or ``path/to/file.py:Name``.

    Raises
    ------
    InputError
        Unknown name, missing file, a file that does not import, a name it does not have.
    """
    path, colon, name = reference.rpartition(":")
    if not colon:
        if reference not in known:
            raise InputError(f"unknown {what} '{reference}'; there are {', '.join(known)}; or path/to/file.py:Name")
        return known[reference]
    if not Path(path).is_file():
        raise InputError(f"{what} '{reference}': there is no file '{path}'")
    spec = importlib.util.spec_from_file_location(f"user_{Path(path).stem}", path)
    if spec is None or spec.loader is None:
        raise InputError(f"{what} '{reference}': '{path}' is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise InputError(f"{what} '{reference}' does not import: {type(error).__name__}: {error}") from error
    if not hasattr(module, name):
        raise InputError(f"{what} '{reference}': '{path}' has no '{name}'")
    return getattr(module, name)


@contextmanager
def blamed(reference: str, known: dict[str, Any], what: str) -> Iterator[None]:
    """Make whatever a user's class (one that is not in ``known``) raises in this block an InputError that names it."""
    try:
        yield
    except Exception as error:
        if reference in known:
            raise
        if isinstance(error, InputError):
            if error.__cause__ is None or reference in str(error):
                raise
            raise InputError(f"{what} '{reference}': {error}") from error
        raise InputError(f"{what} '{reference}' raised {type(error).__name__}: {error}") from error
