"""What `balancer` promises of every rule: when it is asked, which weights are used, and what is left out of it."""

import functools
from typing import Any

import pytest
import torch
from toys import BALANCERS, but_for_looks, leaves, make_batch, make_problem, same_bits

import gradnorm_func as gn

F64 = torch.float64
ENGINES = {
    "z": ("seam", None),
    "W": ("seam", "trunk.1.weight"),
    "early": ("seam", ["trunk.0", "trunk.1.bias"]),
    "with a head": ("seam", ["trunk.0", "head.1"]),
    "general": ("general", None),
    "general at W": ("general", "trunk.1.weight"),
    "separable": ("separable", None),
}
MODES = {"whole": {}, "micro-batches": {"micro_batches": 2}, "reduce": {"reduce": lambda stats: stats}}
NEEDS = ("losses", "norms", "example_norms", "gramian")
every_balancer = pytest.mark.parametrize("name", BALANCERS)
RESTING = ("static", "dualproj", "dwa", "relobralo")  # whose weights need not move in the first step
TURNS = [name for name in BALANCERS if name not in RESTING]


def test_what_a_balancer_and_a_loss_are_called():
    assert repr(gn.gradnorm(alpha=1.5)) == "Balancer(gradnorm, needs='norms', where=None, every=1)"
    assert repr(gn.upgrad(where="trunk", every=3)) == "Balancer(upgrad, needs='gramian', where='trunk', every=3)"
    assert repr(gn.stch()) == "Balancer(stch, needs='losses', where=None, every=1)"
    assert repr(gn.nash()) == "Balancer(nash, needs='gramian', where=None, every=1)"
    assert repr(gn.rotograd(4)) == "Balancer(rotograd, needs='norms', where=None, every=1)"

    def inverse():
        return gn.balancer(lambda state, seen: (1 / seen.losses, ()), needs="losses", where=lambda path: True)

    assert repr(inverse()) == "Balancer(inverse, needs='losses', where=<lambda>, every=1)"
    problem = make_problem()
    assert repr(problem.seam) == "MultiTaskLoss(['t0', 't1', 't2'])"
    assert repr(gn.multi_task_loss(None, [len, len])) == "MultiTaskLoss(2 tasks)"
    assert repr(gn.multi_task_loss(len, gn.stacked_heads(len, "heads"))) == "MultiTaskLoss(stacked_heads at 'heads')"
    for name in ("gradnorm-adam", "upgrad"):
        balancer = BALANCERS[name](None)
        step = torch.compile(balancer.grad, fullgraph=True, backend="eager")
        state = balancer.init(3, dtype=F64)
        expected = balancer.grad(state, problem.params, problem.seam, problem.batch)
        torch.testing.assert_close(leaves(step(state, problem.params, problem.seam, problem.batch)), leaves(expected))


def task_gradients(problem, params, batch):
    """Path -> (T, ...), by a loop of torch.autograd.grad."""
    theta = {path: leaf.clone().requires_grad_() for path, leaf in params.items()}
    losses = problem.general(theta, batch)
    rows = [
        torch.autograd.grad(losses[task], list(theta.values()), retain_graph=True, materialize_grads=True)
        for task in sorted(losses)
    ]
    return {path: torch.stack(column) for path, column in zip(theta, zip(*rows, strict=True), strict=True)}


def assert_applied(grads, weights, rows, own=(), *, rtol=1e-10):
    """Σ w_i ∇L_i everywhere, but for the paths `own`, which learn from their own losses at weight 1."""
    for path, row in rows.items():
        factors = torch.ones_like(weights) if path in own else weights
        expected = torch.tensordot(factors, row, 1)
        assert row.norm() > 0
        assert (grads[path] - expected).norm() <= rtol * (factors.abs()[:, None] * row.flatten(1)).norm(), path


def own_paths(balancer, form, where):
    """The heads' parameters, where heads learn from their own losses; but W gets the combination in any case."""
    if balancer._passes.heads == "weighted" or form != "seam":
        return []
    named = [] if where is None else [where] if isinstance(where, str) else where
    return [f"head.{task}" for task in range(3) if f"head.{task}" not in named]


