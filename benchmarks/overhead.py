"""What a balanced step costs, as a ratio to the plain weighted-sum step under the same compiler setting.

A step is: losses, gradients of all parameters and, but for the plain one, the new task weights. All ways of making it
are run in turn, round after round, in one process; a number is the ratio of two medians. No absolute time is reported.

    python benchmarks/overhead.py                 # every table, one thread and two: about ten minutes
    python benchmarks/overhead.py --tables mlp --threads 1
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from models import Case, cnn, dense, mlp, transformer

import gradnorm_func as gn

Step = Callable[[], Any]
MLP_SHAPES = [(10, 100, 200), (10, 1024, 256), (40, 256, 256)]
EAGER_SHAPES = [(2, 64, 32), (3, 128, 64), *MLP_SHAPES]


def plain_functional(case: Case) -> Callable[..., Any]:
    def step(weights, params, batch):
        def total(p):
            return weighted(case.loss(p, batch), weights)

        return torch.func.grad_and_value(total)(params)

    return step


def weighted(losses, weights):
    if isinstance(losses, torch.Tensor):
        return (weights * losses).sum()
    return sum(w * loss for w, loss in zip(weights.unbind(), losses, strict=True))


def steps_of(case: Case, which: list[str]) -> dict[str, Step]:
    """The steps named, warmed up; compiled ones are compiled here."""
    state = gn.init_state(case.num_tasks, device=case.batch[0].device)
    state, _ = gn.gradnorm_balance(
        state, gn.measure(case.params, case.loss, case.batch)
    )  # a first step is no usual one
    leaves = {name: leaf.clone().requires_grad_() for name, leaf in case.params.items()}

    def plain() -> Any:
        return torch.autograd.grad(weighted(case.loss(leaves, case.batch), state.weights), list(leaves.values()))

    def ours(**keywords: Any) -> Callable[..., Any]:
        loss = keywords.pop("loss", case.loss)
        return lambda state, params, batch: gn.gradnorm_grad(state, params, loss, batch, **keywords)

    general = lambda params, batch: case.loss(params, batch)  # the seam hidden from the engine
    functional = {
        "plain, functional": lambda state, params, batch: plain_functional(case)(state.weights, params, batch),
        "seam at z": ours(),
        "seam at W": ours(where=case.last),
        "general at W": ours(where=case.last, loss=general),
        "frozen": ours(update=False),
    }

    def bind(fn: Callable[..., Any]) -> Step:
        return lambda: fn(state, case.params, case.batch)

    made: dict[str, Step] = {}
    for name in which:
        if name == "plain":
            made[name] = plain
        elif name == "gradnorm-pytorch":
            made[name] = gradnorm_pytorch(case, leaves)
        elif name == "TorchJD mtl_backward":
            made[name] = torchjd(case, leaves)
        elif name == "plain, compiled":
            made[name] = bind(torch.compile(functional["plain, functional"], fullgraph=True))
        elif name.endswith(", compiled"):
            made[name] = bind(torch.compile(functional[name.removesuffix(", compiled")], fullgraph=True))
        elif name.endswith(", CUDA graph"):
            options = {"fullgraph": True, "mode": "reduce-overhead"}
            base = name.removesuffix(", CUDA graph").replace("plain", "plain, functional")
            made[name] = bind(torch.compile(functional[base], **options))
        else:
            made[name] = bind(functional[name])
    return made


def gradnorm_pytorch(case: Case, leaves: dict[str, torch.Tensor]) -> Step:
    from gradnorm_pytorch import GradNormLossWeighter

    weight = torch.nn.Parameter(leaves[case.last].detach().clone())
    params = {**leaves, case.last: weight}
    weighter = GradNormLossWeighter(
        num_losses=case.num_tasks, learning_rate=1e-4, restoring_force_alpha=1.5, grad_norm_parameters=weight
    )

    def step() -> None:
        for leaf in params.values():
            leaf.grad = None
        weighter.backward(torch.stack(list(case.loss(params, case.batch))))

    return step


def torchjd(case: Case, leaves: dict[str, torch.Tensor]) -> Step:
    """Jacobian of all losses at the shared parameters, and the heads' gradients; no balancing on top."""
    from torchjd.autojac import mtl_backward

    heads = case.loss.functions

    def step() -> None:
        for leaf in leaves.values():
            leaf.grad = None
            if hasattr(leaf, "jac"):  # it accumulates there, and does not take None
                del leaf.jac
        z, _, _ = case.loss.shared(leaves, case.batch)
        mtl_backward([head(leaves, z, case.batch) for head in heads], features=z)

    return step


