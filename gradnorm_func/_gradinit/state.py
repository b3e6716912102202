"""What GradInit carries from step to step, and what it reports of one."""

from __future__ import annotations

from functools import reduce
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from gradnorm_func._core import tree
from gradnorm_func._core.tracing import no_graph
from gradnorm_func._core.trained import first_places
from gradnorm_func._gradinit.leaves import rescaled
from gradnorm_func._gradinit.rescale_adam import AnyOptimizer, pair_of

P = TypeVar("P")


class GradInitState(NamedTuple):
    """All that the next step needs; the parameters themselves stay as they are."""

    scales: Tensor  # (P,) m_i, one for each leaf of params, in leaf order (sorted keys)
    moments: Any  # state of the scales' optimizer


class GradInitInfo(NamedTuple):
    """What one would log of a step; all taken before the scales moved."""

    loss: Tensor  # () L(S; θ_m)
    grad_norm: Tensor  # () ‖∇L(S; θ_m)‖_p
    above: Tensor  # () bool: grad_norm > γ, so that the norm was descended, and not the loss
    objective: Tensor  # () what was descended
    scales: Tensor  # (P,) m_i
    scale_grads: Tensor  # (P,) ∂ objective / ∂ m_i; 0 for what is not scaled
    finite: Tensor  # () bool: False means that the state was left as it was


def gradinit_init_state(params: Any, *, optimizer: AnyOptimizer | None = None) -> GradInitState:
    r"""The state before the first step: every scale 1.

    Args:
        params: pytree of floating-point tensors, the initial parameters :math:`\theta^0`.
        optimizer: of the scales, as in `gradinit_step`; the same one must be given to the steps.

    Returns:
        GradInitState on the device of params, in their widest dtype, but at least float32.

    Raises:
        ValueError: for params that are empty or not floating point.

    Example:
        >>> import torch, gradnorm_func as gn
        >>> gn.gradinit_init_state({"weight": torch.randn(3, 2), "bias": torch.zeros(3)}).scales
        tensor([1., 1.])
    """
    tree.check_params(params)
    leaves, _ = tree.flatten(params)
    dtype = reduce(torch.promote_types, (leaf.dtype for leaf in leaves), torch.float32)
    scales = torch.ones(len(leaves), dtype=dtype, device=leaves[0].device)
    return GradInitState(scales, pair_of(optimizer).init(scales))


def gradinit_apply(state: GradInitState, params: P) -> P:
    r"""The rescaled parameters, :math:`m_i \theta^0_i`.

    Args:
        state: the outcome of some steps.
        params: :math:`\theta^0`, as they were given to the steps.

    Returns:
        New tensors in the structure of params, with no graph attached; a tensor that stood at several paths still
        does.

    Raises:
        ValueError: if the state was made for other params.

    Example:
        >>> import torch, gradnorm_func as gn
        >>> params = {"a": torch.ones(2), "b": torch.ones(2)}
        >>> state = gn.gradinit_init_state(params)._replace(scales=torch.tensor([2.0, 0.5]))
        >>> gn.gradinit_apply(state, params)
        {'a': tensor([2., 2.]), 'b': tensor([0.5000, 0.5000])}
    """
    tree.check_params(params)
    leaves, treedef = tree.flatten(params)
    check_state(state, len(leaves))
    first = first_places(leaves)
    with no_graph():
        applied: P = tree.unflatten(treedef, rescaled(leaves, first, state.scales))
    return applied


def check_state(state: Any, count: int) -> None:
    """Refuses what is not a GradInitState, or one for other than `count` leaves."""
    if not isinstance(state, GradInitState):
        raise ValueError(f"state is a {type(state).__name__}, not a GradInitState: make one with gradinit_init_state")
    if state.scales.shape != (count,):
        raise ValueError(
            f"state has {state.scales.shape[0]} scales, but params has {count} leaves: "
            "the state must come from gradinit_init_state(params) with the same params"
        )


def check_moments(state: GradInitState, optimizer: AnyOptimizer) -> None:
    """Refuses a state that was made with another optimizer."""
    expected = optimizer.init(state.scales)
    if tree.flatten(expected)[1] != tree.flatten(state.moments)[1]:
        raise ValueError(
            f"the state holds {type(state.moments).__name__}, but this optimizer keeps {type(expected).__name__}: "
            "give gradinit_init_state and the steps the same optimizer= (None is rescale_adam() in both)"
        )
