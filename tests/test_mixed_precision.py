"""Autocast, parameters in half precision, and loss scaling, against loops of torch.autograd.grad under the same."""

import gc
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F

import gradnorm_func as gn
from gradnorm_func._measure import linear

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
WIDTH, TASKS = 8, 3
# Powers of two, with which rounding commutes: what the seam divides out of its norms was not rounded differently.
WEIGHTS = torch.tensor([0.5, 4.0, 1.0])
NORMS = {
    "none": nn.Identity,
    "layer": lambda: nn.LayerNorm(WIDTH),
    "group": lambda: nn.GroupNorm(2, WIDTH),
    "batch": lambda: nn.BatchNorm1d(WIDTH),
    "batch without affine": lambda: nn.BatchNorm1d(WIDTH, affine=False),
    "rms": lambda: nn.RMSNorm(WIDTH),
}
KINDS = ["general", "seam", "function", "separable", "stacked"]
PLACES = {"z": None, "last": "last", "weight": "last.weight", "trunk": "trunk.0", "norm": "trunk.1"}


def autocast(dtype=BF16, where="outside"):
    return {"outside": lambda: torch.autocast("cpu", dtype), None: nullcontext}[where]()


def make_net(norm="none"):
    torch.manual_seed(0)
    trunk = nn.Sequential(nn.Linear(5, WIDTH), NORMS[norm](), nn.Tanh())
    for name, p in trunk[1].named_parameters():  # ones and zeros would hide much
        p.data += 0.3 * torch.randn(p.shape) if name else 0
    return nn.ModuleDict({"trunk": trunk, "last": nn.Linear(WIDTH, 6)})


def make_params(net, requires_grad=True):
    params = dict(net.named_parameters()) | {"heads.weight": torch.randn(TASKS, 1, 6), "heads.bias": torch.ones(TASKS)}
    return {name: p.detach().clone().requires_grad_(requires_grad) for name, p in params.items()}


def make_batch():
    draw = torch.Generator().manual_seed(1)
    return torch.randn(16, 5, generator=draw), torch.randn(16, TASKS, generator=draw) * torch.tensor([1.0, 5.0, 0.2])


def head(p, z, y):
    """Of one task. Its square is computed in the dtype of its layer, so that under autocast the loss is of that too."""
    out = F.linear(z, p["weight"], p["bias"].reshape(1)).squeeze(-1)
    return (out - y.to(out.dtype)).square().mean()


def loss_of(kind, net, inside=None):
    """The same losses for every engine; with `inside`, autocast is the business of every function of the user's."""
    trunk = gn.functional(net["trunk"], "trunk", buffers=True)
    last = gn.functional(net["last"], "last")

    def cast():
        return nullcontext() if inside is None else torch.autocast("cpu", inside)

    def first(p, batch):
        with cast():
            return trunk(p, batch[0])

    def second(p, h):
        with cast():
            return torch.tanh(last(p, h))

    def task(i):
        def run(p, z, batch):
            with cast():
                return head({"weight": p["heads.weight"][i], "bias": p["heads.bias"][i]}, z, batch[1][:, i]), ()

        return run

    def whole(i):
        def run(p, batch):
            h, buffers = first(p, batch)
            return task(i)(p, second(p, h), batch)[0], buffers

        return run

    def general(p, batch):
        h, buffers = first(p, batch)
        z = second(p, h)
        return [task(i)(p, z, batch)[0] for i in range(TASKS)], buffers

    if kind == "general":
        return general
    if kind == "separable":
        return gn.multi_task_loss(None, [whole(i) for i in range(TASKS)], has_aux=True)
    linear = gn.shared_linear("last.weight", "last.bias", torch.tanh)
    heads = [task(i) for i in range(TASKS)]
    if kind == "stacked":

        def one(p, z, y):
            with cast():
                return head(p, z, y), ()

        heads = gn.stacked_heads(lambda p, z, batch: one(p, z, batch[1]), "heads", batch_dims=(None, 1))
    last_shared = second if kind == "function" or inside else linear
    return gn.multi_task_loss(first, heads, last_shared=last_shared, has_aux=True)


