"""One model trained in two ways: by the functional path in one process, and wrapped, in several processes.

`train` is what every rank runs; `reference` is what it must come out equal to.
"""

from __future__ import annotations

import itertools
import os
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

import gradnorm_func as gn

EXAMPLES = 24
TASKS = ("b", "c", "a")  # not sorted, so that a mix-up of the orders shows


class Config(NamedTuple):
    # "fork": wrapped trunk, wrapped heads; "inside": one wrapper, forked in it; "trunk": a wrapped trunk, and heads
    # that are functions of replicated parameters, whose gradients the loop averages itself.
    route: str
    wrapper: str  # "ddp" or "fsdp"
    balancer: str
    at: str  # "z" or "W"
    micro: int  # micro-batches per rank and step


def least_conflict(state: gn.State, seen: gn.Seen) -> Any:
    """Less weight for what conflicts with the others."""
    inverse = seen.gramian.diagonal().rsqrt()
    return seen.num_active() * seen.softmax((seen.gramian * inverse[:, None] * inverse).sum(1)), ()


BALANCERS = {
    "gradnorm": lambda where: gn.gradnorm(where=where, alpha=0.8, form="paper"),
    "fixed_ratio": lambda where: gn.fixed_ratio([1.0, 2.0, 3.0], where=where, decay=0.9),
    "static": lambda where: gn.static([0.5, 1.0, 2.0], where=where, norms=True),
    "gramian": lambda where: gn.balancer(least_conflict, needs="gramian", same_step=True, where=where),
    "own": lambda where: gn.balancer(least_conflict, needs="gramian", same_step=True, heads="own", where=where),
}
SAME_STEP = ("fixed_ratio", "gramian", "own")  # whose weights are of this very step
CONFIGS = [
    Config(route, wrapper, balancer, at, micro)
    for route in ("fork", "inside", "trunk")
    for wrapper in ("ddp", "fsdp")
    for balancer in BALANCERS
    for at in (("z", "W") if route != "inside" else ("z",))
    for micro in (1, 2, 3)
]
# What a default run tries: every value of every axis with every route.
FEW = [
    Config("fork", "ddp", "gradnorm", "z", 3),
    Config("fork", "ddp", "fixed_ratio", "W", 1),
    Config("fork", "fsdp", "fixed_ratio", "z", 1),
    Config("fork", "fsdp", "gradnorm", "W", 2),
    Config("inside", "ddp", "gradnorm", "z", 2),
    Config("inside", "fsdp", "fixed_ratio", "z", 1),
    Config("inside", "fsdp", "gradnorm", "z", 3),
    Config("trunk", "ddp", "gradnorm", "W", 3),
    Config("trunk", "ddp", "fixed_ratio", "z", 1),
    Config("trunk", "fsdp", "fixed_ratio", "W", 1),
    Config("trunk", "fsdp", "static", "z", 2),
    Config("fork", "ddp", "gramian", "z", 1),
    Config("fork", "fsdp", "gramian", "W", 3),
    Config("inside", "fsdp", "gramian", "z", 2),
    Config("fork", "ddp", "own", "W", 1),
    Config("inside", "fsdp", "own", "z", 2),
]


class History(NamedTuple):
    weights: torch.Tensor  # (steps, T) of the state after each step
    norms: torch.Tensor  # (steps, T)
    grads: dict[str, torch.Tensor]  # of the last step
    params: dict[str, torch.Tensor]  # at the end


class Model(nn.ModuleDict):
    """Trunk, last shared layer and heads; forked inside, where one wrapper is around all of it."""

    def forward(self, batch: Any) -> Any:
        copies = gn.fork(torch.tanh(self["last"](self["trunk"](batch["x"]))), TASKS_DICT)
        return losses_of(self, copies, batch), copies


TASKS_DICT = dict.fromkeys(TASKS)


def make_model() -> Model:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Model(
            {
                "trunk": nn.Sequential(nn.Linear(5, 6), nn.Tanh()),
                "last": nn.Linear(6, 4),
                "a": nn.Linear(4, 2),
                "b": nn.Linear(4, 1),
            }
        ).double()


def make_batch(step: int) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(step)
    rand = lambda width: torch.randn(EXAMPLES, width, generator=draw, dtype=torch.float64)
    return {"x": rand(5), "a": rand(2), "b": 3 * rand(1)}


def losses_of(heads: Any, copies: dict[str, Any], batch: Any) -> dict[str, torch.Tensor]:
    """The three losses, one of them without parameters; heads are called with their input."""
    mse = nn.functional.mse_loss
    return {
        "a": mse(heads["a"](copies["a"]), batch["a"]),
        "b": 4 * mse(heads["b"](copies["b"]), batch["b"]),
        "c": copies["c"].square().mean() + copies["c"].sum(-1).exp().mean(),
    }


