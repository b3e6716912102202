"""The methods that look at losses alone, and the one that looks at norms, against their equations and TorchJD's."""

import functools
import itertools
import re
from pathlib import Path

import pytest
import torch
from torch.nn.functional import softmax
from toys import make_batch, make_problem, same_bits

import gradnorm_func as gn

F64 = torch.float64
COURSE = torch.tensor([[2.0, 300.0, 0.5], [1.5, 310.0, 0.2], [1.6, 200.0, 0.25], [0.7, 150.0, 0.24], [0.9, 90.0, 0.1],
                       [0.5, 80.0, 0.12], [0.4, 95.0, 0.05]], dtype=F64)  # fmt: skip
close = functools.partial(torch.testing.assert_close, rtol=1e-12, atol=0)


def weights_of(balancer, course=COURSE, masks=None):
    """(steps, T) weights of a run over given losses."""
    state, rows = balancer.init(course.shape[1], dtype=F64), []
    for t, losses in enumerate(course):
        state, info = balancer.balance(state, gn.TaskStats(losses), mask=None if masks is None else masks[t])
        assert info.finite
        rows.append(info.weights)
    return torch.stack(rows)


def scalarized(scalarizer, losses):
    """The weights of one of TorchJD's: the gradient of its scalar with respect to the losses."""
    values = losses.clone().requires_grad_()
    (grad,) = torch.autograd.grad(scalarizer(values), values)
    return grad


@pytest.fixture
def scalarization():
    return pytest.importorskip("torchjd.scalarization")


# ---------------------------------------------------------------------------------------------- against the equations


def test_geometric():
    values = COURSE.clone().requires_grad_()
    (logs,) = torch.autograd.grad(values.log().sum(), values)
    close(weights_of(gn.geometric()), logs)
    (root,) = torch.autograd.grad(values.prod(1).pow(1 / 3).sum(), values)
    close(weights_of(gn.geometric(mean=True)), root)


def test_a_geometric_mean_of_many_losses_neither_overflows_nor_vanishes():
    for size in (1e-8, 1e8):
        losses = torch.full((1, 100), size)
        assert losses.prod() in (0, torch.inf)
        torch.testing.assert_close(
            weights_of(gn.geometric(mean=True), losses.double()), torch.full_like(losses.double(), 0.01)
        )


def test_uncertainty_of_the_softmax_form():
    expected = torch.stack([softmax(1 / (0.7 * losses), 0) for losses in COURSE])
    close(weights_of(gn.uncertainty(temperature=0.7)), expected)


def test_learned_imtl_l_is_uncertainty_with_twice_the_weights():
    for ours, theirs in (
        (gn.adam(0.1), lambda s: torch.optim.Adam(s, 0.1)),
        (gn.sgd(0.02), lambda s: torch.optim.SGD(s, 0.01)),
    ):
        s = torch.zeros(3, dtype=F64, requires_grad=True)
        optimizer = theirs([s])
        for losses, weights in zip(COURSE / 100, weights_of(gn.uncertainty(optimizer=ours), COURSE / 100), strict=True):
            close(2 * weights, s.detach().exp(), rtol=1e-6)  # Adam's epsilon is not twice as large
            optimizer.zero_grad()
            (s.exp() * losses - s).sum().backward()
            optimizer.step()


def test_stch_of_the_paper():
    preference, ideal = torch.tensor([0.5, 0.01, 0.3], dtype=F64), torch.tensor([0.1, 5.0, 0.0], dtype=F64)
    values = COURSE.clone().requires_grad_()
    (expected,) = torch.autograd.grad((0.2 * torch.logsumexp(preference * (values - ideal) / 0.2, 1)).sum(), values)
    close(weights_of(gn.stch(mu=0.2, preference=preference, ideal=list(ideal))), expected, rtol=1e-10)
    values = (COURSE / 100).requires_grad_()
    (uniform,) = torch.autograd.grad(torch.logsumexp(values / 3, 1).sum(), values)
    close(weights_of(gn.stch(), COURSE / 100), uniform)


