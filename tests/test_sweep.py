"""sweep: every run is what it would be on its own."""

import functools
import sys

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from toys import BALANCERS, inverse_norm, leaves, make_batch, make_params, make_problem, same_bits

import gradnorm_func as gn

F64, F32 = torch.float64, torch.float32
TOLERANCE = {F64: {"rtol": 1e-9, "atol": 1e-11}, F32: {"rtol": 1e-5, "atol": 1e-5}}
STEPS = 6
quiet = functools.partial(gn.sweep, progress=False)
eager = functools.partial(quiet, compile=False)


def batches(dtype=F64, num_tasks=3):
    return [make_batch(t, num_tasks, dtype) for t in range(STEPS)]


def stacked_problem(dtype=F64):
    """The problem of the toys with its heads as one stack of parameters."""
    heads = gn.stacked_heads(lambda p, z, b: (z @ p["w"] - b[1]).square().mean(), "heads", batch_dims=(None, 1))
    loss_fn = gn.multi_task_loss(
        lambda p, b: torch.tanh(b[0] @ p["trunk.0"].T),
        heads,
        last_shared=gn.shared_linear("trunk.1.weight", "trunk.1.bias", torch.tanh),
    )

    def params(seed):
        flat = make_params(seed, 3, dtype)
        return {k: v for k, v in flat.items() if "head" not in k} | {
            "heads.w": torch.stack([flat[f"head.{i}"] for i in range(3)])
        }

    return params, loss_fn


def problem_of(heads, dtype):
    if heads == "stacked":
        return stacked_problem(dtype)
    return lambda seed: make_params(seed, 3, dtype), getattr(make_problem(dtype=dtype), heads)


def one_run(params, loss_fn, data, balancer, optimizer):
    """The loop by hand: torch.optim on the parameters, the balancer's own step for the rest."""
    current = {name: leaf.clone() for name, leaf in params.items()}
    stepper = optimizer(list(current.values()))
    state, infos = balancer.init(3, dtype=next(iter(params.values())).dtype), []
    for batch in data:
        grads, state, info = balancer.grad(state, current, loss_fn, batch)
        if bool(getattr(info, "finite", True)):
            gn.write_grads(current, grads)
            stepper.step()
        infos.append(info)
    return current, state, [torch.stack(rows) for rows in zip(*map(leaves, infos), strict=True)]


def assert_same(run, expected, dtype):
    for ours, theirs in zip(leaves(run), leaves(*expected), strict=True):
        torch.testing.assert_close(ours, theirs, equal_nan=True, **TOLERANCE[dtype])


@pytest.mark.parametrize("where", [None, "trunk.1.weight"])
@pytest.mark.parametrize("heads", ["seam", "stacked", "general"])
@pytest.mark.parametrize("dtype", [F64, F32])
def test_gradnorm_is_the_runs_one_by_one(heads, dtype, where):
    """alpha, the weights' learning rate, the parameters' learning rate and the seed, all at once."""
    params, loss_fn = problem_of(heads, dtype)
    result = eager(
        params,
        loss_fn,
        batches(dtype),
        seeds=(3, 5),
        grid={"alpha": [0.0, 1.5], "lr": [1e-2, 1e-1], "rate": [1e-3, 1e-2]},
        balancer=lambda alpha, lr: gn.gradnorm(alpha=alpha, optimizer=gn.adam(lr), where=where),
        optimizer=lambda rate: gn.adam(rate),
    )
    assert {name: len(column) for name, column in result.runs.items()} == {
        "alpha": 16,
        "lr": 16,
        "rate": 16,
        "seed": 16,
    }
    assert result.runs["seed"].tolist() == [3, 5] * 8
    assert result.runs["alpha"].tolist() == [0.0] * 8 + [1.5] * 8
    assert result.history.weights.shape == (16, STEPS, 3)
    for r in range(0, 16, 3):
        alpha, lr, rate, seed = (float(column[r]) for column in result.runs.values())
        single = gn.gradnorm(alpha=alpha, optimizer=gn.adam(lr), where=where)
        expected = one_run(
            params(int(seed)), loss_fn, batches(dtype), single, functools.partial(torch.optim.Adam, lr=rate)
        )
        assert float((expected[0]["trunk.0"] - params(int(seed))["trunk.0"]).abs().max()) > 1e-3, "it moved"
        assert_same(result.run(r), expected, dtype)


