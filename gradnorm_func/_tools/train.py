"""train: the loop, for those who need no other."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from gradnorm_func._balance.gradnorm import gradnorm
from gradnorm_func._balance.protocol import Balancer
from gradnorm_func._core import tree
from gradnorm_func._core.compiling import compiled as compiled  # sweep takes it from here
from gradnorm_func._core.loss import LossFn, task_vector
from gradnorm_func._tools.interop import write_grads


def train(
    params: Any,
    loss_fn: LossFn,
    batches: Iterable[Any],
    *,
    balancer: Balancer | None = None,
    optimizer: Callable[[list[Tensor]], torch.optim.Optimizer] | None = None,
    state: Any = None,
    mask: Callable[[Any], Any] | None = None,
    compile: bool = False,
    progress: bool = True,
) -> tuple[Any, Any, Any]:
    r"""Trains params on balanced losses, one step a batch.

    Args:
        params: pytree of tensors to start from; it is copied, not trained in place.
        loss_fn: as in `measure`, without aux.
        batches: any iterable: its end is the end of the training.
        balancer: `gn.gradnorm(...)` and the like; None is GradNorm with its defaults.
        optimizer: of the parameters: a function from the list of tensors to a `torch.optim` optimizer, such as
            `functools.partial(torch.optim.Adam, lr=1e-3)`; None is Adam at 1e-3.
        state: of the balancer, to go on from; None is a fresh one.
        mask: `mask(batch)`, the tasks present in a batch; None is all of them.
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
    chosen = gradnorm() if balancer is None else balancer
    treedef = tree.flatten(params)[1]
    leaves = [leaf.detach().clone() for leaf in tree.flatten(params)[0]]
    stepper = (lambda tensors: torch.optim.Adam(tensors, lr=1e-3)) if optimizer is None else optimizer
    torch_optimizer = stepper(leaves)  # steps in place, so that `current` is always up to date
    current = tree.unflatten(treedef, leaves)

    def grad(state: Any, current: Any, batch: Any, present: Any) -> Any:
        return chosen.grad(state, current, loss_fn, batch, mask=present)

    run = compiled(grad) if compile else grad
    history: list[Any] = []
    for batch in _bar(batches, progress):
        if state is None:
            state = _fresh_state(chosen, loss_fn, current, batch)
        grads, state, info = run(state, current, batch, None if mask is None else mask(batch))
        # A step that is not finite must not reach the parameters. Zeroed gradients would still move Adam's moments,
        # so the optimizer is not called at all; this is the loop's one wait for the device.
        if bool(getattr(info, "finite", True)):
            write_grads(current, grads)
            torch_optimizer.step()
        if not history:
            _warn_of_zeros(info)
        history.append(info)
    if not history:
        raise ValueError("batches is empty: there was nothing to train on (a generator can be used only once)")
    for leaf in leaves:
        leaf.grad = None
    return current, state, tree.tree_map(lambda *rows: torch.stack(rows), *history)


def _fresh_state(balancer: Balancer, loss_fn: LossFn, params: Any, batch: Any) -> Any:
    """A state for as many tasks as the loss has, in at least float32 and where the parameters are."""
    with torch.no_grad():
        losses = task_vector(loss_fn(params, batch))
    dtype = torch.promote_types(losses.dtype, torch.float32)
    return balancer.init(losses.shape[0], dtype=dtype, device=losses.device)


def _warn_of_zeros(info: Any) -> None:
    """A wrong W shows up as gradients of exactly zero, and nothing would be learned from them."""
    norms = getattr(info, "grad_norms", None)
    zero = [] if norms is None else (norms == 0).nonzero().flatten().tolist()
    if zero:
        warnings.warn(
            f"the gradients of tasks {zero} (indices in the order of gn.task_names) are exactly zero at W: "
            "does `where` name parameters that these losses depend on?",
            stacklevel=3,
        )


def _bar(batches: Iterable[Any], progress: bool, name: str = "train") -> Iterable[Any]:
    if not progress:
        return batches
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return batches
    bar: Iterable[Any] = tqdm(batches, desc=name, leave=False)
    return bar
