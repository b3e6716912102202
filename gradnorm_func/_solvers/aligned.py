"""The inverse root of a Gramian times its smallest singular value: Aligned-MTL's balance matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from gradnorm_func._solvers.spectrum import spectrum
from gradnorm_func._solvers.units import own_units


def align(gramian: Tensor, active: Tensor, preference: Tensor) -> tuple[Tensor, Tensor]:
    r"""B p, with :math:`B = \sigma_{\min} G^{-1/2}`, and the largest error in :math:`B G B = \sigma_{\min}^2 I`.

    Directions in which G is zero, but for rounding, are left out, as of its pseudoinverse.
    """
    units = own_units(gramian, active)
    matrix = units.lengths.unsqueeze(-1) * torch.where(units.real, units.cosines, 0.0) * units.lengths
    values, vectors = spectrum(torch.nan_to_num(matrix))
    rounding = matrix.shape[-1] * torch.finfo(gramian.dtype).eps
    kept = values > rounding * values.max()
    least = values.masked_fill(~kept, torch.inf).min()
    roots = (least / values.masked_fill(~kept, 1.0)).sqrt().masked_fill(~kept, 0.0)
    weights = vectors @ (roots * (preference.to(values) @ vectors)) * active + 0 * units.lengths
    balance = (vectors * roots) @ vectors.mT
    inside = (vectors * kept) @ vectors.mT
    error = (balance @ matrix @ balance / least - inside).abs().max()
    return weights.to(gramian.dtype), error.to(gramian.dtype)
