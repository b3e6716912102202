"""In plain eager mode a loss may hold whatever autograd differentiates: against a loop of torch.autograd.grad."""

import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
from oracle import assert_free, assert_near, assert_same_sum, assert_untouched, norm, reference, snapshot
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from toys import leaves, same_bits

import gradnorm_func as gn

# Dynamo asks what is no leaf for its gradient, and hides the warning, but not where warnings are errors.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")

F64 = torch.float64
WIDTH, BATCH = 6, 4
WEIGHTS = {"a": 0.5, "b": 1.7, "c": 0.8}


class OldTanh(torch.autograd.Function):
    """As it was written before there was a setup_context."""

    @staticmethod
    def forward(ctx, x, w):
        y = torch.tanh(x @ w)
        ctx.save_for_backward(x, w, y)
        return y

    @staticmethod
    def backward(ctx, grad):
        x, w, y = ctx.saved_tensors
        grad = grad * (1 - y * y)
        return grad @ w.mT, x.mT @ grad


def dense(w, x):
    return torch.tanh(x @ w["w"])


def residual(w, x):
    x = x if x.requires_grad else x.clone().requires_grad_()
    return torch.autograd.grad(dense(w, x).square().sum(), x, create_graph=True)[0]


LSTM = nn.LSTM(WIDTH, WIDTH, dtype=F64)
COMPILED = nn.Linear(WIDTH, WIDTH, dtype=F64)


def lstm(w, x):
    return gn.functional(LSTM)(w, x)[0]


def attention(w, x):
    q = (x @ w["w"]).reshape(BATCH, 1, 3, 2)
    return F.scaled_dot_product_attention(q, q.sin(), q.cos()).reshape(BATCH, WIDTH)


def attention_by_hand(w, x):
    q = (x @ w["w"]).reshape(BATCH, 1, 3, 2)
    return (((q @ q.sin().mT) / 2**0.5).softmax(-1) @ q.cos()).reshape(BATCH, WIDTH)


def compiled_module(w, x):
    COMPILED.compile(backend="aot_eager")
    return torch.tanh(gn.functional(COMPILED)(w, x))


def of(module):
    return {name: p.detach() for name, p in module.named_parameters()}


square = lambda: {"w": torch.randn(WIDTH, WIDTH, dtype=F64)}
# name -> (parameters, the part as a loss may hold it, the same in plain operations)
PARTS = {
    "dense": (square, dense, dense),
    "residual": (square, residual, residual),
    "checkpoint": (square, lambda w, x: checkpoint(dense, w, x, use_reentrant=False), dense),
    "compiled": (square, lambda w, x: torch.compile(dense, backend="aot_eager")(w, x), dense),
    "compiled module": (lambda: of(COMPILED), compiled_module, lambda w, x: torch.tanh(x @ w["weight"].T + w["bias"])),
    "old function": (square, lambda w, x: OldTanh.apply(x, w["w"]), dense),
    "lstm": (lambda: of(LSTM), lstm, lstm),
    "attention": (square, attention, attention_by_hand),
}
ENGINES = {
    "z": ("seam", None),
    "W": ("seam", "last"),
    "W past z": ("seam", ["last", "heads.a"]),
    "linear": ("linear", "last"),
    "early": ("seam", "trunk"),
    "general": ("general", None),
    "general at W": ("general", "last"),
    "separable": ("separable", None),
    "separable at W": ("separable", "last"),
}


def case(part):
    """A loss with this part in the trunk and in one head: as every engine takes it, and as plain operations."""
    torch.manual_seed(0)
    make, apply, plain = PARTS[part]
    params = {
        "trunk": make(),
        "last": torch.randn(WIDTH, WIDTH, dtype=F64),
        "heads": {"a": make(), "b": torch.randn(WIDTH, dtype=F64)},
    }
    batch = torch.randn(BATCH, WIDTH, dtype=F64)

    def parts(apply):
        def heads(task):
            return {
                "a": lambda p, z, x: 3 * (apply(p["heads"]["a"], z) - x).square().mean(),
                "b": lambda p, z, x: (z @ p["heads"]["b"]).exp().mean(),
                "c": lambda p, z, x: (z - x).square().sum(),
            }[task]

        first = lambda p, x: apply(p["trunk"], x)
        backbone = lambda p, x: torch.tanh(first(p, x) @ p["last"].T)
        return first, backbone, {task: heads(task) for task in "cab"}

    first, backbone, heads = parts(apply)
    general = lambda p, x: (lambda z: {task: head(p, z, x) for task, head in heads.items()})(backbone(p, x))
    losses = {
        "seam": gn.multi_task_loss(backbone, heads),
        "linear": gn.multi_task_loss(first, heads, last_shared=gn.shared_linear("last", activation=torch.tanh)),
        "general": general,
        "separable": gn.multi_task_loss(
            None, {task: lambda p, x, head=head: head(p, backbone(p, x), x) for task, head in heads.items()}
        ),
    }
    _, plain_backbone, plain_heads = parts(plain)
    return SimpleNamespace(params=params, batch=batch, losses=losses, backbone=plain_backbone, heads=plain_heads)