@pytest.mark.parametrize("mu", [0.3, 1.0])
def test_stch_of_the_experiments(mu):
    """A transcription, with epochs of two steps: one of logarithms, one more for N, and from step 4 on the maximum."""
    values = COURSE.clone().requires_grad_()
    nadir = COURSE[2:4].mean(0)
    warm = values[:4].log().sum()
    reg = torch.log(values[4:] / nadir)
    (expected,) = torch.autograd.grad(warm + (3 * mu * (reg / mu).exp().sum(1).log()).sum(), values)
    found = weights_of(gn.stch(2, mu=mu, warmup=1))
    close(found, expected)
    if mu == 1:
        ratios = found[4:] / found[4:].sum(1, keepdim=True)
        close(ratios, (1 / nadir / (1 / nadir).sum()).expand(3, 3))


def test_dwa():
    found = weights_of(gn.dwa(2, temperature=1.5))
    means = COURSE[:6].reshape(3, 2, 3).mean(1)
    close(found[:4], torch.ones(4, 3, dtype=F64))
    close(found[4:6], (3 * softmax(means[1] / means[0] / 1.5, 0)).expand(2, 3))
    close(found[6], 3 * softmax(means[2] / means[1] / 1.5, 0))


def test_relobralo():
    """A transcription of the equations; whether a step looks back is seen in its weights, and must be either."""
    alpha, tau = 0.6, 0.8
    found = weights_of(gn.relobralo(decay=alpha, keep=0.5, temperature=tau, seed=3))
    close(found[0], torch.ones(3, dtype=F64))
    close(found[1], 3 * softmax(COURSE[1] / (tau * COURSE[0]), 0))
    kept = []
    for t in range(2, len(COURSE)):
        last = (1 - alpha) * 3 * softmax(COURSE[t] / (tau * COURSE[t - 1]), 0)
        candidates = [alpha * 3 * softmax(COURSE[t] / (tau * COURSE[0]), 0) + last, alpha * found[t - 1] + last]
        kept.append([torch.allclose(found[t], candidate, rtol=1e-12, atol=0) for candidate in candidates])
    assert all(sum(pair) == 1 for pair in kept)
    assert 0 < sum(pair[0] for pair in kept) < len(kept)
    never = weights_of(gn.relobralo(decay=alpha, temperature=tau))
    close(never[2], alpha * never[1] + (1 - alpha) * 3 * softmax(COURSE[2] / (tau * COURSE[1]), 0))


FORMS = {
    "gls": functools.partial(gn.geometric, mean=True),
    "uw-so": functools.partial(gn.uncertainty, temperature=0.5),
    "stch-paper": functools.partial(gn.stch, mu=0.3, preference=[0.5, 0.2, 0.3], ideal={"t0": 0.0, "t1": 0.1, "t2": 0}),
    "famo-lower": functools.partial(gn.famo, lower=[0.1, -0.5, 0.05]),
}


@pytest.mark.parametrize("name", FORMS)
def test_forms_that_the_conformance_table_leaves_out(name):
    """One graph, equal to eager, with weights that move and that vmap gives too."""
    problem, balancer = make_problem(), FORMS[name]()
    step = torch.compile(balancer.grad, fullgraph=True, backend="eager")
    eager = state = balancer.init(3, dtype=F64)
    for t in range(3):
        batch, mask = make_batch(t), torch.tensor([True, t != 1, True])
        grads, state, info = step(state, problem.params, problem.seam, batch, mask=mask)
        expected = balancer.grad(eager, problem.params, problem.seam, batch, mask=mask)
        torch.testing.assert_close((grads, state, info), tuple(expected), rtol=1e-10, atol=1e-12, equal_nan=True)
        assert not torch.equal(info.weights, eager.weights)
        eager = expected[1]
    two = torch.stack([COURSE[0], COURSE[1]])
    weights = lambda losses: balancer.balance(balancer.init(3, dtype=F64), gn.TaskStats(losses))[1].weights
    close(torch.func.vmap(weights)(two), torch.stack([weights(losses) for losses in two]))


