"""The direction with equal projections on all task gradients, from their Gramian."""

from __future__ import annotations

import torch
from torch import Tensor

from gradnorm_func._solvers.spectrum import spectrum
from gradnorm_func._solvers.units import own_units

ROUNDING = 16  # an eigenvalue of C below this many T eps of the Gramian's dtype may be nothing but its rounding


def equal_projections(gramian: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
    r"""Weights of d, as long as the projections of all gradients on it together, and the largest error in C a = 1.

    With :math:`a = C^+ 1` they are :math:`w_i = s\, a_i / n_i`, :math:`s = \sum_j n_j (C a)_j / \sum_j a_j`. Where no
    direction has equal projections, it is that of the least squares. Directions in which C is zero, but for rounding,
    are left out; all weights are 0 if there are no others. Of T = 2, a is 1 and has no error: half of 1 + cosine times
    C's own, which is 0 / 0 of opposite gradients.
    """
    units = own_units(gramian, active, lifted=False)
    matrix, ones = units.cosines, units.real.double()
    nothing = ROUNDING * len(ones) * torch.finfo(gramian.dtype).eps
    if gramian.shape[-1] == 2:
        a, projections = ones, ones
    else:
        values, vectors = spectrum(torch.nan_to_num(matrix.detach()))
        kept = values > nothing
        inverse = (vectors * torch.where(kept, 1 / values, 0.0)) @ vectors.mT
        a = inverse @ ones
        a = a + inverse @ (ones - matrix @ a)  # once more, for the rounding; a derivative comes through here alone
        projections = matrix @ a
    total = a.sum()
    found = total > nothing**2  # else all of a is rounding, and there is no direction at all
    scale = torch.where(found, units.lengths @ projections / torch.where(found, total, 1.0), 0.0)
    weights = scale * a * units.inverses + 0 * units.lengths
    error = (ones - projections).abs().max() + 0 * matrix[0, 1]
    return weights.to(gramian.dtype), error.to(gramian.dtype)
