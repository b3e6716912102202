"""What `gn.sweep` gains over its runs one after another, compiled both, as a ratio of time per step and run.

A run is `gradnorm` at z and Adam on the parameters, of the model of `overhead.py` with ten tasks, whose heads have ten
outputs (as a classifier's) or the hundred of the paper's toy. The single run is the
same step without vmap, compiled, which also writes its parameters in place and keeps its history in the same way. Both
are run in turn in one process: some steps of all runs of the sweep, then as many of each single run, one run after
another. A number is the ratio of two medians, and above 1 the sweep is faster. No absolute time is reported.

    OMP_NUM_THREADS=1 python benchmarks/sweep.py > benchmarks/sweep.md     # some minutes, most of them the compiler's
"""

from __future__ import annotations

import argparse
import itertools
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from models import Case, mlp

import gradnorm_func as gn

SHAPES = [(32, 64), (100, 200)]
NUM_TASKS, STEPS = 10, 5
ALPHAS, RATES = [0.0, 0.12, 0.5, 1.5], [1e-3, 1e-2]
Clock = Callable[[], float]


def start(case: Case, seed: int) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {name: leaf + 0.01 * torch.randn(leaf.shape, generator=draw) for name, leaf in case.params.items()}


def singles(case: Case, count: int) -> list[Callable[[], None]]:
    """The runs by themselves, `STEPS` steps a call, all of them through one compiled step."""
    adam = gn.adam(1e-3)

    def step(alpha: Any, rate: Any, params: Any, moments: Any, state: Any, batch: Any) -> Any:
        balancer = gn.gradnorm(alpha=alpha, optimizer=gn.adam(rate))
        grads, new, info = balancer.grad(state, params, case.loss, batch)
        info = type(info)(*(field.clone() for field in info))
        for name, leaf in params.items():
            move, moment = adam.update(grads[name], moments[name], leaf)
            leaf.copy_(torch.where(info.finite, leaf + move, leaf))
            for old, fresh in zip(moments[name], moment, strict=True):
                old.copy_(torch.where(info.finite, fresh, old))
        for old, fresh in zip([*state[:-1], *state.moments], [*new[:-1], *new.moments], strict=True):
            old.copy_(fresh)
        return info

    run = torch.compile(step, fullgraph=True, dynamic=False)

    def bind(alpha: float, rate: float, seed: int) -> Callable[[], None]:
        params = start(case, seed)
        moments = {name: adam.init(leaf) for name, leaf in params.items()}
        state, hyper = gn.init_state(NUM_TASKS), (torch.tensor(alpha), torch.tensor(rate))
        history = []

        def go() -> None:
            history[:] = [run(*hyper, params, moments, state, case.batch) for _ in range(STEPS)]

        return go

    combinations = [(a, r, s) for a in ALPHAS for r in RATES for s in range(count // (len(ALPHAS) * len(RATES)))]
    return [bind(*combination) for combination in combinations]


def gain(case: Case, count: int, chunk_size: int | None, rounds: int, clock: Clock) -> float:
    """Time of the runs one after another / time of the sweep."""
    torch._dynamo.reset()
    alone, swept = [], []
    runs = singles(case, count)
    with torch.no_grad():
        runs[0]()

    def batches() -> Iterator[Any]:
        for _ in range(3):  # compiled and warm
            yield case.batch
        for _ in range(rounds):
            begin = clock()
            for _ in range(STEPS):
                yield case.batch
            swept.append(clock() - begin)
            begin = clock()
            for go in runs:
                go()
            alone.append(clock() - begin)

    gn.sweep(
        lambda seed: start(case, seed),
        case.loss,
        batches(),
        chunk_size=chunk_size,
        progress=False,
        grid={"alpha": ALPHAS, "rate": RATES},
        seeds=range(count // (len(ALPHAS) * len(RATES))),
        balancer=lambda alpha, rate: gn.gradnorm(alpha=alpha, optimizer=gn.adam(rate)),
        optimizer=gn.adam(1e-3),
    )
    return statistics.median(alone) / statistics.median(swept)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=32, help="a multiple of 8")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--chunks", type=int, nargs="+", default=[32, 8], help="chunk_size, runs at a time")
    parser.add_argument("--heads", nargs="+", choices=["list", "stacked"], default=["list"])
    parser.add_argument("--outputs", type=int, nargs="+", default=[10, 100], help="of a head")
    parser.add_argument("--widths", type=int, nargs="+", default=[width for width, _ in SHAPES])
    parser.add_argument("--cpu-time", action="store_true", help="of the process, for a machine that others use too")
    args = parser.parse_args()
    clock = time.process_time if args.cpu_time else time.perf_counter
    torch.set_num_threads(1)
    torch.zeros(31 * 2**18)  # as in overhead.py: no row is to depend on what glibc has freed before it
    print("# Sweeps\n\nPrinted by `python benchmarks/sweep.py` (see its docstring for the rules).\n")
    print(
        f"torch {torch.__version__}, {platform.machine()}, 1 thread, {'CPU' if args.cpu_time else 'wall-clock'} time; "
        f"{args.runs} runs: alpha in {ALPHAS}, weight learning rate in {RATES}, seeds from 0; T = {NUM_TASKS}; "
        f"median of {args.rounds} rounds of {STEPS} steps\n\n"
        "Time of the runs one after another / time of the sweep\n"
    )
    print("| width, batch | heads | outputs | " + " | ".join(f"chunk_size={c}" for c in args.chunks) + " |")
    print("|---" * (3 + len(args.chunks)) + "|")
    for width, batch in SHAPES:
        if width not in args.widths:
            continue
        for heads, outputs in itertools.product(args.heads, args.outputs):
            case = mlp(NUM_TASKS, width, batch, stacked=heads == "stacked", outputs=outputs)
            cells = [f"{gain(case, args.runs, chunk, args.rounds, clock):.2f}" for chunk in args.chunks]
            print(f"| {width}, {batch} | {heads} | {outputs} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