# ---------------------------------------------------------------------------------------------- applied = reported


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("engine", ENGINES)
@every_balancer
def test_applied_is_reported(name, engine, mode):
    problem, (form, where) = make_problem(), ENGINES[engine]
    balancer = BALANCERS[name](where)
    state, params = balancer.init(3, dtype=F64), problem.params
    used = []
    for t in range(3):
        batch = make_batch(t)
        grads, new, info = balancer.grad(state, params, getattr(problem, form), batch, **MODES[mode])
        rows = task_gradients(problem, params, batch)
        assert_applied(grads, info.weights, rows, own_paths(balancer, form, where))
        torch.testing.assert_close(info.total_loss, (info.weights * info.losses).sum(), rtol=1e-12, atol=0)
        assert info.finite
        used.append(info.weights)
        state, params = new, {path: leaf - 0.02 * grads[path] for path, leaf in params.items()}
    if name not in RESTING:
        assert not torch.equal(used[0], used[2]), "weights that do not move prove nothing"


@pytest.mark.parametrize("engine", ["z", "with a head", "general", "separable"])
@every_balancer
def test_applied_is_reported_of_the_present_tasks(name, engine):
    problem, (form, where) = make_problem(), ENGINES[engine]
    balancer = BALANCERS[name](where)
    state, mask = balancer.init(3, dtype=F64), torch.tensor([True, False, True])
    for t in range(2):
        batch = make_batch(t)
        grads, new, info = balancer.grad(state, problem.params, getattr(problem, form), batch, mask=mask)
        rows = task_gradients(problem, problem.params, batch)
        present = {path: row * mask.reshape(3, *[1] * (row.ndim - 1)) for path, row in rows.items()}
        absent = present.pop("head.1")
        assert not absent.any()
        assert not grads["head.1"].any()
        assert_applied(grads, info.weights, present, own_paths(balancer, form, where))
        assert new.weights[1] == state.weights[1]
        assert info.weights[1] == 0
        shown = [info.losses, info.grad_norms, *(getattr(info, name, ()) for name in ("targets", "inverse_rates"))]
        assert all(row[1].isnan() for row in shown if isinstance(row, torch.Tensor))
        torch.testing.assert_close(info.total_loss, (info.weights * info.losses)[mask].sum(), rtol=1e-12, atol=0)
        state = new


# ---------------------------------------------------------------------------------------------- once a step


def counted(needs, same_step, heads="weighted", where=None, every=1):
    """A rule that counts its calls, and gives other weights each time."""
    calls = []

    def rule(state, seen):
        calls.append(seen)
        return 0.5 + torch.rand(3, dtype=F64), {"calls": state.memory["calls"] + 1}

    memory = lambda weights: {"calls": torch.zeros((), dtype=torch.int64)}
    options: Any = {"needs": needs, "same_step": same_step, "heads": heads, "where": where, "every": every}
    return gn.balancer(rule, memory=memory, **options), calls


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("engine", ["z", "W", "with a head", "general", "separable"])
@pytest.mark.parametrize("same_step", [False, True])
@pytest.mark.parametrize("needs", NEEDS)
def test_a_random_rule_is_asked_once(needs, same_step, engine, mode):
    problem, (form, where) = make_problem(), ENGINES[engine]
    rows = task_gradients(problem, problem.params, problem.batch)
    for heads in ("weighted", "own"):
        balancer, calls = counted(needs, same_step, heads, where)
        state = balancer.init(3, dtype=F64, weights=[0.3, 1.7, 0.9])
        loss_fn = getattr(problem, form)
        grads, new, info = balancer.grad(state, problem.params, loss_fn, problem.batch, **MODES[mode])
        assert len(calls) == 1
        assert new.memory["calls"] == 1
        assert torch.equal(info.weights, new.weights if same_step else state.weights)
        assert not torch.equal(new.weights, state.weights)
        assert_applied(grads, info.weights, rows, own_paths(balancer, form, where))
        balancer.update(state, problem.params, loss_fn, problem.batch, **MODES[mode])
        assert len(calls) == 2
        balancer.grad(state, problem.params, loss_fn, problem.batch, update=False, **MODES[mode])
        assert len(calls) == 2


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("engine", ENGINES)
def test_losses_alone_choose_this_steps_weights(engine, mode):
    problem, (form, where) = make_problem(), ENGINES[engine]
    balancer = gn.balancer(
        lambda state, seen: (3 * seen.softmax(seen.losses), ()), needs="losses", same_step=True, where=where
    )
    state = balancer.init(3, dtype=F64)
    grads, new, info = balancer.grad(state, problem.params, getattr(problem, form), problem.batch, **MODES[mode])
    expected = 3 * info.losses.softmax(0)
    assert (expected - 1).abs().max() > 0.3
    torch.testing.assert_close(info.weights, expected, rtol=1e-12, atol=0)
    assert torch.equal(new.weights, info.weights)
    assert info.grad_norms.isnan().all(), "nothing but losses was asked for"
    assert_applied(grads, expected, task_gradients(problem, problem.params, problem.batch))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("needs", NEEDS)
