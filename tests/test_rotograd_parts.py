"""RotoGrad on micro-batches, and what several ranks do: the step of the whole batch."""

from __future__ import annotations

import pytest
import torch
from rotograd_cases import F64, D, T, by_example, flat, problem, start

import gradnorm_func as gn


@pytest.mark.parametrize("micro_batches", [3, 4])
@pytest.mark.parametrize(
    "hyper",
    [
        {},
        {"scale": "none", "normalize": True},
        {"scale": "gradnorm", "form": "0.1.6", "alpha": 0.5, "normalize": True},
        {"scale": "gradnorm", "form": "0.1.2", "alpha": 0.5, "cooperative": 1},
        {"moving": False, "map": "exp", "cooperative": 0},
        {"normalize": True, "backbone_loss": lambda p, z, b: z.square().mean()},
        {"every": 2},
    ],
)
def test_micro_batches_equal_the_whole_batch(hyper, micro_batches):
    params, loss_fn, batch = problem()
    loss_fn, batch = by_example(loss_fn, batch)
    method = gn.rotograd(D, **hyper)
    whole = parts = method.init(T, rotations=start(), dtype=F64)
    for step in range(3):
        now = {**params, "trunk": params["trunk"] * (1 - 0.2 * step)}
        grads, whole, info = method.grad(whole, now, loss_fn, batch)
        mine, parts, mine_info = method.grad(parts, now, loss_fn, batch, micro_batches=micro_batches)
        for a, b in zip(flat((grads, whole, info)), flat((mine, parts, mine_info)), strict=True):
            torch.testing.assert_close(a, b, equal_nan=True)


@pytest.mark.parametrize(
    "hyper",
    [
        {},
        {"normalize": True, "backbone_loss": lambda p, z, b: z.square().mean()},
        {"form": "0.1.2", "scale": "none", "normalize": True, "cooperative": 0},
    ],
)
def test_stats_of_unequal_parts_merge_to_those_of_the_whole(hyper):
    """As ranks do it: the stats of every part, and after them the gradients made with the factors of the whole."""
    params, loss_fn, batch = problem()
    loss_fn, batch = by_example(loss_fn, batch)
    method = gn.rotograd(D, **hyper)
    state = method.init(T, rotations=start(), dtype=F64)
    grads, expected, _ = method.grad(state, params, loss_fn, batch)
    x, y = (batch[name].split([3, 1, 4]) for name in ("x", "y"))
    parts = [{"x": x, "y": y} for x, y in zip(x, y, strict=True)]

    def rounds_of(part, answers):
        """What `reduce` sees in each round, being answered with `answers`."""
        rounds = []
        reduce = lambda stats: rounds.append(stats) or (answers[len(rounds) - 1] or stats)
        method.grad(state, params, loss_fn, part, reduce=reduce)
        return rounds

    measured = [rounds_of(part, [None, None])[0] for part in parts]
    assert [float(stats.num_examples) for stats in measured] == [3.0, 1.0, 4.0]
    merged = gn.merge(*measured)
    whole = gn.merge(rounds_of(batch, [None, None])[0])
    torch.testing.assert_close(merged, whole, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(gn.merge(gn.merge(*measured[:2]), measured[2]), whole, rtol=1e-12, atol=1e-14)
    new, _ = method.balance(state, merged)
    torch.testing.assert_close(new, expected, rtol=1e-10, atol=1e-12, equal_nan=True)
    last = gn.merge(*(rounds_of(part, [merged, None])[1] for part in parts))
    torch.testing.assert_close(last.grads, grads, rtol=1e-10, atol=1e-12)
    wrong = gn.merge(*(rounds_of(part, [None, None])[1] for part in parts))  # every part with factors of its own
    assert "cooperative" in hyper or (wrong.grads["trunk"] - grads["trunk"]).abs().max() > 1e-4
