"""Every mistake has a message that names the argument, the value and the next thing to try, and changes nothing."""

import functools
import re

import numpy as np
import pytest
import torch
from toys import leaves, make_problem, same_bits

import gradnorm_func as gn

F64 = torch.float64
NAN, INF = float("nan"), float("inf")
problem = make_problem()
P, B, GENERAL, SEAM = problem.params, problem.batch, problem.general, problem.seam


def fresh(num_tasks=3, **options):
    return gn.init_state(num_tasks, dtype=F64, **options)


def stats(losses, norms=(3.0, 1.0, 2.0)):
    return gn.TaskStats(torch.tensor(losses, dtype=F64), torch.tensor(norms, dtype=F64))


sgd = functools.partial(torch.optim.SGD, lr=0.1)
FIXED, STATIC = gn.fixed_ratio(), gn.static()
separable = gn.multi_task_loss(None, [lambda w, b: w.sum(), lambda w, b: w.square().sum(), lambda w, b: w.sum()])
stacked = gn.multi_task_loss(
    lambda p, x: x @ p["w"], gn.stacked_heads(lambda p, z, x: (z @ p["v"]).square().mean(), "heads")
)
STACKED_PARAMS = {"w": torch.ones(3, 3), "heads.v": torch.ones(5, 3)}


NET = torch.nn.Linear(5, 3, dtype=F64)
net_head = lambda p, z, x: NET(z).square().mean()
closed_over = lambda p, x: [NET(x)[:, i].square().mean() for i in range(3)]
TWICE = gn.multi_task_loss(
    lambda p, b: torch.tanh(SEAM.backbone(p, b) @ p["trunk.1.weight"].T + p["trunk.1.bias"]),
    SEAM.heads,
    last_shared=SEAM.last_shared,
)
PAST_Z = gn.multi_task_loss(
    SEAM.backbone,
    SEAM.heads | {"t2": lambda p, z, b: (z @ p["trunk.1.weight"]).square().mean()},
    last_shared=SEAM.last_shared,
)


def with_head(loss_fn, head):
    """The same loss with another last head."""
    return gn.multi_task_loss(loss_fn.backbone, loss_fn.heads | {"t2": head})


def tasks_changed(losses, state):
    return (
        f"loss_fn returned {losses} losses, but the state was made for {state} tasks: init_state({losses}) makes one "
        "for them; a task absent from some batches is what mask= is for"
    )


