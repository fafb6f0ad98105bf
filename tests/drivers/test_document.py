"""The page of options is that of the tables."""

import sys

from launch import ROOT

sys.path.insert(0, str(ROOT / "drivers"))
import document


def test_the_page_is_up_to_date() -> None:
    assert (ROOT / "docs" / "options.md").read_text() == document.page(), "make docs"


def test_it_has_every_option_once_in_each_place() -> None:
    for where, options in (("drivers/pinn.py", document.pinn.OPTIONS), ("-solver tr", document.SOLVERS["tr"].options)):
        part = document.page().split(f"## {where}\n")[1].split("\n## ")[0]
        names = [line.split("`")[1] for line in part.splitlines() if line.startswith("| `")]
        assert len(names) == len(set(names))
        assert {f"-{o.name}" for o in options} <= set(names)
