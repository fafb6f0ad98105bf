"""A small grammar of slips in problem files: what people write that is not what they mean.

A draft of a problem is right; a slip changes one thing in it. What must come of it is known: the solution (where the
slip has a meaning), a note, or a refusal in one line. :func:`files` gives any number of them, the same for a seed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from itertools import zip_longest

import numpy as np
from drafts import DRAFTS, Draft, Function, each, pieces, scaled, shifted, with_data

ACCURATE, NOTED, REFUSED = "accurate", "noted", "refused"

FUNCTIONS = ("embed", "lift", "factor", "residual", "exact", "data")
NEEDED = ("embed", "lift", "factor", "residual", "data")  # what training calls

Slip = Callable[[Draft, np.random.Generator], None]
SLIPS: list[tuple[str, str, Slip, tuple[str, ...]]] = []  # kind, name, what it does, what may come of it


def slip(kind: str, name: str, *outcomes: str) -> Callable[[Slip], Slip]:
    def added(function: Slip) -> Slip:
        SLIPS.append((kind, name, function, outcomes))
        return function

    return added


# What has a meaning -------------------------------------------------------------------------------------------------


IN_PLACE = (
    ("{0} -= {1}", "{0} + {1}"), ("{0} *= {1}", "{0} / {1}"), ("{0}.add_({1})", "{0} - {1}"),
    ("{0}[:] = {1} * {0}", "{0} / {1}"), ("torch.exp({0}, out={0})", "torch.log({0})"), ("{0}.neg_()", "-{0}"),
    ("{0}.data -= {1}", "{0} + {1}"), ("{0} /= {1}", "{0} * {1}"), ("{0}.div_({1}).sub_(1)", "({0} + 1) * {1}"),
)  # fmt: skip

for _name in FUNCTIONS:

    @slip("in place", f"a coordinate of {_name}", ACCURATE, REFUSED)
    def _(draft: Draft, rng: np.random.Generator, name: str = _name) -> None:
        with_data(draft)
        letter = str(rng.choice(draft.letters))
        line, back = IN_PLACE[rng.integers(len(IN_PLACE))]
        number = f"{rng.uniform(0.2, 3):.2f}"
        shifted(draft.functions[name], letter, line.format(letter, number), back.format(letter, number))

    @slip("shape", f"columns (N, 1) of {_name}", ACCURATE)
    def _(draft: Draft, rng: np.random.Generator, name: str = _name) -> None:
        with_data(draft)
        each(draft, name, str(rng.choice(["({})[:, None]", "({}).reshape(-1, 1)", "torch.stack([{}], dim=1)"])))

    @slip("shape", f"a list of {_name}", ACCURATE)
    def _(draft: Draft, rng: np.random.Generator, name: str = _name) -> None:
        with_data(draft)
        draft.functions[name].value = f"[{draft.functions[name].value}]"


@slip("in place", "the data of a term", ACCURATE)
def _(draft: Draft, rng: np.random.Generator) -> None:
    with_data(draft)
    number = f"{rng.uniform(0.2, 3):.2f}"
    shifted(draft.functions["data"], "given", f"given -= {number}", f"given + {number}")


@slip("in place", "the user's own array, filled twice", ACCURATE)
def _(draft: Draft, rng: np.random.Generator) -> None:
    with_data(draft)
    draft.places += "\n        values = " + draft.values + "\n        first = Points(places, given=values)"
    draft.places += "\n        values *= 0.0\n        places *= 0.0"
    draft.terms[-1] = 'Term(self.data, first, 1.0, "data")'


@slip("in place", "a derivative", REFUSED)
def _(draft: Draft, rng: np.random.Generator) -> None:
    derivative = f"{draft.fields[0]}.{draft.letters[0]}"
    line = str(rng.choice(["v = {0}; v *= 2.0", "{0}.mul_(2.0)", "v = {0}; v[0] = 0.0", "torch.sin({0}, out={0})"]))
    draft.functions["residual"].before.append(line.format(derivative))


@slip("in place", "a coefficient", REFUSED)
def _(draft: Draft, rng: np.random.Generator) -> None:
    draft.more.append('coefficients = {"k": 1.0}')
    draft.functions["residual"].arguments.append("k")
    draft.functions["residual"].before.append(str(rng.choice(["k *= 2.0", "k.add_(1.0)"])))
    each(draft, "residual", "k * ({})")


# Wrong shapes and types ---------------------------------------------------------------------------------------------

SHAPES = ("({}).sum()", "({})[:3]", "({})[None]", "({0})[:, None] * ({0})", "torch.stack([{0}, {0}])",
          "torch.stack([{0}, {0}], dim=1)", "(({0}, {0}), {0})", "torch.cat([{0}, {0}])", "({})[:0]")  # fmt: skip
TYPES = ("({}).float()", "({}).half()", "({}).int()", "({}) > 0", "({}).to(torch.bfloat16)", "({}).detach().numpy()",
         "str({})", "({}).tolist()", "torch.complex({0}, {0}).to(torch.complex64)")  # fmt: skip

for _name in NEEDED:

    @slip("shape", f"another shape of {_name}", REFUSED)
    def _(draft: Draft, rng: np.random.Generator, name: str = _name) -> None:
        with_data(draft)
        each(draft, name, str(rng.choice(SHAPES)))

    @slip("type", f"another type of {_name}", REFUSED)
    def _(draft: Draft, rng: np.random.Generator, name: str = _name) -> None:
        with_data(draft)
        if name in ("residual", "data"):
            each(draft, name, "1.0 * ({})")
        each(draft, name, str(rng.choice(TYPES)))

    @slip("type", f"a number for {_name}", REFUSED)
    def _(draft: Draft, rng: np.random.Generator, name: str = _name) -> None:
        with_data(draft)
        draft.functions[name].value = str(rng.choice(["0", "1.0", "np.pi", "True", "0j", "float('nan')", "()", "{}"]))

    @slip("missing return", f"in {_name}", REFUSED)
    def _(draft: Draft, rng: np.random.Generator, name: str = _name) -> None:
        with_data(draft)
        draft.functions[name].returns = False


@slip("shape", "of exact", REFUSED)
def _(draft: Draft, rng: np.random.Generator) -> None:
    each(draft, "exact", str(rng.choice(SHAPES)))


@slip("type", "of exact", REFUSED)
def _(draft: Draft, rng: np.random.Generator) -> None:
    each(draft, "exact", str(rng.choice(["str({})", "1j * ({})", "0.0", "'sine'", "np.array(['a'] * len({}))"])))


@slip("type", "complex numbers in a residual", ACCURATE)
def _(draft: Draft, rng: np.random.Generator) -> None:
    each(
        draft, "residual", str(rng.choice(["(1 + 2j) * ({})", "torch.complex(1.0 * ({0}), 0.5 * ({0}))", "1j * ({})"]))
    )


@slip("missing return", "in exact", NOTED)
def _(draft: Draft, rng: np.random.Generator) -> None:
    draft.functions["exact"].returns = False


@slip("missing return", "in terms, or something else than a list", REFUSED)
def _(draft: Draft, rng: np.random.Generator) -> None:
    draft.returns = bool(rng.integers(2))
    if draft.returns:
        draft.terms = [str(rng.choice(["self.residual", "Interior()", "Term", "Term(self.residual), None"]))]


@slip("missing return", "a call forgotten or too many", REFUSED)
def _(draft: Draft, rng: np.random.Generator) -> None:
    residuals = ["Term(self.lift(*torch.zeros(3, 4)))", "Term(0.0)", "Term(None)"]
    places = ["Term(self.residual, Interior)", "Term(self.residual, Face)", "Term(self.residual, 'x')"]
    draft.terms = [str(rng.choice([*residuals, *places]))]


# The order of axes --------------------------------------------------------------------------------------------------

for _name in FUNCTIONS:

    @slip("swapped axes", f"arguments of {_name}", REFUSED)
    def _(draft: Draft, rng: np.random.Generator, name: str = _name) -> None:
        with_data(draft)
        function = draft.functions[name]
        given = [a for a in function.arguments if a != "given"]
        if len(given) == 1:  # no order to get wrong: a wrong number
            given.append("y")
        else:
            given = given[::-1]
        function.arguments = given + ["given"] * ("given" in function.arguments)


@slip("swapped axes", "columns of points", REFUSED)
def _(draft: Draft, rng: np.random.Generator) -> None:
    with_data(draft, str(rng.choice(["places[:, ::-1]", "places.T"])) if len(draft.domain) > 1 else "places.T")


@slip("swapped axes", "embed as a table", REFUSED)
def _(draft: Draft, rng: np.random.Generator) -> None:
    value = draft.functions["embed"].value
    dim = rng.integers(2)
    draft.functions["embed"].value = f"torch.stack([{value}, {pieces(value)[0]}], dim={dim})"


@slip("swapped axes", "letters of derivatives", REFUSED)
def _(draft: Draft, rng: np.random.Generator) -> None:
    wrong = str(rng.choice(["y", "yy", "z", f"{draft.letters[0]}y"]))
    draft.functions["residual"].value = re.sub(r"\.[tx]+", f".{wrong}", draft.functions["residual"].value)


# What is not finite -------------------------------------------------------------------------------------------------

NAN = ("({0}) / (0.0 * {1})", "({0}) + torch.log(-1.0 - {1})", "torch.sqrt(-1.0 - {1}) + ({0})", "({0}) * float('nan')",
       "torch.where({1} > 0.5, ({0}) + 0.0 * {1}, torch.nan)", "({0}) * float('inf')")  # fmt: skip

for _name in NEEDED:

    @slip("not finite", f"in {_name}", REFUSED)
    def _(draft: Draft, rng: np.random.Generator, name: str = _name) -> None:
        with_data(draft)
        form, letter = str(rng.choice(NAN)), draft.letters[-1]
        each(draft, name, form.replace("{1}", letter))


@slip("not finite", "exact in places", NOTED)
def _(draft: Draft, rng: np.random.Generator) -> None:
    bound = rng.uniform(0.2, 0.8)
    each(draft, "exact", "torch.where(" + draft.letters[0] + f" < {bound:.2f}, {{}}, float('nan'))")


@slip("not finite", "exact everywhere", REFUSED)
def _(draft: Draft, rng: np.random.Generator) -> None:
    each(draft, "exact", f"({{}}) * float('{rng.choice(['nan', 'inf'])}')")


@slip("not finite", "data or coordinates of points", REFUSED)
def _(draft: Draft, rng: np.random.Generator) -> None:
    gap = f"np.where(np.arange(9) == {rng.integers(9)}, np.{rng.choice(['nan', 'inf'])}, 0.0)"
    if rng.integers(2):
        with_data(draft, values=f"{draft.values} + {gap}")
    else:
        with_data(draft, f"places + {gap}[:, None]")


@slip("not finite", "a weight", REFUSED)
def _(draft: Draft, rng: np.random.Generator) -> None:
    wrong = rng.choice(["float('nan')", "float('inf')", "-1.0", "0", "-1e-9", "'1'", "None", "[1.0]", "1j"])
    draft.terms = [f"Term(self.residual, Interior(), {wrong})"]


@slip("not finite", "a domain", REFUSED)
def _(draft: Draft, rng: np.random.Generator) -> None:
    wrong = ["(0.0, float('nan'))", "(1.0, 0.0)", "(0.0, 0.0)", "(0.0, float('inf'))", "1.0", "(0.0, 1.0, 2.0)", "None"]
    draft.domain[draft.letters[0]] = str(rng.choice([*wrong, "('0', '1')"]))


@slip("not finite", "a coefficient", REFUSED)
def _(draft: Draft, rng: np.random.Generator) -> None:
    wrong = rng.choice(["None", "np.nan", "np.inf", "(1.0,)", "'1'", "1j"])
    draft.more.append(f"coefficients = {{'k': {wrong}}}")
    draft.functions["residual"].arguments.append("k")
    each(draft, "residual", "k * ({})")


# Outside ------------------------------------------------------------------------------------------------------------


def far(rng: np.random.Generator) -> float:
    return float(rng.choice([-1, 1]) * 10 ** rng.uniform(0.5, 6))


@slip("outside", "a face", REFUSED)
def _(draft: Draft, rng: np.random.Generator) -> None:
    value = rng.choice([f"{far(rng):.3g}", "float('nan')", "2.001", "-0.01", "'left'", "None", "(0.0, 1.0)"])
    draft.functions["wall"] = Function([*draft.fields, *draft.letters], f"1 * {draft.fields[0]}")
    draft.terms.append(f'Term(self.wall, Face({draft.letters[-1]}={value}), 10.0, "wall")')


@slip("outside", "points", REFUSED)
def _(draft: Draft, rng: np.random.Generator) -> None:
    with_data(draft, str(rng.choice([f"places + {far(rng):.3g}", f"places * {abs(far(rng)):.3g}", "-places"])))


@slip("outside", "coordinates that there are not", REFUSED)
def _(draft: Draft, rng: np.random.Generator) -> None:
    draft.functions["wall"] = Function([*draft.fields, *draft.letters], f"1 * {draft.fields[0]}")
    where = rng.choice(["Face(y=0.0)", 'Periodic("y")', 'Periodic("")', "Periodic(0)", "Face(y=0, z=1)"])
    draft.terms.append(f'Term(self.wall, {where}, 10.0, "wall")')


@slip("outside", "no points", REFUSED)
def _(draft: Draft, rng: np.random.Generator) -> None:
    if rng.integers(2):
        with_data(draft, "places[:0]", f"({draft.values})[:0]")
    else:
        draft.terms = [f"Term(self.residual, Interior({rng.choice(['0', '-5', '2.5', 'True', repr('10')])}))"]


@slip("outside", "other numbers of data", REFUSED)
def _(draft: Draft, rng: np.random.Generator) -> None:
    with_data(draft, values=str(rng.choice(["[1.0]", "1.0", "np.zeros(8)", "np.zeros((9, 2))", "places.sum()"])))


@slip("outside", "points of another order of magnitude", NOTED)
def _(draft: Draft, rng: np.random.Generator) -> None:
    with_data(draft, f"places * {10 ** rng.uniform(-9, -3):.3g}")


@slip("outside", "measurements that are all equal", NOTED)
def _(draft: Draft, rng: np.random.Generator) -> None:
    with_data(draft, values=f"np.full(9, {rng.uniform(-1, 1):.2f})")


# Cut off from what is trained ---------------------------------------------------------------------------------------


@slip("cut off", "a residual", REFUSED)
def _(draft: Draft, rng: np.random.Generator) -> None:
    forms = ["({}).detach()", "torch.as_tensor(({}).detach().numpy())", "0.0 * x0", "(({}) > 0).double()"]
    each(draft, "residual", str(rng.choice(forms)).replace("x0", draft.letters[0]))


@slip("cut off", "other derivatives in later calls", REFUSED, ACCURATE)
def _(draft: Draft, rng: np.random.Generator) -> None:
    letter, first = draft.letters[0], draft.fields[0]
    draft.more.append("compiled = False")
    each(draft, "residual", "({}) + 0.0 * more")
    draft.functions["residual"].before += [
        "self.calls = getattr(self, 'calls', 0) + 1",
        f"more = {first}.{letter * 3} if self.calls > {rng.integers(2, 20)} else 0.0",
    ]


@slip("cut off", "autograd", REFUSED)
def _(draft: Draft, rng: np.random.Generator) -> None:
    letter, first = draft.letters[0], draft.fields[0]
    tensor = str(rng.choice([letter, f"{letter}.requires_grad_()"]))
    draft.functions["residual"].before.append(f"v = torch.autograd.grad({first}.value.sum(), {tensor})[0]")


@slip("cut off", "chance", NOTED)
def _(draft: Draft, rng: np.random.Generator) -> None:
    chance = [
        "torch.randn_like({})",
        "torch.as_tensor(np.random.default_rng().uniform(size=len({})))",
        "np.random.rand()",
    ]
    each(draft, "residual", "({}) + 1e-3 * " + str(rng.choice(chance)).replace("{}", draft.letters[0]))


@slip("cut off", "a branch on values", ACCURATE)
def _(draft: Draft, rng: np.random.Generator) -> None:
    form = rng.choice(
        ["if {}.max() > 2.5: return None", "assert {0}.min() >= 0", "n = float({0}.sum())", "print(end='')"]
    )
    draft.functions["residual"].before.append(str(form).format(draft.letters[0]))


# Scales -------------------------------------------------------------------------------------------------------------


for _kind in ("lengths", "sizes", "both"):

    @slip("scales", f"{_kind} from 1e-9 to 1e9", ACCURATE, NOTED)
    def _(draft: Draft, rng: np.random.Generator, kind: str = _kind) -> None:
        length, size = (float(f"{10.0 ** rng.uniform(-9, 9):.3g}") for _ in range(2))
        scaled(draft, 1.0 if kind == "sizes" else length, 1.0 if kind == "lengths" else size)


@slip("scales", "weights from 1e-9 to 1e9", ACCURATE, NOTED)
def _(draft: Draft, rng: np.random.Generator) -> None:
    draft.terms = [f"Term(self.residual, Interior(), {10.0 ** rng.uniform(-9, 9):.3g})"]
    with_data(draft)


def files(count: int, seed: int = 0) -> Iterator[tuple[str, str, str, tuple[str, ...]]]:
    """Kind, name, text and what may come of it, of so many problem files: a slip of each kind in turn, then others."""
    rng = np.random.default_rng(seed)
    kinds: dict[str, list[int]] = {}
    for number in rng.permutation(len(SLIPS)):
        kinds.setdefault(SLIPS[number][0], []).append(number)
    order = [number for turn in zip_longest(*kinds.values()) for number in turn if number is not None]
    for number in range(count):
        kind, name, change, outcomes = SLIPS[order[number % len(order)]]
        draft = DRAFTS[int(rng.integers(len(DRAFTS)))]()
        change(draft, rng)
        yield kind, name, draft.text(), outcomes
