"""Every balancer × every property that DESIGN promises of all of them."""

import functools

import pytest
import torch
import torch._dynamo.utils
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from toys import BALANCERS, GRAMIAN, but_for_looks, leaves, make_batch, make_params, make_problem, same_bits

import gradnorm_func as gn
from gradnorm_func._balance import guard, seen
from gradnorm_func._balance.guard import due
from gradnorm_func._core import numerics, optim
from gradnorm_func._solvers import fair, nnls, trust

F64 = torch.float64
FORMS = {"gradnorm": "invariant", "gradnorm-adam": "paper", "gradnorm-sgd": "paper", "gradnorm-log": "log"}
every = pytest.mark.parametrize("name", BALANCERS)
# At z there is nothing to name; "trunk.1.weight" is the weight of the shared_linear; "general" knows no seam.
PATHS = {"z": ("seam", None), "W": ("seam", "trunk.1.weight"), "general": ("general", "trunk.1.weight")}
BATCHES = [make_batch(t) for t in range(5)]
paths = pytest.mark.parametrize("path", PATHS)
COMPILED = [name for name in BALANCERS if name not in GRAMIAN[1:]]  # of those differs one node: test_gramian_methods.py


def setup(name, path, dtype=F64, state_dtype=None):
    """(balancer, fresh state, params, loss_fn, batch)."""
    engine, where = PATHS[path]
    problem, balancer = make_problem(dtype=dtype), BALANCERS[name](where)
    return (
        balancer,
        balancer.init(3, dtype=state_dtype or dtype),
        problem.params,
        getattr(problem, engine),
        problem.batch,
    )


def run(balancer, state, params, loss_fn, steps, rate=0.02, **keywords):
    """A training run by hand."""
    for t in range(steps):
        grads, state, info = balancer.grad(state, params, loss_fn, BATCHES[t], **keywords)
        params = {name: leaf - rate * grads[name] for name, leaf in params.items()}
    return params, state, info


def assert_close(a, b, rtol=1e-10, atol=1e-12):
    for x, y in zip(leaves(a), leaves(b), strict=True):
        torch.testing.assert_close(x, y, rtol=rtol, atol=atol, equal_nan=True)


# ---------------------------------------------------------------------------------------------- purity, dtype


@every
@paths
def test_nothing_is_mutated_and_no_graph_is_left(name, path):
    balancer, state, params, loss_fn, batch = setup(name, path)
    params = {path: leaf.requires_grad_() for path, leaf in params.items()}
    for _ in range(2):  # the seam engine's second pass takes another way than its first
        before = [leaf.detach().clone() for leaf in leaves(state, params, batch)]
        versions = [leaf._version for leaf in leaves(state, params, batch)]
        grads, new, info = balancer.grad(state, params, loss_fn, batch)
        updated = balancer.update(state, params, loss_fn, batch)
        assert same_bits(before, leaves(state, params, batch))
        assert versions == [leaf._version for leaf in leaves(state, params, batch)]
        assert all(leaf.grad is None and leaf.grad_fn is None for leaf in params.values())
        assert not any(leaf.requires_grad for leaf in leaves(grads, new, info, updated))
        assert type(new) is type(state)
        assert_close(but_for_looks(new), but_for_looks(updated))
        state = new


@every
def test_the_callers_own_losses_leave_no_graph(name):
    """Losses and norms from classic autograd, still attached: a state that kept their graph would keep every step."""
    balancer, state, params, loss_fn, batch = setup(name, "general")
    theta = {path: leaf.requires_grad_() for path, leaf in params.items()}
    losses = loss_fn(theta, batch)
    norms = {
        task: torch.autograd.grad(loss, theta["trunk.1.weight"], create_graph=True)[0].norm()
        for task, loss in losses.items()
    }
    vector = torch.stack([norms[task] for task in sorted(norms)])
    stats = gn.TaskStats(losses, norms, gramian=vector[:, None] * vector, extra=vector)
    new, info = balancer.balance(state, stats)
    assert not any(leaf.requires_grad for leaf in leaves(new, info))


