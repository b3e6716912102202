"""Tasks: their names, their order, and what has one number for each of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any, TypeAlias, TypeGuard

import torch
from torch import Tensor

from gradnorm_func._core import tree
from gradnorm_func._core.loss import MultiTaskLoss, StackedHeads
from gradnorm_func._core.numerics import brought
from gradnorm_func._core.tracing import free_to_ask
from gradnorm_func._core.tree import PyTree

# What names the tasks, or has a part for each of them: the loss with its seam, the losses, the heads, a list of names.
Tasks: TypeAlias = MultiTaskLoss | Mapping[str, Any] | torch.nn.ModuleDict | Sequence[Any] | Tensor


def task_names(tasks: PyTree) -> list[str]:
    """Names of the tasks, in the order of every per-task vector of this package.

    Keys of any mapping come sorted (as in JAX and optree), those of a set, too; lists, tuples and NamedTuples as they
    stand: a list of names is taken to be in task order.

    Args:
        tasks: a `multi_task_loss`; a (T,) tensor; a list of names; or a pytree of T leaves: the losses, the dict of
            heads, or anything of that shape.

    Returns:
        T dotted paths; the indices "0" ... "T-1" for a tensor.

    Raises:
        ValueError: for a function, the tasks of which are not known before it is called.

    Example:
        >>> import gradnorm_func as gn
        >>> gn.task_names({"seg": 0.0, "depth": 0.0})
        ['depth', 'seg']
    """
    if isinstance(tasks, Tensor):
        return [str(i) for i in range(tasks.numel())]
    if isinstance(tasks, MultiTaskLoss) and not isinstance(tasks.heads, StackedHeads):
        return [str(name) for name in tasks.names or range(len(tasks.functions))]
    if isinstance(tasks, AbstractSet):  # a dict's keys() are one
        tasks = dict.fromkeys(tasks, 0)
    if isinstance(tasks, (list, tuple)) and tasks and all(isinstance(name, str) for name in tasks):
        return list(tasks)
    if not isinstance(tasks, (Mapping, list, tuple, torch.nn.Module)) and callable(tasks):
        raise ValueError(
            f"the tasks of {getattr(tasks, '__name__', type(tasks).__name__)} are not known before it is called: "
            "give the losses, loss_fn(params, batch), or a list of names"
        )
    return tree.paths(tree.by_key(tasks))


def by_name(tasks: PyTree, values: Tensor) -> dict[str, Tensor]:
    """Numbers of the tasks, each under the name of its task.

    Args:
        tasks: what `task_names` takes: the `multi_task_loss`, the losses, the heads, a list of names.
        values: (T, ...) in task order, such as `state.weights` or `info.grad_norms`.

    Returns:
        dict from name to value, () for values (T,).

    Raises:
        ValueError: if they are not as many as the tasks.

    Example:
        >>> import torch, gradnorm_func as gn
        >>> gn.by_name({"seg": 0.0, "depth": 0.0}, torch.tensor([0.5, 1.5]))
        {'depth': tensor(0.5000), 'seg': tensor(1.5000)}
    """
    names = task_names(tasks)
    if not isinstance(values, Tensor):
        raise ValueError(
            f"values={type(values).__name__} must be a (T, ...) tensor such as info.weights; the order of arguments is "
            "(tasks, values)"
        )
    if len(names) != values.shape[0]:
        raise ValueError(f"values has {values.shape[0]} entries, but there are {len(names)} tasks: {names}")
    return dict(zip(names, values.unbind(), strict=True))


def weighted_sum(losses: PyTree, weights: Any) -> Tensor:
    r"""The total loss :math:`\sum_i w_i L_i`, each loss with the weight of its own task.

    `zip(losses.values(), weights)` would pair the order in which the dict was written with the sorted one.

    Args:
        losses: T scalars: a (T,) tensor, or a pytree such as the dict of tasks.
        weights: (T,) in task order, such as `info.weights`; or a pytree like the losses.

    Returns:
        () the sum, with the graph of the losses; no gradient flows into the weights.

    Raises:
        ValueError: if the weights are not as many as the losses, or are given under other names.

    Example:
        >>> import torch, gradnorm_func as gn
        >>> gn.weighted_sum({"seg": torch.tensor(1.0), "depth": torch.tensor(10.0)}, torch.tensor([0.5, 2.0]))
        tensor(7.)
    """
    if hasattr(weights, "weights"):  # an Info, or a state
        raise ValueError(f"weights={type(weights).__name__}: give its weights, gn.weighted_sum(losses, info.weights)")
    if isinstance(losses, Tensor) and isinstance(weights, Mapping):
        raise ValueError("losses is a tensor, and weights a dict: the order of arguments is (losses, weights)")
    vector = task_vector(losses)
    return (weights_like(vector, losses, weights) * vector).sum()


def weights_like(vector: Tensor, losses: PyTree, weights: Any) -> Tensor:
    """(T,) the weights of the losses, of which `vector` is the tensor: in task order, of its dtype, without a graph."""
    w = brought(task_vector(in_task_order(losses, "weights", weights), "weights", vector.dtype).detach(), vector)
    if w.shape != vector.shape:
        raise ValueError(f"weights has {w.shape[0]} entries, but there are {vector.shape[0]} losses")
    return w


def in_task_order(tasks: PyTree, argument: str, entries: Any) -> Any:
    """What was given by name, as a list in the order of the tasks, under whose names it must be; all else as it is."""
    if not _is_named(entries):
        return entries
    names, keys = _matching_names(tasks, argument, entries)
    by_path = dict(zip(keys, tree.flatten(tree.by_key(entries))[0], strict=True))
    return [by_path[name] for name in names]


def check_named(tasks: PyTree, **named: Any) -> None:
    """Compares what was given by name, and went into the order of its own names, with the names of the tasks; what was
    not is in task order."""
    for argument, entries in named.items():
        if not _is_named(entries):
            continue
        names, keys = _matching_names(tasks, argument, entries)
        if keys != names:
            raise ValueError(
                f"{argument} was given by name, and is in the order {keys}, but that of the tasks is {names}: give a "
                "list in that order"
            )


def _matching_names(tasks: PyTree, argument: str, entries: Any) -> tuple[list[str], list[str]]:
    """The names of the tasks and those of the entries, each in its own order; they must be the same."""
    names, keys = task_names(tasks), task_names(entries)
    if sorted(keys) != sorted(names):
        raise ValueError(
            f"{argument} has the names {sorted(keys)}, but the tasks are {names}: give one entry for each task, under "
            "its own name"
        )
    return names, keys


def _is_named(entries: Any) -> bool:
    return isinstance(entries, Mapping) or hasattr(entries, "_fields")


# A (T,) tensor of losses that plain autograd has measured remembers the names of its tasks as an attribute, so that
# what is given by name later can be compared with them.
NAMES, CUT_OFF = "_task_names", "_cut_off"


def remember_names(vector: Tensor, tasks: PyTree) -> None:
    """Lets a tensor know whose numbers it holds, if they have names; a compiler does not ask."""
    if _is_named(tasks) and not torch.compiler.is_compiling():
        setattr(vector, NAMES, task_names(tasks))


def remember_cut_off(vector: Tensor, names: list[str]) -> None:
    """Lets a tensor of losses know which of them have no graph, for whoever knows which tasks are present."""
    setattr(vector, CUT_OFF, names)


def keep_memory(vector: Any, parts: Sequence[Any], *, whole: bool = True) -> None:
    """Lets losses that were made of others know what those have remembered; `whole`: of no more than these."""
    if torch.compiler.is_compiling() or not isinstance(vector, Tensor):
        return
    names = [remembered_names(part) for part in parts]
    if names[0] is not None and all(row == names[0] for row in names):
        setattr(vector, NAMES, names[0])
    cut_off = set.intersection(*(set(getattr(part, CUT_OFF, [])) for part in parts))
    if cut_off and whole:
        remember_cut_off(vector, sorted(cut_off))


def refuse_cut_off(vector: Any, active: Tensor | None) -> None:
    """Refuses losses without a graph of tasks that are present, if that is known and costs nothing to ask."""
    cut_off = [] if torch.compiler.is_compiling() else getattr(vector, CUT_OFF, [])
    if not cut_off or (active is not None and not free_to_ask(active)):
        return
    names = remembered_names(vector) or task_names(vector)
    present = cut_off if active is None else [n for n, here in zip(names, active.tolist(), strict=True) if here]
    wrong = [repr(name) for name in cut_off if name in present]
    if wrong:
        raise ValueError(
            f"losses without a gradient: {', '.join(wrong)}. Return the 0-d tensor, not .item(), float() or .detach() "
            "of it; a task that is absent from a batch is left out by mask="
        )


def remembered_names(vector: Any) -> list[str] | None:
    """Whose numbers they are, if it is known."""
    return None if torch.compiler.is_compiling() else getattr(vector, NAMES, None)


def task_vector(losses: PyTree, name: str = "losses", dtype: torch.dtype | None = None) -> Tensor:
    """Losses, or any other per-task numbers, as one (T,) tensor; refuses what is not T scalars.

    `dtype` is for plain numbers alone, which would otherwise lose digits on their way to float64.
    """
    if isinstance(losses, Tensor):
        return _vector(losses, name)
    if are_scalars(losses):
        return torch.stack(losses)
    losses = tree.by_key(losses)
    if hasattr(losses, "__array__"):  # numpy
        return _vector(torch.as_tensor(losses, dtype=dtype), name)
    if absent := tree.nones(losses):
        raise ValueError(
            f"{name}[{absent[0]!r}] is None: its function returned nothing, so let it return the loss; a task that is "
            "absent from a batch returns any number, and is left out by mask="
        )
    leaves, _ = tree.flatten(losses)
    tensors = [leaf if isinstance(leaf, Tensor) else torch.as_tensor(leaf, dtype=dtype) for leaf in leaves]
    for i, leaf in enumerate(tensors):
        if leaf.ndim != 0:
            raise ValueError(
                f"{name}[{tree.paths(losses)[i]!r}] has shape {tuple(leaf.shape)}; a loss is one scalar: take its "
                "mean() or sum()"
            )
    if not tensors:
        raise ValueError(f"{name} is empty: return one scalar per task")
    return torch.stack(tensors)


def _vector(losses: Tensor, name: str) -> Tensor:
    if losses.ndim == 0:
        raise ValueError(
            f"{name} is a single scalar, so there is nothing to balance: "
            "return one scalar per task (a dict, a list, or a (T,) tensor), not their sum"
        )
    if losses.ndim != 1:
        raise ValueError(f"{name} has shape {tuple(losses.shape)}: reduce it to one scalar per task, shape (T,)")
    return losses


def are_scalars(values: Any) -> TypeGuard[list[Tensor]]:
    """Is this a list of 0-d tensors, as losses should be?"""
    if not isinstance(values, list) or not values:
        return False
    # A list, for torch 2.10 does not trace all() of a generator here.
    return all([isinstance(x, Tensor) and x.ndim == 0 for x in values])  # noqa: C419


def per_task(entries: Any, name: str, like: Tensor) -> Tensor:
    """(T,) an argument with a number for each task, as `like` is; None is 1 for all of them."""
    if entries is None:
        return torch.ones_like(like)
    vector = brought(task_vector(entries, name, like.dtype), like)
    if vector.shape != like.shape:
        raise ValueError(f"{name} has {vector.shape[0]} entries, but there are {like.shape[0]} tasks")
    return vector


def wrong_count(count: int, expected: int) -> str:
    """What to say when the losses are not as many as the weights."""
    if count < 2:
        return f"loss_fn returned {count} loss: there is nothing to balance, return one scalar per task"
    return (
        f"loss_fn returned {count} losses, but the state was made for {expected} tasks: "
        f"init_state({count}) makes one for them; a task absent from some batches is what mask= is for"
    )
