"""sweep: many runs of one training loop, hyperparameters and seeds side by side, as one program."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Generic, NamedTuple, overload

import torch
from torch import Tensor

from gradnorm_func._balance.algorithm1 import GradNormInfo, GradNormState
from gradnorm_func._balance.gradnorm import gradnorm
from gradnorm_func._balance.guard import I, S
from gradnorm_func._balance.protocol import Balancer
from gradnorm_func._core import tree
from gradnorm_func._core.compiling import compiled
from gradnorm_func._core.loss import LossFn
from gradnorm_func._core.optim import Optimizer, adam
from gradnorm_func._core.progress import bar
from gradnorm_func._core.trained import Trained
from gradnorm_func._core.tree import Params
from gradnorm_func._tools.sweep_grid import Factory, Grid, check_names, combinations_of
from gradnorm_func._tools.sweep_runs import Plan, Runs, joined, start, step_of


class SweepResult(NamedTuple, Generic[Params, S, I]):
    """R finished runs. Every tensor has a leading axis of runs."""

    params: Params  # the trained parameters, every leaf (R, ...)
    state: S  # of the balancer, every field (R, ...)
    history: I  # the balancer's Info, every field (R, steps, ...)
    metric: Tensor | tuple[()]  # (R,) the metric of the trained parameters; `()` without one
    runs: dict[str, Tensor]  # the table of runs: every hyperparameter, and "seed", (R,)

    @property
    def best(self) -> int:
        """The run with the lowest metric; a NaN is worse than any number."""
        if not isinstance(self.metric, Tensor):
            raise ValueError("the best run is not known without a metric: pass sweep(..., metric=lambda params: loss)")
        if bool(self.metric.isnan().all()):
            raise ValueError("the metric of every run is NaN")
        return int(torch.where(self.metric.isnan(), torch.inf, self.metric).argmin())

    def run(self, index: int) -> tuple[Params, S, I]:
        """(params, state, history) of one run."""
        one: tuple[Params, S, I] = tree.tree_map(lambda leaf: leaf[index], self[:3])
        return one


@overload
def sweep(
    params: Callable[[int], Params] | Params,
    loss_fn: LossFn,
    batches: Iterable[Any],
    *,
    grid: Grid | None = None,
    seeds: Iterable[int] = (0,),
    balancer: None = None,
    optimizer: Optimizer | Callable[..., Optimizer] | None = None,
    metric: Callable[[Params], Tensor] | None = None,
    chunk_size: int | None = None,
    compile: bool = True,
    progress: bool | None = None,
) -> SweepResult[Params, GradNormState, GradNormInfo]: ...


@overload
def sweep(
    params: Callable[[int], Params] | Params,
    loss_fn: LossFn,
    batches: Iterable[Any],
    *,
    grid: Grid | None = None,
    seeds: Iterable[int] = (0,),
    balancer: Balancer[S, I] | Callable[..., Balancer[S, I]],
    optimizer: Optimizer | Callable[..., Optimizer] | None = None,
    metric: Callable[[Params], Tensor] | None = None,
    chunk_size: int | None = None,
    compile: bool = True,
    progress: bool | None = None,
) -> SweepResult[Params, S, I]: ...


def sweep(
    params: Callable[[int], Params] | Params,
    loss_fn: LossFn,
    batches: Iterable[Any],
    *,
    grid: Grid | None = None,
    seeds: Iterable[int] = (0,),
    balancer: Balancer[Any, Any] | Callable[..., Balancer[Any, Any]] | None = None,
    optimizer: Optimizer | Callable[..., Optimizer] | None = None,
    metric: Callable[[Params], Tensor] | None = None,
    chunk_size: int | None = None,
    compile: bool = True,
    progress: bool | None = None,
) -> SweepResult[Params, Any, Any]:
    r"""Trains every combination of hyperparameters and seeds at once: one loop, with all runs under `vmap`.

    Every run sees the same batches in the same order, and is what it would be on its own; a run that diverges keeps
    its last good parameters and disturbs no other. Memory is that of R models, their gradients and moments.

    Args:
        params: `params(seed)`, a function that makes the parameters of one seed, or, for a single seed, the pytree of
            tensors that all runs start from. Frozen and tied ones are as in `train`.
        loss_fn: as in `measure`, without aux. Random numbers drawn in it differ from run to run.
        batches: any iterable: its end is the end of the training. A batch of another shape (a smaller last one)
            is compiled once more.
        grid: `{"alpha": [0.0, 1.5], "lr": [1e-3, 1e-2]}`, all combinations of which are run, or a list of
            such combinations, `[{"alpha": 0.0, "lr": 1e-2}, ...]`. Numbers only: what chooses between two programs
            (a W, an optimizer) takes a sweep each.
        seeds: every combination is run once for each of them.
        balancer: a function of hyperparameters, told apart by their names in `grid`,
            `lambda alpha, lr: gn.gradnorm(alpha=alpha, optimizer=gn.adam(lr))`; it gets them as 0-d tensors.
            Or a balancer for all runs. Default: GradNorm with its defaults.
        optimizer: the parameters' optimizer, leaf by leaf: `gn.adam(1e-3)`, or a function of hyperparameters, as above.
            Default: Adam at 1e-3.
        metric: `metric(params) -> scalar`, lower is better, of one run's trained parameters.
        chunk_size: at most that many runs at a time, to bound the memory of activations.
        compile: run a step as one compiled graph.
        progress: show a progress bar, if tqdm is installed; by default on a terminal only.

    Returns:
        SweepResult(params, state, history, metric, runs), `best` the index of its best run. Runs are ordered as
        the grid is written, the last name and then the seed changing fastest. Steps in which `history.finite` is False
        left that run as it was.

    Raises:
        ValueError: for an empty grid, a name that no function takes or that is missing from the grid, a value that is
            not a number, several seeds for params that do not depend on them, or no batches; and as `measure` and
            the balancers do.

    Example:
        >>> import torch, gradnorm_func as gn
        >>> loss_fn = lambda w, x: {"fit": (x @ w - 1).square().mean(), "size": 0.1 * w.square().sum()}
        >>> result = gn.sweep(
        ...     torch.zeros(3) + 0.1, loss_fn, [torch.eye(3)] * 20,
        ...     grid={"alpha": [0.0, 0.5, 1.5], "rate": [1e-3, 1e-1]},
        ...     balancer=lambda alpha: gn.gradnorm(alpha=alpha), optimizer=lambda rate: gn.adam(rate),
        ...     metric=lambda w: (w - 1).square().sum(), compile=False, progress=False,
        ... )
        >>> result.history.losses.shape
        torch.Size([6, 20, 2])
        >>> {name: round(float(column[result.best]), 3) for name, column in result.runs.items()}
        {'alpha': 0.0, 'rate': 0.1, 'seed': 0.0}
    """
    seeds = [int(seed) for seed in seeds]
    _check(params, seeds, chunk_size)
    combinations = combinations_of(grid)
    make_balancer = Factory.of(gradnorm() if balancer is None else balancer, "balancer", Balancer, combinations)
    make_optimizer = Factory.of(adam(1e-3) if optimizer is None else optimizer, "optimizer", Optimizer, combinations)
    check_names(combinations, make_balancer, make_optimizer)
    starts = [params(seed) if callable(params) else params for seed in seeds]
    tree.check_params(starts[0])
    places = Trained.of(tree.flatten(starts[0])[0])
    plan = Plan(loss_fn, combinations, seeds, make_balancer, make_optimizer, places)
    step = compiled(step_of(plan), dynamic=False) if compile else step_of(plan)
    table: dict[str, Tensor] = {}
    chunks: list[Runs] = []
    for batch in bar(batches, progress, "sweep"):
        if not chunks:
            table, chunks = start(plan, starts, batch, chunk_size)
        with torch.no_grad():
            for runs in chunks:
                runs.infos.append(step(runs.hyper, runs.current, batch))
    if not chunks:
        raise ValueError("batches is empty: there was nothing to train on (a generator can be used only once)")
    trained, state, history = joined(chunks)
    return SweepResult(trained, state, history, () if metric is None else _evaluated(metric, trained), table)


def _check(params: Any, seeds: list[int], chunk_size: int | None) -> None:
    if not seeds:
        raise ValueError("seeds is empty: there is nothing to run")
    if len(seeds) > 1 and not callable(params):
        raise ValueError(
            f"seeds={seeds}, but params are the same for all of them: give a function, params=lambda seed: ..."
        )
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size} must be at least 1, or None for all runs at once")


def _evaluated(metric: Callable[[Any], Tensor], trained: Any) -> Tensor:
    with torch.no_grad():
        values = torch.func.vmap(metric, randomness="different")(trained)
    if not isinstance(values, Tensor) or values.ndim != 1:
        shape = tuple(values.shape[1:]) if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(f"metric returned {shape}: it must be one scalar for a run")
    return values
