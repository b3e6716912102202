"""sweep: many runs of one training loop, hyperparameters and seeds side by side, as one program."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, Generic, NamedTuple, TypeAlias, overload

import torch
from torch import Tensor

from gradnorm_func._balance.algorithm1 import GradNormInfo, GradNormState
from gradnorm_func._balance.gradnorm import gradnorm
from gradnorm_func._balance.guard import I, S
from gradnorm_func._balance.protocol import Balancer
from gradnorm_func._core import tree
from gradnorm_func._core.compiling import compiled_once
from gradnorm_func._core.loss import LossFn
from gradnorm_func._core.optim import Optimizer, adam
from gradnorm_func._core.progress import bar
from gradnorm_func._core.trained import Trained
from gradnorm_func._core.tree import Params
from gradnorm_func._tools.sweep_grid import Factory, Grid, Run, check_names, runs_of
from gradnorm_func._tools.sweep_runs import Program, Runs, by_seed, evaluated, joined, stacked, start, step

Metric: TypeAlias = Callable[..., Any]  # params -> scalar or a pytree of them; or hyperparameters -> such a function


class SweepResult(NamedTuple, Generic[Params, S, I]):
    """R finished runs. Every tensor has a leading axis of runs."""

    params: Params  # the trained parameters, every leaf (R, ...)
    state: S  # of the balancer, every field (R, ...)
    history: I  # the balancer's Info, every field (R, steps, ...)
    metric: Any  # (R,) the metric of the trained parameters, or a pytree of such; `()` without one
    runs: dict[str, Tensor]  # the table of runs: every hyperparameter, and "seed", (R,)
    metric_history: Any = ()  # the metric after every `metric_every`-th step, (R, steps // metric_every)

    @property
    def best(self) -> int:
        """The run with the lowest metric; a NaN is worse than any number."""
        if not isinstance(self.metric, Tensor):
            raise ValueError(
                "the best run is not known without a metric: pass sweep(..., metric=lambda params: loss)"
                if self.metric == ()
                else "metric is several numbers: choose by one of them, as in int(result.metric[name].argmin())"
            )
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
    loss_fn: LossFn | Callable[..., LossFn],
    batches: Iterable[Any] | Callable[[int], Iterable[Any]],
    *,
    grid: Grid | None = None,
    seeds: Iterable[int] | None = None,
    balancer: None = None,
    optimizer: Optimizer | Callable[..., Optimizer] | None = None,
    metric: Metric | None = None,
    metric_every: int | None = None,
    chunk_size: int | None = None,
    compile: bool = True,
    progress: bool | None = None,
) -> SweepResult[Params, GradNormState, GradNormInfo]: ...


@overload
def sweep(
    params: Callable[[int], Params] | Params,
    loss_fn: LossFn | Callable[..., LossFn],
    batches: Iterable[Any] | Callable[[int], Iterable[Any]],
    *,
    grid: Grid | None = None,
    seeds: Iterable[int] | None = None,
    balancer: Balancer[S, I] | Callable[..., Balancer[S, I]],
    optimizer: Optimizer | Callable[..., Optimizer] | None = None,
    metric: Metric | None = None,
    metric_every: int | None = None,
    chunk_size: int | None = None,
    compile: bool = True,
    progress: bool | None = None,
) -> SweepResult[Params, S, I]: ...


def sweep(
    params: Callable[[int], Params] | Params,
    loss_fn: LossFn | Callable[..., LossFn],
    batches: Iterable[Any] | Callable[[int], Iterable[Any]],
    *,
    grid: Grid | None = None,
    seeds: Iterable[int] | None = None,
    balancer: Balancer[Any, Any] | Callable[..., Balancer[Any, Any]] | None = None,
    optimizer: Optimizer | Callable[..., Optimizer] | None = None,
    metric: Metric | None = None,
    metric_every: int | None = None,
    chunk_size: int | None = None,
    compile: bool = True,
    progress: bool | None = None,
) -> SweepResult[Params, Any, Any]:
    r"""Trains every combination of hyperparameters and seeds at once: one loop, with all runs under `vmap`.

    Every run is what it would be on its own; a run that diverges keeps its last good parameters and disturbs no other.
    Memory is that of R models, their gradients and moments. A second sweep of the same functions and shapes in one
    process compiles nothing.

    Args:
        params: `params(seed)`, a function that makes the parameters of one seed, or, for a single seed, the pytree of
            tensors that all runs start from. Frozen and tied ones are as in `train`.
        loss_fn: as in `measure`, without aux; or a function of hyperparameters that returns it,
            `lambda scale: lambda params, batch: ...`. Random numbers drawn in it differ from run to run.
        batches: any iterable: its end is the end of the training, and all runs see the same batches. Or
            `batches(seed)`, a function that makes the iterable of one seed, of as many batches of the same shapes. A
            batch of another shape (a smaller last one) is compiled once more.
        grid: `{"alpha": [0.0, 1.5], "lr": [1e-3, 1e-2]}`, all combinations of which are run, or a list of
            such combinations, `[{"alpha": 0.0, "lr": 1e-2}, ...]`, each of which may have a "seed" of its own. Values
            are numbers, booleans or vectors of numbers; what chooses between two programs (a W, an optimizer, the
            condition of an `if`) takes a sweep each.
        seeds: every combination is run once for each of them; default: 0 alone.
        balancer: a function of hyperparameters, told apart by their names in `grid`,
            `lambda alpha, lr: gn.gradnorm(alpha=alpha, optimizer=gn.adam(lr))`; it gets them as tensors.
            Or a balancer for all runs. Default: GradNorm with its defaults.
        optimizer: the parameters' optimizer, leaf by leaf: `gn.adam(1e-3)`, or a function of hyperparameters, as above,
            and of `path`, the dotted path of the leaf, as in
            `lambda lr, path: gn.adam(lr, weight_decay=0.01 if path.endswith("weight") else 0.0)`.
            Default: Adam at 1e-3.
        metric: `metric(params) -> scalar`, lower is better, of one run's trained parameters, or a pytree of scalars; or
            a function of hyperparameters that returns such a function.
        metric_every: steps from one evaluation of the metric during the run to the next, for `metric_history`.
        chunk_size: at most that many runs at a time, to bound the memory of activations.
        compile: run a step as one compiled graph.
        progress: show a progress bar, if tqdm is installed; by default on a terminal only.

    Returns:
        SweepResult(params, state, history, metric, runs, metric_history), `best` the index of its best run. Runs are
        ordered as the grid is written, the last name and then the seed changing fastest. Steps in which
        `history.finite` is False left that run as it was.

    Raises:
        ValueError: for what `train` refuses at its first step, such as a module that the loss closes over; for an empty
            grid, a name that no function takes or that is missing from the grid, a value that is
            no number, boolean or vector, or that chooses between two programs, several seeds for params that do not
            depend on them, batches that differ in number or shape from seed to seed, or no batches; and as `measure`
            and the balancers do.

    Example:
        >>> import torch, gradnorm_func as gn
        >>> loss_fn = lambda w, x: {"fit": (x @ w - 1).square().mean(), "size": 0.1 * (w - 2).square().sum()}
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
    rows = runs_of(grid, seeds)
    _check(params, {row.seed for row in rows}, chunk_size, metric, metric_every)
    starts = {seed: params(seed) if callable(params) else params for seed in dict.fromkeys(row.seed for row in rows)}
    tree.check_params(starts[rows[0].seed])
    program = _program(rows, starts[rows[0].seed], loss_fn, balancer, optimizer)
    measure = None if metric is None else Factory.of_function(metric, "metric", rows)
    check_names(rows, [program.loss_fn, program.balancer, program.optimizer, *([measure] if measure else [])])
    shared = not callable(batches) or isinstance(batches, Iterable)
    source: Iterable[Any] = batches if shared else by_seed(batches, starts)  # type: ignore[assignment, arg-type]
    table: dict[str, Tensor] = {}
    chunks: list[Runs] = []
    for count, batch in enumerate(bar(source, progress, "sweep"), 1):
        if not chunks:
            first = batch if shared else batch[rows[0].seed]
            table, chunks = start(program, rows, starts, first, chunk_size)
            run = _runner(program, chunks, compile)
        for runs in chunks:
            runs.infos.append(run(runs, batch if shared else stacked(batch, runs.seeds), shared))
            if measure is not None and metric_every is not None and count % metric_every == 0:
                runs.metrics.append(evaluated(measure, runs))
    if not chunks:
        raise ValueError("batches is empty: there was nothing to train on (a generator can be used only once)")
    final: Any = () if measure is None else [evaluated(measure, runs) for runs in chunks]
    trained, state, history, metrics = joined(chunks)
    if final:
        final = tree.tree_map(lambda *parts: torch.cat(parts), *final)
    return SweepResult(trained, state, history, final, table, metrics)


