"""Data parallelism: on whatever ranks, the step is that of one process on the whole batch. Spawned gloo processes."""

import functools
import os
import signal

import pytest
import resumable
import torch
import torch._dynamo.utils
import torch.distributed as dist
from scale_cases import (
    CASES,
    DEFAULT,
    F64,
    PLACES,
    PROCESSES,
    ROTATIONS,
    STEPS,
    assert_same_run,
    batch_of,
    launch,
    loss_of,
    same_on_all_ranks,
    spawn,
    train,
)
from toys import BALANCERS, leaves, make_batch, make_params

import gradnorm_func as gn

# Examples of each rank: far from equal.
SIZES = {1: [64], 2: [24, 40], 4: [8, 24, 11, 21]}


def compare_runs(rank, world, cases, counts):
    """Rank 0 knows the whole batch too, and compares."""
    for name, place, steps in cases:
        expected = train(name, place, steps) if rank == 0 else None
        for count in counts:
            found = train(name, place, steps, rank, SIZES[world], micro_batches=count, reduce=gn.all_reduce)
            what = f"{name} at {place}, {world} ranks, {count} micro-batches"
            assert same_on_all_ranks([leaf for row in found for leaf in row]), what
            if expected is not None:
                assert_same_run(found, expected, what)


def test_two_ranks(tmp_path):
    spawn(compare_runs, 2, tmp_path, DEFAULT, [None])


def test_two_ranks_with_micro_batches(tmp_path):
    cases = [(name, place, 6) for name in ("gradnorm-adam", "fixed-ratio", "user") for place in PLACES]
    spawn(compare_runs, 2, tmp_path, cases, [2, 3])


def test_two_ranks_that_rotate(tmp_path):
    spawn(compare_runs, 2, tmp_path, [(name, "z", 8) for name in ROTATIONS], [None, 3])


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2, 4])
def test_all_rotations(tmp_path, world):
    spawn(compare_runs, world, tmp_path, [(name, "z", STEPS) for name in ROTATIONS], [1, 2, 3, 8], limit=900)


@pytest.mark.slow
@pytest.mark.parametrize("name", BALANCERS)
@pytest.mark.parametrize("world", [1, 2, 4])
def test_all_runs(tmp_path, world, name):
    cases = [(name, place, STEPS) for place in PLACES if (name, place) in CASES]
    spawn(compare_runs, world, tmp_path, cases, [1, 2, 3, 8], limit=3000, seconds=1200)


# ---------------------------------------------------------------------------------------------- what travels


def local_stats(rank, place="all", **keywords):
    loss_fn, where = loss_of(place)
    batch = batch_of(place, 0, rank, SIZES[2])
    weights = torch.tensor([0.5, 1.0, 2.0], dtype=F64)
    keywords = {"weights": weights, "num_examples": float(SIZES[2][rank])} | keywords
    return gn.measure(make_params(), loss_fn, batch, where=where, **keywords)


def counted(run):
    """Its result, and the sizes of the collectives that it called."""
    sizes, plain = [], dist.all_reduce
    dist.all_reduce = lambda tensor, *args, **kw: (sizes.append(tensor.numel()), plain(tensor, *args, **kw))[1]
    try:
        return run(), sizes
    finally:
        dist.all_reduce = plain


def check_traffic(rank, world):
    numbers = sum(leaf.numel() for leaf in make_params().values())
    for place, of_w in (("z", None), ("linear", 36), ("all", numbers)):
        mine = local_stats(rank, place)
        expected = gn.merge(*(local_stats(r, place) for r in range(world)))
        found, sizes = counted(lambda mine=mine: gn.all_reduce(mine))
        assert sizes == [1 + 3 * 3 + numbers if of_w is None else 1 + 3 + 3 * of_w + numbers]
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
        # Gradients that another one reduces.
        found, sizes = counted(lambda mine=mine: gn.all_reduce(mine._replace(grads=())))
        assert sizes == [1 + 3 * 3 if of_w is None else 1 + 3 + 3 * of_w]
        torch.testing.assert_close(found, expected._replace(grads=()), rtol=1e-12, atol=1e-14)

        cheap, sizes = counted(lambda mine=mine: gn.all_reduce(mine, squared_norms=True))
        assert sizes == [1 + (3 if of_w is None else 2) * 3 + numbers]
        if of_w is None:
            torch.testing.assert_close(cheap.grad_norms, expected.grad_norms)
            continue
        assert cheap.task_grads == ()
        # The variance between ranks is what it is too large by.
        parts, shares = [local_stats(r, place) for r in range(world)], [size / 64 for size in SIZES[2]]
        squares = lambda tree: sum(leaf.flatten(1).square().sum(1) for leaf in leaves(tree))
        gap = [{k: part.task_grads[k] - expected.task_grads[k] for k in part.task_grads} for part in parts]
        variance = sum(share * squares(g) for share, g in zip(shares, gap, strict=True))
        assert float(variance.min()) > 0
        torch.testing.assert_close(cheap.grad_norms.square(), expected.grad_norms.square() + variance)
        only = gn.all_reduce(local_stats(rank, place, norms_only=True), squared_norms=True)
        torch.testing.assert_close(only.grad_norms, cheap.grad_norms)
        with pytest.raises(ValueError, match=r"norms_only=False, or say squared_norms=True"):
            gn.all_reduce(local_stats(rank, place, norms_only=True))


