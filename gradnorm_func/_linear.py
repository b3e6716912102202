"""Task-gradient norms at the weight of a linear layer, from the gradients at its output."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import vjp, vmap

from gradnorm_func._loss import SharedLinear


def before_activation(layer: SharedLinear, y: Tensor, z_grads: Tensor) -> Tensor:
    """∂L_i/∂y from ∂L_i/∂z, z = activation(y), over the leading task axis."""
    if layer.activation is None:
        return z_grads
    pull: Callable[[Tensor], tuple[Tensor]] = vjp(layer.activation, y)[1]
    out: Tensor = vmap(lambda z_grad: pull(z_grad)[0])(z_grads)
    return out


def gradients(h: Tensor, y_grads: Tensor, wanted: tuple[bool, bool]) -> list[Tensor]:
    """The gradients themselves, (T, out, in) of the weight and (T, out) of the bias, those of the two wanted."""
    found = _transposed_gradients(h, y_grads, wanted)
    return [grad.mT if grad.ndim == 3 else grad for grad in found]


def norms(h: Tensor, y_grads: Tensor, wanted: tuple[bool, bool]) -> Tensor:
    r"""(T,) norms over weight and bias together, by whichever way takes fewer multiplications.

    The gradient at the weight is :math:`B_i^\top H` (B_i of shape (N, out), H of shape (N, in)); by the Gram
    identity its square norm is :math:`\langle B_i B_i^\top, H H^\top\rangle`, which needs no (out, in) matrix.
    The bias is one more column of ones in H.
    """
    rows, cotangents = _as_rows(h, y_grads)
    (num_tasks, n, d_out), d_in = cotangents.shape, rows.shape[1]
    wide = torch.promote_types(cotangents.dtype, torch.float32)
    direct, gram = num_tasks * n * d_out * d_in, num_tasks * n * n * d_out + n * n * d_in
    if not wanted[0] or direct <= gram:
        parts = _transposed_gradients(h, y_grads, wanted)
        per_part = [torch.linalg.vector_norm(part.flatten(1), dim=1, dtype=wide) for part in parts]
        whole: Tensor = per_part[0] if len(per_part) == 1 else torch.linalg.vector_norm(torch.stack(per_part), dim=0)
        return whole
    inputs = (rows @ rows.mT).to(wide) + float(wanted[1])
    outputs = torch.bmm(cotangents, cotangents.mT).to(wide)
    # Rounding can take the square of a vanishing norm below zero.
    square = (outputs * inputs).sum((1, 2)).clamp(min=0)
    positive = square > 0
    return torch.where(positive, torch.where(positive, square, 1.0).sqrt(), 0.0)


def _transposed_gradients(h: Tensor, y_grads: Tensor, wanted: tuple[bool, bool]) -> list[Tensor]:
    """(T, in, out) of the weight and (T, out) of the bias; this way round bmm is a fifth faster."""
    rows, cotangents = _as_rows(h, y_grads)
    weight = torch.bmm(rows.mT.expand(cotangents.shape[0], -1, -1), cotangents) if wanted[0] else None
    bias = cotangents.sum(1) if wanted[1] else None
    return [grad for grad in (weight, bias) if grad is not None]


def _as_rows(h: Tensor, y_grads: Tensor) -> tuple[Tensor, Tensor]:
    """Every leading axis (batch, sequence, ...) as rows: (N, in) and (T, N, out)."""
    return h.reshape(-1, h.shape[-1]), y_grads.reshape(y_grads.shape[0], -1, y_grads.shape[-1])