@every
@paths
@pytest.mark.parametrize(
    ("dtype", "state_dtype"),
    [(torch.float32, torch.float32), (F64, F64), (torch.bfloat16, torch.float32), (torch.float32, F64)],
)
def test_dtypes_are_kept(name, path, dtype, state_dtype):
    balancer, state, params, loss_fn, batch = setup(name, path, dtype, state_dtype)
    kinds = [leaf.dtype for leaf in leaves(state)]
    for _ in range(3):
        grads, state, info = balancer.grad(state, params, loss_fn, batch)
        assert {leaf.dtype for leaf in grads.values()} == {dtype}
    assert [leaf.dtype for leaf in leaves(state)] == kinds
    assert info.weights.dtype == state_dtype
    assert all(leaf.isfinite().all() for leaf in leaves(grads, state))


# ---------------------------------------------------------------------------------------------- compile, host sync


def unique_graphs():
    """Not the number of calls of the backend, which Dynamo may start again before it is content."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize(("name", "path"), [*((name, "W") for name in COMPILED), ("gradnorm-adam", "z")])
def test_ten_compiled_steps_are_one_graph_and_equal_eager(name, path):
    balancer, state, params, loss_fn, _ = setup(name, path)
    before = unique_graphs()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(state, params, batch):
        return balancer.grad(state, params, loss_fn, batch)

    eager_state, eager_params = state, params
    for t in range(10):
        batch = make_batch(t)
        grads, state, info = step(state, params, batch)
        params = {key: leaf - 0.02 * grads[key] for key, leaf in params.items()}
        eager_grads, eager_state, eager_info = balancer.grad(eager_state, eager_params, loss_fn, batch)
        eager_params = {key: leaf - 0.02 * eager_grads[key] for key, leaf in eager_params.items()}
        assert_close((params, state, info), (eager_params, eager_state, eager_info))
    assert unique_graphs() - before == 1


def test_mask_update_and_hyperparameters_as_tensors_are_one_graph_too():
    problem = make_problem()
    before = unique_graphs()

    def step(state, params, batch, alpha, rate, mask, update):
        return gn.gradnorm_grad(
            state, params, problem.seam, batch, alpha=alpha, optimizer=gn.adam(rate), mask=mask, update=update
        )

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    state = eager_state = gn.init_state(3, dtype=F64)
    for t in range(6):
        arguments = (
            problem.params,
            make_batch(t),
            torch.tensor(0.3 * t, dtype=F64),
            torch.tensor(0.01 * (t + 1), dtype=F64),
            {"t0": torch.tensor(t != 2), "t1": torch.tensor(True), "t2": torch.tensor(t < 4)},
            torch.tensor(t != 3),
        )
        grads, state, _ = compiled(state, *arguments)
        eager_grads, eager_state, _ = step(eager_state, *arguments)
        assert_close((grads, state), (eager_grads, eager_state))
    assert unique_graphs() - before == 1


class NoHostSync(TorchDispatchMode):
    """Fails where a value is fetched from the device."""

    FETCHES = (torch.ops.aten._local_scalar_dense, torch.ops.aten.is_nonzero, torch.ops.aten.equal)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in self.FETCHES:
            raise AssertionError(f"{func} waits for the device")
        return func(*args, **(kwargs or {}))


@every
@paths
def test_the_device_is_never_waited_for(name, path, monkeypatch):
    """A CPU may be asked, where it costs nothing; here it is taken for a device. The numbers are the same bits.

    But a solver that may not ask takes another way to the same solution.
    """
    balancer, state, params, loss_fn, batch = setup(name, path)
    options = {"mask": torch.tensor([True, False, True]), "update": torch.tensor(True)}
    asked = state
    for _ in range(2):
        expected = balancer.grad(asked, params, loss_fn, batch, **options)
        asked = expected[1]
    for module in (guard, seen, numerics, optim, nnls, trust, fair):
        monkeypatch.setattr(module, "free_to_ask", lambda x: False)
    for _ in range(2):
        with NoHostSync():
            found = balancer.grad(state, params, loss_fn, batch, **options)
            balancer.update(state, params, loss_fn, batch, **options)
        state = found[1]
    if name in GRAMIAN:
        assert_close(found[:2], expected[:2], rtol=1e-8, atol=1e-9)
    elif (name, path) == ("equal-norms", "W"):  # a step between its turns, not measured at W, adds up in another order
        assert_close(found[:2], expected[:2], rtol=1e-13, atol=1e-14)
    else:
        assert same_bits(found[:2], expected[:2])


def test_whose_turn_it_is_is_asked_of_a_cpu_only():
    state = gn.equal_norms(every=2).init(2, device="meta")
    assert isinstance(due(state, 2, True), torch.Tensor)
    assert due(gn.equal_norms().init(2), 2, True) is True


def test_the_watch_for_host_syncs_sees_them():
    with pytest.raises(AssertionError, match="waits for the device"), NoHostSync():
        bool(torch.ones(2).sum() > 1)


# ---------------------------------------------------------------------------------------------- vmap, grad


@pytest.mark.parametrize("name", FORMS)
@paths
def test_vmap_over_eight_alphas_equals_eight_runs(name, path):
    engine, where = PATHS[path]
    problem = make_problem()
    optimizer = gn.sgd(0.01) if "sgd" in name else gn.adam()
    alphas = torch.linspace(0, 2, 8, dtype=F64)

    def train(alpha):
        balancer = gn.gradnorm(alpha=alpha, where=where, optimizer=optimizer, form=FORMS[name])
        return run(balancer, balancer.init(3, dtype=F64), problem.params, getattr(problem, engine), 5)

    together = torch.func.vmap(train)(alphas)
    for i, alpha in enumerate(alphas):
        assert_close([leaf[i] for leaf in leaves(together)], train(alpha))
    assert_close(train(0.0), train(alphas[0]))


@every
@paths
def test_vmap_over_seeds_equals_single_runs(name, path):
    balancer, state, _, loss_fn, _ = setup(name, path)
    seeds = [make_params(seed) for seed in range(3)]
    stacked = {key: torch.stack([params[key] for params in seeds]) for key in seeds[0]}
    together = torch.func.vmap(lambda params: run(balancer, state, params, loss_fn, 4))(stacked)
    for i, params in enumerate(seeds):
        assert_close([leaf[i] for leaf in leaves(together)], run(balancer, state, params, loss_fn, 4))


def finite_difference(fn, x, h=1e-6):
    return (fn(x + h) - fn(x - h)) / (2 * h)


@every
@paths
def test_grad_goes_through_a_run(name, path):
    """The derivative of where training ends with respect to the model's learning rate."""
    balancer, state, params, loss_fn, _ = setup(name, path)

    def final(rate):
        params_, state_, _ = run(balancer, state, params, loss_fn, 4, rate)
        return sum(leaf.square().sum() for leaf in params_.values()) + (state_.weights * torch.arange(3.0)).sum()

    rate = torch.tensor(0.02, dtype=F64)
    torch.testing.assert_close(torch.func.grad(final)(rate), finite_difference(final, rate), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", FORMS)
@paths
def test_grad_of_the_weights_with_respect_to_their_learning_rate(name, path, masked):
    engine, where = PATHS[path]
    problem = make_problem()
    mask = torch.tensor([True, False, True]) if masked else None

    def final(rate):
        optimizer = gn.sgd(rate) if "sgd" in name else gn.adam(rate)
        balancer = gn.gradnorm(where=where, optimizer=optimizer, form=FORMS[name])
        state = balancer.init(3, dtype=F64)
        _, state, _ = run(balancer, state, problem.params, getattr(problem, engine), 4, mask=mask)
        return (state.weights * torch.arange(3.0)).sum()

    rate = torch.tensor(0.02, dtype=F64)
    derivative = torch.func.grad(final)(rate)
    assert derivative.abs() > 1e-3
    torch.testing.assert_close(derivative, finite_difference(final, rate), rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------------------------------------- permutation


def permuted(tree, order, num_tasks):
    """Every per-task leaf with its tasks in another order."""
    return [leaf[..., order] if leaf.shape[-1:] == (num_tasks,) else leaf for leaf in leaves(tree)]


# Not those that go by the tasks' numbers, or that parallel gradients leave without a solution: test_gramian_methods.py.
@pytest.mark.parametrize("name", [name for name in BALANCERS if name not in ("rlw", *GRAMIAN[1:])])
@settings(max_examples=6, deadline=None, derandomize=True)
@given(data=st.data())
def test_permuting_tasks_permutes_everything(name, data):
    """Random T, shapes, pytrees of losses and of parameters."""
    num_tasks = data.draw(st.sampled_from([3] if name in ("fixed-ratio", "static") else [2, 3, 5]))
    shapes = data.draw(st.lists(st.lists(st.sampled_from([1, 2, 7]), max_size=3).map(tuple), min_size=1, max_size=3))
    structure = data.draw(st.sampled_from(["list", "tuple", "tensor", "nested"]))
    order = data.draw(st.permutations(range(num_tasks)))
    seed = data.draw(st.integers(0, 1000))
    draw = torch.Generator().manual_seed(seed)
    params = {"a": [torch.randn(shape, generator=draw, dtype=F64) for shape in shapes], "b": ()}
    # One coefficient per task and leaf, so that no two task gradients are alike.
    factors = torch.rand(num_tasks, len(shapes), generator=draw, dtype=F64) + 0.2

    def loss_fn(params, order):
        losses = [
            sum(c * (leaf - c).square().sum() for c, leaf in zip(factors[task], params["a"], strict=True))
            for task in order
        ]
        if structure == "tensor":
            return torch.stack(losses)
        if structure == "nested":
            return {"x": losses[0], "y": losses[1:]}
        return losses if structure == "list" else tuple(losses)

    # Hyperparameters that belong to tasks are the tasks' own, so here they are equal.
    make = {
        "fixed-ratio": lambda: gn.fixed_ratio(decay=0.9),
        "static": lambda: gn.static(norms=True),
        "ntk": lambda: gn.ntk(
            {
                str(i): lambda params, c: sum((x * leaf).sum() for x, leaf in zip(c, params["a"], strict=True)).square()
                for i in range(num_tasks)
            },
            points=lambda order: {str(i): factors[[task]] for i, task in enumerate(order)},
        ),
    }.get(name, functools.partial(BALANCERS[name], None))
    balancer = make()
    state = shuffled = balancer.init(num_tasks, dtype=F64)
    for _ in range(3):
        grads, state, info = balancer.grad(state, params, loss_fn, range(num_tasks))
        grads_, shuffled, info_ = balancer.grad(shuffled, params, loss_fn, order)
        params = {"a": [leaf - 0.01 * grad for leaf, grad in zip(params["a"], grads["a"], strict=True)], "b": ()}
        assert_close(grads_, grads)
        assert_close(permuted((state, info), order, num_tasks), (shuffled, info_))


# ---------------------------------------------------------------------------------------------- what it is for


@every
@pytest.mark.parametrize("path", ["z", "general"])
def test_a_convex_toy_is_solved(name, path):
    """Linear regression, one task per output: whatever the weights, they lead to the same zero."""
    target, x = torch.randn(4, 3, dtype=F64), torch.randn(32, 4, dtype=F64)
    scales = [1.0, 5.0, 0.5]
    head = lambda i: lambda params, z, x: scales[i] * (z[:, i] - (x @ target)[:, i]).square().mean()
    loss_fn = gn.multi_task_loss(lambda params, x: x @ params["w"], [head(i) for i in range(3)])
    if path == "general":
        loss_fn = loss_fn.__call__
    balancer = BALANCERS[name](None)
    if name == "ntk":
        residual = lambda i: lambda params, x: scales[i] ** 0.5 * (x @ (params["w"] - target))[i]
        balancer = gn.ntk({str(i): residual(i) for i in range(3)}, points=lambda x: dict.fromkeys("012", x))
    params, state = {"w": torch.zeros(4, 3, dtype=F64)}, balancer.init(3, dtype=F64)
    optimizer = torch.optim.Adam([params["w"]], lr=0.1)
    first = torch.stack(list(loss_fn(params, x)))
    for t in range(200):
        optimizer.param_groups[0]["lr"] = 0.1 * 0.98**t
        grads, state, _ = balancer.grad(state, params, loss_fn, x)
        gn.write_grads(params, grads)
        optimizer.step()
    # MGDA goes where the smallest gradient points, which takes longer.
    assert (torch.stack(list(loss_fn(params, x))) < (0.2 if name == "mgda" else 0.02) * first).all()


@every
@paths
@pytest.mark.parametrize("sizes", [(4, 4), (2, 4, 2), (1, 7)])
def test_micro_batches_merge_to_the_whole_batch(name, path, sizes):
    if name == "ntk":
        pytest.skip("kernels are means over points: see test_ntk.py")
    balancer, state, params, loss_fn, batch = setup(name, path)
    where = PATHS[path][1]
    _, state, _ = run(balancer, state, params, loss_fn, 2)
    needs = "gramian" if name in GRAMIAN else "example_norms"
    measure = functools.partial(gn.measure, params, loss_fn, weights=state.weights, where=where, needs=needs)
    full, parts, start = measure(batch), [], 0
    for size in sizes:
        part = tuple(x[start : start + size] for x in batch)
        parts.append(measure(part, num_examples=float(size)))
        start += size
    merged = gn.merge(*parts)
    assert_close(merged.grads, full.grads)
    assert_close(balancer.balance(state, merged), balancer.balance(state, full))


@every
@paths
def test_a_step_that_is_not_finite_changes_nothing(name, path):
    balancer, state, params, loss_fn, batch = setup(name, path)
    _, state, _ = run(balancer, state, params, loss_fn, 2)
    for bad in (torch.nan, torch.inf):
        y = batch[1].clone()
        y[0, 1] = bad
        _, new, info = balancer.grad(state, params, loss_fn, (batch[0], y))
        assert not info.finite
        assert same_bits(new, state)
        # A task that is absent multiplies its gradient by 0, which does not help against NaN.
        _, new, info = balancer.grad(state, params, loss_fn, (batch[0], y), mask=[True, False, True])
        assert not info.finite
        assert same_bits(new, state)


@every
@paths
def test_an_absent_task_may_have_no_loss(name, path):
    """The mean over no example is NaN, but its gradient is not."""
    if name == "user":
        pytest.skip("it knows no mask")
    balancer, state, params, _, batch = setup(name, path)
    problem = make_problem()

    def without_labels(params, batch):
        losses = problem.general(params, batch)
        return losses | {"t1": params["head.1"][:0].mean()}

    def no_head(params, z, batch):
        return params["head.1"][:0].mean() + 0 * z[:0].sum()

    seam = gn.multi_task_loss(
        problem.seam.backbone, problem.seam.heads | {"t1": no_head}, last_shared=problem.seam.last_shared
    )
    loss_fn = without_labels if path == "general" else seam
    grads, new, info = balancer.grad(state, params, loss_fn, batch, mask=[True, False, True])
    assert info.losses[1].isnan()
    assert info.finite
    assert new.weights[1] == state.weights[1]
    assert all(leaf.isfinite().all() for leaf in leaves(grads, new.weights))
