"""The methods of the Gramian: their published equations, TorchJD's results, and the errors of published code."""

import itertools

import numpy as np
import pytest
import scipy.optimize
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import BALANCERS, GRAMIAN

import gradnorm_func as gn

F64 = torch.float64
every = pytest.mark.parametrize("name", GRAMIAN)
# How the weights go if all losses are multiplied by k: as a power of it.
POWERS = {"nash": -1.0, "fairgrad": -4 / 3}
draws = settings(max_examples=10, deadline=None, derandomize=True)
rows_of = st.tuples(st.integers(0, 10**6), st.integers(2, 6))


def draw(seed, count, conflict=0.0, dtype=F64):
    """(T, d) gradients whose lengths are an order of magnitude apart."""
    source = torch.Generator().manual_seed(seed)
    rows = torch.randn(count, 12, generator=source, dtype=F64)
    common = torch.randn(12, generator=source, dtype=F64)
    rows = rows - conflict * torch.linspace(-1, 1, count, dtype=F64)[:, None] * common
    return (rows * 10 ** torch.rand(count, 1, generator=source, dtype=F64)).to(dtype)


def balance(balancer, rows, losses=None, mask=None):
    """Info of a step with these gradients."""
    losses = torch.linspace(1, 2, len(rows), dtype=rows.dtype) if losses is None else losses
    stats = gn.TaskStats(losses, rows.norm(dim=1), gramian=rows @ rows.T)
    return balancer.balance(balancer.init(len(rows), dtype=rows.dtype), stats, mask=mask)[1]


def weights(name, rows, **options):
    return balance(BALANCERS[name](None), rows, **options).weights


def close(a, b, rtol=1e-8, atol=1e-12):
    torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


# ---------------------------------------------------------------------------------------------- equations


@pytest.mark.parametrize("normalise", ["none", "l2", "loss", "loss+"])
def test_mgda_of_normalised_gradients(normalise):
    rows, losses = draw(0, 4, 2.0), torch.tensor([0.5, 3.0, 1.0, 7.0], dtype=F64)
    units = {"none": torch.ones(4, dtype=F64), "l2": rows.norm(dim=1), "loss": losses}
    units["loss+"] = units["l2"] * losses
    scaled = (rows / units[normalise][:, None]).numpy()
    v = torch.from_numpy(scipy.optimize.nnls(np.vstack([scaled.T, np.ones(4)]), np.eye(13)[-1])[0]) / units[normalise]
    assert v.count_nonzero() > 1
    info = balance(gn.mgda(normalise=normalise), rows, losses)
    close(info.weights, v / v.sum())
    assert abs(info.memory) < 1e-12


def test_mgda_refuses_a_loss_that_is_no_unit():
    info = balance(gn.mgda(normalise="loss"), draw(0, 3), torch.tensor([1.0, -1.0, 2.0], dtype=F64))
    assert not info.finite
    assert torch.equal(info.weights, torch.ones(3, dtype=F64))
    zero = draw(0, 3) * torch.tensor([1.0, 0.0, 1.0], dtype=F64)[:, None]
    close(weights("mgda-l2", zero), torch.tensor([0.0, 1.0, 0.0], dtype=F64))


@pytest.mark.parametrize("c", [0.0, 0.4, 0.8, torch.tensor(0.4)])
def test_cagrad(c):
    rows = draw(1, 5, 2.0)
    mean = rows.mean(0)
    info = balance(gn.cagrad(c=c), rows)
    d = (1 + float(c) ** 2) / 5 * info.weights @ rows
    close((d - mean).norm(), float(c) * mean.norm(), rtol=1e-6)

    def objective(w):
        combined = torch.from_numpy(w) @ rows
        return float(combined @ mean + c * mean.norm() * combined.norm())

    constraint = {"type": "eq", "fun": lambda w: w.sum() - 1}
    found = scipy.optimize.minimize(objective, np.full(5, 0.2), bounds=[(0, 1)] * 5, constraints=constraint, tol=1e-14)
    close((rows @ d).min(), torch.tensor(found.fun, dtype=F64), rtol=1e-5 if float(c) else 1)
    assert abs(info.memory) < 1e-10 or not float(c)
    assert float(c) or torch.equal(info.weights.round(decimals=12), torch.ones(5, dtype=F64))


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0, torch.tensor(3.0)])
@pytest.mark.parametrize("preference", [None, [1.0, 4.0, 0.3, 2.0]])
def test_fairgrad(alpha, preference):
    rows = draw(2, 4, 1.0)
    info = balance(gn.fairgrad(alpha=alpha, preference=preference), rows)
    p = torch.ones(4, dtype=F64) if preference is None else torch.tensor(preference, dtype=F64)
    close(rows @ (info.weights @ rows), (p / info.weights) ** (1 / float(alpha)))
    assert info.memory < 1e-8
    if float(alpha) == 1:
        close(balance(gn.nash(preference=preference), rows).weights, info.weights)
        close((info.weights @ rows).square().sum(), p.sum())