# ---------------------------------------------------------------------------------------------- FAMO


def famo_by_the_paper(problem, steps, rate, *, gamma, lower=0.0, same_batch=True, masks=None):
    """Algorithm 1 in classic autograd: (parameters, ξ, the weights of each step)."""
    params = {path: leaf.clone().requires_grad_() for path, leaf in problem.params.items()}
    xi = torch.zeros(3, dtype=F64, requires_grad=True)
    optimizer = torch.optim.Adam([xi], lr=0.025, weight_decay=gamma)
    losses_of = lambda t: torch.stack(list(problem.general(params, make_batch(t)).values()))
    before, used = None, []

    def learn(after):
        delta = before - (after - lower).log()
        with torch.enable_grad():
            (xi.grad,) = torch.autograd.grad(softmax(xi, 0), xi, delta)
        optimizer.step()

    for t in range(steps):
        losses = losses_of(t)
        if not same_batch and before is not None:
            learn(losses.detach())
        z = softmax(xi, 0).detach()
        c = 1 / (z / (losses - lower)).sum().detach()
        grads = torch.autograd.grad(c * (z * (losses - lower).log()).sum(), list(params.values()))
        used.append(c * z / (losses - lower).detach())
        before = (losses - lower).log().detach()
        with torch.no_grad():
            for leaf, grad in zip(params.values(), grads, strict=True):
                leaf -= rate * grad
            if same_batch:
                learn(losses_of(t))
    return params, xi.detach(), torch.stack(used)


@pytest.mark.parametrize("options", [{}, {"micro_batches": 2}], ids=["whole", "micro-batches"])
@pytest.mark.parametrize("same_batch", [True, False])
def test_famo_is_algorithm_1(same_batch, options):
    """With the second look by `update`; without it, the next batch is the second look."""
    problem, lower = make_problem(), torch.tensor([0.1, -0.5, 0.05], dtype=F64)
    expected = famo_by_the_paper(problem, 8, 0.02, gamma=0.1, lower=lower, same_batch=same_batch)
    balancer = gn.famo(decay=0.1, lower=lower)
    state, params, used = balancer.init(3, dtype=F64), problem.params, []
    for t in range(8):
        grads, state, info = balancer.grad(state, params, problem.seam, make_batch(t), **options)
        params = {path: leaf - 0.02 * grads[path] for path, leaf in params.items()}
        used.append(info.weights)
        if same_batch:
            state = balancer.update(state, params, problem.seam, make_batch(t), **options)
    assert expected[1].abs().min() > 0.01
    torch.testing.assert_close(state.memory.logits, expected[1], rtol=1e-9, atol=0)
    torch.testing.assert_close(torch.stack(used), expected[2], rtol=1e-9, atol=0)
    torch.testing.assert_close(
        params, {path: leaf.detach() for path, leaf in expected[0].items()}, rtol=1e-9, atol=1e-12
    )


def test_famo_by_pairs_of_balance_and_in_one_graph():
    """The loop with its own backward pass: losses before and after. And the compiled second look is the eager one."""
    problem, balancer = make_problem(), gn.famo()
    update = torch.compile(balancer.update, fullgraph=True, backend="eager")
    state = compiled = own = balancer.init(3, dtype=F64)
    params = problem.params
    for t in range(3):
        grads, state, info = balancer.grad(state, params, problem.seam, make_batch(t))
        _, compiled, _ = balancer.grad(compiled, params, problem.seam, make_batch(t))
        own, same = balancer.balance(own, gn.TaskStats(problem.general(params, make_batch(t))))
        torch.testing.assert_close(same.weights, info.weights)
        params = {path: leaf - 0.02 * grads[path] for path, leaf in params.items()}
        state = balancer.update(state, params, problem.seam, make_batch(t))
        compiled = update(compiled, params, problem.seam, make_batch(t))
        own, _ = balancer.balance(own, gn.TaskStats(problem.general(params, make_batch(t))))
        for other in (compiled, own):
            torch.testing.assert_close(other, state, rtol=1e-12, atol=1e-12)
    assert state.memory.logits.abs().min() > 0


