"""GradNorm against Algorithm 1 itself, against hand-computed steps, and its options one by one."""

import functools
import math
from collections import namedtuple

import numpy as np
import pytest
import torch
from toys import leaves, make_batch, make_problem, same_bits

import gradnorm_func as gn

F64 = torch.float64
STEPS, MODEL_RATE = 200, 0.02
# name -> (ours, torch's own)
OPTIMIZERS = {
    "sgd": (gn.sgd(0.003), lambda w: torch.optim.SGD(w, lr=0.003)),
    "adam": (gn.adam(0.01), lambda w: torch.optim.Adam(w, lr=0.01)),
}


def of(losses, norms):
    return gn.TaskStats(torch.as_tensor(losses, dtype=F64), torch.as_tensor(norms, dtype=F64))


def start(num_tasks=2, optimizer=None, **options):
    return gn.init_state(num_tasks, optimizer=optimizer or gn.sgd(0.1), dtype=F64, form="paper", **options)


def step(state, losses, norms, optimizer=None, **options):
    options = {"form": "paper", "alpha": 1.5, **options}
    return gn.gradnorm_balance(state, of(losses, norms), optimizer=optimizer or gn.sgd(0.1), **options)


# ---------------------------------------------------------------------------------------------- Algorithm 1


@functools.cache
def algorithm_1(alpha, optimizer_name):
    """The paper's Algorithm 1 as it stands, second derivatives and all; nothing of the package but the model."""
    problem = make_problem()
    theta = {name: leaf.clone().requires_grad_() for name, leaf in problem.params.items()}
    shared = theta[problem.where]
    w = torch.ones(3, dtype=F64, requires_grad=True)
    optimizer = OPTIMIZERS[optimizer_name][1]([w])
    initial, trajectory = None, []
    for t in range(STEPS):
        losses = list(problem.general(theta, make_batch(t % 5)).values())
        if initial is None:
            initial = torch.stack(losses).detach()
        norms = torch.stack(
            [
                torch.autograd.grad(weight * loss, shared, create_graph=True)[0].norm()
                for weight, loss in zip(w.unbind(), losses, strict=True)
            ]
        )
        ratios = torch.stack(losses).detach() / initial
        rates = ratios / ratios.mean()
        l_grad = (norms - (norms.mean() * rates**alpha).detach()).abs().sum()
        (w_grad,) = torch.autograd.grad(l_grad, w, retain_graph=True)
        total = sum(weight * loss for weight, loss in zip(w.detach(), losses, strict=True))
        theta_grads = torch.autograd.grad(total, list(theta.values()))
        w.grad = w_grad
        optimizer.step()
        with torch.no_grad():
            w.mul_(3 / w.sum())
            for leaf, grad in zip(theta.values(), theta_grads, strict=True):
                leaf -= MODEL_RATE * grad
        trajectory.append((w.detach().clone(), {name: leaf.detach().clone() for name, leaf in theta.items()}))
    return initial, trajectory


