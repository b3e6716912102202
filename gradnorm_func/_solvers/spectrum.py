"""Eigenvalues of a small symmetric matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from gradnorm_func._solvers.node import node

SWEEPS = 10  # of Jacobi's rotations


def spectrum(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """(T,) eigenvalues in no order, and (T, T) eigenvectors in columns.

    torch's own solver waits for a device that is no CPU.
    """
    if matrix.device.type == "cpu":
        values, vectors = torch.linalg.eigh(matrix)
        return values, vectors
    return jacobi(matrix)


@node(lambda matrix: (matrix.new_empty(matrix.shape[-1]), torch.empty_like(matrix)), outputs=2)
def jacobi(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The same by Jacobi's rotations, T / 2 of them at a time; every pair has its turn once in a sweep."""
    count = matrix.shape[-1]
    size, half = count + count % 2, (count + 1) // 2
    a = torch.nn.functional.pad(matrix, (0, size - count, 0, size - count))
    v = torch.eye(size, dtype=matrix.dtype, device=matrix.device)
    for _ in range(SWEEPS * (size - 1)):  # rotates (0, half), (1, half + 1), ..., and moves the pairs on
        p, q, off = (torch.diagonal(x) for x in (a[:half, :half], a[half:, half:], a[:half, half:]))
        angle = 0.5 * torch.atan2(2 * off, q - p)
        angle = torch.where(angle.abs() > torch.pi / 4, angle - torch.sign(angle) * torch.pi / 2, angle)
        cosine, sine = torch.diag_embed(angle.cos()), torch.diag_embed(angle.sin())
        rotation = _moved_on(torch.cat([torch.cat([cosine, sine], 1), torch.cat([-sine, cosine], 1)]), half)
        a, v = rotation.mT @ a @ rotation, v @ rotation
    values = torch.diagonal(a)
    if size != count:  # the row that was added is an eigenvector of its own
        kept = v[count].abs().argsort()[:count]
        values, v = values.index_select(0, kept), v.index_select(1, kept)
    return values, v[:count]


def _moved_on(x: Tensor, half: int) -> Tensor:
    """Columns around the table by one place; the first stays."""
    if half == 1:
        return x
    first, top, last, bottom = x[:, :1], x[:, 1 : half - 1], x[:, half - 1 : half], x[:, half:]
    return torch.cat([first, bottom[:, :1], top, bottom[:, 1:], last], 1)
