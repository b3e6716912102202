"""The small problems inside of the methods: against scipy's active-set solver, pseudoinverses, and their equations."""

import subprocess
import sys

import numpy as np
import pytest
import scipy.optimize
import torch

from gradnorm_func._solvers import fair, trust
from gradnorm_func._solvers import nnls as least_squares
from gradnorm_func._solvers.aligned import align
from gradnorm_func._solvers.cone import project_each, project_mean
from gradnorm_func._solvers.equal import equal_projections
from gradnorm_func._solvers.min_norm import min_norm
from gradnorm_func._solvers.nnls import nnls
from gradnorm_func._solvers.spectrum import jacobi
from gradnorm_func._solvers.surgery import project_in_turn
from gradnorm_func._solvers.trust import near_mean

F64 = torch.float64
DRAWS, BAR = 200, 1e-8
COUNTS = (2, 3, 8, 32)
KINDS = ("generic", "conflicting", "deficient", "deficient cone", "ill-scaled", "ill-scaled cone")
# Below this part of the shortest gradient's square length, an objective is zero but for the rounding of the Gramian.
NOTHING = 1e-6


def draw(kind, count, seed):
    """(T, n) task gradients."""
    source = torch.Generator().manual_seed(seed)
    rand = lambda *shape: torch.randn(*shape, generator=source, dtype=F64)
    low_rank = rand(count, max(1, count // 2)) @ rand(max(1, count // 2), 2 * count)
    length = 10 ** (8 * torch.rand(count, 1, generator=source, dtype=F64) - 4)
    common = rand(1, 2 * count)
    return {
        "generic": lambda: rand(count, 2 * count),
        "conflicting": lambda: rand(count, 2 * count) + torch.linspace(-3, 3, count, dtype=F64)[:, None] * common,
        "deficient": lambda: low_rank,  # 0 is a convex combination of many of these
        "deficient cone": lambda: low_rank + 3 * common,  # and of none of these
        "ill-scaled": lambda: rand(count, 2 * count) * length,
        "ill-scaled cone": lambda: (low_rank + 2 * common) * length,
    }[kind]()


def solve(rows, active=None):
    active = torch.ones(len(rows), dtype=torch.bool) if active is None else active
    return min_norm(rows @ rows.T, active)


def shortest(rows):
    """The weights by scipy, from the gradients themselves, each scaled to length 1."""
    length = rows.norm(dim=1)
    inverse = (length.min() / length).numpy()
    table = np.vstack([(rows / length[:, None]).numpy().T, inverse])
    found = scipy.optimize.nnls(table, np.eye(len(table))[-1], maxiter=1000)[0] * inverse
    return torch.from_numpy(found / found.sum())


def square(weights, rows):
    return (weights @ rows).square().sum()


def check(weights, gap, rows):
    """As short as scipy's, and certified."""
    assert (weights >= 0).all()
    assert abs(weights.sum() - 1) <= 1e-14
    best = square(shortest(rows), rows)
    scale = torch.maximum(best, NOTHING * rows.square().sum(1).min())
    assert square(weights, rows) - best <= BAR * scale
    assert abs(gap) <= 1e-10


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_shortest_combination(kind, count):
    draws = [draw(kind, count, seed) for seed in range(DRAWS)]
    gramians = torch.stack([rows @ rows.T for rows in draws])
    active = torch.ones(count, dtype=torch.bool)
    weights, gaps = torch.func.vmap(min_norm, (0, None))(gramians, active)
    for found in zip(weights, gaps, draws, strict=True):
        check(*found)
    for i in range(3):  # and one by one
        check(*min_norm(gramians[i], active), draws[i])


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("rank", ["full", "deficient"])
def test_least_squares(rank, count):
    source = torch.Generator().manual_seed(0)
    rand = lambda *shape: torch.randn(*shape, generator=source, dtype=F64)
    tables = rand(DRAWS, 2 * count, count)
    if rank == "deficient":
        tables = rand(DRAWS, 2 * count, count // 2) @ rand(DRAWS, count // 2, count)
    tables, goals = tables / tables.norm(dim=1, keepdim=True), rand(DRAWS, 2 * count, 1)
    goals = goals / goals.norm(dim=1, keepdim=True)
    found = torch.func.vmap(nnls)(tables.mT @ tables, (tables.mT @ goals)[..., 0])
    compared = 0
    for w, table, goal in zip(found, tables, goals[..., 0], strict=True):
        assert (w >= 0).all()
        # None that would pay, and none at a weight that is not 0: of a convex problem this is the solution.
        slopes = table.T @ (table @ w - goal)
        assert slopes.min() >= -1e-12
        assert (w * slopes).abs().max() <= 1e-13 * w.max().clamp(min=10)
        # Not by the residual that scipy returns, which is not always that of its solution; and of dependent columns it
        # has some weights of 1e15, whose residual is rounding, on some machines.
        other = torch.from_numpy(scipy.optimize.nnls(table.numpy(), goal.numpy(), maxiter=1000)[0])
        if other.max() < 1e6:
            best = (table @ other - goal).square().sum()
            assert (table @ w - goal).square().sum() - best <= BAR * best
            compared += 1
    assert compared >= 0.95 * DRAWS


@pytest.mark.parametrize("count", COUNTS)
def test_the_gap_certifies(count):
    """It is what a Frank-Wolfe step could still win: 0 at the solution, and of the order of the error elsewhere."""
    rows = draw("generic", count, 0)
    weights, gap = solve(rows)
    gramian = rows @ rows.T
    slopes = gramian @ weights
    expected = (weights @ slopes - slopes.min()) / gramian.diag().mean()
    torch.testing.assert_close(gap, expected, rtol=0, atol=1e-15)
    even = torch.full_like(weights, 1 / count)
    assert ((even @ gramian @ even) - (gramian @ even).min()) / gramian.diag().mean() > 1e-3


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("factor", [1e-8, 1e8])
def test_a_common_scale_changes_nothing(count, factor):
    for kind in KINDS[:4]:
        rows = draw(kind, count, 1)
        check(*solve(factor * rows), rows)


@pytest.mark.parametrize("count", COUNTS)
def test_a_gradient_of_zero(count):
    """Then the shortest combination is zero, and all weight is on the tasks that are solved."""
    rows = draw("generic", count, 2)
    rows[1] = 0
    weights, gap = solve(rows)
    assert weights[1] == pytest.approx(1.0)
    assert square(weights, rows) <= 1e-20
    assert abs(gap) <= 1e-10
    weights, gap = solve(torch.zeros_like(rows))
    assert weights.isfinite().all()
    assert weights.sum() == pytest.approx(1.0)
    assert gap == 0


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("kind", KINDS)
def test_absent_tasks(kind, count):
    """What is not there has no weight, and the others are as they were without it."""
    rows = draw(kind, count, 3)
    for absent in (0, count - 1):
        active = torch.ones(count, dtype=torch.bool)
        active[absent] = False
        gramian = torch.where(active[:, None] & active, rows @ rows.T, torch.eye(count, dtype=F64))
        weights, gap = min_norm(gramian, active)
        assert weights[absent] == 0
        check(weights[active], gap, rows[active])
    alone = torch.arange(count) == 1
    assert min_norm(torch.where(alone[:, None] & alone, rows @ rows.T, torch.eye(count, dtype=F64)), alone)[0][1] == 1


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_task_that_is_there_twice(kind, count):
    """Both share its weight evenly, and the combination is the same."""
    rows = draw(kind, count, 4)
    twice = torch.cat([rows, rows[:1]])
    weights, gap = solve(twice)
    best = square(shortest(rows), rows)
    scale = torch.maximum(best, NOTHING * rows.square().sum(1).min())
    assert square(weights, twice) - best <= BAR * scale
    torch.testing.assert_close(weights[0], weights[-1], rtol=0, atol=0.01)  # any split of it is as short
    assert abs(gap) <= 1e-10


@pytest.mark.parametrize("apart", [1e-2, 1e-4, 1e-5])
@pytest.mark.parametrize("kind", KINDS)
def test_tasks_that_are_almost_the_same(kind, apart):
    for seed in range(20):
        rows = draw(kind, 8, seed)
        noise = draw("generic", 8, seed + 1000)
        near = torch.cat([rows, rows + apart * rows.norm(dim=1, keepdim=True) * noise / noise.norm(dim=1).mean()])
        check(*solve(near), near)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("kind", KINDS)
def test_vmap_equals_a_loop(kind, count):
    gramians = torch.stack([rows @ rows.T for rows in (draw(kind, count, seed) for seed in range(5))])
    active = torch.ones(count, dtype=torch.bool)
    together = torch.func.vmap(min_norm, (0, None))(gramians, active)
    for i, gramian in enumerate(gramians):
        weights, gap = min_norm(gramian, active)
        # Of a Gramian that is not definite the minimiser is not unique, and rounding decides.
        a, b = together[0][i] @ gramian @ together[0][i], weights @ gramian @ weights
        torch.testing.assert_close(a, b, rtol=1e-9, atol=float(NOTHING * BAR * gramian.diag().min()))
        if kind == "generic":
            torch.testing.assert_close((together[0][i], together[1][i]), (weights, gap), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("count", [2, 8])
def test_one_graph(count):
    step = torch.compile(min_norm, fullgraph=True, backend="aot_eager")
    active = torch.ones(count, dtype=torch.bool)
    for seed in range(3):
        rows = draw("generic", count, seed)
        torch.testing.assert_close(step(rows @ rows.T, active), solve(rows), rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("count", [2, 3])
def test_derivatives(count):
    """Through the fixed number of iterations, against differences."""
    rows, other = draw("generic", count, 5), draw("generic", count, 6)

    def weight(t):
        moved = rows + t * other
        return min_norm(moved @ moved.T, torch.ones(count, dtype=torch.bool))[0][0]

    zero, h = torch.zeros((), dtype=F64), 1e-5
    derivative = torch.func.grad(weight)(zero)
    assert derivative.abs() > 1e-3
    torch.testing.assert_close(derivative, (weight(zero + h) - weight(zero - h)) / (2 * h), rtol=1e-5, atol=1e-7)


def test_single_precision():
    """A Gramian in float32 is solved in float64, and comes back as it was."""
    rows = draw("generic", 8, 7)
    weights, gap = min_norm((rows @ rows.T).float(), torch.ones(8, dtype=torch.bool))
    assert weights.dtype == gap.dtype == torch.float32
    torch.testing.assert_close(weights.double(), solve(rows)[0], rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------------------------------------- all of them


def everyone(rows):
    return torch.ones(len(rows), dtype=torch.bool)


def scalar(x):
    return torch.tensor(x, dtype=F64)


def bar(rows, kind):
    """One draw of 200 is so degenerate at T = 128 that the interior point stops at 3e-7, as its certificate says."""
    return 1e-6 if kind == "deficient" and len(rows) == 128 else BAR


def near(found, expected, scale):
    assert expected.isfinite().all()
    assert (found - expected).norm() <= BAR * scale


def projected(rows, k):
    """The gradient k, or the vector that stands for it, in the cone of no conflict: scipy's, from unit vectors."""
    units = rows / rows.norm(dim=1, keepdim=True)
    x = scipy.optimize.nnls(units.T.numpy(), -k.numpy(), maxiter=10000)[0]
    return k + torch.from_numpy(x) @ units


def check_min_norm(rows, kind):
    check(*min_norm(rows @ rows.T, everyone(rows)), rows)


def check_project_each(rows, kind):
    weights, error = project_each(rows @ rows.T, everyone(rows))
    assert error <= BAR
    expected = torch.stack([projected(rows, row) for row in rows]).mean(0)
    near(weights @ rows, expected, max(expected.norm(), NOTHING**0.5 * rows.norm(dim=1).min()))
    assert (weights >= 1 / len(rows) - 1e-12).all()


def check_project_mean(rows, kind):
    weights, error = project_mean(rows @ rows.T, everyone(rows))
    assert error <= bar(rows, kind)
    expected = projected(rows, rows.mean(0))
    near(weights @ rows, expected, max(expected.norm(), rows.norm(dim=1).min() if kind == "deficient" else 0))


def check_near_mean(rows, kind):
    """No direction is better by more than the gap between what d achieves and what the dual shows possible."""
    for c in (0.4, 0.9):
        weights, gap = near_mean(rows @ rows.T, everyone(rows), scalar(c))
        assert abs(gap) <= bar(rows, kind)
        mean = rows.mean(0)
        d, radius = weights @ rows, c * mean.norm()
        torch.testing.assert_close((d - mean).norm(), radius, rtol=1e-7, atol=0)
        w = weights - 1 / len(rows)
        assert (w >= -1e-12 * weights.abs().max()).all()
        combined = w @ rows / w.sum()
        possible = combined @ mean + radius * combined.norm()
        assert possible - (rows @ d).min() <= bar(rows, kind) * mean.square().sum()


def check_fair(rows, kind):
    for alpha in (1.0, 2.0):
        weights, error = fair.fair(rows @ rows.T, everyone(rows), torch.ones(len(rows)), scalar(alpha))
        assert (weights > 0).all()
        assert weights.isfinite().all()
        if kind != "deficient":  # without a direction that helps all tasks there is no solution
            assert error <= BAR
            assert ((rows @ (weights @ rows)) * weights ** (1 / alpha) - 1).abs().max() <= BAR
        elif alpha == 1:  # with the ridge that stands for one, d is no longer than that of a solution
            assert (weights @ rows).square().sum() <= len(rows) * (1 + 1e-6)


def equal_direction(rows):
    """ConFIG's d, pinv(units) 1 in its own length, and whether its projections are equal: from the gradients."""
    units = rows / rows.norm(dim=1, keepdim=True)
    a = torch.from_numpy(np.linalg.pinv(units.numpy(), rcond=1e-7)) @ torch.ones(len(rows), dtype=F64)
    return a / a.norm() * (rows @ a).sum() / a.norm(), (units @ a - 1).abs().max() < 1e-6


def check_equal(rows, kind):
    weights, error = equal_projections(rows @ rows.T, everyone(rows))
    length = rows.norm(dim=1)
    if len(rows) == 2:  # which has a limit for opposite gradients
        torch.testing.assert_close(weights, length.mean() / length, rtol=1e-12, atol=0)
        return
    expected, solvable = equal_direction(rows)
    near(weights @ rows, expected, expected.norm())
    assert (error <= BAR) == solvable


def check_align(rows, kind):
    if kind.startswith("ill-scaled"):
        rows = rows / rows.norm(dim=1, keepdim=True) ** 0.75  # two decades: of eight a Gramian has lost the smallest
    weights, error = align(rows @ rows.T, everyone(rows), torch.ones(len(rows)))
    u, s, _ = torch.linalg.svd(rows, full_matrices=False)
    kept = s > 1e-6 * s[0]
    expected = u[:, kept] @ (u[:, kept].sum(0) / s[kept]) * s[kept].min()
    near(weights, expected, expected.norm())
    assert error <= BAR


def check_in_turn(rows, kind):
    order = torch.randperm(len(rows))
    weights, _ = project_in_turn(rows @ rows.T, everyone(rows), order)
    total = torch.zeros_like(rows[0])
    for i, row in enumerate(rows):
        for j in order:
            against = row @ rows[j]
            if i != j and against < 0:
                row = row - against / rows[j].square().sum() * rows[j]
        total += row
    near(weights @ rows, total, max(total.norm(), 1e-4 * rows.norm()))


CHECKS = {name.removeprefix("check_"): check for name, check in list(globals().items()) if name.startswith("check_")}
FEW = {2: 20, 3: 20, 8: 20, 32: 3, 128: 1}


@pytest.mark.parametrize("count", FEW)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CHECKS)
def test_a_few_draws(name, kind, count):
    if (name, count) == ("project_each", 128) and kind != "conflicting":
        pytest.skip("scipy's 128 problems take long")
    for seed in range(FEW[count]):
        CHECKS[name](draw(kind, count, seed), kind)


@pytest.mark.slow
@pytest.mark.parametrize("count", FEW)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CHECKS)
def test_many_draws(name, kind, count):
    for seed in range(5 if (name, count) == ("project_each", 128) else DRAWS):
        CHECKS[name](draw(kind, count, seed), kind)


@pytest.mark.parametrize("count", [2, 3, 8])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CHECKS)
def test_without_asking(name, kind, count, monkeypatch):
    """As on a device: fixed work, no early exit."""
    for module in (least_squares, trust, fair):
        monkeypatch.setattr(module, "free_to_ask", lambda x: False)
    for seed in range(3):
        CHECKS[name](draw(kind, count, seed), kind)


@pytest.mark.parametrize("count", [1, 2, 3, 8, 33])
def test_rotations_find_the_eigenvalues(count):
    rows = draw("generic", count, 0)
    values, vectors = jacobi(rows @ rows.T)
    torch.testing.assert_close(values.sort()[0], torch.linalg.eigvalsh(rows @ rows.T), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close((vectors * values) @ vectors.T, rows @ rows.T, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(count, dtype=F64))


@pytest.mark.parametrize(("count", "rank"), [(3, 2), (4, 3), (6, 4), (8, 7), (32, 20)])
@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_equal_projections_of_dependent_gradients(count, rank, dtype):
    """More tasks than dimensions, or a total among the tasks: a float32 Gramian has no null space but for rounding."""
    for seed in range(20):
        source = torch.Generator().manual_seed(seed)
        rows = torch.randn(count, rank, generator=source)
        wide = torch.randn(count, 100, generator=source)
        wide[-1] = wide[0] + wide[1]
        for gradients in (rows.to(dtype), wide.to(dtype)):
            weights, error = equal_projections(gradients @ gradients.T, everyone(gradients))
            expected, solvable = equal_direction(gradients.double())
            assert not solvable
            assert error > 1e-3
            assert expected.norm() > 1e-3
            off = (weights.double() @ gradients.double() - expected).norm() / expected.norm()
            assert off <= (1e-9 if dtype == F64 else 2e-2)


def test_equal_projections_of_a_total_by_hand():
    gramian = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0], [1.0, 1.0, 2.0]])
    weights, error = equal_projections(gramian, torch.ones(3, dtype=torch.bool))
    torch.testing.assert_close(weights, torch.ones(3), rtol=1e-5, atol=0)
    torch.testing.assert_close(error, torch.tensor(0.5**0.5 * (1 - 0.5**0.5)), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("draws", "count", "rank", "c", "dtype"),
    [(3000, 12, 5, 0.4, torch.float32), (1500, 8, 4, 0.4, F64), (600, 8, 4, 0.9, F64)],
)
def test_near_mean_of_more_tasks_than_dimensions(draws, count, rank, c, dtype):
    """Where Python may not ask, every one of them: what d achieves is what the dual shows possible."""
    source = torch.Generator().manual_seed(0 if dtype == torch.float32 else 1)
    rows = torch.randn(draws, count, rank, generator=source, dtype=dtype)
    active = torch.ones(count, dtype=torch.bool)
    weights, gaps = torch.func.vmap(near_mean, (0, None, None))(rows @ rows.mT, active, scalar(c))
    assert gaps.abs().max() <= 1e-6
    rows, w = rows.double(), weights.double() - 1 / count
    mean, d = rows.mean(1), (weights.double().unsqueeze(1) @ rows)[:, 0]
    radius = c * mean.norm(dim=1)
    combined = (w.unsqueeze(1) @ rows)[:, 0] / w.sum(1, keepdim=True)
    possible = (combined * mean).sum(1) + radius * combined.norm(dim=1)
    achieved = (rows @ d.unsqueeze(-1))[..., 0].amin(1)
    longest = rows.norm(dim=2).amax(1)
    assert (achieved > 0.1).any()
    assert (((d - mean).norm(dim=1) - radius).abs() / longest).max() <= (1e-9 if dtype == F64 else 1e-2)
    assert ((possible - achieved) / longest.square()).max() <= (1e-9 if dtype == F64 else 1e-2)


AGAIN = """
import importlib, sys, torch
import gradnorm_func as gn
{again}
step = lambda a, b: nnls.nnls(a, b) + 1
a, b = torch.eye(3, dtype=torch.float64), torch.tensor([1.0, -1.0, 2.0], dtype=torch.float64)
print(torch.compile(step, fullgraph=True, backend="aot_eager")(a, b).tolist())
"""
RELOADED = "from gradnorm_func._solvers import nnls; importlib.reload(nnls)"
ANEW = """
old = {name: module for name, module in sys.modules.items() if name.startswith("gradnorm_func")}
for name in old: del sys.modules[name]
from gradnorm_func._solvers import nnls
"""


@pytest.mark.parametrize("again", [RELOADED, ANEW])
def test_a_node_is_no_obstacle_to_another_import(again):
    """A notebook reloads modules; a test runner may import a package anew while the old one is alive."""
    run = subprocess.run(
        [sys.executable, "-c", AGAIN.replace("{again}", again)], capture_output=True, text=True, check=False
    )
    assert run.stdout.strip() == "[2.0, 1.0, 3.0]", run.stderr[-2000:]
