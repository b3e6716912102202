"""What a GPU would have to be waited for, seen without one: by tensors on the meta device, which have no values."""

import numpy as np
import optree
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from toys import BALANCERS, make_batch, make_problem

import gradnorm_func as gn
from gradnorm_func._core.numerics import brought

METHODS = BALANCERS | {
    "gradnorm-all": lambda where: gn.gradnorm(norm_ratios=[1.0, 2.0, 3.0], initial_decay=0.9, burn_in=2, where=where),
    "nash-preference": lambda where: gn.nash(preference={"t0": 1.0, "t1": 2.0, "t2": 3.0}, where=where),
    "pcgrad-order": lambda where: gn.pcgrad(order=[2, 0, 1], where=where),
    "rotograd": lambda where: gn.rotograd(6),
}
PRESENT = {"t0": True, "t1": False, "t2": True}
OPTIONS = {
    "plain": {},
    "mask": {"mask": PRESENT},
    "mask-tensor": {"mask": torch.tensor([True, False, True])},
    "update": {"update": torch.tensor(True)},
    "loss-scale": {"loss_scale": 2.0**10},
    "micro-batches": {"micro_batches": 2},
}


class Waits(TorchDispatchMode):
    """Fails where the host would wait for the device: a copy from one to the other that is not queued.

    `torch.as_tensor(x, device=)` waits, too, out of sight of a mode. A value that is asked for fails by itself.
    """

    def __enter__(self):
        self.patch = pytest.MonkeyPatch()
        for name in ("as_tensor", "tensor"):
            self.patch.setattr(torch, name, self.without_device(getattr(torch, name)))
        return super().__enter__()

    def __exit__(self, *error):
        self.patch.undo()
        return super().__exit__(*error)

    @staticmethod
    def without_device(make):
        def checked(*args, device=None, **kwargs):
            assert device is None or torch.device(device).type == "cpu", "numbers are copied to the device"
            return make(*args, **kwargs)

        return checked

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default and isinstance(args[0], torch.Tensor):
            there = torch.device(kwargs.get("device") or args[0].device)
            assert there.type == args[0].device.type or kwargs.get("non_blocking"), "a copy is waited for"
        if func is torch.ops.aten.copy_.default and isinstance(args[1], torch.Tensor):
            assert args[0].device.type == args[1].device.type or args[2:] == (True,), "a copy is waited for"
        return func(*args, **kwargs)


def on_device(values):
    there = lambda x: torch.empty_like(x, device="meta") if isinstance(x, torch.Tensor) else x
    return optree.tree_map(there, values)


@pytest.mark.parametrize(
    ("name", "options"),
    [*((name, options) for name in METHODS for options in ("plain", "mask")), *(("gradnorm", o) for o in OPTIONS)],
)
def test_no_copy_is_waited_for(name, options):
    balancer, problem = METHODS[name](None), make_problem(dtype=torch.float32)
    state, params, batch = map(on_device, (balancer.init(3), problem.params, make_batch(0, dtype=torch.float32)))
    with Waits():
        grads, state, info = balancer.grad(state, params, problem.seam, batch, **OPTIONS[options])
        gn.write_grads(params, grads, finite=info.finite)
    assert {x.device.type for x in optree.tree_leaves((grads, state, info))} == {"meta"}


@pytest.mark.parametrize("mask", [None, PRESENT], ids=["all", "some"])
@pytest.mark.parametrize("name", [name for name in METHODS if name not in ("rotograd", "ntk")])
def test_nor_in_a_loop_of_one_s_own(name, mask):
    balancer, problem = METHODS[name](None), make_problem(dtype=torch.float32)
    state, params, batch = map(on_device, (balancer.init(3), problem.params, make_batch(0, dtype=torch.float32)))
    leaf = params["trunk.0"].requires_grad_()
    with Waits():
        z = gn.fork(torch.tanh(batch[0] @ leaf.mT), PRESENT)
        losses = {task: copy.square().mean() for task, copy in z.items()}
        stats = gn.measure_losses(losses, z, needs=balancer.needs)
        state, info = balancer.balance(state, stats, mask=mask)
        gn.weighted_sum(losses, info.weights).backward(retain_graph=True)
        gn.weigh_trunk(z, info.weights)
    assert leaf.grad.device.type == "meta"


@pytest.mark.parametrize("number", [0.5, np.float32(0.5), np.array(0.5), torch.tensor(0.5)], ids=repr)
def test_a_number_is_brought_whatever_holds_it(number):
    with Waits():
        assert brought(number, torch.ones(2, device="meta")).device.type == "meta"
    assert brought(number, torch.ones(2, dtype=torch.float64)).item() == 0.5


def test_the_watch_sees_what_is_waited_for():
    there = torch.ones(2, device="meta")
    for wait in (
        lambda: torch.ones(2).to(there),
        lambda: there.copy_(torch.ones(2)),
        lambda: torch.as_tensor(1.0, device="meta"),
    ):
        with pytest.raises(AssertionError), Waits():
            wait()
    with Waits():
        torch.ones(2).to(there, non_blocking=True)
