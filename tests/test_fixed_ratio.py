"""The fixed-ratio rule against a transcription of EnCodec's balancer, and static weights."""

import functools

import pytest
import torch
from toys import leaves, make_batch, make_problem, same_bits

import gradnorm_func as gn

F64 = torch.float64
RATIOS, DECAY, BUDGET, EPS = [1.0, 2.0, 3.0], 0.9, 2.0, 1e-12
TASKS = range(3)


class EnCodec:
    """The rule as FACTS states it, with classic autograd: g = Σ g_i · (ρ_i / Σ ρ_j) · R / (ε + n̄_i)."""

    def __init__(self, per_example):
        self.per_example, self.totals, self.counts = per_example, {}, {}

    def gradient(self, losses, z):
        """(gradient at z, weights) for the losses that are there, a dict by task."""
        shares = sum(RATIOS[task] for task in losses)
        out, weights = torch.zeros_like(z), {}
        for task, loss in losses.items():
            (g,) = torch.autograd.grad(loss, z, retain_graph=True)
            norm = g.flatten(1).norm(dim=1).mean() if self.per_example else g.norm()
            self.totals[task] = DECAY * self.totals.get(task, 0.0) + norm
            self.counts[task] = DECAY * self.counts.get(task, 0.0) + 1
            mean = self.totals[task] / self.counts[task]
            weights[task] = RATIOS[task] / shares * BUDGET / (EPS + mean)
            out = out + g * weights[task]
        return out, weights


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("per_example", [False, True])
def test_twenty_steps_equal_encodec(per_example, missing):
    problem = make_problem()
    balancer = gn.fixed_ratio(RATIOS, decay=DECAY, budget=BUDGET, per_example=per_example)
    state, params, rule = balancer.init(3, dtype=F64), problem.params, EnCodec(per_example)
    for t in range(20):
        batch = make_batch(t)
        present = [task for task in TASKS if not (missing and (t + task) % 4 == 0)]
        mask = [task in present for task in TASKS] if missing else None
        grads, state, info = balancer.grad(state, params, problem.seam, batch, mask=mask)

        theta = {name: leaf.clone().requires_grad_() for name, leaf in params.items()}
        z, _, _ = problem.seam.shared(theta, batch)
        losses = {task: problem.seam.heads[f"t{task}"](theta, z, batch) for task in present}
        at_z, weights = rule.gradient(losses, z)
        trunk = [name for name in theta if name.startswith("trunk")]
        expected = dict(
            zip(trunk, torch.autograd.grad(z, [theta[n] for n in trunk], at_z, retain_graph=True), strict=True)
        )
        for task in TASKS:  # ours goes on into the heads, with the same weights
            expected[f"head.{task}"] = torch.zeros(6, dtype=F64)
            if task in present:
                expected[f"head.{task}"] = (
                    weights[task] * torch.autograd.grad(losses[task], theta[f"head.{task}"], retain_graph=True)[0]
                )
        torch.testing.assert_close({k: grads[k] for k in expected}, expected, rtol=1e-10, atol=1e-13)
        for task in present:
            torch.testing.assert_close(info.weights[task], weights[task], rtol=1e-10, atol=0)
            averages = state.memory.sums / state.memory.counts
            torch.testing.assert_close(averages[task], rule.totals[task] / rule.counts[task])
        assert all(state.weights[task] == info.weights[task] for task in present)
        params = {name: leaf - 0.02 * grads[name] for name, leaf in params.items()}


def test_the_gradient_at_z_has_the_shares_of_this_very_step():
    """Without a memory the weighted norms are the shares exactly, from the first step on."""
    problem = make_problem()
    balancer = gn.fixed_ratio({"t2": 3, "t0": 1, "t1": 2}, decay=0.0, budget=5.0, per_example=False)
    for loss_fn in (problem.seam, problem.general):
        _, _, info = balancer.grad(balancer.init(3, dtype=F64), problem.params, loss_fn, problem.batch)
        torch.testing.assert_close(info.weights * info.grad_norms, 5 * torch.tensor([1, 2, 3], dtype=F64) / 6)
        torch.testing.assert_close(info.total_loss, (info.weights * info.losses).sum())


