"""Every loss has the weight, the mask and the ratio of its own task, in whatever order a mapping was written."""

import re
from collections import OrderedDict, UserDict, defaultdict, namedtuple

import pytest
import torch
from torch import nn

import gradnorm_func as gn

F64 = torch.float64
LOSSES = {"seg": 2.0, "depth": 30.0, "normals": 500.0}  # not in sorted order
NAMES = ["depth", "normals", "seg"]
MAPPINGS = {
    "dict": dict,
    "OrderedDict": OrderedDict,
    "defaultdict": lambda entries: defaultdict(float, entries),
    "UserDict": UserDict,
}


def loss_fn_of(kind):
    return lambda w, batch: kind({name: scale * w.square().sum() for name, scale in LOSSES.items()})


@pytest.mark.parametrize("kind", MAPPINGS.values(), ids=MAPPINGS)
def test_every_mapping_is_sorted(kind):
    """Losses, weights, masks and names of an OrderedDict once hit the wrong tasks: 11.4 in place of 1140."""
    w = torch.ones(2, dtype=F64)
    weights = kind({"seg": 10.0, "depth": 1.0, "normals": 0.1})
    tensors = kind({name: torch.tensor(value, dtype=F64) for name, value in LOSSES.items()})
    assert gn.task_names(tensors) == NAMES
    assert gn.by_name(tensors, torch.tensor([1, 2, 3])) == {"depth": 1, "normals": 2, "seg": 3}
    total = 2 * 10.0 + 30 * 1.0 + 500 * 0.1
    assert gn.weighted_sum(tensors, weights) == pytest.approx(total)
    state = gn.init_state(tensors, weights=weights, dtype=F64)
    assert state.weights.tolist() == [1.0, 0.1, 10.0]
    mask = kind({"seg": True, "depth": False, "normals": True})
    grads, _, info = gn.gradnorm(form="paper").grad(state, w, loss_fn_of(kind), None, mask=mask)
    assert info.losses[0].isnan()
    assert info.losses[1:].tolist() == [1000.0, 4.0]
    assert info.total_loss == pytest.approx(0.1 * 1000 + 10 * 4)
    torch.testing.assert_close(grads, 2 * w * (0.1 * 500 + 10 * 2))
    logged = gn.log_dict(info, tensors)
    assert logged["losses/normals"] == 1000
    static = gn.static(weights)
    grads, _, _ = static.grad(static.init(3, dtype=F64), w, loss_fn_of(kind), None)
    torch.testing.assert_close(grads, 2 * w * total)
    fixed = gn.fixed_ratio(kind({"seg": 1.0, "depth": 0.0, "normals": 0.0}))
    grads, _, info = fixed.grad(fixed.init(3, dtype=F64), w, loss_fn_of(kind), None)
    assert info.weights.tolist()[:2] == [0, 0]
    assert info.weights[2] > 0
    heads = kind({name: lambda p, z, b, s=scale: s * z.square().sum() for name, scale in LOSSES.items()})
    seam = gn.multi_task_loss(lambda p, b: p, heads)
    _, _, info = gn.gradnorm().grad(gn.init_state(seam, dtype=F64), w, seam, None)
    assert info.losses.tolist() == [60.0, 1000.0, 4.0]
    assert gn.task_names(seam) == NAMES


def test_a_dict_of_heads_as_modules_names_the_tasks():
    heads = nn.ModuleDict({name: nn.Linear(2, 1) for name in LOSSES})
    assert gn.task_names(heads) == NAMES
    state = gn.gradnorm().init(heads, weights={"seg": 3.0, "depth": 1.0, "normals": 2.0})
    assert gn.by_name(heads, state.weights) == {"depth": 1, "normals": 2, "seg": 3}
    with pytest.raises(ValueError, match=r"'trunk'"):
        gn.gradnorm().init(heads, weights={"seg": 3.0, "depth": 1.0, "trunk": 2.0})


