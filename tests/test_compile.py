"""Every engine under torch.compile: one graph over ten steps, the same numbers as eager."""

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import gradnorm_func as gn


def model():
    torch.manual_seed(0)
    return nn.ModuleDict(
        {
            "trunk": nn.Sequential(
                nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 6), nn.ReLU()
            ),
            "kind": nn.Linear(6, 3),
            "size": nn.Linear(6, 1),
        }
    )


def convolutional(net, heads="dict"):
    """BatchNorm in train mode, its buffers returned as aux; the last layer told apart as a `shared_linear`."""
    first = gn.functional(net["trunk"][:4], "trunk", buffers=True)
    kind, size = gn.functional(net["kind"], "kind"), gn.functional(net["size"], "size")
    functions = {
        "size": lambda p, z, b: (size(p, z).square().mean(), "not a tensor"),
        "kind": lambda p, z, b: (nn.functional.cross_entropy(kind(p, z), b["kind"]), kind(p, z)),
    }
    last = gn.shared_linear("trunk.4.weight", "trunk.4.bias", torch.relu)
    chosen = functions if heads == "dict" else list(functions.values())
    return gn.multi_task_loss(lambda p, b: first(p, b["x"]), chosen, last_shared=last, has_aux=True)


def batch():
    generator = torch.Generator().manual_seed(1)
    return {"x": torch.randn(5, 1, 6, 6, generator=generator), "kind": torch.tensor([0, 1, 2, 0, 1])}


@pytest.mark.parametrize(("where", "heads"), [(None, "dict"), ("trunk.4", "list"), ("trunk.0", "dict")])
def test_batch_norm_in_train_mode(where, heads):
    net = model()
    loss_fn = convolutional(net, heads)
    balancer = gn.gradnorm(where=where, optimizer=gn.sgd(0.1))
    counter = CompileCounterWithBackend("aot_eager")
    step = torch.compile(balancer.grad, fullgraph=True, backend=counter)
    buffers = {name: buffer.clone() for name, buffer in net.named_buffers()}
    eager_state = state = balancer.init(2)
    params = dict(net.named_parameters())
    for _ in range(3):
        expected, eager_state, _, (eager_buffers, _) = balancer.grad(
            eager_state, params, loss_fn, batch(), has_aux=True
        )
        grads, state, _, (new_buffers, outputs) = step(state, params, loss_fn, batch(), has_aux=True)
        assert all(float(g.norm()) > 0 for name, g in expected.items() if name != "trunk.0.bias")
        torch.testing.assert_close(grads, expected)
        torch.testing.assert_close(state, eager_state)
        torch.testing.assert_close(new_buffers, eager_buffers)
        assert not torch.equal(new_buffers["trunk.1.running_mean"], buffers["trunk.1.running_mean"])
        params = {name: (p - 0.1 * grads[name]).detach() for name, p in params.items()}
    assert (outputs["size"] if heads == "dict" else outputs[0]) == "not a tensor"
    # The first step's parameters are nn.Parameters, the later ones tensors: one graph for each.
    assert counter.frame_count <= 2
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in net.named_buffers())


def test_one_graph_and_the_default_compiler():
    """No recompilation when parameters, state and batch change; parity under Inductor."""
    generator = torch.Generator().manual_seed(0)
    params = {"trunk": torch.randn(4, 3, generator=generator), "heads.w": torch.randn(5, 4, generator=generator)}
    heads = gn.stacked_heads(lambda p, z, b: (z @ p["w"] - b[1]).square().mean(), "heads", batch_dims=(None, 1))
    loss_fn = gn.multi_task_loss(lambda p, b: b[0], heads, last_shared=gn.shared_linear("trunk", None, torch.tanh))
    balancer = gn.gradnorm(where="trunk")
    counter = CompileCounterWithBackend("inductor")
    step = torch.compile(balancer.grad, fullgraph=True, backend=counter)
    state = balancer.init(5)
    for _ in range(10):
        data = (torch.randn(8, 3, generator=generator), torch.randn(8, 5, generator=generator))
        expected, expected_state, _ = balancer.grad(state, params, loss_fn, data)
        grads, state, info = step(state, params, loss_fn, data)
        torch.testing.assert_close(grads, expected)
        torch.testing.assert_close(state, expected_state)
        assert bool((info.grad_norms > 0).all())
        params = {name: p - 0.1 * grads[name] for name, p in params.items()}
    assert counter.frame_count == 1


def test_losses_with_derivatives_inside_compile():
    """A PINN's residual: torch.func.grad inside the loss, parameters as the seam."""

    def u(p, x):
        return torch.tanh(x * p["a"]) @ p["b"]

    def residual(p, x):
        slope = torch.func.vmap(torch.func.grad(lambda t: u(p, t)))(x)
        return (slope - x).square().mean()

    loss_fn = gn.multi_task_loss(None, {"residual": residual, "start": lambda p, x: (u(p, x[0]) - 1).square()})
    params = {"a": torch.linspace(0.5, 1.5, 4), "b": torch.linspace(-1, 1, 4)}
    x = torch.linspace(0.2, 1, 7)
    balancer = gn.gradnorm()
    state = balancer.init(2)
    expected = balancer.grad(state, params, loss_fn, x)
    found = torch.compile(balancer.grad, fullgraph=True, backend="aot_eager")(state, params, loss_fn, x)
    assert bool((expected[2].grad_norms > 0).all())
    torch.testing.assert_close(found, expected)


def test_analysis_compiles():
    loss_fn = convolutional(model())
    params = dict(model().named_parameters())
    run = torch.compile(
        lambda p, b: gn.task_grads(loss_fn, p, b, where="trunk.0", has_aux=True)[1], fullgraph=True, backend="aot_eager"
    )
    expected = gn.task_grads(loss_fn, params, batch(), where="trunk.0", has_aux=True)[1]
    assert float(expected["trunk.0.weight"].norm()) > 0
    torch.testing.assert_close(run(params, batch()), expected)


@pytest.mark.parametrize("mask", [None, torch.tensor([True, False])])
def test_a_rule_of_one_s_own_asks_who_is_present(mask):
    """Old compilers cannot calculate with what a property of a NamedTuple returns."""
    balancer = gn.balancer(
        lambda state, seen: ((seen.active & (seen.losses > 0)) * seen.losses, ()), needs="losses", same_step=True
    )
    state, losses = balancer.init(2), torch.tensor([2.0, 3.0])
    balance = lambda losses: balancer.balance(state, gn.TaskStats(losses), mask=mask)[1].weights
    expected = losses if mask is None else losses * mask
    torch.testing.assert_close(balance(losses), expected)
    torch.testing.assert_close(torch.compile(balance, fullgraph=True, backend="eager")(losses), expected)
