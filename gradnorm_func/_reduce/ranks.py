"""all_reduce: what `merge` is to micro-batches, to the ranks of data parallelism; one collective."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gradnorm_func._core import tree
from gradnorm_func._core.numerics import accum_dtype, promoted, safe_sqrt
from gradnorm_func._core.tasks import keep_memory
from gradnorm_func._reduce.stats import S, TaskStats, mean_of, present, sums_of


def all_reduce(stats: S, group: Any = None, *, squared_norms: bool = False) -> S:
    r"""The stats of the union of the batches of all ranks, exactly as `merge` would give them.

    All that adds up (the losses, task gradients and parameters' gradients times the number of examples, and that number
    itself) travels in one buffer and one collective; norms are taken afterwards, on every rank from the same bits, so
    that weights need no broadcast. What is NaN on one rank is NaN on all, and all refuse the same step.

    Bytes per rank, with s bytes per number (4, or 8 for float64): :math:`s (1 + T + T|W| + |\theta|)` where W are
    parameters, :math:`s (1 + 3T + |\theta|)` at z; without :math:`|\theta|` if something else reduces the gradients
    (`grads=()`, DDP). `squared_norms` sends T numbers for :math:`T|W|`: with :math:`\pi_r` the share of rank r,

    .. math:: \hat n_i^2 = \sum_r \pi_r \|g_{i,r}\|^2
              = \|\bar g_i\|^2 + \sum_r \pi_r \|g_{i,r} - \bar g_i\|^2 \ge \|\bar g_i\|^2:

    too large by the variance of the gradient between ranks, most for the tasks whose gradients are the noisiest.
    `benchmarks/communication.md` has its size on a real task.

    Args:
        stats: of this rank, TaskStats or RotoGradStats, from `measure` or `merge` at parameters and weights that are
            the same on all ranks. Half-precision gradients are summed in float32.
        group: the process group; None is the default one.
        squared_norms: send squared norms for task gradients. At z, where norms are exact without gradients, it changes
            nothing. It takes stats measured with `norms_only=True` too.

    Returns:
        Stats of the same kind, the same bits on every rank, cut from any graph; without task gradients if
        `squared_norms`. RotoGradStats send their cross moments, s T² m² bytes.

    Raises:
        RuntimeError: without an initialised process group: a run of one process that was meant to be one of many would
            not be noticed otherwise.
        ValueError: for norms alone at parameters, without `squared_norms`.

    Example:
        >>> import torch, gradnorm_func as gn
        >>> store = torch.distributed.HashStore()  # torchrun needs neither this nor rank and world_size
        >>> torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        >>> stats = gn.TaskStats(torch.tensor([1.0, 2.0]), task_grads=torch.tensor([[3.0, 4.0], [0.0, 1.0]]))
        >>> gn.all_reduce(stats).grad_norms
        tensor([5., 1.])
        >>> torch.distributed.destroy_process_group()
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            "all_reduce needs a process group: call torch.distributed.init_process_group first, under torchrun or a "
            "launcher of your own; in a run of one process leave reduce= out"
        )
    if isinstance(stats, TaskStats) and present(stats.grad_norms) and not present(stats.square_norms):
        if squared_norms:
            return _mean_of_squares(stats, group)  # type: ignore[return-value]
        if not tree.flatten(stats.task_grads)[0]:
            raise ValueError(
                "these stats hold norms at parameters but no gradients, and the norm of a mean is not the mean of "
                "norms: measure with norms_only=False, or say squared_norms=True for an upper bound"
            )
    bucket, layout, treedef = _packed(sums_of(stats))
    dist.all_reduce(bucket, group=group)
    parts = torch.split(bucket, [shape.numel() for shape, _, _ in layout])
    shaped = [part.reshape(shape).to(device, dtype) for part, (shape, dtype, device) in zip(parts, layout, strict=True)]
    mean = mean_of(stats, tree.unflatten(treedef, shaped))
    keep_memory(getattr(mean, "losses", None), [getattr(stats, "losses", None)], whole=False)
    return mean


def _mean_of_squares(stats: TaskStats, group: Any) -> TaskStats:
    """T squared norms in place of T gradients: they travel as what is a mean over examples."""
    squares = tree.tree_map(lambda norms: promoted(torch.as_tensor(norms)).square(), stats.grad_norms)
    carrier = stats._replace(grad_norms=(), gramian=(), task_grads=(), extra=(stats.extra, squares))
    mean = all_reduce(carrier, group)
    return mean._replace(extra=mean.extra[0], grad_norms=tree.tree_map(safe_sqrt, mean.extra[1]))


def _packed(sums: Any) -> tuple[Tensor, list[Any], Any]:
    """The sums in one buffer, and how to take it apart."""
    leaves, treedef = tree.flatten(sums)
    layout = [(leaf.shape, leaf.dtype, leaf.device) for leaf in leaves]
    dtype = accum_dtype(*leaves)
    bucket = torch.cat([leaf.detach().to(leaves[0].device, dtype).reshape(-1) for leaf in leaves])
    return bucket, layout, treedef
