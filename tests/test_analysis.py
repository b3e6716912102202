"""The analysis functions against autograd, under transforms and torch.compile; and merging of micro-batches."""

from __future__ import annotations

from functools import partial
from typing import Any

import optree
import pytest
import torch
from models import WEIGHTS, Case, make
from oracle import assert_free, assert_near, assert_same_sum, norm
from torch import Tensor

import gradnorm_func as gn

D = {"dtype": torch.float64}
FORMS = ["general", "within", "function", "linear"]
TABLE = [(name, form, place) for name in ("mlp", "tied") for form in FORMS for place in ("z", "layer", "early", "all")]


def weights_of(order: str) -> Tensor:
    return torch.tensor([WEIGHTS[name] for name in order], **D)


def in_form(case: Case, form: str) -> Any:
    return case.loss_fn() if form == "general" else case.seam(form)


def rows_of(case: Case, form: str, place: str) -> Tensor:
    """(T, numel of W): the reference's task gradients, flat, in task order."""
    ref = case.reference(case.where[place], at_z=place == "z" and form != "general")
    rows = torch.stack([torch.cat([g.flatten() for g in ref.rows[name]]) for name in "abc"])
    assert bool((rows.norm(dim=1) > 0).all())
    return rows


@pytest.mark.parametrize("no_grad", [False, True], ids=["grad", "no_grad"])
@pytest.mark.parametrize(("name", "form", "place"), TABLE)
def test_against_autograd(name: str, form: str, place: str, no_grad: bool) -> None:
    case = make(name)
    loss_fn, rows = in_form(case, form), rows_of(case, form, place)
    args, gram = (loss_fn, case.params(requires_grad=True), case.batch), rows @ rows.T
    with torch.no_grad() if no_grad else torch.enable_grad():
        for _ in range(2):
            found = {
                f: f(*args, where=case.where[place])
                for f in (gn.task_grads, gn.task_grad_norms, gn.task_gramian, gn.task_cosine_similarity)
            }
            assert_free(list(found.values()))
            flat = torch.cat([leaf.flatten(1) for leaf in optree.tree_leaves(found[gn.task_grads][1])], 1)
            assert_near(flat, rows, scale=rows.norm())
            assert_near(found[gn.task_grad_norms], rows.norm(dim=1))
            assert_near(found[gn.task_gramian], gram)
            assert_near(found[gn.task_cosine_similarity], gram / rows.norm(dim=1).outer(rows.norm(dim=1)))
    assert all(leaf.grad is None for leaf in args[1].values())


def test_cosine_of_a_zero_gradient() -> None:
    loss_fn = lambda w, x: [w.square().sum(), w.sum() * 0, -w.square().sum()]
    expected = torch.tensor([[1.0, 0, -1], [0, 0, 0], [-1, 0, 1]], **D)
    assert_near(gn.task_cosine_similarity(loss_fn, torch.randn(5, **D), None), expected)


# ---- under transforms


def classic(case: Case, form: str, place: str, params: dict[str, Tensor], create_graph: bool = False) -> list[Any]:
    """Per task, the gradients at W for any params, by autograd through the model's plain functions."""
    if place == "z" and form != "general":
        seam = case.seam("within")
        z = seam.backbone(params, case.batch)
        losses, wrt = [seam.heads[name](params, z, case.batch) for name in "abc"], [z]
    else:
        losses = [case.loss_fn()(params, case.batch)[name] for name in "abc"]
        wrt = [params[path] for path in case.paths(case.where[place])]
    found = [
        torch.autograd.grad(
            x, wrt, retain_graph=True, create_graph=create_graph, allow_unused=True, materialize_grads=True
        )
        for x in losses
    ]
    assert all(norm(list(row)) > 0 for row in found)
    return found


