"""The independent reference: a loop of `torch.autograd.grad` over tasks. Nothing here knows of torch.func."""

from __future__ import annotations

from typing import Any, NamedTuple

import optree
import torch
from torch import Tensor

RTOL = 1e-10  # of every task gradient and norm
SUM_RTOL = 1e-12  # of the gradient of Σ w_i L_i
ROUNDING = 1e-14  # of a whole gradient: what is left where its terms cancel, as for a bias before batch norm


class Reference(NamedTuple):
    """What classic autograd says; every gradient by task name, then in the order of `wrt`."""

    losses: dict[str, Tensor]
    rows: dict[str, list[Tensor]]
    total: list[Tensor]


def gradients(value: Tensor, wrt: list[Tensor], **options) -> list[Tensor]:
    """d value / d wrt, with zeros for what value does not depend on."""
    if value.grad_fn is None:
        return [torch.zeros_like(x) for x in wrt]
    found = torch.autograd.grad(value, wrt, retain_graph=True, allow_unused=True, **options)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(wrt, found, strict=True)]


def reference(losses: dict[str, Tensor], wrt: list[Tensor], weights: dict[str, float]) -> Reference:
    """Each task's gradient by a backward pass of its own, and that of the weighted sum by one more."""
    rows = {name: gradients(loss, wrt) for name, loss in losses.items()}
    total = gradients(sum(weights[name] * loss for name, loss in losses.items()), wrt)
    return Reference({name: loss.detach() for name, loss in losses.items()}, rows, total)


def norm(tensors: list[Tensor]) -> Tensor:
    """Euclidean norm of all of them together."""
    return torch.cat([t.detach().flatten() for t in tensors]).norm()


def assert_near(found: Tensor, expected: Tensor, what: str = "", scale: Tensor | float = 0.0) -> None:
    """Each element equal to RTOL; `scale` is the size of what cancelled to give an element that should be zero."""
    assert found.shape == expected.shape, f"{what}: {tuple(found.shape)} is not {tuple(expected.shape)}"
    scale = max(float(scale), float(expected.abs().max()) if expected.numel() else 0.0)
    torch.testing.assert_close(found, expected, rtol=RTOL, atol=ROUNDING * scale, msg=lambda text: f"{what}: {text}")


def assert_same_sum(found: list[Tensor], expected: list[Tensor], what: str = "") -> None:
    """Two gradients of Σ w_i L_i, equal in norm to 1e-12, leaf by leaf."""
    size = norm(expected)
    assert size > 0
    for i, (f, e) in enumerate(zip(found, expected, strict=True)):
        assert f.shape == e.shape
        gap = norm([f - e])
        assert gap <= SUM_RTOL * norm([e]) + ROUNDING * size, f"{what}: leaf {i} differs by {float(gap):.3g}"


def snapshot(tree: Any) -> list[tuple[Tensor, Tensor, int]]:
    return [(leaf, leaf.detach().clone(), leaf._version) for leaf in optree.tree_leaves(tree)]


def assert_untouched(before: list[tuple[Tensor, Tensor, int]]) -> None:
    for leaf, copy, version in before:
        assert torch.equal(leaf, copy)
        assert leaf._version == version
        assert leaf.grad is None


def assert_free(tree: Any) -> None:
    """No tensor carries a graph."""
    assert not any(leaf.requires_grad for leaf in optree.tree_leaves(tree) if isinstance(leaf, Tensor))
