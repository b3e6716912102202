"""Models under plain autograd: DDP and FSDP2 in several processes, compiled, checkpointed, mixed precision."""

import copy
import time
from functools import lru_cache

import bridge_cases as cases
import numpy as np
import optree
import pytest
import scipy.optimize
import torch
import torch.multiprocessing as mp
from bridge_cases import CONFIGS, FEW, TASKS, TASKS_DICT, Config
from models import MAKERS, WEIGHTS, Classic, make
from torch import nn
from torch.utils.checkpoint import checkpoint
from toys import BALANCERS as TABLE
from toys import same_bits

import gradnorm_func as gn

F64 = torch.float64
STEPS = 5  # of a default run
W = torch.tensor([0.3, 1.7, 0.9], dtype=F64)  # of tasks a, b, c
BROKEN = Config("fork", "ddp", "gradnorm", "z", 1)


def launch(folder, ranks, jobs, seconds):
    """The results of all ranks; nothing that hangs outlives the limit."""
    context = mp.start_processes(
        cases.run_rank, (ranks, str(folder), jobs), nprocs=ranks, join=False, start_method="spawn"
    )
    end = time.monotonic() + seconds
    try:
        while not context.join(timeout=1):  # raises what a process raised
            assert time.monotonic() < end, f"no answer within {seconds} s"
    finally:
        for process in context.processes:
            process.kill()
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(ranks)]


@lru_cache
def reference(config, steps):
    """Route and wrapper do not matter to it."""
    return cases.reference(config, steps)


def gap(found, config, steps):
    """The largest relative difference between a rank's history and that of one functional process."""
    lag = 2 if cases.lagged(config) else 1
    expected = reference(config._replace(route="", wrapper="", micro=lag), steps)
    pairs = [(found.weights, expected.weights), (found.norms, expected.norms)]
    pairs += [(found.grads[name], grad) for name, grad in expected.grads.items()]
    pairs += [(found.params[name], value) for name, value in expected.params.items()]
    assert all(right.norm() > 0 for _, right in pairs), "the reference must not be zero"
    return max(float((left - right).norm() / right.norm()) for left, right in pairs)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """All that the tests want to know of two processes, from one start of them."""
    jobs = {config: (cases.train, config, STEPS) for config in FEW}
    jobs |= {fault: (cases.train_broken, fault, BROKEN, STEPS) for fault in ("reduce", "share")}
    jobs |= {"sharded": (cases.sharded,), "sinks": (cases.sinks,)}
    found = launch(tmp_path_factory.mktemp("ranks"), 2, list(jobs.values()), seconds=240)
    return {name: [results[i] for results in found] for i, name in enumerate(jobs)}


@pytest.mark.parametrize("config", FEW, ids=lambda config: "-".join(map(str, config)))
def test_two_processes_equal_one(two_ranks, config):
    assert max(gap(history, config, STEPS) for history in two_ranks[config]) < 1e-10


@pytest.mark.parametrize("fault", ["reduce", "share"])
def test_what_is_left_out_is_missed(two_ranks, fault):
    """The stats' mean over ranks, or the share of a batch that is larger than another's."""
    assert max(gap(history, BROKEN, STEPS) for history in two_ranks[fault]) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_every_combination(tmp_path, ranks):
    found = launch(tmp_path, ranks, [(cases.train, config, 50) for config in CONFIGS], seconds=3000)
    gaps = {c: max(gap(h, c, 50) for h in histories) for c, *histories in zip(CONFIGS, *found, strict=True)}
    print(f"{len(gaps)} configurations, {ranks} processes, 50 steps: largest difference {max(gaps.values()):.1e}")
    assert max(gaps.values()) < 1e-10, {config: size for config, size in gaps.items() if not size < 1e-10}


