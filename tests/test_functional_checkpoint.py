"""Activation checkpointing inside a functional module: the recomputation runs on params, not on the module's own."""

import copy
import threading

import pytest
import torch
from oracle import assert_near, gradients
from torch import nn
from torch.distributed._composable import checkpoint as composable_checkpoint
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import gradnorm_func as gn
from gradnorm_func._tools import substitute

D = {"dtype": torch.float64}


class Block(nn.Module):
    """A layer with batch norm and dropout; how it is checkpointed can be exchanged."""

    def __init__(self, width=4, p=0.5):
        super().__init__()
        self.linear, self.norm, self.drop = nn.Linear(width, width), nn.BatchNorm1d(width), nn.Dropout(p)
        self.run = lambda function, x: function(x)

    def layer(self, x):
        return self.drop(torch.tanh(self.norm(self.linear(x))))

    def forward(self, x):
        return self.run(self.layer, x)


def plain(function, x):
    return function(x)


def not_reentrant(function, x):
    return checkpoint(function, x, use_reentrant=False)


def whole_forward(function, x):
    return checkpoint(function, x, use_reentrant=False, early_stop=False)


def twice(function, x):
    return checkpoint(not_reentrant, function, x, use_reentrant=False)


def sequential(function, x):
    return checkpoint_sequential([function, torch.sin, torch.tanh], 2, x, use_reentrant=False)


def sequential_plain(function, x):
    return torch.tanh(torch.sin(function(x)))


WAYS = {
    "not reentrant": (not_reentrant, plain),
    "no early stop": (whole_forward, plain),
    "nested": (twice, plain),
    "sequential": (sequential, sequential_plain),
}


class Model(nn.Module):
    def __init__(self, run):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(3, 4), Block(), Block())
        self.heads = nn.ModuleDict({name: nn.Sequential(Block(), nn.Linear(4, 2)) for name in "ab"})
        self.double()
        for part in self.modules():
            if isinstance(part, Block):
                part.run = run


def losses_of(call, params, x):
    """The two losses, by a function that calls a part of the model."""
    torch.manual_seed(7)  # of dropout
    z = call("trunk", params, x)
    return {name: call(f"heads.{name}", params, z).square().mean() * (i + 1) for i, name in enumerate("ab")}


def expected_of(model, run, params, x):
    """The reference: a loop of autograd.grad over a module with these parameters and without checkpointing."""
    twin = copy.deepcopy(model)
    twin.load_state_dict(params, strict=False)
    for part in twin.modules():
        if isinstance(part, Block):
            part.run = run
    losses = losses_of(lambda path, _, x: twin.get_submodule(path)(x), None, x)
    return losses, {name: gradients(loss, list(twin.parameters())) for name, loss in losses.items()}


def assert_rows_near(found, expected):
    size = 10 * max(float(row.abs().max()) for row in expected)  # the bias before a batch norm is all rounding
    for ours, theirs in zip(found, expected, strict=True):
        assert_near(ours, theirs, scale=size)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_task_gradients_are_those_at_params(way, train):
    run, unchecked = WAYS[way]
    model, x = Model(run).train(train), torch.randn(6, 3, **D)
    params = {name: torch.randn_like(leaf).requires_grad_() for name, leaf in model.named_parameters()}
    losses, rows = expected_of(model, unchecked, params, x)
    before = copy.deepcopy(model.state_dict())
    parts = {
        path: gn.functional(model.get_submodule(path), path, buffers=False) for path in ("trunk", "heads.a", "heads.b")
    }
    call = lambda path, params, x: parts[path](params, x)
    found = losses_of(call, params, x)
    for name, loss in found.items():
        assert torch.equal(loss, losses[name])
        assert_rows_near(gradients(loss, list(params.values())), rows[name])
    assert all(torch.equal(leaf, before[name]) for name, leaf in model.state_dict().items())


@pytest.mark.parametrize("way", WAYS)
def test_task_gradients_by_the_engine(way):
    run, unchecked = WAYS[way]
    model, x = Model(run), torch.randn(6, 3, **D)
    params = {name: torch.randn_like(leaf) for name, leaf in model.named_parameters()}
    losses, rows = expected_of(model, unchecked, params, x)
    parts = {
        path: gn.functional(model.get_submodule(path), path, buffers=False) for path in ("trunk", "heads.a", "heads.b")
    }
    call = lambda path, params, x: parts[path](params, x)
    found_losses, found = gn.task_grads(lambda params, x: losses_of(call, params, x), params, x)
    for i, name in enumerate("ab"):
        assert torch.equal(found_losses[name], losses[name].detach())
        assert_rows_near([found[path][i] for path in params], rows[name])


