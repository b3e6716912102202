"""What a step of GradInit costs: against a plain gradient, eager and compiled, next to the gradinit package.

    OMP_NUM_THREADS=1 python benchmarks/gradinit_step.py

Eight linear layers of one width with ReLU, mean squared error, float32, one thread; medians of interleaved runs in one
process. The norm is above γ throughout, so every step is a second-order one. Peak memory is that of the tensors
alive during one call beyond those alive before it, from the allocator's own record.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import gradnorm_func as gn

GAMMA = 1e-6


def make(depth: int, width: int, batch: int) -> tuple[dict[str, Tensor], tuple[Tensor, Tensor], nn.Module]:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [nn.Linear(width, width), nn.ReLU()]
    net = nn.Sequential(*layers[:-1])
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=1.3 / width**0.5)
    params = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
    return params, (torch.randn(batch, width), torch.randn(batch, width)), net


def loss_fn(params: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
    h = batch[0]
    depth = len(params) // 2
    for i in range(depth):
        h = nn.functional.linear(h, params[f"{2 * i}.weight"], params[f"{2 * i}.bias"])
        h = torch.relu(h) if i < depth - 1 else h
    return (h - batch[1]).square().mean()


def our_steps(params: dict[str, Tensor], batch: Any) -> dict[str, Callable[[], Any]]:
    """The plain gradient and both forms, eager and compiled."""
    optimizer = gn.adam(1e-3)

    def simple(state: Any, params: Any, batch: Any) -> Any:
        return gn.gradinit_step(state, params, loss_fn, batch, form="simple", gamma=GAMMA, optimizer=optimizer)

    def paper(state: Any, params: Any, batch: Any) -> Any:
        return gn.gradinit_step(state, params, loss_fn, batch, gamma=GAMMA)

    plain = torch.func.grad(loss_fn)
    steps: dict[str, Callable[[], Any]] = {}
    for word, wrap in (("eager", lambda f: f), ("compiled", lambda f: torch.compile(f, fullgraph=True))):
        grad = wrap(lambda params, batch: plain(params, batch))
        steps[f"torch.func.grad, {word}"] = lambda grad=grad: grad(params, batch)
        for name, step, opt in (("simple", simple, optimizer), ("paper", paper, None)):
            run, start = wrap(step), gn.gradinit_init_state(params, optimizer=opt)
            steps[f"gradinit_step {name}, {word}"] = lambda run=run, start=start: run(start, params, batch)
    return steps


def autograd_step(params: dict[str, Tensor], batch: Any) -> Callable[[], Any]:
    leaves = {name: leaf.clone().requires_grad_() for name, leaf in params.items()}
    return lambda: torch.autograd.grad(loss_fn(leaves, batch), list(leaves.values()))


def package_step(net: nn.Module, batch: Any) -> tuple[Callable[[], Any], Callable[[], None]] | None:
    """One iteration of the gradinit package's recommended loop, and what ends it."""
    try:
        from gradinit import GradInitWrapper
    except ImportError:
        return None
    wrapper = GradInitWrapper(net)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-6)  # so small that the model stays the same

    def step() -> None:
        loss = (net(batch[0]) - batch[1]).square().mean()
        objective = wrapper.grad_loss(loss, norm=2, gamma=GAMMA)
        optimizer.zero_grad()
        objective.backward()
        optimizer.step()
        wrapper.clamp_scales()

    return step, wrapper.detach


def timings(steps: dict[str, Callable[[], Any]], rounds: int, clock: Callable[[], float]) -> dict[str, float]:
    """Median milliseconds of each, the runs interleaved."""
    for step in steps.values():
        for _ in range(3):
            step()
    spent: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            start = clock()
            step()
            spent[name].append(clock() - start)
    return {name: 1e3 * statistics.median(times) for name, times in spent.items()}


def peak_memory(step: Callable[[], Any]) -> float:
    """MiB that one call needs at its worst, beyond what was there before."""
    step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        step()
    now = most = 0
    for event in record.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument(
        "--cpu-time", action="store_true", help="this thread's CPU time, for a machine that is not quiet"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    params, batch, net = make(options.depth, options.width, options.batch)
    steps = our_steps(params, batch)
    steps["torch.autograd.grad, eager"] = autograd_step(params, batch)
    package = package_step(net, batch)
    if package is not None:
        steps["gradinit package, eager"] = package[0]
    median = timings(steps, options.rounds, time.thread_time if options.cpu_time else time.perf_counter)

    print(f"{options.depth} layers of width {options.width}, batch {options.batch}, torch {torch.__version__}")
    print(f"{'':36} {'ms':>8} {'ratio':>7} {'peak MiB':>9}   ratio to")
    for name, time_taken in median.items():
        base = "torch.func.grad, compiled" if name.endswith("compiled") else "torch.autograd.grad, eager"
        ratio, memory = time_taken / median[base], peak_memory(steps[name])
        print(f"{name:36} {time_taken:8.3f} {ratio:7.2f} {memory:9.2f}   {base}")
    if package is not None:
        package[1]()  # or the interpreter may abort at exit


if __name__ == "__main__":
    main()
