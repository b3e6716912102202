"""Multiplying any loss by any positive constant changes nothing but the weights, where a method claims it."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import gradnorm_func as gn

# One line a method that claims it: a constructor.
CLAIMS = {
    "gradnorm": lambda: gn.gradnorm(),
    "gradnorm-sgd": lambda: gn.gradnorm(optimizer=gn.sgd(0.01), norm_ratios=[1.0, 2.0, 3.0]),
    "gradnorm-burn-in": lambda: gn.gradnorm(burn_in=4),
    "gradnorm-decay": lambda: gn.gradnorm(initial_decay=0.9),
    "gradnorm-every": lambda: gn.gradnorm(every=3),
    "geometric": gn.geometric,
    "nash": gn.nash,
    "fixed-ratio": lambda: gn.fixed_ratio([1.0, 2.0, 3.0], eps=0.0),
    "stch": lambda: gn.stch(1, warmup=1),
}
SCALES = ([1e6, 1.0, 1.0], [1.0, 1e-6, 1e3])
TASKS = "abc"


def loss_of(scales):
    """Three regressions; the scale is a closed-over constant, as in a user's own loss."""

    def head(i):
        return lambda p, z, batch: scales[i] * (z @ p["heads"][i] - batch["y"][:, i]).square().mean()

    backbone = lambda p, batch: torch.tanh(batch["x"] @ p["trunk"])
    return gn.multi_task_loss(backbone, {name: head(i) for i, name in enumerate(TASKS)})


def start():
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    params = {"trunk": draw(4, 6), "heads": draw(3, 6)}
    return params, [{"x": draw(8, 4), "y": draw(8, 3)} for _ in range(12)]


def run(balancer, scales, *, step=None, masks=None, state=None, **options):
    """The parameters after some steps of plain descent, the last state, and the infos."""
    params, batches = start()
    loss_fn, step = loss_of(scales), step or balancer.grad
    state = balancer.init(3, dtype=torch.float64) if state is None else state
    infos = []
    for t, batch in enumerate(batches):
        mask = {} if masks is None else {"mask": masks[t]}
        grads, state, info = step(state, params, loss_fn, batch, **mask, **options)
        params = {name: params[name] - 0.05 * grads[name] for name in params}
        infos.append(info)
    return params, state, infos


