"""Names of a package that are loaded when they are asked for, so that a program pays only for what it uses."""

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def lazily(package: str, names: Mapping[str, str], modules: tuple[str, ...] = ()) -> Callable[[str], Any]:
    """The ``__getattr__`` of a package.

    Parameters
    ----------
    package
        Its name.
    names
        What the package offers, and the modules that have it.
    modules
        Its own modules that can be had as attributes, too.
    """

    def load(name: str) -> Any:
        if name in names:
            return getattr(import_module(names[name]), name)
        if name in modules:
            return import_module(f"{package}.{name}")
        raise AttributeError(f"module '{package}' has no attribute '{name}'")

    return load
