"""Bridges to the stateful world: `.grad` for torch.optim, buffers, checkpoints.

The one module that writes to its arguments, and only in `write_grads` and `write_buffers`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from gradnorm_func._core import tree
from gradnorm_func._core.numerics import all_finite, brought
from gradnorm_func._core.trained import Trained, apart
from gradnorm_func._core.tree import Tensors
from gradnorm_func._tools.substitute import unset_buffers

State = TypeVar("State", bound=Tensors)


def write_grads(
    target: nn.Module | Iterable[Tensor] | Tensors, grads: Tensors, *, finite: Tensor | bool | None = None
) -> None:
    r"""Writes gradients into `.grad`, for any `torch.optim` optimizer to step on.

    As after `backward`: every `.grad` has memory of its own, parameters that are frozen have none, and one parameter at
    several places has the sum. Frozen is what does not require grad, unless all of `target` are plain tensors that do
    not.

    Args:
        target: a module, the dict of its named parameters, or any pytree of leaf tensors.
        grads: gradients in the structure of the params that they were taken of; for a module, a dict by name.
        finite: `info.finite`: if it is False, or a gradient here is not finite (behind W no norm has shown it), zeros
            are written, so that no NaN reaches the optimizer, and nothing waits for the device. (Momentum still moves
            the parameters. `if info.finite:` around the step leaves it out, and waits.) Not with a `GradScaler`, which
            is to see what is not finite.

    Raises:
        ValueError: if the structures or shapes differ, or if all is frozen.

    Example:
        >>> import torch, gradnorm_func as gn
        >>> model = torch.nn.Linear(2, 1)
        >>> model.bias.requires_grad_(False)
        Parameter containing:...
        >>> gn.write_grads(model, {"weight": torch.ones(1, 2), "bias": torch.ones(1)})
        >>> model.weight.grad, model.bias.grad
        (tensor([[1., 1.]]), None)
    """
    if isinstance(grads, nn.Module):
        raise ValueError(f"target={type(target).__name__}, grads={type(grads).__name__}: the order is (target, grads)")
    if type(grads) is tuple and len(grads) > 2 and hasattr(grads[1], "weights"):
        raise ValueError("grads=tuple is all that the balancer returned: give grads, the first of the result")
    params, leaves, grad_leaves = _matched(target, grads)
    for path, leaf, grad in zip(tree.paths(params), leaves, grad_leaves, strict=True):
        if leaf.shape != grad.shape:
            raise ValueError(f"grads[{path!r}] has shape {tuple(grad.shape)}, the parameter {tuple(leaf.shape)}")
    places = Trained.of(leaves)
    new = [grad.detach() for grad in places.sums(grad_leaves)]
    if finite is not None:
        finite = all_finite(new) & brought(finite, new[0], torch.bool)
        new = [torch.where(brought(finite, grad, torch.bool), grad, 0.0) for grad in new]
    for leaf in leaves:
        leaf.grad = None
    for i, grad in zip(places.moved, apart(new), strict=True):
        leaf, grad = leaves[i], grad.to(leaves[i].dtype)
        # In the layout of the parameter, as autograd would write it: fused optimizers read the memory as it lies.
        leaf.grad = grad if grad.stride() == leaf.stride() else torch.empty_like(leaf).copy_(grad)


def _matched(target: Any, grads: Any) -> tuple[Any, list[Tensor], list[Tensor]]:
    """The parameters that the gradients are of, and the leaves of both."""
    params = dict(target.named_parameters()) if isinstance(target, nn.Module) else target
    params = list(params) if isinstance(params, Iterator) else params  # model.parameters()
    if isinstance(target, nn.Module) and isinstance(grads, Mapping) and len(grads) > len(params):
        params = dict(target.named_parameters(remove_duplicate=False))  # tied parameters under all of their names
    leaves, treedef = tree.flatten(params)
    grad_leaves, grad_treedef = tree.flatten(grads)
    if treedef != grad_treedef:
        names, grad_names = tree.paths(params), tree.paths(grads)
        odd = sorted(set(names) ^ set(grad_names)) or names
        raise ValueError(f"grads and target differ at {odd[:4]}: take the gradients of the same params")
    return params, leaves, grad_leaves


def write_buffers(module: nn.Module, aux: Any, *, finite: Tensor | bool | None = None) -> None:
    r"""Writes new buffers into a module, such as the running statistics of batch norm, once a step was taken.

    ::

        trunk = gn.functional(model.trunk, "trunk", buffers=True)          # returns (z, new buffers)
        loss_fn = gn.multi_task_loss(lambda params, batch: trunk(params, batch["x"]), heads, has_aux=True)
        grads, state, info, aux = balancer.grad(state, params, loss_fn, batch, has_aux=True)
        gn.write_grads(model, grads)
        gn.write_buffers(model, aux, finite=info.finite)

    Args:
        module: the whole model.
        aux: any pytree in which dicts hold tensors under names of the module's buffers, such as the aux of a step; what
            has another name is left alone.
        finite: `info.finite`: if it is False, the buffers stay as they were, and nothing waits for the device: the
            statistics of a batch with a NaN would be NaN for ever.

    Raises:
        ValueError: if aux holds no buffer of the module, or two values for one: two calls of a part in one loss, and
            micro-batches, start from the same buffers. Give the second `params | buffers` of the first.

    Example:
        >>> import torch, gradnorm_func as gn
        >>> model = torch.nn.BatchNorm1d(2)
        >>> out, buffers = gn.functional(model, buffers=True)(dict(model.named_parameters()), torch.ones(3, 2))
        >>> gn.write_buffers(model, buffers)
        >>> model.num_batches_tracked
        tensor(1)
    """
    buffers, empty = dict(module.named_buffers()), unset_buffers(module)
    new: dict[str, Tensor] = {}
    for name, value in _named_tensors(aux):
        if name in new and (name in buffers or name in empty):
            raise ValueError(
                f"aux has two values for the buffer {name!r}: both calls started from the same buffers. Give the "
                "second `params | buffers` of the first, or, for micro-batches, use buffers=False and eval() or "
                "group norm"
            )
        new[name] = value
    unset = {name: place for name, place in empty.items() if name in new}
    names = [name for name in buffers if name in new]
    if not names and not unset:
        raise ValueError(
            f"aux holds none of the module's buffers {list(buffers)[:4]}: return those that gn.functional(part, "
            "prefix, buffers=True) gives, with the part's path in this module as prefix"
        )
    with torch.no_grad():
        for name in names:
            value, old = new[name], buffers[name]
            old.copy_(value if finite is None else torch.where(brought(finite, old, torch.bool), value, old))
    for name, (holder, key) in unset.items() if finite is None or bool(finite) else ():  # that were None, at first
        holder[key] = new[name].detach().clone()


def _named_tensors(aux: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors that stand in dicts anywhere in aux, with their keys."""
    if isinstance(aux, Mapping):
        yield from ((name, value) for name, value in aux.items() if isinstance(value, Tensor))
    children = aux.values() if isinstance(aux, Mapping) else aux if isinstance(aux, (list, tuple)) else ()
    for child in children:
        yield from _named_tensors(child)


