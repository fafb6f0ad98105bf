"""Packages that not everybody has, asked for in one line where they are missing."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from ddml.errors import InputError


def extra(use: str, *names: str) -> Any:
    """Packages that are needed for some use: the first one, imported.

    Raises
    ------
    InputError
        Where one is missing: one line with the command that installs them.
    """
    try:
        first, *_ = map(import_module, names)
    except ImportError as error:
        raise InputError(f"{use} needs {' and '.join(names)}: pip install {' '.join(names)} ({error})") from error
    return first
