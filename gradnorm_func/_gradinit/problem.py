"""The loss as a function of what training moves, its gradient, and the derivative by the scales."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradnorm_func._core import tree
from gradnorm_func._core.loss import LossFn
from gradnorm_func._core.numerics import full_precision
from gradnorm_func._core.tasks import task_vector
from gradnorm_func._core.tracing import traced
from gradnorm_func._gradinit.leaves import Leaves
from gradnorm_func._measure.tape import Grads, tape, without_graph


class Problem(NamedTuple):
    """A loss at given scales."""

    loss_fn: LossFn
    leaves: Leaves
    scales: Tensor  # (P,) m_i
    current: list[Tensor]  # θ_m, in leaf order
    weights: Any  # of T losses; None is 1 each
    loss_scale: float | Tensor  # what every gradient is multiplied by

    def loss(self, trained: Sequence[Tensor], batch: Any) -> Tensor:
        """L, with `trained` in place of what training moves."""
        filled = tree.replace(self.current, self.leaves.trained, trained)
        params = tree.unflatten(self.leaves.treedef, [filled[i] for i in self.leaves.first])
        return scalar(self.loss_fn(params, batch), self.weights)

    def gradient(self, trained: Sequence[Tensor], batch: Any) -> tuple[list[Tensor], Tensor]:
        """(∇L times the loss scale, L)."""

        def fn(trained: list[Tensor]) -> tuple[list[Tensor], Tensor]:
            loss = self.loss(trained, batch)
            return [self.loss_scale * loss], loss

        recorded = tape(fn, trained)
        grads = recorded.pull([torch.ones_like(recorded.outputs[0])], last=True)
        zeros = [torch.zeros_like(x) if grad is None else grad for grad, x in zip(grads, trained, strict=True)]
        return zeros, without_graph(recorded.aux)

    def gradient_with_graph(self, trained: list[Tensor], batch: Any) -> tuple[list[Tensor], Tensor]:
        """`gradient`, such that the tape around this call can differentiate once more."""
        if traced():
            return self.gradient(trained, batch)
        loss = self.loss(trained, batch)
        if not loss.requires_grad:
            return [torch.zeros_like(x) for x in trained], loss
        with full_precision(loss):
            grads = _grad_with_graph(self.loss_scale * loss, trained)
        return grads, loss

    def per_scale(self, grads: Grads) -> Tensor:
        """(P,) ∂/∂m_i = ⟨∂/∂θ_i, θ⁰_i⟩ for every leaf; a parameter at several paths has the same at all of them."""
        initial, dtype = self.leaves.initial, self.scales.dtype
        products = {
            i: torch.dot(grad.flatten().to(dtype), initial[i].flatten().to(dtype))
            for i, grad in zip(self.leaves.trained, grads, strict=True)
            if grad is not None and i in self.leaves.scaled
        }
        zero = self.scales.new_zeros(())
        return torch.stack([products.get(i, zero) for i in self.leaves.first])


def scalar(losses: Any, weights: Any) -> Tensor:
    """The loss to differentiate: the scalar itself, or Σ w_i L_i."""
    if isinstance(losses, Tensor) and losses.ndim == 0:
        if weights is not None:
            raise ValueError("weights is for T losses, but loss_fn returned one scalar: leave weights out")
        return losses
    vector = task_vector(losses)
    if weights is None:
        return vector.sum()
    w = task_vector(weights, "weights")
    if w.shape != vector.shape:
        raise ValueError(f"weights has {w.shape[0]} entries, but loss_fn returned {vector.shape[0]} losses")
    return (w.to(vector) * vector).sum()


def _grad_with_graph(loss: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    try:
        return list(torch.autograd.grad(loss, inputs, create_graph=True, materialize_grads=True))
    except RuntimeError as error:
        if "use_reentrant" in str(error):
            raise ValueError(
                "torch keeps a reentrant checkpoint from torch.autograd.grad: give the torch.utils.checkpoint in the "
                "loss use_reentrant=False"
            ) from error
        raise
