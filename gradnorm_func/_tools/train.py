"""train: the loop, for those who need no other."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any, TypeVar, overload

import torch
from torch import Tensor

from gradnorm_func._balance.algorithm1 import GradNormInfo, GradNormState
from gradnorm_func._balance.gradnorm import gradnorm
from gradnorm_func._balance.guard import I, S
from gradnorm_func._balance.protocol import Balancer
from gradnorm_func._core import tree
from gradnorm_func._core.compiling import compiled
from gradnorm_func._core.loss import LossFn
from gradnorm_func._core.progress import bar
from gradnorm_func._core.tasks import task_vector
from gradnorm_func._core.tree import Params
from gradnorm_func._measure.check import doubts
from gradnorm_func._tools.interop import write_grads

Batch = TypeVar("Batch")


@overload
def train(
    params: Params,
    loss_fn: LossFn,
    batches: Iterable[Batch],
    *,
    balancer: None = None,
    optimizer: Callable[[list[Tensor]], torch.optim.Optimizer] | None = None,
    state: GradNormState | None = None,
    mask: Callable[[Batch], Any] | None = None,
    compile: bool = False,
    progress: bool = True,
) -> tuple[Params, GradNormState, GradNormInfo]: ...


@overload
def train(
    params: Params,
    loss_fn: LossFn,
    batches: Iterable[Batch],
    *,
    balancer: Balancer[S, I],
    optimizer: Callable[[list[Tensor]], torch.optim.Optimizer] | None = None,
    state: S | None = None,
    mask: Callable[[Batch], Any] | None = None,
    compile: bool = False,
    progress: bool = True,
) -> tuple[Params, S, I]: ...


def train(
    params: Params,
    loss_fn: LossFn,
    batches: Iterable[Batch],
    *,
    balancer: Balancer[Any, Any] | None = None,
    optimizer: Callable[[list[Tensor]], torch.optim.Optimizer] | None = None,
    state: Any = None,
    mask: Callable[[Batch], Any] | None = None,
    compile: bool = False,
    progress: bool = True,
) -> tuple[Params, Any, Any]:
    r"""Trains params on balanced losses, one step a batch.

    Args:
        params: pytree of tensors to start from; it is copied, not trained in place.
        loss_fn: as in `measure`, without aux.
        batches: any iterable: its end is the end of the training.
        balancer: `gn.gradnorm(...)` or another balancer; default: GradNorm with its defaults.
        optimizer: the parameters' optimizer, as a function from the list of tensors to a `torch.optim` optimizer, such
            as `functools.partial(torch.optim.Adam, lr=1e-3)`; default: Adam at 1e-3.
        state: the balancer's state to go on from; default: a fresh one.
        mask: `mask(batch)`, the tasks that a batch has; default: all of them.
        compile: run losses, gradients and balancing as one compiled graph.
        progress: show a progress bar, if tqdm is installed.

    Returns:
        (params, state, history): the trained parameters, the balancer's state, and its Info stacked over the steps,
        every field (steps, ...). Steps in which `history.finite` is False left everything as it was.

    Raises:
        ValueError: if there are no batches, and as `measure` and `balance` do.

    Example:
        >>> import torch, gradnorm_func as gn
        >>> loss_fn = lambda w, x: {"fit": (x @ w - 1).square().mean(), "size": 100 * w.square().sum()}
        >>> w, state, history = gn.train(torch.full((3,), 0.5), loss_fn, [torch.eye(3)] * 50, progress=False)
        >>> history.weights.shape
        torch.Size([50, 2])
    """
    balancer = gradnorm() if balancer is None else balancer
    tree.check_params(params)
    leaves, treedef = tree.flatten(params)
    leaves = [leaf.detach().clone() for leaf in leaves]
    stepper = torch.optim.Adam(leaves, lr=1e-3) if optimizer is None else optimizer(leaves)
    current: Params = tree.unflatten(treedef, leaves)  # always up to date, for the stepper works in place

    def step(state: Any, current: Params, batch: Batch, tasks: Any, update: bool) -> Any:
        return balancer.grad(state, current, loss_fn, batch, mask=tasks, update=update)

    run = compiled(step) if compile else step
    history: list[Any] = []
    for batch in bar(batches, progress, "train"):
        if not history:
            first_doubts = doubts(loss_fn, current, batch, None if mask is None else mask(batch))
        if state is None:
            state = balancer.init(**init_arguments(loss_fn, current, batch))
        update = balancer.every == 1 or int(state.step) % balancer.every == 0  # a compiled step cannot ask
        grads, state, info = run(state, current, batch, None if mask is None else mask(batch), update)
        # A step that is not finite must not reach the parameters. Zeroed gradients would still move Adam's moments,
        # so the optimizer is not called at all; this is the loop's one wait for the device.
        if bool(info.finite):
            write_grads(current, grads)
            stepper.step()
            state = state if update else state._replace(step=state.step + 1)
        if not history:
            _warn(first_doubts + _of_zeros(info))
        history.append(info)
    if not history:
        raise ValueError("batches is empty: there was nothing to train on (a generator can be used only once)")
    for leaf in leaves:
        leaf.grad = None
    return current, state, tree.tree_map(lambda *rows: torch.stack(rows), *history)


def init_arguments(loss_fn: LossFn, params: Any, batch: Any) -> dict[str, Any]:
    """What a balancer's `init` is to be called with: as many tasks as the loss has, in at least float32, beside it."""
    with torch.no_grad():
        losses = task_vector(loss_fn(params, batch))
    dtype = torch.promote_types(losses.dtype, torch.float32)
    return {"num_tasks": losses.shape[0], "dtype": dtype, "device": losses.device}


def _of_zeros(info: Any) -> list[str]:
    """A wrong W shows up as gradients of exactly zero, and nothing would be learned from them."""
    norms = getattr(info, "grad_norms", None)
    zero = [] if norms is None else (norms == 0).nonzero().flatten().tolist()
    return (
        [
            f"the gradients of tasks {zero} (indices in the order of gn.task_names) are exactly zero at W: "
            "does `where` name parameters that these losses depend on?"
        ]
        if zero
        else []
    )


def _warn(doubts: list[str]) -> None:
    if doubts:
        warnings.warn("; ".join(doubts), stacklevel=3)