@pytest.mark.parametrize("name", [*BALANCERS, "burn-in", "default"])
def test_every_balancer(name):
    table = BALANCERS | {
        "burn-in": lambda where: gn.gradnorm(burn_in=2, initial_decay=0.9, form="log", where=where),
        "default": lambda where: None,
    }
    balancer = table[name](None)
    params, loss_fn = problem_of("seam", F64)
    result = eager(
        params,
        loss_fn,
        batches(),
        grid={"rate": [1e-3, 3e-2]},
        seeds=(0, 1),
        balancer=balancer,
        optimizer=lambda rate: gn.sgd(rate),
    )
    for r, (rate, seed) in enumerate([(1e-3, 0), (1e-3, 1), (3e-2, 0), (3e-2, 1)]):
        sgd = functools.partial(torch.optim.SGD, lr=rate)
        assert_same(result.run(r), one_run(params(seed), loss_fn, batches(), balancer or gn.gradnorm(), sgd), F64)


@pytest.mark.parametrize(
    ("values", "make"),
    [
        ([0, 2], lambda x: gn.gradnorm(burn_in=x)),
        ([0.1, 0.5], lambda x: gn.gradnorm(floor=x, optimizer=gn.sgd(0.3))),
        ([0.5, 1.0], lambda x: gn.gradnorm(initial_decay=x, optimizer=gn.sgd(0.01))),
        ([0.5, 2.0], lambda x: gn.gradnorm(norm_ratios=[1.0, x, 1.0])),
        ([0.5, 0.9], lambda x: gn.gradnorm(optimizer=gn.adam(0.05, b1=x))),
        ([0.5, 0.9], lambda x: gn.gradnorm(optimizer=gn.adam(0.05, b2=x, eps=x / 10))),
        ([0.5, 3.0], lambda x: gn.static([1.0, x, 0.5])),
        ([0.5, 2.0], lambda x: gn.fixed_ratio([1.0, x, 1.0], budget=x, decay=x / 4)),
        ([0.1, 0.7], lambda x: inverse_norm(x)),
    ],
)
def test_any_number_can_be_swept(values, make):
    params, loss_fn = problem_of("seam", F64)
    result = eager(params, loss_fn, batches(), grid={"x": values}, balancer=make)
    moved = leaves(result.history, result.state, result.params)
    assert any(not same_bits(*leaf.unbind()) for leaf in moved), "it matters"
    adam = functools.partial(torch.optim.Adam, lr=1e-3)
    for r, value in enumerate(values):
        assert_same(result.run(r), one_run(params(0), loss_fn, batches(), make(value), adam), F64)


@pytest.mark.parametrize(("heads", "dtype"), [("seam", F64), ("stacked", F32)])
def test_compiled_it_is_one_graph_and_the_same(heads, dtype, monkeypatch):
    params, loss_fn = problem_of(heads, dtype)
    given = {
        "grid": [{"alpha": 0.0, "lr": 1e-2}, {"alpha": 0.7, "lr": 1e-1}, {"alpha": 1.5, "lr": 3e-2}],
        "balancer": lambda alpha, lr: gn.gradnorm(alpha=alpha, optimizer=gn.adam(lr), where="trunk.1"),
    }
    counter = CompileCounterWithBackend("aot_eager")  # Inductor would take a minute to say the same
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", functools.partial(compile_, backend=counter))
    counts = []

    def data():
        for batch in (*batches(dtype), make_batch(9, 3, dtype, size=5)):
            counts.append(counter.frame_count)
            yield batch

    found = quiet(params, loss_fn, data(), **given)
    assert [*counts, counter.frame_count] == [0] + [1] * STEPS + [2], "a program a sweep, and one for the last batch"
    assert found.history.losses.shape == (3, STEPS + 1, 3)
    assert_same(found, [eager(params, loss_fn, data(), **given)], dtype)


def test_the_default_compiler():
    params, loss_fn = problem_of("stacked", F64)
    given = {"grid": {"alpha": [0.0, 1.5]}, "balancer": lambda alpha: gn.gradnorm(alpha=alpha)}
    assert_same(quiet(params, loss_fn, batches(), **given), [eager(params, loss_fn, batches(), **given)], F64)


@pytest.mark.parametrize("chunk_size", [1, 2, 4, 99])
def test_in_groups_it_is_the_same(chunk_size):
    params, loss_fn = problem_of("seam", F64)
    given = {
        "grid": {"alpha": [0.0, 1.5]},
        "seeds": range(2),
        "balancer": lambda alpha: gn.gradnorm(alpha=alpha),
        "metric": lambda p: p["trunk.0"].sum(),
    }
    expected = eager(params, loss_fn, iter(batches()), **given)
    found = eager(params, loss_fn, iter(batches()), chunk_size=chunk_size, **given)
    assert_same(found, [expected], F64)
    assert found.runs.keys() == expected.runs.keys()