def test_aligned():
    rows, p = draw(3, 4), torch.tensor([1.0, 0.5, 2.0, 1.0], dtype=F64)
    info = balance(gn.aligned(preference={str(i): x for i, x in enumerate(p.tolist())}), rows)
    u, s, v = torch.linalg.svd(rows, full_matrices=False)
    close(info.weights @ rows, s.min() * (p @ (u @ v)))
    assert info.memory < 1e-12


def test_config_and_imtl_g_are_one_direction():
    rows = draw(4, 4)
    d = balance(gn.config(), rows).weights @ rows
    projections = rows @ d / d.norm()
    cosines = projections / rows.norm(dim=1)
    close(cosines, cosines[:1].expand(4))
    close(d.norm(), projections.sum())
    other = balance(gn.imtl_g(), rows).weights
    close(other.sum(), torch.ones((), dtype=F64))
    close((other @ rows) / (other @ rows).norm() * torch.sign(other @ rows @ d), d / d.norm())


def test_the_cone_by_hand():
    """Two unit gradients at 120 degrees: each is projected onto the other's normal plane."""
    rows = torch.tensor([[1.0, 0.0], [-0.5, 0.75**0.5]], dtype=F64)
    close(weights("upgrad", rows), torch.tensor([0.75, 0.75], dtype=F64))
    close(weights("dualproj", rows), torch.tensor([0.5, 0.5], dtype=F64))  # their mean conflicts with none
    rows[0] *= 4
    projected = (rows.mean(0) - (rows.mean(0) @ rows[1]) * rows[1], rows[0] - (rows[0] @ rows[1]) * rows[1])
    close(weights("dualproj", rows) @ rows, projected[0])
    close(weights("upgrad", rows) @ rows, (projected[1] + rows[1] - rows[1] @ rows[0] / 16 * rows[0]) / 2)


def surgery(rows, order, itself=False):
    """PCGrad on the gradients themselves; `itself`: also onto the plane of the task's own, as the official code."""
    out = []
    for i, row in enumerate(rows):
        for j in order:
            against = row @ rows[j]
            if against < 0 and (itself or i != j):
                row = row - against / rows[j].square().sum() * rows[j]
        out.append(row)
    return torch.stack(out)


@pytest.mark.parametrize("order", [None, *itertools.permutations(range(3))])
def test_pcgrad(order):
    rows = draw(5, 3, 3.0)
    info = balance(gn.pcgrad(order=order), rows)
    close(info.weights @ rows, surgery(rows, order or range(3)).sum(0))
    assert (info.weights >= 1).all()
    assert 0 < info.memory <= 1


# ---------------------------------------------------------------------------------------------- TorchJD


@pytest.mark.parametrize("conflict", [0.0, 2.0])
@pytest.mark.parametrize("count", [2, 3, 8])
def test_the_results_of_torchjd(count, conflict, monkeypatch):
    jd = pytest.importorskip("torchjd.aggregation")
    monkeypatch.setattr(torch, "randperm", torch.arange)  # their PCGrad draws its orders
    rows = draw(count, count, conflict)
    peers = {
        "imtl-g": jd.IMTLG(),
        "config": jd.ConFIG(),
        "aligned": jd.AlignedMTL(pref_vector=torch.ones(count, dtype=F64)),
        "pcgrad": jd.PCGrad(),
    }
    for name, peer in peers.items():
        expected = peer(rows)
        assert expected.norm() > 0
        close(weights(name, rows) @ rows, expected)
    # Their Frank-Wolfe steps near the solution, and do not get below it.
    theirs, ours = jd.MGDA(epsilon=1e-12, max_iters=3000)(rows).norm(), (weights("mgda", rows) @ rows).norm()
    assert ours <= theirs * (1 + 1e-9)
    assert theirs - ours < 1e-3 * rows.norm()


