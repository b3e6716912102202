"""Bridges to models under plain autograd: DDP, FSDP2, compiled, checkpointed, all that torch.func is not for.

Such a wrapper does its work (all-reduce, reduce-scatter, recomputation) in hooks of the autograd graph, which
torch.func does not run. But a balancer needs T numbers only, so that nothing else has to leave autograd.

- `fork` and `measure_losses`: trunk and heads are ordinary modules, wrapped or not. One copy of z for each task makes
  every ∂L_i/∂z separate, and the step remains the caller's own `backward`. The way to go by default: nothing is asked
  of the heads, so their gradients are synchronised as well, and a GradScaler, Accelerate or Lightning may own the
  backward pass.
- `measure_from` and `backward_from`: the trunk is a wrapped module, the heads are those of a `multi_task_loss`, and all
  that the engines can do (stacked heads, the Gram identity, one compiled graph) is done from z upwards.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gradnorm_func._core import tree
from gradnorm_func._core.loss import LossFn, MultiTaskLoss, task_names, task_vector, wrong_count
from gradnorm_func._core.tree import Where
from gradnorm_func._measure.measure import measure
from gradnorm_func._measure.plan import row_norms
from gradnorm_func._measure.seam import _norms_at_z, _unweighted
from gradnorm_func._measure.sharded import sharded, whole
from gradnorm_func._reduce.stats import TaskStats

_Z = "(z)"  # the path of z among the parameters of the heads


class _Fork(torch.autograd.Function):
    """T views of a tensor, whose gradients add up; unlike plain views, they refuse to be written to."""

    @staticmethod
    def forward(leaf: Tensor, count: int) -> tuple[Tensor, ...]:
        return tuple(leaf.view_as(leaf) for _ in range(count))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.set_materialize_grads(False)  # no zeros for a task that does not read z

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None]:
        found = [grad for grad in grads if grad is not None]
        return (sum(found[1:], found[0]) if found else None), None


def fork(z: Any, tasks: int | Mapping[str, Any] | Sequence[Any]) -> Any:
    r"""One copy of the representation z for each task, in the autograd graph, so that every ∂L_i/∂z can be seen.

    The values are those of z, and so are all gradients: a model forked inside or outside of its DDP or FSDP2 wrapper
    trains as before. The copies are views; to write to one in place (`ReLU(inplace=True)` first in a head) is an error.
    Inside a compiled model the graph breaks here: fork between compiled parts. A wrapper that returns other tensors
    than its module does (DDP with find_unused_parameters or static_graph; FSDP2 warns of views) must not be what hands
    the copies out: wrap trunk and heads, and fork between them.

    Args:
        z: what the tasks share: a tensor, or a pytree of tensors.
        tasks: the number of tasks, or a dict, ModuleDict or list with one entry for each (the heads, their names).

    Returns:
        A list of copies, or for a dict a dict with the same keys. Their gradients are kept by the backward pass.

    Raises:
        ValueError: for fewer than two tasks.

    Example:
        >>> import torch, gradnorm_func as gn
        >>> z = torch.ones(2, requires_grad=True)
        >>> a, b = gn.fork(z, 2)
        >>> (a.sum() + 3 * b.sum()).backward()
        >>> b.grad, z.grad
        (tensor([3., 3.]), tensor([4., 4.]))
    """
    count = tasks if isinstance(tasks, int) else len(tasks)
    if count < 2:
        raise ValueError(f"tasks={tasks!r} makes {count} copies; balancing needs at least two tasks")
    leaves, treedef = tree.flatten(z)
    by_leaf = [_Fork.apply(leaf, count) for leaf in leaves]  # type: ignore[no-untyped-call]
    if not tree.inside_transform():
        for copy in (copy for row in by_leaf for copy in row if copy.requires_grad):
            copy.retain_grad()
    copies = [tree.unflatten(treedef, [row[i] for row in by_leaf]) for i in range(count)]
    names = tasks.keys() if hasattr(tasks, "keys") else None  # a ModuleDict is no Mapping
    return copies if names is None else dict(zip(names, copies, strict=True))


def measure_losses(
    losses: Any,
    copies: Any = None,
    *,
    where: Any = None,
    weights: Tensor | None = None,
    scale: float | Tensor = 1.0,
    num_examples: float | Tensor = 1.0,
) -> TaskStats:
    r"""TaskStats of losses that plain autograd computed, for models that are not functions of their parameters.

    ::

        copies = gn.fork(backbone(x), heads)                              # any modules: DDP, FSDP2, compiled, ...
        losses = {name: loss_of[name](head(copies[name]), y) for name, head in heads.items()}
        stats = gn.measure_losses(losses, copies, num_examples=len(x))    # runs the heads backwards, and no further
        state, info = balancer.balance(state, reduce(stats))              # reduce: the mean over ranks
        (share * sum(w * losses[name] for name, w in zip(gn.task_names(losses), info.weights))).backward()

    DDP and FSDP2 average gradients over the R ranks: `share` is R n_r / Σ n_r, 1 for batches of one size. With
    micro-batches n_r is the size of this one, the sum goes over them all, `merge` unites their stats, and the backward
    passes use the weights from before. GradNorm always does, so it can have the norms of the step's own backward pass,
    and the heads run backwards once: give `weights`, and call this after `backward` and before `balance`. Gradients
    that were written for a step with `info.finite` False are to be dropped, not stepped on.

    Args:
        losses: T scalars with their graph: a (T,) tensor, or a pytree such as the dict of tasks.
        copies: from `fork`, in the order of the losses: then W is z.
        where: instead of copies, W itself: a parameter, or a list or dict of them, at which each loss is
            differentiated on its own. Not the parameters of an FSDP2 module, for the graph does not end at those.
        weights: (T,) w_i, if (scale · Σ w_i L_i).backward() was called already; copies only. A task of weight 0 has
            the norm NaN.
        scale: what else that sum was multiplied with: `share`, or a GradScaler's scale. Without `weights`, a factor
            against underflow. The result is free of it.
        num_examples: as in `measure`.

    Returns:
        TaskStats without `grads`: those are written by the caller's `backward`. `merge` unites the stats of
        micro-batches and ranks.

    Raises:
        ValueError: if losses have no graph, do not match the copies, or do not depend on W; or if there were no
            backward pass, but weights.

    Example:
        >>> import torch, gradnorm_func as gn
        >>> trunk, head = torch.nn.Linear(3, 2), torch.nn.Linear(2, 1)
        >>> copies = gn.fork(trunk(torch.ones(4, 3)), ["size", "fit"])
        >>> losses = [3 * copies[0].sum(), head(copies[1]).square().mean()]
        >>> stats = gn.measure_losses(losses, copies)
        >>> bool(torch.isclose(stats.grad_norms[0], torch.tensor(72.0).sqrt()))
        True
    """
    if (copies is None) == (where is None):
        raise ValueError("give either copies (of z, from gn.fork) or where (parameters), the place of the norms")
    if tree.inside_transform():
        raise ValueError("measure_losses runs autograd, which torch.func does not see: use gn.measure inside of it")
    vector = whole(task_vector(losses))
    if not vector.requires_grad:
        raise ValueError("losses have no graph: were they computed under no_grad, or from a detached z?")
    constant = torch.as_tensor(scale, dtype=vector.dtype, device=vector.device)
    seeds = constant.expand_as(vector)
    if weights is not None:
        if where is not None:
            raise ValueError("weights= is for copies, which keep their gradients; at where=, call before backward()")
        if weights.shape != vector.shape:
            raise ValueError(wrong_count(vector.shape[0], weights.shape[0]))
        seeds = seeds * weights.detach().to(vector)
    stats = TaskStats(losses=vector.detach(), num_examples=torch.as_tensor(num_examples))
    if where is not None:
        return _at_parameters(stats, losses, where, constant)
    tasks = [tree.flatten(copy)[0] for copy in _checked(copies, losses, vector.shape[0])]
    flat = [leaf for leaves in tasks for leaf in leaves]
    if weights is not None:
        found = [leaf.grad for leaf in flat]
        if all(grad is None for grad in found):
            raise ValueError("no gradient has come to the copies: call backward() first, or leave weights out")
    else:
        if not all(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in flat):
            raise ValueError("the copies have no graph: was the backbone run under no_grad, or is it frozen?")
        # One pass: a copy is read by its own task alone.
        found = list(torch.autograd.grad(vector, flat, seeds, retain_graph=True, allow_unused=True))
        for leaf in flat:
            leaf.grad = None  # kept from this pass too, and the backward pass of the step would add to it
        if all(grad is None for grad in found):
            raise ValueError(
                "no loss depends on its copy of z: are the copies those that the heads were given? A wrapper may have "
                "replaced them on the way out (Accelerate does so with bfloat16: fork z.float(); DDP with "
                "find_unused_parameters)"
            )
    filled = [whole(torch.zeros_like(x) if g is None else g) for x, g in zip(flat, found, strict=True)]
    width = len(tasks[0])
    norms, example_norms = _norms_at_z([filled[k::width] for k in range(width)])
    size = seeds.detach().abs()
    return stats._replace(grad_norms=_unweighted(norms, size), example_norms=_unweighted(example_norms, size))


def measure_from(
    z: Any,
    params: Mapping[str, Any],
    loss_fn: LossFn,
    batch: Any,
    *,
    weights: Tensor | None = None,
    where: Where = None,
    **keywords: Any,
) -> Any:
    r"""`measure` from z upwards: the heads as functions, on a z that any module computed under plain autograd.

    ::

        z = backbone(batch["x"])                                            # DDP, FSDP2, compiled, checkpointed
        stats, cotangent = gn.measure_from(z, params, loss_fn, batch, weights=state.weights, num_examples=n)
        stats = reduce(stats)                                               # the mean over ranks; `grads` with it
        state, info = balancer.balance(state, stats)
        gn.backward_from(z, cotangent, scale=n * num_ranks / stats.num_examples)
        gn.write_grads(params, stats.grads)

    A balancer whose weights are those of the same step (`fixed_ratio`) calls it twice: without `weights` for the stats,
    then with `weights=info.weights, norms=False`. Both times only the heads run.

    Args:
        z: a tensor or pytree of tensors, with its graph. Where `loss_fn` has a `last_shared`, what goes into it.
        params: dict of what the heads and `last_shared` read.
        loss_fn: a `multi_task_loss`. Its backbone is not called.
        batch, weights, where: as in `measure`; W are parameters in `params`, or z.
        keywords: the other ones of `measure`.

    Returns:
        (stats, cotangent): TaskStats with `grads` in the structure of params, and Σ w_i ∂L_i/∂z of this batch in the
        structure and dtypes of z, `()` without weights. With `has_aux`, (stats, cotangent, aux). Nothing is written:
        if `info.finite` is False, leave `backward_from` and the optimizer's step out.

    Raises:
        ValueError: for a z without a graph or from inside a torch.func transform, a loss without a seam, params that
            are no dict; and as `measure` does.

    Example:
        >>> import torch, gradnorm_func as gn
        >>> backbone = torch.nn.Linear(3, 2)
        >>> loss_fn = gn.multi_task_loss(
        ...     lambda params, batch: backbone(batch),
        ...     [lambda params, z, batch: (z @ params["a"]).mean(), lambda params, z, batch: 5 * z.sum()],
        ... )
        >>> z = backbone(torch.ones(1, 3))
        >>> stats, cotangent = gn.measure_from(z, {"a": torch.ones(2)}, loss_fn, None, weights=torch.ones(2))
        >>> gn.backward_from(z, cotangent)
        >>> backbone.bias.grad
        tensor([6., 6.])
    """
    if not isinstance(loss_fn, MultiTaskLoss) or loss_fn.backbone is None:
        raise ValueError("measure_from needs a loss with a seam: gn.multi_task_loss(backbone, heads), with a backbone")
    if not isinstance(params, Mapping):
        raise ValueError(f"params={type(params).__name__} must be a dict of what the heads read, by path")
    leaves = tree.flatten(z)[0]
    if not torch.compiler.is_compiling() and tree.inside_transform():
        raise ValueError("z is inside a torch.func transform, where backward() does not work: use gn.measure")
    if not any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in leaves):
        raise ValueError("z has no graph: was the backbone run under no_grad? If it is frozen, gn.measure is enough")
    given = MultiTaskLoss(
        (lambda p, batch: (p[_Z], ())) if loss_fn.has_aux else (lambda p, batch: p[_Z]),
        loss_fn.heads, loss_fn.last_shared, loss_fn.has_aux,
    )  # fmt: skip
    if not torch.compiler.is_compiling():  # which neither needs nor traces it
        given.ownership = loss_fn.ownership  # a memo by structure of params, which _Z makes another one
    heads_only = (lambda path: path.split(".")[0] != _Z and where(path)) if callable(where) else where
    out = measure({**params, _Z: z}, given, batch, weights=weights, where=heads_only, **keywords)
    stats, aux = out if loss_fn.has_aux else (out, ())
    cotangent: Any = ()
    if weights is not None:
        cotangent = stats.grads[_Z]
        stats = stats._replace(grads={name: stats.grads[name] for name in params})
    return (stats, cotangent, aux) if loss_fn.has_aux else (stats, cotangent)


def backward_from(z: Any, cotangent: Any, *, scale: float | Tensor = 1.0) -> None:
    r"""Carries a gradient at z on into the module that computed it, whose parameters get their `.grad`.

    Args:
        z: as given to `measure_from`.
        cotangent: from there.
        scale: DDP and FSDP2 average over the R ranks, so with batches of different sizes n_r it is R n_r / Σ n_r; with
            micro-batches, n_r is the size of this one and the sum goes over them all.

    Raises:
        ValueError: for a cotangent that is `()`, or not in the structure of z.

    Example:
        >>> import torch, gradnorm_func as gn
        >>> x = torch.ones(2, requires_grad=True)
        >>> gn.backward_from({"a": 3 * x, "b": torch.ones(1)}, {"a": torch.ones(2), "b": torch.ones(1)}, scale=2.0)
        >>> x.grad
        tensor([6., 6.])
    """
    leaves, treedef = tree.flatten(z)
    grads, grad_treedef = tree.flatten(cotangent)
    if treedef != grad_treedef:
        raise ValueError(
            "cotangent does not have the structure of z: it is the second result of measure_from(..., weights=w), "
            "and () without weights"
        )
    pairs = [(leaf, scale * grad) for leaf, grad in zip(leaves, grads, strict=True) if leaf.requires_grad]
    torch.autograd.backward([leaf for leaf, _ in pairs], [grad.to(leaf.dtype) for leaf, grad in pairs])


def _checked(copies: Any, losses: Any, count: int) -> list[Any]:
    """The copies in task order."""
    if isinstance(copies, Mapping):
        names, found = sorted(copies), task_names(losses)
        if names != found:
            raise ValueError(f"the copies are for the tasks {names}, but the losses are {found}")
        return [copies[name] for name in names]
    if isinstance(copies, Tensor) or len(copies) != count:
        size = "one tensor" if isinstance(copies, Tensor) else f"{len(copies)} of them"
        raise ValueError(f"copies: {size}, for {count} losses; they are what gn.fork(z, {count}) returned")
    return list(copies)


def _at_parameters(stats: TaskStats, losses: Any, where: Any, scale: Tensor) -> TaskStats:
    """One task after the other: each pass goes through its own head and what lies between that and W."""
    terms = [whole(loss) for loss in (losses.unbind() if isinstance(losses, Tensor) else tree.flatten(losses)[0])]
    leaves, treedef = tree.flatten(where)
    rows = [
        torch.autograd.grad(loss, leaves, scale.to(loss.dtype), retain_graph=True, allow_unused=True)
        if loss.requires_grad
        else [None] * len(leaves)
        for loss in terms
    ]
    unread = [all(row[k] is None for row in rows) for k in range(len(leaves))]
    if all(unread) or any(unread[k] for k in sharded(leaves)):
        raise ValueError(
            f"no loss depends on where[{tree.paths(where)[unread.index(True)]!r}]: if that is a parameter of an FSDP2 "
            "module, the graph does not end at it, so keep W outside of the wrapper, or take the norms at z (gn.fork)"
        )
    filled = []
    for k, leaf in enumerate(leaves):
        column = [torch.zeros_like(leaf) if grad is None else grad for grad in (row[k] for row in rows)]
        filled.append(torch.stack([whole(grad) / scale for grad in column]))
    return stats._replace(grad_norms=row_norms(filled), task_grads=tree.unflatten(treedef, filled))
