"""Rotations: maps from skew matrices to SO(m), steps on SO(m), and rotation of one part of a representation."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import vjp

from gradnorm_func._core import tree


def exponential(skew: Tensor) -> Tensor:
    """exp(A), for a (..., m, m) stack of skew matrices in one call."""
    rotations: Tensor = torch.linalg.matrix_exp(skew)
    return rotations


def cayley(skew: Tensor) -> Tensor:
    """(I + A/2)(I - A/2)⁻¹, for a (..., m, m) stack; it agrees with exp(A) up to A³/12."""
    eye = torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device)
    return 2 * _inverse(eye - skew / 2) - eye


MAPS: dict[str, Callable[[Tensor], Tensor]] = {"exp": exponential, "cayley": cayley}


def skew(x: Tensor) -> Tensor:
    """X - Xᵀ: the derivative by the entries below the diagonal of a skew matrix, of what has X by all entries."""
    return x - x.mT


def skew_part(x: Tensor) -> Tensor:
    """(X - Xᵀ)/2: what is skew but for rounding, skew to the bit."""
    return (x - x.mT) / 2


def tangent_gradient(tangents: Tensor, gradient: Tensor, kind: str) -> Tensor:
    r"""The derivative by the entries below the diagonal of A, of what has the derivative map(A)·G by map(A).

    For the exponential it is :math:`\varphi(\mathrm{ad}_A)(G - G^\top)` with :math:`\varphi(x) = (e^x - 1) / x`. By
    :math:`\varphi(2x) = \varphi(x) (1 + e^x) / 2` A is halved six times, so that twelve terms of the series are exact
    to 1e-9 up to ‖A‖ = 32, five full turns. Autograd takes an exponential of matrices of twice the size instead.

    Skew to the bit: Adam divides a gradient by its own size, be it nothing but rounding, and would walk off SO(m).
    """
    if kind != "exp":
        mapped, pull = vjp(MAPS[kind], tangents)[:2]
        return skew(pull(mapped @ gradient)[0])
    halvings, terms = 6, 12
    small, w = tangents / 2**halvings, skew(gradient)
    power = exponential(small)
    for _ in range(halvings):
        w = (w + power @ w @ power.mT) / 2
        power = power @ power
    out = w
    for k in range(terms, 0, -1):
        out = w + skew(small @ out) / (k + 1)  # ad_A of a skew matrix: AX - XA = AX - (AX)ᵀ
    return skew_part(out)


def turn(rotations: Tensor, step: Tensor, kind: str) -> Tensor:
    """R·map(A), for stacks of rotations and of skew matrices."""
    if kind == "exp":
        return rotations @ exponential(step)
    eye = torch.eye(step.shape[-1], dtype=step.dtype, device=step.device)
    return 2 * _right_solve(rotations, eye - step / 2) - rotations


def polish(rotations: Tensor, step: Tensor) -> Tensor:
    """One of the T rotations, in turn, made orthogonal again by a Newton-Schulz iteration R(3I - RᵀR)/2.

    Rounding moves a product of thousands of rotations off SO(m); one matrix a step keeps it there for two products of
    m x m matrices, and index_select takes it out without asking the device for the number.
    """
    index = step % rotations.shape[0]
    one = rotations.index_select(0, index.reshape(1))  # (1, m, m)
    polished = 1.5 * one - 0.5 * one @ (one.mT @ one)
    in_turn = torch.arange(rotations.shape[0], device=rotations.device) == index  # (T,)
    return torch.where(in_turn[:, None, None], polished, rotations)


def random_rotations(
    num_tasks: int,
    size: int,
    *,
    generator: torch.Generator | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    r"""T rotations drawn from the uniform (Haar) distribution on SO(m): where the published package starts.

    Args:
        num_tasks: T.
        size: m, the number of rotated features.
        generator: of the random numbers; None is torch's default one.
        dtype: the default dtype if None.
        device: where they live.

    Returns:
        (T, m, m), for `gn.rotograd(m).init(T, rotations=...)`.

    Example:
        >>> import torch, gradnorm_func as gn
        >>> R = gn.random_rotations(2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        >>> torch.allclose(R @ R.mT, torch.eye(3, dtype=torch.float64)), bool((torch.linalg.det(R) > 0).all())
        (True, True)
    """
    normal = torch.randn(num_tasks, size, size, generator=generator, dtype=dtype, device=device)
    q, r = torch.linalg.qr(normal)
    q = q * r.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)
    flip = torch.ones_like(q[:, 0])
    flip[:, 0] = torch.linalg.det(q).sign()
    out: Tensor = q * flip.unsqueeze(-2)
    return out


class Layout(NamedTuple):
    """Which features of which tensor of z are rotated. Their axes stand before the trailing ones, after all others."""

    shape: tuple[int, ...]  # one number: the first m features of that axis; several: all of those axes, as one
    trailing: tuple[int, ...]  # shape behind them, each position of which is rotated alike
    path: str | None  # of the tensor, where z is a pytree of several

    @property
    def size(self) -> int:
        """m, the number of rotated features."""
        return int(torch.Size(self.shape).numel())

    def leaf(self, leaves: list[Tensor], treedef: object) -> int:
        """The leaf of z that is rotated."""
        if self.path is None and len(leaves) == 1:
            return 0
        names = tree.paths(tree.unflatten(treedef, leaves))
        if self.path is None:
            raise ValueError(f"z has {len(leaves)} tensors, {names}: say which one to rotate, with rotate=")
        if self.path not in names:
            raise ValueError(f"rotate={self.path!r} is no tensor of z; they are {names}")
        return names.index(self.path)

    def blocks(self, z: Tensor) -> tuple[int, int, int]:
        """z as (N, D, P): examples, features of which the first m are rotated, trailing positions."""
        dims, behind = len(self.shape), len(self.trailing)
        shape = tuple(z.shape)
        split = len(shape) - dims - behind
        features, trailing = shape[max(split, 0) : len(shape) - behind], shape[len(shape) - behind :]
        fits = features[0] >= self.shape[0] if dims == 1 and features else features == self.shape
        if split < 0 or not fits or trailing != self.trailing:
            raise ValueError(
                f"rotation_shape={self.shape} and trailing_shape={self.trailing} do not fit z of shape {shape}: z must "
                f"end in {(*self.shape, *self.trailing)}, or in more features than that if rotation_shape is one number"
            )
        return (
            torch.Size(shape[:split]).numel(),
            torch.Size(features).numel(),
            torch.Size(self.trailing).numel(),
        )

    def examples(self, z: Tensor, form: str) -> int:
        """Over how many entries a published rotation loss takes a mean; 0 if it is a sum."""
        leading = tuple(z.shape)[: z.ndim - len(self.shape) - len(self.trailing)]
        if form == "0.1.6" and not self.trailing:  # there it sums over the last of them too
            return int(torch.Size(leading[:-1]).numel()) if leading[1:] else 0
        return int(torch.Size(leading).numel())

    def spread(self, z: Tensor, rotations: Tensor) -> Tensor:
        """(T, *z.shape): R_k z for every task."""
        n, d, p = self.blocks(z)
        x, rest = self._parts(z.reshape(n, d, p))  # (n, m, p), (n, d - m, p)
        turned = x[..., 0] @ rotations.mT if p == 1 else torch.einsum("kij,njp->knip", rotations, x)
        return self._join(turned, rest).reshape(rotations.shape[0], *z.shape)  # -1 is no number of no examples

    def back(self, r: Tensor, rotations: Tensor) -> Tensor:
        """(T, *z.shape): R_kᵀ r_k for every task."""
        n, d, p = self.blocks(r[0])
        x, rest = self._parts(r.reshape(r.shape[0], n, d, p))  # (T, n, m, p), (T, n, d - m, p)
        turned = x[..., 0] @ rotations if p == 1 else torch.einsum("kij,knip->knjp", rotations, x)
        return self._join(turned, rest).reshape(r.shape)

    def moments(self, left: Tensor, right: Tensor) -> Tensor:
        """(T, m, m) Σ_n x_{k,n} y_nᵀ, of x (T, *z.shape) and y (*z.shape), over examples and trailing positions."""
        n, d, p = self.blocks(right)
        x = self._parts(left.reshape(left.shape[0], n, d, p))[0]  # (T, n, m, p)
        y = self._parts(right.reshape(n, d, p))[0]  # (n, m, p)
        return x[..., 0].mT @ y[..., 0] if p == 1 else torch.einsum("knip,njp->kij", x, y)

    def _parts(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """x (..., d, p): the m rotated features, and the rest of them, if there is any."""
        m = self.size
        return (x, None) if x.shape[-2] == m else (x[..., :m, :], x[..., m:, :])

    def _join(self, turned: Tensor, rest: Tensor | None) -> Tensor:
        """(T, n, d, p) of the two, the first being (T, n, m) or (T, n, m, p)."""
        if rest is None:
            return turned
        turned = turned.unsqueeze(-1) if turned.ndim < 4 else turned
        return torch.cat([turned, rest.expand(turned.shape[0], *rest.shape[-3:])], dim=-2)


def _inverse(matrix: Tensor) -> Tensor:
    """The inverse of a stack of matrices whose symmetric part is positive definite, which needs no pivots.

    By halves, so that nearly all of it is matrix products: three times as fast as LAPACK at m = 128 on a CPU.
    """
    size = matrix.shape[-1]
    if size <= 16:
        inverse: Tensor = torch.linalg.inv_ex(matrix).inverse  # `inv` would wait for the device to report
        return inverse
    h = size // 2
    a, b = matrix[..., :h, :h], matrix[..., :h, h:]
    c, d = matrix[..., h:, :h], matrix[..., h:, h:]
    a = _inverse(a)
    ab = a @ b
    d = _inverse(_less(d, c, ab))
    dca = d @ (c @ a)
    upper = torch.cat([torch.baddbmm(a, ab, dca), -(ab @ d)], -1)
    return torch.cat([upper, torch.cat([-dca, d], -1)], -2)


def _right_solve(x: Tensor, matrix: Tensor) -> Tensor:
    """X M⁻¹, M as in `_inverse`, with half of the last products saved."""
    size = matrix.shape[-1]
    if size <= 16:
        return x @ _inverse(matrix)
    h = size // 2
    b, c, d = matrix[..., :h, h:], matrix[..., h:, :h], matrix[..., h:, h:]
    a = _inverse(matrix[..., :h, :h])
    left, ca = x[..., :h] @ a, c @ a
    right = _less(x[..., h:], left, b) @ _inverse(_less(d, ca, b))
    return torch.cat([_less(left, right, ca), right], -1)


def _less(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """X - LR, for stacks of matrices, in one call."""
    return torch.baddbmm(x, left, right, alpha=-1)