def rows_at(this, where):
    """Reference of the losses: at z, or at the leaves of W; and the whole gradient of the weighted sum."""
    theta = torch.utils._pytree.tree_map(lambda leaf: leaf.clone().requires_grad_(), this.params)
    z = this.backbone(theta, this.batch)
    total = reference(
        {task: head(theta, z, this.batch) for task, head in sorted(this.heads.items())}, leaves(theta), WEIGHTS
    ).total
    if where == "z":
        z = z.detach().requires_grad_()
        wrt = [z]
    else:
        picked = {None: theta, "last": theta["last"], "trunk": theta["trunk"]}
        wrt = leaves(picked[where] if not isinstance(where, list) else (theta["last"], theta["heads"]["a"]))
    values = {task: head(theta, z, this.batch) for task, head in sorted(this.heads.items())}
    return reference(values, wrt, WEIGHTS).rows, total


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("part", PARTS)
def test_equal_to_a_loop(part, engine):
    this, (form, where) = case(part), ENGINES[engine]
    loss_fn = this.losses[form]
    state = gn.init_state(3, weights=WEIGHTS, dtype=F64)
    before = snapshot((this.params, this.batch))
    grads, new, info = gn.gradnorm_grad(state, this.params, loss_fn, this.batch, where=where, form="paper")
    assert_untouched(before)
    assert_free((grads, new, info))
    assert all(leaf.grad is None for leaf in leaves(this.params))
    rows, total = rows_at(this, "z" if engine == "z" else where)
    expected = torch.stack([norm(row) for row in rows.values()])
    assert (expected > 0).sum() >= 2
    assert_near(info.grad_norms, expected, f"{part}, {engine}")
    assert_same_sum(leaves(grads), total, f"{part}, {engine}")
    assert info.finite
    again = gn.gradnorm_update(state, this.params, loss_fn, this.batch, where=where, form="paper")
    torch.testing.assert_close(again, new, rtol=1e-12, atol=0)


@pytest.mark.parametrize("engine", ["z", "W", "general", "separable"])
@pytest.mark.parametrize("part", PARTS)
def test_no_grad_is_no_obstacle(part, engine):
    this, (form, where) = case(part), ENGINES[engine]
    args = (gn.init_state(3, dtype=F64), this.params, this.losses[form], this.batch)
    expected = gn.gradnorm_grad(*args, where=where)
    with torch.no_grad():
        found = gn.gradnorm_grad(*args, where=where)
    assert same_bits(found, expected)


@pytest.mark.parametrize("engine", ["z", "W", "linear", "general", "separable"])
def test_inference_mode_says_what_to_do(engine):
    this, (form, where) = case("dense"), ENGINES[engine]
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"use torch\.no_grad\(\) here"):
        gn.gradnorm_grad(gn.init_state(3, dtype=F64), this.params, this.losses[form], this.batch, where=where)