def test_upgrad_of_torchjd_gives_up_on_small_gradients():
    """Below a sum of squares of 1e-4 their normalised Gramian is zero: the plain mean, which conflicts with a task."""
    jd, linalg = pytest.importorskip("torchjd.aggregation"), pytest.importorskip("torchjd._linalg")
    gramians = pytest.importorskip("torchjd._linalg._gramian")

    class Exact(linalg.DualConeProjector):
        """Their projector, but for its solver, which asks for packages that are not here."""

        def __call__(self, vectors, gramian):
            regular = gramians.regularize(gramians.normalize(gramian, 1e-4), 1e-4)
            root = np.linalg.cholesky(regular.numpy()).T
            solve = lambda u: u.numpy() + scipy.optimize.nnls(root, -root @ u.numpy())[0]
            return torch.from_numpy(np.stack([solve(u) for u in vectors]))

    rows = torch.tensor([[1.0, 0.0], [-2.0, 1.0]], dtype=F64)
    theirs = jd.UPGrad(projector=Exact())
    close(theirs(rows), weights("upgrad", rows) @ rows, rtol=1e-2, atol=1e-3)  # their ridge
    small = 1e-3 * rows
    assert torch.equal(theirs(small), small.mean(0))
    assert (small @ theirs(small)).min() < 0
    close(weights("upgrad", small), weights("upgrad", rows))
    assert (small @ (weights("upgrad", small) @ small)).min() >= -1e-18


def test_imtl_g_goes_up_where_its_divisor_is_negative():
    """Its weights sum to 1, whatever the signs: here the step raises every loss. The length of config cannot flip."""
    third = torch.tensor([0.7, 0.7, 0.14], dtype=F64)
    rows = torch.stack([torch.eye(3, dtype=F64)[0], torch.eye(3, dtype=F64)[1], 0.5 * third / third.norm()])
    assert (rows @ (weights("imtl-g", rows) @ rows) < 0).all()
    assert (rows @ (weights("config", rows) @ rows) > 0).all()


def test_pcgrad_does_not_project_a_task_onto_its_own_normal_plane():
    """The official code does, after others have turned a gradient against itself: of its own loss nothing is left."""
    rows = torch.tensor([[1.0, 0.0, 0.0], [-2.0, 0.3, 0.0], [-1.0, -2.0, 0.5]], dtype=F64)
    order = [1, 2, 0]
    ours, official = surgery(rows, order), surgery(rows, order, itself=True)
    turned = [i for i in range(3) if ours[i] @ rows[i] < 0]
    assert turned, "nothing was turned against itself: the case shows nothing"
    assert (official.sum(0) - ours.sum(0)).norm() > 1e-2
    close(balance(gn.pcgrad(order=order), rows).weights @ rows, ours.sum(0))


# ---------------------------------------------------------------------------------------------- two tasks


def test_two_tasks_have_one_bisector():
    rows = draw(6, 2, 1.0)
    length = rows.norm(dim=1)
    close(weights("config", rows), length.mean() / length)
    for name in ("nash", "imtl-g", "mgda-l2"):
        w = weights(name, rows)
        close(w / w.sum(), (1 / length) / (1 / length).sum())


def test_upgrad_of_two_tasks_is_half_of_pcgrad():
    rows = draw(6, 2, 4.0)
    assert rows[0] @ rows[1] < 0
    close(balance(gn.upgrad(), rows).weights, balance(gn.pcgrad(), rows).weights / 2)


# ---------------------------------------------------------------------------------------------- properties


@every
@given(case=rows_of, data=st.data())
@draws
def test_permuting_the_tasks_permutes_the_weights(name, case, data):
    if name == "pcgrad":
        return  # goes by the tasks' numbers
    rows = draw(*case)
    order = data.draw(st.permutations(range(len(rows))))
    losses = torch.linspace(1, 2, len(rows), dtype=F64)
    close(weights(name, rows[order], losses=losses[order]), weights(name, rows, losses=losses)[order], rtol=1e-7)


@pytest.mark.parametrize("name", ["nash", "mgda-l2", "config", "imtl-g", "fairgrad", "cagrad"])
@given(case=rows_of)
@draws
def test_scaling_one_loss(name, case):
    """Nash's weights divide by it; MGDA of unit gradients, config and imtl_g keep the direction; others do not."""
    rows, factors = draw(*case), torch.ones(case[1], 1, dtype=F64)
    factors[0] = 30.0
    a, b = weights(name, rows) @ rows, weights(name, factors * rows) @ (factors * rows)
    if name == "nash":
        close(a, b, rtol=1e-7, atol=1e-9)
    cosine = a @ b / a.norm() / b.norm()
    if name in ("fairgrad", "cagrad"):
        assert cosine < 1 - 1e-6
    else:
        close(cosine.abs() if name == "imtl-g" else cosine, torch.ones((), dtype=F64))


