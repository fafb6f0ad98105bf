"""The house: who imports whom, the sizes of files and classes, and references in docstrings that lead somewhere."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import suites

ROOT = Path(__file__).parents[1]
DRIVERS = ROOT / "drivers"  # whose modules import each other without that name

# A module may import modules of its own room and of the levels above its own line, none beside it.
LEVELS = (
    ("ddml.errors", "ddml.parameters", "ddml.kernels", "ddml.lazy", "ddml.numbers", "ddml.version", "ddml.hdf5_child"),
    ("ddml.plugins", "ddml.parallel", "ddml.origins", "ddml.regular", "ddml.blocks"),
    ("ddml.hdf5",),
    ("ddml.options", "ddml.states", "ddml.summation", "ddml.vectors"),
    ("ddml.layout",),
    ("ddml.data", "ddml.linalg"),
    ("ddml.networks", "ddml.losses"),
    ("ddml.jets", "ddml.decomposition", "ddml.kernel_machines"),
    ("ddml.objectives",),
    ("ddml.norms", "ddml.sampling", "ddml.hierarchy", "ddml.problems"),
    ("ddml.runs", "solvers.bottom"),
    ("ddml.planning", "solvers.quasi_newton", "solvers.trust_region", "solvers.gauss_newton"),
    ("solvers.kernel_machines",),
    ("ddml", "solvers.schwarz"),
    ("solvers.multilevel", "solvers.torch_optimizer"),
    ("solvers",),
    ("drivers",),
)
BOTTOM = tuple(
    f"solvers.{name}" for name in ("arguments", "base", "owner", "registry", "line_search", "minimisation")
)  # one room

# What the levels alone would allow: the modules of a room must not import these, nor what begins with them.
FORBIDDEN = {
    "ddml": ("solvers", "drivers"),
    "ddml.losses": ("mpi4py", "petsc4py"),
    "ddml.objectives": ("ddml.networks", "ddml.problems"),
    "solvers": (
        "ddml.problems",
        "ddml.networks",
        "ddml.data.data_set",
        "ddml.data.files",
        "ddml.runs",
        "ddml.planning",
    ),
}
OPTIONAL = (
    "PIL",
    "matplotlib",
    "tqdm",
    "pandas",
    "xarray",
    "nibabel",
    "sklearn",
)  # packages that may be imported where they are used

LINES, METHODS = 400, 20
# the same loops for every instruction set and type; made of all option tables
LONGER = ("ddml/kernels/jets_template.h", "docs/options.md")

REFERENCE = re.compile(r":(class|func|meth|mod|data|attr|exc):`([^`]+)`")
KINDS = {"class": inspect.isclass, "exc": inspect.isclass, "func": callable, "meth": callable, "mod": inspect.ismodule}


@dataclass(frozen=True)
class Import:
    """One imported module or name of a module, and where."""

    target: str
    line: int
    in_function: bool


@dataclass
class Source:
    """A file of ours."""

    name: str
    path: Path
    tree: ast.Module

    def absolute(self, node: ast.ImportFrom) -> str:
        """The module that a ``from`` names."""
        if not node.level:
            return node.module or ""
        package = self.name.split(".") if self.path.name == "__init__.py" else self.name.split(".")[:-1]
        return ".".join([*package[: len(package) - node.level + 1], *([node.module] if node.module else [])])

    @cached_property
    def imports(self) -> list[Import]:
        """All of them, those that only types need and those in functions too."""

        def walk(node: ast.AST, in_function: bool) -> Iterator[Import]:
            for child in ast.iter_child_nodes(node):
                targets: list[str] = []
                if isinstance(child, ast.Import):
                    targets = [alias.name for alias in child.names]
                elif isinstance(child, ast.ImportFrom):
                    module = self.absolute(child)
                    names = [f"{module}.{alias.name}" for alias in child.names]
                    targets = [name if ours(name) in SOURCES else module for name in names]
                yield from (Import(target, child.lineno, in_function) for target in sorted({*map(ours, targets)}))
                yield from walk(child, in_function or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef))

        return list(walk(self.tree, False))

    @cached_property
    def names(self) -> dict[str, str]:
        """What each imported name is, absolute."""
        return {
            alias.asname or alias.name: f"{self.absolute(node)}.{alias.name}"
            for node in ast.walk(self.tree)
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
        }

    def at(self, line: int) -> str:
        """The file and a line, for messages."""
        return f"{self.path.relative_to(ROOT)}:{line}"


def ours(name: str) -> str:
    """The name under which a module is known here: what stands in ``drivers`` begins with that."""
    first = name.partition(".")[0]
    return f"drivers.{name}" if (DRIVERS / first).is_dir() or (DRIVERS / f"{first}.py").is_file() else name


def sources() -> dict[str, Source]:
    """Every Python file of the three packages, by module."""
    found = {}
    for package in ("ddml", "solvers", "drivers"):
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            found[name] = Source(name, path, ast.parse(path.read_text()))
    return found


SOURCES = sources()
ROOMS = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}


def begins(name: str, room: str) -> bool:
    """Whether a module is, or stands in, a package."""
    return name == room or name.startswith(room + ".")


def room_of(name: str) -> str:
    """The room of one of our modules: the longest name of the table that it begins with."""
    if any(begins(name, file) for file in BOTTOM):
        return "solvers.bottom"
    entries = [room for room in ROOMS if begins(name, room) and (room not in ("ddml", "solvers") or room == name)]
    assert entries, f"{name} stands in no room of the table"
    return max(entries, key=len)


def test_every_file_stands_in_a_room() -> None:
    assert {room_of(name) for name in SOURCES} <= set(ROOMS)
    assert {"ddml.losses", "ddml.problems", "solvers.bottom", "solvers.schwarz", "drivers"} <= set(
        map(room_of, SOURCES)
    )


def test_rooms_import_lower_levels_only() -> None:
    wrong = []
    for source in SOURCES.values():
        here = room_of(source.name)
        for found in source.imports:
            if found.target.partition(".")[0] not in ("ddml", "solvers", "drivers"):
                continue
            there = room_of(found.target)
            if there != here and ROOMS[there] >= ROOMS[here]:
                wrong.append(f"{source.at(found.line)}: {here} imports {found.target}")
    assert not wrong, "\n".join(wrong)


def test_nobody_imports_what_it_must_not_know() -> None:
    wrong = [
        f"{source.at(found.line)}: {source.name} imports {found.target}"
        for source in SOURCES.values()
        for room, forbidden in FORBIDDEN.items()
        if begins(source.name, room)
        for found in source.imports
        if any(begins(found.target, name) for name in forbidden)
    ]
    assert not wrong, "\n".join(wrong)


def test_there_is_no_circle() -> None:
    edges = {name: {i.target for i in source.imports} & SOURCES.keys() for name, source in SOURCES.items()}
    done: set[str] = set()

    def visit(name: str, way: list[str]) -> None:
        assert name not in way, " -> ".join([*way[way.index(name) :], name])
        if name not in done:
            for target in sorted(edges[name] - {name}):
                visit(target, [*way, name])
            done.add(name)

    for name in SOURCES:
        visit(name, [])


def test_imports_inside_functions_are_of_optional_packages() -> None:
    wrong = [
        f"{source.at(found.line)}: {found.target}"
        for source in SOURCES.values()
        for found in source.imports
        if found.in_function and found.target.partition(".")[0] not in OPTIONAL
    ]
    assert not wrong, "\n".join(wrong)


def test_files_are_short() -> None:
    kinds = {".py", ".c", ".h", ".sh", ".md", ".toml", ".sbatch"}
    folders = ("ddml", "solvers", "drivers", "tests", "data", "docs")
    files = [p for p in ROOT.iterdir() if p.is_file()] + [p for f in folders for p in (ROOT / f).rglob("*")]
    counts = {str(p.relative_to(ROOT)): len(p.read_text().splitlines()) for p in files if p.suffix in kinds}
    assert len(counts) > 150
    assert set(LONGER) <= {name for name, count in counts.items() if count > LINES}, "a name that needs no exception"
    wrong = [f"{name}: {count} lines" for name, count in counts.items() if count > LINES and name not in LONGER]
    assert not wrong, "\n".join(sorted(wrong))


def test_classes_have_few_methods() -> None:
    wrong = []
    for source in SOURCES.values():
        for node in ast.walk(source.tree):
            if isinstance(node, ast.ClassDef):
                count = len({f.name for f in node.body if isinstance(f, ast.FunctionDef | ast.AsyncFunctionDef)})
                if count > METHODS:
                    wrong.append(f"{source.at(node.lineno)}: {node.name} has {count} methods")
    assert not wrong, "\n".join(wrong)


@pytest.fixture(scope="module")
def importable() -> Iterator[None]:
    """The drivers' folder is on the path, as for a driver that is started."""
    sys.path.insert(0, str(DRIVERS))
    yield
    sys.path.remove(str(DRIVERS))


