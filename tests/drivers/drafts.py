"""Drafts of problem files, each of them right, with every function written out, for slips to change."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

HEAD = """import numpy as np
import torch
from torch import cos, exp, pi, sin

from ddml.problems import PDE, Face, Interior, Periodic, Points, Term


"""


@dataclass
class Function:
    """A method: its arguments behind self, lines before its return, and what it returns."""

    arguments: list[str]
    value: str
    before: list[str] = field(default_factory=list)
    returns: bool = True

    def text(self, name: str) -> str:
        lines = [*self.before, ("return " if self.returns else "result = ") + self.value]
        return f"    def {name}(self, {', '.join(self.arguments)}):\n" + "".join(f"        {line}\n" for line in lines)


@dataclass
class Draft:
    """A problem file."""

    domain: dict[str, str]  # intervals as they are written
    functions: dict[str, Function]
    fields: tuple[str, ...] = ("u",)
    places: str = ""  # (M, d) points and values of the data term, as they are written
    values: str = ""
    terms: list[str] = field(default_factory=lambda: ["Term(self.residual)"])
    returns: bool = True  # of terms()
    more: list[str] = field(default_factory=list)

    @property
    def letters(self) -> list[str]:
        return list(self.domain)

    def text(self) -> str:
        domain = ", ".join(f'"{letter}": {interval}' for letter, interval in self.domain.items())
        lines = [f"domain = {{{domain}}}", f"fields = {self.fields!r}", "width, depth = 10, 2", *self.more]
        terms = f"{'return ' * self.returns}[{', '.join(self.terms)}]"
        return (
            f"{HEAD}class Problem(PDE):\n"
            + "".join(f"    {line}\n" for line in lines)
            + "".join("\n" + function.text(name) for name, function in self.functions.items())
            + f"\n    def terms(self):\n        places = {self.places}\n        {terms}\n"
        )


def poisson() -> Draft:
    """u'' = -pi^2 sin(pi x) between walls."""
    return Draft(
        {"x": "(0.0, 1.0)"},
        {
            "embed": Function(["x"], "x"),
            "lift": Function(["x"], "0.0 * x"),
            "factor": Function(["x"], "x * (1.0 - x)"),
            "residual": Function(["u", "x"], "u.xx + pi**2 * sin(pi * x)"),
            "exact": Function(["x"], "sin(pi * x)"),
            "data": Function(["u", "x", "given"], "u - given"),
        },
        places="np.linspace(0.1, 0.9, 9)[:, None]",
        values="np.sin(np.pi * places[:, 0])",
    )


def heat() -> Draft:
    """u_t = 0.1 u_xx from sin(pi x / 2)."""
    return Draft(
        {"t": "(0.0, 1.0)", "x": "(0.0, 2.0)"},
        {
            "embed": Function(["t", "x"], "t, x"),
            "lift": Function(["t", "x"], "sin(pi * x / 2)"),
            "factor": Function(["t", "x"], "t * x * (2.0 - x)"),
            "residual": Function(["u", "t", "x"], "u.t - 0.1 * u.xx"),
            "exact": Function(["t", "x"], "exp(-0.1 * (pi / 2)**2 * t) * sin(pi * x / 2)"),
            "data": Function(["u", "t", "x", "given"], "u - given"),
        },
        places="np.random.default_rng(0).uniform([0.0, 1.1], [1.0, 1.9], (9, 2))",
        values="np.exp(-0.1 * (np.pi / 2)**2 * places[:, 0]) * np.sin(np.pi * places[:, 1] / 2)",
    )


def oscillator() -> Draft:
    """a' = b, b' = -a."""
    return Draft(
        {"t": "(0.0, 2.0)"},
        {
            "embed": Function(["t"], "t"),
            "lift": Function(["t"], "1.0 + 0.0 * t, 0.0 * t"),
            "factor": Function(["t"], "1.0 * t"),
            "residual": Function(["a", "b", "t"], "a.t - b, b.t + a"),
            "exact": Function(["t"], "cos(t), -sin(t)"),
            "data": Function(["a", "b", "t", "given"], "a - given"),
        },
        ("a", "b"),
        places="np.linspace(0.1, 1.9, 9)[:, None]",
        values="np.cos(places[:, 0])",
    )


DRAFTS = (poisson, heat, oscillator)


def pieces(value: str) -> list[str]:
    return value.split(", ")


def each(draft: Draft, name: str, form: str) -> None:
    """Put everything that a function gives into a form."""
    function = draft.functions[name]
    function.value = ", ".join(form.format(p) for p in pieces(function.value))


def with_data(draft: Draft, places: str = "places", values: str = "") -> None:
    draft.terms.append(f'Term(self.data, Points({places}, given={values or draft.values}), 1.0, "data")')


def shifted(function: Function, letter: str, line: str, back: str) -> None:
    """Change a coordinate in place; the value is written in the changed one."""
    function.before.append(line)
    function.value = re.sub(rf"(?<![\w.]){letter}(?!\w)", f"({back})", function.value)


def scaled(draft: Draft, length: float, size: float) -> None:
    """The same problem in other units: coordinates times ``length``, fields times ``size``."""
    for letter, interval in draft.domain.items():
        low, high = map(float, interval.strip("()").split(","))
        draft.domain[letter] = f"({low * length!r}, {high * length!r})"
    for name in ("lift", "factor", "residual", "exact"):
        function = draft.functions[name]
        for letter in draft.letters:
            function.value = re.sub(rf"(?<![\w.]){letter}(?!\w)", f"({letter} / {length!r})", function.value)
    residual = draft.functions["residual"]
    residual.value = re.sub(r"(\w+)\.([tx]+)", lambda m: f"{m[0]} * {length ** len(m[2])!r}", residual.value)
    if draft.fields == ("u",):
        residual.value = residual.value.replace("pi**2 *", f"{size!r} * pi**2 *")
    for name in ("lift", "exact"):
        each(draft, name, f"{size!r} * ({{}})")