def test_a_rule_sees_what_it_asked_for(needs, engine):
    problem, (form, where) = make_problem(), ENGINES[engine]
    for mode in MODES.values():
        balancer, (calls) = counted(needs, True, where=where)
        loss_fn = getattr(problem, form)
        balancer.grad(balancer.init(3, dtype=F64), problem.params, loss_fn, problem.batch, **mode)
        (seen,) = calls
        stats = gn.measure(problem.params, loss_fn, problem.batch, where=where, needs="gramian")
        norms = gn.measure(problem.params, loss_fn, problem.batch, where=where)
        torch.testing.assert_close(seen.losses, stats.losses, rtol=1e-12, atol=0)
        if needs == "losses":
            assert seen.norms.isnan().all()
        else:
            torch.testing.assert_close(seen.norms, stats.grad_norms, rtol=1e-10, atol=0)
        if needs == "gramian":
            torch.testing.assert_close(seen.gramian, stats.gramian, rtol=1e-10, atol=1e-14)
        else:
            assert seen.gramian == ()
        if needs == "example_norms" and engine == "z":
            torch.testing.assert_close(seen.example_norms, norms.example_norms, rtol=1e-10, atol=0)


# ---------------------------------------------------------------------------------------------- in turns


@pytest.mark.parametrize("engine", ["z", "W", "general", "separable"])
@pytest.mark.parametrize("name", TURNS)
def test_weights_move_in_every_third_step(name, engine):
    problem, (form, where) = make_problem(), ENGINES[engine]
    balancer = BALANCERS[name](where, every=3)
    assert balancer.every == 3
    state, params = balancer.init(3, dtype=F64), problem.params
    for t in range(7):
        batch = make_batch(t)
        grads, new, info = balancer.grad(state, params, getattr(problem, form), batch)
        assert new.step == t + 1
        assert torch.equal(new.weights, state.weights) == (t % 3 != 0)
        assert info.finite
        if t % 3:
            assert info.grad_norms.isnan().all()
            assert same_bits(new, state._replace(step=state.step + 1))
            assert torch.equal(info.weights, state.weights)
        rows = task_gradients(problem, params, batch)
        assert_applied(grads, info.weights, rows, own_paths(balancer, form, where))
        updated = balancer.update(state, params, getattr(problem, form), batch)
        torch.testing.assert_close(but_for_looks(updated), but_for_looks(new), rtol=1e-10, atol=1e-13, equal_nan=True)
        state, params = new, {path: leaf - 0.02 * grads[path] for path, leaf in params.items()}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["gradnorm-adam", "fixed-ratio", "mgda"])