def test_a_second_look_that_is_refused_does_not_shift_the_pairs():
    """The next `grad` closes the pair, and is the first look of its own."""
    problem, balancer = make_problem(), gn.famo()
    step = functools.partial(balancer.grad, params=problem.params, loss_fn=problem.seam)
    _, state, _ = step(balancer.init(3, dtype=F64), batch=make_batch(0))
    bad = (make_batch(0)[0] * torch.inf, make_batch(0)[1])
    assert same_bits(balancer.update(state, problem.params, problem.seam, bad), state)
    _, state, _ = step(state, batch=make_batch(1))
    assert state.memory.pending.all()
    assert state.memory.logits.abs().min() > 0
    moved = balancer.update(state, problem.params, problem.seam, make_batch(1))
    assert not moved.memory.pending.any()
    assert not torch.equal(moved.memory.logits, state.memory.logits)


def test_famo_of_tasks_that_come_later():
    """A task learns from its second look on; the others as if it were not there, then and before."""
    with_two = gn.famo(decay=0.0)
    problem = make_problem()
    late = gn.multi_task_loss(problem.seam.backbone, problem.seam.functions, last_shared=problem.seam.last_shared)
    early = gn.multi_task_loss(problem.seam.backbone, problem.seam.functions[:2], last_shared=problem.seam.last_shared)
    state, pair = with_two.init(3, dtype=F64), with_two.init(2, dtype=F64)
    for t, mask in enumerate([[True, True, False], [True, True, True], [True, True, True]]):
        _, state, _ = with_two.grad(state, problem.params, late, make_batch(t), mask=mask)
        _, pair, _ = with_two.grad(pair, problem.params, early, make_batch(t))
        if t < 2:
            assert state.memory.logits[2] == 0
            torch.testing.assert_close(state.memory.logits[:2], pair.memory.logits, rtol=1e-12, atol=0)
        assert t == 0 or state.memory.logits[:2].abs().min() > 0
    assert state.memory.logits[2] != 0


# ---------------------------------------------------------------------------------------------- against TorchJD


def test_torchjds_scalarizers(scalarization):
    geometric = scalarization.GeometricMean()
    close(weights_of(gn.geometric(mean=True)), torch.stack([scalarized(geometric, losses) for losses in COURSE]))
    lower = torch.tensor([0.1, 5.0, 0.0], dtype=F64)
    tchebycheff = scalarization.STCH(0.2, torch.tensor([0.5, 0.01, 0.3], dtype=F64), lower)
    found = weights_of(gn.stch(mu=0.2, preference=[0.5, 0.01, 0.3], ideal=lower))
    close(found, torch.stack([scalarized(tchebycheff, losses) for losses in COURSE]), rtol=1e-9)
    average = scalarization.DWA()
    rows = []
    for t, losses in enumerate(COURSE):
        rows.append(scalarized(average, losses))
        if t % 2:
            average.step()
    close(weights_of(gn.dwa(2)), torch.stack(rows))


@pytest.mark.parametrize("kind", ["UW", "IMTLL"])
def test_torchjds_learned_scales(scalarization, kind):
    theirs = getattr(scalarization, kind)(3).double()
    optimizer = torch.optim.Adam(theirs.parameters(), lr=0.025)
    factor = 1 if kind == "UW" else 2
    for losses, weights in zip(COURSE, weights_of(gn.uncertainty()), strict=True):
        values = losses.clone().requires_grad_()
        optimizer.zero_grad()
        theirs(values).backward()
        torch.testing.assert_close(factor * weights, values.grad, rtol=1e-6, atol=0)
        optimizer.step()