@pytest.mark.parametrize("balancer", ["gradnorm-adam", "fixed-ratio", "static", "user"])
def test_a_run_that_diverges_stays_where_it_was_and_disturbs_no_other(balancer):
    """A learning rate that blows up; and a NaN batch, after which every run goes on as if it had not been."""
    params, loss_fn = problem_of("general", F64)
    run = functools.partial(
        eager, params, loss_fn, balancer=BALANCERS[balancer](None), optimizer=lambda rate: gn.sgd(rate)
    )
    many = batches() * 5
    alone = run(many, grid={"rate": [1e-3]})
    both = run(many, grid={"rate": [1e-3, 1e200]})
    assert_same(both.run(0), alone.run(0), F64)
    if balancer != "user":  # it has no `finite` to say so
        assert bool(both.history.finite[0].all())
        assert not bool(both.history.finite[1, -1])
    assert all(bool(leaf.isfinite().all()) for leaf in leaves(both.params))
    assert float(both.params["trunk.0"][1].abs().max()) > 1e20, "it did blow up"

    bad = (many[0][0], many[0][1] * torch.nan)
    clean, seen = run(many[:4], grid={"rate": [1e-3]}), run([*many[:2], bad, *many[2:4]], grid={"rate": [1e-3]})
    assert same_bits(clean.params, seen.params)
    if balancer != "user":
        assert seen.history.finite[0].tolist() == [True, True, False, True, True]
        assert same_bits(clean.state, seen.state)


def test_the_best_run_is_that_of_the_lowest_metric():
    params, loss_fn = problem_of("seam", F64)
    goal = make_params(7)["trunk.0"]
    metric = lambda p: (p["trunk.0"] - goal).square().sum()
    given = {"seeds": (3, 7, 5), "metric": metric}
    result = eager(params, loss_fn, batches(), **given)
    assert result.metric.shape == (3,)
    assert result.best == 1
    assert result.runs["seed"].tolist() == [3, 7, 5]
    torch.testing.assert_close(result.metric, torch.stack([metric(result.run(r)[0]) for r in range(3)]))
    assert result._replace(metric=torch.tensor([torch.nan, 3.0, 2.0])).best == 2
    with pytest.raises(ValueError, match="every run is NaN"):
        _ = result._replace(metric=torch.full((3,), torch.nan)).best
    with pytest.raises(ValueError, match="not known without a metric"):
        _ = result._replace(metric=()).best


def test_nothing_given_is_written_to():
    problem = make_problem()
    params = {name: leaf.requires_grad_() for name, leaf in problem.params.items()}
    before = [leaf.detach().clone() for leaf in leaves(params, batches())]
    result = eager(params, problem.seam, batches(), grid={"a": [0.1, 0.2]}, balancer=lambda a: gn.gradnorm(alpha=a))
    assert same_bits(before, leaves(params, batches()))
    assert all(leaf.grad is None for leaf in params.values())
    assert not any(leaf.requires_grad for leaf in leaves(result))


def test_dropout_differs_from_run_to_run():
    def loss_fn(p, batch):
        kept = torch.nn.functional.dropout(batch * p, 0.5)
        return torch.stack([kept.square().mean(), (kept - 1).square().mean()])

    given = {"grid": {"a": [0.5, 0.5]}, "balancer": lambda a: gn.gradnorm(alpha=a)}
    losses = eager(torch.ones(50), loss_fn, [torch.ones(50)], **given).history.losses
    assert not torch.equal(losses[0], losses[1])


def test_bfloat16_parameters_get_float32_weights():
    params = lambda seed: make_params(seed, dtype=torch.bfloat16)
    result = eager(
        params,
        make_problem(dtype=torch.bfloat16).seam,
        batches(torch.bfloat16),
        grid={"a": [0.1], "lr": [1e-2]},
        balancer=lambda a: gn.gradnorm(alpha=a),
        optimizer=lambda lr: gn.sgd(lr),
    )
    assert {leaf.dtype for leaf in leaves(result.params)} == {torch.bfloat16}
    assert result.state.weights.dtype == F32


@pytest.mark.filterwarnings("ignore::Warning:tqdm")
@pytest.mark.parametrize("installed", [False, True])
def test_progress_with_and_without_tqdm(installed, monkeypatch, capsys):
    if installed:
        pytest.importorskip("tqdm")
    else:
        monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    params, loss_fn = problem_of("seam", F64)
    shown = gn.sweep(params, loss_fn, batches(), compile=False, progress=True)
    assert ("sweep" in capsys.readouterr().err) == installed
    assert same_bits(shown, eager(params, loss_fn, batches()))