def buffers_of(kind, aux):
    if kind == "general":
        return aux
    return aux[1][0] if kind == "separable" else aux[0]


def loop(net, params, batch, where, context, weights=WEIGHTS):
    """Losses, per-task gradients and that of the weighted sum, by a backward pass each, outside autocast."""
    leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
    general = loss_of("general", net)
    with context:
        losses, buffers = general(leaves, batch)
    prefixes = [where] if isinstance(where, str) else where
    chosen = [p for name, p in leaves.items() if any(name.startswith(prefix) for prefix in prefixes)]
    rows = [torch.autograd.grad(loss, chosen, retain_graph=True) for loss in losses]
    norms = torch.stack([torch.cat([g.double().flatten() for g in row]).norm() for row in rows])
    total = sum(w.to(loss.dtype) * loss for w, loss in zip(weights, losses, strict=True))
    grads = dict(zip(leaves, torch.autograd.grad(total, list(leaves.values())), strict=True))
    assert bool((norms > 0).all())
    return torch.stack([loss.detach() for loss in losses]), norms, grads, buffers


def loop_at_z(net, params, batch, context):
    """Norms over the batch, and the mean over examples of each one's, at z."""
    with context:
        h, _ = gn.functional(net["trunk"], "trunk", buffers=True)(params, batch[0])
        z = torch.tanh(gn.functional(net["last"], "last")(params, h)).detach().requires_grad_()
        tasks = [
            head({"weight": params["heads.weight"][i], "bias": params["heads.bias"][i]}, z, batch[1][:, i])
            for i in range(TASKS)
        ]
    rows = torch.stack([torch.autograd.grad(loss, z)[0] for loss in tasks]).double()
    return rows.flatten(1).norm(dim=1), rows.norm(dim=2).mean(1)


def gap(found, expected):
    """Largest relative difference of two vectors or, leaf by leaf, of two dicts of gradients in their norms."""
    if isinstance(found, dict):
        # A bias before batch norm has no gradient but rounding, hence the share of the largest.
        size = max(float(e.norm()) for e in expected.values())
        gaps = ((found[k].double() - e.double()).norm() / max(float(e.norm()), size / 4) for k, e in expected.items())
        return max(float(g) for g in gaps)
    return float(((found.double() - expected.double()) / expected.double()).abs().max())


def doubled(net, params, batch):
    return net.double(), {name: p.double() for name, p in params.items()}, tuple(x.double() for x in batch)


def check(kind, place, net, found, params, batch, context):
    """(stats, aux) of a pass, against the loop under the same autocast."""
    stats, aux = found
    tight = 1e-5
    if kind == "stacked":  # under vmap PyTorch adds the bias of a Linear in float32: less rounded than the loop
        tight = 2e-2
    elif params["trunk.0.weight"].dtype == BF16:  # the batching rule of a LayerNorm rounds elsewhere
        tight = 1e-2
    elif kind == "seam" and place in ("last", "weight"):  # Gram matrices and sums for the bias in float32
        tight = 4e-3
    assert {stats.losses.dtype, stats.grad_norms.dtype} == {F32}
    assert all(stats.grads[name].dtype == p.dtype for name, p in params.items())
    where = PLACES[place]
    at_z = where is None and kind not in ("general", "separable")
    losses, norms, grads, buffers = loop(net, params, batch, "" if where is None else where, context)
    if at_z:
        norms, example_norms = loop_at_z(net, params, batch, context)
        assert stats.example_norms.dtype == F32
        assert gap(stats.example_norms, example_norms) < tight
    assert losses.dtype != F32 or context.__class__ is nullcontext
    assert gap(stats.losses, losses) < tight
    assert gap(stats.grad_norms, norms) < tight
    assert gap(stats.grads, grads) < 4e-2
    for name, buffer in buffers.items():
        assert torch.equal(buffers_of(kind, aux)[name], buffer)
    return norms


# Autocast around the step