# (what is called with a state, what must be in the message)
CALLS = {
    # a state, and what comes after it
    "params first": (
        lambda s: gn.gradnorm_grad(P, s, GENERAL, B),
        "state=dict has no weights: the order of arguments is (state,",
    ),
    "loss_fn first": (lambda s: gn.gradnorm_update(GENERAL, s, P, B), "state=function has no weights"),
    "loss_fn before params": (
        lambda s: gn.gradnorm_grad(s, GENERAL, P, B),
        "the order of arguments is (state, params, loss_fn, batch)",
    ),
    "state of fixed_ratio": (
        lambda s: gn.gradnorm_grad(FIXED.init(3), P, SEAM, B),
        "state is a State, not a GradNormState: make one with gn.init_state(T)",
    ),
    "state for fixed_ratio": (
        lambda s: FIXED.grad(s, P, SEAM, B),
        "state is a GradNormState, not a State: make one with the balancer's own init(T)",
    ),
    "state for static": (lambda s: STATIC.grad(s, P, SEAM, B), "state is a GradNormState, not a State"),
    "state of another rule": (
        lambda s: STATIC.grad(FIXED.init(3), P, SEAM, B),
        "the state was made by another balancer",
    ),
    "state of sgd": (
        lambda s: gn.gradnorm_grad(fresh(optimizer=gn.sgd(0.1)), P, SEAM, B),
        "the state holds SGDState, but this optimizer keeps AdamState: give init_state and the updates the same",
    ),
    "state of adam": (lambda s: gn.gradnorm_balance(s, stats([1, 2, 3]), optimizer=gn.sgd(0.1)), "keeps SGDState"),
    # number of tasks
    "tasks, general": (lambda s: gn.gradnorm_grad(fresh(2), P, GENERAL, B), tasks_changed(3, 2)),
    "tasks, general at W": (
        lambda s: gn.gradnorm_grad(fresh(4), P, GENERAL, B, where="trunk.1.weight"),
        tasks_changed(3, 4),
    ),
    "tasks, seam": (lambda s: gn.gradnorm_grad(fresh(2), P, SEAM, B), tasks_changed(3, 2)),
    "tasks, separable": (lambda s: gn.gradnorm_grad(fresh(2), torch.ones(2), separable, B), tasks_changed(3, 2)),
    "tasks, stacked": (lambda s: gn.gradnorm_grad(s, STACKED_PARAMS, stacked, torch.ones(4, 3)), tasks_changed(5, 3)),
    "tasks, update": (lambda s: gn.gradnorm_update(fresh(2), P, SEAM, B), tasks_changed(3, 2)),
    "tasks, fixed_ratio": (lambda s: FIXED.grad(FIXED.init(2), P, SEAM, B), tasks_changed(3, 2)),
    "tasks, balance": (lambda s: gn.gradnorm_balance(s, stats([1.0, 2.0], [1.0, 2.0])), tasks_changed(2, 3)),
    "tasks, norms": (
        lambda s: gn.gradnorm_balance(s, stats([1.0, 2.0, 3.0], [1.0, 2.0])),
        "grad_norms has 2 entries, but there are 3 tasks",
    ),
    "one loss": (
        lambda s: gn.gradnorm_grad(s, P, lambda p, b: {"a": p["trunk.0"].sum()}, B),
        "loss_fn returned 1 loss: there is nothing to balance, return one scalar per task",
    ),
    # what the loss returns
    "their sum": (
        lambda s: gn.gradnorm_grad(s, P, lambda p, b: sum(GENERAL(p, b).values()), B),
        "losses is a single scalar, so there is nothing to balance: return one scalar per task",
    ),
    "a vector": (
        lambda s: gn.gradnorm_grad(s, P, lambda p, b: {"x": p["trunk.0"], "y": p["trunk.0"].sum()}, B),
        "losses['x'] has shape (6, 5); a loss is one scalar: take its mean() or sum()",
    ),
    "a matrix": (
        lambda s: gn.gradnorm_grad(s, P, lambda p, b: p["trunk.0"], B),
        "losses has shape (6, 5): reduce it to one scalar per task, shape (T,)",
    ),
    "nothing": (lambda s: gn.gradnorm_grad(s, P, lambda p, b: None, B), "losses is empty: return one scalar per task"),
    "a number": (
        lambda s: gn.gradnorm_grad(s, P, lambda p, b: GENERAL(p, b) | {"t1": GENERAL(p, b)["t1"].item()}, B),
        "losses without a gradient: 't1' (float). Was it taken out of the graph by .item() or float()? Return the",
    ),
    "numpy, separable": (
        lambda s: gn.gradnorm_grad(s, P, with_head(problem.separable, lambda p, b: np.float64(1.0)), B),
        "losses without a gradient: 't2' (float64)",
    ),
    "a number, seam": (
        lambda s: gn.gradnorm_grad(s, P, with_head(SEAM, lambda p, z, b: z.sum().item()), B),
        "losses without a gradient: 't2' (float)",
    ),
    "nothing from a head": (
        lambda s: gn.gradnorm_grad(s, P, with_head(SEAM, lambda p, z, b: None), B),
        "losses['t2'] is None: its function returned nothing, so let it return the loss",
    ),
    "nothing for a task": (
        lambda s: gn.gradnorm_grad(s, P, lambda p, b: GENERAL(p, b) | {"t0": None}, B),
        "losses['t0'] is None",
    ),
    "closed over": (
        lambda s: gn.gradnorm_grad(s, dict(NET.named_parameters()), closed_over, B[0]),
        "no loss depends on any of params: does loss_fn close over a module? Write call = gn.",
    ),
    "closed over, seam": (
        lambda s: gn.gradnorm_grad(
            s, dict(NET.named_parameters()), gn.multi_task_loss(lambda p, x: x, [net_head] * 3), B[0]
        ),
        "no loss depends on any of params",
    ),
    "closed over, separable": (
        lambda s: gn.gradnorm_grad(
            s, dict(NET.named_parameters()), gn.multi_task_loss(None, [lambda p, x: net_head(p, x, x)] * 3), B[0]
        ),
        "no loss depends on any of params",
    ),
    "in place": (
        lambda s: gn.gradnorm_grad(s, P, with_head(SEAM, lambda p, z, b: torch.relu_(z).sum()), B),
        "the loss writes in place to z or to a parameter, as nn.ReLU(inplace=True) as the first layer of a head does: "
        "give that layer inplace=False",
    ),
    "in place, under vmap": (
        lambda s: torch.func.vmap(
            lambda b: gn.gradnorm_grad(s, P, with_head(SEAM, lambda p, z, b: torch.relu_(z).sum()), (b, B[1]))[0]
        )(torch.stack([B[0], B[0]])),
        "the loss writes in place to z",
    ),
    "applied twice": (
        lambda s: gn.gradnorm_grad(s, P, TWICE, B, where="trunk.1.weight"),
        "the backbone reads 'trunk.1.weight' itself, and last_shared=gn.shared_linear('trunk.1.weight', ...) ",
    ),
    "W read by a head": (
        lambda s: gn.gradnorm_grad(s, P, PAST_Z, B, where="trunk.1.weight"),
        "a head reads 'trunk.1.weight' itself, and norms at last_shared=gn.shared_linear('trunk.1.weight', ...) miss",
    ),
    "W read by a head, weights by this step's norms": (
        lambda s: gn.normalized(where="trunk.1.weight").grad(gn.normalized().init(3), P, PAST_Z, B),
        "a head reads 'trunk.1.weight' itself",
    ),
    "a head writes to z": (
        lambda s: gn.gradnorm_grad(s, P, with_head(SEAM, lambda p, z, b: z.relu_().sum()), B),
        "the loss writes in place to z or to a parameter, as nn.ReLU(inplace=True)",
    ),
    "a head writes to z, weights by this step's norms": (
        lambda s: gn.normalized().grad(gn.normalized().init(3), P, with_head(SEAM, lambda p, z, b: z.relu_().sum()), B),
        "the loss writes in place to z or to a parameter, as nn.ReLU(inplace=True)",
    ),
    "a module for a head": (
        lambda s: gn.multi_task_loss(SEAM.backbone, {"a": NET, "b": NET}),
        "heads['a']=Linear is a module, and must be a function of (params, z, batch): write call = gn.functional(",
    ),
    "a module for the backbone": (
        lambda s: gn.multi_task_loss(NET, SEAM.heads),
        "backbone=Linear is a module, and must be a function of (params, batch)",
    ),
    "a set for a mask": (
        lambda s: gn.gradnorm_balance(s, stats([1.0, 2.0, 3.0]), mask={"t0"}),
        "mask={'t0'} has no order: give a truth value for each task",
    ),
    "losses for copies": (
        lambda s: gn.weigh_trunk([x.sum() for x in gn.fork(torch.ones(2, requires_grad=True), 3)], torch.ones(3)),
        "copies are scalars: give the copies of z that gn.fork has made, not the losses",
    ),
    "weights of the trunk by other names": (
        lambda s: gn.weigh_trunk(gn.fork(torch.ones(2, requires_grad=True), ["a", "b"]), {"a": 1.0, "c": 2.0}),
        "weights has the names ['a', 'c'], but the tasks are ['a', 'b']",
    ),
    "no example norms": (
        lambda s: FIXED.balance(FIXED.init(3, dtype=F64), gn.measure(P, SEAM, B, needs="norms")),
        "stats has no example_norms: take them by measure(..., needs='example_norms')",
    ),
    "no aux": (
        lambda s: gn.gradnorm_grad(s, P, GENERAL, B, has_aux=True),
        "has_aux=True, so loss_fn must return (losses, aux), not dict",
    ),
    "no aux, seam": (
        lambda s: gn.gradnorm_grad(s, P, SEAM, B, has_aux=True),
        "multi_task_loss was made with has_aux=False",
    ),
    # params and where
    "no params": (lambda s: gn.gradnorm_grad(s, {}, GENERAL, B), "params has no leaves"),
    "integers": (
        lambda s: gn.gradnorm_grad(s, P | {"n": torch.ones(3, dtype=torch.int64)}, GENERAL, B),
        "params leaf 'n' is torch.int64; only floating-point tensors have gradients: pass it in batch",
    ),
    "numbers": (lambda s: gn.gradnorm_grad(s, P | {"n": 2.0}, GENERAL, B), "params leaf 'n' is float"),
    "unknown where": (
        lambda s: gn.gradnorm_grad(s, P, SEAM, B, where="trunk.1.wieght"),
        "where='trunk.1.wieght' matches no parameter; did you mean one of 'trunk.1.weight'",
    ),
    "one unknown of two": (lambda s: gn.gradnorm_grad(s, P, SEAM, B, where=["trunk", "haed"]), "where='haed' matches"),
    "no where": (lambda s: gn.gradnorm_grad(s, P, SEAM, B, where=[]), "where=[] selects no parameter; give a path"),
    "where of one head": (
        lambda s: gn.gradnorm_grad(s, P, SEAM, B, where="head.1"),
        "where='head.1' is no W: only the task 't1' reads it, and norms there are exactly 0 otherwise; give",
    ),
    "where of one head, general": (lambda s: gn.gradnorm_grad(s, P, GENERAL, B, where="head.1"), "only the task 't1'"),
    "where of one head, separable": (
        lambda s: gn.gradnorm_grad(s, P, problem.separable, B, where=["head.1"]),
        "only the task 't1' reads it",
    ),
    "where never": (
        lambda s: gn.gradnorm_grad(s, P, SEAM, B, where=lambda path: False),
        "selects no parameter; the paths are",
    ),
    "where a Parameter": (
        lambda s: gn.gradnorm_grad(s, P, SEAM, B, where=P["trunk.1.weight"]),
        "where=Tensor is no path: W is named by its dotted path in params, where='trunk.1.weight'",
    ),
    "where a list of Parameters": (
        lambda s: gn.gradnorm_grad(s, P, SEAM, B, where=[P["trunk.1.bias"]]),
        "in params, where='trunk.1.bias'",
    ),
    "where a module": (
        lambda s: gn.gradnorm_grad(s, dict(NET.named_parameters()), closed_over, B[0], where=NET),
        "where=Linear is no path: W is named by its dotted path in params, where='weight'",
    ),
    "where of another model": (
        lambda s: gn.task_grad_norms(GENERAL, P, B, where=NET.weight),
        "where=Parameter is no path: W is named by its dotted",
    ),
    "params a module": (
        lambda s: gn.gradnorm_grad(s, NET, closed_over, B[0]),
        "params is a Linear; it takes parameters by name: dict(model.named_parameters())",
    ),
    "params a generator": (
        lambda s: gn.gradnorm_grad(s, NET.parameters(), closed_over, B[0]),
        "params is a generator; it takes parameters by name: dict(model.named_parameters())",
    ),
    "params a module, train": (lambda s: gn.train(NET, closed_over, [B[0]]), "params is a Linear"),
    # hyperparameters
    "alpha": (lambda s: gn.gradnorm_grad(s, P, SEAM, B, alpha=-0.5), "alpha=-0.5 must be at least 0: 0 aims at equal"),
    "alpha NaN": (lambda s: gn.gradnorm_update(s, P, SEAM, B, alpha=NAN), "alpha=nan must be at least 0"),
    "form": (lambda s: gn.gradnorm_grad(s, P, SEAM, B, form="papr"), "form='papr' must be one of 'invariant'"),
    "form of a state": (lambda s: gn.init_state(3, form="linear"), "form='linear' must be one of 'invariant'"),
    "alpha of the factory": (lambda s: gn.gradnorm(alpha=-1), "alpha=-1 must be at least 0"),
    "floor": (
        lambda s: gn.gradnorm_balance(s, stats([1, 2, 3]), floor=0.0),
        "floor=0.0 is relative to the mean weight",
    ),
    "burn_in": (lambda s: gn.gradnorm(burn_in=-1), "burn_in=-1 counts steps from 0"),
    "initial_decay": (lambda s: gn.gradnorm(initial_decay=1.5), "initial_decay=1.5 must lie in [0, 1]"),
    "norm_ratios": (
        lambda s: gn.gradnorm_balance(s, stats([1, 2, 3]), norm_ratios=[1, 2]),
        "norm_ratios has 2 entries",
    ),
    "negative norm_ratios": (
        lambda s: gn.gradnorm_balance(s, stats([1, 2, 3]), norm_ratios=[1, -2, 1]),
        "norm_ratios=[1, -2, 1] must be positive",
    ),
    "torch's optimizer": (
        lambda s: gn.gradnorm_grad(s, P, SEAM, B, optimizer=torch.optim.Adam),
        "must be gn.sgd(lr), gn.adam(lr) or",
    ),
    "sgd rate": (lambda s: gn.sgd(-0.1), "learning_rate=-0.1 must be positive; to freeze the weights pass update=Fal"),
    "adam rate": (lambda s: gn.adam(0), "learning_rate=0 must be positive"),
    "adam decay": (lambda s: gn.adam(0.1, b2=1.0), "b2=1.0 must lie in [0, 1)"),
    "adam weight decay": (lambda s: gn.adam(0.1, weight_decay=-1.0), "weight_decay=-1.0 must be at least 0"),
    "adam eps": (lambda s: gn.adam(0.1, eps=0.0), "eps=0.0 must be positive"),
    "no norms": (
        lambda s: gn.gradnorm_balance(s, gn.TaskStats([1.0, 2.0, 3.0])),
        "stats has no grad_norms: take them by measure(..., needs='norms')",
    ),
    "no norms, fixed_ratio": (lambda s: FIXED.balance(FIXED.init(2), gn.TaskStats([1.0, 2.0])), "no grad_norms"),
    # mask
    "nothing present": (
        lambda s: gn.gradnorm_grad(s, P, SEAM, B, mask=[False] * 3),
        "mask=[False, False, False] leaves no task: skip this batch, or pass update=False",
    ),
    "nothing present, dict": (
        lambda s: gn.gradnorm_balance(s, stats([1, 2, 3]), mask=dict.fromkeys("abc", False)),
        "leaves no task",
    ),
    "mask of names": (
        lambda s: gn.gradnorm_grad(s, P, SEAM, B, mask=["t1"]),
        "mask=['t1'] holds names; it takes one truth value for each task: give {name: name in ['t1'] for name in",
    ),
    "mask in numpy, nothing present": (
        lambda s: gn.gradnorm_grad(s, P, SEAM, B, mask=np.zeros(2, dtype=bool)),
        "mask has shape (2,), but there are 3 tasks",
    ),
    "mask length": (
        lambda s: gn.gradnorm_grad(s, P, SEAM, B, mask=torch.tensor([True, False])),
        "mask has shape (2,), but there are 3 tasks",
    ),
    "mask of one": (lambda s: gn.gradnorm_grad(s, P, SEAM, B, mask=torch.tensor(True)), "mask has shape ()"),
    # init_state
    "T = 1": (lambda s: gn.init_state(1), "num_tasks=1: balancing needs an integer number of tasks, at least 2"),
    "T of a factory": (lambda s: gn.gradnorm().init(0), "num_tasks=0"),
    "T as text": (lambda s: gn.init_state("3"), "num_tasks='3'"),
    "T as truth": (lambda s: gn.init_state(True), "num_tasks=True"),
    "weights length": (lambda s: gn.init_state(3, weights={"a": 1.0, "b": 2.0}), "weights has 2 entries, but num_ta"),
    "weight of 0": (lambda s: gn.init_state(2, weights=[0.0, 1.0]), "must be positive and finite; to leave a task out"),
    "weight NaN": (lambda s: gn.init_state(2, weights=[NAN, 1.0]), "weights=[nan, 1.0] must be positive and finite"),
    "L(0) length": (lambda s: gn.init_state(2, initial_losses=[1.0]), "initial_losses has 1 entries, but num_tasks=2"),
    "dtype": (lambda s: gn.init_state(2, dtype=torch.int32), "dtype=torch.int32 must be a floating-point dtype"),
    # multi_task_loss
    "one head": (lambda s: gn.multi_task_loss(lambda p, b: b, [len]), "heads has 1 task(s); balancing needs at least"),
    "a where that takes a model": (
        lambda s: gn.gradnorm_grad(s, P, SEAM, B, where=lambda q: q["trunk"]),
        "for the path 'head.0': it may be a path, where='head.0', a list of paths, or a function from a path to True",
    ),
    "a where that returns a path": (
        lambda s: gn.gradnorm_grad(s, P, SEAM, B, where=lambda path: path),
        "where= returned str for the path 'head.0': it may be a path, where='head.0', a list of paths, or a function",
    ),
    # the parts of a step by hand
    "losses for stats": (
        lambda s: gn.gradnorm().balance(s, {"a": torch.ones(()), "b": torch.ones(())}),
        "stats=dict: give gn.measure_losses(losses, z, needs=balancer.needs)",
    ),
    "losses for the weights": (lambda s: STATIC.weights(STATIC.init(2), [1.0, 2.0]), "stats=list: give gn.measure"),
    "stats first": (
        lambda s: gn.gradnorm().balance(stats([1, 2, 3]), s),
        "state=TaskStats, stats=GradNormState: the order is (state, stats)",
    ),
    "losses for a state": (lambda s: STATIC.balance({"a": 1.0}, stats([1, 2, 3])), "state=dict has no weights: the"),
    "no norms, measure_losses": (
        lambda s: gn.gradnorm_balance(s, gn.TaskStats([1.0, 2.0, 3.0])),
        "or measure_losses(losses, z, needs=balancer.needs), or give update=False",
    ),
    "saved first": (
        lambda s: gn.load_state(gn.state_dict(s), s),
        "template=dict, saved=GradNormState: the order is (template, saved)",
    ),
    "a state for what was saved": (
        lambda s: gn.load_state(s, s),
        "saved=GradNormState: the order is (template, saved)",
    ),
    "grads first": (lambda s: gn.write_grads(P, NET), "target=dict, grads=Linear: the order is (target, grads)"),
    "all of the result": (
        lambda s: gn.write_grads(P, gn.gradnorm_grad(s, P, SEAM, B)),
        "grads=tuple is all that the balancer returned: give grads, the first of the result",
    ),
    "a loss for T": (
        lambda s: gn.gradnorm().init(closed_over),
        "num_tasks=<lambda>: a plain function does not tell its tasks: give their number, init(2), or their names",
    ),
    "a model for T": (lambda s: gn.gradnorm().init(NET), "num_tasks=Linear: balancing needs an integer number"),
    # train
    "a schedule": (
        lambda s: gn.train(P, SEAM, [B], optimizer=lambda ps: torch.optim.lr_scheduler.ExponentialLR(sgd(ps), 0.9)),
        "optimizer returned ExponentialLR, a schedule, whose step trains nothing: return its optimizer, after",
    ),
    "LBFGS": (
        lambda s: gn.train(P, SEAM, [B], optimizer=torch.optim.LBFGS),
        "optimizer returned LBFGS, which runs the loss anew within a step, and a step has one set of weights: use",
    ),
    "no optimizer": (
        lambda s: gn.train(P, SEAM, [B], optimizer=lambda ps: NET),
        "optimizer returned Linear: it must be a function from a list of tensors to a torch.optim optimizer, such as",
    ),
    "an optimizer of the model": (
        lambda s: gn.train(P, SEAM, [B], optimizer=lambda ps: sgd(NET.parameters())),
        "optimizer returned SGD of other tensors than it was given, which are copies of params: lambda tensors: torch",
    ),
    "a method not called": (
        lambda s: gn.train(P, SEAM, [B], balancer=gn.fixed_ratio),
        "balancer=fixed_ratio is no balancer; call what makes one: balancer=gn.fixed_ratio()",
    ),
    "a method by name": (
        lambda s: gn.train(P, SEAM, [B], balancer="gradnorm"),
        "balancer='gradnorm' is no balancer; call what makes one: balancer=gn.gradnorm()",
    ),
    "loss_fn first, train": (
        lambda s: gn.train(SEAM, P, [B]),
        "params=MultiTaskLoss, loss_fn=dict: the order is (params, loss_fn, batches)",
    ),
    "batches second": (
        lambda s: gn.train(P, [B], SEAM),
        "params=dict, loss_fn=list: the order is (params, loss_fn, batches)",
    ),
    "one batch": (
        lambda s: gn.train(P, SEAM, {"x": B[0]}),
        "batches=dict: an iterable of batches is wanted, such as a DataLoader; one batch is [batch], and",
    ),
    "one tensor": (lambda s: gn.train(P, SEAM, B[0]), "batches=Tensor: an iterable of batches is wanted"),
    "aux without buffers": (
        lambda s: gn.train(P, lambda p, b: (GENERAL(p, b), {"seen": b[0].sum()}), [B]),
        "loss_fn returns (losses, aux): give has_aux=True or, in train, buffers=model, the module whose new",
    ),
    "aux without buffers, seam": (
        lambda s: gn.train(P, gn.multi_task_loss(SEAM.backbone, SEAM.heads, has_aux=True), [B]),
        "loss_fn returns (losses, aux): give",
    ),
    "train on nothing": (lambda s: gn.train(P, SEAM, []), "batches is empty: there was nothing to train on"),
}


