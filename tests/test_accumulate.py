"""Gradient accumulation: whatever the micro-batches, the step is that of the whole batch."""

import functools
import weakref

import pytest
import torch
import torch._dynamo.utils
from scale_cases import CASES, DEFAULT, F64, PLACES, ROTATIONS, STEPS, assert_same_run, batch_of, loss_of, train
from toys import BALANCERS, leaves, make_batch, make_params, make_problem

import gradnorm_func as gn


@functools.lru_cache
def whole(name, place, steps):
    return train(name, place, steps)


@pytest.mark.parametrize(("name", "place", "steps"), [*DEFAULT, *((name, "z", 8) for name in ROTATIONS)])
def test_runs_in_micro_batches(name, place, steps):
    assert_same_run(train(name, place, steps, micro_batches=3), whole(name, place, steps), "3 micro-batches")


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2, 3, 8])
@pytest.mark.parametrize(("name", "place"), CASES)
def test_all_runs_in_micro_batches(name, place, count):
    assert_same_run(train(name, place, STEPS, micro_batches=count), whole(name, place, STEPS), f"{count} parts")


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("count", [1, 2, 8])
def test_any_number_of_micro_batches(place, count):
    for name in ("gradnorm-adam", "fixed-ratio"):
        assert_same_run(train(name, place, 3, micro_batches=count), whole(name, place, 3), f"{count} parts")


# ---------------------------------------------------------------------------------------------- streaming


@pytest.mark.parametrize("place", ["z", "linear", "generic", "all"])
def test_merge_streams(place):
    """A generator of unequal micro-batches; of all the stats before, only the running one is alive."""
    loss_fn, where = loss_of(place)
    params, weights, seen = make_params(), torch.tensor([0.5, 1.0, 2.0], dtype=F64), []
    batch, sizes = make_batch(size=31), [1, 7, 2, 16, 5]

    def measured(most=1):
        for x, y in zip(*(leaf.split(sizes) for leaf in batch), strict=True):
            stats = gn.measure(params, loss_fn, (x, y), weights=weights, where=where, num_examples=len(x))
            seen.append(weakref.ref(stats.losses))
            yield stats
            del stats
            assert sum(ref() is not None for ref in seen) < most

    running = None
    for stats in measured():
        running = gn.merge(running, stats)
        del stats
    expected = gn.measure(
        params, loss_fn, batch, weights=weights, where=where, num_examples=torch.tensor(31.0, dtype=F64)
    )
    assert len(seen) == len(sizes)
    assert float(expected.grad_norms.min()) > 0
    torch.testing.assert_close(running, expected, rtol=1e-12, atol=1e-14)
    # functools.reduce begins with the first itself, and holds on to the last.
    torch.testing.assert_close(functools.reduce(gn.merge, measured(3)), expected, rtol=1e-12, atol=1e-14)
    parts = measured_list(params, loss_fn, batch, weights, where)
    torch.testing.assert_close(gn.merge(None, *parts), expected, rtol=1e-12, atol=1e-14)


def measured_list(params, loss_fn, batch, weights, where):
    parts = zip(*(leaf.split(4) for leaf in batch), strict=True)
    return [
        gn.measure(params, loss_fn, part, weights=weights, where=where, num_examples=len(part[0])) for part in parts
    ]


def test_merge_keeps_what_is_not_a_number():
    """A task gradient that is NaN must not come out as a norm of 0."""
    bad = torch.tensor([[1.0, torch.nan], [1.0, 2.0]])
    merged = gn.merge(gn.TaskStats(torch.ones(2), task_grads=bad), gn.TaskStats(torch.ones(2), task_grads=bad))
    assert merged.grad_norms.isnan().tolist() == [True, False]


def test_merge_refuses_nothing_and_norms_in_a_dict():
    with pytest.raises(ValueError, match="at least one"):
        gn.merge(None)
    stats = gn.TaskStats({"a": 1.0, "b": 2.0}, {"a": 1.0, "b": 1.0})
    with pytest.raises(ValueError, match="norms_only=False"):
        gn.merge(stats, stats)