@pytest.mark.parametrize("place", ["z", "last", "weight", "trunk"])
@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_autocast_equals_the_loop(kind, place):
    net, batch = make_net(), make_batch()
    params = make_params(net)
    with autocast():
        found = gn.measure(
            params, loss_of(kind, net), batch, weights=WEIGHTS, where=PLACES[place], norms_only=True, has_aux=True
        )
    norms = check(kind, place, net, found, params, batch, autocast())
    exact = gn.measure(
        *(lambda n, p, b: (p, loss_of(kind, n), b))(*doubled(net, params, batch)), where=PLACES[place], has_aux=True
    )[0]
    assert 1e-5 < gap(found[0].grad_norms, exact.grad_norms) < 3e-2
    assert gap(norms, exact.grad_norms) < 3e-2


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_inside_the_loss(kind):
    net, batch = make_net("layer"), make_batch()
    params = make_params(net)
    for place in ("z", "trunk", "last"):
        found = gn.measure(
            params, loss_of(kind, net, BF16), batch, weights=WEIGHTS, where=PLACES[place], norms_only=True, has_aux=True
        )
        check(kind, place, net, found, params, batch, autocast())


@pytest.mark.parametrize("kind", KINDS)
def test_task_gradients_under_autocast(kind):
    net, batch = make_net(), make_batch()
    params = make_params(net)
    with autocast():
        stats = gn.measure(params, loss_of(kind, net), batch, where="last", has_aux=True)[0]
        gram = gn.task_gramian(loss_of(kind, net), params, batch, where="last", has_aux=True)
    rows = torch.cat([stats.task_grads[name].flatten(1) for name in ("last.bias", "last.weight")], 1)
    assert {rows.dtype, gram.dtype} == {F32}
    assert gap(stats.grad_norms, rows.double().norm(dim=1)) < 1e-5
    assert gap(gram, rows.double() @ rows.double().T) < 1e-4


def test_all_of_state_and_info_are_float32():
    net, batch = make_net(), make_batch()
    for half in (False, True):
        params, data, where = make_params(net), batch, None if half else "outside"
        if half:  # everything in bfloat16, without autocast
            params, data = {k: p.to(BF16) for k, p in params.items()}, tuple(x.to(BF16) for x in batch)
        for kind in KINDS:
            for place in ("z", "last"):
                for balancer in (gn.gradnorm(where=PLACES[place]), gn.fixed_ratio(where=PLACES[place]), gn.static()):
                    with autocast(where=where):
                        grads, state, info, _ = balancer.grad(
                            balancer.init(TASKS), params, loss_of(kind, net), data, has_aux=True
                        )
                    kept = torch.utils._pytree.tree_leaves((state, info))
                    assert {x.dtype for x in kept if x.is_floating_point()} == {F32}
                    assert bool(info.finite)
                    assert all(grads[name].dtype == p.dtype for name, p in params.items())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", ["z", "last", "trunk"])
def test_parameters_in_bfloat16(kind, place):
    net, batch = make_net("layer"), make_batch()
    params = {k: p.to(BF16) for k, p in make_params(net).items()}
    data = tuple(x.to(BF16) for x in batch)
    found = gn.measure(
        params, loss_of(kind, net), data, weights=WEIGHTS, where=PLACES[place], norms_only=True, has_aux=True
    )
    check(kind, place, net, found, params, data, autocast(where=None))


# Normalisation layers, whose backward pass eager PyTorch cannot batch over mixed dtypes


