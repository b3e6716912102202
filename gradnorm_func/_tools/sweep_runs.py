"""The runs of a sweep: how they start, one step of many of them under `vmap`, and what they come to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradnorm_func._core import tree
from gradnorm_func._core.loss import LossFn
from gradnorm_func._core.numerics import choose
from gradnorm_func._core.trained import Trained
from gradnorm_func._tools.sweep_grid import Combination, Factory
from gradnorm_func._tools.train import first_look


class Plan(NamedTuple):
    """What is to be run: every combination with every seed, the seed changing fastest."""

    loss_fn: LossFn
    combinations: list[Combination]
    seeds: list[int]
    balancer: Factory
    optimizer: Factory
    places: Trained  # which leaves of params move

    def table(self, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        """The hyperparameters and the seed of every run, (R,) each."""

        def column(values: list[float]) -> Tensor:
            whole = all(isinstance(value, int) for value in values)
            return torch.tensor(values, dtype=torch.int64 if whole else dtype, device=device)

        rows = [combination | {"seed": seed} for combination in self.combinations for seed in self.seeds]
        return {name: column([row[name] for row in rows]) for name in rows[0]}


class Runs(NamedTuple):
    """Some of the runs, which share a step; every tensor has a leading axis of runs."""

    hyper: dict[str, Tensor]
    current: tuple[Any, Any, Any]  # parameters, their moments, the balancer's state
    infos: list[Any]  # one a step


def start(
    plan: Plan, starts: Sequence[Any], batch: Any, chunk_size: int | None
) -> tuple[dict[str, Tensor], list[Runs]]:
    """The table of runs, and the runs themselves in chunks; `starts` are the parameters of each seed."""
    starts = [tree.tree_map(torch.detach, params) for params in starts]
    _, init = first_look(plan.loss_fn, starts[0], batch)
    # Hyperparameters are as exact as the weights, and do not widen what they are multiplied with.
    table = plan.table(init["dtype"], init["device"])

    def one(run: int) -> tuple[dict[str, Tensor], tuple[Any, Any, Any]]:
        # One run at a time: what `init` checks, it may look at.
        hyper = {name: column[run] for name, column in table.items() if name != "seed"}
        params = starts[run % len(starts)]
        leaves = tree.flatten(params)[0]
        moments = [plan.optimizer(hyper).init(leaves[i]) for i in plan.places.moved]
        return hyper, (params, moments, plan.balancer(hyper).init(**init))

    runs = range(len(table["seed"]))
    size = chunk_size or len(runs)
    chunks = []
    for first in runs[::size]:
        hyper, current = tree.tree_map(lambda *leaves: torch.stack(leaves), *map(one, runs[first : first + size]))
        chunks.append(Runs(hyper, current, []))
    return table, chunks


def step_of(plan: Plan) -> Callable[[dict[str, Tensor], Any, Any], Any]:
    """step(hyper, current, batch) -> info, of all runs of a chunk; it writes to `current`, to save time and memory."""

    def one(hyper: dict[str, Tensor], params: Any, moments: Any, state: Any, batch: Any) -> Any:
        """One step of one run; if it is not finite, it changes neither the parameters nor their moments."""
        grads, new_state, info = plan.balancer(hyper).grad(state, params, plan.loss_fn, batch)
        finite = getattr(info, "finite", None)
        if finite is None:  # a balancer that does not say so does not keep its state either
            finite = torch.stack([leaf.isfinite().all() for leaf in tree.flatten(grads)[0]]).all()
            new_state = choose(finite, new_state, state)
        new = _stepped(plan.optimizer(hyper).update, plan.places, grads, params, moments)
        return *choose(finite, new, (params, moments)), new_state, info

    def step(hyper: dict[str, Tensor], current: Any, batch: Any) -> Any:
        many: Callable[..., Any] = torch.func.vmap(one, in_dims=(0, 0, 0, 0, None), randomness="different")
        *new, info = many(hyper, *current, batch)
        info = tree.tree_map(torch.clone, info)  # the weights in it are those of the state
        for old, leaf in zip(tree.flatten(current)[0], tree.flatten(tuple(new))[0], strict=True):
            old.copy_(leaf)
        return info

    return step


def _stepped(
    update: Callable[..., Any], places: Trained, grads: Any, params: Any, moments: list[Any]
) -> tuple[Any, list[Any]]:
    """The parameters after a step of their optimizer, and its new moments."""
    leaves, treedef = tree.flatten(params)
    rows = zip(places.moved, places.sums(tree.flatten(grads)[0]), moments, strict=True)
    steps = {i: update(grad, moment, leaves[i]) for i, grad, moment in rows}
    moved = [
        (leaf + steps[i][0]).to(leaf.dtype) if i in steps else leaf
        for leaf, i in zip(leaves, places.first, strict=True)
    ]
    return tree.unflatten(treedef, moved), [moment for _, moment in steps.values()]


def joined(chunks: list[Runs]) -> tuple[Any, Any, Any]:
    """(parameters, state, history) of all runs, the history with an axis of steps after that of runs."""
    ends = [
        (params, state, tree.tree_map(lambda *rows: torch.stack(rows, 1), *infos))
        for _, (params, _, state), infos in chunks
    ]
    whole: tuple[Any, Any, Any] = ends[0] if len(ends) == 1 else tree.tree_map(lambda *parts: torch.cat(parts), *ends)
    return whole
