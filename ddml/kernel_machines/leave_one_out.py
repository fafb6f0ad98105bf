"""The leave-one-out error of kernel machines on features, in closed form; each rank has the whole matrix."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from scipy import linalg

from ddml.errors import InputError
from ddml.parallel import agreed, check_memory

from .cuts import Array
from .gradients import SmoothKernel
from .layout import SampleLayout
from .reduced import ReducedFunctional, pulled

MOST = 10_000  # samples (our choice)


class LeaveOneOut(ReducedFunctional):
    r"""The mean square of the errors on samples that have been left out, one after another.

    .. math:: F(\phi) = \frac1n \sum_i |\alpha_i|^2 / d_i^2, \quad A \alpha = Y, \quad d_i = (A^{-1})_{ii}

    (Allen's PRESS, 1974). With :math:`B = A^{-1}`, :math:`g_i = 2 \alpha_i / (n d_i^2)` and
    :math:`h_i = -2 |\alpha_i|^2 / (n d_i^3)`, the derivative by K is :math:`-(B g) \alpha^T - B\, \mathrm{diag}(h) B`,
    made symmetric. Dense: every rank has B, and computes it for itself.

    Parameters
    ----------
    kernel
        Of features.
    shift
        :math:`\mu > 0`.
    layout
        Of the samples.
    Y
        (n, k), by sample.

    Raises
    ------
    InputError
        On all ranks: more than 10,000 samples; a mu that is not above 0; Y of another shape or not finite; a matrix
        that is not positive definite to rounding.
    """

    def __init__(self, kernel: SmoothKernel, shift: float, layout: SampleLayout, Y: Any) -> None:
        super().__init__()
        if layout.size > MOST:
            raise InputError(
                f"leave-one-out errors are of {MOST} samples at most, got {layout.size}: use a held-out part"
            )
        if not 0 < shift < float("inf"):
            raise InputError(f"a deep kernel needs a regularisation lambda above 0, got {shift}")
        self.kernel, self.shift, self.layout, self.count = kernel, shift, layout, layout.size
        check_memory(
            layout.comm, 3 * 8 * self.count**2, "a dense inverse", "use a held-out part, or fewer ranks a node"
        )
        self.Y = self._targets(Y, self.count)[layout.domain.order]
        self.columns = self.Y.shape[1]

    def _value(self, features: Array) -> float:
        found = features[self.layout.domain.order]
        self._x = x = torch.as_tensor(found - found.mean(axis=0) if self.kernel.translates else found)
        with agreed(self.layout.comm):
            pieces = zip(self.layout.edges, self.layout.edges[1:], strict=False)
            A = torch.cat([self.kernel(x[a:b], x) for a, b in pieces]).numpy()
            A[np.diag_indices(self.count)] += self.shift
            try:
                factor = linalg.cholesky(A, lower=True, check_finite=False, overwrite_a=True)
            except linalg.LinAlgError:
                raise InputError(
                    "the kernel matrix of the features is not positive definite to rounding with lambda "
                    f"{self.shift:g}: use a larger one"
                ) from None
            self._inverse = linalg.cho_solve((factor, True), np.eye(self.count), overwrite_b=True, check_finite=False)
        self.operations += float(self.count) ** 3
        self._alpha = self._inverse @ self.Y
        return float(np.square(self._alpha / self._inverse.diagonal()[:, None]).sum()) / self.count

    def _cotangents(self, features: Array) -> Array:
        B, alpha, n = self._inverse, self._alpha, self.count
        d = B.diagonal()[:, None]
        left = torch.as_tensor(B @ (2 * alpha / (n * d**2)))
        h = -2 * np.square(alpha).sum(axis=1) / (n * d[:, 0] ** 3)
        inverse, a = torch.as_tensor(B), torch.as_tensor(alpha)
        scaled = torch.as_tensor(h[:, None] * B)

        def weights(places: slice) -> torch.Tensor:
            # twice the symmetric part: of both samples of a pair
            both = (left[places] @ a.T).add_(a[places] @ left.T).neg_()
            return both.sub_(inverse[places] @ scaled, alpha=2)

        rows = pulled(self.kernel, self.layout, self._x, self._x, weights)
        self.operations += float(n) ** 3
        return self.layout.everywhere(rows)[self.layout.places]

    def restore(self, state: dict[str, Any]) -> None:
        """See :meth:`ReducedFunctional.restore`; what a derivative needs is computed again."""
        super().restore(state | {"features": None, "derivative": None})