@pytest.mark.parametrize("case", CALLS)
@pytest.mark.filterwarnings("ignore::Warning:tqdm")
def test_the_message_says_what_and_how_and_nothing_changed(case):
    call, message = CALLS[case]
    state = fresh(weights=[0.5, 1.5, 1.0])
    before = [leaf.clone() for leaf in leaves(state, P, B)]
    with pytest.raises(ValueError, match=re.escape(message)):
        call(state)
    assert same_bits(before, leaves(state, P, B))


def test_an_unknown_keyword_is_pythons_own_error():
    with pytest.raises(TypeError, match="alhpa"):
        gn.gradnorm_grad(fresh(), P, SEAM, B, alhpa=1.0)


# ---------------------------------------------------------------------------------------------- values, not mistakes

UNUSABLE = {
    "NaN loss": ([1.0, NAN, 2.0], [3.0, 1.0, 2.0]),
    "infinite loss": ([1.0, 2.0, INF], [3.0, 1.0, 2.0]),
    "NaN norm": ([1.0, 2.0, 2.0], [NAN, 1.0, 2.0]),
    "infinite norm": ([1.0, 2.0, 2.0], [3.0, INF, 2.0]),
    "negative rate to a broken power": ([1.0, -2.0, 2.0], [3.0, 1.0, 2.0]),
}