def docstrings(source: Source) -> Iterator[tuple[list[str], int, str]]:
    """The enclosing classes, the line and the text of every string that stands alone."""

    def walk(node: ast.AST, classes: list[str]) -> Iterator[tuple[list[str], int, str]]:
        for child in ast.iter_child_nodes(node):
            alone = child.value if isinstance(child, ast.Expr) else None
            if isinstance(alone, ast.Constant) and isinstance(alone.value, str):
                yield classes, child.lineno, alone.value
            yield from walk(child, [*classes, child.name] if isinstance(child, ast.ClassDef) else classes)

    return walk(source.tree, [])


def imported(name: str) -> Any:
    """The object of an absolute name."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError as error:
            if not name.startswith(str(error.name)):
                raise
            continue
        return attribute(found, parts[end:])
    raise LookupError(name)


source_of = cache(inspect.getsource)


def attribute(found: Any, names: list[str]) -> Any:
    """An attribute of an attribute; of a class also what its methods assign, which has no value here."""
    for name in names:
        if not hasattr(found, name):
            classes = found.__mro__ if inspect.isclass(found) else ()
            texts = [source_of(c) for c in classes if c.__module__.partition(".")[0] in ("ddml", "solvers")]
            if any(re.search(rf"(self\.|^    ){name}\b[^(=]*[:=]", text, re.MULTILINE) for text in texts):
                return None
            raise LookupError(name)
        found = getattr(found, name)
    return found


def referred(source: Source, module: ModuleType, classes: list[str], name: str) -> Any:
    """What a name in a docstring refers to: of the class where it stands, of the module, or absolute.

    Raises
    ------
    LookupError
        If there is no such thing.
    """
    parts = name.split(".")
    for_types = source.names
    starts = [(attribute, (module, [*classes[:end], *parts])) for end in range(len(classes), -1, -1)]
    starts += [(imported, (".".join([for_types[parts[0]], *parts[1:]]),))] if parts[0] in for_types else []
    for look, arguments in [*starts, (imported, (name,))]:
        try:
            return look(*arguments)
        except LookupError:
            continue
    raise LookupError(name)


def test_references_in_docstrings_lead_somewhere(importable: None) -> None:
    wrong, count = [], 0
    for name, source in SOURCES.items():
        module = importlib.import_module(name.removeprefix("drivers."))
        for classes, line, text in docstrings(source):
            for match in REFERENCE.finditer(text):
                count += 1
                kind, target = match[1], match[2].lstrip("~")
                try:
                    found = referred(source, module, classes, target)
                except LookupError:
                    wrong.append(f"{source.at(line + text[: match.start()].count(chr(10)))}: {match[0]}")
                    continue
                if found is not None and not KINDS.get(kind, lambda _: True)(found):
                    wrong.append(f"{source.at(line)}: {match[0]} is no {kind}")
    assert count > 200
    assert not wrong, "\n".join(wrong)


def test_the_lists_of_what_runs_where_name_what_there_is() -> None:
    names = ("SERIAL", "SEVERAL", "BY_NAME", "ENDS", "TURNS", "TURNS_ON_RANKS", "SAMPLE", "STARTS", "LENGTHY")
    for entry in (entry for name in names for entry in getattr(suites, name)):
        path, _, test = entry.partition("::")
        assert (ROOT / "tests" / path).exists(), entry
        assert not test or f"def {test.partition('[')[0]}" in (ROOT / "tests" / path).read_text(), entry
