"""New values for parameters that are zero, which have no scale to learn."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

from gradnorm_func._core import tree
from gradnorm_func._core.tree import Where

P = TypeVar("P")


def reinit_zeros(params: P, std: float, *, where: Where = None, generator: torch.Generator | None = None) -> P:
    """The parameters, with normal values in place of those that are zero everywhere.

    Which those are is decided on the device, so that random numbers are drawn for all that `where` names.

    Example:
        >>> import torch
        >>> params = reinit_zeros({"weight": torch.ones(2), "bias": torch.zeros(2)}, 0.01)
        >>> params["weight"], bool((params["bias"] != 0).all())
        (tensor([1., 1.]), True)

    Source: `reinit_zeros` of gradinit 0.1.1.
    """
    if not std > 0:
        raise ValueError(f"reinit_std={std} must be positive: it is the standard deviation of the new values")
    tree.check_params(params)
    leaves, treedef = tree.flatten(params)
    fresh: dict[int, Tensor] = {}
    with torch.no_grad():
        for i in tree.select(params, where):
            leaf = leaves[i]
            if id(leaf) not in fresh:  # a tied parameter is one, and stays one
                values = std * torch.randn(leaf.shape, generator=generator, dtype=leaf.dtype, device=leaf.device)
                fresh[id(leaf)] = torch.where((leaf == 0).all(), values, leaf)
    new: P = tree.unflatten(treedef, [fresh.get(id(leaf), leaf) for leaf in leaves])
    return new