def test_torchjds_famo(scalarization):
    """Which adds 1e-8 to the losses."""
    theirs, balancer = scalarization.FAMO(3).double(), gn.famo()
    state = balancer.init(3, dtype=F64)
    for before, after in itertools.pairwise(COURSE):
        state, info = balancer.balance(state, gn.TaskStats(before))
        torch.testing.assert_close(info.weights, scalarized(theirs, before), rtol=1e-6, atol=0)
        state, _ = balancer.balance(state, gn.TaskStats(after))
        theirs.update(after)
    assert state.memory.logits.abs().min() > 0.01
    torch.testing.assert_close(state.memory.logits, theirs._w.detach(), rtol=1e-5, atol=0)


# -------------------------------------------------------------------------------------------- scales, masks, bad losses

# The weighted losses w_i L_i of these are the same at any scale of a loss, but for a factor that all share.
FREE = {
    "geometric": gn.geometric,
    "gls": functools.partial(gn.geometric, mean=True),
    "famo": gn.famo,
    "stch": functools.partial(gn.stch, 2, mu=0.3, warmup=1),
}
# The weights themselves are.
RATES = {"dwa": functools.partial(gn.dwa, 1), "relobralo": functools.partial(gn.relobralo, decay=0.9, keep=0.5)}
STATIC = {"uw-so": functools.partial(gn.uncertainty, temperature=1.0), "stch-paper": gn.stch}


@pytest.mark.parametrize("name", [*FREE, *RATES])
def test_scales_change_nothing(name):
    factors = torch.tensor([1e-6, 1.0, 1e6], dtype=F64)
    balancer = {**FREE, **RATES}[name]()
    plain, scaled = weights_of(balancer), weights_of(balancer, COURSE * factors)
    if name in RATES:
        return close(scaled, plain, rtol=1e-9)
    shares, of_scaled = plain * COURSE, scaled * COURSE * factors
    close(of_scaled / of_scaled.sum(1, keepdim=True), shares / shares.sum(1, keepdim=True), rtol=1e-9)
    if name in ("geometric", "stch"):
        close(of_scaled, shares, rtol=1e-9)


@pytest.mark.parametrize("name", [*FREE, *RATES, *STATIC])
def test_an_absent_task_leaves_a_run_of_the_others(name):
    """Whatever its loss; and it trains nothing."""
    balancer = {**FREE, **RATES, **STATIC}[name]()
    course = COURSE[:, [0, 1, 1, 2]].clone()
    course[:, 2] = torch.nan
    found = weights_of(balancer, course, [[True, True, False, True]] * len(course))
    close(found[:, [0, 1, 3]], weights_of(balancer))
    assert not found[:, 2].any()


def test_dwa_of_a_task_that_is_absent_where_an_epoch_ends():
    masks = [[True, t not in (1, 2), True] for t in range(len(COURSE))]
    found = weights_of(gn.dwa(2), COURSE, masks)
    middle = COURSE[3, 1] / COURSE[0, 1]  # the means of what was seen of epochs 1 and 0
    rates = torch.stack(
        [COURSE[2:4, 0].mean() / COURSE[:2, 0].mean(), middle, COURSE[2:4, 2].mean() / COURSE[:2, 2].mean()]
    )
    close(found[4], 3 * softmax(rates / 2, 0))


def test_tasks_that_come_late():
    """STCH takes their first loss for N; ReLoBRaLo keeps their weight in their first step."""
    masks = [[True, t > 1, True] for t in range(len(COURSE))]
    found = weights_of(gn.stch(1, mu=0.3, warmup=0), COURSE, masks)
    nadir = torch.tensor([COURSE[0, 0], COURSE[2, 1], COURSE[0, 2]])
    close(found[2:], 3 * softmax((COURSE[2:] / nadir).log() / 0.3, 1) / COURSE[2:])
    balancer = gn.relobralo(decay=0.5)
    state, weights = balancer.init(3, dtype=F64, weights=[0.5, 2.0, 0.7]), []
    for losses, mask in zip(COURSE[:4], masks, strict=False):
        state, _ = balancer.balance(state, gn.TaskStats(losses), mask=mask)
        weights.append(state.weights)
    assert weights[0].tolist() == [0.5, 2.0, 0.7]
    assert weights[1][1] == weights[2][1] == 2.0
    close(weights[3][1], 3 * softmax(COURSE[3] / COURSE[2], 0)[1])


