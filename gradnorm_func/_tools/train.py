"""train: the loop, for those who need no other."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Generic, NamedTuple, TypeAlias, TypeVar, overload

import torch
from torch import Tensor, nn

from gradnorm_func._balance.algorithm1 import GradNormInfo, GradNormState
from gradnorm_func._balance.gradnorm import gradnorm
from gradnorm_func._balance.guard import I, S
from gradnorm_func._balance.protocol import Balancer
from gradnorm_func._core import tree
from gradnorm_func._core.compiling import compiled_once
from gradnorm_func._core.looking import only_looking
from gradnorm_func._core.loss import LossFn, MultiTaskLoss
from gradnorm_func._core.numerics import all_finite
from gradnorm_func._core.progress import Bar, bar
from gradnorm_func._core.tasks import task_names, task_vector
from gradnorm_func._core.trained import Trained
from gradnorm_func._core.tree import Params
from gradnorm_func._measure.check import doubts
from gradnorm_func._measure.plan import split_aux
from gradnorm_func._measure.reach import AUX
from gradnorm_func._tools.interop import write_buffers, write_grads

Batch = TypeVar("Batch")
MakeOptimizer: TypeAlias = Callable[[list[Tensor]], torch.optim.Optimizer]


class TrainResult(NamedTuple, Generic[Params, S, I]):
    """A training so far: what has come of it, and what it takes to go on."""

    params: Params  # the trained parameters
    state: S  # of the balancer
    history: I  # the balancer's Info, every field (steps, ...)
    optimizer_state: dict[str, Any]  # the `state_dict` of the parameters' optimizer


@overload
def train(
    params: Params,
    loss_fn: LossFn,
    batches: Iterable[Batch],
    *,
    balancer: None = None,
    optimizer: MakeOptimizer | None = None,
    state: GradNormState | None = None,
    optimizer_state: Mapping[str, Any] | None = None,
    mask: Callable[[Batch], Any] | None = None,
    buffers: nn.Module | None = None,
    compile: bool = False,
    progress: bool | None = None,
) -> TrainResult[Params, GradNormState, GradNormInfo]: ...


@overload
def train(
    params: Params,
    loss_fn: LossFn,
    batches: Iterable[Batch],
    *,
    balancer: Balancer[S, I],
    optimizer: MakeOptimizer | None = None,
    state: S | None = None,
    optimizer_state: Mapping[str, Any] | None = None,
    mask: Callable[[Batch], Any] | None = None,
    buffers: nn.Module | None = None,
    compile: bool = False,
    progress: bool | None = None,
) -> TrainResult[Params, S, I]: ...


def train(
    params: Params,
    loss_fn: LossFn,
    batches: Iterable[Batch],
    *,
    balancer: Balancer[Any, Any] | None = None,
    optimizer: MakeOptimizer | None = None,
    state: Any = None,
    optimizer_state: Mapping[str, Any] | None = None,
    mask: Callable[[Batch], Any] | None = None,
    buffers: nn.Module | None = None,
    compile: bool = False,
    progress: bool | None = None,
) -> TrainResult[Params, Any, Any]:
    r"""Trains params on balanced losses, one step a batch.

    To go on later, bit for bit as if it had not stopped (torch's random numbers are the caller's, as ever)::

        run = gn.train(params, loss_fn, first, optimizer=adam)
        run = gn.train(run.params, loss_fn, rest, optimizer=adam, state=run.state, optimizer_state=run.optimizer_state)

    Args:
        params: pytree of tensors to start from; it is copied, not trained in place. Frozen is what does not require
            grad, unless all of them are plain tensors that do not; tied parameters stay tied.
        loss_fn: as in `measure`; without aux, unless there are `buffers`.
        batches: any iterable: its end is the end of the training.
        balancer: `gn.gradnorm(...)` or another balancer; default: GradNorm with its defaults.
        optimizer: the parameters' optimizer, as a function from the list of tensors to a `torch.optim` optimizer, such
            as `functools.partial(torch.optim.Adam, lr=1e-3)`; default: Adam at 1e-3. A schedule is a hook of it, made
            in this function: `optimizer.register_step_post_hook(lambda *_: schedule.step())`.
        state: the balancer's state to go on from; default: a fresh one.
        optimizer_state: that of the optimizer to go on from, its learning rate included; default: a fresh one.
        mask: `mask(batch)`, the tasks that a batch has; default: all of them.
        buffers: a module with batch norm in train mode: `loss_fn` then returns (losses, aux) with the new buffers in
            aux, as `gn.functional(..., buffers=True)` gives them, and after each step they are written to this module,
            of which nothing else is changed.
        compile: run losses, gradients and balancing as one compiled graph.
        progress: show a progress bar with losses and weights, if tqdm is installed; by default on a terminal only.

    Returns:
        (params, state, history, optimizer_state): the trained parameters, the balancer's state, its Info stacked over
        the steps, every field (steps, ...), and the optimizer's state. Steps in which `history.finite` is False left
        everything as it was. A model whose parameters were given is as it was, too:
        `model.load_state_dict(run.params, strict=False)` puts the trained ones into it.

    Raises:
        ValueError: if there are no batches, if all is frozen, if `optimizer` is no such function or needs a closure
            (LBFGS), and as `measure` and `balance` do.

    Example:
        >>> import torch, gradnorm_func as gn
        >>> loss_fn = lambda w, x: {"fit": (x @ w - 1).square().mean(), "size": 100 * w.square().sum()}
        >>> run = gn.train(torch.full((3,), 0.5), loss_fn, [torch.eye(3)] * 50)
        >>> run.history.weights.shape
        torch.Size([50, 2])
    """
    balancer = gradnorm() if balancer is None else balancer
    _check_arguments(params, loss_fn, batches, balancer, buffers)
    current, moved, stepper = _start(params, optimizer, optimizer_state)  # up to date, for the stepper works in place
    has_aux = buffers is not None

    program = (balancer, loss_fn, has_aux)
    run = compiled_once(_step, program, current) if compile else functools.partial(_step, program)
    history: list[Any] = []
    names: list[str] = []
    for batch in (shown := bar(batches, progress, "train")):
        if not history:
            first_doubts = doubts(loss_fn, current, batch, None if mask is None else mask(batch), has_aux)
        if state is None or (shown.shown and not names):
            names, arguments = first_look(loss_fn, current, batch, has_aux)
            state = balancer.init(**arguments) if state is None else state
        update = balancer.every == 1 or int(state.step) % balancer.every == 0  # a compiled step cannot ask
        grads, new, info, *aux = run(state, current, batch, None if mask is None else mask(batch), update)
        info = _behind_w(info, grads, moved)
        # A step that is not finite must not reach the parameters. Zeroed gradients would still move Adam's moments,
        # so the optimizer is not called at all; this is the loop's one wait for the device.
        if bool(info.finite):
            write_grads(current, grads)
            stepper.step()
            if buffers is not None:
                write_buffers(buffers, aux)
            state = new if update else new._replace(step=new.step + 1)
        if not history:
            warn(first_doubts + _of_zeros(info))
        history.append(info)
        _show(shown, names, info)
    if not history:
        raise ValueError("batches is empty: there was nothing to train on (a generator can be used only once)")
    for leaf in tree.flatten(current)[0]:
        leaf.grad = None
    stacked = tree.tree_map(lambda *rows: torch.stack(rows), *history)
    return TrainResult(current, state, stacked, stepper.state_dict())


def _step(program: Any, state: Any, params: Any, batch: Any, mask: Any, update: bool) -> Any:
    """The gradients and the next state, in a form that is compiled once for a program."""
    balancer, loss_fn, has_aux = program
    return balancer.grad(state, params, loss_fn, batch, mask=mask, update=update, has_aux=has_aux)


def _behind_w(info: Any, grads: Any, moved: list[int]) -> Any:
    """The Info of a step, in which no loss and no norm shows a gradient that is not finite in the trunk alone."""
    return info._replace(finite=info.finite & all_finite([tree.flatten(grads)[0][i] for i in moved]))


def _start(params: Params, optimizer: Any, optimizer_state: Mapping[str, Any] | None) -> tuple[Params, list[int], Any]:
    """A copy of params, with what is tied and what is frozen in it; the indices of those that move; their optimizer."""
    tree.check_params(params)
    leaves, treedef = tree.flatten(params)
    places = Trained.of(leaves)
    copies = {i: leaves[i].detach().clone().requires_grad_(leaves[i].requires_grad) for i in set(places.first)}
    if not callable(optimizer or torch.optim.Adam):
        raise ValueError(
            f"optimizer={type(optimizer).__name__} must be a function of the tensors to train, which are copies of "
            "params: functools.partial(torch.optim.Adam, lr=1e-3)"
        )
    moved = [copies[i] for i in places.moved]
    stepper = torch.optim.Adam(moved, lr=1e-3) if optimizer is None else optimizer(moved)
    _check_stepper(stepper, moved)
    if optimizer_state is not None:
        stepper.load_state_dict(copy.deepcopy(dict(optimizer_state)))  # whose moments it would otherwise write to
    return tree.unflatten(treedef, [copies[i] for i in places.first]), list(places.moved), stepper


def _check_stepper(stepper: Any, moved: list[Tensor]) -> None:
    """Refuses what has a step too, and trains nothing."""
    kind = type(stepper).__name__
    if isinstance(stepper, torch.optim.lr_scheduler.LRScheduler):
        raise ValueError(
            f"optimizer returned {kind}, a schedule, whose step trains nothing: return its optimizer, after "
            "optimizer.register_step_post_hook(lambda *_: schedule.step())"
        )
    if isinstance(stepper, torch.optim.LBFGS):
        raise ValueError(
            "optimizer returned LBFGS, which runs the loss anew within a step, and a step has one set of weights: "
            "use functools.partial(torch.optim.Adam, lr=1e-3), or another that needs no closure"
        )
    if not hasattr(stepper, "zero_grad") or not hasattr(stepper, "param_groups"):
        raise ValueError(
            f"optimizer returned {kind}: it must be a function from a list of tensors to a torch.optim optimizer, such "
            "as functools.partial(torch.optim.Adam, lr=1e-3)"
        )
    held = {id(tensor) for group in stepper.param_groups for tensor in group["params"]}
    if held.isdisjoint(map(id, moved)):
        raise ValueError(
            f"optimizer returned {kind} of other tensors than it was given, which are copies of params: "
            "lambda tensors: torch.optim.Adam(tensors, lr=1e-3)"
        )


def _check_arguments(params: Any, loss_fn: Any, batches: Any, balancer: Any, buffers: Any) -> None:
    """Refuses what was given in another's place, or was not called."""
    if (callable(params) and not isinstance(params, nn.Module)) or not callable(loss_fn):
        kinds = f"params={type(params).__name__}, loss_fn={type(loss_fn).__name__}"
        raise ValueError(f"{kinds}: the order is (params, loss_fn, batches)")
    iterable = hasattr(batches, "__iter__") or hasattr(batches, "__getitem__")
    if isinstance(batches, (Mapping, Tensor)) or not iterable:
        raise ValueError(
            f"batches={type(batches).__name__}: an iterable of batches is wanted, such as a DataLoader; one batch is "
            "[batch], and many steps on it are [batch] * 1000"
        )
    if not isinstance(balancer, Balancer):
        method = getattr(balancer, "__name__", "gradnorm")
        name = repr(balancer) if isinstance(balancer, str) else getattr(balancer, "__name__", type(balancer).__name__)
        raise ValueError(f"balancer={name} is no balancer; call what makes one: balancer=gn.{method}()")
    if isinstance(loss_fn, MultiTaskLoss) and loss_fn.has_aux and buffers is None:
        raise ValueError(AUX)


def first_look(loss_fn: LossFn, params: Any, batch: Any, has_aux: bool = False) -> tuple[list[str], dict[str, Any]]:
    """The names of the tasks, and what a balancer's `init` is to be called with: as many tasks as the loss has, in at
    least float32, beside it."""
    with torch.no_grad(), only_looking(loss_fn, tree.flatten(params)[0]):
        losses = split_aux(loss_fn(params, batch), has_aux)[0]
        vector = task_vector(losses)
    dtype = torch.promote_types(vector.dtype, torch.float32)
    return task_names(losses), {"num_tasks": vector.shape[0], "dtype": dtype, "device": vector.device}


def _show(shown: Bar[Any], names: list[str], info: Any) -> None:
    """Every task's loss and weight beside the bar."""
    if shown.shown:
        rows = zip(names, torch.stack([info.losses, info.weights]).T.tolist(), strict=True)
        shown.note({name: f"{loss:.3g} x {weight:.3g}" for name, (loss, weight) in rows})


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


def warn(doubts: list[str]) -> None:
    """What may be meant, and may be a mistake."""
    if doubts:
        warnings.warn("; ".join(doubts), stacklevel=3)