@pytest.mark.parametrize(("name", "form", "place"), TABLE)
def test_under_vmap(name: str, form: str, place: str) -> None:
    """A batch of parameters, as of an ensemble: each member as if alone."""
    case, members = make(name), 3
    loss_fn, where = in_form(case, form), case.where[place]
    each = [{path: leaf + 0.3 * torch.randn_like(leaf) for path, leaf in case.params().items()} for _ in range(members)]
    stacked = {path: torch.stack([params[path] for params in each]) for path in each[0]}
    measure = lambda p: gn.measure(p, loss_fn, case.batch, where=where, weights=weights_of("abc"))
    stats = torch.func.vmap(measure)(stacked)
    gram = torch.func.vmap(lambda p: gn.task_gramian(loss_fn, p, case.batch, where=where))(stacked)
    norms = torch.func.vmap(lambda p: gn.task_grad_norms(loss_fn, p, case.batch, where=where))(stacked)
    for i, params in enumerate(each):
        leaves = {path: leaf.clone().requires_grad_() for path, leaf in params.items()}
        found = classic(case, form, place, leaves)
        rows = torch.stack([torch.cat([g.flatten() for g in row]) for row in found]).detach()
        assert_near(gram[i], rows @ rows.T)
        assert_near(norms[i], rows.norm(dim=1))
        assert_near(stats.grad_norms[i], rows.norm(dim=1))
        losses = case.loss_fn()(leaves, case.batch)
        total = sum(WEIGHTS[name] * loss for name, loss in losses.items())
        total_grads = torch.autograd.grad(total, list(leaves.values()), allow_unused=True, materialize_grads=True)
        assert_same_sum([stats.grads[path][i] for path in leaves], list(total_grads))


@pytest.mark.parametrize(("name", "form", "place"), TABLE)
def test_under_grad(name: str, form: str, place: str) -> None:
    """A function of the norms is differentiated itself: the double backward pass."""
    case, c = make(name), torch.tensor([1.0, -2.0, 0.5], **D)
    loss_fn = in_form(case, form)

    def penalty(params: dict[str, Tensor]) -> Tensor:
        norms = gn.task_grad_norms(loss_fn, params, case.batch, where=case.where[place])
        return (c * norms).sum() + norms.square().prod()

    found = torch.func.grad(penalty)(case.params())
    leaves = case.params(requires_grad=True)
    rows = classic(case, form, place, leaves, create_graph=True)
    norms = torch.stack([torch.cat([g.flatten() for g in row]).norm() for row in rows])
    value = (c * norms).sum() + norms.square().prod()
    expected = torch.autograd.grad(value, list(leaves.values()), allow_unused=True, materialize_grads=True)
    size = norm(list(expected))
    assert size > 0
    for path, gradient in zip(leaves, expected, strict=True):
        assert_near(found[path], gradient, path, size)


@pytest.mark.parametrize("rows", [2, 40], ids=["gram", "direct"])
@pytest.mark.parametrize("of", [gn.task_grad_norms, gn.task_cosine_similarity], ids=["norms", "cosines"])
@pytest.mark.parametrize("form", ["general", "z", "weight"])
def test_under_grad_at_a_zero_gradient(form: str, of: Any, rows: int) -> None:
    """A norm has no derivative at zero; the one taken is 0, so that a dead task spoils nothing with NaN."""
    params, x = {"w": torch.randn(10, 12, **D)}, torch.randn(rows, 12, **D)
    heads = [lambda p, z, x: z.square().mean(), lambda p, z, x: 0 * z.sum(), lambda p, z, x: z.exp().mean()]

    def value(params: Any, heads: Any) -> Tensor:
        loss_fn = gn.multi_task_loss(lambda p, x: x, heads, last_shared=gn.shared_linear("w", None, torch.tanh))
        plain = loss_fn if form != "general" else lambda p, x: loss_fn(p, x)
        return (of(plain, params, x, where="w" if form == "weight" else None) + 1).square().sum()

    found = torch.func.grad(value)(params, heads)["w"]
    assert norm([found]) > 0
    assert_near(found, torch.func.grad(value)(params, heads[::2])["w"])


def test_under_vmap_of_grad() -> None:
    """Both, and with respect to the batch."""
    case = make("mlp")
    loss_fn, params, (x, y) = case.seam("linear"), case.params(), case.batch
    penalty = lambda x: gn.task_grad_norms(loss_fn, params, (x, y), where="last.weight").sum()
    found = torch.func.vmap(torch.func.grad(penalty))(torch.stack([x, 2 * x]))
    for i in range(2):
        at = ((i + 1) * x).requires_grad_()
        leaves = case.params(requires_grad=True)
        losses = case.loss_fn()(leaves, (at, y))
        rows = [torch.autograd.grad(losses[name], leaves["last.weight"], create_graph=True)[0] for name in "abc"]
        (expected,) = torch.autograd.grad(sum(row.norm() for row in rows), at)
        assert_near(found[i], expected)