@pytest.mark.parametrize("name", ["mgda", "mgda-l2", "upgrad", "dualproj", "fairgrad", "nash", "config"])
@given(case=rows_of, conflict=st.sampled_from([0.0, 2.0]))
@draws
def test_no_task_is_in_conflict(name, case, conflict):
    rows = draw(*case, conflict)
    d = weights(name, rows) @ rows
    assert (rows @ d >= -1e-10 * rows.norm(dim=1) * d.norm()).all()


@pytest.mark.parametrize("name", ["cagrad", "aligned", "pcgrad", "upgrad", "dualproj"])
@given(case=rows_of)
@draws
def test_the_mean_loss_falls(name, case):
    rows = draw(*case, 1.0)
    assert rows.mean(0) @ (weights(name, rows) @ rows) > 0


@pytest.mark.parametrize("name", ["mgda", "mgda-l2", "nash", "fairgrad", "config"])
@given(case=rows_of)
@draws
def test_a_task_that_is_there_twice(name, case):
    """It shares its weight, or has a vote more; both keep the direction finite and conflict-free."""
    rows = draw(*case)
    twice = torch.cat([rows, rows[:1]])
    w, d = weights(name, twice), weights(name, rows) @ rows
    assert (twice @ (w @ twice) >= -1e-9 * twice.norm(dim=1) * (w @ twice).norm()).all()
    if name.startswith("mgda") or name == "config":
        close((w @ twice) / (w @ twice).norm(), d / d.norm(), rtol=1e-6, atol=1e-6)
    else:
        close(w[0], w[-1], rtol=1e-6)


# ---------------------------------------------------------------------------------------------- any gradients


@every
@pytest.mark.parametrize("factor", [1e-8, 1e8])
@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_the_size_of_all_losses_changes_only_the_size(name, factor, dtype):
    for count in (2, 5):
        rows, losses = draw(7, count, 1.0, dtype), torch.linspace(1, 2, count, dtype=dtype)
        expected = weights(name, rows, losses=losses) * factor ** POWERS.get(name, 0.0)
        close(weights(name, factor * rows, losses=factor * losses), expected, rtol=1e-8 if dtype == F64 else 1e-3)


@every
@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize("count", [2, 3, 5])
def test_degenerate_tasks_have_an_answer(name, count, dtype):
    rows = draw(8, count, dtype=dtype)
    parallel, opposite = rows[:1] * torch.linspace(1, 2, count)[:, None], rows.clone()
    opposite[-1] = -rows[0]
    zero, same = rows.clone(), rows[:1].expand(count, -1)
    zero[0] = 0
    for case in (rows, parallel.to(dtype), -rows, opposite, zero, same, torch.zeros_like(rows)):
        info = balance(BALANCERS[name](None), case)
        assert info.finite
        assert info.weights.isfinite().all()
        assert info.memory.isfinite()


@every
@pytest.mark.parametrize("count", [3, 6])
def test_the_others_are_as_without_an_absent_task(name, count):
    rows, losses = draw(9, count, 1.0), torch.linspace(1, 2, count, dtype=F64)
    for absent in (0, count - 1):
        active = torch.arange(count) != absent
        noise = torch.where(active[:, None], rows, torch.nan)
        found = weights(name, noise, losses=losses, mask=active)
        close(found[active], weights(name, rows[active], losses=losses[active]))
        assert found[absent] == 0  # it trains nothing


@every
def test_what_is_not_finite_is_refused(name):
    for bad, place in itertools.product((torch.nan, torch.inf), ((0, 0), (0, 1))):
        rows = draw(10, 3)
        gramian = rows @ rows.T
        gramian[place] = gramian[place[::-1]] = bad
        balancer = BALANCERS[name](None)
        stats = gn.TaskStats(torch.ones(3, dtype=F64), rows.norm(dim=1), gramian=gramian)
        _, info = balancer.balance(balancer.init(3, dtype=F64), stats)
        assert not info.finite
        assert torch.equal(info.weights, torch.ones(3, dtype=F64))


@every
def test_a_state_of_float64_on_a_model_of_float32(name):
    """The rounding is that of the Gramian, of which dependent tasks have no more than that in some directions."""
    rows, losses = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), torch.linspace(1, 2, 6)
    stats, balancer = gn.TaskStats(losses, rows.norm(dim=1), gramian=rows @ rows.T), BALANCERS[name](None)
    expected = balancer.balance(balancer.init(6), stats)[1]
    state, info = balancer.balance(balancer.init(6, dtype=F64), stats)
    assert info.weights.dtype == info.memory.dtype == state.memory.dtype == F64
    assert (expected.weights @ rows).norm() > 0.1 or name in ("mgda", "mgda-l2", "dualproj")
    close(info.weights, expected.weights.double(), rtol=0, atol=0)
    close(info.memory, expected.memory.double(), rtol=0, atol=0)