def assert_same(plain, scaled, scales):
    """The same parameters and weights times losses; and the weights did move apart, or the test would say nothing."""
    factors = torch.tensor(scales, dtype=torch.float64)
    for name in plain[0]:
        torch.testing.assert_close(scaled[0][name], plain[0][name], rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(scaled[1].weights * factors, plain[1].weights, rtol=1e-9, atol=0)
    for one, other in zip(plain[2], scaled[2], strict=True):
        torch.testing.assert_close(other.total_loss, one.total_loss, rtol=1e-9, atol=0)
        assert bool(one.finite)
        assert bool(other.finite)
    first = plain[2][0]
    there = ~first.losses.isnan()
    assert first.losses[there].std() / first.losses[there].mean() > (
        0.1 if there.all() else 0.05
    )  # two tasks differ less
    assert (plain[1].weights / first.weights)[there].std() > 1e-4


def in_time(t):
    """The third task comes at step 4 first, the second in every other step."""
    return torch.tensor([True, t % 2 == 0, t > 3])


MODES = {
    "eager": {},
    "masked": {"masks": [in_time(t) for t in range(12)]},
    "micro-batches": {"micro_batches": 2},
    "ranks": {"reduce": lambda stats: gn.merge(stats, stats)},
    "later": {"masks": [in_time(t) for t in range(12)], "micro_batches": 4},
}


@pytest.mark.parametrize("scales", SCALES, ids=["large", "small"])
@pytest.mark.parametrize(
    ("claim", "mode"), [(claim, mode) for claim in CLAIMS for mode in MODES if claim == "gradnorm" or mode == "masked"]
)
def test_the_trajectory_is_the_same(claim, mode, scales):
    plain = run(CLAIMS[claim](), [1.0, 1.0, 1.0], **MODES[mode])
    assert_same(plain, run(CLAIMS[claim](), scales, **MODES[mode]), scales)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("claim", [*(claim for claim in CLAIMS if claim.startswith("gradnorm")), "fixed-ratio"])
def test_by_powers_of_two_it_is_the_same_to_the_bit(claim, mode):
    """They round nothing, so that a difference that grows in a long run comes from rounding alone."""
    plain = run(CLAIMS[claim](), [1.0, 1.0, 1.0], **MODES[mode])
    scaled = run(CLAIMS[claim](), [2.0**20, 1.0, 2.0**-7], **MODES[mode])
    for name in plain[0]:
        assert not torch.equal(plain[0][name], start()[0][name])
        assert torch.equal(scaled[0][name], plain[0][name])


@pytest.mark.parametrize("mode", ["eager", "later"])
def test_compiled_it_is_the_same_in_one_graph(mode):
    balancer = CLAIMS["gradnorm"]()
    plain = run(balancer, [1.0, 1.0, 1.0], **MODES[mode])
    for scales in SCALES:
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("eager")
        step = torch.compile(balancer.grad, fullgraph=True, backend=counter)
        assert_same(plain, run(balancer, scales, step=step, **MODES[mode]), scales)
        assert counter.frame_count == 1


@pytest.mark.parametrize("mode", ["micro-batches", "later"])
def test_parts_equal_the_whole(mode):
    """L(0) is that of the whole batch, although its parts come one by one."""
    whole = run(CLAIMS["gradnorm"](), [1.0, 1.0, 1.0], **MODES["masked" if mode == "later" else "eager"])
    parts = run(CLAIMS["gradnorm"](), [1.0, 1.0, 1.0], **MODES[mode])
    for name in whole[0]:
        torch.testing.assert_close(parts[0][name], whole[0][name], rtol=1e-10, atol=1e-12)


def test_it_is_the_paper_s_algorithm_on_losses_in_their_own_units():
    """Every step is that of the plain form on L / L(0), computed beforehand."""
    params, batches = start()
    units = torch.stack(list(loss_of([1.0] * 3)(params, batches[0]).values()))
    assert (units - 1).abs().min() > 0.1
    normalized = run(gn.gradnorm(), [1.0, 1.0, 1.0])
    plain = run(gn.gradnorm(form="log"), (1 / units).tolist())
    for name in params:
        torch.testing.assert_close(normalized[0][name], plain[0][name], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(normalized[1].weights * units, plain[1].weights, rtol=1e-10, atol=0)
    # The sum that is conserved is that of the weights of losses in their units.
    torch.testing.assert_close((normalized[1].weights * units).sum(), torch.tensor(3.0, dtype=torch.float64))


def test_initial_losses_are_units_too():
    """A loss that is nearly solved at the start would get a huge weight: `initial_losses` says what is usual."""
    units = torch.tensor([2.0, 5.0, 0.1], dtype=torch.float64)
    state = gn.gradnorm().init(3, initial_losses=units, dtype=torch.float64)
    torch.testing.assert_close(state.weights, 1 / units)
    _, end, infos = run(gn.gradnorm(), [1.0, 1.0, 1.0], state=state)
    torch.testing.assert_close(infos[0].weights, 1 / units)
    torch.testing.assert_close((end.weights * units).sum(), torch.tensor(3.0, dtype=torch.float64))


@pytest.mark.parametrize("first", [0.0, -3.0])
def test_a_first_loss_that_is_zero_or_negative(first):
    """A loss of 0 has no unit yet, and counts as it is; of a negative one the unit is its size."""
    loss_fn = lambda w, x: torch.stack([w.sum() * 0 + w[0] - w[0].detach() + x, 2 * w.square().sum()])
    balancer, w = gn.gradnorm(alpha=0.0), torch.ones(2, dtype=torch.float64)
    state = balancer.init(2, dtype=torch.float64)
    _, state, info = balancer.grad(state, w, loss_fn, torch.tensor(first, dtype=torch.float64))
    assert bool(info.finite)
    torch.testing.assert_close(info.weights, torch.tensor([1.0 if first == 0 else 1 / 3, 0.25], dtype=torch.float64))
    _, state, info = balancer.grad(state, w, loss_fn, torch.tensor(5.0, dtype=torch.float64))
    if first == 0:  # seen for the first time now
        torch.testing.assert_close(state.initial_losses[0], torch.tensor(5.0, dtype=torch.float64))
        assert 0.1 < float(info.weights[0]) < 0.3


def test_a_refused_first_step_reports_what_was_applied():
    loss_fn = lambda w, x: torch.stack([2 * w.sum(), (w * x).sqrt().sum()])  # an infinite gradient at 0
    balancer = gn.gradnorm()
    state = balancer.init(2)
    _grads, new, info = balancer.grad(state, torch.tensor([1.0, 0.0]), loss_fn, torch.ones(2))
    assert not bool(info.finite)
    torch.testing.assert_close(info.weights, torch.tensor([0.5, 1.0]))
    assert new.initial_losses.isnan().all()
    torch.testing.assert_close(new.weights, state.weights)
