"""Options: what texts stand for, what is refused, and what is left in the database."""

from typing import Any

import pytest
from petsc4py import PETSc

from ddml.errors import InputError
from ddml.options import Option, number_or_word, preset, read, unused

TABLE = (
    Option("count", 3, "A number.", minimum=1),
    Option("length", 0.5, "Another.", above=0.0),
    Option("name", "plain", "A word.", choices=("plain", "fancy")),
    Option("switch", False, "On or off."),
    Option("width", None, "No default.", kind=int, minimum=1),
    Option("text", "", "Anything."),
)


def by_name(name: str) -> Option:
    return next(o for o in TABLE if o.name == name)


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("count", "7", 7), ("count", "1", 1), ("length", "2", 2.0), ("length", "1e-300", 1e-300),
        ("name", "fancy", "fancy"), ("width", "12", 12), ("text", "a b", "a b"),
        *(("switch", text, True) for text in ("", "1", "true", "yes", "on", "True", "ON")),
        *(("switch", text, False) for text in ("0", "false", "no", "off", "False", "OFF")),
    ],
)  # fmt: skip
def test_texts_become_values(name: str, text: str, value: Any) -> None:
    parsed = by_name(name).parse(text)
    assert parsed == value
    assert type(parsed) is type(value)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("count", "0", "1 or more"), ("count", "2.5", "an integer"), ("count", "many", "an integer"),
        ("length", "0", "more than 0"), ("length", "-1", "more than 0"), ("length", "nan", "more than 0"),
        ("length", "short", "a number"), ("name", "other", "one of plain, fancy"), ("switch", "maybe", "true or false"),
        ("switch", "2", "true or false"), ("width", "0", "1 or more"), ("width", "x", "an integer"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_refused_by_name(name: str, text: str, words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        by_name(name).parse(text, "sub_")
    assert f"-sub_{name} " in str(caught.value)
    assert text in str(caught.value)


def test_options_are_read_under_their_prefix_and_default_elsewhere(prefix: str) -> None:
    database = PETSc.Options()
    database.setValue(f"{prefix}count", 9)
    database.setValue(f"{prefix}switch", "")
    values = read(TABLE, prefix)
    assert vars(values) == {"count": 9, "length": 0.5, "name": "plain", "switch": True, "width": None, "text": ""}
    assert vars(read(TABLE, f"{prefix}other_"))["count"] == 3


def test_options_that_nobody_asked_for_are_listed(prefix: str) -> None:
    database = PETSc.Options()
    database.setValue(f"{prefix}count", 9)
    database.setValue(f"{prefix}cuont", 9)
    before = set(unused())
    read(TABLE, prefix)
    assert {f"{prefix}count", f"{prefix}cuont"} <= before
    assert f"{prefix}cuont" in unused()
    assert f"{prefix}count" not in unused()


@pytest.mark.parametrize("key", ["log_view", "options_left", "malloc_debug", "vec_type", "mat_type", "on_error_abort"])
def test_options_of_petsc_itself_are_not_listed(key: str) -> None:
    with preset(**{key: "x"}):
        assert key not in unused()


def test_presets_hold_while_petsc_reads_and_give_way_to_what_is_set(prefix: str) -> None:
    database = PETSc.Options()
    database.setValue(f"{prefix}given", "mine")
    with preset(**{f"{prefix}given": "theirs", f"{prefix}new": 5}):
        assert database.getString(f"{prefix}given") == "mine"
        assert database.getInt(f"{prefix}new") == 5
    assert database.getString(f"{prefix}given") == "mine"
    assert not database.hasName(f"{prefix}new")


def test_presets_are_taken_back_after_an_error(prefix: str) -> None:
    with pytest.raises(KeyError), preset(**{f"{prefix}new": 5}):
        raise KeyError
    assert not PETSc.Options().hasName(f"{prefix}new")


@pytest.mark.parametrize(("text", "value"), [("search", None), ("0.5", 0.5), ("1", 1.0)])
def test_a_number_or_a_word(text: str, value: float | None) -> None:
    assert number_or_word("p_", "step", text, "search") == value


@pytest.mark.parametrize("text", ["0", "-1", "nan", "find", ""])
def test_neither_a_number_nor_the_word(text: str) -> None:
    with pytest.raises(InputError, match="-p_step must be 'search' or a number above 0"):
        number_or_word("p_", "step", text, "search")


def test_help_shows_default_and_choices() -> None:
    assert " ".join(str(by_name("name")).split()) == "-name A word. One of plain, fancy. (default plain)"
    assert "(default false)" in str(by_name("switch"))
    assert "default" not in str(Option("width", None, "Free.", kind=int))
