"""How RotoGrad's stats of several micro-batches or ranks merge."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gradnorm_func._balance.protocol import here_of
from gradnorm_func._core import tree
from gradnorm_func._core.loss import LossFn
from gradnorm_func._measure.plan import wide
from gradnorm_func._reduce.micro import as_params
from gradnorm_func._reduce.stats import TaskStats, merge
from gradnorm_func._rotograd.measure import RotoGradStats, column, factors_of, run
from gradnorm_func._rotograd.scale import Hyper, RotoGradState


def rotograd_merge(*stats: RotoGradStats | None) -> RotoGradStats:
    r"""The stats of the union of micro-batches: exact, but for gradients made with factors of single micro-batches.

    With :math:`\pi_i` the share of micro-batch i, losses and gradients are means, and every example's gradient is
    scaled by :math:`\pi_i`: the Gramians and cross moments add up with :math:`\pi_i^2`.

    Args:
        stats: from `rotograd_measure`, at the same state and parameters. None is skipped: nothing yet.

    Returns:
        RotoGradStats of the whole batch.

    Raises:
        ValueError: for no stats.

    Example:
        See `rotograd_measure`.
    """
    parts = [rotograd_sums(s) for s in stats if s is not None]
    if not parts:
        raise ValueError("rotograd_merge() of nothing: give it at least one RotoGradStats")
    return rotograd_of_sums(tree.tree_map(lambda *leaves: sum(leaves[1:], leaves[0]), *parts))


def rotograd_sums(stats: RotoGradStats) -> RotoGradStats:
    """What adds up over disjoint parts of a batch: n times what is a mean, n² times what is a product of two."""
    count = torch.as_tensor(stats.num_examples, dtype=stats.gram.dtype, device=stats.gram.device)
    # Back to the losses as they are: micro-batches of the first step each took their own L(0).
    back = 1 / stats.units

    def product(x: Any) -> Any:
        return x * (count.square() * column(back[:, None] * back, x)).to(x.dtype) if isinstance(x, Tensor) else ()

    return _scaled(stats, count)._replace(
        units=torch.zeros_like(stats.units),
        head_gram=product(stats.head_gram),
        gram=product(stats.gram),
        moments=(),  # with the part's own direction v: it is made anew of the cross moments
        square=(),
        cross=product(stats.cross),
        task_moments=stats.task_moments * (count * column(back, stats.task_moments)).to(stats.task_moments.dtype)
        if isinstance(stats.task_moments, Tensor)
        else (),
        examples=torch.as_tensor(stats.examples, dtype=count.dtype, device=count.device),
        num_examples=count,
    )


def rotograd_of_sums(sums: RotoGradStats) -> RotoGradStats:
    """The stats of the batch whose parts have been summed."""
    share = 1 / sums.num_examples

    def times(factor: Tensor, x: Any) -> Any:
        return x * factor.to(x.dtype) if isinstance(x, Tensor) else ()

    return _scaled(sums, share)._replace(
        units=torch.ones_like(sums.units),
        head_gram=times(share.square(), sums.head_gram),
        gram=times(share.square(), sums.gram),
        cross=times(share.square(), sums.cross),
        task_moments=times(share, sums.task_moments),
    )


def in_parts(
    state: RotoGradState,
    params: Any,
    loss_fn: LossFn,
    parts: Sequence[tuple[Any, float]],
    hyper: Hyper,
    *,
    mask: Any = None,
    reduce: Callable[[Any], Any] | None = None,
    exact: bool = True,
    grads: bool = True,
    has_aux: bool = False,
) -> tuple[RotoGradStats, list[Any]]:
    """The stats of the whole of some parts, each with its number of examples, and of the ranks that `reduce` unites."""

    def once(grads: bool) -> tuple[RotoGradStats, list[Any]]:
        merged, auxes = None, []
        for part, count in parts:
            found, aux = run(state, params, loss_fn, part, hyper, mask=mask, grads=grads, cross=True, has_aux=has_aux)
            merged = rotograd_merge(merged, found._replace(num_examples=count))
            auxes.append(aux)
        if merged is None:
            raise ValueError("batches is empty: give at least one micro-batch")
        return merged if reduce is None else reduce(merged), auxes

    stats, auxes = once(grads and not exact)
    if exact and grads:
        factors, found = factors_of(state, stats, here_of(state, mask), hyper), None
        for part, count in parts:
            second, _ = run(
                state, params, loss_fn, part, hyper, mask=mask, factors=factors, moments=False, has_aux=has_aux
            )
            found = merge(found, TaskStats(second.losses, grads=second.grads, num_examples=count))
        assert found is not None
        stats = stats._replace(grads=(found if reduce is None else reduce(found)).grads)
    return stats._replace(grads=as_params(stats.grads, params)), auxes


def _scaled(stats: RotoGradStats, factor: Tensor) -> RotoGradStats:
    """With what is a mean over examples multiplied by a factor."""
    losses, backbone_loss, weights, grads = tree.tree_map(
        lambda x: x.to(wide(x)) * factor.to(wide(x)), (stats.losses, stats.backbone_loss, stats.weights, stats.grads)
    )
    return stats._replace(losses=losses, backbone_loss=backbone_loss, weights=weights, grads=grads)