@pytest.mark.parametrize("optimizer", [gn.sgd(0.1), gn.adam()], ids=["sgd", "adam"])
@pytest.mark.parametrize("form", ["paper", "log"])
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("case", UNUSABLE)
def test_a_step_that_is_not_finite_leaves_the_state_bit_for_bit(case, first, form, optimizer):
    state = fresh(optimizer=optimizer)
    if not first:
        state, _ = gn.gradnorm_balance(state, stats([1.0, 2.0, 3.0]), optimizer=optimizer)
    elif case.startswith("negative"):
        state = fresh(optimizer=optimizer, initial_losses=[1.0, 1.0, 1.0])
    new, info = gn.gradnorm_balance(state, stats(*UNUSABLE[case]), alpha=1.5, form=form, optimizer=optimizer)
    assert not info.finite
    assert same_bits(new, state)
    new, info = gn.gradnorm_balance(state, stats([1.0, 2.0, 3.0]), form=form, optimizer=optimizer)
    assert info.finite, "the next good step goes on"
    assert new.step == state.step + 1


@pytest.mark.parametrize("form", ["paper", "log"])
def test_a_learning_rate_that_is_not_finite_leaves_the_state(form):
    broken = gn.sgd(lambda t: torch.tensor(NAN))
    state = fresh(optimizer=broken)
    new, info = gn.gradnorm_balance(state, stats([1.0, 2.0, 3.0]), optimizer=broken, form=form)
    assert not info.finite
    assert same_bits(new, state)