def test_half_precision_is_summed_in_float32():
    """256 + 1 is 256 in bfloat16: the ones would all be lost."""
    parts = [torch.tensor([256.0], dtype=torch.bfloat16)] + [torch.tensor([1.0], dtype=torch.bfloat16)] * 255
    running = None
    for part in parts:
        running = gn.merge(running, gn.TaskStats(torch.ones(2), grads={"w": part}))
    assert running.grads["w"].dtype == torch.float32
    torch.testing.assert_close(running.grads["w"], torch.tensor([511 / 256]), rtol=1e-5, atol=0)
    params = {path: leaf.to(torch.bfloat16) for path, leaf in make_params().items()}
    batch = make_batch(dtype=torch.bfloat16)
    for place in ("z", "linear", "all"):
        loss_fn, where = loss_of(place)
        method = gn.gradnorm(where=where)
        grads, _, _ = method.grad(method.init(3), params, loss_fn, batch, micro_batches=4)
        assert {leaf.dtype for leaf in grads.values()} == {torch.bfloat16}


# ---------------------------------------------------------------------------------------------- the keyword


@pytest.mark.parametrize("place", ["z", "linear", "all"])
@pytest.mark.parametrize("name", ["gradnorm-adam", "fixed-ratio"])
def test_update_mask_and_frozen_weights(name, place):
    loss_fn, where = loss_of(place)
    method, params, batch = BALANCERS[name](where), make_params(), make_batch(size=11)
    state = method.init(3, dtype=F64)
    for keywords in (
        {},
        {"mask": [True, False, True]},
        {"update": False},
        {"update": torch.tensor(False)},
        {"update": torch.tensor(True)},
    ):
        expected = method.grad(state, params, loss_fn, batch, **keywords)
        found = method.grad(state, params, loss_fn, batch, micro_batches=4, **keywords)
        for a, b in zip(leaves(found), leaves(expected), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12, equal_nan=True)
        updated = method.update(state, params, loss_fn, batch, micro_batches=4, **keywords)
        torch.testing.assert_close(updated, found[1], rtol=1e-10, atol=1e-12, equal_nan=True)


