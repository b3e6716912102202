"""Does the seam see what the loss really does? A check to run once on one's own model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gradnorm_func._core import tree
from gradnorm_func._core.loss import LossFn, MultiTaskLoss, task_names
from gradnorm_func._core.numerics import row_norms
from gradnorm_func._core.tree import Tensors, Where
from gradnorm_func._measure.general import general
from gradnorm_func._measure.measure import as_tree, run_engine
from gradnorm_func._measure.plan import plan_of


def check_seam(
    loss_fn: LossFn,
    params: Tensors,
    batch: Any,
    *,
    where: Where = None,
    rtol: float | None = None,
    has_aux: bool = False,
) -> None:
    r"""Compares the seam's per-task gradients with the general engine's, which is slow and assumes nothing.

    Mistakes that it finds: a head that reads the weight of a `shared_linear` directly, past z; a `shared_linear`
    whose activation is not the model's; a random operation (dropout) or hidden state in the loss, for then no two
    passes agree.

    Args:
        loss_fn: a `multi_task_loss`.
        params, batch: a small, typical example.
        where: W, as in `measure`. With None the gradient of every task at every parameter is compared.
        rtol: largest allowed relative difference, in norm, of one task's gradient at one leaf; by default 1e-3 for
            float32 and coarser, 1e-8 for float64. What is below a hundredth of that of the task's whole gradient is
            taken for rounding, as at a bias before batch norm, where the gradient is zero but for it.
        has_aux: as in `measure`.

    Raises:
        ValueError: if they differ, naming tasks, paths and by how much; or if `loss_fn` is no `multi_task_loss`.

    Example:
        >>> import torch, gradnorm_func as gn
        >>> loss_fn = gn.multi_task_loss(
        ...     lambda params, x: x,
        ...     {"honest": lambda params, z, x: z.square().mean(),
        ...      "sly": lambda params, z, x: z.mean() + params["w"].square().sum()},
        ...     last_shared=gn.shared_linear("w"),
        ... )
        >>> gn.check_seam(loss_fn, {"w": torch.eye(2)}, torch.ones(3, 2), where="w")
        Traceback (most recent call last):
            ...
        ValueError: the seam misses part of these task gradients: task 'sly' at 'w' (relative difference 0.78)...
    """
    if not isinstance(loss_fn, MultiTaskLoss):
        raise ValueError("check_seam is for a multi_task_loss; any other loss_fn goes through the general engine")
    everywhere = where if where is not None else lambda _path: True
    plan = plan_of(params, loss_fn, batch, everywhere, None, "norms", task_grads=True, has_aux=has_aux)
    exact = run_engine(plan, general)
    expected = as_tree(plan, exact)
    if where is None:
        measured = _through_the_step(loss_fn, params, batch, exact.stats.losses, has_aux)
    else:
        measured = as_tree(plan, run_engine(plan))
    names = task_names(exact.losses) if isinstance(exact.losses, Tensor) else task_names(loss_fn.heads)
    differing = []
    whole = row_norms(exact.stats.task_grads).double()
    for path, reference in expected.items():
        limit = (1e-8 if reference.dtype == torch.float64 else 1e-3) if rtol is None else rtol
        for task, name in enumerate(names):
            gap = torch.linalg.vector_norm((measured[path][task] - reference[task]).double())
            size = torch.linalg.vector_norm(reference[task].double())
            if not bool(gap <= limit * (size + 0.01 * whole[task]) + torch.finfo(reference.dtype).tiny):
                differing.append(f"task {name!r} at {path!r} (relative difference {float(gap / size):.2g})")
    if differing:
        raise ValueError(
            f"the seam misses part of these task gradients: {', '.join(differing)}. Does a head read the parameter "
            "past z, or is something random? Let it go by way of z, or name W by a path outside the shared_linear"
        )


def _through_the_step(loss_fn: LossFn, params: Any, batch: Any, vector: Tensor, has_aux: bool) -> dict[str, Tensor]:
    """Every task's gradient as the training step would see it: the weighted sum with all weight on one task."""
    rows = []
    for one in torch.eye(vector.shape[0], dtype=vector.dtype, device=vector.device):
        plan = plan_of(params, loss_fn, batch, None, one, "norms", has_aux=has_aux)
        rows.append(run_engine(plan).stats.grads)
    return {path: torch.stack([row[i] for row in rows]) for i, path in enumerate(tree.paths(params))}