@pytest.mark.parametrize(
    "call",
    [
        lambda s: gn.gradnorm_grad(s, P, SEAM, B, chunksize=2),
        lambda s: gn.gradnorm_update(s, P, SEAM, B, chunksize=2),
        lambda s: gn.gradnorm().grad(s, P, SEAM, B, chunksize=2),
        lambda s: FIXED.update(FIXED.init(3), P, SEAM, B, chunksize=2),
    ],
)
def test_a_misspelt_option(call):
    with pytest.raises(TypeError, match="chunksize"):
        call(fresh())


@pytest.mark.parametrize(
    "mask", [torch.zeros(3, dtype=torch.bool), dict.fromkeys(["t0", "t1", "t2"], torch.tensor(False))]
)
def test_a_mask_tensor_false_everywhere_leaves_the_state(mask):
    """Its values cannot be looked at without waiting for the device, so it is no error."""
    for balancer in (gn.gradnorm(), gn.gradnorm(form="log"), gn.fixed_ratio(), gn.static()):
        state = balancer.init(3, dtype=F64)
        grads, new, _ = balancer.grad(state, P, SEAM, B, mask=mask)
        assert same_bits(new, state)
        assert not any(leaf.any() for leaf in leaves(grads))


def test_zero_losses():
    state, info = gn.gradnorm_balance(fresh(), stats([0.0, 2.0, 3.0]))
    assert info.finite
    assert state.initial_losses[0].isnan(), "0 is no L(0): the next loss is"
    assert torch.equal(info.inverse_rates, torch.ones(3, dtype=F64))
    state, _ = gn.gradnorm_balance(state, stats([4.0, 2.0, 3.0]))
    assert state.initial_losses.tolist() == [4.0, 2.0, 3.0]
    state, info = gn.gradnorm_balance(state, stats([0.0, 1.0, 3.0]), alpha=0.5)  # solved: it wants no gradient any more
    assert info.finite
    assert info.targets[0] == 0
    state, info = gn.gradnorm_balance(state, stats([0.0, 0.0, 0.0]))
    assert info.finite
    assert (state.weights > 0).all()


