"""How accurately conjugate gradients solve for a Newton step."""

from __future__ import annotations

import math
from typing import Any

from ddml.options import Option

RULES = ("fixed", "cap", "sqrt")

OPTION = Option(
    "cg_rule",
    "fixed",
    "When conjugate gradients end, of models with products: where the residual is a tenth, after "
    "20 iterations; cap: 1e-9, after 10; sqrt: a part min(0.5, sqrt(|g| / |g_0|)), after 10. PETSc's -tr_ksp_rtol, "
    "-tr_ksp_atol and -tr_ksp_max_it come first.",
    choices=RULES,
)

# our choice: 10 iterations (the slides' tables have 9.25 a step) also keep a step from following noise of few samples
LIMIT = 10


class Accuracy:
    r"""The end of the conjugate gradients as options of PETSc's KSP.

    - ``fixed``: \|r\| <= 0.1 \|g\|, at most 20 iterations (our choice).
    - ``cap``: \|r\| <= 1e-9, at most 10: nearly always 10 iterations.
    - ``sqrt``: \|r\| <= min(0.5, sqrt(\|g\| / \|g_0\|)) \|g\|, at most 10, with g_0 the first gradient of the run: a
      superlinear rule (Dembo, Eisenstat, Steihaug 1982) that knows no scale of the loss.

    Attributes
    ----------
    first : float
        \|g_0\|; 0 before there is one.
    """

    def __init__(self, rule: str) -> None:
        self.rule, self.first = rule, 0.0

    @property
    def relative(self) -> bool:
        """Whether it depends on the gradient's norm."""
        return self.rule == "sqrt"

    def options(self, norm: float) -> dict[str, Any]:
        """For a gradient of that norm."""
        if self.rule == "fixed":
            return {"ksp_rtol": 0.1, "ksp_max_it": 20}
        if self.rule == "cap":
            return {"ksp_rtol": 0.0, "ksp_atol": 1e-9, "ksp_max_it": LIMIT}
        if not self.first and math.isfinite(norm):
            self.first = norm
        return {"ksp_rtol": min(0.5, math.sqrt(norm / self.first)) if self.first else 0.5, "ksp_max_it": LIMIT}
