"""functional from several threads at once."""

import threading

import pytest
import torch
from functional_cases import assert_unchanged, other_params, tensors_of, with_params
from torch import nn

import gradnorm_func as gn


class Slow(nn.Module):
    """A layer that lets other threads go on in the middle of its forward pass."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.double()

    def forward(self, x):
        h = self.first(x)
        threading.Event().wait(0.002)
        return self.second(h)


@pytest.mark.parametrize("order", [("whole", "part"), ("part", "whole")])
def test_threads_do_not_mix_their_parameters(order):
    """Three threads call the whole of a model, three a part of it, each with its own parameters."""
    model, x = nn.Sequential(Slow(), nn.Tanh()).double(), torch.randn(2, 3, dtype=torch.float64)
    before, wrong, start = tensors_of(model), [], threading.Barrier(6)
    calls = {"whole": gn.functional(model), "part": gn.functional(model[0], "0")}
    for kind in order:  # whichever is seen first
        calls[kind](other_params(model), x)

    def work(kind, params, expected):
        start.wait()
        wrong.extend(i for i in range(10) if not torch.equal(calls[kind](params, x), expected))

    threads = []
    for kind in ("whole", "part") * 3:
        params = other_params(model)
        twin = with_params(model, params)
        expected = (twin if kind == "whole" else twin[0])(x).detach()
        threads.append(threading.Thread(target=work, args=(kind, params, expected)))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert_unchanged(model, before)


def test_threads_with_models_of_their_own_do_not_wait():
    """Each is in the middle of its forward pass when the other one is: with one lock for all, they would never meet."""
    meet = threading.Barrier(2, timeout=20)

    class Meeting(nn.Linear):
        def forward(self, x):
            meet.wait()
            return super().forward(x)

    broken = []

    def work():
        module = Meeting(2, 2)
        try:
            gn.functional(module)(other_params(module), torch.ones(1, 2))
        except threading.BrokenBarrierError as error:
            broken.append(error)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not broken
