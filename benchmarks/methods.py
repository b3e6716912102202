"""What a step of each balancing method costs, as a ratio to the plain weighted-sum step, and its inner solve alone.

A step is: losses, gradients of all parameters and this step's weights, at z. All methods are run in turn with the plain
step, round after round, in one process; a number is the ratio of two medians. TorchJD's step is its `mtl_backward` and
its aggregator on the shared parameters, "-" where it has none or asks for solver packages that are not here.

    python benchmarks/methods.py                  # all sizes, one thread: about half an hour
    python benchmarks/methods.py --quick          # the smallest size, a few rounds: does it run?
    python benchmarks/methods.py --methods nash upgrad --tables solve
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from models import Case, mlp
from overhead import MLP_SHAPES, Step, medians, plain_functional, table, weighted

import gradnorm_func as gn
from gradnorm_func._solvers.aligned import align
from gradnorm_func._solvers.cone import project_each, project_mean
from gradnorm_func._solvers.equal import equal_projections
from gradnorm_func._solvers.fair import fair
from gradnorm_func._solvers.min_norm import min_norm
from gradnorm_func._solvers.surgery import project_in_turn
from gradnorm_func._solvers.trust import near_mean


class Method(NamedTuple):
    make: Callable[[], Any]
    peer: Callable[[Any, int], Any] | None = None  # (torchjd.aggregation, T) -> TorchJD's aggregator


# A row of the tables is a line here.
METHODS = {
    "GradNorm": Method(gn.gradnorm),
    "equal_norms": Method(gn.equal_norms),
    "uncertainty": Method(gn.uncertainty),
    "rlw": Method(gn.rlw),
    "mgda": Method(gn.mgda, lambda jd, count: jd.MGDA()),
    "cagrad": Method(gn.cagrad, lambda jd, count: jd.CAGrad(c=0.4)),
    "nash": Method(gn.nash, lambda jd, count: jd.NashMTL(n_tasks=count)),
    "fairgrad": Method(gn.fairgrad, lambda jd, count: jd.FairGrad(alpha=2.0)),
    "aligned": Method(gn.aligned, lambda jd, count: jd.AlignedMTL()),
    "config": Method(gn.config, lambda jd, count: jd.ConFIG()),
    "imtl_g": Method(gn.imtl_g, lambda jd, count: jd.IMTLG()),
    "upgrad": Method(gn.upgrad, lambda jd, count: jd.UPGrad()),
    "dualproj": Method(gn.dualproj, lambda jd, count: jd.DualProj()),
    "pcgrad": Method(gn.pcgrad, lambda jd, count: jd.PCGrad()),
}
SOLVERS: dict[str, Callable[..., Any]] = {
    "mgda": min_norm,
    "cagrad": lambda g, active: near_mean(g, active, g.new_full((), 0.4)),
    "nash": lambda g, active: fair(g, active, active.to(g), g.new_ones(())),
    "fairgrad": lambda g, active: fair(g, active, active.to(g), g.new_full((), 2.0)),
    "aligned": lambda g, active: align(g, active, active.to(g)),
    "config, imtl_g": equal_projections,
    "upgrad": project_each,
    "dualproj": project_mean,
    "pcgrad": lambda g, active: project_in_turn(g, active, torch.arange(len(g), device=g.device)),
}


def peer_step(case: Case, peer: Callable[[Any, int], Any] | None) -> Step | None:
    """TorchJD's step: Jacobian at the shared parameters, aggregated, and the heads' own gradients."""
    try:
        import torchjd.aggregation
        from torchjd.autojac import jac_to_grad, mtl_backward

        aggregator = None if peer is None else peer(torchjd.aggregation, case.num_tasks)
    except ImportError:
        return None
    if aggregator is None:
        return None
    leaves = {name: leaf.clone().requires_grad_() for name, leaf in case.params.items()}
    shared = [leaf for name, leaf in leaves.items() if name.startswith("trunk")]

    def step() -> None:
        for leaf in leaves.values():
            leaf.grad = None
        z, _, _ = case.loss.shared(leaves, case.batch)
        mtl_backward([head(leaves, z, case.batch) for head in case.loss.functions], features=z)
        jac_to_grad(shared, aggregator)

    return step


def plain_step(case: Case) -> Step:
    leaves = {name: leaf.clone().requires_grad_() for name, leaf in case.params.items()}
    even = torch.ones(case.num_tasks, device=case.batch[0].device)

    def step() -> None:
        for leaf in leaves.values():
            leaf.grad = None
        weighted(case.loss(leaves, case.batch), even).backward()

    return step


def compiled(fn: Callable[..., Any], *arguments: Any) -> tuple[Step, float]:
    """The compiled step, and how long its first call took, in a fresh cache."""
    # Code of its own, or every call would go through the guards of all methods, which are compiled from one lambda.
    code = fn.__code__.replace()
    own = types.FunctionType(code, fn.__globals__, fn.__name__, fn.__defaults__, fn.__closure__)
    with torch._inductor.utils.fresh_inductor_cache():
        step = torch.compile(own, fullgraph=True)
        start = time.perf_counter()
        step(*arguments)
        return lambda: step(*arguments), time.perf_counter() - start


def full_steps(case: Case, names: list[str], seconds: float, device: str, with_compiled: bool) -> None:
    """One table: a row a method."""
    steps: dict[str, Step] = {"plain": plain_step(case)}
    took: dict[str, float] = {}
    for name in names:
        method = METHODS[name].make()
        fresh = method.init(case.num_tasks, device=case.batch[0].device)
        _, state, _ = method.grad(fresh, case.params, case.loss, case.batch)  # a first step is no usual one
        bound = lambda state, params, batch, method=method: method.grad(state, params, case.loss, batch)
        steps[name] = lambda bound=bound, state=state: bound(state, case.params, case.batch)
        peer = peer_step(case, METHODS[name].peer)
        if peer is not None:
            steps[f"{name}, TorchJD"] = peer
        if with_compiled:
            steps[f"{name}, compiled"], took[name] = compiled(bound, state, case.params, case.batch)
    if with_compiled:
        even = torch.ones(case.num_tasks, device=case.batch[0].device)
        steps["plain, compiled"], _ = compiled(plain_functional(case), even, case.params, case.batch)
    found = medians(steps, seconds, device)
    rows = []
    for name in names:
        cells = [ratio(found, name, "plain"), ratio(found, f"{name}, compiled", "plain, compiled")]
        cells += [f"{took[name]:.0f}" if name in took else "-"]
        cells += [ratio(found, f"{name}, TorchJD", "plain"), ratio(found, f"{name}, TorchJD", name)]
        rows.append((name, cells))
    header = [
        "method",
        "eager / plain",
        "compiled / plain compiled",
        "compile, s",
        "TorchJD / plain",
        "TorchJD / eager",
    ]
    count, width, batch = case.num_tasks, case.params["trunk.3.weight"].shape[0], case.batch[0].shape[0]
    table(f"Full step, MLP (T, width, batch) = {count}, {width}, {batch}", rows, header)


def ratio(found: dict[str, float], name: str, base: str) -> str:
    return f"{found[name] / found[base]:.2f}" if name in found and base in found else "-"


def gramian(count: int, kind: str, device: str) -> torch.Tensor:
    draw = torch.Generator().manual_seed(count)
    rows = torch.randn(count, 2 * count, generator=draw, dtype=torch.float64)
    if kind == "conflicting":
        rows += torch.linspace(-3, 3, count)[:, None] * torch.randn(2 * count, generator=draw)
    return (rows @ rows.T).to(device)


def solves(names: list[str], counts: list[int], rounds: int, device: str, with_compiled: bool) -> None:
    """The inner problem alone, in milliseconds: median of generic draws, then of conflicting ones."""
    header = ["method", *(f"T = {count}" for count in counts)]
    for mode in ("eager", "compiled") if with_compiled else ("eager",):
        rows = []
        for name, solver in SOLVERS.items():
            if not set(name.split(", ")) & set(names):
                continue
            cells = []
            for count in counts:
                active, pair = torch.ones(count, dtype=torch.bool, device=device), []
                step = solver if mode == "eager" else torch.compile(solver, fullgraph=True)
                for kind in ("generic", "conflicting"):
                    g = gramian(count, kind, device)
                    pair.append(f"{1e3 * median_of(lambda step=step, g=g, a=active: step(g, a), rounds, device):.2f}")
                cells.append(", ".join(pair))
            rows.append((name, cells))
        table(f"Inner solve alone, {mode}, ms: generic, conflicting", rows, header)


def median_of(step: Step, rounds: int, device: str) -> float:
    times = []
    for i in range(rounds + 3):
        start = time.perf_counter()
        step()
        if device == "cuda":
            torch.cuda.synchronize()
        if i >= 3:
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--tables", nargs="+", choices=["solve", "step"], default=["solve", "step"])
    parser.add_argument("--seconds", type=float, default=60, help="for the timed rounds of one table")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--no-compile", action="store_true", help="eager columns only")
    parser.add_argument("--quick", action="store_true", help="few rounds at the smallest sizes")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    torch.zeros(31 * 2**18)  # as in overhead.py
    where = torch.cuda.get_device_name() if args.device == "cuda" else platform.machine()
    print(f"torch {torch.__version__}, {where}, 1 thread; seed 0")
    if "solve" in args.tables:
        solves(args.methods, [2, 10] if args.quick else [2, 10, 40, 128], 5 if args.quick else 50, args.device,
               not args.no_compile)  # fmt: skip
    if "step" in args.tables:
        for shape in [(3, 32, 16)] if args.quick else [(10, 1024, 256), (40, 256, 256), (10, 100, 200)]:
            assert args.quick or shape in MLP_SHAPES
            case = mlp(*shape, device=args.device)
            full_steps(case, args.methods, 1 if args.quick else args.seconds, args.device, not args.no_compile)


if __name__ == "__main__":
    main()