def test_in_between_a_step_is_a_plain_one(name, mode):
    """The backward passes of a head, counted; and with update=False as without."""
    problem, passes = make_problem(), []

    class Counted(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            passes.append(grad)
            return grad

    inner = problem.seam.heads["t0"]
    heads = problem.seam.heads | {"t0": lambda params, z, batch: Counted.apply(inner(params, z, batch))}
    loss_fn = gn.multi_task_loss(problem.seam.backbone, heads, last_shared=problem.seam.last_shared)
    balancer = BALANCERS[name](None, every=2)
    state, parts = balancer.init(3, dtype=F64), MODES[mode].get("micro_batches", 1)
    counts = []
    for t in range(4):
        passes.clear()
        _, state, _ = balancer.grad(state, problem.params, loss_fn, make_batch(t), **MODES[mode])
        counts.append(len(passes))
    assert counts[1] == counts[3] == parts
    assert counts[0] == counts[2] == (parts if name in ("gradnorm-adam", "mgda") and mode == "whole" else counts[0])
    passes.clear()
    balancer.grad(state, problem.params, loss_fn, make_batch(0), update=False, **MODES[mode])
    assert len(passes) == parts


# One of each kind: what it needs, and whether its weights are of the same step. Turns are no affair of the rules.
KINDS = ["gradnorm-adam", "fixed-ratio", "mgda", "ntk", "uncertainty", "rlw"]


@pytest.mark.parametrize(("name", "masked"), [*((name, True) for name in KINDS), ("gradnorm-adam", False)])
def test_compiled_turns_equal_eager_ones(name, masked):
    """One graph measures always; what it reports of the steps in between is what an eager step knows of them."""
    problem, balancer = make_problem(), BALANCERS[name](None, every=2)
    mask = torch.tensor([True, True, False]) if masked else None
    bound = functools.partial(balancer.grad, mask=mask)
    step = torch.compile(bound, fullgraph=True, backend="aot_eager")
    state = eager = balancer.init(3, dtype=F64)
    for t in range(4):
        update = torch.tensor(t != 2)
        grads, state, info = step(state, problem.params, problem.seam, make_batch(t), update=update)
        expected = bound(eager, problem.params, problem.seam, make_batch(t), update=update)
        eager = expected[1]
        torch.testing.assert_close((grads, state, info), tuple(expected), rtol=1e-10, atol=1e-12, equal_nan=True)
    assert state.step == 3, "a frozen step is not counted"


@every_balancer
def test_a_frozen_step_changes_nothing(name):
    problem = make_problem()
    for engine in ("z", "W", "general", "separable"):
        form, where = ENGINES[engine]
        balancer, loss_fn = BALANCERS[name](where), getattr(problem, form)
        _, state, _ = balancer.grad(balancer.init(3, dtype=F64), problem.params, loss_fn, problem.batch)
        rows = task_gradients(problem, problem.params, make_batch(5))
        for update in (False, torch.tensor(False)):
            for mode in MODES.values():
                grads, new, info = balancer.grad(state, problem.params, loss_fn, make_batch(5), update=update, **mode)
                assert same_bits(new, state)
                assert torch.equal(info.weights, state.weights)
                if update is False:
                    assert info.grad_norms.isnan().all()
                assert_applied(grads, state.weights, rows, own_paths(balancer, form, where))


# ---------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("engine", ["z", "W", "general", "separable"])
@pytest.mark.parametrize("same_step", [False, True])
@pytest.mark.parametrize("needs", ["losses", "norms", "gramian"])
def test_a_refused_step_is_made_with_the_old_weights(needs, same_step, engine, mode):
    """The rule's own fault: losses and norms are finite, its weights are not."""
    problem, (form, where) = make_problem(), ENGINES[engine]
    for bad in (torch.nan, torch.inf):
        rule = lambda state, seen, bad=bad: (torch.tensor([1.0, bad, 2.0], dtype=F64), seen.losses)
        balancer = gn.balancer(
            rule, needs=needs, same_step=same_step, where=where, memory=lambda weights: torch.zeros_like(weights)
        )
        state = balancer.init(3, dtype=F64, weights=[0.3, 1.7, 0.9])
        grads, new, info = balancer.grad(state, problem.params, getattr(problem, form), problem.batch, **MODES[mode])
        assert not info.finite
        assert same_bits(new, state)
        assert torch.equal(info.weights, state.weights)
        torch.testing.assert_close(info.total_loss, (state.weights * info.losses).sum(), rtol=1e-12, atol=0)
        assert_applied(grads, state.weights, task_gradients(problem, problem.params, problem.batch))


# ---------------------------------------------------------------------------------------------- Gramians


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("sizes", [(4, 4), (1, 5, 2)])
def test_gramians_merge_exactly(engine, sizes):
    problem, (form, where) = make_problem(), ENGINES[engine]
    measure = functools.partial(gn.measure, problem.params, getattr(problem, form), where=where, needs="gramian")
    whole = measure(problem.batch, num_examples=8.0)
    parts = [
        measure(part, num_examples=float(len(part[0])))
        for part in zip(*(x.split(sizes) for x in problem.batch), strict=True)
    ]
    merged = gn.merge(*parts)
    if engine == "z":
        z = problem.seam.shared(problem.params, problem.batch)[0].requires_grad_()
        rows = [torch.autograd.grad(head(problem.params, z, problem.batch), z)[0]
                for head in problem.seam.functions]  # fmt: skip
    else:
        by_path = task_gradients(problem, problem.params, problem.batch)
        named = list(by_path) if where is None else [where] if isinstance(where, str) else where
        rows = [torch.cat([by_path[path][i].flatten() for path in named]) for i in range(3)]
    flat = torch.stack([row.flatten() for row in rows])
    expected = flat @ flat.T
    assert expected.abs().min() > 0
    for stats in (whole, merged):
        torch.testing.assert_close(stats.gramian, expected, rtol=1e-10, atol=1e-13)
        torch.testing.assert_close(stats.grad_norms, expected.diagonal().sqrt(), rtol=1e-10, atol=0)
    assert (len(leaves(whole.square_norms)) == 1) == (engine == "z")


def test_autocast_does_not_round_what_a_rule_computes():
    def rule(state, seen):
        return (seen.gramian @ seen.losses).abs().softmax(0), ()

    balancer = gn.balancer(rule, needs="gramian")
    gramian = torch.randn(3, 3)
    stats = gn.TaskStats(torch.rand(3), torch.ones(3), gramian=gramian)
    expected, _ = balancer.balance(balancer.init(3), stats)
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = balancer.balance(balancer.init(3), stats)
    assert torch.equal(found.weights, expected.weights)
