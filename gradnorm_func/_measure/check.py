"""Does the pass see what the loss really does? A check to run once on one's own model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gradnorm_func._core import tree
from gradnorm_func._core.looking import only_looking
from gradnorm_func._core.loss import LossFn, MultiTaskLoss
from gradnorm_func._core.numerics import row_norms
from gradnorm_func._core.tasks import task_names, task_vector
from gradnorm_func._core.tree import Tensors, Where
from gradnorm_func._measure.general import general
from gradnorm_func._measure.measure import as_tree, run_engine
from gradnorm_func._measure.plan import Plan, plan_of, split_aux
from gradnorm_func._measure.reach import (
    CLOSED_OVER,
    Reach,
    applied_twice,
    private_where,
    reach_of,
    refuse_aux,
)
from gradnorm_func._measure.tape import leaves_of


def check(
    loss_fn: LossFn,
    params: Tensors,
    batch: Any,
    *,
    where: Where = None,
    rtol: float | None = None,
    has_aux: bool = False,
) -> list[str]:
    r"""Looks for what would train wrong without a word. To run once, on one's own model, before training.

    - Losses without a gradient: `.item()`, `detach()`, a number.
    - Parameters that no loss depends on while the losses depend on other tensors: a module that the loss closes over
      instead of calling it on params.
    - A `where` that at most one task reads, such as another task's head.
    - A backbone that applies the `shared_linear` itself, which then happens twice, or reads its weight besides.
    - A `multi_task_loss` whose gradients are not those of the general engine, which is slow and assumes nothing: a head
      that reads the weight of a `shared_linear` past z.

    Before all that, and alone: losses that are not finite; losses of a `multi_task_loss` that are others when it is run
    again, such as those with dropout in train mode, for then no two passes agree.

    Args:
        loss_fn: any.
        params, batch: a small, typical example, in which every task is present.
        where: W, as in `measure`. With None the gradient of every task at every parameter is compared.
        rtol: largest allowed relative difference, in norm, of one task's gradient at one leaf; by default 1e-3 for
            float32 and coarser, 1e-8 for float64. What is below a hundredth of that of the task's whole gradient is
            taken for rounding, as at a bias before batch norm, where the gradient is zero but for it.
        has_aux: as in `measure`.

    Returns:
        The paths of the parameters that no loss depends on; it may be meant so.

    Raises:
        ValueError: with all that was found, naming tasks and paths.

    Example:
        >>> import torch, gradnorm_func as gn
        >>> loss_fn = gn.multi_task_loss(
        ...     lambda params, x: x,
        ...     {"honest": lambda params, z, x: z.square().mean(),
        ...      "sly": lambda params, z, x: z.mean() + params["w"].square().sum()},
        ...     last_shared=gn.shared_linear("w"),
        ... )
        >>> gn.check(loss_fn, {"w": torch.eye(2)}, torch.ones(3, 2), where="w")
        Traceback (most recent call last):
            ...
        ValueError: the seam misses part of these task gradients: task 'sly' at 'w' (relative difference 0.78)...
    """
    plan = plan_of(params, loss_fn, batch, where, None, "norms", has_aux=has_aux)
    with only_looking(loss_fn, plan.leaves):
        if unsteady := _not_finite_or_random(plan, rtol):
            raise ValueError(unsteady)
        reach = reach_of(plan)
        findings = [_cut_off(reach), _closed_over(plan, reach), private_where(plan, reach), applied_twice(plan)]
        if isinstance(loss_fn, MultiTaskLoss):
            findings.append(_past_the_seam(loss_fn, params, batch, where, rtol, has_aux))
    findings = [finding for finding in findings if finding]
    if findings:
        raise ValueError("\n".join(findings))
    return _unread(plan, reach)


def doubts(loss_fn: LossFn, params: Any, batch: Any, mask: Any = None, has_aux: bool = False) -> list[str]:
    """The cheap part of `check`, for the first batch of a loop, in which some tasks may be absent: what to warn of.

    Raises for what is never meant: a module that is closed over, a `shared_linear` that the backbone applies, too.
    """
    plan = plan_of(params, loss_fn, batch, lambda _path: True, None, "losses", has_aux=has_aux)
    reach = reach_of(plan)
    if wrong := _closed_over(plan, reach) or applied_twice(plan):
        raise ValueError(wrong)
    paths = [repr(path) for path in _unread(plan, reach)] if mask is None else []
    found = [f"no loss depends on the parameters {', '.join(paths)}: they will not be trained"] if paths else []
    return found if mask is not None or not reach.dead else [_cut_off(reach), *found]


def _unread(plan: Plan, reach: Reach) -> list[str]:
    read: set[int] = set().union(*reach.reads)
    return [path for i, path in enumerate(_paths(plan)) if i not in read]


def _paths(plan: Plan) -> list[str]:
    return tree.paths(plan.params(plan.leaves))


def _not_finite_or_random(plan: Plan, rtol: float | None) -> str:
    """Losses of which nothing else can be said: they are run twice. Random ones cannot be compared with the general
    engine's."""
    leaves = leaves_of(plan.leaves)
    with torch.enable_grad():
        runs = [split_aux(plan.loss_fn(plan.params(leaves), plan.batch), plan.has_aux)[0] for _ in range(2)]
    refuse_aux(runs[0])
    names, (one, other) = task_names(runs[0]), [task_vector(losses).detach() for losses in runs]
    if bad := _those(names, ~(one.isfinite() & other.isfinite())):
        return f"the loss of {bad} is not finite: look for it in the labels, or in a log or a division by 0"
    differs = (one - other).abs() > _limit(one.dtype, rtol) * one.abs()
    if isinstance(plan.loss_fn, MultiTaskLoss) and (bad := _those(names, differs)):
        return (
            f"the loss of {bad} is random (dropout?), or keeps a state: two calls on one batch differ. Call "
            "model.eval() for the check, and model.train() after it"
        )
    return ""