@pytest.mark.parametrize("name", ["geometric", "gls", "famo", "stch", "uw-so"])
def test_a_loss_without_a_logarithm_is_refused(name):
    balancer = {**FREE, **STATIC}[name]()
    state, _ = balancer.balance(balancer.init(3, dtype=F64), gn.TaskStats(COURSE[0]))
    for bad in (0.0, -0.3):
        new, info = balancer.balance(state, gn.TaskStats(torch.tensor([1.0, bad, 2.0], dtype=F64)))
        assert not info.finite
        assert same_bits(new, state)
        assert torch.equal(info.weights, state.weights)
    assert balancer.balance(state, gn.TaskStats(COURSE[1]))[1].finite, "the next one goes on"


@pytest.mark.parametrize("name", [*RATES, "stch-paper"])
def test_other_methods_take_any_sign(name):
    course = COURSE.clone()
    course[:3, 1], course[1, 2], course[:, 0] = 0.0, 0.0, -course[:, 0]
    found = weights_of({**RATES, **STATIC}[name](), course)
    assert found.isfinite().all()
    assert (found > 0).all() or name == "stch-paper"


# ---------------------------------------------------------------------------------------------- normalized


def gradients(where=None):
    """The task gradients at z or at W, flat, by classic autograd."""
    problem = make_problem()
    params = {path: leaf.clone().requires_grad_() for path, leaf in problem.params.items()}
    z = problem.seam.shared(params, problem.batch)[0]
    losses = [head(params, z, problem.batch) for head in problem.seam.functions]
    at = z if where is None else params[where]
    return problem, torch.stack([torch.autograd.grad(loss, at, retain_graph=True)[0].flatten() for loss in losses])


@pytest.mark.parametrize("where", [None, "trunk.1.weight"])
@pytest.mark.parametrize("total", ["rms", "max", "mean"])
def test_normalized_gradients_have_one_length(total, where):
    problem, rows = gradients(where)
    norms = rows.norm(dim=1)
    length = {"rms": norms.square().mean().sqrt(), "max": norms.max(), "mean": norms.mean()}[total]
    for power in (1.0, 1.5):
        balancer = gn.normalized(power=power, total=total, where=where)
        _, _, info = balancer.grad(balancer.init(3, dtype=F64), problem.params, problem.seam, problem.batch)
        close(info.weights, (length / norms) ** power, rtol=1e-10)
    _, info = balancer.balance(balancer.init(3, dtype=F64), gn.TaskStats(COURSE[0], torch.tensor([0.0, 3.0, 4.0])))
    assert info.finite
    assert info.weights[0] == 0


