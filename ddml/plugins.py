"""Classes that a user gives as ``path/to/file.py:Name``, and the files beside that file.

The modules of one folder make a package of their own, ``ddml_user_<number>``, so that files of the same name in two
folders are two modules and nothing is found there by anybody else. Inside it ``import material`` means ``material.py``
beside the importing file, where there is one, before anything installed.
"""

from __future__ import annotations

import builtins
import importlib
import importlib.util
import sys
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.machinery import EXTENSION_SUFFIXES, ExtensionFileLoader, FileFinder, ModuleSpec, SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

from .errors import InputError

# what a user's file always means by these names, whatever stands beside it
OURS = frozenset({"ddml", "solvers", "torch", "numpy", "mpi4py", "petsc4py"})


_PREFIX = "ddml_user_"


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
    if Path(path).suffix != ".py":
        raise InputError(f"{what} '{reference}': '{path}' is no Python file")
    try:
        module = _module(Path(path).resolve())
    except (Exception, SystemExit) as error:
        said = str(error).replace(f"{_package(Path(path).resolve().parent)}.", "")
        raise InputError(f"{what} '{reference}' does not import: {type(error).__name__}: {said}") from error
    if not hasattr(module, name):
        raise InputError(f"{what} '{reference}': '{path}' has no '{name}'")
    return getattr(module, name)


def _module(path: Path) -> ModuleType:
    """A user's file as a module of its folder's package."""
    package = _package(path.parent)
    name = f"{package}.{path.stem.replace('.', '_')}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path, loader=_Loader(name, str(path)))
        assert spec is not None and spec.loader is not None
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


def _package(folder: Path) -> str:
    """The name of a folder's package, which is made where it is not there yet."""
    name = f"{_PREFIX}{zlib.crc32(str(folder).encode(errors='surrogateescape')):08x}"
    if name not in sys.modules:
        package = sys.modules[name] = ModuleType(name, f"The files of {folder}.")
        package.__path__ = [str(folder)]
        if _Finder not in sys.meta_path:
            sys.meta_path.insert(0, _Finder)
    return name


class _Finder:
    """Finds the modules of our packages, for Python's import system; knows no other names."""

    @classmethod
    def find_spec(cls, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if path is None or not name.startswith(_PREFIX):
            return None
        for folder in path:
            kinds = (ExtensionFileLoader, EXTENSION_SUFFIXES), (_Loader, [".py"])
            found = FileFinder(folder, *kinds).find_spec(name)
            if found is not None:
                return found
        return None


class _Loader(SourceFileLoader):
    """Runs a file with an ``import`` that looks beside it first."""

    def exec_module(self, module: ModuleType) -> None:
        package = module.__name__.partition(".")[0]

        def import_(
            name: str,
            names: Mapping[str, Any] | None = None,
            local: Mapping[str, Any] | None = None,
            wanted: Sequence[str] | None = (),
            level: int = 0,
        ) -> ModuleType:
            top = name.partition(".")[0]
            if level or not _beside(package, top, self.path):
                return builtins.__import__(name, names, local, wanted or (), level)
            importlib.import_module(f"{package}.{name}")
            if not wanted:
                return sys.modules[f"{package}.{top}"]
            return builtins.__import__(f"{package}.{name}", names, local, wanted, 0)

        module.__dict__["__builtins__"] = {**vars(builtins), "__import__": import_}
        super().exec_module(module)


def _beside(package: str, name: str, file: str) -> bool:
    """Whether there is a module of that name beside a user's file, which is not itself meant."""
    if name in OURS or name in sys.builtin_module_names:
        return False
    spec = _Finder.find_spec(f"{package}.{name}", sys.modules[package].__path__)
    if spec is None or spec.origin == file:
        return False
    # a folder without __init__.py comes last, as everywhere
    return spec.loader is not None or importlib.util.find_spec(name) is None


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