def functional_loss(model: Model, linear: bool) -> Any:
    """The same as a multi_task_loss of params by name."""
    bound = {name: gn.functional(model[name], name) for name in ("trunk", "a", "b")}

    def head(task: str) -> Any:
        def run(params: Any, z: Any, batch: Any) -> Any:
            modules = {name: lambda x, name=name: bound[name](params, x) for name in ("a", "b") if name == task}
            one = {"a": lambda x: x[..., :2], "b": lambda x: x[..., :1]} | modules
            return losses_of(one, dict.fromkeys(TASKS, z), batch)[task]

        return run

    last = gn.shared_linear("last.weight", "last.bias", torch.tanh)
    trunk = lambda params, batch: bound["trunk"](params, batch["x"])
    heads = {task: head(task) for task in TASKS}
    if linear:
        return gn.multi_task_loss(trunk, heads, last_shared=last)
    return gn.multi_task_loss(lambda params, batch: last(params, trunk(params, batch)), heads)


def lagged(config: Config) -> bool:
    """With micro-batches, this step's weights are not known before its last one: those of the step before it serve."""
    return config.balancer in SAME_STEP and config.micro > 1


def needs(config: Config) -> Any:
    return BALANCERS[config.balancer](None).needs


def heads(config: Config) -> Any:
    return "own" if config.balancer == "own" else "weighted"


def reference(config: Config, steps: int) -> History:
    """One process, whole batches, everything functional."""
    model = make_model()
    where = None if config.at == "z" else "last.weight"
    balancer, loss_fn = BALANCERS[config.balancer](where), functional_loss(model, linear=False)
    state = balancer.init(3, dtype=torch.float64)
    params = {name: p.detach().clone() for name, p in model.named_parameters()}
    weights, norms = [], []
    for step in range(steps):
        batch = make_batch(step)
        if lagged(config):
            options = {"where": where, "needs": needs(config), "heads": heads(config)}
            stats = gn.measure(params, loss_fn, batch, weights=state.weights, **options)
            grads, (state, info) = stats.grads, balancer.balance(state, stats)
        else:
            grads, state, info = balancer.grad(state, params, loss_fn, batch)
        params = {name: p - 0.05 * grads[name] for name, p in params.items()}
        weights.append(state.weights)
        norms.append(info.grad_norms)
    return History(torch.stack(weights), torch.stack(norms), grads, params)


def share_out(batch: Any, rank: int, ranks: int, micro: int) -> list[Any]:
    """This rank's micro-batches; no two of one size, if it can be helped."""
    count = ranks * micro
    ends = [round(EXAMPLES * (i / count) ** 1.2) for i in range(count + 1)]
    parts = [slice(a, b) for a, b in itertools.pairwise(ends)]
    return [{k: v[part] for k, v in batch.items()} for part in parts[rank * micro : (rank + 1) * micro]]