def test_zero_norms_are_reported_and_harmless():
    state, info = gn.gradnorm_balance(fresh(), stats([1.0, 2.0, 3.0], [0.0, 0.0, 0.0]), form="paper")
    assert info.finite
    assert torch.equal(info.grad_norms, torch.zeros(3, dtype=F64))
    assert torch.equal(state.weights, torch.ones(3, dtype=F64))
    state, info = gn.gradnorm_balance(state, stats([1.0, 2.0, 3.0], [0.0, 1.0, 1.0]))
    assert info.finite
    assert (state.weights > 0).all()
    # A head that starts at zero is no wrong W, though only one norm there is positive.
    start = P | {path: torch.zeros_like(P[path]) for path in ("head.0", "head.2")}
    _, _, info = gn.gradnorm_grad(fresh(), start, SEAM, B, where="trunk.1.weight")
    assert [bool(norm) for norm in info.grad_norms] == [False, True, False]


def test_numbers_arrays_and_numpy_scalars_are_as_good_as_tensors():
    expected, _ = gn.gradnorm_balance(fresh(weights=[0.1, 0.2, 0.7]), stats([1.1, 2.2, 3.3]))
    assert expected.weight_sum.item() == pytest.approx(1.0, rel=1e-15), "numbers must not pass through float32"
    for make in (
        list,
        tuple,
        np.array,
        lambda x: dict(zip("abc", x, strict=True)),
        lambda x: [np.float64(v) for v in x],
    ):
        state = fresh(weights=make([0.1, 0.2, 0.7]))
        new, _ = gn.gradnorm_balance(state, gn.TaskStats(make([1.1, 2.2, 3.3]), make([3.0, 1.0, 2.0])))
        assert same_bits(new, expected)