def _program(rows: list[Run], params: Any, loss_fn: Any, balancer: Any, optimizer: Any) -> Program:
    """What all runs have in common."""
    paths = tuple(tree.paths(params))
    return Program(
        Factory.of_function(loss_fn, "loss_fn", rows),
        Factory.of(gradnorm() if balancer is None else balancer, "balancer", Balancer, rows),
        Factory.of(adam(1e-3) if optimizer is None else optimizer, "optimizer", Optimizer, rows, path=paths[0]),
        Trained.of(tree.flatten(params)[0]),
        paths,
    )


def _runner(program: Program, chunks: list[Runs], compile: bool) -> Callable[[Runs, Any, bool], Any]:
    """A step of a chunk, compiled or not, that says what is wrong if it is no one program for all runs."""
    like = [(runs.hyper, runs.current) for runs in chunks]
    one = compiled_once(step, program, like, dynamic=False) if compile else functools.partial(step, program)

    def run(runs: Runs, batch: Any, shared: bool) -> Any:
        try:
            with torch.no_grad():
                return one(runs.hyper, runs.current, batch, shared)
        except Exception as error:
            if "data-dependent" not in str(error).lower():
                raise
            raise ValueError(
                f"a hyperparameter of {list(runs.hyper)}, or a loss, is the condition of an `if`: all runs are one "
                "program, so call sweep once for each of its values, or choose by torch.where"
            ) from error

    return run


def _check(params: Any, seeds: set[int], chunk_size: int | None, metric: Any, metric_every: int | None) -> None:
    if len(seeds) > 1 and not callable(params):
        raise ValueError(
            f"seeds={sorted(seeds)}, but params are the same for all of them: give a function, params=lambda seed: ..."
        )
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size} must be at least 1, or None for all runs at once")
    if metric_every is not None and (metric is None or metric_every < 1):
        raise ValueError(f"metric_every={metric_every} must be a number of steps, at least 1, and needs a metric=")
