"""Files of users and what stands beside them."""

import random
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch

import ddml
from ddml.errors import InputError
from ddml.plugins import load


def put(folder: Path, files: Mapping[str, str]) -> None:
    """Write Python files by their names."""
    for name, text in files.items():
        path = folder / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.fixture(autouse=True)
def unchanged() -> Iterator[None]:
    """What Python finds for everybody else stays as it is."""
    path = list(sys.path)
    yield
    assert sys.path == path
    assert not {"material", "laws", "lib", "main", "one"} & sys.modules.keys()


BESIDE = {
    "a name": ("from material import k", {"material": "k = 7"}),
    "a module": ("import material\nk = material.k", {"material": "k = 7"}),
    "a module that imports another": ("from material import k", {"material": "from laws import k", "laws": "k = 7"}),
    "a package": ("from lib.laws import k", {"lib/__init__": "", "lib/laws": "from .steel import k",
                                             "lib/steel": "k = 7"}),
    "a module of a package": ("import lib.laws\nk = lib.laws.k", {"lib/__init__": "", "lib/laws": "k = 7"}),
    "a module of a package by from": ("from lib import laws\nk = laws.k", {"lib/__init__": "", "lib/laws": "k = 7"}),
    "a module of a folder": ("from lib.laws import k", {"lib/laws": "k = 7"}),
    "a file beside the package, from inside": ("from lib.laws import k", {
        "lib/__init__": "", "lib/laws": "from material import k", "material": "k = 7"}),
    "a relative name": ("from .material import k", {"material": "k = 7"}),
    "only when asked": ("class Late:\n    def __get__(self, *_):\n        from material import k\n        return k\n"
                        "class Holder:\n    k = Late()\nk = Holder().k", {"material": "k = 7"}),
    "a circle": ("k = 7\nimport material", {"material": "import main"}),
    "before what is installed": ("from colorsys import k", {"colorsys": "k = 7"}),
    "before what is loaded already": ("from random import k", {"random": "k = 7"}),
    "a star": ("from material import *", {"material": "k = 7"}),
    "under another name": ("import lib.laws as laws\nk = laws.k", {"lib/__init__": "", "lib/laws": "k = 7"}),
}  # fmt: skip


@pytest.mark.parametrize("name", BESIDE)
def test_what_stands_beside_a_file_is_found(name: str, tmp_path: Path) -> None:
    text, files = BESIDE[name]
    put(tmp_path, {"main": text, **files})
    assert load(f"{tmp_path / 'main.py'}:k", {}, "problem") == 7
    assert sys.modules["random"] is random


def test_files_of_the_same_name_in_two_folders_are_two(tmp_path: Path) -> None:
    for number in (1, 2):
        put(tmp_path / str(number), {"main": "from material import k", "material": f"k = {number}"})
    assert [load(f"{tmp_path / str(i) / 'main.py'}:k", {}, "problem") for i in (1, 2)] == [1, 2]


def test_two_files_of_a_folder_share_what_stands_beside_them(tmp_path: Path) -> None:
    put(tmp_path, {**dict.fromkeys(("one", "two"), "from material import Law"), "material": "class Law: pass"})
    one, two = (load(f"{tmp_path / name}:Law", {}, "problem") for name in ("one.py", "two.py"))
    assert one is two


@pytest.mark.parametrize("name", ["torch", "random", "numpy", "heat.v2", "my-heat", "ddml"])
def test_a_file_may_have_any_name(name: str, tmp_path: Path) -> None:
    (tmp_path / f"{name}.py").write_text("import ddml, numpy, random, torch\nk = ddml, torch, random, numpy.pi")
    assert load(f"{tmp_path / name}.py:k", {}, "problem")[:3] == (ddml, torch, random)


@pytest.mark.parametrize("name", ["ddml", "solvers", "torch", "numpy"])
def test_our_names_are_ours_in_files_of_users(name: str, tmp_path: Path) -> None:
    put(tmp_path, {"main": f"import {name} as k", name: "raise AssertionError"})
    assert load(f"{tmp_path / 'main.py'}:k", {}, "problem") is sys.modules[name]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("import materiel", "ModuleNotFoundError: No module named 'materiel'"),
        ("from lib import laws", "ImportError: cannot import name 'laws' from 'lib'"),
        ("import lib.laws", "No module named 'lib.laws'"),
        ("import sys\nsys.exit('no data')", "SystemExit: no data"),
        ("import broken", "broken.py, line 1"),
    ],
)
def test_what_does_not_import_is_named_as_its_user_does(text: str, words: str, tmp_path: Path) -> None:
    put(tmp_path, {"main": text, "lib/__init__": "", "broken": "class Right(:"})
    with pytest.raises(InputError) as caught:
        load(f"{tmp_path / 'main.py'}:k", {}, "problem")
    assert words in str(caught.value)


def test_a_file_that_failed_is_read_anew(tmp_path: Path) -> None:
    put(tmp_path, {"main": "from material import k", "material": "k = 1 / 0"})
    with pytest.raises(InputError, match="ZeroDivisionError"):
        load(f"{tmp_path / 'main.py'}:k", {}, "problem")
    (tmp_path / "material.py").write_text("k = 7  # mended")
    assert load(f"{tmp_path / 'main.py'}:k", {}, "problem") == 7
