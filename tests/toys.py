"""Small multi-task problems and the table of balancers, for the tests of the balancers and of what surrounds them."""

from typing import Any, NamedTuple

import torch

import gradnorm_func as gn

# Natural scales well apart, but not so far that weights in the linear form hit the floor.
SCALES = (1.0, 4.0, 0.3, 2.0, 0.6)


class Problem(NamedTuple):
    params: dict
    batch: tuple  # x (B, 5), y (B, T)
    general: Any  # the loss as one function
    seam: Any  # the same loss with its seam visible
    separable: Any  # and with nothing shared but the parameters
    where: str = "trunk.1.weight"


def _head(task, params, z, batch):
    return SCALES[task] * (z @ params[f"head.{task}"] - batch[1][:, task]).square().mean()


def make_params(seed=0, num_tasks=3, dtype=torch.float64):
    draw = torch.Generator().manual_seed(seed)
    rand = lambda *shape: torch.randn(*shape, generator=draw, dtype=torch.float64).to(dtype)
    params = {"trunk.0": 0.5 * rand(6, 5), "trunk.1.weight": 0.5 * rand(6, 6), "trunk.1.bias": 0.1 * rand(6)}
    return params | {f"head.{task}": 0.5 * rand(6) for task in range(num_tasks)}


def make_batch(seed=0, num_tasks=3, dtype=torch.float64, size=8):
    draw = torch.Generator().manual_seed(1000 + seed)
    rand = lambda *shape: torch.randn(*shape, generator=draw, dtype=torch.float64).to(dtype)
    return rand(size, 5), rand(size, num_tasks)


def make_problem(seed=0, num_tasks=3, dtype=torch.float64):
    """A two-layer trunk and T linear heads with squared errors on scales far apart."""
    names = [f"t{task}" for task in range(num_tasks)]

    def first_layer(params, batch):
        return torch.tanh(batch[0] @ params["trunk.0"].T)

    def general(params, batch):
        h = first_layer(params, batch)
        z = torch.tanh(h @ params["trunk.1.weight"].T + params["trunk.1.bias"])
        return {name: _head(task, params, z, batch) for task, name in enumerate(names)}

    def bind(task):
        return lambda params, z, batch: _head(task, params, z, batch)

    seam = gn.multi_task_loss(
        first_layer,
        {name: bind(task) for task, name in enumerate(names)},
        last_shared=gn.shared_linear("trunk.1.weight", "trunk.1.bias", torch.tanh),
    )

    def alone(task):
        def loss(params, batch):
            h = first_layer(params, batch)
            z = torch.tanh(h @ params["trunk.1.weight"].T + params["trunk.1.bias"])
            return _head(task, params, z, batch)

        return loss

    separable = gn.multi_task_loss(None, {name: alone(task) for task, name in enumerate(names)})
    return Problem(make_params(seed, num_tasks, dtype), make_batch(seed, num_tasks, dtype), general, seam, separable)


# The balancer that the docstring of gn.balancer writes.


def inverse_norm(mix=0.1, where=None, **options):
    def rule(state, seen):
        inverse = 1 / seen.norms
        return torch.lerp(state.weights, inverse / seen.mean(inverse), mix), ()

    return gn.balancer(rule, where=where, **options)


def residual_at(task):
    """What `_head` squares, at one example: for the rule that looks at residuals."""

    def residual(params, example):
        x, y = example
        z = torch.tanh(params["trunk.1.weight"] @ torch.tanh(params["trunk.0"] @ x) + params["trunk.1.bias"])
        return SCALES[task] ** 0.5 * (z @ params[f"head.{task}"] - y[task])

    return residual


def ntk(num_tasks=3, **options):
    residuals = {f"t{task}": residual_at(task) for task in range(num_tasks)}
    return gn.ntk(residuals, points=lambda batch: dict.fromkeys(residuals, batch), **options)


# The one table: name -> a function of `where`, and of options that all share, that makes the balancer.
BALANCERS = {
    "gradnorm": lambda where, **more: gn.gradnorm(where=where, alpha=0.5, **more),
    "gradnorm-adam": lambda where, **more: gn.gradnorm(where=where, alpha=0.5, form="paper", **more),
    "gradnorm-sgd": lambda where, **more: gn.gradnorm(
        where=where, alpha=0.5, form="paper", optimizer=gn.sgd(0.01), **more
    ),
    "gradnorm-log": lambda where, **more: gn.gradnorm(where=where, alpha=0.5, form="log", **more),
    "fixed-ratio": lambda where, **more: gn.fixed_ratio([1.0, 2.0, 3.0], where=where, decay=0.9, **more),
    "fixed-ratio-whole": lambda where, **more: gn.fixed_ratio(
        where=where, per_example=False, decay=0.9, budget=2.0, **more
    ),
    "equal-norms": lambda where, **more: gn.equal_norms(where=where, momentum=0.6, **{"every": 2, **more}),
    "ntk": lambda where, **more: ntk(momentum=0.6, **more),
    "static": lambda where, **more: gn.static([0.5, 1.0, 2.0], where=where, norms=True, **more),
    "uncertainty": lambda where, **more: gn.uncertainty(**more),
    "geometric": lambda where, **more: gn.geometric(**more),
    "famo": lambda where, **more: gn.famo(**more),
    "stch": lambda where, **more: gn.stch(1, mu=0.5, warmup=1, **more),
    "dwa": lambda where, **more: gn.dwa(1, **more),
    "relobralo": lambda where, **more: gn.relobralo(decay=0.6, keep=0.5, **more),
    "normalized": lambda where, **more: gn.normalized(where=where, total="rms", **more),
    "rlw": lambda where, **more: gn.rlw(**more),
    "mgda": lambda where, **more: gn.mgda(where=where, **more),
    "mgda-l2": lambda where, **more: gn.mgda(normalise="l2", where=where, **more),
    "cagrad": lambda where, **more: gn.cagrad(where=where, **more),
    "fairgrad": lambda where, **more: gn.fairgrad(where=where, **more),
    "nash": lambda where, **more: gn.nash(where=where, **more),
    "aligned": lambda where, **more: gn.aligned(where=where, **more),
    "config": lambda where, **more: gn.config(where=where, **more),
    "imtl-g": lambda where, **more: gn.imtl_g(where=where, **more),
    "upgrad": lambda where, **more: gn.upgrad(where=where, **more),
    "dualproj": lambda where, **more: gn.dualproj(where=where, **more),
    "pcgrad": lambda where, **more: gn.pcgrad(where=where, **more),
    "user": lambda where, **more: inverse_norm(where=where, **more),
}
# Those that look at the Gramian, and solve a small problem of it.
GRAMIAN = [
    "mgda",
    "mgda-l2",
    "cagrad",
    "fairgrad",
    "nash",
    "aligned",
    "config",
    "imtl-g",
    "upgrad",
    "dualproj",
    "pcgrad",
]


def but_for_looks(state):
    """`update` gives the state that `grad` gives, but that FAMO's is its second look, which waits for no other."""
    if not hasattr(state, "memory") or not hasattr(state.memory, "pending"):
        return state
    return state._replace(memory=state.memory._replace(pending=()))


def leaves(*trees):
    """All tensors of some pytrees."""
    import optree

    return [leaf for tree in trees for leaf in optree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def same_bits(a, b):
    """Whether two pytrees hold the same tensors bit for bit, NaN included."""
    pairs = list(zip(leaves(a), leaves(b), strict=True))
    return all(x.dtype == y.dtype and torch.equal(x.nan_to_num(12345.0), y.nan_to_num(12345.0)) for x, y in pairs)
