"""sweep: what may differ from run to run, and what a second sweep costs."""

import functools
import math

import pytest
import torch
from test_sweep import assert_same, batches, eager, one_run, problem_of, quiet
from torch._dynamo.testing import CompileCounterWithBackend
from toys import leaves, make_batch, same_bits

import gradnorm_func as gn
from gradnorm_func._core import compiling

F64 = torch.float64
ADAM = functools.partial(torch.optim.Adam, lr=1e-3)


def scaled(loss_fn, scale):
    """The first loss in another unit."""

    def loss(params, batch):
        losses = loss_fn(params, batch)
        return losses | {"t0": scale * losses["t0"]}

    return loss


def test_losses_and_metrics_that_differ_by_run():
    params, loss_fn = problem_of("general", F64)
    result = eager(
        params,
        lambda scale: scaled(loss_fn, scale),
        batches(),
        grid={"scale": [1.0, 100.0], "power": [1, 2]},
        seeds=(3, 5),
        balancer=gn.gradnorm(alpha=0.5),
        metric=lambda scale, power: lambda p: {"a": scale * p["trunk.0"].sum() ** power, "b": p["trunk.0"][0, 0]},
        metric_every=2,
    )
    assert result.runs["power"].dtype == torch.int64
    for r, (scale, power, seed) in enumerate((s, p, seed) for s in (1.0, 100.0) for p in (1, 2) for seed in (3, 5)):
        expected = one_run(params(seed), scaled(loss_fn, scale), batches(), gn.gradnorm(alpha=0.5), ADAM)
        assert_same(result.run(r), expected, F64)
        torch.testing.assert_close(result.metric["a"][r], scale * expected[0]["trunk.0"].sum() ** power)
    assert not torch.equal(result.metric["a"][:4], result.metric["a"][4:])
    for name, rows in result.metric_history.items():
        assert rows.shape == (8, 3)
        assert torch.equal(rows[:, -1], result.metric[name])
        assert not torch.equal(rows[:, 0], rows[:, 1])
    with pytest.raises(ValueError, match="metric is several numbers"):
        _ = result.best


def data(seed):
    """Order and data of a seed; what is no tensor is the same."""
    return [(*make_batch(10 * seed + t), "the same") for t in range(4)]


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_batches_and_seeds_of_their_own(chunk_size):
    params, loss_fn = problem_of("seam", F64)
    rows = [{"rate": 1e-2, "seed": 4}, {"rate": 1e-3, "seed": 2}, {"rate": 1e-2, "seed": 2}]
    result = eager(
        params,
        lambda p, batch: loss_fn(p, batch[:2]),
        data,
        grid=rows,
        balancer=gn.static(),
        optimizer=lambda rate: gn.sgd(rate),
        chunk_size=chunk_size,
    )
    assert result.runs["seed"].tolist() == [4, 2, 2]
    for r, row in enumerate(rows):
        sgd = functools.partial(torch.optim.SGD, lr=row["rate"])
        seen = [batch[:2] for batch in data(row["seed"])]
        assert_same(result.run(r), one_run(params(row["seed"]), loss_fn, seen, gn.static(), sgd), F64)


def test_adamw_with_a_schedule_and_without_decay_of_biases():
    params, loss_fn = problem_of("seam", F64)
    many = batches() * 5
    cosine = lambda t: 0.5 * (1 + torch.cos(math.pi * t.double() / len(many)))
    result = eager(
        params,
        loss_fn,
        many,
        grid={"lr": [1e-2, 1e-1], "decay": [0.0, 0.3]},
        balancer=gn.static(),
        optimizer=lambda lr, decay, path: gn.adam(
            lambda t: lr * cosine(t), weight_decay=decay * (not path.endswith("bias"))
        ),
    )
    for r, (lr, decay) in enumerate([(1e-2, 0.0), (1e-2, 0.3), (1e-1, 0.0), (1e-1, 0.3)]):
        current = {name: leaf.clone() for name, leaf in params(0).items()}
        groups = [
            {"params": [leaf], "weight_decay": 0.0 if "bias" in name else decay} for name, leaf in current.items()
        ]
        stepper = torch.optim.AdamW(groups, lr=lr)
        schedule = torch.optim.lr_scheduler.LambdaLR(stepper, lambda t: 0.5 * (1 + math.cos(math.pi * t / len(many))))
        for batch in many:
            losses = loss_fn({name: leaf.requires_grad_() for name, leaf in current.items()}, batch)
            stepper.zero_grad()
            sum(losses.values()).backward()
            stepper.step()
            schedule.step()
        assert_same(result.run(r)[0], [current], F64)
    assert float((result.params["trunk.0"][0] - result.params["trunk.0"][1]).abs().max()) > 1e-3, "it decays"
    with pytest.raises(ValueError, match=r"optimizer takes 'paths', which grid does not have; it has \['path'\]"):
        eager(params, loss_fn, many[:1], optimizer=lambda paths: gn.adam(0.1))


def test_vectors_and_booleans():
    """Static weights found elsewhere, and a term that is there or not."""
    params, loss_fn = problem_of("general", F64)
    history = eager(params, loss_fn, batches(), seeds=(0, 1)).history
    weights = gn.mean_weights(history)
    torch.testing.assert_close(weights, history.weights.mean(1))
    result = eager(
        params,
        lambda twice: lambda p, b: {name: torch.where(twice, 2, 1) * loss for name, loss in loss_fn(p, b).items()},
        batches(),
        grid=[{"w": weights[0], "twice": True}, {"w": [1.0, 0.1, 3.0], "twice": False}],
        balancer=lambda w: gn.static(w),
    )
    assert result.runs["w"].shape == (2, 3)
    assert result.runs["twice"].tolist() == [True, False]
    for r, w in enumerate([2 * weights[0], [1.0, 0.1, 3.0]]):
        expected = one_run(params(0), loss_fn, batches(), gn.static(w), ADAM)[0]
        assert_same(result.run(r)[0], [expected], F64)