@pytest.mark.parametrize("engine", ["z", "W", "general", "separable"])
def test_a_reentrant_checkpoint_says_what_to_do(engine, monkeypatch):
    monkeypatch.setitem(
        PARTS,
        "reentrant",
        (square, lambda w, x: checkpoint(lambda m, x: dense({"w": m}, x), w["w"], x, use_reentrant=True), dense),
    )
    this, (form, where) = case("reentrant"), ENGINES[engine]
    with pytest.raises(ValueError, match="use_reentrant=False") as caught:
        gn.gradnorm_grad(gn.init_state(3, dtype=F64), this.params, this.losses[form], this.batch, where=where)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_parameter_that_is_read_only_sometimes(engine):
    """In trunk and head, depending on the batch: nothing is remembered from one step to the next."""
    form, where = ENGINES[engine]
    extra = lambda p, name, x: p[name] if bool(x.sum() > 0) else 0.0
    params = {
        "trunk": torch.randn(WIDTH, WIDTH, dtype=F64),
        "last": torch.randn(WIDTH, WIDTH, dtype=F64),
        "heads": {"a": torch.randn(WIDTH, dtype=F64), "b": torch.randn(WIDTH, dtype=F64)},
        "now": torch.randn(WIDTH, dtype=F64),
        "then": torch.randn(WIDTH, dtype=F64),
    }
    first = lambda p, x: torch.tanh(x @ p["trunk"] + extra(p, "now", x))
    backbone = lambda p, x: torch.tanh(first(p, x) @ p["last"].T)
    heads = {
        "a": lambda p, z, x: (z @ p["heads"]["a"] + (extra(p, "then", x) * z).sum(-1)).exp().mean(),
        "b": lambda p, z, x: ((z - extra(p, "now", -x)) @ p["heads"]["b"]).square().mean(),
        "c": lambda p, z, x: z.square().sum(),
    }
    loss_fn = {
        "seam": gn.multi_task_loss(backbone, heads),
        "linear": gn.multi_task_loss(first, heads, last_shared=gn.shared_linear("last", activation=torch.tanh)),
        "general": lambda p, x: {task: head(p, backbone(p, x), x) for task, head in heads.items()},
        "separable": gn.multi_task_loss(
            None, {task: lambda p, x, head=head: head(p, backbone(p, x), x) for task, head in heads.items()}
        ),
    }[form]
    state = gn.init_state(3, weights=WEIGHTS, dtype=F64)
    for sign in (1, -1, 1, -1):
        this = SimpleNamespace(
            params=params, batch=sign * torch.rand(BATCH, WIDTH, dtype=F64), backbone=backbone, heads=heads
        )
        grads, _, info = gn.gradnorm_grad(state, params, loss_fn, this.batch, where=where, form="paper")
        rows, total = rows_at(this, "z" if engine == "z" else where)
        assert_near(info.grad_norms, torch.stack([norm(row) for row in rows.values()]))
        assert_same_sum(leaves(grads), total)
        assert bool(grads["then"].any()) == (sign > 0)
        assert bool(grads["now"].any())


@pytest.mark.parametrize("engine", ["z", "W", "linear", "general", "general at W", "separable"])
@pytest.mark.parametrize("balancer", [gn.gradnorm, gn.mgda, gn.fixed_ratio])
def test_the_graph_is_gone_when_the_step_is_over(engine, balancer):
    """Without waiting for the garbage collector, which would let memory grow meanwhile."""
    this, (form, where) = case("dense"), ENGINES[engine]
    alive = []

    def watched(fn):
        def run(p, *inputs):
            out = fn(p, *inputs)
            alive.append(weakref.ref(out))
            return out

        return run

    inner = this.losses[form]
    if form == "general":
        loss_fn = lambda p, x: {
            task: watched(head)(p, watched(this.backbone)(p, x), x) for task, head in this.heads.items()
        }
    else:
        backbone = None if inner.backbone is None else watched(inner.backbone)
        heads = {task: watched(head) for task, head in inner.heads.items()}
        loss_fn = gn.multi_task_loss(backbone, heads, last_shared=inner.last_shared)
    method = balancer(where=where)
    gc.collect()
    gc.disable()
    try:
        out = method.grad(method.init(3, dtype=F64), this.params, loss_fn, this.batch)
        assert len(alive) >= 3
        assert not any(ref() is not None for ref in alive)
        assert_free(out)
    finally:
        gc.enable()


def test_a_loss_that_a_task_does_not_reach():
    """A task of no graph at all has a gradient of zero, everywhere."""
    this = case("dense")
    constant = lambda *_: torch.tensor(2.0, dtype=F64)
    heads = this.losses["seam"].heads | {"c": constant}
    separable = this.losses["separable"].heads | {"c": constant}
    for loss_fn, where in (
        (gn.multi_task_loss(this.losses["seam"].backbone, heads), None),
        (gn.multi_task_loss(this.losses["seam"].backbone, heads), "last"),
        (gn.multi_task_loss(None, separable), None),
        (lambda p, x: this.losses["general"](p, x) | {"c": constant()}, None),
    ):
        grads, _, info = gn.gradnorm_grad(
            gn.init_state(3, dtype=F64), this.params, loss_fn, this.batch, where=where, form="paper"
        )
        assert info.grad_norms[2] == 0
        assert (info.grad_norms[:2] > 0).all()
        theta = torch.utils._pytree.tree_map(lambda leaf: leaf.clone().requires_grad_(), this.params)
        z = this.backbone(theta, this.batch)
        values = {task: this.heads[task](theta, z, this.batch) for task in "ab"}
        assert_same_sum(leaves(grads), reference(values, leaves(theta), {"a": 1.0, "b": 1.0}).total)
