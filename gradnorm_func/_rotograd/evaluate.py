"""RotoGrad after training: one task end to end, and rotations folded into linear heads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gradnorm_func._core import tree
from gradnorm_func._core.loss import MultiTaskLoss, StackedHeads
from gradnorm_func._core.tasks import task_names
from gradnorm_func._rotograd.rotation import Layout
from gradnorm_func._rotograd.settings import RotoGradState, layout_of


def rotograd_task_fn(
    loss_fn: MultiTaskLoss,
    *,
    heads: Any = None,
    rotation_shape: int | tuple[int, ...] | None = None,
    trailing_shape: int | tuple[int, ...] = (),
    rotate: str | None = None,
) -> Callable[[Any, RotoGradState, str | int], Callable[[Any], Any]]:
    r"""Evaluation: one task end to end, its rotation folded in.

    Args:
        loss_fn: the `multi_task_loss` that was trained.
        heads: what to evaluate in place of its heads, in the same structure: functions (params, z, batch) -> anything,
            such as predictions. None is the heads themselves: losses, with their aux if they have one.
        rotation_shape, trailing_shape, rotate: as in `rotograd`; the default shape is that of the state.

    Returns:
        `task_fn(params, state, task) -> fn`, task being a name or an index, with `fn(batch)` what the task's head
        returns for R_k z.

    Raises:
        ValueError: for a loss_fn without a seam, or a task that it does not have.

    Example:
        >>> import torch, gradnorm_func as gn
        >>> loss_fn = gn.multi_task_loss(
        ...     lambda w, x: x * w, {"a": lambda w, z, x: z[:, 0].sum(), "b": lambda w, z, x: z[:, 1].sum()})
        >>> task_fn = gn.rotograd_task_fn(loss_fn, heads={"a": lambda w, z, x: z[:, 0], "b": lambda w, z, x: z[:, 1]})
        >>> predict = task_fn(torch.ones(2), gn.rotograd(2).init(2), "b")
        >>> predict(torch.tensor([[3.0, 4.0]]))
        tensor([4.])
    """
    if not isinstance(loss_fn, MultiTaskLoss) or loss_fn.backbone is None:
        raise ValueError(
            f"loss_fn={loss_fn!r} has no seam: give the gn.multi_task_loss(backbone, heads) that was trained"
        )

    def task_fn(params: Any, state: RotoGradState, task: str | int) -> Callable[[Any], Any]:
        layout = _layout(state, rotation_shape, trailing_shape, rotate)
        functions = loss_fn.heads if heads is None else heads
        stacked = isinstance(functions, StackedHeads)
        count = state.rotations.shape[0]
        index = _index(task, [str(k) for k in range(count)] if stacked else task_names(functions))

        def fn(batch: Any) -> Any:
            z, _, _ = loss_fn.shared(params, batch)
            leaves, treedef = tree.flatten(z)
            i = layout.leaf(leaves, treedef)
            leaves[i] = layout.spread(leaves[i], state.rotations[index : index + 1].to(leaves[i].dtype))[0]
            z = tree.unflatten(treedef, leaves)
            if isinstance(functions, StackedHeads):  # all of them, for only vmap knows the task's part of the batch
                out = functions(params, z, batch)
                return tree.tree_map(lambda leaf: leaf[index], out)
            in_order = [functions[name] for name in sorted(functions)] if isinstance(functions, Mapping) else functions
            return in_order[index](params, z, batch)

        return fn

    return task_fn


def fold_rotations(
    params: Any,
    state: RotoGradState,
    weights: str | Sequence[str] | Mapping[str, str],
    *,
    trailing_shape: int | tuple[int, ...] = (),
) -> Any:
    r"""Parameters whose heads take z itself: :math:`W_k \leftarrow W_k (R_k \oplus I)` in every head's first layer.

    The folded parameters go with the plain `multi_task_loss`, and the rotations are no longer needed.

    Args:
        params: the trained parameters.
        state: the trained rotations.
        weights: the paths of the T weights that z meets first: a dict by task or a list in task order, of shape
            (out, features) of a linear layer or (out, channels, ...) of a convolution; or the one path of stacked
            heads' weight, (T, out, features).
        trailing_shape: as in `rotograd`; needed if a linear layer reads z flattened over it.

    Returns:
        params with the T weights replaced.

    Raises:
        ValueError: for a path that is not there, a wrong number of them, or a weight that does not fit.

    Example:
        >>> import torch, gradnorm_func as gn
        >>> quarter = torch.tensor([[0.0, -1.0], [1.0, 0.0]])
        >>> state = gn.rotograd(2).init(2, rotations=torch.stack([quarter, torch.eye(2)]))
        >>> params = {"a": torch.tensor([[1.0, 2.0]]), "b": torch.tensor([[1.0, 2.0]])}
        >>> gn.fold_rotations(params, state, ["a", "b"])["a"]
        tensor([[ 2., -1.]])
    """
    leaves, treedef = tree.flatten(params)
    names = tree.paths(params)
    trailing = (trailing_shape,) if isinstance(trailing_shape, int) else tuple(trailing_shape)
    named = [weights] if isinstance(weights, str) else tree.flatten(weights)[0]
    if not isinstance(weights, str) and len(named) != state.rotations.shape[0]:
        raise ValueError(f"weights names {len(named)} paths, but there are {state.rotations.shape[0]} tasks")
    for k, path in enumerate(named):
        tree.lookup(params, path)  # refuses a path that is not there, with near matches
        i = names.index(path)
        if isinstance(weights, str):
            if leaves[i].shape[0] != state.rotations.shape[0]:
                raise ValueError(f"params[{path!r}] has shape {tuple(leaves[i].shape)}; stacked heads have T first")
            parts = [_fold(w, r, trailing, path) for w, r in zip(leaves[i], state.rotations, strict=True)]
            leaves[i] = torch.stack(parts)
        else:
            leaves[i] = _fold(leaves[i], state.rotations[k], trailing, path)
    return tree.unflatten(treedef, leaves)


def _fold(weight: Tensor, rotation: Tensor, trailing: tuple[int, ...], path: str) -> Tensor:
    """W (R ⊕ I), over the second axis of W."""
    m, behind = rotation.shape[0], torch.Size(trailing).numel()
    split = weight.ndim == 2 and behind > 1
    if weight.ndim < 2 or (split and weight.shape[1] % behind) or weight.shape[1] // (behind if split else 1) < m:
        raise ValueError(
            f"params[{path!r}] has shape {tuple(weight.shape)}: its second axis must be the features of z, at least "
            f"the {m} rotated ones (times trailing_shape={trailing}, if they are flattened)"
        )
    blocks = weight.reshape(weight.shape[0], -1, behind) if split else weight
    turned = torch.einsum("oi...,ij->oj...", blocks[:, :m], rotation.to(weight.dtype))
    return torch.cat([turned, blocks[:, m:]], dim=1).reshape(weight.shape)


def _layout(
    state: RotoGradState,
    rotation_shape: int | tuple[int, ...] | None,
    trailing_shape: int | tuple[int, ...],
    rotate: str | None,
) -> Layout:
    shape = state.rotations.shape[-1] if rotation_shape is None else rotation_shape
    return layout_of(shape, trailing_shape, rotate)


def _index(task: str | int, names: list[str]) -> int:
    if isinstance(task, int) and 0 <= task < len(names):
        return task
    if task not in names:
        raise ValueError(f"task={task!r} is none of the tasks {names}")
    return names.index(task)