def test_a_mask_in_numpy():
    state = fresh()
    expected = gn.gradnorm_grad(state, P, SEAM, B, mask=[True, False, True])
    assert same_bits(gn.gradnorm_grad(state, P, SEAM, B, mask=np.array([True, False, True])), expected)
    assert torch.equal(expected[1].initial_losses.isnan(), torch.tensor([False, True, False]))


def test_a_number_for_a_task_that_is_absent():
    """What a user returns where labels are missing; also under a compiler and transforms."""

    def loss_fn(p, b, present=True):
        return GENERAL(p, b) | ({} if present else {"t1": 0.0})

    absent, state = lambda p, b: loss_fn(p, b, present=False), fresh()
    mask = {"t0": True, "t1": False, "t2": True}
    expected = gn.gradnorm_grad(state, P, loss_fn, B, mask=mask)
    found = gn.gradnorm_grad(state, P, absent, B, mask=mask)
    assert same_bits(found[1], expected[1])
    torch.testing.assert_close(found[0], expected[0])
    assert all(leaf.norm() > 0 for path, leaf in found[0].items() if path != "head.1")
    constant = lambda p, b: GENERAL(p, b) | {"t1": torch.zeros((), dtype=F64)}
    run = torch.compile(gn.gradnorm().grad, fullgraph=True, backend="eager")
    torch.testing.assert_close(run(state, P, constant, B, mask=torch.tensor([True, False, True]))[0], expected[0])
    many = torch.func.vmap(lambda p: gn.gradnorm_grad(state, p, constant, B, mask=torch.tensor([True, False, True]))[0])
    stacked_params = {path: leaf.expand(2, *leaf.shape) for path, leaf in P.items()}
    torch.testing.assert_close({path: leaf[1] for path, leaf in many(stacked_params).items()}, expected[0])


