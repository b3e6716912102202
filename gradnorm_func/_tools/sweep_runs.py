"""The runs of a sweep: how they start, one step of many of them under `vmap`, and what they come to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradnorm_func._core import tree
from gradnorm_func._core.looking import only_looking
from gradnorm_func._core.numerics import choose
from gradnorm_func._core.trained import Trained
from gradnorm_func._measure.check import doubts
from gradnorm_func._tools.sweep_grid import Factory, Run
from gradnorm_func._tools.train import first_look, warn


class Program(NamedTuple):
    """What all runs have in common: how they differ is in their hyperparameters alone."""

    loss_fn: Factory
    balancer: Factory
    optimizer: Factory
    places: Trained  # which leaves of params move
    paths: tuple[str, ...]  # of the leaves of params


class Runs(NamedTuple):
    """Some of the runs, which share a step; every tensor has a leading axis of runs."""

    hyper: dict[str, Tensor]
    seeds: list[int]  # of every run
    current: tuple[Any, Any, Any]  # parameters, their moments, the balancer's state
    infos: list[Any]  # one a step
    metrics: list[Any]  # one an evaluation


def table_of(rows: Sequence[Run], dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """The hyperparameters and the seed of every run, (R,) each, (R, n) for vectors."""

    def column(values: list[Any]) -> Tensor:
        if isinstance(values[0], Tensor):
            vectors = torch.stack(values).to(device)
            return vectors.to(dtype) if vectors.is_floating_point() else vectors
        whole = all(isinstance(value, int) for value in values)  # a bool is one, too, and torch keeps it
        return torch.tensor(values, dtype=None if whole else dtype, device=device)

    names = rows[0].combination
    return {name: column([row.combination[name] for row in rows]) for name in names} | {
        "seed": torch.tensor([row.seed for row in rows], device=device)
    }


def start(
    program: Program, rows: Sequence[Run], starts: Mapping[int, Any], batch: Any, chunk_size: int | None
) -> tuple[dict[str, Tensor], list[Runs]]:
    """The table of runs, and the runs themselves in chunks; `starts` are the parameters of each seed."""
    starts = {seed: tree.tree_map(torch.detach, params) for seed, params in starts.items()}
    like = tree.flatten(starts[rows[0].seed])[0][0]
    example = {name: column[0] for name, column in table_of(rows[:1], like.dtype, like.device).items()}
    init = _looked_at(program, example, starts[rows[0].seed], batch)
    # Hyperparameters are as exact as the weights, and do not widen what they are multiplied with.
    table = table_of(rows, init["dtype"], init["device"])

    def one(run: int) -> tuple[dict[str, Tensor], tuple[Any, Any, Any]]:
        # One run at a time: what `init` checks, it may look at.
        hyper = {name: column[run] for name, column in table.items() if name != "seed"}
        params = starts[rows[run].seed]
        leaves, paths = tree.flatten(params)[0], program.paths
        moments = [program.optimizer.of_run(hyper | {"path": paths[i]}).init(leaves[i]) for i in program.places.moved]
        return hyper, (params, moments, program.balancer.of_run(hyper).init(**init))

    size = chunk_size or len(rows)
    chunks = []
    for first in range(0, len(rows), size):
        part = range(first, min(first + size, len(rows)))
        hyper, current = tree.tree_map(lambda *leaves: torch.stack(leaves), *map(one, part))
        chunks.append(Runs(hyper, [rows[run].seed for run in part], current, [], []))
    return table, chunks


def _looked_at(program: Program, hyper: Mapping[str, Any], params: Any, batch: Any) -> dict[str, Any]:
    """What `init` is to be called with. A step of one run that is seen by nobody: under `vmap` nobody can ask whether
    the losses read params, or W is that of one task."""
    loss_fn, balancer = program.loss_fn.of_run(hyper), program.balancer.of_run(hyper)
    _, init = first_look(loss_fn, params, batch)
    warn(doubts(loss_fn, params, batch))
    with only_looking(loss_fn, tree.flatten(params)[0]):
        balancer.grad(balancer.init(**init), params, loss_fn, batch)
    return init


def by_seed(batches: Callable[[int], Iterable[Any]], seeds: Iterable[int]) -> Iterator[dict[int, Any]]:
    """The batches of all seeds, side by side."""
    columns = {seed: batches(seed) for seed in seeds}
    try:
        yield from (dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True))
    except ValueError as error:
        if "zip()" not in str(error):
            raise
        raise ValueError(
            "batches(seed) must give as many batches for every seed: some have ended before others"
        ) from None


def stacked(batch: Mapping[int, Any], seeds: Sequence[int]) -> Any:
    """The batch of every run of a chunk, every tensor (runs, ...)."""

    def rows(*leaves: Any) -> Any:
        if not isinstance(leaves[0], Tensor):
            if any(leaf != leaves[0] for leaf in leaves):
                raise ValueError(f"the batches of two seeds differ in {leaves[0]!r}: only tensors can, so make it one")
            return leaves[0]
        shapes = {tuple(leaf.shape) for leaf in leaves}
        if len(shapes) > 1:
            raise ValueError(
                f"the batches of the seeds have tensors of the shapes {sorted(shapes)}: they must be alike"
            )
        of = dict(zip(batch, leaves, strict=True))
        return torch.stack([of[seed] for seed in seeds])

    return tree.tree_map(rows, *batch.values())


def step(program: Program, hyper: dict[str, Tensor], current: Any, batch: Any, shared: bool) -> Any:
    """The info of one step of all runs of a chunk; it writes to `current`, to save time and memory."""
    leaves, treedef = tree.flatten(batch)

    def one(hyper: dict[str, Tensor], params: Any, moments: Any, state: Any, leaves: Any) -> Any:
        """One step of one run; if it is not finite, it changes neither the parameters nor their moments."""
        loss_fn, batch = program.loss_fn.of_run(hyper), tree.unflatten(treedef, leaves)
        grads, new_state, info = program.balancer.of_run(hyper).grad(state, params, loss_fn, batch)
        finite = getattr(info, "finite", None)
        if finite is None:  # a balancer that does not say so does not keep its state either
            finite = torch.stack([leaf.isfinite().all() for leaf in tree.flatten(grads)[0]]).all()
            new_state = choose(finite, new_state, state)
        new = _stepped(program, hyper, grads, params, moments)
        return *choose(finite, new, (params, moments)), new_state, info

    dims = None if shared else [0 if isinstance(leaf, Tensor) else None for leaf in leaves]
    many: Callable[..., Any] = torch.func.vmap(one, in_dims=(0, 0, 0, 0, dims), randomness="different")
    *new, info = many(hyper, *current, leaves)
    info = tree.tree_map(torch.clone, info)  # the weights in it are those of the state
    for old, leaf in zip(tree.flatten(current)[0], tree.flatten(tuple(new))[0], strict=True):
        old.copy_(leaf)
    return info


def _stepped(
    program: Program, hyper: dict[str, Tensor], grads: Any, params: Any, moments: list[Any]
) -> tuple[Any, list[Any]]:
    """The parameters after a step of their optimizer, and its new moments."""
    places = program.places
    leaves, treedef = tree.flatten(params)
    rows = zip(places.moved, places.sums(tree.flatten(grads)[0]), moments, strict=True)
    steps = {}
    for i, grad, moment in rows:
        steps[i] = program.optimizer.of_run(hyper | {"path": program.paths[i]}).update(grad, moment, leaves[i])
    moved = [
        (leaf + steps[i][0]).to(leaf.dtype) if i in steps else leaf
        for leaf, i in zip(leaves, places.first, strict=True)
    ]
    return tree.unflatten(treedef, moved), [moment for _, moment in steps.values()]


def evaluated(metric: Factory, runs: Runs) -> Any:
    """The metric of every run of a chunk: a pytree of (runs,)."""

    def one(hyper: dict[str, Tensor], params: Any) -> Any:
        values = metric.of_run(hyper)(params)
        for value in tree.flatten(values)[0]:
            if not isinstance(value, Tensor) or value.ndim:
                shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(f"metric returned {shape}: it must be one scalar for a run, or a pytree of scalars")
        return values

    many: Callable[..., Any] = torch.func.vmap(one, randomness="different")
    with torch.no_grad():
        return tree.tree_map(torch.clone, many(runs.hyper, runs.current[0]))  # it may be a part of the parameters


def joined(chunks: list[Runs]) -> tuple[Any, Any, Any, Any]:
    """(parameters, state, history, metrics) of all runs; the last two with an axis of steps after that of runs."""
    ends = [(runs.current[0], runs.current[2], _over_time(runs.infos), _over_time(runs.metrics)) for runs in chunks]
    whole: tuple[Any, Any, Any, Any] = (
        ends[0] if len(ends) == 1 else tree.tree_map(lambda *parts: torch.cat(parts), *ends)
    )
    return whole


def _over_time(rows: list[Any]) -> Any:
    """Rows of many runs, (R, ...) each, as (R, steps, ...)."""
    return tree.tree_map(lambda *leaves: torch.stack(leaves, 1), *rows) if rows else ()