def test_a_zero_share_and_a_zero_gradient_are_harmless():
    problem = make_problem()
    balancer = gn.fixed_ratio([0.0, 1.0, 1.0])
    grads, state, _ = balancer.grad(balancer.init(3, dtype=F64), problem.params, problem.seam, problem.batch)
    assert state.weights[0] == 0
    assert not grads["head.0"].any()
    still = {name: leaf * 0 if name == "head.1" else leaf for name, leaf in problem.params.items()}
    grads, state, info = balancer.grad(balancer.init(3, dtype=F64), still, problem.seam, problem.batch)
    assert info.grad_norms[1] == 0
    assert info.finite
    assert all(leaf.isfinite().all() for leaf in leaves(grads, state))


@pytest.mark.parametrize("update", [False, torch.tensor(False)])
def test_update_false_uses_the_last_weights(update):
    problem = make_problem()
    balancer = gn.fixed_ratio(RATIOS)
    _, state, _ = balancer.grad(balancer.init(3, dtype=F64), problem.params, problem.seam, problem.batch)
    grads, new, info = balancer.grad(state, problem.params, problem.seam, make_batch(7), update=update)
    assert same_bits(new, state)
    assert torch.equal(info.weights, state.weights)
    plain = gn.measure(problem.params, problem.general, make_batch(7), weights=state.weights, needs="losses")
    torch.testing.assert_close(grads, plain.grads, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (functools.partial(gn.fixed_ratio, budget=0), r"budget=0 must be positive"),
        (functools.partial(gn.fixed_ratio, decay=1.0), r"decay=1.0 must lie in \[0, 1\)"),
        (functools.partial(gn.fixed_ratio, eps=-1.0), r"eps=-1.0 must not be negative"),
        (lambda: gn.fixed_ratio([1.0, 2.0]).init(3), r"ratios has 2 entries, but there are 3 tasks"),
        (lambda: gn.fixed_ratio([1.0, -2.0]).init(2), r"ratios=\[1.0, -2.0\] must be finite, at least 0"),
        (lambda: gn.fixed_ratio([0.0, 0.0]).init(2), r"not all 0"),
        (lambda: gn.static([1.0]).init(2), r"weights has 1 entries, but num_tasks=2"),
        (lambda: gn.static([1.0, float("nan")]).init(2), r"must be finite"),
        (lambda: gn.mean_weights(torch.ones(3)), r"weights must be \(steps, T\)"),
        (lambda: gn.mean_weights([1.0]), r"weights must be \(steps, T\)"),
        (lambda: gn.mean_weights(torch.ones(3, 2), start=3), r"start=3 leaves no step of 3"),
    ],
)
def test_mistakes_name_the_argument(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# ---------------------------------------------------------------------------------------------- static, export


@pytest.mark.parametrize("norms", [False, True])
def test_static_is_the_weighted_sum_and_measures_norms_only_on_request(norms):
    problem = make_problem()
    balancer = gn.static([0.5, 0.0, 2.0], where=problem.where, norms=norms)
    state = balancer.init(3, dtype=F64)
    grads, new, info = balancer.grad(state, problem.params, problem.seam, problem.batch)
    theta = {name: leaf.clone().requires_grad_() for name, leaf in problem.params.items()}
    losses = problem.general(theta, problem.batch)
    total = 0.5 * losses["t0"] + 2.0 * losses["t2"]
    expected = torch.autograd.grad(total, list(theta.values()), allow_unused=True, materialize_grads=True)
    torch.testing.assert_close(grads, dict(zip(theta, expected, strict=True)), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(info.total_loss, total.detach())
    assert torch.equal(new.weights, state.weights)
    assert new.step == 1
    assert info.grad_norms.isnan().all() != norms


def test_gradnorm_static_is_the_time_average_of_a_run():
    """The paper's "GradNorm static": a run's history, or its weights, becomes fixed weights."""
    problem = make_problem()
    batches = [make_batch(t) for t in range(6)]
    _, _, history, _ = gn.train(problem.params, problem.seam, batches, balancer=gn.gradnorm(), progress=False)
    mean = gn.mean_weights(history)
    torch.testing.assert_close(mean, history.weights.mean(0))
    torch.testing.assert_close(gn.mean_weights(history.weights, start=4), (history.weights[4] + history.weights[5]) / 2)
    state = gn.static(mean).init(3, dtype=F64)
    assert torch.equal(state.weights, mean)
    state.weights.zero_()
    assert mean.all(), "the state must own its weights"