@pytest.mark.parametrize("reentrant", [False, True])
def test_with_backward_and_new_buffers(reentrant):
    """The backward pass leaves the buffers that the call returned alone; the other kind of checkpoint is right, too."""
    block = Block(p=0.0).double()
    block.run = lambda function, x: checkpoint(function, x, use_reentrant=reentrant)
    params = {name: torch.randn_like(leaf).requires_grad_() for name, leaf in block.named_parameters()}
    x = torch.randn(6, 4, **D, requires_grad=True)
    out, buffers = gn.functional(block, buffers=True)(params, x)
    before = copy.deepcopy(buffers)
    out.square().sum().backward()
    assert all(torch.equal(buffer, before[name]) for name, buffer in buffers.items())
    assert buffers["norm.num_batches_tracked"] == 1
    assert block.norm.num_batches_tracked == 0
    twin = Block(p=0.0).double()
    twin.load_state_dict(params, strict=False)
    expected = twin(x)
    assert torch.equal(out, expected)
    assert all(torch.equal(buffers[name], buffer) for name, buffer in twin.named_buffers())
    rows = gradients(expected.square().sum(), list(twin.parameters()))
    assert_rows_near([leaf.grad for leaf in params.values()], rows)
    assert all(leaf.grad is None for leaf in block.parameters())


@pytest.mark.parametrize("wrap", [checkpoint_wrapper, composable_checkpoint])
def test_wrapped_modules(wrap):
    plain_net = nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.Linear(4, 4), nn.Tanh()), nn.Linear(4, 2)).double()
    net = copy.deepcopy(plain_net)
    net[1] = wrap(net[1])
    leaves = [torch.randn_like(leaf).requires_grad_() for leaf in plain_net.parameters()]
    plain_net.load_state_dict(dict(zip(dict(plain_net.named_parameters()), leaves, strict=True)))
    x = torch.randn(6, 3, **D)
    found = gn.functional(net)(dict(zip(dict(net.named_parameters()), leaves, strict=True)), x).square().sum()
    assert_rows_near(gradients(found, leaves), gradients(plain_net(x).square().sum(), list(plain_net.parameters())))


class Forces(nn.Module):
    """The gradient of an energy, taken within the forward pass, and as on a GPU by a thread of its own."""

    def __init__(self, run, in_thread):
        super().__init__()
        self.layer, self.last = nn.Sequential(nn.Linear(3, 4), nn.Tanh()), nn.Linear(4, 1)
        self.run, self.in_thread = run, in_thread
        self.double()

    def forward(self, x):
        energy = self.last(self.run(self.layer, x)).sum()
        forces = []
        take = lambda: forces.extend(torch.autograd.grad(energy, x, create_graph=True))
        if self.in_thread:
            thread = threading.Thread(target=take, daemon=True)
            thread.start()
            thread.join(timeout=20)
        else:
            take()
        return forces[0]


@pytest.mark.parametrize("in_thread", [False, True])
def test_a_backward_pass_within_the_call(in_thread):
    """The recomputation takes place while the call still has the turn."""
    module, x = Forces(not_reentrant, in_thread), torch.randn(6, 3, **D, requires_grad=True)
    params = {name: torch.randn_like(leaf).requires_grad_() for name, leaf in module.named_parameters()}
    twin = Forces(plain, False)
    twin.load_state_dict(params)
    found, expected = gn.functional(module)(params, x), twin(x)
    assert_near(found.detach(), expected.detach())
    assert_rows_near(
        gradients(found.square().sum(), list(params.values())),
        gradients(expected.square().sum(), list(twin.parameters())),
    )


def test_a_functional_within_a_functional():
    """The recomputation of the inner module stands under the substitutions of both."""

    class Outer(nn.Module):
        def __init__(self, run):
            super().__init__()
            self.run, self.scale, self.inner = run, nn.Linear(4, 4), Block(p=0.0)

        def forward(self, params, x):
            self.inner.run = lambda function, x: self.run(lambda x: function(self.scale(x)), x)
            return gn.functional(self.inner, "inner", buffers=False)(params, x)

    outer, x = Outer(not_reentrant).double().eval(), torch.randn(6, 4, **D)
    mine = {name: torch.randn_like(leaf).requires_grad_() for name, leaf in outer.named_parameters()}
    inner = {name: torch.randn_like(leaf).requires_grad_() for name, leaf in mine.items() if "inner" in name}
    found = gn.functional(outer)(mine, inner, x).square().sum()
    twin = Outer(plain).double().eval()
    twin.load_state_dict(mine | inner, strict=False)
    expected = gradients(twin.inner.layer(twin.scale(x)).square().sum(), list(twin.parameters()))
    assert_rows_near(gradients(found, list((mine | inner).values())), expected)


def test_a_torch_without_the_classes_that_are_told_is_warned_of(monkeypatch):
    substitute._follow_checkpoints()  # now, and not again after this test
    substitute._follow_checkpoints.cache_clear()
    module, x = nn.Linear(2, 2), torch.ones(1, 2)
    monkeypatch.delattr(torch.utils.checkpoint, "_CheckpointFrame")
    monkeypatch.delattr(torch.utils.checkpoint, "CheckpointFunction")
    with pytest.warns(UserWarning, match=r"torch.utils.checkpoint.\w+: activation checkpointing inside") as caught:
        gn.functional(module)(dict(module.named_parameters()), x)
    assert len(caught) == 2