# ---- compiled

COMPILED = [
    ("mlp", "general", "mixed"),
    ("cnn", "linear", "layer"),
    ("tied", "function", "mixed"),
    ("two_z", "within", "z"),
]


@pytest.mark.parametrize(("name", "form", "place"), COMPILED)
def test_compiled(name: str, form: str, place: str) -> None:
    """One graph, from the first call on, and the same numbers."""
    case = make(name)
    loss_fn, where = in_form(case, form), case.where[place]

    def everything(params: Any, weights: Tensor) -> Any:
        measured = gn.measure(params, loss_fn, case.batch, weights=weights, where=where, has_aux=case.has_aux)
        return measured, gn.task_gramian(loss_fn, params, case.batch, where=where, has_aux=case.has_aux)

    found, gram = torch.compile(everything, fullgraph=True, backend="aot_eager")(case.params(), weights_of("abc"))
    if case.has_aux:
        found, aux = found
        for path, buffer in case.new_buffers().items():
            assert_near((aux[0] | aux[1]["a"])[path], buffer, path)
    rows = rows_of(case, form, place)
    assert_near(found.grad_norms, rows.norm(dim=1))
    assert_near(gram, rows @ rows.T)
    assert_same_sum([found.grads[path] for path in case.paths(None)], case.reference(None).total)
    assert_free((found, gram))


# ---- micro-batches


MERGED = [("mlp", form, place) for form in FORMS for place in ("z", "layer", "mixed", "all")] + [
    ("two_z", form, place) for form in FORMS[:2] for place in ("z", "mixed")
]


@pytest.mark.parametrize("sizes", [(5, 3), (1, 5, 2)], ids=str)
@pytest.mark.parametrize(("name", "form", "place"), MERGED)
def test_merge(name: str, form: str, place: str, sizes: tuple[int, ...]) -> None:
    """The stats of unequal micro-batches, merged, are those of the whole batch, at whatever W."""
    case = make(name)
    run = partial(gn.measure, case.params(), in_form(case, form), weights=weights_of("abc"), where=case.where[place])
    leaves, treedef = optree.tree_flatten(case.batch)
    parts = [optree.tree_unflatten(treedef, part) for part in zip(*(x.split(sizes) for x in leaves), strict=True)]
    stats = [run(part, num_examples=n) for part, n in zip(parts, sizes, strict=True)]
    whole = run(case.batch)
    in_two_steps = gn.merge(gn.merge(*stats[:2]), *stats[2:])
    as_numbers = gn.merge(*(s._replace(num_examples=int(s.num_examples)) for s in stats))
    for merged in (gn.merge(*stats), in_two_steps, as_numbers):
        assert float(merged.num_examples) == 8
        assert_near(merged.losses, whole.losses, "losses")
        assert_near(merged.grad_norms, rows_of(case, form, place).norm(dim=1), "norms")
        assert_same_sum([merged.grads[path] for path in case.paths(None)], case.reference(None).total)
        if isinstance(whole.example_norms, Tensor):
            assert_near(merged.example_norms, whole.example_norms, "example norms")
        assert optree.tree_structure(merged.task_grads) == optree.tree_structure(whole.task_grads)
        for found, expected in zip(*map(optree.tree_leaves, (merged.task_grads, whole.task_grads)), strict=True):
            assert_near(found, expected, "task gradients", norm([expected]))


def test_merge_refuses_norms_alone() -> None:
    """The norm of a mean is not the mean of norms."""
    case = make("mlp")
    stats = gn.measure(case.params(), case.loss_fn(), case.batch, norms_only=True)
    with pytest.raises(ValueError, match="norms_only=False"):
        gn.merge(stats, stats)
    with pytest.raises(ValueError, match="at least one"):
        gn.merge()