def test_a_vector_of_numbers_does_not_widen_the_losses():
    params, loss_fn = problem_of("general", torch.float32)
    result = eager(
        params,
        lambda scale: lambda p, b: [x * s for x, s in zip(loss_fn(p, b).values(), scale, strict=True)],
        batches(torch.float32),
        grid={"scale": [[1.0, 0.1, 3.0]]},
    )
    assert {result.state.weights.dtype, result.history.losses.dtype, result.runs["scale"].dtype} == {torch.float32}


def test_compiled_with_all_that_may_differ(monkeypatch):
    """A loss with a seam, made within the graph; batches by seed; an optimizer by path."""
    params, seam = problem_of("seam", F64)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))

    def loss_fn(scale):
        heads = {name: lambda p, z, b, head=head: scale * head(p, z, b) for name, head in seam.heads.items()}
        return gn.multi_task_loss(seam.backbone, heads, last_shared=seam.last_shared)

    run = functools.partial(
        quiet,
        params,
        loss_fn,
        lambda seed: [make_batch(10 * seed + t) for t in range(3)],
        grid={"scale": [1.0, 10.0]},
        seeds=(0, 1),
        optimizer=lambda path: gn.adam(1e-2, weight_decay=0.1 if "head" in path else 0.0),
        metric=lambda scale: lambda p: scale * p["head.0"].sum(),
    )
    assert_same(run(), [run(compile=False)], F64)


@pytest.mark.filterwarnings("ignore:no loss depends on the parameters")
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize(
    "given",
    [
        {"balancer": lambda flag: gn.gradnorm(form="log" if flag else "paper")},
        {"loss_fn": lambda flag: lambda p, b: [p["trunk.0"].sum() if flag else p["trunk.1.bias"].sum()] * 2},
    ],
)
def test_what_would_be_two_programs_is_refused(given, compile, monkeypatch):
    params, loss_fn = problem_of("general", F64)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    call = {"loss_fn": loss_fn, "batches": batches(), "grid": {"flag": [True, False]}, **given}
    with pytest.raises(ValueError, match=r"hyperparameter of \['flag'\].* condition of an `if`.*call sweep once"):
        quiet(params, compile=compile, **call)


# ------------------------------------------------------------------------------------------------ compiled once


@pytest.fixture
def graphs(monkeypatch):
    """Counts compilations, from none on."""
    counter = CompileCounterWithBackend("eager")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
    monkeypatch.setattr(compiling, "_programs", type(compiling._programs)())
    return lambda: counter.frame_count


factor = 1.0  # a global that a loss reads


def test_a_second_sweep_compiles_nothing(graphs):
    params, loss_fn = problem_of("seam", F64)

    def run(power=1, count=2, size=8, **options):
        return gn.sweep(
            params,
            lambda scale: lambda p, b: {name: factor * scale * x**power for name, x in loss_fn(p, b).items()},
            [make_batch(0, size=size)] * 2,
            grid={"alpha": [0.5] * count, "scale": [3.0]},
            balancer=lambda alpha: gn.gradnorm(alpha=alpha, optimizer=gn.adam(0.1)),
            progress=False,
            **options,
        )

    first = run()
    assert graphs() == 1
    assert same_bits(first, run())
    assert graphs() == 1, "the same lambdas, made anew"
    other = run(power=2)
    assert graphs() == 2, "another number that a loss closes over"
    assert_same(other, [run(power=2, compile=False)], F64)
    run(count=3)
    run(size=5)
    run()
    assert graphs() == 4, "other shapes are other programs"


def test_a_global_is_seen(graphs, monkeypatch):
    """No key knows it, but Dynamo does; and its limit of programs of one code object does not end the session."""
    loss_fn = lambda w, x: {"a": factor * (w * x).sum(), "b": w.square().sum()}
    with torch._dynamo.config.patch(recompile_limit=2):
        for k in range(5):
            monkeypatch.setitem(globals(), "factor", 1.0 + k)
            found = [
                quiet(torch.ones(3), loss_fn, [torch.ones(3)], balancer=gn.static(), compile=c).history.losses
                for c in (True, False)
            ]
            assert torch.equal(*found)
    assert graphs() == 5


def test_a_second_training_compiles_nothing(graphs):
    params, loss_fn = problem_of("seam", F64)
    balancer = lambda: gn.gradnorm(alpha=0.5)
    run = lambda: gn.train(params(0), loss_fn, batches(), balancer=balancer(), compile=True, progress=False)
    first = run()
    assert graphs() == 1
    assert same_bits(first[:3], run()[:3])
    assert graphs() == 1
    gn.train(params(0), loss_fn, batches(), balancer=gn.gradnorm(alpha=0.7), compile=True, progress=False)
    assert graphs() == 2


def test_only_some_programs_are_kept(graphs, monkeypatch):
    monkeypatch.setattr(compiling, "KEPT", 2)
    for k in range(compiling.KEPT + 2):
        loss_fn = lambda w, x, k=k: [(k + w * x).sum(), w.sum()]
        quiet(torch.ones(3), loss_fn, [torch.ones(3)], balancer=gn.static())
    assert len(compiling._programs) == compiling.KEPT
    assert graphs() == compiling.KEPT + 2
    assert leaves(quiet(torch.ones(3), loss_fn, [torch.ones(3)], balancer=gn.static()).params)
    assert graphs() == compiling.KEPT + 2