@pytest.mark.parametrize("norm", [name for name in NORMS if name != "none"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:Mismatch dtype")  # RMSNorm says that it is not fused then
def test_normalisation_under_autocast(kind, norm):
    net, batch = make_net(norm), make_batch()
    params = make_params(net)
    for place in ("z", "trunk", "last") + (("norm",) if "without" not in norm else ()):
        where = PLACES[place]
        with autocast():
            found = gn.measure(
                params, loss_of(kind, net), batch, weights=WEIGHTS, where=where, norms_only=True, has_aux=True
            )
        check(kind, place, net, found, params, batch, autocast())


# By Inductor, for the batching rules that eager PyTorch lacks; which takes ten seconds a case.
@pytest.mark.parametrize(
    ("kind", "norm"),
    [
        ("general", "group"),
        ("function", "layer"),
        ("stacked", "layer"),
        *(pytest.param(kind, "batch", marks=pytest.mark.slow) for kind in ("general", "function", "stacked")),
    ],
)
def test_normalisation_compiled(kind, norm):
    net, batch = make_net(norm), make_batch()
    params, loss_fn = make_params(net, False), loss_of(kind, net)
    for place in ("trunk",) if kind != "general" else ("z",):
        with autocast():
            run = torch.compile(
                lambda p, b, at=PLACES[place]: gn.measure(
                    p, loss_fn, b, weights=WEIGHTS, where=at, norms_only=True, has_aux=True
                ),
                fullgraph=True,
            )
            found = run(params, batch)
        check_compiled(kind, place, net, found, params, batch)


@pytest.mark.parametrize(
    ("kind", "place"),
    [*((kind, "z") for kind in KINDS), *((kind, place) for kind in KINDS[:2] for place in ("last", "trunk"))],
)
def test_autocast_compiled(kind, place):
    net, batch = make_net(), make_batch()
    params, loss_fn = make_params(net, False), loss_of(kind, net)
    run = torch.compile(
        lambda p, b: gn.measure(p, loss_fn, b, weights=WEIGHTS, where=PLACES[place], norms_only=True, has_aux=True),
        fullgraph=True,
        backend="aot_eager",
    )
    with autocast():
        check_compiled(kind, place, net, run(params, batch), params, batch)


def check_compiled(kind, place, net, found, params, batch):
    """A compiler may round less often than the loop."""
    stats = found[0]
    assert {stats.losses.dtype, stats.grad_norms.dtype} == {F32}
    assert {g.dtype for g in stats.grads.values()} == {F32}
    with torch.autocast("cpu", enabled=False):
        where = PLACES[place]
        losses, norms, grads, _ = loop(net, params, batch, "" if where is None else where, autocast())
        if where is None and kind not in ("general", "separable"):
            norms = loop_at_z(net, params, batch, autocast())[0]
    assert gap(stats.losses, losses) < 2e-2
    assert gap(stats.grad_norms, norms) < 2e-2
    assert gap(stats.grads, grads) < 4e-2


# What autocast must not touch, and must not remember


def test_backward_runs_as_the_forward_did():
    """A part that the user computes in float32 is differentiated in float32, as by a backward pass outside autocast."""
    torch.manual_seed(0)
    params = {"w": torch.randn(6, 6), "v": torch.randn(6)}
    x = torch.randn(32, 6)

    def losses(p, x):
        with torch.autocast("cpu", enabled=False):
            y = torch.tanh(x @ p["w"]) @ p["v"]
        return [y.square().mean(), y.exp().mean()]

    leaves = {k: p.clone().requires_grad_() for k, p in params.items()}
    with autocast():
        values = losses(leaves, x)
    rows = [
        torch.cat([g.flatten() for g in torch.autograd.grad(v, list(leaves.values()), retain_graph=True)])
        for v in values
    ]
    norms = torch.stack([row.norm() for row in rows])
    assert bool((norms > 0).all())
    separable = gn.multi_task_loss(None, [lambda p, x: losses(p, x)[0], lambda p, x: losses(p, x)[1]])
    seam = gn.multi_task_loss(lambda p, x: x, [lambda p, z, x: losses(p, z)[0], lambda p, z, x: losses(p, z)[1]])
    weights = torch.tensor([0.3, 1.7])
    expected = 0.3 * rows[0] + 1.7 * rows[1]
    for loss_fn, where in ((losses, None), (losses, "w"), (separable, None), (seam, ["v", "w"])):
        with autocast():
            stats = gn.measure(params, loss_fn, x, weights=weights, where=where)
        grads = torch.cat([stats.grads[k].flatten() for k in params])
        torch.testing.assert_close(grads, expected, rtol=1e-5, atol=1e-6)
        if where != "w":
            torch.testing.assert_close(stats.grad_norms, norms, rtol=1e-5, atol=0)


def test_norms_leave_the_range_of_float16(monkeypatch):
    """The Gram identity squares before it sums: H Hᵀ overflows float16 here, and B Bᵀ underflows."""
    monkeypatch.setattr(linear, "WORTH", 0)  # which a problem so small would not be
    torch.manual_seed(0)
    params = {"w": 0.05 * torch.randn(48, 48)}
    h, y = 90 * torch.rand(4, 48), torch.randn(4, 48)
    loss_fn = gn.multi_task_loss(
        lambda p, x: x,
        [lambda p, z, x: (1e-3 * z * y).mean(), lambda p, z, x: z.square().mean()],
        last_shared=gn.shared_linear("w"),
    )
    leaf = params["w"].clone().requires_grad_()
    with autocast(F16):
        losses = loss_fn({"w": leaf}, h)
        found = gn.task_grad_norms(loss_fn, params, h, where="w")
    expected = torch.stack([torch.autograd.grad(loss, leaf, retain_graph=True)[0].norm() for loss in losses])
    assert float((h @ h.T).max()) > 65504
    assert bool((expected > 0).all())
    assert gap(found, expected) < 5e-3


@pytest.mark.parametrize("kind", KINDS)
def test_twice_in_one_autocast_with_parameters_changed_in_place(kind):
    net, batch = make_net(), make_batch()
    params, loss_fn = make_params(net), loss_of(kind, net)
    for where in ("last", "trunk.0"):
        for weights in (None, WEIGHTS):

            def run(where=where, weights=weights):
                with autocast():  # of its own if called outside, the same one if called inside
                    return gn.measure(params, loss_fn, batch, where=where, weights=weights, has_aux=True)[0]

            with autocast():
                before = run()
                with torch.no_grad():
                    for p in params.values():
                        p.mul_(1.25)
                after = run()
            assert gap(after.losses, before.losses) > 0.01
            assert torch.equal(after.losses, run().losses)
            assert torch.equal(after.grad_norms, run().grad_norms)


@pytest.mark.parametrize("kind", KINDS)
def test_a_long_autocast_keeps_nothing_of_a_pass(kind):
    """Casts of what torch.func wraps would stay in autocast's cache until the autocast ends, of every pass anew."""
    net, batch = make_net(), make_batch()
    params, loss_fn = make_params(net), loss_of(kind, net)
    with autocast():
        gn.measure(params, loss_fn, batch, weights=WEIGHTS, has_aux=True)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            gn.measure(params, loss_fn, batch, weights=WEIGHTS, has_aux=True)
            gc.collect()
    sizes = [event.self_cpu_memory_usage for event in profile.events()]
    assert max(sizes) > 0
    assert sum(sizes) == 0


# float16 and the loss scale


def small_seam(net, factor=1e-6, kind="function"):
    inner = loss_of(kind, net)
    if kind == "separable":
        scaled = [lambda p, b, f=f: (factor * f(p, b)[0].float(), ()) for f in inner.functions]
        return gn.multi_task_loss(None, scaled, has_aux=True)
    heads = [lambda p, z, b, f=f: (factor * f(p, z, b)[0].float(), ()) for f in inner.functions]
    return gn.multi_task_loss(inner.backbone, heads, last_shared=inner.last_shared, has_aux=True)


def small_loss(kind, net):
    if kind != "general":
        return small_seam(net, kind=kind)
    inner = loss_of("general", net)
    return lambda p, b: ([1e-6 * loss.float() for loss in inner(p, b)[0]], ())


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("place", ["z", "last", "trunk"])
@pytest.mark.parametrize("kind", ["general", "function", "seam", "separable"])
def test_loss_scale_saves_gradients_from_underflow(kind, place, as_tensor):
    net, batch = make_net("layer"), make_batch()
    params, loss_fn, where = make_params(net), small_loss(kind, net), PLACES[place]
    scale = torch.tensor(2.0**18) if as_tensor else 2.0**18

    def run(**keywords):
        with autocast(F16):
            return gn.measure(params, loss_fn, batch, where=where, has_aux=True, **keywords)[0]

    exact = gn.measure(params, loss_fn, batch, where=where, has_aux=True, weights=WEIGHTS)[0]
    assert bool((exact.grad_norms > 0).all())
    lost, kept = run(weights=WEIGHTS), run(weights=WEIGHTS, loss_scale=scale)
    assert bool((lost.grad_norms[2] == 0) | (gap(lost.grad_norms, exact.grad_norms) > 0.05))
    assert kept.grad_norms.dtype == F32
    assert gap(kept.losses, exact.losses) < 3e-3
    assert gap(kept.grad_norms, exact.grad_norms) < 3e-3
    assert gap({k: g / scale for k, g in kept.grads.items()}, exact.grads) < 1e-2
    by_norm = run(weights=lambda stats: WEIGHTS + 0 * stats.grad_norms, loss_scale=scale)
    assert gap(by_norm.grads, kept.grads) < 1e-2
    alone = run(loss_scale=scale)
    assert gap(alone.grad_norms, exact.grad_norms) < 3e-3
    if not isinstance(exact.example_norms, torch.Tensor):
        rows = torch.cat([g.flatten(1) for g in torch.utils._pytree.tree_leaves(kept.task_grads)], 1)
        assert rows.dtype == F32
        assert gap(rows.norm(dim=1), exact.grad_norms) < 3e-3
    if isinstance(exact.example_norms, torch.Tensor):
        assert gap(kept.example_norms, exact.example_norms) < 3e-3
    parts = gn.merge(run(weights=WEIGHTS, loss_scale=scale), run(weights=WEIGHTS, loss_scale=scale))
    assert gap(parts.grads, kept.grads) < 1e-3


def test_without_a_loss_scale_they_are_exactly_zero():
    net, batch = make_net(), make_batch()
    params, loss_fn = (
        make_params(net),
        gn.multi_task_loss(
            lambda p, b: gn.functional(net["trunk"], "trunk", buffers=False)(p, b[0]),
            [lambda p, z, b, i=i: 1e-8 * z[:, i].float().square().mean() for i in range(TASKS)],
        ),
    )
    for where in (None, "trunk.0"):
        exact = gn.task_grad_norms(loss_fn, params, batch, where=where)
        with autocast(F16):
            lost = gn.task_grad_norms(loss_fn, params, batch, where=where)
            state, info = gn.gradnorm_grad(
                gn.init_state(TASKS), params, loss_fn, batch, where=where, loss_scale=2.0**24, form="paper"
            )[1:]
        assert torch.equal(lost, torch.zeros(TASKS))
        assert gap(info.grad_norms, exact) < 3e-3
        assert bool(info.finite)
        assert int(state.step) == 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", ["z", "trunk"])
def test_overflow_leaves_the_state_alone(kind, place):
    net, batch = make_net("layer"), make_batch()
    params, loss_fn = make_params(net), loss_of(kind, net)
    for balancer in (gn.gradnorm(where=PLACES[place]), gn.fixed_ratio(where=PLACES[place])):
        state = balancer.init(TASKS)
        with autocast(F16):
            _, state, info, _ = balancer.grad(state, params, loss_fn, batch, has_aux=True, loss_scale=64.0)
            assert bool(info.finite)
            _, after, info, _ = balancer.grad(state, params, loss_fn, batch, has_aux=True, loss_scale=2.0**30)
            assert not bool(info.finite)
            updated, _ = balancer.update(state, params, loss_fn, batch, has_aux=True, loss_scale=2.0**30)
        for new in (after, updated):
            pairs = zip(torch.utils._pytree.tree_leaves(new), torch.utils._pytree.tree_leaves(state), strict=True)
            assert all(torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) for a, b in pairs)


def deep(params, x):
    """The forward pass and the gradient at z stay small, but in between the gradient is multiplied by b."""
    return (1e-3 * (x @ params["a"])) @ params["b"]


DEEP = gn.multi_task_loss(deep, [lambda p, z, x: z.float().mean(), lambda p, z, x: z.float().square().mean()])


def test_overflow_in_the_backbone_alone():
    torch.manual_seed(0)
    params, x = {"a": torch.randn(4, 4), "b": 1e3 * torch.randn(4, 4)}, torch.randn(6, 4)
    state = gn.init_state(2)
    with autocast(F16):
        good = gn.gradnorm_grad(state, params, DEEP, x, loss_scale=1.0)
        grads, new, info = gn.gradnorm_grad(state, params, DEEP, x, loss_scale=2.0**10)
    assert bool(good[2].finite)
    assert bool(info.grad_norms.isfinite().all())
    assert not all(bool(g.isfinite().all()) for g in grads.values())
    assert not bool(info.finite)
    assert torch.equal(new.weights, state.weights)
    assert int(new.step) == 0


@pytest.mark.parametrize("kind", ["general", "seam"])
def test_a_loop_with_grad_scaler_recovers(kind):
    net, batch = make_net("layer"), make_batch()
    model = nn.ParameterDict({k.replace(".", "_"): nn.Parameter(p) for k, p in make_params(net, False).items()})
    params = lambda: {k: model[k.replace(".", "_")] for k in make_params(net, False)}
    loss_fn, state = loss_of(kind, net), gn.init_state(TASKS)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**26)
    totals, refused = [], 0
    for _ in range(80):
        scale = scaler.scale(torch.ones(()))  # the scale as a tensor, which waits for nothing
        before, held = scaler.get_scale(), [p.detach().clone() for p in model.parameters()]
        with autocast(F16):
            grads, new, info, _ = gn.gradnorm_grad(
                state, params(), loss_fn, batch, where="last", alpha=0.5, form="paper", has_aux=True, loss_scale=scale
            )
        for name, grad in grads.items():
            model[name.replace(".", "_")].grad = grad
        scaler.step(optimizer)
        scaler.update()
        if not bool(info.finite):
            refused += 1
            assert scaler.get_scale() == before / 2
            assert all(torch.equal(a, b) for a, b in zip(held, model.parameters(), strict=True))
            assert torch.equal(new.weights, state.weights)
            assert torch.equal(new.initial_losses.isnan(), state.initial_losses.isnan())
            assert int(new.step) == int(state.step)
        else:
            assert scaler.get_scale() == before
        state = new
        totals.append(info.losses)
    assert refused >= 3
    assert int(state.step) == 80 - refused
    assert float(totals[-1].sum()) < 0.7 * float(totals[0].sum())
    assert float((state.weights - 1).abs().max()) > 0.05