def test_messages_of_measure_losses():
    trunk, heads = torch.nn.Linear(3, 3), [torch.nn.Linear(3, 1), torch.nn.Linear(3, 1)]

    def losses():
        copies = gn.fork(trunk(torch.ones(2, 3)), 2)
        return copies, [head(z).square().mean() for head, z in zip(heads, copies, strict=True)]

    copies, values = losses()
    with pytest.raises(ValueError, match=r"where='trunk.weight' must be the parameters themselves here"):
        gn.measure_losses(values, where="trunk.weight")
    with pytest.raises(ValueError, match=r"only the task '1' reads where="):
        gn.measure_losses(values, where=heads[1].weight)
    assert (gn.measure_losses([values[0], torch.tensor(0.0)], where=heads[0].weight).grad_norms > 0).tolist() == [
        True,
        False,
    ], "an absent task has no say"
    gn.weighted_sum(values, torch.tensor([1.0, 2.0])).backward()
    with pytest.raises(ValueError, match=r"backward\(\) has run already. Give weights="):
        gn.measure_losses(values, copies)
    norms = gn.measure_losses(values, copies, weights=torch.tensor([1.0, 2.0])).grad_norms
    torch.testing.assert_close(norms, gn.measure_losses(*losses()[::-1]).grad_norms)
    assert (norms > 0).all()


CUT = {
    "float": float,
    "item": torch.Tensor.item,
    "numpy": lambda loss: loss.numpy()[()],
    "detached": lambda loss: loss,
    "constant": lambda loss: torch.tensor(0.0),
}


@pytest.mark.parametrize("place", ["z", "W"])
@pytest.mark.parametrize("cut", CUT)
def test_a_loss_without_a_graph_in_a_loop_of_ones_own(cut, place):
    """A number was an AttributeError, and what is detached had the norm 0; an absent task may be one."""
    trunk, heads = (
        torch.nn.Linear(3, 3),
        torch.nn.ModuleDict({"kind": torch.nn.Linear(3, 1), "price": torch.nn.Linear(3, 1)}),
    )

    def stats():
        z = gn.fork(trunk(torch.ones(2, 3)), heads)
        losses = {name: head(z[name]).square().mean() for name, head in heads.items()}
        losses["price"] = CUT[cut](losses["price"].detach())
        return gn.measure_losses(losses, z) if place == "z" else gn.measure_losses(losses, where=trunk.weight)

    balancer = gn.gradnorm()
    state = balancer.init(heads)
    message = r"losses without a gradient: 'price'\. Return the 0-d tensor.*left out by mask="
    for measured in (stats(), gn.merge(stats(), stats())):
        for balance in (balancer.balance, gn.gradnorm_balance):
            with pytest.raises(ValueError, match=message):
                balance(state, measured)
            _, info = balance(state, measured, mask={"kind": True, "price": False})
            assert info.finite
            assert (info.grad_norms > 0).tolist() == [True, False]
    z = gn.fork(trunk(torch.ones(2, 3)), heads)
    whole = gn.measure_losses({name: head(z[name]).square().mean() for name, head in heads.items()}, z)
    if place == "z":
        assert balancer.balance(state, gn.merge(stats(), whole))[1].finite, "absent from one micro-batch alone"


def test_a_head_that_reads_z_itself():
    """Its norm was 0 without a word; a penalty on the trunk does read none."""
    trunk, heads = (
        torch.nn.Linear(3, 3),
        torch.nn.ModuleDict({"kind": torch.nn.Linear(3, 1), "price": torch.nn.Linear(3, 1)}),
    )
    z = trunk(torch.ones(2, 3))
    copies = gn.fork(z, heads)
    losses = {"kind": heads["kind"](z).sum(), "price": heads["price"](copies["price"]).sum()}
    with pytest.raises(
        ValueError, match=r"losses\['kind'\] does not read its own copy of z, but z: .*copies\['kind'\]"
    ):
        gn.measure_losses(losses, copies)
    losses["kind"] = trunk.weight.square().sum()
    assert (gn.measure_losses(losses, copies).grad_norms > 0).tolist() == [False, True]


def test_measure_losses_at_parameters_after_backward():
    weight = torch.ones(3, requires_grad=True)
    losses = [weight.square().sum(), weight.exp().sum()]
    gn.weighted_sum(losses, torch.ones(2)).backward()
    with pytest.raises(ValueError, match=r"backward\(\) has run already\. Call measure_losses before backward\(\)"):
        gn.measure_losses(losses, where=weight)


def test_the_loss_itself_names_the_tasks():
    _, _, info = gn.gradnorm_grad(fresh(), P, SEAM, B, form="paper")
    assert gn.task_names(SEAM) == ["t0", "t1", "t2"]
    assert gn.log_dict(info, SEAM)["weights/t1"] == 1
    assert gn.by_name(SEAM, info.losses)["t2"] == info.losses[2]