def test_sharded_parameters(two_ranks):
    """By both engines, under implicit replication: global norms as plain tensors, gradients as the parameters lie."""
    params, batch = dict(cases.make_model().named_parameters()), cases.make_batch(0)
    loss_fn = cases.functional_loss(cases.make_model(), linear=False)
    for found in two_ranks["sharded"]:
        cases_of = {name: value for name, value in found.items() if isinstance(value, tuple)}
        assert len(cases_of) == 18
        for name, (norms, grads) in cases_of.items():
            engine, where, _ = name.split()
            where = None if where == "None" else where
            plain = (lambda p, b: loss_fn(p, b)) if engine == "general" else loss_fn
            expected = gn.measure(params, plain, batch, weights=torch.ones(3, dtype=F64), where=where)
            torch.testing.assert_close(norms, expected.grad_norms, rtol=1e-12, atol=0)
            torch.testing.assert_close(grads, expected.grads, rtol=1e-10, atol=1e-14)
        for name, where in {"z": None, "W": "last.weight"}.items():
            expected = gn.task_grad_norms(loss_fn, params, batch, where=where)
            for how in ("tp", "tp all"):
                torch.testing.assert_close(found[f"{how} {name}"], expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", ["mixed", "fsdp"])
def test_sharded_parameters_that_torch_func_cannot_differentiate(two_ranks, kind):
    for found in two_ranks["sharded"]:
        assert "is a DTensor" in found[kind]
        assert "gn.measure_losses" in found[kind]
        assert "implicit_replication" in found[kind]


def test_a_sharded_parameter_as_w(two_ranks):
    assert "keep W outside of the wrapper" in two_ranks["sharded"][0]["where fsdp"]


def test_copies_that_a_wrapper_replaced(two_ranks):
    assert len(two_ranks["sinks"][0]) == 2
    for answer in two_ranks["sinks"][0].values():
        assert "no loss depends on its copy" in answer


# One process from here on: fork and measure_losses


def classic(case, model, count=None):
    """The losses of a case from forked copies; each task has its own."""
    m = Classic(model)
    z = case.through_last(m, case.backbone(m, case.batch))
    copies = gn.fork(z, case.tasks)
    return {name: task(m, copies[name], case.batch) for name, task in case.tasks.items()}, copies


def weights_of(losses):
    return torch.tensor([WEIGHTS[name] for name in gn.task_names(losses)], dtype=F64)


@pytest.mark.parametrize("name", MAKERS)
def test_norms_at_z(name):
    case, model = make(name), copy.deepcopy(make(name).model)
    rows = case.reference(None, at_z=True).rows
    expected = {task: torch.cat([leaf.flatten() for leaf in leaves]).norm() for task, leaves in rows.items()}
    assert sum(expected.values()) > 0
    losses, copies = classic(case, model)
    before = gn.measure_losses(losses, copies)
    w = weights_of(losses)
    (2.5 * sum(WEIGHTS[task] * loss for task, loss in losses.items())).backward()
    after = gn.measure_losses(losses, copies, weights=w, scale=2.5)
    for stats in (before, after):
        for k, task in enumerate(gn.task_names(losses)):
            torch.testing.assert_close(stats.grad_norms[k], expected[task], rtol=1e-10, atol=0)
    examples = gn.measure(case.params(), case.seam("within"), case.batch, has_aux=case.has_aux)
    examples = examples[0] if case.has_aux else examples
    for stats in (before, after):
        torch.testing.assert_close(stats.example_norms, examples.example_norms, rtol=1e-10, atol=1e-14)
        assert not stats.losses.requires_grad
        assert not stats.grad_norms.requires_grad


@pytest.mark.parametrize("name", MAKERS)
def test_a_forked_model_trains_as_before(name):
    case, model = make(name), copy.deepcopy(make(name).model)
    losses, copies = classic(case, model)
    gn.measure_losses(losses, copies)
    sum(WEIGHTS[task] * loss for task, loss in losses.items()).backward()
    paths = case.paths(None)
    for path, expected in zip(paths, case.reference(None).total, strict=True):
        grad = model.get_parameter(path).grad
        torch.testing.assert_close(
            torch.zeros_like(expected) if grad is None else grad, expected, rtol=1e-10, atol=1e-13
        )


@pytest.mark.parametrize("name", MAKERS)
def test_norms_at_parameters(name):
    case, model = make(name), copy.deepcopy(make(name).model)
    losses, _ = classic(case, model)
    for where in case.where.values():
        paths = case.paths(where)
        if where is None or "spare" in str(where):
            continue
        stats = gn.measure_losses(losses, where={path: model.get_parameter(path) for path in paths}, scale=8.0)
        rows = case.reference(where).rows
        for k, task in enumerate(gn.task_names(losses)):
            expected = torch.cat([leaf.flatten() for leaf in rows[task]])
            torch.testing.assert_close(stats.grad_norms[k], expected.norm(), rtol=1e-10, atol=0)
            found = torch.cat([stats.task_grads[path][k].flatten() for path in paths])
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("needs", ["norms", "gramian"])
def test_stats_merge_exactly(needs):
    model, batch = cases.make_model(), cases.make_batch(0)
    params = dict(model.named_parameters())
    for place in ("z", "W"):
        parts = []
        for part in (slice(0, 5), slice(5, 24)):
            piece = {name: value[part] for name, value in batch.items()}
            losses, copies = model(piece)
            at = {"copies": copies} if place == "z" else {"where": {"last.weight": model["last"].weight}}
            parts.append(gn.measure_losses(losses, **at, needs=needs, num_examples=len(piece["x"])))
        where = None if place == "z" else "last.weight"
        expected = gn.measure(params, cases.functional_loss(model, linear=False), batch, where=where, needs=needs)
        for field in ("losses", "grad_norms", "square_norms", "example_norms", "gramian", "task_grads"):
            torch.testing.assert_close(
                getattr(gn.merge(*parts), field), getattr(expected, field), rtol=1e-10, atol=1e-15
            )


def test_a_task_of_weight_zero():
    losses, copies = cases.make_model()(cases.make_batch(0))
    w = torch.tensor([0.0, 1.0, 2.0], dtype=F64)
    sum(w[k] * losses[task] for k, task in enumerate("abc")).backward()
    norms = gn.measure_losses(losses, copies, weights=w).grad_norms
    assert norms.isnan().tolist() == [True, False, False]
    gramian = gn.measure_losses(losses, copies, weights=w, needs="gramian").gramian
    assert gramian.isnan().tolist() == [[True, True, True], [True, False, False], [True, False, False]]


def test_gradient_scaler():
    model = cases.make_model()
    losses, copies = model(cases.make_batch(0))
    expected = gn.measure_losses(losses, copies)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(sum(w * losses[task] for task, w in zip("abc", W, strict=True))).backward()
    assert model["last"].weight.grad.norm() > 100
    factor = scaler.scale(torch.ones(()))
    stats = gn.measure_losses(losses, copies, weights=W, scale=factor)
    torch.testing.assert_close(stats.grad_norms, expected.grad_norms, rtol=1e-12, atol=0)


def test_autocast():
    """z in bfloat16, norms in float32 at least."""
    model, batch = cases.make_model().float(), {k: v.float() for k, v in cases.make_batch(0).items()}
    with torch.autocast("cpu", torch.bfloat16):
        losses, copies = model(batch)
    assert copies["a"].dtype == torch.bfloat16
    norms = gn.measure_losses(losses, copies).grad_norms
    exact = gn.measure_losses(*model(batch)).grad_norms
    assert norms.dtype == torch.float32
    torch.testing.assert_close(norms, exact, rtol=0.05, atol=0)


def test_copies_cannot_be_written_to():
    copies = gn.fork(torch.ones(3, 2, requires_grad=True) * 2, 2)
    with pytest.raises(RuntimeError, match="modified inplace"):
        nn.ReLU(inplace=True)(copies[0])


def test_fork_without_gradients():
    with torch.no_grad():
        losses, copies = cases.make_model()(cases.make_batch(0))
    assert list(copies) == list(TASKS)
    with pytest.raises(ValueError, match="losses have no graph"):
        gn.measure_losses(losses, copies)


def test_bad_losses():
    model, batch = cases.make_model(), cases.make_batch(0)
    losses, copies = model(batch)
    other = model(batch)[1]
    with pytest.raises(ValueError, match="makes 1 copies"):
        gn.fork(torch.ones(2), 1)
    with pytest.raises(ValueError, match="give either copies"):
        gn.measure_losses(losses)
    with pytest.raises(ValueError, match=r"tasks \['a', 'b', 'c'\], but the losses are \['a', 'b'\]"):
        gn.measure_losses({"a": losses["a"], "b": losses["b"]}, copies)
    with pytest.raises(ValueError, match="copies: 3 of them, for 2 losses"):
        gn.measure_losses(list(losses.values())[:2], list(copies.values()))
    with pytest.raises(ValueError, match="copies: one tensor"):
        gn.measure_losses(losses, copies["a"])
    with pytest.raises(ValueError, match="depends on its copy of z"):
        gn.measure_losses(losses, other)
    with pytest.raises(ValueError, match=r"call backward\(\) first"):
        gn.measure_losses(losses, copies, weights=W)
    with pytest.raises(ValueError, match="weights has 2 entries, but there are 3 losses"):
        gn.measure_losses(losses, copies, weights=W[:2])
    with pytest.raises(ValueError, match="call before backward"):
        gn.measure_losses(losses, where=model["last"].weight, weights=W)
    with pytest.raises(ValueError, match=r"no loss depends on where\['w'\]"):
        gn.measure_losses(losses, where={"w": torch.ones(2, requires_grad=True)})
    with pytest.raises(ValueError, match=r"use gn\.measure inside"):
        torch.func.grad(lambda z: gn.measure_losses(torch.stack([z.sum(), 2 * z.sum()]), gn.fork(z, 2)).losses.sum())(
            torch.ones(2)
        )
    frozen = gn.fork(torch.ones(24, 4, dtype=F64), TASKS_DICT)
    with pytest.raises(ValueError, match="have no graph: was the backbone"):
        gn.measure_losses(cases.losses_of(model, frozen, batch), frozen)


@pytest.mark.parametrize("place", ["z", "W"])
@pytest.mark.parametrize("heads", ["weighted", "own"])
def test_mgda_in_a_loop_with_its_own_backward(heads, place):
    """Its weights by scipy, its gradients by a loop over tasks; one task has no head, and reads its copy alone."""
    model, batch = cases.make_model(), cases.make_batch(0)
    balancer = gn.mgda() if place == "z" else gn.mgda(where="last.weight")
    losses, copies = model(batch)
    at = {"copies": copies} if place == "z" else {"where": model["last"].weight}
    _, info = balancer.balance(balancer.init(3, dtype=F64), gn.measure_losses(losses, **at, needs=balancer.needs))
    if heads == "own":
        gn.weigh_trunk(copies, info.weights)
        sum(losses.values()).backward()
    else:
        sum(w * losses[task] for task, w in zip("abc", info.weights, strict=True)).backward()

    reference = cases.make_model()
    z = torch.tanh(reference["last"](reference["trunk"](batch["x"])))
    terms = cases.losses_of(reference, dict.fromkeys(TASKS, z), batch)
    place_of = z if place == "z" else reference["last"].weight
    rows = torch.stack([torch.autograd.grad(terms[task], place_of, retain_graph=True)[0].flatten() for task in "abc"])
    scaled = (rows / rows.norm()).numpy()
    solution, _ = scipy.optimize.nnls(np.vstack([scaled.T, np.ones(3)]), np.append(np.zeros(rows.shape[1]), 1.0))
    expected = torch.tensor(solution / solution.sum())
    assert (expected > 0).sum() >= 2
    torch.testing.assert_close(info.weights, expected, rtol=1e-8, atol=1e-12)
    for path, leaf in reference.named_parameters():
        grads = [torch.autograd.grad(terms[task], leaf, retain_graph=True, materialize_grads=True)[0] for task in "abc"]
        factors = torch.ones(3, dtype=F64) if heads == "own" and path[0] in "ab" else expected
        total = sum(factor * grad for factor, grad in zip(factors, grads, strict=True))
        assert total.norm() > 0
        torch.testing.assert_close(model.get_parameter(path).grad, total, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("by_name", [False, True])
def test_weights_behind_the_heads_and_the_pass_that_is_measured(by_name):
    """Norms of the step's own backward pass, of a z of two leaves; a task that does not read z has none."""
    leaf = torch.randn(4, 3, dtype=F64, requires_grad=True)
    copies = gn.fork({"u": leaf.sin(), "v": leaf.cos()}, {"a": 0, "b": 0, "c": 0})
    free = torch.ones((), dtype=F64, requires_grad=True)
    terms = lambda z: {"a": z["a"]["u"].square().sum(), "b": z["b"]["u"].sum() * z["b"]["v"].sum(), "c": 2 * free}
    losses = terms(copies)
    w = torch.tensor([0.5, -2.0, 3.0], dtype=F64)
    before = gn.measure_losses(losses, copies, needs="gramian")
    gn.weigh_trunk(copies, {"c": 3.0, "b": -2.0, "a": 0.5} if by_name else w)
    sum(losses.values()).backward()
    assert free.grad == 2
    plain = terms({task: {"u": leaf.sin(), "v": leaf.cos()} for task in "abc"})
    (expected,) = torch.autograd.grad(sum(x * plain[task] for task, x in zip("abc", w, strict=True)), leaf)
    torch.testing.assert_close(leaf.grad, expected, rtol=1e-12, atol=1e-12)
    after = gn.measure_losses(losses, copies, weights=w, needs="gramian")
    torch.testing.assert_close(after.gramian, before.gramian, rtol=1e-12, atol=1e-12)
    assert before.gramian[0, 1] != 0
    with pytest.raises(ValueError, match="there are 3 copies"):
        gn.weigh_trunk(copies, w[:2])


@pytest.mark.parametrize("name", ["gradnorm-adam", "fixed-ratio", "fixed-ratio-whole", "mgda", "uncertainty", "famo"])
def test_what_a_rule_needs_is_measured_and_no_more(name):
    """Without a pass through the heads for a rule that looks at losses, whose second look has no graph."""
    model, batch, balancer = cases.make_model(), cases.make_batch(0), TABLE[name](None)
    losses, copies = model(batch)
    passes = []
    copies["c"].register_hook(lambda grad: passes.append(grad) and None)
    stats = gn.measure_losses(losses, copies, needs=balancer.needs)
    expected = gn.measure(
        dict(model.named_parameters()), cases.functional_loss(model, linear=False), batch, needs=balancer.needs
    )
    for field in ("losses", "grad_norms", "example_norms", "gramian"):
        torch.testing.assert_close(getattr(stats, field), getattr(expected, field), rtol=1e-10, atol=1e-14)
    assert len(passes) == (balancer.needs != "losses")
    state, _ = balancer.balance(balancer.init(3, dtype=F64), stats)
    if balancer.needs == "losses":
        with torch.no_grad():
            after, _ = model(batch)
        balancer.balance(state, gn.measure_losses(after, needs="losses"))


# What the engines measure, by plain autograd


@pytest.mark.parametrize("needs", ["norms", "gramian"])
@pytest.mark.parametrize("name", ["mlp", "cnn", "transformer", "embedding", "two_z"])
def test_equal_to_measure(name, needs):
    """At z, and at W among the heads' parameters, in the last shared layer, and in both."""
    case = make(name)
    places = [None, "heads", lambda path: path.startswith(("heads.a", "heads.b"))]
    places += [f"{case.last}.weight", [case.last, "heads.b"], [case.last]] if case.last else []
    for where in places:
        model = copy.deepcopy(case.model)
        losses, copies = classic(case, model)
        w = weights_of(losses)
        expected = gn.measure(
            case.params(), case.seam("within"), case.batch, weights=w, where=where, needs=needs, has_aux=case.has_aux
        )
        expected = expected[0] if case.has_aux else expected
        assert expected.grad_norms.sum() > 0
        place = {"where": {path: model.get_parameter(path) for path in case.paths(where)}} if where else {}
        before = optree.tree_map(torch.clone, (losses, copies, dict(model.named_parameters())))
        stats = gn.measure_losses(losses, **(place or {"copies": copies}), needs=needs)
        assert same_bits(before, (losses, copies, dict(model.named_parameters())))
        assert all(p.grad is None for p in model.parameters())
        for field in ("losses", "grad_norms", "square_norms", "example_norms", "gramian", "task_grads"):
            torch.testing.assert_close(
                getattr(stats, field), getattr(expected, field), rtol=1e-10, atol=1e-13, check_dtype=True
            )
        sum(w_i * losses[task] for w_i, task in zip(w, gn.task_names(losses), strict=True)).backward()
        for path, parameter in model.named_parameters():
            found = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            torch.testing.assert_close(found, expected.grads[path], rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("name", MAKERS)
def test_the_gramian(name):
    """Against inner products of a loop's gradients: before the backward pass, and after it, signs mixed."""
    case = make(name)
    losses, copies = classic(case, copy.deepcopy(case.model))
    tasks = gn.task_names(losses)
    rows = case.reference(None, at_z=True).rows
    flat = torch.stack([torch.cat([leaf.flatten() for leaf in rows[task]]) for task in tasks])
    expected = flat @ flat.T
    off = expected - torch.diag(expected.diag())
    assert off.abs().max() > 0
    w = weights_of(losses) * torch.tensor([-1.0, 1.0, 1.0, 1.0], dtype=F64)[: len(tasks)]
    before = [gn.measure_losses(losses, copies, needs="gramian", scale=scale) for scale in (1.0, 8.0)]
    (2.5 * sum(w_i * losses[task] for w_i, task in zip(w, tasks, strict=True))).backward()
    after = gn.measure_losses(losses, copies, weights=w, scale=2.5, needs="gramian")
    for stats in (*before, after):
        torch.testing.assert_close(stats.gramian, expected, rtol=1e-10, atol=1e-13)
        torch.testing.assert_close(stats.grad_norms, expected.diag().sqrt(), rtol=1e-10, atol=0)
        assert not stats.gramian.requires_grad


def test_stacked_heads():
    torch.manual_seed(1)
    trunk = nn.Linear(5, 4).double()
    heads = torch.randn(3, 4, dtype=F64, requires_grad=True)
    x, y = torch.randn(8, 5, dtype=F64), torch.randn(8, 3, dtype=F64)
    copies = gn.fork(trunk(x), 3)
    losses = torch.func.vmap(lambda w, z, t: (z @ w - t).square().mean())(heads, torch.stack(copies), y.T)
    stats = gn.measure_losses(losses, copies, needs="gramian")
    z = trunk(x).detach().requires_grad_()
    rows = torch.stack(
        [
            torch.autograd.grad((z @ u - t).square().mean(), z)[0].flatten()
            for u, t in zip(heads.detach(), y.T, strict=True)
        ]
    )
    assert rows.norm() > 0
    torch.testing.assert_close(stats.gramian, rows @ rows.T)
    torch.testing.assert_close(stats.grad_norms, rows.norm(dim=1))
    (W @ losses).backward()
    torch.testing.assert_close(trunk.bias.grad, (W @ rows).reshape(8, 4).sum(0))


# Dynamo asks a copy, which is no leaf, for its gradient, and hides the warning, but not where warnings are errors.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("how", ["compiled", "compiled heads", "checkpointed", "plain"])
def test_parts_that_torch_func_does_not_take(how):
    model, batch = cases.make_model(), cases.make_batch(0)
    trunk = nn.Sequential(model["trunk"], model["last"], nn.Tanh())
    run = {
        "compiled": lambda: torch.compile(trunk, backend="aot_eager")(batch["x"]),
        "checkpointed": lambda: checkpoint(trunk, batch["x"], use_reentrant=False),
    }.get(how, lambda: trunk(batch["x"]))
    heads = {name: model[name] for name in "ab"}
    if how == "compiled heads":
        heads = {name: torch.compile(head, backend="aot_eager") for name, head in heads.items()}
    params, loss_fn = dict(model.named_parameters()), cases.functional_loss(model, linear=False)
    expected = gn.measure(params, loss_fn, batch, weights=W)
    copies = gn.fork(run(), TASKS_DICT)
    losses = cases.losses_of(heads, copies, batch)
    torch.testing.assert_close(gn.measure_losses(losses, copies).grad_norms, expected.grad_norms, rtol=1e-12, atol=0)
    sum(w * losses[name] for name, w in zip("abc", W, strict=True)).backward()
    torch.testing.assert_close({name: p.grad for name, p in params.items()}, expected.grads)


def test_batch_norm_in_the_trunk_sees_each_batch_once():
    case = make("cnn")
    model = copy.deepcopy(case.model)
    losses, copies = classic(case, model)
    gn.measure_losses(losses, copies)
    sum(losses.values()).backward()
    found = dict(model.named_buffers())
    assert len([name for name in found if name.startswith("trunk")]) == 3
    assert same_bits(found, case.new_buffers())


def test_gradients_at_z_have_the_dtype_of_z():
    model, batch = cases.make_model().float(), {k: v.float() for k, v in cases.make_batch(0).items()}
    with torch.autocast("cpu", torch.bfloat16):
        z = torch.tanh(model["last"](model["trunk"](batch["x"])))
    one, two = gn.fork(z, 2)
    losses = [one.float().sum(), two.float().exp().sum()]
    for needs in ("norms", "gramian"):
        stats = gn.measure_losses(losses, [one, two], needs=needs)
        assert stats.grad_norms.dtype == stats.square_norms.dtype == torch.float32
    (2.0 * sum(losses)).backward()
    assert one.grad.dtype == torch.bfloat16
    assert model["last"].weight.grad.isfinite().all()
    assert model["last"].weight.grad.norm() > 0


def test_nothing_is_written_for_a_loss_that_is_not_finite():
    model, batch = cases.make_model(), cases.make_batch(0)
    for balancer, needs in ((gn.gradnorm(), "norms"), (gn.mgda(), "gramian")):
        state = balancer.init(3, dtype=F64)
        losses, copies = model(batch | {"a": batch["a"] * torch.nan})
        new, info = balancer.balance(state, gn.measure_losses(losses, copies, needs=needs))
        assert not info.finite
        assert same_bits(new, state)
        assert all(p.grad is None for p in model.parameters())


def test_a_module_dict_names_the_copies():
    heads = torch.nn.ModuleDict({"b": torch.nn.Linear(2, 1), "a": torch.nn.Linear(2, 1)})
    assert list(gn.fork(torch.ones(2, requires_grad=True), heads)) == ["b", "a"]


# ---------------------------------------------------------------------------------------------- whose copy it is


def two_tasks():
    torch.manual_seed(0)
    heads = torch.nn.ModuleDict({name: torch.nn.Linear(3, 1) for name in ("price", "kind")})
    return torch.randn(4, 3, requires_grad=True), heads


@pytest.mark.parametrize("tasks", [["price", "kind"], {"price", "kind"}, {"price": 0, "kind": 0}.keys()])
def test_names_make_copies_by_name(tasks):
    """A list of names once gave an unnamed list, in an order that was not that of the losses."""
    z, heads = two_tasks()
    copies = gn.fork(2 * z, tasks)
    losses = {name: (1.0 + 9 * (name == "price")) * head(copies[name]).sum() for name, head in heads.items()}
    norms = gn.by_name(losses, gn.measure_losses(losses, copies).grad_norms)
    for name, norm in norms.items():
        torch.testing.assert_close(norm, (1.0 + 9 * (name == "price")) * 2 * heads[name].weight.norm())


def test_a_list_of_copies_beside_losses_with_names():
    z, heads = two_tasks()
    copies = gn.fork(2 * z, 2)
    losses = {name: head(copy).sum() for copy, (name, head) in zip(copies, heads.items(), strict=True)}
    with pytest.raises(ValueError, match=r"gn\.fork\(z, losses\.keys\(\)\)"):
        gn.measure_losses(losses, copies)


@pytest.mark.parametrize("after", [False, True])
def test_a_head_that_reads_the_copy_of_another_task(after):
    """Its norm was 0, and its weight 5e11."""
    z, heads = two_tasks()
    copies = gn.fork(2 * z, heads)
    losses = {"price": heads["price"](copies["kind"]).sum(), "kind": heads["kind"](copies["kind"]).sum()}
    weights = torch.ones(2) if after else None
    if after:
        gn.weighted_sum(losses, weights).backward()
    with pytest.raises(ValueError, match=r"losses\['price'\] does not read its own copy of z, but that of 'kind'"):
        gn.measure_losses(losses, copies, weights=weights)


def test_a_loss_that_reads_no_copy_has_the_norm_0():
    z, heads = two_tasks()
    copies = gn.fork(2 * z, heads)
    losses = {"price": heads["price"].weight.square().sum(), "kind": heads["kind"](copies["kind"]).sum()}
    norms = gn.by_name(losses, gn.measure_losses(losses, copies).grad_norms)
    assert norms["price"] == 0
    assert norms["kind"] > 0


@pytest.mark.parametrize("name", ["gradnorm", "fixed_ratio", "geometric", "upgrad"])
def test_an_absent_task_trains_nothing(name):
    """Its head got a gradient of 12397 from labels that were no labels."""
    z, heads = two_tasks()
    balancer = getattr(gn, name)()
    copies = gn.fork(2 * z, heads)
    losses = {name: (head(copies[name]) - 1e4 * (name == "price")).square().mean() for name, head in heads.items()}
    mask = {"price": False, "kind": True}
    stats = gn.measure_losses(losses, copies, needs=balancer.needs)
    _, info = balancer.balance(balancer.init(heads), stats, mask=mask)
    if name == "upgrad":
        gn.weigh_trunk(copies, info.weights)
        gn.weighted_sum(losses, mask).backward()
    else:
        gn.weighted_sum(losses, info.weights).backward()
    assert not heads["price"].weight.grad.any()
    assert heads["kind"].weight.grad.any()
    at_z = z.detach().requires_grad_()
    (alone,) = torch.autograd.grad(heads["kind"](2 * at_z).square().mean(), at_z)
    assert alone.norm() > 0
    torch.testing.assert_close(z.grad, info.weights[0] * alone)