def check_half_precision(rank, world):
    """256 + 1 is 256 in bfloat16."""
    mine = gn.TaskStats(torch.ones(2), grads={"w": torch.tensor([256.0, 1.0][rank], dtype=torch.bfloat16)})
    assert float(gn.all_reduce(mine).grads["w"]) == 128.5


def check_group(rank, world):
    """A group of one's own, and a step of its members alone."""
    groups = [dist.new_group([r]) for r in range(world)]
    alone = functools.partial(gn.all_reduce, group=groups[rank])
    found = train("gradnorm-adam", "linear", 3, rank, SIZES[world], reduce=alone)
    assert_same_run(found, train("gradnorm-adam", "linear", 3, rank, SIZES[world]), "its own group")
    assert not same_on_all_ranks(found[-1])


def check_nan(rank, world):
    """NaN in one rank's batch: all ranks refuse the step, and leave the state as it was."""
    for name, place in [(n, p) for n in BALANCERS if n != "user" for p in ("z", "linear", "all")]:
        loss_fn, where = loss_of(place)
        method, params = BALANCERS[name](where), make_params()
        state = method.init(3, dtype=F64)
        for step in range(2):
            x, y = batch_of(place, step, rank, SIZES[world])
            if step == 1 and rank == 1:
                y = y.clone()
                y[0, 2] = torch.nan
            old = state
            _, state, info = method.grad(old, params, loss_fn, (x, y), reduce=gn.all_reduce)
            assert same_on_all_ranks(leaves(state, info))
            assert bool(info.finite) == (step == 0)
        assert all(torch.equal(a, b) for a, b in zip(leaves(state), leaves(old), strict=True))


def check_compiled(rank, world, cases):
    for name, place, count in cases:
        loss_fn, where = loss_of(place)
        method, params = BALANCERS[name](where), make_params()
        state, before = method.init(3, dtype=F64), torch._dynamo.utils.counters["stats"]["unique_graphs"]
        bound = functools.partial(method.grad, micro_batches=count, reduce=gn.all_reduce)
        step = torch.compile(bound, fullgraph=True, backend="aot_eager")
        for t in range(3):
            # One length on both ranks: a compiled step specialises on it.
            batch = tuple(x.chunk(world)[rank] for x in make_batch(t, size=16))
            expected = bound(state, params, loss_fn, batch)
            grads, state, info = step(state, params, loss_fn, batch)
            torch.testing.assert_close((grads, state, info), tuple(expected), rtol=1e-10, atol=1e-12)
            assert same_on_all_ranks(leaves(grads, state))
            params = {path: leaf - 0.02 * grads[path] for path, leaf in params.items()}
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - before == 1
        torch._dynamo.reset()


def several(rank, world, checks):
    for check in checks:
        check(rank, world)


def test_traffic_groups_and_nan(tmp_path):
    spawn(several, 2, tmp_path, [check_traffic, check_half_precision, check_group, check_nan])


def test_compiled_step_holds_the_collective(tmp_path):
    spawn(check_compiled, 2, tmp_path, [("gradnorm-adam", "linear", None)])


@pytest.mark.slow
def test_compiled_steps_hold_the_collective(tmp_path):
    cases = [("gradnorm-adam", "z", 2), ("fixed-ratio", "all", None), ("gradnorm-adam", "generic", 3)]
    spawn(check_compiled, 2, tmp_path, cases, limit=900, seconds=600)


def test_without_a_process_group():
    with pytest.raises(RuntimeError, match="init_process_group"):
        gn.all_reduce(gn.TaskStats(torch.ones(2), torch.ones(2)))


# ---------------------------------------------------------------------------------------------- dying


def die(rank, world):
    for step in range(100):
        if rank == 1 and step == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        train("gradnorm-adam", "z", 1, rank, SIZES[2], reduce=gn.all_reduce)


def test_a_rank_that_dies_ends_the_others(tmp_path):
    ended = launch(die, 2, tmp_path, seconds=15, limit=90)
    assert ended[1][0] == -signal.SIGKILL
    assert ended[0][0] == 1
    assert "all_reduce" in ended[0][1]


def run_to(folder, fraction=None):
    """Its exit code."""
    process = PROCESSES.Process(target=resumable.main, args=(folder, fraction), daemon=True)
    process.start()
    process.join(120)
    assert process.exitcode is not None, "it hangs"
    return process.exitcode


def end_of(folder, kills):
    for at in kills:
        assert run_to(folder, at) == -signal.SIGKILL
    assert run_to(folder) == 0
    return torch.load(folder / "end.pt", weights_only=True)


def check_kills(tmp_path, runs):
    (tmp_path / "straight").mkdir()
    expected = end_of(tmp_path / "straight", [])
    assert float((expected["state"]["weights"] - 1).abs().max()) > 0.01
    for i, kills in enumerate(runs):
        (tmp_path / str(i)).mkdir()
        found = end_of(tmp_path / str(i), kills)
        for key in expected:
            assert found[key].keys() == expected[key].keys()
            assert all(torch.equal(found[key][name], leaf) for name, leaf in expected[key].items()), (key, kills)


def random_kills(count):
    draw = torch.Generator().manual_seed(0)
    return torch.rand(count, generator=draw, dtype=F64).tolist()


def test_killed_and_resumed(tmp_path):
    check_kills(tmp_path, [random_kills(3)])


@pytest.mark.slow
def test_killed_at_a_hundred_points(tmp_path):
    draws = random_kills(100)
    check_kills(tmp_path, [draws[i : i + 4] for i in range(0, 100, 4)])
