"""Docstrings as mkdocs reads them: an extension of griffe that turns references and formulas of reStructuredText."""

import re
import textwrap
from typing import Any

import griffe
from latex2mathml.converter import convert

ROLE = re.compile(r":(?:class|func|meth|mod|data|attr|exc):`~?\.?([^`]+)`")
MATH = re.compile(r"^( *)\.\. math::((?:.*\n?)(?:\1 +.*\n?|\n)*)", re.MULTILINE)


def address(found: griffe.Object | griffe.Alias, name: str) -> str:
    """The full name of what is meant by a name in the docstring of an object; the name itself where nobody knows it."""
    first, _, rest = name.partition(".")
    scope: Any = found
    while scope is not None:
        if first in scope.members:
            member = scope.members[first]
            whole = member.target_path if member.is_alias else member.path
            return f"{whole}.{rest}" if rest else whole
        scope = scope.parent
    return name


def formula(match: re.Match[str]) -> str:
    """A formula as MathML, which browsers draw by themselves."""
    latex = " ".join(textwrap.dedent(match[2]).split())
    return f"{match[1]}{convert(latex, display='block')}\n\n"


class Roles(griffe.Extension):
    """References become links where the page has a target for them, and code in any case."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is None:
            return

        def reference(match: re.Match[str]) -> str:
            name = match[1]
            return f'<autoref identifier="{address(obj, name)}" optional><code>{name}</code></autoref>'

        obj.docstring.value = ROLE.sub(reference, MATH.sub(formula, obj.docstring.value))
