"""RotoGrad 0.1.2's step, transcribed straight from its equations with torch.autograd, for the tests alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Oracle012:
    """The 2021 release: no scale part, alpha in the common direction, an optional cooperative mode."""

    def __init__(
        self, bases: Tensor, *, alpha: float, burn_in: int, normalize: bool, gradnorm: bool, cooperative: int | None
    ) -> None:
        self.bases = bases
        self.entries = [nn.Parameter(torch.zeros_like(base)) for base in bases]
        self.logits = [nn.Parameter(torch.ones((), dtype=bases.dtype)) for _ in bases]
        self.alpha, self.burn_in, self.normalize = alpha, burn_in, normalize
        self.gradnorm, self.cooperative = gradnorm, cooperative
        self.initial: list[float] = []
        self.step = 0

    def rotation(self, k: int) -> Tensor:
        lower = self.entries[k].tril(-1)
        return self.bases[k] @ torch.linalg.matrix_exp(lower - lower.T)

    def backward(self, z: Tensor, heads: list, targets: list[Tensor]) -> list[float]:
        """Leaves .grad on everything: heads, backbone, rotations, logits."""
        count = len(heads)
        leaves, at_heads, rotations = [], [], []
        losses = []
        for k in range(count):
            leaf = z.detach().clone().requires_grad_()
            rotation = self.rotation(k).detach().requires_grad_()
            r = leaf @ rotation.T
            r.retain_grad()
            losses.append(heads[k](r, targets[k]))
            leaves.append(leaf)
            at_heads.append(r)
            rotations.append(rotation)
        if self.step in (0, self.burn_in):
            self.initial = [loss.item() for loss in losses]
        ratios = [loss.item() / first for loss, first in zip(losses, self.initial, strict=True)]
        for loss, first in zip(losses, self.initial, strict=True):
            (loss / first if self.normalize else loss).backward()
        g = [leaf.grad for leaf in leaves]
        mean = sum(g) / count
        mean_ratio = sum(ratios) / count
        pulls = [
            x * (mean.norm() / x.norm()) * (ratio / mean_ratio) ** self.alpha
            for x, ratio in zip(g, ratios, strict=True)
        ]
        v = sum(pulls) / count
        for k in range(count):
            target = at_heads[k].grad
            if self.cooperative is not None and self.step >= self.cooperative:
                free = self.rotation(k).detach().requires_grad_()
                (v @ free.T - target).square().sum(1).mean().backward()
                one, two = rotations[k].grad, free.grad
                size = ((one + two) / 2).norm()
                self.rotation(k).backward(one * size / one.norm() + two * size / two.norm())
            else:
                (v @ self.rotation(k).T - target).square().sum(1).mean().backward()
        total = sum(g)
        if self.gradnorm:
            raw = [logit.exp() for logit in self.logits]
            scale = count / sum(x.item() for x in raw)
            w = [x * scale for x in raw]
            common = (sum(x.detach() * y for x, y in zip(w, g, strict=True)) / count).norm()
            for k in range(count):
                (w[k] * g[k].norm() - common * (ratios[k] / mean_ratio) ** self.alpha).abs().backward()
            total = sum(x.detach() * y for x, y in zip(w, g, strict=True))
        z.backward(total)
        self.step += 1
        return ratios