@pytest.mark.parametrize("engine", ["general", "seam"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("alpha", [0.0, 0.12, 1.5])
def test_two_hundred_steps_equal_algorithm_1(alpha, optimizer, engine):
    initial, trajectory = algorithm_1(alpha, optimizer)
    problem = make_problem()
    loss_fn, params = getattr(problem, engine), problem.params
    ours = OPTIMIZERS[optimizer][0]
    state = gn.init_state(3, optimizer=ours, dtype=F64)
    for t, (weights, theta) in enumerate(trajectory):
        grads, state, info = gn.gradnorm_grad(
            state, params, loss_fn, make_batch(t % 5), where=problem.where, alpha=alpha, optimizer=ours, form="paper"
        )
        params = {name: leaf - MODEL_RATE * grads[name] for name, leaf in params.items()}
        assert info.finite
        torch.testing.assert_close(state.weights, weights, rtol=1e-9, atol=1e-9, msg=lambda m, t=t: f"step {t}: {m}")
        torch.testing.assert_close(params, theta, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(state.initial_losses, initial, rtol=1e-9, atol=0)
    assert state.step == STEPS
    assert (weights - 1).abs().max() > 0.3, "the weights hardly moved, so the comparison says little"


def test_the_update_alone_is_the_same_update():
    problem = make_problem()
    state = gn.init_state(3, dtype=F64)
    arguments = (state, problem.params, problem.seam, problem.batch)
    _, expected, _ = gn.gradnorm_grad(*arguments, where=problem.where)
    assert_close_trees(gn.gradnorm_update(*arguments, where=problem.where), expected)


def assert_close_trees(a, b, rtol=1e-12):
    for x, y in zip(leaves(a), leaves(b), strict=True):
        torch.testing.assert_close(x, y, rtol=rtol, atol=1e-14, equal_nan=True)


# ---------------------------------------------------------------------------------------------- by hand


def test_one_step_by_hand():
    # L̃ = (1/2, 1), mean 3/4, r = (2/3, 4/3); G = (3, 1), Ḡ = 2; with alpha = 1 targets (4/3, 8/3).
    # So task 0 is too strong, sign (+, -): w = (1 - 0.1 * 3, 1 + 0.1 * 1) = (0.7, 1.1), scaled by 2 / 1.8.
    state, info = step(start(initial_losses=[4.0, 5.0]), [2.0, 5.0], [3.0, 1.0], alpha=1.0)
    torch.testing.assert_close(info.inverse_rates, torch.tensor([2 / 3, 4 / 3], dtype=F64))
    torch.testing.assert_close(info.targets, torch.tensor([4 / 3, 8 / 3], dtype=F64))
    torch.testing.assert_close(info.balance_loss, torch.tensor(5 / 3 + 5 / 3, dtype=F64))
    assert info.total_loss == 7.0
    assert torch.equal(info.weights, torch.ones(2, dtype=F64))
    torch.testing.assert_close(state.weights, torch.tensor([7 / 9, 11 / 9], dtype=F64))
    assert state.step == 1


def test_one_log_space_step_by_hand():
    # ∂L_grad/∂log w = w · ∂L_grad/∂w = (3, -1), so w = (e^-0.3, e^0.1), scaled.
    state, _ = step(start(), [1.0, 1.0], [3.0, 1.0], form="log")
    raw = torch.tensor([math.exp(-0.3), math.exp(0.1)], dtype=F64)
    torch.testing.assert_close(state.weights, 2 * raw / raw.sum())


def test_at_the_target_nothing_moves():
    state, info = step(start(), [1.0, 1.0], [2.0, 2.0])
    assert info.balance_loss == 0
    assert torch.equal(state.weights, torch.ones(2, dtype=F64))


def test_the_derivative_at_a_met_target_is_finite():
    """There the weights' gradient is 0, and so is Adam's second moment, under a root."""
    state = start(2, gn.adam())
    losses, norms = torch.ones(2, 2, dtype=F64)
    update = lambda norms: gn.gradnorm_balance(state, gn.TaskStats(losses, norms))[0].weights[0]
    assert torch.func.grad(update)(norms).isfinite().all()


def test_norm_ratios_are_the_ratios_of_the_weighted_norms_once_converged():
    rate = lambda t: 0.05 * 0.99**t
    state = start(3, gn.adam(rate))
    for _ in range(1200):
        state, info = step(
            state, [1.0, 1.0, 1.0], [1.0, 5.0, 0.2], gn.adam(rate), alpha=0.0, norm_ratios={"c": 3, "a": 1, "b": 2}
        )
    torch.testing.assert_close(info.targets, info.targets.mean() * torch.tensor([0.5, 1.0, 1.5], dtype=F64))
    weighted = info.weights * info.grad_norms
    torch.testing.assert_close(weighted / weighted[0], torch.tensor([1.0, 2.0, 3.0], dtype=F64), rtol=1e-3, atol=0)


# ---------------------------------------------------------------------------------------------- direction of alpha


def slow_and_fast(shared, t):
    """Two losses with the same gradient norm at `shared`; one falls fast, the other hardly."""
    straight = shared - shared.detach()  # value 0, derivative 1
    return torch.stack([math.exp(-0.002 * t) + straight[0], math.exp(-0.1 * t) + straight[1]])


@pytest.mark.parametrize("form", ["paper", "log"])
@pytest.mark.parametrize("optimizer", [gn.sgd(0.01), gn.adam(0.01)])
def test_the_slow_task_gains_weight(optimizer, form):
    state, shared = start(2, optimizer), torch.ones(2, dtype=F64)
    for t in range(40):
        state = gn.gradnorm_update(state, shared, slow_and_fast, t, alpha=1.0, optimizer=optimizer, form=form)
    assert state.weights[0] > 1.1
    assert state.weights[1] < 0.9


@pytest.mark.filterwarnings("ignore::Warning")  # of its own imports; not ours to mend
def test_gradnorm_pytorch_does_the_opposite():
    peer = pytest.importorskip("gradnorm_pytorch")
    shared = torch.nn.Parameter(torch.ones(2))
    weighter = peer.GradNormLossWeighter(
        num_losses=2, learning_rate=0.01, restoring_force_alpha=1.0, grad_norm_parameters=shared
    )
    for t in range(40):
        weighter.backward(slow_and_fast(shared, t))
    assert weighter.loss_weights[0] < 0.9, "0.2.3 lowers the slow task's weight; if it no longer does, rejoice"


# ---------------------------------------------------------------------------------------------- scale


@pytest.mark.parametrize("form", ["paper", "log"])
@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_weights_undo_the_scale_of_a_loss(alpha, form):
    """Loss 1 times 10^k, all k at once under vmap: the weighted norms end in the same ratios.

    Powers 0 and 1, because only there has r^alpha mean 1 and can all targets be met; with any other the paper's
    weights stop as soon as all norms lie on one side of their targets.
    """
    problem = make_problem()
    factors = 10.0 ** torch.arange(-3, 4, dtype=F64)
    optimizer = gn.adam(lambda t: 0.1 * 0.995**t, b2=0.9)
    stats = gn.measure(problem.params, problem.seam, problem.batch, where=problem.where, norms_only=True)
    initial = stats.losses * torch.tensor([1.5, 1.0, 2.0], dtype=F64)

    def settle(factor):
        scale = torch.ones(3, dtype=F64) + (factor - 1) * torch.tensor([0.0, 1.0, 0.0], dtype=F64)
        scaled = gn.TaskStats(stats.losses * scale, stats.grad_norms * scale)
        state = start(3, optimizer)._replace(initial_losses=initial * scale)
        for _ in range(2500):
            state, info = gn.gradnorm_balance(state, scaled, alpha=alpha, optimizer=optimizer, form=form)
        return state.weights, info.weights * info.grad_norms, info.inverse_rates

    weights, weighted, rates = torch.func.vmap(settle)(factors)
    goal = rates**alpha / 3
    torch.testing.assert_close(weighted / weighted.sum(1, keepdim=True), goal, rtol=2e-3, atol=0)
    undone = weights[:, 1] / weights[:, 0] * factors
    torch.testing.assert_close(undone, undone[3].expand_as(undone), rtol=4e-3, atol=0)


# ---------------------------------------------------------------------------------------------- L(0)


def test_alpha_zero_needs_no_initial_losses():
    losses, norms = [-3.0, 0.0], [3.0, 1.0]
    state, info = step(start(), losses, norms, alpha=0.0)
    expected, _ = step(start(), [1.0, 1.0], norms, alpha=0.0)
    assert info.finite
    assert torch.equal(state.weights, expected.weights)
    for alpha in (torch.tensor(0.0), torch.tensor(0.0, dtype=F64)):
        again, info = step(start(), losses, norms, alpha=alpha)
        assert info.finite
        assert torch.equal(again.weights, expected.weights)


def test_initial_losses_come_from_the_first_step_and_stay():
    state, info = step(start(), [2.0, 8.0], [1.0, 1.0])
    assert torch.equal(info.inverse_rates, torch.ones(2, dtype=F64))
    state, info = step(state, [1.0, 8.0], [1.0, 1.0])
    assert state.initial_losses.tolist() == [2.0, 8.0]
    torch.testing.assert_close(info.inverse_rates, torch.tensor([2 / 3, 4 / 3], dtype=F64))


def test_given_initial_losses_hold_and_nan_is_taken_from_the_batch():
    state, _ = step(start(initial_losses={"b": math.log(2), "a": float("nan")}), [5.0, 6.0], [1.0, 1.0])
    torch.testing.assert_close(state.initial_losses, torch.tensor([5.0, math.log(2)], dtype=F64))


def test_burn_in_takes_them_anew():
    state = start()
    seen = []
    for t in range(5):
        state, _ = step(state, [10.0 - t, 20.0], [1.0, 1.0], burn_in=2)
        seen.append(state.initial_losses[0].item())
    assert seen == [10, 10, 8, 8, 8]


def test_a_burn_in_of_any_kind_waits_for_its_turn():
    """Between the turns of `every` a state stays: L(0) is that of the next turn, step 4."""

    def initial(burn_in, every):
        state = start()
        for t in range(7):
            state, _ = step(state, [10.0 - t, 20.0], [1.0, 1.0], burn_in=burn_in, every=every)
        return state.initial_losses

    for burn_in in (3, 3.0, torch.tensor(3), torch.tensor(3.0), np.int64(3)):
        torch.testing.assert_close(initial(burn_in, 2), torch.tensor([6.0, 20.0], dtype=F64), rtol=0, atol=0)
        torch.testing.assert_close(initial(burn_in, 1), torch.tensor([7.0, 20.0], dtype=F64), rtol=0, atol=0)
    runs = torch.func.vmap(lambda burn_in: initial(burn_in, 2))(torch.tensor([2, 3, 6]))
    torch.testing.assert_close(runs[:, 0], torch.tensor([8.0, 6.0, 4.0], dtype=F64), rtol=0, atol=0)


@pytest.mark.parametrize("burn_in", [-1, 2.5, math.inf, math.nan])
def test_a_burn_in_is_a_number_of_steps(burn_in):
    with pytest.raises(ValueError, match=rf"burn_in={burn_in} counts steps from 0: give a whole number"):
        gn.gradnorm(burn_in=burn_in)


def test_initial_decay_is_a_running_mean():
    state, expected = start(), None
    for t in range(5):
        state, info = step(state, [10.0 - t, 2.0], [1.0, 1.0], initial_decay=0.75)
        expected = 10.0 if expected is None else 0.75 * expected + 0.25 * (10 - t)
        assert state.initial_losses[0].item() == pytest.approx(expected, rel=1e-14)
    ratios = torch.tensor([6.0, 2.0], dtype=F64) / state.initial_losses
    torch.testing.assert_close(info.inverse_rates, ratios / ratios.mean())


def test_reset_makes_the_next_losses_the_first():
    state, _ = step(start(), [2.0, 8.0], [1.0, 1.0])
    reset = state._replace(initial_losses=torch.full_like(state.initial_losses, torch.nan))
    assert torch.equal(reset.weights, state.weights)
    state, _ = step(reset, [3.0, 4.0], [1.0, 1.0])
    assert state.initial_losses.tolist() == [3.0, 4.0]


# ---------------------------------------------------------------------------------------------- mask and update

Pair = namedtuple("Pair", "a b c")


@pytest.mark.parametrize("optimizer", [gn.sgd(0.1), gn.adam(0.1)], ids=["sgd", "adam"])
@pytest.mark.parametrize("form", ["paper", "log"])
@pytest.mark.parametrize(
    "mask",
    [
        torch.tensor([True, False, True]),
        [True, False, True],
        {"c": True, "a": True, "b": False},
        Pair(True, False, True),
        {"a": torch.tensor(True), "b": torch.tensor(False), "c": torch.tensor(True)},
    ],
)
def test_an_absent_task_keeps_all_it_has(mask, form, optimizer):
    state, _ = step(start(3, optimizer, weights=[0.5, 1.5, 2.0]), [1.0, 2.0, 3.0], [1.0, 2.0, 3.0], optimizer)
    new, info = step(state, [1.5, math.nan, 2.0], [3.0, math.nan, 0.2], optimizer, mask=mask, form=form, alpha=0.5)
    assert info.finite
    assert new.weights[1] == state.weights[1]
    assert new.initial_losses[1] == state.initial_losses[1]
    for after, before in zip(leaves(new.moments), leaves(state.moments), strict=True):
        assert after.ndim == 0 or after[1] == before[1]
    assert new.weights[0] != state.weights[0]
    torch.testing.assert_close(new.weights.sum(), state.weight_sum)
    torch.testing.assert_close(info.total_loss, 1.5 * state.weights[0] + 2.0 * state.weights[2])


def test_the_present_tasks_are_balanced_as_if_alone():
    state, info = step(start(3), [1.0, 9.0, 4.0], [1.0, 9.0, 4.0], mask=[True, False, True], initial_decay=0.5)
    alone, info_alone = step(start(2), [1.0, 4.0], [1.0, 4.0], initial_decay=0.5)
    torch.testing.assert_close(state.weights[[0, 2]], alone.weights)
    torch.testing.assert_close(info.targets[[0, 2]], info_alone.targets)
    torch.testing.assert_close(info.balance_loss, info_alone.balance_loss)
    assert state.initial_losses[1].isnan(), "a task that was never seen has no L(0) yet"
    state, _ = step(state, [1.0, 7.0, 4.0], [1.0, 9.0, 4.0], initial_decay=0.5)
    assert state.initial_losses[1] == 7.0


def test_a_masked_step_of_the_model_uses_the_present_losses_alone():
    problem = make_problem()
    for loss_fn in (problem.general, problem.seam):
        state = gn.init_state(3, weights=[0.5, 1.5, 1.0], dtype=F64)
        grads, new, info = gn.gradnorm_grad(
            state, problem.params, loss_fn, problem.batch, where=problem.where, mask=[False, True, True], form="paper"
        )
        theta = {name: leaf.clone().requires_grad_() for name, leaf in problem.params.items()}
        losses = problem.general(theta, problem.batch)
        total = 1.5 * losses["t1"] + 1.0 * losses["t2"]
        expected = torch.autograd.grad(total, list(theta.values()), allow_unused=True, materialize_grads=True)
        torch.testing.assert_close(grads, dict(zip(theta, expected, strict=True)), rtol=1e-12, atol=1e-14)
        assert new.weights[0] == 0.5
        assert info.finite


@pytest.mark.parametrize("update", [False, torch.tensor(False)])
def test_update_false_freezes_the_state_and_still_reports(update):
    problem = make_problem()
    balancer = gn.gradnorm(where=problem.where, form="paper")
    state = balancer.init(3, dtype=F64, weights=[1.0, 2.0, 3.0])
    grads, new, info = balancer.grad(state, problem.params, problem.seam, problem.batch, update=update)
    assert same_bits(new, state)
    assert torch.equal(info.weights, state.weights)
    assert info.finite
    expected = gn.measure(problem.params, problem.general, problem.batch, weights=state.weights, needs="losses")
    torch.testing.assert_close(grads, expected.grads, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(info.losses, expected.losses)
    assert same_bits(balancer.update(state, problem.params, problem.seam, problem.batch, update=update), state)


def test_update_true_as_a_tensor_updates():
    new, _ = step(start(), [1.0, 1.0], [3.0, 1.0], update=torch.tensor(True))
    assert new.step == 1
    assert new.weights[0] < 1


# ---------------------------------------------------------------------------------------------- floor, sum


@pytest.mark.parametrize("form", ["paper", "log"])
@pytest.mark.parametrize("rate", [0.1, 10.0, 1e6])
def test_weights_stay_positive_finite_and_of_constant_sum(rate, form):
    """Steps far too large: the linear form is caught by the floor, the log-space form must not overflow."""
    draw = torch.Generator().manual_seed(0)
    optimizer = gn.sgd(rate)
    state = start(4, optimizer, weights=[0.1, 1.0, 2.0, 0.4])
    for _ in range(50):
        losses, norms = torch.rand(2, 4, generator=draw, dtype=F64) + 0.01
        state, info = gn.gradnorm_balance(
            state, gn.TaskStats(losses, 100 * norms), optimizer=optimizer, form=form, alpha=1.0
        )
        assert info.finite
        assert (state.weights > 0).all()
        assert state.weights.sum().item() == pytest.approx(3.5, rel=1e-12)
    assert state.step == 50


def test_the_floor_is_relative_to_the_mean_weight():
    state, _ = step(start(weights=[10.0, 30.0]), [1.0, 1.0], [1000.0, 1.0], alpha=0.0, floor=0.01)
    raw = torch.tensor([0.01 * 20, 30.1], dtype=F64)
    torch.testing.assert_close(state.weights, 40 * raw / raw.sum())


def test_any_pair_is_an_optimizer_and_a_schedule_gets_the_count():
    counts = []

    def schedule(count):
        counts.append(count.item())
        return 0.1

    heavy_ball = gn.Optimizer(lambda w: torch.zeros_like(w), lambda g, m, w: (-0.1 * (0.9 * m + g), 0.9 * m + g))
    state = start(2, heavy_ball)
    state, _ = step(state, [1.0, 1.0], [3.0, 1.0], heavy_ball)
    assert state.moments.tolist() == [3.0, -1.0]
    scheduled = gn.sgd(schedule)
    state = start(2, scheduled)
    for _ in range(3):
        state, _ = step(state, [1.0, 1.0], [3.0, 1.0], scheduled)
    assert counts == [0, 1, 2]
