"""sweep: many runs of one training loop, hyperparameters and seeds side by side, as one program."""

from __future__ import annotations

import difflib
import inspect
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradnorm_func._balance.gradnorm import gradnorm
from gradnorm_func._balance.protocol import Balancer
from gradnorm_func._core import optim, tree
from gradnorm_func._core.loss import LossFn, task_vector
from gradnorm_func._core.numerics import choose
from gradnorm_func._tools.train import _bar, compiled

Grid = Mapping[str, Sequence[float]] | Sequence[Mapping[str, float]]


class SweepResult(NamedTuple):
    """R finished runs. Every tensor has a leading axis of runs."""

    params: Any  # the trained parameters, every leaf (R, ...)
    state: Any  # of the balancer, every field (R, ...)
    history: Any  # the balancer's Info, every field (R, steps, ...)
    metric: Any  # (R,) the metric of the trained parameters; `()` without one
    runs: dict[str, Tensor]  # the table of runs: every hyperparameter, and "seed", (R,)

    @property
    def best(self) -> int:
        """The run with the lowest metric; a NaN is worse than any number."""
        if not isinstance(self.metric, Tensor):
            raise ValueError("the best run is not known without a metric: pass sweep(..., metric=lambda params: loss)")
        if bool(self.metric.isnan().all()):
            raise ValueError("the metric of every run is NaN")
        return int(torch.where(self.metric.isnan(), torch.inf, self.metric).argmin())

    def run(self, index: int) -> tuple[Any, Any, Any]:
        """(params, state, history) of one run, as `train` returns them."""
        params, state, history = (
            tree.tree_map(lambda x: x[index], part) for part in (self.params, self.state, self.history)
        )
        return params, state, history