def test_a_loss_scale_that_changes_is_one_graph():
    net, batch = make_net(), make_batch()
    params = make_params(net, False)
    for kind in ("general", "seam", "separable"):
        loss_fn, counter = loss_of(kind, net), CompileCounterWithBackend("aot_eager")
        step = torch.compile(
            lambda w, p, b, s, f=loss_fn: gn.gradnorm_grad(w, p, f, b, where="last", has_aux=True, loss_scale=s),
            fullgraph=True,
            backend=counter,
        )
        state = gn.init_state(TASKS)
        with autocast(F16):
            for power in (0, 4, 7, 30):
                scale = torch.tensor(2.0**power)
                expected = gn.gradnorm_grad(state, params, loss_fn, batch, where="last", has_aux=True, loss_scale=scale)
                found = step(state, params, batch, scale)
                assert bool(found[2].finite) == bool(expected[2].finite) == (power < 30)
                torch.testing.assert_close(found[1], expected[1], rtol=1e-3, atol=1e-5, equal_nan=True)
                state = found[1]
        assert counter.frame_count == 1


@pytest.mark.parametrize("scale", [0, -1.0, float("inf"), float("nan"), torch.ones(2)])
def test_a_loss_scale_that_cannot_be(scale):
    with pytest.raises(ValueError, match="loss_scale"):
        gn.measure(torch.ones(2), lambda w, b: [w.sum(), w.prod()], None, loss_scale=scale)