def test_normalized_is_what_is_published():
    """NTKMTL's direction, DB-MTL without its average on logarithms, and ConFIG of two tasks."""
    problem, rows = gradients()
    norms = rows.norm(dim=1)
    for exponent in (0.5, 0.75):  # NTKMTL: (Σ n² / n_i²)^p, with the gradient then clipped
        theirs = (norms.square().sum() / norms.square()) ** exponent
        balancer = gn.normalized(power=2 * exponent, total="rms")
        _, info = balancer.balance(balancer.init(3, dtype=F64), gn.TaskStats(COURSE[0], norms))
        close(info.weights / info.weights.sum(), theirs / theirs.sum())
        close(info.weights * 3**exponent, theirs)
    losses = torch.stack(list(problem.general(problem.params, problem.batch).values()))
    logs = gn.multi_task_loss(
        problem.seam.backbone,
        {name: (lambda *a, head=head: head(*a).log()) for name, head in problem.seam.heads.items()},
        last_shared=problem.seam.last_shared,
    )
    balancer = gn.normalized(total="max")
    grads, _, info = balancer.grad(balancer.init(3, dtype=F64), problem.params, logs, problem.batch)
    close(info.weights, (norms / losses).max() / (norms / losses), rtol=1e-10)
    head = torch.autograd.functional.jacobian(
        lambda leaf: problem.general(problem.params | {"head.1": leaf}, problem.batch)["t1"].log(),
        problem.params["head.1"],
    )
    close(grads["head.1"], head, rtol=1e-10)
    pair = rows[:2]
    unit = pair / pair.norm(dim=1, keepdim=True)
    direction = torch.linalg.pinv(unit) @ torch.ones(2, dtype=F64)
    direction = direction / direction.norm()
    config = (pair @ direction).sum() * direction  # ConFIG: all cosines alike, its length the sum of the projections
    balancer = gn.normalized()
    _, info = balancer.balance(balancer.init(2, dtype=F64), gn.TaskStats(COURSE[0, :2], pair.norm(dim=1)))
    torch.testing.assert_close(info.weights @ pair, config, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("total", ["rms", "max", "mean"])
def test_normalized_without_an_absent_task(total):
    norms, balancer = torch.tensor([0.1, torch.nan, 0.4], dtype=F64), gn.normalized(total=total)
    stats = gn.TaskStats(COURSE[0], norms)
    _, info = balancer.balance(balancer.init(3, dtype=F64), stats, mask=[True, False, True])
    _, pair = balancer.balance(balancer.init(2, dtype=F64), gn.TaskStats(COURSE[0, ::2], norms[::2]))
    close(info.weights[::2], pair.weights)
    assert info.weights[1] == 0


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_normalized_gradients_of_any_size(size):
    balancer = gn.normalized(total="rms")
    norms = torch.tensor([1.0, 2.0, 4.0])
    weights = [balancer.balance(balancer.init(3), gn.TaskStats(norms, s * norms))[1].weights for s in (1.0, size)]
    torch.testing.assert_close(*weights)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: gn.stch(mu=0.0), "mu=0.0"),
        (lambda: gn.stch(10, preference=[1.0, 2.0]), "leave steps_per_epoch out"),
        (lambda: gn.stch(0), "steps_per_epoch=0"),
        (lambda: gn.dwa(0), "steps_per_epoch=0"),
        (lambda: gn.dwa(2, temperature=-1.0), "temperature=-1.0"),
        (lambda: gn.relobralo(keep=1.5), "keep=1.5"),
        (lambda: gn.relobralo(temperature=0.0), "temperature=0.0"),
        (lambda: gn.uncertainty(temperature=0.0), "temperature=0.0"),
        (lambda: gn.normalized(total="sum"), "total='sum' must be one of 'rms', 'max', 'mean'"),
        (lambda: gn.normalized(heads="Own"), "heads='Own' must be one of 'weighted', 'own'"),
        (lambda: gn.fairgrad(heads="weigthed"), "heads='weigthed' must be one of 'weighted', 'own'"),
        (lambda: gn.balancer(None, needs="loss"), "needs='loss' must be one of 'losses', 'norms', 'example_norms'"),
        (lambda: gn.measure(torch.ones(2), list, None, needs="gramain"), "needs='gramain' must be one of 'losses'"),
        (lambda: gn.measure(torch.ones(2), list, None, heads="Own"), "heads='Own' must be one of 'weighted', 'own'"),
        (lambda: gn.rlw(seed=0.5), "seed=0.5 must be a whole number"),
        (lambda: gn.rlw(seed=torch.tensor(1.0)), r"seed=tensor\(1.\) must be a whole number, an int"),
        (lambda: gn.relobralo(seed=float("nan")), "seed=nan must be a whole number"),
    ],
)
def test_hyperparameters_out_of_range(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_guide_has_a_row_for_every_method():
    guide = (Path(gn.__file__).parent.parent / "docs" / "methods.md").read_text()
    named = set(re.findall(r"`(\w+)", "\n".join(row.split("|")[1] for row in guide.splitlines() if row[:1] == "|")))
    returned = {name: getattr(getattr(gn, name), "__annotations__", {}).get("return", "") for name in gn.__all__}
    makers = {name for name, kind in returned.items() if str(kind).startswith("Balancer[")}
    assert makers - {"balancer", "rotograd"} <= named
    assert {"gradnorm", "famo", "mgda"} <= makers
