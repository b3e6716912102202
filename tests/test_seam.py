"""The seam engine's own ways: a linear last layer, stacked heads, check."""

from __future__ import annotations

from itertools import product
from typing import Any

import optree
import pytest
import torch
from models import MAKERS, WEIGHTS, make
from oracle import assert_free, assert_near, assert_same_sum, assert_untouched, norm, reference, snapshot
from torch import Tensor, nn
from torch.nn import functional as F

import gradnorm_func as gn
from gradnorm_func._measure import linear, seam

LASTS = ("within", "function", "linear")
D = {"dtype": torch.float64}


def weights_of(order: str) -> Tensor:
    return torch.tensor([WEIGHTS[name] for name in order], **D)


@pytest.mark.parametrize("activation", [None, torch.tanh, lambda y: y.softmax(-1)], ids=["none", "tanh", "softmax"])
@pytest.mark.parametrize(("bias", "wanted"), [(False, "w"), (True, "w"), (True, "b"), (True, "wb")])
@pytest.mark.parametrize(("shape", "branch"), [((3,), "gram"), ((2, 2), "gram"), ((50,), "direct"), ((5, 9), "direct")])
def test_shared_linear(
    shape: tuple[int, ...], branch: str, bias: bool, activation: Any, wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both ways to the norms at W, rows of h along one axis or several, weight and bias alone and together."""
    d, rows = {"dtype": torch.float64}, []
    params = {"v": torch.randn(5, 12, **d), "w": torch.randn(10, 12, **d)} | (
        {"b": torch.randn(10, **d)} if bias else {}
    )
    x, y = torch.randn(*shape, 5, **d), torch.randn(*shape, **d)
    heads = {
        "c": lambda p, z, batch: (z.sum(-1) - batch[1]).square().mean(),
        "a": lambda p, z, batch: z.exp().sum(-1).log().mean(),
        "b": lambda p, z, batch: 100 * z[..., 0].sin().mean(),
    }
    layer = gn.shared_linear("w", "b" if bias else None, activation)
    loss_fn = gn.multi_task_loss(lambda p, batch: batch[0] @ p["v"], heads, last_shared=layer)

    leaves = {path: leaf.clone().requires_grad_() for path, leaf in params.items()}
    out = F.linear(x @ leaves["v"], leaves["w"], leaves.get("b"))
    z = out if activation is None else activation(out)
    ref = reference({name: head(None, z, (x, y)) for name, head in heads.items()}, [leaves[i] for i in wanted], WEIGHTS)
    expected = torch.stack([norm(ref.rows[name]) for name in "abc"])
    assert bool((expected > 0).all())

    one = linear._norm
    monkeypatch.setattr(linear, "WORTH", 0)
    monkeypatch.setattr(linear, "_norm", lambda *args: rows.append(1) or one(*args))
    assert_near(gn.task_grad_norms(loss_fn, params, (x, y), where=list(wanted)), expected)
    assert bool(rows) == (branch == "direct" or wanted == "b")
    stats = gn.measure(params, loss_fn, (x, y), weights=weights_of("abc"), where=list(wanted), norms_only=True)
    assert_near(stats.grad_norms, expected)
    assert_same_sum([stats.grads[path] for path in wanted], ref.total)
    monkeypatch.setattr(seam, "SMALL", 0)  # the way of large layers, by two backward passes
    stats = gn.measure(params, loss_fn, (x, y), weights=weights_of("abc"), where=list(wanted), norms_only=True)
    assert_near(stats.grad_norms, expected)
    assert_same_sum([stats.grads[path] for path in wanted], ref.total)
    _, grads = gn.task_grads(loss_fn, params, (x, y), where=list(wanted))
    for i, path in enumerate(wanted):
        assert_near(grads[path], torch.stack([ref.rows[name][i] for name in "abc"]), path)


# ---- stacked heads


@pytest.mark.parametrize("last", LASTS)
@pytest.mark.parametrize("place", [None, "last.weight", ["last"], "trunk", ["heads.weight", "last"], "heads.bias"])
def test_stacked_heads(place: Any, last: str) -> None:
    """Four heads made by stack_module_state, each with its own part of the batch."""
    case, num_tasks = make("mlp"), 4
    heads = [nn.Linear(4, 2, dtype=torch.float64) for _ in range(num_tasks)]
    stacked, _ = torch.func.stack_module_state(heads)
    shared = {path: leaf for path, leaf in case.params().items() if not path.startswith("heads")}
    params = shared | {f"heads.{name}": leaf.detach() for name, leaf in stacked.items()}
    batch = (case.batch[0], torch.randn(8, num_tasks, 2, dtype=torch.float64))

    def head(p: dict[str, Tensor], z: Tensor, batch: Any) -> Tensor:
        return (torch.func.functional_call(heads[0], p, (z,)) - batch[1]).square().mean()

    given = case.seam(last)
    loss_fn = gn.multi_task_loss(
        given.backbone, gn.stacked_heads(head, "heads", batch_dims=(None, 1)), last_shared=given.last_shared
    )

    leaves = {path: leaf.clone().requires_grad_() for path, leaf in params.items()}
    h = torch.tanh(F.linear(batch[0], leaves["trunk.0.weight"], leaves["trunk.0.bias"]))
    z = torch.tanh(F.linear(h, leaves["last.weight"], leaves["last.bias"]))
    losses = {}
    for i, name in enumerate("abcd"):
        y = F.linear(z, leaves["heads.weight"][i], leaves["heads.bias"][i])
        losses[name] = (y - batch[1][:, i]).square().mean()
    paths = sorted(p for p in params if p.startswith(tuple([place] if isinstance(place, str) else place or ())))
    ref = reference(losses, [z] if place is None else [leaves[path] for path in paths], WEIGHTS)
    total = reference(losses, list(leaves.values()), WEIGHTS).total
    expected = torch.stack([norm(row) for row in ref.rows.values()])
    assert bool((expected > 0).all())
    for _ in range(2):
        stats = gn.measure(params, loss_fn, batch, weights=weights_of("abcd"), where=place)
        assert_near(stats.losses, torch.stack([loss.detach() for loss in losses.values()]))
        assert_near(stats.grad_norms, expected)
        assert_same_sum(list(stats.grads.values()), total)
        assert_near(gn.task_grad_norms(loss_fn, params, batch, where=place), expected)
        found, grads = gn.task_grads(loss_fn, params, batch, where=place)
        assert found.shape == (num_tasks,)
        for i, leaf in enumerate(optree.tree_leaves(grads)):
            assert_near(leaf, torch.stack([row[i] for row in ref.rows.values()]), str(i))


# ---- who reads what: found out at the first call, and never trusted blindly


class Switched:
    """A model whose parts read other parameters when a Python flag is turned."""

    def __init__(self, kind: str) -> None:
        self.kind, self.on = kind, False
        self.frozen = nn.Linear(3, 3, **D)  # its parameters require grad, and are not among params

    def params(self) -> dict[str, Tensor]:
        shapes = {"trunk": (4, 3), "block": (3, 3), "last": (3, 3), "head": (3,), "other": (3,), "spare": (3, 3)}
        return {path: torch.randn(shape, **D) for path, shape in shapes.items()}

    def backbone(self, p: dict[str, Tensor], x: Tensor) -> Tensor:
        h = torch.tanh(x @ p["trunk"])
        if self.kind != "a block is skipped" or self.on:
            h = h + torch.sin(h @ p["block"])
        if self.on and self.kind == "the trunk reads a head":
            h = h * p["head"]
        if self.on and self.kind == "the trunk reads what none read":
            h = h @ p["spare"]
        if self.kind == "a frozen part in the trunk":
            h = self.frozen(h)
        return h

    def last(self, p: dict[str, Tensor], h: Tensor) -> Tensor:
        return torch.tanh(h @ p["last"].T)

    def head(self, p: dict[str, Tensor], z: Tensor, x: Tensor) -> Tensor:
        if self.on and self.kind == "a head reads the trunk":
            z = z + x @ p["trunk"]
        if self.on and self.kind == "a head reads the last layer":
            z = z @ p["last"]
        if self.on and self.kind == "a head reads another's":
            z = z * p["other"]
        if self.on and self.kind == "a head reads what none read":
            z = z @ p["spare"]
        if self.on and self.kind == "a head stops reading its own":
            return z.square().mean()
        if self.kind == "a frozen part in a head":
            z = self.frozen(z)
        return (z @ p["head"]).square().mean()

    def loss_fn(self, last: str) -> gn._core.loss.MultiTaskLoss:
        heads = {
            "a": self.head,
            "b": lambda p, z, x: (z @ p["other"]).exp().mean(),
            "c": lambda p, z, x: 5 * z.sin().sum(-1).square().mean(),
        }
        if last == "within":
            return gn.multi_task_loss(lambda p, x: self.last(p, self.backbone(p, x)), heads)
        last_shared = self.last if last == "function" else gn.shared_linear("last", None, torch.tanh)
        return gn.multi_task_loss(self.backbone, heads, last_shared=last_shared)


KINDS = [
    "a head reads the trunk",
    "a head reads the last layer",
    "a head reads another's",
    "a head reads what none read",
    "a head stops reading its own",
    "the trunk reads a head",
    "the trunk reads what none read",
    "a block is skipped",
    "a frozen part in the trunk",
    "a frozen part in a head",
]


def assert_exact(loss_fn: gn._core.loss.MultiTaskLoss, params: Any, x: Any, where: Any, weights: Any) -> None:
    """One measurement against classic autograd through the same functions."""
    leaves = {path: leaf.clone().requires_grad_() for path, leaf in params.items()}
    chosen = [where] if isinstance(where, str) else sorted(where) if where else []
    total = reference(loss_fn(leaves, x), list(leaves.values()), WEIGHTS).total
    if where is None:
        z = loss_fn.shared(leaves, x)[0].detach().requires_grad_()
        losses, wrt = {name: head(leaves, z, x) for name, head in loss_fn.heads.items()}, [z]
    else:
        losses, wrt = loss_fn(leaves, x), [leaves[path] for path in chosen]
    ref = reference(losses, wrt, WEIGHTS)
    if weights is None:
        found, grads = gn.task_grads(loss_fn, params, x, where=where)
        assert_free((found, grads))
        for i, leaf in enumerate(optree.tree_leaves(grads)):
            assert_near(leaf, torch.stack([ref.rows[name][i] for name in "abc"]), f"leaf {i}", norm(leaf))
    stats = gn.measure(params, loss_fn, x, where=where, weights=weights)
    assert_free(stats)
    assert_near(stats.losses, torch.stack([ref.losses[name] for name in "abc"]))
    assert_near(stats.grad_norms, torch.stack([norm(ref.rows[name]) for name in "abc"]))
    assert norm([stats.grad_norms]) > 0
    if weights is not None:
        assert_same_sum([stats.grads[path] for path in params], total)


PLACES = {"z": None, "trunk": "trunk", "last": "last", "two": ["block", "head"], "three": ["head", "spare", "trunk"]}
# All but the one thing that a head must not do; for that see test_check_names_the_head.
CHANGES = [row for row in product(KINDS, LASTS[1:], PLACES) if row != ("a head reads the last layer", "linear", "last")]


@pytest.mark.parametrize("flags", [(0, 1, 0), (1, 0, 1)], ids=["off first", "on first"])
@pytest.mark.parametrize(("kind", "last", "place"), CHANGES)
def test_a_part_reads_something_else(kind: str, last: str, place: str, flags: tuple[int, ...]) -> None:
    """At every call the gradients are those of what the parts read then."""
    model = Switched(kind)
    loss_fn, params, x = model.loss_fn(last), model.params(), torch.randn(6, 4, **D)
    before = snapshot((params, x))
    for flag in flags:
        model.on = bool(flag)
        for weights in (weights_of("abc"), None):
            assert_exact(loss_fn, params, x, PLACES[place], weights)
    assert_untouched(before)
    assert all(p.grad is None for p in model.frozen.parameters())


@pytest.mark.parametrize("first", [None, "trunk", "last", ["head", "trunk"]])
@pytest.mark.parametrize("weighted", [True, False])
def test_one_loss_serves_every_kind_of_pass(first: Any, weighted: bool) -> None:
    """Whichever pass comes first, the others are as exact after it."""
    model = Switched("plain")
    loss_fn, params, x = model.loss_fn("function"), model.params(), torch.randn(6, 4, **D)
    assert_exact(loss_fn, params, x, first, weights_of("abc") if weighted else None)
    for where in (None, "trunk", "last", ["head", "trunk"]):
        for weights in (weights_of("abc"), None):
            assert_exact(loss_fn, params, x, where, weights)


@pytest.mark.parametrize("where", [None, "trunk"])
def test_aux_alone_reads_something(where: Any) -> None:
    """What only aux reads is none of the gradients' business, and aux carries no graph either."""
    frozen = nn.Linear(3, 2, **D)

    def head(p: dict[str, Tensor], z: Tensor, x: Tensor) -> Any:
        return (z @ p["head"]).square().mean(), {"l2": p["trunk"].square().sum(), "seen": frozen(z)}

    loss_fn = gn.multi_task_loss(
        lambda p, x: (torch.tanh(x @ p["trunk"]), p["head"].abs().sum()),
        [head, lambda p, z, x: (z.exp().mean(), None)],
        has_aux=True,
    )
    params, x = Switched("plain").params(), torch.randn(6, 4, **D)
    for _ in range(3):
        stats, aux = gn.measure(params, loss_fn, x, weights=torch.ones(2, **D), where=where, has_aux=True)
        assert_free((stats, aux))
        assert_near(aux[0], params["head"].abs().sum())
        assert_near(aux[1][0]["l2"], params["trunk"].square().sum())


@pytest.mark.parametrize("where", [None, "trunk", "last"])
@pytest.mark.parametrize("last", LASTS)
def test_dropout_is_drawn_once(last: str, where: Any) -> None:
    """One forward pass, in the order of the model's own: with one seed, the same masks and gradients as autograd."""
    model = Switched("plain")
    plain = model.loss_fn(last)
    drop = lambda fn: lambda p, z, *rest: fn(p, F.dropout(z, 0.5), *rest)
    heads = {name: drop(head) for name, head in plain.heads.items()}
    loss_fn = gn.multi_task_loss(drop(plain.backbone), heads, last_shared=plain.last_shared)
    params, x = model.params(), torch.randn(6, 4, **D)
    leaves = {path: leaf.clone().requires_grad_() for path, leaf in params.items()}
    for call in range(3):
        torch.manual_seed(call)
        losses = loss_fn(leaves, x)
        total = reference(losses, list(leaves.values()), WEIGHTS).total
        torch.manual_seed(call)
        stats = gn.measure(params, loss_fn, x, weights=weights_of("abc"), where=where)
        assert_near(stats.losses, torch.stack([losses[name].detach() for name in "abc"]))
        assert_same_sum(list(stats.grads.values()), total)


# ---- z of other shapes


@pytest.mark.parametrize("stacked", [False, True], ids=["heads", "stacked"])
@pytest.mark.parametrize("shape", [(), (5,), (5, 2, 3)])
def test_z_of_any_shape(shape: tuple[int, ...], stacked: bool) -> None:
    params = {"trunk": torch.randn(shape, **D), "heads.w": torch.randn(3, **D)}
    one = lambda w, z: (w * z).sin().square().mean()
    listed = [lambda p, z, x, i=i: one(p["heads.w"][i], z) for i in range(3)]
    heads = gn.stacked_heads(lambda p, z, x: one(p["w"], z), "heads") if stacked else listed
    loss_fn = gn.multi_task_loss(lambda p, x: p["trunk"].exp(), heads)
    leaves = {path: leaf.clone().requires_grad_() for path, leaf in params.items()}
    z = leaves["trunk"].exp()
    losses = {name: one(leaves["heads.w"][i], z) for i, name in enumerate("abc")}
    ref = reference(losses, [z], WEIGHTS)
    for _ in range(2):
        stats = gn.measure(params, loss_fn, None, weights=weights_of("abc"))
        assert_near(stats.grad_norms, torch.stack([norm(row) for row in ref.rows.values()]))
        assert_same_sum(list(stats.grads.values()), reference(losses, list(leaves.values()), WEIGHTS).total)


# ---- check


@pytest.mark.parametrize("last", LASTS)
@pytest.mark.parametrize("name", [name for name in MAKERS if make(name).last])
def test_check_passes_honest_models(name: str, last: str) -> None:
    case = make(name)
    for place in case.where:
        gn.check(case.seam(last), case.params(), case.batch, where=case.where[place], has_aux=case.has_aux)


@pytest.mark.parametrize("wrap", [dict, lambda heads: list(heads.values())], ids=["dict", "list"])
@pytest.mark.parametrize("path", ["last.weight", "last.bias"])
def test_check_names_the_head(path: str, wrap: Any) -> None:
    """A head that reads W past z: its norm at W is wrong, and the check tells; the training gradient is right."""
    case = make("mlp")
    honest = case.seam("linear")
    sly = lambda p, z, batch: honest.heads["b"](p, z, batch) + p[path].square().mean()
    loss_fn = gn.multi_task_loss(honest.backbone, wrap(honest.heads | {"b": sly}), last_shared=honest.last_shared)
    name = "b" if wrap is dict else "2"
    with pytest.raises(ValueError, match=rf"task '{name}' at '{path}' \(relative") as caught:
        gn.check(loss_fn, case.params(), case.batch, where="last")
    assert str(caught.value).count("relative difference") == 1
    gn.check(loss_fn, case.params(), case.batch, where="trunk")
    gn.check(loss_fn, case.params(), case.batch)


def test_check_finds_randomness() -> None:
    case = make("mlp")
    honest = case.seam("within")
    noisy = honest.heads | {"c": lambda p, z, batch: F.dropout(z, 0.5).square().mean()}
    with pytest.raises(ValueError, match=r"the loss of 'c' is random \(dropout"):
        gn.check(gn.multi_task_loss(honest.backbone, noisy), case.params(), case.batch, where="trunk")


def test_check_is_for_any_loss() -> None:
    case = make("mlp")
    assert gn.check(case.loss_fn(), case.params(), case.batch) == []