def gather(stats: gn.TaskStats) -> gn.TaskStats:
    """The mean over ranks."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, stats)
    return gn.merge(*found)


def wrap(kind: str, module: nn.Module) -> nn.Module:
    if kind == "ddp":
        return DDP(module)
    from torch.distributed.fsdp import fully_shard

    return fully_shard(module, mesh=dist.init_device_mesh("cpu", (dist.get_world_size(),)))


def set_sync(stack: ExitStack, modules: list[nn.Module], sync: bool) -> None:
    for module in modules:
        if isinstance(module, DDP):
            if not sync:
                stack.enter_context(module.no_sync())
        else:
            module.set_requires_gradient_sync(sync)


def total(config: Config, weights: torch.Tensor, losses: dict[str, torch.Tensor], copies: Any) -> torch.Tensor:
    """What the loop calls backward() of."""
    if heads(config) == "own":
        gn.weigh_trunk(copies, weights)
        return sum(losses.values())
    return sum(w * losses[name] for name, w in zip(gn.task_names(losses), weights, strict=True))


class Wrapped:
    """The model as a route has it."""

    def __init__(self, config: Config) -> None:
        self.config, self.model = config, make_model()
        self.named = dict(self.model.named_parameters())
        self.replicated: list[str] = []
        if config.route == "inside":
            self.whole = wrap(config.wrapper, self.model)
            self.wrapped = [self.whole]
        elif config.route == "fork":
            self.heads = {name: wrap(config.wrapper, self.model[name]) for name in ("a", "b")}
            if config.wrapper == "ddp":  # W inside the wrapper
                self.trunk = DDP(nn.Sequential(self.model["trunk"], self.model["last"]))
                self.wrapped = [self.trunk, *self.heads.values()]
            else:
                trunk, last = wrap("fsdp", self.model["trunk"]), DDP(self.model["last"])
                self.trunk = lambda x: last(trunk(x))
                self.wrapped = [trunk, last, *self.heads.values()]
        else:
            self.loss_fn = functional_loss(self.model, linear=False)
            kept = ("last", "a", "b") if config.at == "W" else ("a", "b")
            self.replicated = [name for name in self.named if name.split(".")[0] in kept]
            self.trunk = nn.Sequential(self.model["trunk"])
            if config.at == "z":
                self.trunk.append(self.model["last"])
            self.trunk = wrap(config.wrapper, self.trunk)
            self.wrapped = [self.trunk]
        if config.wrapper == "fsdp":  # they have other parameters now
            self.named = dict(self.model.named_parameters())

    def forward(self, batch: Any) -> Any:
        """(losses, copies)"""
        if self.config.route == "inside":
            return self.whole(batch)
        y = self.trunk(batch["x"])
        if self.config.route == "fork":
            copies = gn.fork(torch.tanh(y), TASKS_DICT)
            return losses_of(self.heads, copies, batch), copies
        params = {name: self.named[name] for name in self.replicated}
        if self.config.at == "W":
            y = nn.functional.linear(y, params["last.weight"], params["last.bias"])
        copies = gn.fork(torch.tanh(y), TASKS_DICT)
        return {task: head(params, copies[task], batch) for task, head in self.loss_fn.heads.items()}, copies

    def step(self, balancer: gn.Balancer, state: Any, batches: list[Any], reduce: Any, share: Any) -> Any:
        """.grad is written, and this is (state, info)."""
        config = self.config
        stats, new = [], ()
        for k, batch in enumerate(batches):
            count, factor = len(batch["x"]), share(len(batch["x"]))
            with ExitStack() as stack:
                set_sync(stack, self.wrapped, k == len(batches) - 1)
                losses, copies = self.forward(batch)
                place = (
                    {"copies": copies} if config.at == "z" else {"where": {"last.weight": self.named["last.weight"]}}
                )
                measure = partial(gn.measure_losses, losses, **place, needs=needs(config), num_examples=count)
                if config.balancer in SAME_STEP and not lagged(config):
                    new = balancer.balance(state, reduce(measure()))
                    (factor * total(config, new[1].weights, losses, copies)).backward()
                elif config.at == "z" and config.route == "inside":  # of the one backward pass
                    (factor * total(config, state.weights, losses, copies)).backward()
                    stats.append(measure(weights=state.weights, scale=factor))
                else:
                    stats.append(measure())
                    (factor * total(config, state.weights, losses, copies)).backward()
        for name in self.replicated:
            dist.all_reduce(self.named[name].grad)
            self.named[name].grad /= dist.get_world_size()
        return new or balancer.balance(state, reduce(gn.merge(*stats)))


def train(config: Config, steps: int, rank: int, ranks: int, break_it: str = "") -> History:
    """One rank of a wrapped run. `break_it` leaves one thing out, to see that the tests mind."""
    torch.manual_seed(100 + rank)
    this = Wrapped(config)
    where = None if config.at == "z" else "last.weight"
    balancer = BALANCERS[config.balancer](where)
    state = balancer.init(3, dtype=torch.float64)
    optimizer = torch.optim.SGD(list(this.named.values()), lr=0.05)
    reduce = (lambda stats: stats) if break_it == "reduce" else gather
    share = (lambda n: 1 / config.micro) if break_it == "share" else (lambda n: n * ranks / EXAMPLES)
    weights, norms = [], []
    for step in range(steps):
        optimizer.zero_grad()
        batches = share_out(make_batch(step), rank, ranks, config.micro)
        state, info = this.step(balancer, state, batches, reduce, share)
        optimizer.step()
        weights.append(state.weights)
        norms.append(info.grad_norms)
    full = lambda t: (t.full_tensor() if hasattr(t, "full_tensor") else t).detach().clone()
    grads = {name: full(p.grad) for name, p in this.named.items()}
    return History(torch.stack(weights), torch.stack(norms), grads, {name: full(p) for name, p in this.named.items()})


def train_broken(fault: str, config: Config, steps: int, rank: int, ranks: int) -> History:
    return train(config, steps, rank, ranks, fault)


def run_rank(rank: int, ranks: int, folder: str, jobs: list[tuple[Any, ...]]) -> None:
    """A process of the group: does all jobs (function, *arguments), and writes down what they return."""
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=ranks)
    try:
        results = [function(*arguments, rank, ranks) for function, *arguments in jobs]
        torch.save(results, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def sharded(rank: int, ranks: int) -> dict[str, Any]:
    """DTensor parameters: what torch.func can do with them, and what it says where it cannot."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.experimental import implicit_replication
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = dist.init_device_mesh("cpu", (ranks,))
    model, batch = make_model(), make_batch(0)
    ones = torch.ones(3, dtype=torch.float64)
    placements = {"trunk.0.weight": Shard(0), "trunk.0.bias": Shard(0), "last.weight": Shard(1)}
    params = {
        name: distribute_tensor(p.detach(), mesh, [placements.get(name, Replicate())])
        for name, p in model.named_parameters()
    }
    found: dict[str, Any] = {}
    for engine in ("seam", "linear", "general"):
        loss_fn = functional_loss(make_model(), linear=engine == "linear")
        for where in (None, "last.weight", "trunk.0.weight"):
            if engine == "general":
                bare = lambda params, batch, loss_fn=loss_fn: loss_fn(params, batch)
            for vectorize in (True, False):
                with implicit_replication():
                    stats = gn.measure(
                        params,
                        bare if engine == "general" else loss_fn,
                        batch,
                        weights=ones,
                        where=where,
                        vectorize=vectorize,
                    )
                plain = (
                    (*stats[:3], *([] if stats.task_grads == () else stats.task_grads.values())) if where else stats[:3]
                )
                assert not any(isinstance(leaf, DTensor) for leaf in plain)
                assert all(stats.grads[name].placements == p.placements for name, p in params.items())
                grads = {name: grad.full_tensor() for name, grad in stats.grads.items()}
                found[f"{engine} {where} {vectorize}"] = (stats.grad_norms, grads)
    try:
        gn.measure(params, functional_loss(make_model(), linear=False), batch)
    except ValueError as error:
        found["mixed"] = str(error)
    module = make_model()
    loss_fn = functional_loss(module, linear=False)
    fully_shard(module["trunk"], mesh=mesh)
    try:
        gn.measure(dict(module.named_parameters()), loss_fn, batch, where="last.weight")
    except ValueError as error:
        found["fsdp"] = str(error)
    tp = make_model()
    heads = {name: tp[name] for name in ("a", "b")}
    trunk = parallelize_module(
        nn.Sequential(tp["trunk"][0], nn.Tanh(), tp["last"]), mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()}
    )
    copies = gn.fork(torch.tanh(trunk(batch["x"])), TASKS_DICT)
    losses = losses_of(heads, copies, batch)
    for name, place in {"z": {"copies": copies}, "W": {"where": trunk[2].weight}}.items():
        stats = gn.measure_losses(losses, **place)
        assert not any(isinstance(leaf, DTensor) for leaf in (*stats[:3], stats.task_grads))
        found[f"tp {name}"] = stats.grad_norms
    loss_fn = functional_loss(make_model(), linear=False)
    live = {name: p.requires_grad_() for name, p in params.items()}
    with implicit_replication():  # everything a DTensor, the losses too
        copies = gn.fork(loss_fn.backbone(live, batch), TASKS_DICT)
        losses = {name: head(live, copies[name], batch) for name, head in loss_fn.heads.items()}
        assert all(isinstance(loss, DTensor) for loss in losses.values())
        stats = gn.measure_losses(losses, copies)
        assert not any(isinstance(leaf, DTensor) for leaf in stats[:3])
        found["tp all z"] = stats.grad_norms
        found["tp all W"] = gn.measure_losses(losses, where=live["last.weight"]).grad_norms
    module = make_model()  # the one before did not survive torch.func
    fully_shard(module["trunk"], mesh=mesh)
    weight = module["trunk"][0].weight
    losses = losses_of(heads, gn.fork(module["trunk"](batch["x"])[:, :4], TASKS_DICT), batch)
    try:
        gn.measure_losses(losses, where={"w": weight})
    except ValueError as error:
        found["where fsdp"] = str(error)
    return found


def sinks(rank: int, ranks: int) -> dict[str, str]:
    """A wrapper that hands out other tensors than its module does: no norms come of them, and it is said so."""
    found = {}
    for option in ("find_unused_parameters", "static_graph"):
        losses, copies = DDP(make_model(), **{option: True})(make_batch(0))
        try:
            found[option] = str(gn.measure_losses(losses, copies).grad_norms.tolist())
        except ValueError as error:
            found[option] = str(error)
    return found