def _those(names: list[str], chosen: Tensor) -> str:
    return ", ".join(repr(name) for name, yes in zip(names, chosen.tolist(), strict=True) if yes)


def _limit(dtype: torch.dtype, rtol: float | None) -> float:
    return (1e-8 if dtype == torch.float64 else 1e-3) if rtol is None else rtol


def _cut_off(reach: Reach) -> str:
    """Losses that are in no graph."""
    if not reach.dead:
        return ""
    return (
        f"losses without a gradient: {', '.join(map(repr, reach.dead))}. Return the 0-d tensor, not .item(), float() "
        "or .detach() of it; a task that is absent from a batch is left out by mask="
    )


def _closed_over(plan: Plan, reach: Reach) -> str:
    """Parameters that no loss depends on, where losses read others of such shapes instead, which are not in params."""
    paths = _unread(plan, reach)
    shapes = {leaf.shape for path, leaf in zip(_paths(plan), plan.leaves, strict=True) if path in paths}
    if not shapes & reach.others:
        return ""
    return (
        f"no loss depends on {', '.join(map(repr, paths))}, but losses depend on parameters of such shapes that are "
        f"not in params: {CLOSED_OVER}"
    )


def _past_the_seam(
    loss_fn: MultiTaskLoss, params: Any, batch: Any, where: Where, rtol: float | None, has_aux: bool
) -> str:
    """The seam's task gradients beside the general engine's."""
    everywhere = where if where is not None else lambda _path: True
    plan = plan_of(params, loss_fn, batch, everywhere, None, "norms", task_grads=True, has_aux=has_aux)
    exact = run_engine(plan, general)
    expected = as_tree(plan, exact)
    if where is None:
        measured = _through_the_step(loss_fn, params, batch, exact.stats.losses, has_aux)
    else:
        measured = as_tree(plan, run_engine(plan))
    names = task_names(exact.losses if isinstance(exact.losses, Tensor) else loss_fn)
    differing = []
    whole = row_norms(exact.stats.task_grads).double()
    for path, reference in expected.items():
        limit = _limit(reference.dtype, rtol)
        for task, name in enumerate(names):
            gap = torch.linalg.vector_norm((measured[path][task] - reference[task]).double())
            size = torch.linalg.vector_norm(reference[task].double())
            if not bool(gap <= limit * (size + 0.01 * whole[task]) + torch.finfo(reference.dtype).tiny):
                differing.append(f"task {name!r} at {path!r} (relative difference {float(gap / size):.2g})")
    if not differing:
        return ""
    return (
        f"the seam misses part of these task gradients: {', '.join(differing)}. Does a head read the parameter past z? "
        "Let it go by way of z, or name W by a path outside the shared_linear"
    )


def _through_the_step(loss_fn: LossFn, params: Any, batch: Any, vector: Tensor, has_aux: bool) -> dict[str, Tensor]:
    """Every task's gradient as the training step would see it: the weighted sum with all weight on one task."""
    rows = []
    for one in torch.eye(vector.shape[0], dtype=vector.dtype, device=vector.device):
        plan = plan_of(params, loss_fn, batch, None, one, "norms", has_aux=has_aux)
        rows.append(run_engine(plan).stats.grads)
    return {path: torch.stack([row[i] for row in rows]) for i, path in enumerate(tree.paths(params))}
