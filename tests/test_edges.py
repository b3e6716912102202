"""Edges of a step: states in low precision, tasks that come late, lone tasks, norms of any size."""

import pytest
import torch
from toys import BALANCERS, leaves, make_batch, make_problem, same_bits

import gradnorm_func as gn
from gradnorm_func._measure import linear

F64 = torch.float64


def of(losses, norms, dtype=F64):
    return gn.TaskStats(torch.tensor(losses, dtype=dtype), torch.tensor(norms, dtype=dtype))


# ---------------------------------------------------------------------------------------------- dtypes


@pytest.fixture
def bfloat16_by_default():
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(torch.float32)


METHODS = BALANCERS | {"rotograd": lambda where, **more: gn.rotograd(6, **more)}


@pytest.mark.usefixtures("bfloat16_by_default")
@pytest.mark.parametrize("name", METHODS)
def test_states_are_float32_at_least(name):
    """0.999 ** t is 1 in bfloat16, and 1 + 0.001 is 1: no step moved a weight."""
    balancer = METHODS[name](None)
    for state in (balancer.init(3), balancer.init(3, dtype=torch.float16)):
        assert {leaf.dtype for leaf in leaves(state)} <= {torch.float32, torch.int64, torch.bool}
    assert balancer.init(3, dtype=F64).weights.dtype == F64
    params = {path: leaf.bfloat16() for path, leaf in make_problem().params.items()}
    first = state = balancer.init(3)
    for t in range(3):
        grads, state, info = balancer.grad(state, params, make_problem().seam, make_batch(t, dtype=torch.bfloat16))
        assert info.finite
    assert name == "static" or not same_bits(state._replace(step=first.step), first)
    assert {leaf.dtype for leaf in leaves(grads)} == {torch.bfloat16}
    assert {leaf.dtype for leaf in leaves(state)} <= {torch.float32, torch.int64, torch.bool}