def eager_steps(case: Case) -> dict[str, Step]:
    """What a user of plain eager PyTorch runs: `backward` of the weighted sum, and our three ways to balance it."""
    at_z, at_w = gn.gradnorm(), gn.gradnorm(where=case.last)
    leaves = {name: leaf.clone().requires_grad_() for name, leaf in case.params.items()}
    stats = gn.measure(case.params, case.loss, case.batch)
    state, _ = at_z.balance(at_z.init(case.num_tasks), stats)  # a first step is no usual one

    def plain() -> None:
        for leaf in leaves.values():
            leaf.grad = None
        weighted(case.loss(leaves, case.batch), state.weights).backward()

    def fork() -> None:
        for leaf in leaves.values():
            leaf.grad = None
        copies = gn.fork(case.loss.shared(leaves, case.batch)[0], case.num_tasks)
        losses = [head(leaves, z, case.batch) for head, z in zip(case.loss.functions, copies, strict=True)]
        weighted(losses, state.weights).backward()
        at_z.balance(state, gn.measure_losses(losses, copies, weights=state.weights, needs=at_z.needs))

    return {
        "plain": plain,
        "z": lambda: at_z.grad(state, case.params, case.loss, case.batch),
        "W": lambda: at_w.grad(state, case.params, case.loss, case.batch),
        "fork": fork,
        "balance alone": lambda: at_z.balance(state, stats),
    }


def eager(seconds: float, note: str) -> None:
    """Eager mode against plain `backward`, from the smallest model up."""
    cases = [(f"MLP {t}, {w}, {b}", lambda t=t, w=w, b=b: mlp(t, w, b)) for t, w, b in EAGER_SHAPES]
    cases.append(("dense prediction, T = 3, width 32, batch 8 x 32 x 32", lambda: dense(3, 32, 8)))
    cases.append(("transformer, T = 10, width 128, batch 32 x 16", lambda: transformer(10, 128, 32)))
    rows = []
    for name, make in cases:
        r = medians(eager_steps(make()), seconds, "cpu")
        rows.append((name, [f"{r[column] / r['plain']:.2f}" for column in ("z", "W", "fork", "balance alone")]))
    table(f"Eager mode{note}", rows, ["model", "z", "W", "fork, measure_losses, balance", "balance alone"])


def medians(steps: dict[str, Step], seconds: float, device: str) -> dict[str, float]:
    """Median time of each, run in turn; every time after a run of its own that is not timed, for a training loop does
    not come to a step with the caches full of another."""

    def timed(step: Step) -> float:
        start = time.perf_counter()
        step()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    for step in steps.values():
        for _ in range(4):
            step()
    once = 2 * sum(timed(step) for step in steps.values())
    rounds = max(11, min(200, int(seconds / once)))
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            step()
            times[name].append(timed(step))
    return {name: statistics.median(taken) for name, taken in times.items()}


def table(title: str, rows: list[tuple[str, list[str]]], header: list[str]) -> None:
    print(f"\n**{title}**\n\n| " + " | ".join(header) + " |\n|" + "---|" * len(header))
    for name, cells in rows:
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


def ratios(case: Case, which: list[str], seconds: float, device: str) -> dict[str, float]:
    torch._dynamo.reset()
    steps = steps_of(case, which)
    found = medians(steps, seconds, device)
    return {
        name: taken / found["plain, compiled" if name.endswith("compiled") and "plain, compiled" in found else "plain"]
        for name, taken in found.items()
    } | {"compiled gain": found.get("plain, compiled", float("nan")) / found["plain"]}


def overhead(label: str, cases: list[tuple[str, Callable[[], Case]]], seconds: float, device: str, peers: bool) -> None:
    """One row a model: ratios to the plain step of the same compiler setting, and peers against the plain eager one."""
    compiled = ["plain, compiled", "seam at z, compiled", "seam at W, compiled"]
    eager = ["plain", "seam at z", "seam at W", "general at W"]
    others = ["gradnorm-pytorch", "TorchJD mtl_backward"] if peers else []
    rows = []
    for name, make in cases:
        r = ratios(make(), eager + compiled + others, seconds, device)
        cells = [r["seam at z, compiled"], r["seam at W, compiled"], r["compiled gain"]]
        cells += [r["seam at z"], r["seam at W"], r["general at W"], *(r[o] for o in others)]
        if peers:
            cells.append(r["gradnorm-pytorch"] / r["seam at W"])
        rows.append((name, [f"{c:.2f}" for c in cells]))
    header = ["model", "z, compiled / plain compiled", "W, compiled / plain compiled", "plain compiled / plain"]
    header += ["z / plain", "W / plain", "general at W / plain", *(f"{o} / plain" for o in others)]
    table(label, rows, header + (["gradnorm-pytorch / W"] if peers else []))