def test_the_functions_take_it_too():
    problem, state = make_problem(), gn.init_state(3, dtype=F64)
    args = (state, problem.params, problem.seam, problem.batch)
    seen = []
    keywords = {"where": problem.where, "micro_batches": 3, "reduce": lambda stats: seen.append(stats) or stats}
    grads, new, _ = gn.gradnorm_grad(*args, **keywords)
    expected = gn.gradnorm_grad(*args, where=problem.where)
    torch.testing.assert_close(grads, expected[0], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(new, expected[1], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(gn.gradnorm_update(*args, **keywords), new, rtol=1e-10, atol=1e-12)
    # The losses of tasks that are seen for the first time; then their gradients; and then `gradnorm_update`.
    assert [float(stats.num_examples) for stats in seen] == [8.0, 8.0, 8.0]
    with pytest.raises(ValueError, match="reduce returned NoneType"):
        gn.gradnorm_grad(*args, reduce=lambda stats: None)


@pytest.mark.parametrize("name", ["gradnorm-adam", "fixed-ratio", "static"])
def test_aux_comes_as_a_list(name):
    def loss_fn(params, batch):
        losses = (params["w"] * batch["x"]).square().mean(0)
        return losses, {"mean": batch["x"].mean(0), "note": batch["note"]}

    method, params = BALANCERS[name](None), {"w": torch.ones(3, dtype=F64)}
    batch = {"x": torch.randn(5, 3, dtype=F64), "note": "whole", "scalar": torch.tensor(2.0)}
    state = method.init(3, dtype=F64)
    grads, _, _, aux = method.grad(state, params, loss_fn, batch, micro_batches=2, has_aux=True)
    assert [part["note"] for part in aux] == ["whole", "whole"]
    torch.testing.assert_close(
        torch.stack([part["mean"] for part in aux]), torch.stack([batch["x"][:3].mean(0), batch["x"][3:].mean(0)])
    )
    expected, _, _, one = method.grad(state, params, loss_fn, batch, has_aux=True)
    assert one["note"] == "whole"
    torch.testing.assert_close(grads, expected)
    _, aux = method.update(state, params, loss_fn, batch, micro_batches=2, has_aux=True)
    assert len(aux) == 2
    _, aux = method.update(state, params, loss_fn, batch, reduce=lambda stats: stats, has_aux=True)
    assert aux["note"] == "whole"


def test_rotations_give_aux_and_one_graph():
    loss_fn, _ = loss_of("z")
    heads = {
        name: lambda p, z, b, head=head: (head(p, z, b), z.sum())
        for name, head in zip(gn.task_names(loss_fn.heads), loss_fn.functions, strict=True)
    }
    noisy = gn.multi_task_loss(lambda p, b: (loss_fn.backbone(p, b), len(b[0])), heads, has_aux=True)
    method, params, batch = gn.rotograd(6), make_params(), batch_of("z", 0)
    state = method.init(3, dtype=F64)
    grads, new, info, aux = method.grad(state, params, noisy, batch, micro_batches=3, has_aux=True)
    assert [shared for shared, _ in aux] == [22, 21, 21]
    step = torch.compile(method.grad, fullgraph=True, backend="aot_eager")
    compiled = step(state, params, noisy, batch, micro_batches=3, has_aux=True)
    torch.testing.assert_close(compiled[:3], (grads, new, info), equal_nan=True)
    alone, other = method.update(state, params, noisy, batch, micro_batches=3, has_aux=True)
    torch.testing.assert_close(alone, new, equal_nan=True)
    assert len(other) == 3


@pytest.mark.parametrize("micro_batches", [0, -1, 2.0, True, "2"])
def test_a_number_that_is_none(micro_batches):
    problem = make_problem()
    with pytest.raises(ValueError, match=r"micro_batches=.* must be an integer"):
        gn.gradnorm_grad(gn.init_state(3), problem.params, problem.general, problem.batch, micro_batches=micro_batches)


def test_batches_that_cannot_be_cut():
    problem, state = make_problem(), gn.init_state(3, dtype=F64)
    run = functools.partial(gn.gradnorm_grad, state, problem.params)
    with pytest.raises(ValueError, match=r"micro_batches=9, but a tensor of the batch has 8 entries"):
        run(problem.general, problem.batch, micro_batches=9)
    with pytest.raises(ValueError, match="no tensor with a first axis"):
        run(problem.general, {"x": torch.tensor(1.0), "names": "abc"}, micro_batches=2)
    points = batch_of("points", 0)
    with pytest.raises(ValueError, match=r"micro_batches=5 must divide every length .* \[96, 192\]"):
        run(loss_of("points")[0], points, micro_batches=5)
    gn.gradnorm_grad(gn.init_state(3, dtype=F64), make_params(), loss_of("points")[0], points, micro_batches=4)


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("gradnorm-adam", "z"),
        pytest.param("gradnorm-adam", "linear", marks=pytest.mark.slow),
        pytest.param("fixed-ratio", "z", marks=pytest.mark.slow),
        pytest.param("fixed-ratio", "linear", marks=pytest.mark.slow),
    ],
)
def test_compiled_it_is_one_graph(name, place):
    loss_fn, where = loss_of(place)
    method = BALANCERS[name](where)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    step = torch.compile(functools.partial(method.grad, micro_batches=2), fullgraph=True, backend="aot_eager")
    params, state = make_params(), method.init(3, dtype=F64)
    for t in range(3):
        batch = make_batch(t)
        expected = method.grad(state, params, loss_fn, batch)
        grads, state, _ = step(state, params, loss_fn, batch)
        torch.testing.assert_close((grads, state), expected[:2], rtol=1e-10, atol=1e-12)
        params = {path: leaf - 0.02 * grads[path] for path, leaf in params.items()}
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - before == 1