def test_adam_in_bfloat16_is_adam():
    """Moments and steps are those of torch in float32; a parameter that nobody reads stays, and is no NaN."""
    (init, update), w = gn.adam(1e-2), torch.linspace(-1, 1, 6).reshape(3, 2)
    ours, theirs = w.bfloat16(), torch.nn.Parameter(w.bfloat16().float())
    state, reference = init(ours), torch.optim.Adam([theirs], lr=1e-2)
    total = torch.zeros_like(w)
    for t in range(20):
        grad = torch.where(torch.arange(6).reshape(3, 2) == 2, 0.0, torch.sin(w + t)).bfloat16()
        step, state = update(grad, state, ours)
        total, theirs.grad = total + step, grad.float()
        reference.step()
    assert total.abs().max() > 1e-2
    assert total[1, 0] == 0
    torch.testing.assert_close(total, theirs.detach() - w.bfloat16().float(), rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------------------------------------- tasks that come late


def test_adam_corrects_the_bias_of_each_task_by_its_own_steps():
    """A task first seen at step 1000 started with a step of 3.2 times the learning rate."""
    rate = 1e-3
    state = gn.init_state(3, optimizer=gn.adam(rate), dtype=F64)
    first = gn.gradnorm_balance(state, of([1, 1, 1], [1.0, 2.0, 9.0]), optimizer=gn.adam(rate))[0]
    for t in range(1000):
        state, _ = gn.gradnorm_balance(
            state, of([1, 1, 1], [1.0 + t % 2, 2.0 - t % 2, 9.0]), optimizer=gn.adam(rate), mask=[True, True, False]
        )
    assert state.moments.step.tolist() == [1000, 1000, 0]
    new, _ = gn.gradnorm_balance(state, of([1, 1, 1], [1.0, 2.0, 9.0]), optimizer=gn.adam(rate))
    step = new.weights[2] - state.weights[2]
    assert abs(first.weights[2] - 1) > rate / 2
    assert abs(step) < 1.5 * rate


@pytest.mark.parametrize("method", ["gradnorm", "gradnorm every 2", "rotograd"])
def test_a_task_absent_at_the_burn_in_step_gets_its_next_loss(method):
    """It kept the L(0) of the transient for ever."""
    every = 2 if "every" in method else 1
    if method == "rotograd":
        balancer = gn.rotograd(6, burn_in=3, normalize=True)
    else:
        balancer = gn.gradnorm(burn_in=3, every=every, where=None)
    problem = make_problem()
    state, seen = balancer.init(3, dtype=F64), []
    at = 4 if every == 2 else 3  # the first turn not before the burn-in
    for t in range(8):
        scale = 100.0 if t < at else 1.0
        loss_fn = gn.multi_task_loss(
            problem.seam.backbone,
            {name: lambda p, z, b, h=head, s=scale: s * h(p, z, b) for name, head in problem.seam.heads.items()},
            last_shared=problem.seam.last_shared,
        )
        mask = [True, t not in (at, at + 1), True]
        _, state, info = balancer.grad(state, problem.params, loss_fn, make_batch(t), mask=mask)
        assert info.finite
        seen.append((state.initial_losses, info.losses))
    assert seen[at][0].isnan().tolist() == [False, True, False]
    torch.testing.assert_close(state.initial_losses[0], seen[at][1][0])
    torch.testing.assert_close(state.initial_losses[1], seen[at + 2][1][1])
    assert seen[at - 1][0][1] > 20 * state.initial_losses[1]


@pytest.mark.parametrize("form", ["paper", "log"])
def test_one_present_task_writes_no_rounding_into_the_moments(form):
    """Its target is its own norm, but times a ratio and divided by it: ± the norm went into Adam."""
    options = {"norm_ratios": [3.0, 0.7, 1.1], "form": form}
    state = gn.init_state(3, weights=[0.3, 1.7, 1.0])
    for t in range(20):
        norms = [0.1 + 0.37 * t, 1.0, 1.0]
        state, info = gn.gradnorm_balance(
            state, of([1.0, 2.0, 3.0], norms, torch.float32), mask=[True, False, False], **options
        )
        assert info.finite
    assert state.step == 20
    assert torch.equal(state.moments.mean, torch.zeros(3))
    assert torch.equal(state.moments.square, torch.zeros(3))
    torch.testing.assert_close(state.weights, torch.tensor([0.3, 1.7, 1.0]))


@pytest.mark.parametrize("form", ["paper", "log"])
def test_the_share_of_the_present_tasks_does_not_cancel_in_float32(form):
    """As the total minus the absent it was rounding near the floor: 36 of 200 finite steps were refused, and the only
    present weight moved."""
    draw = torch.Generator().manual_seed(0)
    options = {"form": form, "optimizer": gn.sgd(1e-9), "alpha": 0.0}
    for _ in range(200):
        weights = torch.full((4,), 1e-7) * (1 + torch.rand(4, generator=draw))
        weights[3] = 4 - weights[:3].sum()
        state = gn.init_state(4, weights=weights, optimizer=gn.sgd(1e-9))
        mask = torch.rand(4, generator=draw) < 0.5
        mask[3] = False
        mask[int(torch.randint(3, (), generator=draw))] = True
        norms = (1 + torch.rand(4, generator=draw)).tolist()
        new, info = gn.gradnorm_balance(state, of([1.0] * 4, norms, torch.float32), mask=mask, **options)
        assert info.finite
        assert torch.equal(new.weights[~mask], weights[~mask])
        torch.testing.assert_close(new.weights[mask].sum(), weights[mask].sum(), rtol=1e-5, atol=0)
        if mask.sum() == 1:
            torch.testing.assert_close(new.weights, weights, rtol=1e-5, atol=0)


# ---------------------------------------------------------------------------------------------- norms


def test_a_float16_weight_at_the_floor_recovers():
    """Its cotangent underflowed, so that its norm was 0 or NaN, and it stayed at the floor for ever."""
    params = {path: leaf.half() for path, leaf in make_problem().params.items()}
    batch = make_batch(dtype=torch.float16)
    exact = make_problem(dtype=F64)
    expected = gn.task_grad_norms(exact.seam, {path: leaf.double() for path, leaf in params.items()}, exact.batch)
    assert (expected > 0.1).all()
    balancer = gn.gradnorm(alpha=0.0, form="paper", optimizer=gn.adam(0.05))
    state = balancer.init(3, weights=[1e-8, 1.5, 1.5])
    for t in range(30):
        grads, state, info = balancer.grad(state, params, make_problem().seam, batch)
        assert info.finite
        if t == 0:
            torch.testing.assert_close(info.grad_norms.double(), expected, rtol=0.02, atol=0)
            plain = gn.measure(params, make_problem().seam, batch, weights=info.weights, norms_only=True)
            assert same_bits(grads, plain.grads)
            assert all(leaf.norm() > 0 for path, leaf in grads.items() if path != "head.0")
    assert state.weights[0] > 0.05


@pytest.mark.parametrize("bias", [False, True])
def test_norms_at_a_shared_linear_near_a_stationary_point(bias, monkeypatch):
    """By the Gram identity 2e-7 came out as 0 or 8e-4, for what is added up there cancels."""
    monkeypatch.setattr(linear, "WORTH", 0)  # which a problem so small would not be
    draw = torch.Generator().manual_seed(0)
    h, target = torch.randn(6, 40, generator=draw), torch.randn(6, 40, generator=draw)
    params = {"w": torch.randn(40, 40, generator=draw), "b": torch.randn(40, generator=draw)}
    h = torch.cat([h, h])  # residuals of opposite signs at equal inputs: the gradient is rounding, their size is not
    noise = torch.cat([target, -target])
    heads = {
        "far": lambda p, z, x: (z - 3).square().mean(),
        "near": lambda p, z, x: (z * noise).mean() + 1e-6 * z[0, 0],
    }
    last = gn.shared_linear("w", "b" if bias else None)
    loss_fn = gn.multi_task_loss(lambda p, x: x, heads, last_shared=last)
    where = ["w", "b"] if bias else "w"
    found = gn.task_grad_norms(loss_fn, params, h, where=where)
    double = {path: leaf.double() for path, leaf in params.items()}
    noise = noise.double()
    expected = gn.task_grad_norms(lambda p, x: loss_fn(p, x), double, h.double(), where=where)
    assert 1e-7 < expected[1] < 1e-5
    torch.testing.assert_close(found.double(), expected, rtol=1e-2, atol=1e-7)


ROOT = 0.5**0.5
# Every way to a norm: of the gradients that are `size` and 1 in 12 places of z, or at the parameters below it.
WAYS = {
    "z": lambda loss, params, x: gn.task_grad_norms(loss, params, x),
    "examples": lambda loss, params, x: gn.measure(params, loss, x).grad_norms,
    "W": lambda loss, params, x: ROOT * gn.task_grad_norms(loss, params, x, where="bias"),
    "linear": lambda loss, params, x: ROOT * gn.task_grad_norms(loss, params, x, where="w"),
    "linear, by Gram": lambda loss, params, x: ROOT * gn.task_grad_norms(loss, params, x, where="w"),
    "general": lambda loss, params, x: ROOT * gn.task_grad_norms(lambda p, b: loss(p, b), params, x, where="bias"),
    "own loop": lambda loss, params, x: own_norms(loss, params, x),
}


def own_norms(loss, params, x):
    copies = gn.fork(loss.last_shared(params, x).requires_grad_(), 2)
    return gn.measure_losses([head(params, z, x) for head, z in zip(loss.functions, copies, strict=True)], copies)[1]


@pytest.mark.parametrize("size", [1e-25, 1e-30, 1e22, 1e30])
@pytest.mark.parametrize("way", WAYS)
def test_norms_of_any_size(way, size):
    """In float32 the squares of those below 1e-22 are 0, and of those above 1e19 infinite."""
    width = 6 if way != "linear, by Gram" else 64
    last = gn.shared_linear("w") if "linear" in way else lambda p, h: h @ p["w"].T + p["bias"]
    loss = gn.multi_task_loss(
        lambda p, x: x, [lambda p, z, x: size * z[:, :6].sum(), lambda p, z, x: z[:, :6].sum()], last_shared=last
    )
    params = {"w": torch.eye(width)} | ({} if "linear" in way else {"bias": torch.zeros(width)})
    found = WAYS[way](loss, params, torch.nn.functional.pad(torch.ones(2, 1), (0, width - 1)))
    torch.testing.assert_close(found, 12**0.5 * torch.tensor([size, 1.0]), rtol=1e-5, atol=0)


def test_examples_of_any_size():
    loss = gn.multi_task_loss(lambda p, x: p + 0 * x, [lambda p, z, x: 1e-25 * z.sum(), lambda p, z, x: 1e22 * z.sum()])
    stats = gn.measure(torch.ones(4), loss, torch.ones(3, 4))
    torch.testing.assert_close(stats.example_norms, torch.tensor([2e-25, 2e22]), rtol=1e-5, atol=0)


def test_rotations_of_no_examples():
    problem, method = make_problem(dtype=torch.float32), gn.rotograd(6, burn_in=3)
    state = method.init(3)
    empty = make_batch(dtype=torch.float32, size=0)
    _, new, info = method.grad(state, problem.params, problem.seam, empty)
    assert not info.finite, "the mean of no losses"
    assert same_bits(new, state)


@pytest.mark.parametrize("heads", ["dict", "stacked"])
def test_a_batch_of_no_examples(heads):
    """Its gradients at z have no entries, so that every norm is 0, and so is the mean over examples."""
    if heads == "dict":
        parts = {"a": lambda p, z, x: z.sum(), "b": lambda p, z, x: z.square().sum()}
        params = {"w": torch.ones(3, 2)}
    else:
        parts, params = gn.stacked_heads(lambda p, z, x: (z @ p["v"]).sum(), "heads"), {"heads.v": torch.ones(2, 2)}
        params["w"] = torch.ones(3, 2)
    loss_fn = gn.multi_task_loss(lambda p, x: x @ p["w"], parts)
    zeros = torch.zeros(2)
    stats = gn.measure(params, loss_fn, torch.ones(0, 3))
    torch.testing.assert_close((stats.grad_norms, stats.example_norms), (zeros, zeros), rtol=0, atol=0)
    assert (gn.measure(params, loss_fn, torch.ones(1, 3)).example_norms > 1).all()
    balancer = gn.fixed_ratio()
    grads, _, info = balancer.grad(balancer.init(2), params, loss_fn, torch.ones(0, 3))
    assert info.finite
    assert not grads["w"].any()


def test_a_copy_with_no_entries():
    """One leaf of z is empty, and the norms are those of the other."""
    trunk, x = torch.nn.Linear(3, 4), torch.ones(2, 3)
    copies = gn.fork({"full": trunk(x), "empty": trunk(x)[:, :0]}, 2)
    losses = [(i + 1) * (copy["full"].sum() + copy["empty"].sum()) for i, copy in enumerate(copies)]
    stats = gn.measure_losses(losses, copies)
    torch.testing.assert_close(stats.grad_norms, torch.tensor([8.0, 32.0]).sqrt())
    torch.testing.assert_close(stats.example_norms, torch.tensor([2.0, 4.0]))


def test_the_gramian_at_a_complex_z():
    """That of the real and imaginary parts."""
    z = torch.fft.fft(torch.randn(4, 3, dtype=torch.float64, requires_grad=True), dim=1)
    copies = gn.fork(z, 2)
    losses = [copies[0].abs().square().mean(), (copies[1] * (1 + 2j)).real.sum() + copies[1].imag.square().sum()]
    pulled = [torch.autograd.grad(loss, copy, retain_graph=True)[0] for loss, copy in zip(losses, copies, strict=True)]
    rows = torch.stack([torch.view_as_real(grad).flatten() for grad in pulled])
    stats = gn.measure_losses(losses, copies, needs="gramian")
    assert abs(rows[0] @ rows[1]) > 1e-2
    torch.testing.assert_close(stats.gramian, rows @ rows.T)
    torch.testing.assert_close(stats.grad_norms, rows.norm(dim=1))