def many_tasks(seconds: float, device: str) -> None:
    """The ratio at z from T = 2 to T = 128, heads stacked, width and batch fixed."""
    rows = []
    for num_tasks in (2, 8, 32, 128):
        case = mlp(num_tasks, 256, 256, stacked=True, device=device)
        r = ratios(case, ["plain", "seam at z", "plain, compiled", "seam at z, compiled"], seconds, device)
        rows.append((str(num_tasks), [f"{r['seam at z, compiled']:.2f}", f"{r['seam at z']:.2f}"]))
    table("Number of tasks: stacked heads, width 256, batch 256", rows, ["T", "z, compiled", "z, eager"])


def compile_time(device: str) -> None:
    """From cold to the first result of the T = 40 step with stacked heads, in a fresh cache."""
    torch._dynamo.reset()
    with torch._inductor.utils.fresh_inductor_cache():
        for where in (None, "trunk.3.weight"):
            case = mlp(40, 256, 256, stacked=True, device=device)
            state = gn.init_state(40, device=device)
            fn = torch.compile(
                lambda s, p, b, c=case, w=where: gn.gradnorm_grad(s, p, c.loss, b, where=w), fullgraph=True
            )
            start = time.perf_counter()
            fn(state, case.params, case.batch)
            print(f"compile time, T = 40 stacked, W = {where or 'z'}: {time.perf_counter() - start:.0f} s", flush=True)


def peak_memory() -> None:
    """Peak of what torch's allocator holds above what it held before the step, gradients included."""
    rows = []
    for num_tasks, width, batch in MLP_SHAPES:
        torch._dynamo.reset()
        steps = steps_of(mlp(num_tasks, width, batch), ["plain", "seam at z", "plain, compiled", "seam at z, compiled"])
        peaks = {name: peak_of(step) for name, step in steps.items()}
        copies = num_tasks * width * batch * 4
        cells = [f"{peaks['seam at z' + kind] / (peaks['plain' + kind] + copies):.2f}" for kind in ("", ", compiled")]
        rows.append((f"{num_tasks}, {width}, {batch}", cells))
    title = "Peak memory of the step at z / (plain + T copies of z's gradient)"
    table(title, rows, ["T, width, batch", "eager", "compiled"])


def peak_of(step: Step) -> int:
    """Bytes, from the allocator's own record of one warmed-up step."""
    for _ in range(3):
        step()
    gc.collect()
    with torch.profiler.profile(profile_memory=True) as profile:
        kept = step()
    del kept
    with tempfile.NamedTemporaryFile(suffix=".json") as trace:
        profile.export_chrome_trace(trace.name)
        events = json.loads(Path(trace.name).read_text())["traceEvents"]
    held = peak = 0
    for event in sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"]):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = ["eager", "mlp", "trunks", "tasks", "memory", "compile"]
    parser.add_argument("--tables", nargs="+", choices=names, default=names)
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--seconds", type=float, default=12, help="for the timed rounds of one row")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(1)
    # glibc raises its mapping threshold to the largest block freed so far: do that once, so that no row depends on
    # which came before it.
    torch.zeros(31 * 2**18)  # float32, freed at once
    device = args.device
    where = torch.cuda.get_device_name() if device == "cuda" else platform.machine()
    print(f"torch {torch.__version__}, {where}; seed 0")
    for threads in args.threads:
        torch.set_num_threads(threads)
        note = "" if device == "cuda" else f", {threads} thread" + "s" * (threads > 1)
        if "eager" in args.tables and device == "cpu":
            eager(args.seconds, note)
        if "mlp" in args.tables:
            shapes = MLP_SHAPES + ([(10, 4096, 1024), (10, 8192, 1024)] if device == "cuda" else [])
            cases = [(f"{t}, {w}, {b}", lambda t=t, w=w, b=b: mlp(t, w, b, device=device)) for t, w, b in shapes]
            overhead(f"MLP (T, width, batch){note}", cases, args.seconds, device, peers=True)
        if "trunks" in args.tables:
            trunks = [
                ("convolutional, T = 10, width 64, batch 64", lambda: cnn(10, 64, 64, device=device)),
                ("transformer, T = 10, width 128, batch 32 x 16", lambda: transformer(10, 128, 32, device=device)),
            ]
            overhead(f"Other trunks{note}", trunks, args.seconds, device, peers=True)
        if "tasks" in args.tables:
            many_tasks(args.seconds / 3, device)
    torch.set_num_threads(1)
    if "memory" in args.tables and device == "cpu":
        peak_memory()
    if "compile" in args.tables:
        compile_time(device)


if __name__ == "__main__":
    main()