def sweep(
    params: Any,
    loss_fn: LossFn,
    batches: Iterable[Any],
    *,
    grid: Grid | None = None,
    seeds: Iterable[int] = (0,),
    balancer: Balancer | Callable[..., Balancer] | None = None,
    optimizer: optim.Optimizer | Callable[..., optim.Optimizer] | None = None,
    metric: Callable[[Any], Tensor] | None = None,
    chunk_size: int | None = None,
    compile: bool = True,
    progress: bool = True,
) -> SweepResult:
    r"""Trains every combination of hyperparameters and seeds at once: one loop, with all runs under `vmap`.

    Every run sees the same batches in the same order, and is what it would be on its own; a run that diverges keeps
    its last good parameters and disturbs no other. Memory is that of R models, their gradients and moments.

    Args:
        params: `params(seed)`, a function that makes the parameters of one seed, or, for a single seed, the pytree of
            tensors that all runs start from.
        loss_fn: as in `measure`, without aux. Random numbers drawn in it differ from run to run.
        batches: any iterable: its end is the end of the training. A batch of another shape (a smaller last one)
            is compiled once more.
        grid: `{"alpha": [0.0, 1.5], "lr": [1e-3, 1e-2]}`, all combinations of which are run, or a list of
            such combinations, `[{"alpha": 0.0, "lr": 1e-2}, ...]`. Numbers only: what chooses between two programs
            (a W, an optimizer) takes a sweep each.
        seeds: every combination is run once for each of them.
        balancer: a function of hyperparameters, told apart by their names in `grid`,
            `lambda alpha, lr: gn.gradnorm(alpha=alpha, optimizer=gn.adam(lr))`; it gets them as 0-d tensors.
            Or a balancer for all runs. None is GradNorm with its defaults.
        optimizer: of the parameters, leaf by leaf: `gn.adam(1e-3)`, or a function of hyperparameters, as above.
            None is Adam at 1e-3.
        metric: `metric(params) -> scalar`, lower is better, of one run's trained parameters.
        chunk_size: at most that many runs at a time, to bound the memory of activations.
        compile: run a step as one compiled graph.
        progress: show a progress bar, if tqdm is installed.

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
    if not seeds:
        raise ValueError("seeds is empty: there is nothing to run")
    if len(seeds) > 1 and not callable(params):
        raise ValueError(
            f"seeds={seeds}, but params are the same for all of them: give a function, params=lambda seed: ..."
        )
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size} must be at least 1, or None for all runs at once")
    combinations = _combinations(grid)
    names = list(combinations[0])
    make_balancer = _factory(gradnorm() if balancer is None else balancer, "balancer", Balancer, names, combinations)
    make_optimizer = _factory(
        optim.adam(1e-3) if optimizer is None else optimizer, "optimizer", optim.Optimizer, names, combinations
    )
    idle = [name for name in names if name not in {*make_balancer.names, *make_optimizer.names}]
    if idle:
        raise _unknown(idle[0], [*make_balancer.names, *make_optimizer.names])

    def step(hyper: dict[str, Tensor], params: Any, moments: Any, state: Any, batch: Any) -> Any:
        """One step of one run; not finite, it changes neither the parameters nor their moments."""
        leaves, treedef = tree.flatten(params)
        grads, new, info = make_balancer(hyper).grad(state, params, loss_fn, batch)
        update, rows = make_optimizer(hyper).update, []
        for grad, leaf, moment in zip(tree.flatten(grads)[0], leaves, moments, strict=True):
            move, moment = update(grad, moment, leaf)
            rows.append(((leaf + move).to(leaf.dtype), moment))
        ok = getattr(info, "finite", None)
        if ok is None:  # a balancer that does not say so, and then its state must be kept here
            ok = torch.stack([leaf.isfinite().all() for leaf in tree.flatten(grads)[0]]).all()
            new = choose(ok, new, state)
        kept = [choose(ok, row, old) for row, old in zip(rows, zip(leaves, moments, strict=True), strict=True)]
        return tree.unflatten(treedef, [leaf for leaf, _ in kept]), [moment for _, moment in kept], new, info

    def advance(hyper: dict[str, Tensor], current: Any, batch: Any) -> Any:
        """One step of a group of runs; `current` is ours, and is written to, for the sake of time and memory."""
        mapped: Callable[..., Any] = torch.func.vmap(step, in_dims=(0, 0, 0, 0, None), randomness="different")
        *new, info = mapped(hyper, *current, batch)
        info = tree.tree_map(torch.clone, info)  # the weights in it are those of the state
        for old, leaf in zip(tree.flatten(current)[0], tree.flatten(tuple(new))[0], strict=True):
            old.copy_(leaf)
        return info

    run = compiled(advance, dynamic=False) if compile else advance

    table: dict[str, Tensor] = {}
    groups: list[_Group] = []
    for batch in _bar(batches, progress, "sweep"):
        if not groups:
            table, groups = _start(
                params, loss_fn, batch, combinations, seeds, make_balancer, make_optimizer, chunk_size
            )
        with torch.no_grad():
            for group in groups:
                group.infos.append(run(group.hyper, group.current, batch))
    if not groups:
        raise ValueError("batches is empty: there was nothing to train on (a generator can be used only once)")
    trained, state = (_join([group.current[part] for group in groups]) for part in (0, 2))
    history = _join([tree.tree_map(lambda *rows: torch.stack(rows, 1), *group.infos) for group in groups])
    return SweepResult(trained, state, history, () if metric is None else _evaluate(metric, trained), table)


class _Group(NamedTuple):
    """Runs that share a step; every tensor has a leading axis of runs."""

    hyper: dict[str, Tensor]
    current: tuple[Any, Any, Any]  # parameters, their moments, the balancer's state
    infos: list[Any]  # one a step


class _Factory(NamedTuple):
    """A balancer or an optimizer, as a function of the hyperparameters it is named after."""

    make: Callable[..., Any]
    names: tuple[str, ...]

    def __call__(self, hyper: Mapping[str, Any]) -> Any:
        return self.make(**{name: hyper[name] for name in self.names})


def _factory(given: Any, role: str, kind: Any, names: list[str], combinations: list[dict[str, float]]) -> _Factory:
    if isinstance(given, kind):
        return _Factory(lambda: given, ())
    if not callable(given):
        raise ValueError(
            f"{role}={given!r} must be a {kind.__name__}, or a function of hyperparameters that returns one"
        )
    parameters = inspect.signature(given).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        raise ValueError(f"{role} takes any name: name its hyperparameters one by one, as in `lambda alpha, lr: ...`")
    missing = [
        p.name for p in parameters if p.name not in names and p.default is p.empty and p.kind != p.VAR_POSITIONAL
    ]
    if missing:
        raise ValueError(f"{role} takes {missing[0]!r}, which grid does not have; it has {names}")
    factory = _Factory(given, tuple(p.name for p in parameters if p.name in names))
    for combination in combinations:
        # With plain numbers first, whose range the library checks; a function may also want tensors.
        with suppress(TypeError, AttributeError):
            factory(combination)
    made = factory({name: torch.tensor(value) for name, value in combinations[0].items()})
    if not isinstance(made, kind):
        raise ValueError(f"{role} returned {type(made).__name__} and not a {kind.__name__}")
    return factory


def _combinations(grid: Grid | None) -> list[dict[str, float]]:
    """Every run but for its seed, a dict of names and numbers."""
    if grid is None:
        return [{}]
    if isinstance(grid, Mapping):
        for name, values in grid.items():
            if isinstance(values, str) or not isinstance(values, Iterable):
                raise ValueError(f"grid[{name!r}]={values!r} must be a list of numbers")
        columns = [list(values) for values in grid.values()]
        empty = [name for name, column in zip(grid, columns, strict=True) if not column]
        if empty or not columns:
            raise ValueError(f"grid{f'[{empty[0]!r}]' if empty else ''} is empty: there is nothing to run")
        found = [dict(zip(grid, row, strict=True)) for row in itertools.product(*columns)]
    else:
        found = [dict(row) for row in grid]
        if not found:
            raise ValueError("grid is empty: there is nothing to run")
        for row in found:
            if set(row) != set(found[0]):
                raise ValueError(f"every combination in grid needs the same names, but {list(row)} != {list(found[0])}")
    return [{name: _number(name, value) for name, value in row.items()} for row in found]


def _number(name: str, value: Any) -> float:
    if name == "seed":
        raise ValueError("grid has a 'seed': pass seeds=")
    if not isinstance(value, (bool, str)):
        with suppress(TypeError, ValueError, RuntimeError):
            return value if isinstance(value, int) else float(value)
    raise ValueError(
        f"grid[{name!r}] has {value!r}: all runs are one program, so only numbers can differ; call sweep once for each"
    )


def _unknown(name: str, known: list[str]) -> ValueError:
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4) or known
    hint = f"did you mean one of {near}?" if near else "give balancer= or optimizer= as a function of it"
    return ValueError(f"grid has {name!r}, but neither balancer nor optimizer takes it; {hint}")


def _start(
    params: Any,
    loss_fn: LossFn,
    batch: Any,
    combinations: list[dict[str, float]],
    seeds: list[int],
    make_balancer: _Factory,
    make_optimizer: _Factory,
    chunk_size: int | None,
) -> tuple[dict[str, Tensor], list[_Group]]:
    """The table of runs, and the runs themselves, not yet begun."""
    starts = [params(seed) if callable(params) else params for seed in seeds]
    tree.check_params(starts[0])
    starts = [tree.tree_map(torch.detach, start) for start in starts]
    with torch.no_grad():
        losses = task_vector(loss_fn(starts[0], batch))
    # Hyperparameters are as exact as the weights, and do not widen what they are multiplied with.
    dtype, device = torch.promote_types(losses.dtype, torch.float32), losses.device
    runs = [(combination, k) for combination in combinations for k in range(len(seeds))]

    def column(values: list[float]) -> Tensor:
        whole = all(isinstance(value, int) for value in values)
        return torch.tensor(values, dtype=torch.int64 if whole else dtype, device=device)

    table = {name: column([combination[name] for combination, _ in runs]) for name in combinations[0]}
    hyper = [{name: values[r] for name, values in table.items()} for r in range(len(runs))]
    size = len(runs) if chunk_size is None else chunk_size
    groups = []
    for first in range(0, len(runs), size):
        here = range(first, min(first + size, len(runs)))
        # States one run at a time: what init checks, it may look at.
        states = [make_balancer(hyper[r]).init(losses.shape[0], dtype=dtype, device=device) for r in here]
        moments = [[make_optimizer(hyper[r]).init(leaf) for leaf in tree.flatten(starts[runs[r][1]])[0]] for r in here]
        rows = [hyper[r] for r in here], [starts[runs[r][1]] for r in here], moments, states
        shared, *current = (tree.tree_map(lambda *leaves: torch.stack(leaves), *part) for part in rows)
        groups.append(_Group(shared, tuple(current), []))
    table["seed"] = torch.tensor([seeds[k] for _, k in runs], device=device)
    return table, groups


def _join(parts: list[Any]) -> Any:
    return parts[0] if len(parts) == 1 else tree.tree_map(lambda *rows: torch.cat(rows), *parts)


def _evaluate(metric: Callable[[Any], Tensor], trained: Any) -> Tensor:
    with torch.no_grad():
        found = torch.func.vmap(metric, randomness="different")(trained)
    if not isinstance(found, Tensor) or found.ndim != 1:
        shape = tuple(found.shape[1:]) if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(f"metric returned {shape}: it must be one scalar for a run")
    return found