def test_aligned_of_dependent_tasks_in_both_precisions():
    rows = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    u, s, v = torch.linalg.svd(rows.double(), full_matrices=False)
    expected = s.min() * (u @ v).T @ torch.ones(6, dtype=F64)
    loss_fn = lambda w, batch: rows @ w
    for dtype in (torch.float32, F64):
        balancer = gn.aligned()
        grads, _, info = balancer.grad(balancer.init(6, dtype=dtype), torch.zeros(4), loss_fn, None)
        close(grads.double(), expected, rtol=1e-4, atol=1e-5)
        assert info.memory < 1e-6


# ---------------------------------------------------------------------------------------------- one graph, vmap


@every
def test_one_graph(name):
    """And one node of it is the solver's loop, however many steps it takes; the closed forms have none."""
    balancer, calls = BALANCERS[name](None), []

    def backend(graph, inputs):
        calls.append([node.target for node in graph.graph.nodes if "gradnorm_func" in str(node.target)])
        return graph

    step = torch.compile(lambda rows: balance(balancer, rows).weights, fullgraph=True, backend=backend)
    for seed in range(3):
        rows = draw(seed, 4, 1.0)
        close(step(rows), weights(name, rows))
    assert len(calls) == 1
    assert len(calls[0]) == (name not in ("aligned", "config", "imtl-g"))


@every
def test_vmap_equals_a_loop(name):
    many = torch.stack([draw(seed, 4, 1.0) for seed in range(3)])
    for found, rows in zip(torch.func.vmap(lambda rows: weights(name, rows))(many), many, strict=True):
        close(found, weights(name, rows))


@every
def test_derivatives(name):
    rows, other = draw(11, 3, 1.0), draw(12, 3)
    value = lambda t: weights(name, rows + t * other) @ torch.arange(1.0, 4.0, dtype=F64)
    h, zero = 1e-6, torch.zeros((), dtype=F64)
    difference = (value(zero + h) - value(zero - h)) / (2 * h)
    assert difference.abs() > 1e-6 or name == "dualproj"
    close(torch.func.grad(value)(zero), difference, rtol=1e-5, atol=1e-7)


# ---------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: gn.mgda(normalise="norm"), "normalise='norm' must be one of 'none', 'l2'"),
        (lambda: gn.cagrad(c=1.0), r"c=1.0 must lie in \[0, 1\)"),
        (lambda: gn.fairgrad(alpha=0), "alpha=0 must be positive"),
        (lambda: gn.nash(preference=[1.0, -1.0]), r"preference=\[1.0, -1.0\] must be positive"),
        (lambda: gn.pcgrad(order=np.array([0, 0, 1])), r"order=array\(\[0, 0, 1\]\) must name every task"),
        (lambda: gn.pcgrad(order=torch.tensor([1, 2])), r"order=tensor\(\[1, 2\]\) must name every task"),
        (lambda: gn.pcgrad(order=torch.tensor(0)), r"order=tensor\(0\) must name every task"),
        (lambda: gn.pcgrad(order=[0, 0]), r"order=\[0, 0\] must name every task from 0 to T - 1 once"),
    ],
)
def test_mistakes_are_named(make, match):
    with pytest.raises(ValueError, match=match):
        make()


@pytest.mark.parametrize("make", [lambda: gn.nash(preference=[1.0, 2.0]), lambda: gn.aligned(preference=[1.0, 2.0])])
def test_preferences_are_one_a_task(make):
    with pytest.raises(ValueError, match="preference has 2 entries, but there are 3 tasks"):
        balance(make(), draw(0, 3))


def test_an_order_of_any_kind():
    rows = torch.eye(3, dtype=F64) - 0.4
    expected = balance(gn.pcgrad(order=[1, 2, 0]), rows).weights
    assert not torch.equal(expected, balance(gn.pcgrad(), rows).weights)
    for order in (np.array([1, 2, 0]), torch.tensor([1, 2, 0]), torch.tensor([1.0, 2.0, 0.0]), (1, 2, 0)):
        close(balance(gn.pcgrad(order=order), rows).weights, expected, rtol=0)
    many = torch.func.vmap(lambda order: balance(gn.pcgrad(order=order), rows).weights)(torch.tensor([[1, 2, 0]]))
    close(many[0], expected)


def test_an_order_is_of_all_tasks():
    with pytest.raises(ValueError, match="order has 2 entries, but there are 3 tasks"):
        balance(gn.pcgrad(order=[1, 0]), draw(0, 3))
