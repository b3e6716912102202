"""What the tests of accumulation and data parallelism share: training runs on parts, and processes to run them in."""

import datetime
import multiprocessing
import os
import sys
import time
import traceback

import torch
import torch.distributed as dist
from toys import BALANCERS, GRAMIAN, leaves, make_batch, make_params, make_problem

import gradnorm_func as gn

F64 = torch.float64
STEPS = 50
EXAMPLES = 64
# place -> (which form of the loss, where)
PLACES = {
    "z": ("seam", None),
    "linear": ("seam", "trunk.1.weight"),
    "generic": ("seam", ["trunk.0", "head.1"]),
    "all": ("general", None),
    "points": ("points", None),
}
# The two that show different things are run everywhere and long, the others once each and short.
# A rule that looks at no gradients has no W, and its residuals are those of the heads. The Gramian merges in one way at
# z, and in another at parameters.
ONLY = {"ntk": ["z"]} | {name: ["z", "all"] for name in GRAMIAN[1:]}
CASES = [(name, place) for name in BALANCERS for place in ONLY.get(name, PLACES)]
DEFAULT = [(name, place, STEPS if name == "gradnorm-adam" else 8) for name, place in CASES]
ROTATIONS = {
    "rotograd": {},
    "rotograd-none": {"scale": "none", "normalize": True, "moving": False, "map": "exp"},
    "rotogradnorm-0.1.6": {"scale": "gradnorm", "form": "0.1.6", "alpha": 0.5, "normalize": True, "burn_in": 3},
    "rotograd-cooperative": {"scale": "none", "form": "0.1.2", "cooperative": 2},
    "rotograd-every-2": {"every": 2, "burn_in": 3},
}


def on_points():
    """Three losses on points of their own, of two lengths: nothing is shared but the parameters."""

    def u(params, x):
        h = torch.tanh(x @ params["trunk.0"].T)
        return torch.tanh(h @ params["trunk.1.weight"].T + params["trunk.1.bias"])

    return gn.multi_task_loss(
        None,
        {
            "inside": lambda p, b: 3 * (u(p, b["inside"]) @ p["head.0"] - 1).square().mean(),
            "border": lambda p, b: (u(p, b["border"]) @ p["head.1"] + b["shift"]).square().mean(),
            "start": lambda p, b: (u(p, b["border"]) @ p["head.2"]).exp().mean(),
        },
    )


def loss_of(place):
    form, where = PLACES[place]
    return (on_points() if form == "points" else getattr(make_problem(), form)), where


def batch_of(place, step, rank=0, sizes=None):
    """Rank's part of the batch of a step; without sizes, the whole."""
    if place == "points":
        points = make_batch(step, size=288)[0]
        batch = {"inside": points[:96], "border": points[96:], "shift": torch.tensor(0.3, dtype=F64), "note": "whole"}
        if sizes is None:
            return batch
        return {k: v.chunk(len(sizes))[rank] if torch.is_tensor(v) and v.ndim else v for k, v in batch.items()}
    batch = make_batch(step, size=EXAMPLES)
    return batch if sizes is None else tuple(x.split(sizes)[rank] for x in batch)


def train(name, place, steps, rank=0, sizes=None, **keywords):
    """(losses, norms, weights, gradients, parameters, states) over all steps, the parameters being trained too."""
    loss_fn, where = loss_of(place)
    balancer = gn.rotograd(6, **ROTATIONS[name]) if name in ROTATIONS else BALANCERS[name](where)
    params, state, rows = make_params(), balancer.init(3, dtype=F64), []
    for step in range(steps):
        batch = batch_of(place, step, rank, sizes)
        grads, state, info = balancer.grad(state, params, loss_fn, batch, **keywords)
        params = {path: leaf - 0.02 * grads[path] for path, leaf in params.items()}
        rows.append(leaves(info, grads, params, state))
    assert float(torch.cat([g.flatten() for g in grads.values()]).norm()) > 0
    assert float(info.losses.abs().min()) > 0
    return rows


def assert_same_run(found, expected, what):
    for step, (row, wanted) in enumerate(zip(found, expected, strict=True)):
        for a, b in zip(row, wanted, strict=True):
            torch.testing.assert_close(
                a, b, rtol=1e-10, atol=1e-12, equal_nan=True, msg=lambda text, step=step: f"{what}, step {step}: {text}"
            )


# ---- processes

# Forked from a fresh process that has imported all that takes its time, and nothing else.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["torch", "torch._dynamo.utils", "torch.distributed", "gradnorm_func"])


def join_group(rank, world, store, seconds=60):
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=datetime.timedelta(seconds=seconds)
    )


def _run(rank, world, folder, seconds, fn, args):
    try:
        join_group(rank, world, folder / "store", seconds)
        fn(rank, world, *args)
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        folder.joinpath(f"{rank}.txt").write_text(traceback.format_exc())
        os._exit(1)


def launch(fn, world, tmp_path, *args, seconds=60, limit=240):
    """fn(rank, world, *args) in `world` processes; {rank: (exit code, traceback)}. Nobody outlives `limit` seconds."""
    many = [
        PROCESSES.Process(target=_run, args=(rank, world, tmp_path, seconds, fn, args), daemon=True)
        for rank in range(world)
    ]
    for process in many:
        process.start()
    deadline = time.monotonic() + limit
    for process in many:
        process.join(max(0.0, deadline - time.monotonic()))
    hung = [rank for rank, process in enumerate(many) if process.is_alive()]
    for process in many:
        process.kill()
        process.join()
    texts = {rank: tmp_path / f"{rank}.txt" for rank in range(world)}
    assert not hung, f"ranks {hung} hang"
    return {r: (many[r].exitcode, path.read_text() if path.exists() else "") for r, path in texts.items()}


def spawn(fn, world, tmp_path, *args, **keywords):
    """The same, where all must succeed."""
    ended = launch(fn, world, tmp_path, *args, **keywords)
    assert all(code == 0 for code, _ in ended.values()), "\n".join(text for _, text in ended.values())


def same_on_all_ranks(rows):
    """Whether every rank holds the same bits."""
    flat = torch.cat([leaf.to(F64).flatten() for leaf in rows])
    found = [torch.empty_like(flat) for _ in range(dist.get_world_size())]
    dist.all_gather(found, flat)
    return all(torch.equal(x.nan_to_num(7.0), found[0].nan_to_num(7.0)) for x in found)