def test_parameters_keep_their_type_and_order():
    """A state_dict is an OrderedDict in the order of the modules; its gradients are, too."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    params = OrderedDict(sorted(model.state_dict().items(), reverse=True))
    call = gn.functional(model)
    loss_fn = lambda p, x: OrderedDict(b=call(p, x).square().mean(), a=call(p, x).sum())
    grads, _, info = gn.gradnorm_grad(gn.init_state(2), params, loss_fn, torch.ones(3, 2))
    assert type(grads) is OrderedDict
    assert list(grads) == list(params)
    assert all(grads[path].shape == params[path].shape for path in params)
    assert info.losses[1] == loss_fn(params, torch.ones(3, 2))["b"]


def test_the_weighted_sum_is_that_of_the_step():
    """`zip(losses.values(), weights)` pairs the order of writing with the sorted one, and a weight ran to 1e-8."""
    w = torch.tensor([1.0, 2.0], dtype=F64, requires_grad=True)
    state = gn.init_state(3, weights=[0.5, 0.1, 2.4], dtype=F64)
    grads, _, info = gn.gradnorm_grad(state, w, loss_fn_of(dict), None, form="paper")
    total = gn.weighted_sum(loss_fn_of(dict)(w, None), state.weights)
    (expected,) = torch.autograd.grad(total, w)
    assert expected.norm() > 0
    torch.testing.assert_close(grads, expected)
    torch.testing.assert_close(info.total_loss, total.detach())
    by_hand = sum(x * weight for x, weight in zip(LOSSES.values(), [2.4, 0.5, 0.1], strict=True)) * 5
    assert total.item() == pytest.approx(by_hand)
    with pytest.raises(ValueError, match="weights has 2 entries, but there are 3 losses"):
        gn.weighted_sum(loss_fn_of(dict)(w, None), torch.ones(2))


w0 = torch.ones(2)
GENERAL = loss_fn_of(dict)
SEAM = gn.multi_task_loss(
    lambda p, b: p, {name: lambda p, z, b, s=scale: s * z.square().sum() for name, scale in LOSSES.items()}
)
SEPARABLE = gn.multi_task_loss(
    None, {name: lambda p, b, s=scale: s * p.square().sum() for name, scale in LOSSES.items()}
)
TYPO = {"seg": 1.0, "depht": 2.0, "normals": 3.0}


def step(balancer, loss_fn, start=3, **options):
    return balancer.grad(balancer.init(start), w0, loss_fn, None, **options)


MISNAMED = {
    "mask": lambda loss_fn: step(gn.gradnorm(), loss_fn, mask=dict.fromkeys(TYPO, True)),
    "preference, fairgrad": lambda loss_fn: step(gn.fairgrad(preference=TYPO), loss_fn),
    "norm_ratios": lambda loss_fn: step(gn.gradnorm(norm_ratios=TYPO), loss_fn),
    "weights": lambda loss_fn: step(gn.static(TYPO), loss_fn),
    "ratios": lambda loss_fn: step(gn.fixed_ratio(TYPO), loss_fn),
    "lower": lambda loss_fn: step(gn.famo(lower=TYPO), loss_fn),
    "ideal": lambda loss_fn: step(gn.stch(ideal=TYPO), loss_fn),
    "preference": lambda loss_fn: step(gn.stch(preference=TYPO), loss_fn),
    "weights, init": lambda loss_fn: gn.gradnorm_grad(gn.init_state(3, weights=TYPO), w0, loss_fn, None),
    "initial_losses": lambda loss_fn: gn.gradnorm_grad(gn.init_state(3, initial_losses=TYPO), w0, loss_fn, None),
    "weights, simple": lambda loss_fn: gn.mgda().grad(gn.mgda().init(3, weights=TYPO), w0, loss_fn, None),
}


@pytest.mark.parametrize("loss_fn", [GENERAL, SEAM, SEPARABLE], ids=["general", "seam", "separable"])
@pytest.mark.parametrize("argument", MISNAMED)
def test_names_are_compared_with_the_tasks(argument, loss_fn):
    message = (
        f"{argument.split(',')[0]} has the names ['depht', 'normals', 'seg'], but the tasks are {NAMES}: give one "
        "entry for each task, under its own name"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        MISNAMED[argument](loss_fn)


def test_names_are_compared_where_they_are_known():
    """At `init`, told of the tasks; in `balance`, of stats by name; by RotoGrad and `weighted_sum`."""
    for tasks in (SEAM, NAMES, LOSSES, SEAM.heads):
        assert gn.gradnorm().init(tasks).weights.shape == (3,)
        with pytest.raises(ValueError, match="weights has the names"):
            gn.gradnorm().init(tasks, weights=TYPO)
    with pytest.raises(ValueError, match="initial_losses has the names"):
        gn.rotograd(2).init(SEAM, initial_losses=TYPO)
    with pytest.raises(ValueError, match="mask has the names"):
        gn.gradnorm_balance(gn.init_state(3), gn.TaskStats(LOSSES, LOSSES), mask=dict.fromkeys(TYPO, True))
    with pytest.raises(ValueError, match="grad_norms has the names"):
        gn.gradnorm_balance(gn.init_state(3), gn.TaskStats(LOSSES, TYPO))
    with pytest.raises(ValueError, match="norm_ratios has the names"):
        gn.gradnorm_balance(gn.init_state(3), gn.TaskStats(LOSSES, LOSSES), norm_ratios=TYPO)
    with pytest.raises(ValueError, match="weights has the names"):
        gn.weighted_sum(LOSSES, TYPO)
    with pytest.raises(ValueError, match="are not known before it is called"):
        gn.task_names(GENERAL)
    with pytest.raises(ValueError, match=r"values has 2 entries, but there are 3 tasks"):
        gn.by_name(SEAM, torch.ones(2))


def test_names_under_compile():
    run = torch.compile(gn.gradnorm(norm_ratios=OrderedDict(LOSSES)).grad, fullgraph=True, backend="eager")
    mask = OrderedDict(seg=True, depth=True, normals=False)
    for loss_fn in (loss_fn_of(OrderedDict), SEAM):
        state = gn.init_state(3)
        found = run(state, w0, loss_fn, None, mask=mask)
        expected = gn.gradnorm(norm_ratios=LOSSES).grad(state, w0, loss_fn, None, mask=dict(mask))
        torch.testing.assert_close(found, expected, equal_nan=True)
        assert expected[2].losses[0] == 60


# ---------------------------------------------------------------------------------------------- another order

Pair = namedtuple("Pair", "seg depth")
TWELVE = {str(i): float(i + 1) for i in range(12)}


def test_names_beside_an_order_that_is_not_the_sorted_one():
    """Fields of a NamedTuple and entries of a long list stand as they are, those of a dict are sorted."""
    losses = Pair(torch.tensor(1.0), torch.tensor(10.0))
    assert gn.weighted_sum(losses, {"seg": 1.0, "depth": 100.0}) == 1001
    assert gn.weighted_sum({"seg": losses.seg, "depth": losses.depth}, Pair(1.0, 100.0)) == 1001
    assert gn.weighted_sum(losses, Pair(1.0, 100.0)) == 1001
    rows = [torch.tensor(float(i)) for i in range(12)]
    assert gn.weighted_sum(rows, TWELVE) == sum(i * (i + 1) for i in range(12))
    assert gn.init_state(["seg", "depth"], initial_losses={"seg": 1.0, "depth": 100.0}).initial_losses.tolist() == [
        1,
        100,
    ]
    loss_fn = lambda w, x: Pair(w[0], w[1])
    w = torch.ones(2)
    for balancer in (gn.static({"seg": 1.0, "depth": 100.0}), gn.fixed_ratio({"seg": 1.0, "depth": 2.0})):
        with pytest.raises(ValueError, match=r"order \['depth', 'seg'\], but that of the tasks is \['seg', 'depth'\]"):
            balancer.grad(balancer.init(2), w, loss_fn, None)
    with pytest.raises(ValueError, match="give a list in that order"):
        gn.geometric().grad(gn.geometric().init(2), w, loss_fn, None, mask={"seg": True, "depth": False})
    twelve = gn.static(TWELVE)
    with pytest.raises(ValueError, match="give a list in that order"):
        twelve.grad(twelve.init(12), torch.ones(12), lambda w, x: list(w.unbind()), None)


def test_names_of_keys_and_sets():
    losses = {"seg": torch.tensor(1.0), "depth": torch.tensor(2.0)}
    assert gn.task_names(losses.keys()) == gn.task_names({"seg", "depth"}) == ["depth", "seg"]
    assert gn.by_name(losses.keys(), torch.tensor([2.0, 1.0])) == losses
    with pytest.raises(ValueError, match=r"the order of arguments is \(tasks, values\)"):
        gn.by_name(torch.ones(2), losses)


@pytest.mark.parametrize(
    ("balancer", "mask"),
    [
        (gn.static({"a": 1.0, "b": 2.0}), None),
        (gn.fixed_ratio({"a": 1.0, "b": 2.0}), None),
        (gn.gradnorm(norm_ratios={"a": 1.0, "b": 2.0}), None),
        (gn.gradnorm(), {"a": True, "b": False}),
    ],
    ids=["static", "fixed_ratio", "norm_ratios", "mask"],
)
def test_a_loop_of_ones_own_compares_names(balancer, mask):
    """They were paired by their places."""
    losses = {"price": torch.ones((), requires_grad=True), "kind": torch.ones((), requires_grad=True)}
    stats = gn.measure_losses(losses, where=list(losses.values()), needs=balancer.needs)
    state = balancer.init(2)
    with pytest.raises(ValueError, match=r"the names \['a', 'b'\], but the tasks are \['kind', 'price'\]"):
        balancer.balance(state, stats, mask=mask)
    start = gn.gradnorm().init(2, weights={"a": 1.0, "b": 2.0})
    with pytest.raises(ValueError, match="weights has the names"):
        gn.gradnorm().balance(start, stats)


def test_merged_stats_remember_the_names():
    """Of micro-batches and of ranks, too: they were paired by their places."""

    def stats():
        copies = gn.fork(torch.ones(2, requires_grad=True) * 1, ["kind", "price"])
        return gn.measure_losses({"price": copies["price"].sum(), "kind": copies["kind"].square().sum()}, copies)

    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        reduced = gn.all_reduce(stats())
    finally:
        torch.distributed.destroy_process_group()
    for merged in (gn.merge(None, stats()), gn.merge(gn.merge(stats(), stats()), stats()), reduced):
        start = gn.gradnorm().init(2, weights={"a": 1.0, "b": 2.0})
        with pytest.raises(ValueError, match="weights has the names"):
            gn.gradnorm().balance(start, merged)
        with pytest.raises(ValueError, match="mask has the names"):
            gn.gradnorm().balance(gn.init_state(2), merged, mask={"a": True, "b": True})
        assert gn.gradnorm().balance(gn.init_state(2), merged)[1].finite