def state_dict(state: Tensors) -> dict[str, Tensor]:
    r"""A state as a flat dict of tensors, which `torch.save` writes and `torch.load(weights_only=True)` reads.

    Args:
        state: the state of any balancer.

    Returns:
        dict from dotted path to a copy of the tensor.

    Example:
        >>> import gradnorm_func as gn
        >>> sorted(gn.state_dict(gn.init_state(2)))[:3]
        ['initial_losses', 'moments.mean', 'moments.square']
    """
    return {path: leaf.detach().clone() for path, leaf in zip(tree.paths(state), tree.flatten(state)[0], strict=True)}


def load_state(template: State, saved: Mapping[str, Tensor]) -> State:
    r"""The state that `state_dict` wrote, bit for bit.

    Args:
        template: a state of the same balancer, tasks and optimizer, such as a fresh `init_state(...)`; its device
            and dtype are those of the result.
        saved: what `state_dict` returned.

    Returns:
        A state of the type of `template`.

    Raises:
        ValueError: if names or shapes differ. Two methods that keep the same fields cannot be told apart.

    Example:
        >>> import torch, gradnorm_func as gn
        >>> state = gn.init_state(2, weights=[0.5, 1.5])
        >>> gn.load_state(gn.init_state(2), gn.state_dict(state)).weights
        tensor([0.5000, 1.5000])
    """
    if not isinstance(saved, Mapping):
        raise ValueError(
            f"template={type(template).__name__}, saved={type(saved).__name__}: the order is (template, saved): a "
            "fresh state of the balancer, and what gn.state_dict(state) gave"
        )
    names, (leaves, treedef) = tree.paths(template), tree.flatten(template)
    if set(names) != set(saved):
        odd = sorted(set(names) ^ set(saved))
        raise ValueError(
            f"the checkpoint and the template differ in {odd}: make the template with the same balancer and optimizer"
        )
    for name, leaf in zip(names, leaves, strict=True):
        if saved[name].shape != leaf.shape:
            raise ValueError(
                f"checkpoint entry {name!r} has shape {tuple(saved[name].shape)}, the template {tuple(leaf.shape)}: "
                "was it made for another number of tasks?"
            )
    new = [
        saved[name].to(dtype=leaf.dtype, device=leaf.device, copy=True)
        for name, leaf in zip(names, leaves, strict=True)
    ]
    state: State = tree.unflatten(treedef, new)
    return state