ALPHA = {"grid": {"alpha": [0.0, 1.0]}, "balancer": lambda alpha: gn.gradnorm(alpha=alpha)}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"grid": {}}, "grid is empty"),
        ({"grid": []}, "grid is empty"),
        ({"grid": {"alpha": []}}, r"grid\['alpha'\] is empty"),
        ({"grid": {"alpha": 1.5}}, r"grid\['alpha'\]=1.5 must be a list of numbers"),
        ({"grid": {"alpha": "abc"}}, r"grid\['alpha'\]='abc' must be a list"),
        ({"grid": {"alpha": [0.1, "b"]}}, r"grid\['alpha'\] has 'b': .* only numbers"),
        ({"grid": {"alpha": [0.1, [0.1, 0.2]]}}, r"grid\['alpha'\] has values of the shapes \[\(\), \(2,\)\]"),
        ({"grid": {"path": [1.0]}}, "under this name an optimizer gets the path"),
        ({"grid": {"alpha": [None]}}, r"grid\['alpha'\] has None"),
        ({"grid": {"alpha": [torch.ones(2, 2)]}}, "booleans and vectors of numbers can differ"),
        ({"grid": {"seed": [1, 2]}}, "pass seeds="),
        ({"grid": [{"alpha": 1.0, "seed": 1}], "seeds": [2]}, "pass seeds="),
        ({"grid": [{"alpha": 1.0}, {"alpha": 1.0, "lr": 1.0}]}, "needs the same names"),
        ({"grid": {"alpha": [1.0], "lrr": [1.0]}}, r"grid has 'lrr', but no function .* \['alpha'\]"),
        ({"grid": {"alpha": [1.0]}, "balancer": None}, r"'alpha', but no function.*as a function of it"),
        ({"grid": {"alpah": [1.0]}}, "balancer takes 'alpha', which grid does not have"),
        ({"grid": None}, "balancer takes 'alpha', which grid does not have"),
        ({"grid": {"alpha": [0.1, -1.0]}}, "alpha=-1.0 must be at least 0"),
        ({"balancer": lambda **hyper: gn.gradnorm(**hyper)}, "one by one"),
        ({"balancer": lambda alpha: gn.sgd(0.1)}, "balancer returned Optimizer"),
        ({"balancer": 1.0}, "balancer=1.0 must be a Balancer"),
        ({"balancer": gn.sgd(0.1), "grid": None}, "balancer=.* must be a Balancer"),
        ({"optimizer": torch.optim.Adam}, "optimizer takes 'params', which grid does not have"),
        ({"seeds": []}, "seeds is empty"),
        ({"seeds": range(2), "params": make_params()}, "params are the same"),
        ({"params": {"w": 3}}, "only floating-point tensors"),
        ({"chunk_size": 0}, "chunk_size=0"),
        ({"batches": []}, "batches is empty"),
        ({"metric": lambda p: p["trunk.0"]}, r"metric returned \(6, 5\)"),
        ({"metric": lambda p: {"a": 1.0}}, "metric returned float"),
        ({"metric": 1.0}, "metric=1.0 must be a function"),
        ({"metric": lambda alpha: alpha}, "metric returned Tensor of its hyperparameters"),
        ({"metric_every": 2}, "metric_every=2 .* needs a metric="),
        ({"loss_fn": lambda p, alpha: [p["trunk.0"].sum()] * 2}, "loss_fn takes 'p', which grid does not have"),
        ({"batches": lambda seed: [make_batch(size=3 + seed)], "seeds": (0, 1)}, "be alike"),
        ({"batches": lambda seed: [make_batch()] * (1 + seed), "seeds": (0, 1)}, "as many batches for every seed"),
        ({"batches": lambda seed: [(*make_batch(), seed)], "seeds": (0, 1)}, "differ in 0: only tensors can"),
        ({"loss_fn": lambda p, b: p["trunk.0"].sum()}, "single scalar"),
    ],
)
def test_mistakes_are_told_up_front(given, message):
    problem = make_problem()
    call = {"params": make_params, "loss_fn": problem.seam, "batches": batches()[:1], **ALPHA, **given}
    with pytest.raises(ValueError, match=message):
        eager(**call)


@torch._dynamo.config.patch(recompile_limit=1)
def test_many_sweeps_in_one_session(monkeypatch):
    """Dynamo refuses one program too many of one code object."""
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", functools.partial(compile_, backend="eager"))
    for k in range(3):
        loss_fn = lambda w, x, k=k: {"a": (k + 1) * (w * x).sum(), "b": w.square().sum()}
        call = functools.partial(quiet, torch.ones(3), loss_fn, [torch.ones(3)])
        assert same_bits(call().params, call(compile=False).params)
