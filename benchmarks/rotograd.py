"""Cost of a RotoGrad step against the plain step and the published package, and against T and d.

    python benchmarks/rotograd.py [--rounds 30] [--quick] [--cpu-time]

One thread; medians of interleaved runs in one process. A step is: losses, gradients of all parameters, new rotations
(the package: its backward under `cached()` and Adam on the rotations). The package needs rotograd==0.1.6.0 with
geotorch==0.3.0.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

import gradnorm_func as gn


def model(tasks: int, d: int, batch: int) -> tuple[nn.Module, list[nn.Module], torch.Tensor, torch.Tensor]:
    """Backbone 64 -> 256 -> d, affine heads of 10, squared errors."""
    torch.manual_seed(0)
    trunk = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, d))
    heads = [nn.Linear(d, 10) for _ in range(tasks)]
    return trunk, heads, torch.randn(batch, 64), torch.randn(tasks, batch, 10)


def mse(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (prediction - target).square().mean()


def plain(tasks: int, d: int, batch: int) -> tuple[Callable, Callable]:
    """The sum of the losses: eager through autograd, compiled through torch.func."""
    trunk, heads, x, y = model(tasks, d, batch)
    params = [*trunk.parameters(), *(p for head in heads for p in head.parameters())]

    def eager() -> None:
        z = trunk(x)
        torch.autograd.grad(sum(mse(head(z), t) for head, t in zip(heads, y, strict=True)), params)

    values, loss_fn = seam(trunk, heads)
    total = lambda p, batch: sum(loss_fn(p, batch))
    step = torch.compile(torch.func.grad(total), fullgraph=True)
    return eager, lambda: step(values, (x, y))


def seam(trunk: nn.Module, heads: list[nn.Module]) -> tuple[dict[str, torch.Tensor], gn._core.loss.MultiTaskLoss]:
    values = {f"trunk.{n}": p.detach() for n, p in trunk.named_parameters()}
    values |= {f"head{k}.{n}": p.detach() for k, head in enumerate(heads) for n, p in head.named_parameters()}
    backbone = gn.functional(trunk, "trunk")

    def head(k: int) -> Callable:
        fn = gn.functional(heads[k], f"head{k}")
        return lambda params, z, batch: mse(fn(params, z), batch[1][k])

    return values, gn.multi_task_loss(lambda p, batch: backbone(p, batch[0]), [head(k) for k in range(len(heads))])


def ours(tasks: int, d: int, batch: int, compiled: bool, **hyper: object) -> Callable:
    trunk, heads, x, y = model(tasks, d, batch)
    values, loss_fn = seam(trunk, heads)
    method = gn.rotograd(d, **hyper)
    states = [method.init(tasks, rotations=gn.random_rotations(tasks, d))]
    step = lambda state, params, data: method.grad(state, params, loss_fn, data)
    step = torch.compile(step, fullgraph=True) if compiled else step

    def run() -> None:
        _, states[0], _ = step(states[0], values, (x, y))

    return run


def package(tasks: int, d: int, batch: int) -> Callable | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # This script has the package's name and its folder comes first on the path.
        folders = list(sys.path)
        sys.path[:] = [p for p in folders if Path(p).resolve() != Path(__file__).resolve().parent]
        try:
            import rotograd
        except ImportError:
            return None
        finally:
            sys.path[:] = folders
    trunk, heads, x, y = model(tasks, d, batch)
    roto = rotograd.RotoGrad(trunk, heads, d)
    roto.train()
    optimizer = torch.optim.Adam(roto.parameters(), lr=5e-4)
    params = [*trunk.parameters(), *(p for head in heads for p in head.parameters())]

    def run() -> None:
        optimizer.zero_grad()
        for p in params:
            p.grad = None
        with rotograd.cached():  # its own way to compute every rotation once a step
            roto.backward([mse(p, t) for p, t in zip(roto(x), y, strict=True)])
        optimizer.step()

    return run


def medians(runs: dict[str, Callable], rounds: int, clock: Callable[[], float]) -> dict[str, float]:
    """Milliseconds, the runs taking turns so that a slow minute of the machine hits all of them."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 3):
        for name, run in runs.items():
            start = clock()
            run()
            if turn >= 3:
                times[name].append((clock() - start) * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30, help="timed rounds (default: 30)")
    parser.add_argument("--quick", action="store_true", help="the main size only")
    parser.add_argument("--cpu-time", action="store_true", help="the thread's CPU time, for a machine that is not idle")
    args = parser.parse_args()
    # glibc raises its mapping threshold to the largest block freed so far: do that once, so that no row depends on
    # which came before it.
    torch.zeros(31 * 2**18)  # float32, freed at once
    clock = time.thread_time if args.cpu_time else time.perf_counter
    torch.set_num_threads(1)
    sizes = [(10, 128, 256)]
    if not args.quick:
        sizes += [(2, 128, 256), (5, 128, 256), (20, 128, 256), (10, 32, 256), (10, 64, 256), (10, 256, 256)]
    print(f"torch {torch.__version__}, one thread, medians of {args.rounds} rounds, ms")
    for tasks, d, batch in sizes:
        torch._dynamo.reset()
        eager, compiled = plain(tasks, d, batch)
        runs = {
            "plain eager": eager,
            "plain compiled": compiled,
            "rotograd eager": ours(tasks, d, batch, False),
            "rotograd compiled": ours(tasks, d, batch, True),
            "rotograd, exp, compiled": ours(tasks, d, batch, True, map="exp"),
            "package-equal form, eager": ours(tasks, d, batch, False, form="0.1.6", map="exp", moving=False),
        }
        published = package(tasks, d, batch)
        if published is not None:
            runs["package 0.1.6"] = published
        times = medians(runs, args.rounds, clock)
        reference = times.get("package 0.1.6")
        print(f"\nT={tasks} d={d} batch={batch}")
        print(f"{'':28}{'ms':>8}{'/ plain eager':>15}{'/ plain compiled':>18}{'package / this':>16}")
        for name, ms in times.items():
            against = f"{reference / ms:16.2f}" if reference else f"{'-':>16}"
            print(f"{name:28}{ms:8.2f}{ms / times['plain eager']:15.2f}{ms / times['plain compiled']:18.2f}{against}")


if __name__ == "__main__":
    main()
