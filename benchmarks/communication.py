"""What data parallelism sends for balancing: counted, the error of the cheap option, and at scale on paper.

    OMP_NUM_THREADS=1 python benchmarks/communication.py > benchmarks/communication.md  # minutes

Nothing is timed. The model is the demo's: six tasks on pairs of handwritten digits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import gradnorm_func as gn
from gradnorm_func.demo import digits

T = len(digits.HEADS)
BATCH, STEPS = 256, 300


def table(title: str, head: list[str], rows: list[list[str]]) -> None:
    print(f"\n**{title}**\n\n| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for row in rows:
        print(f"| {' | '.join(row)} |")


def size(count: float) -> str:
    """Bytes, to three digits."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            return f"{count:.3g} {unit}" if unit != "B" else f"{count:.0f} B"
        count /= 1000
    raise AssertionError


# ---- counted


def counted(run: Callable[[], Any]) -> list[int]:
    """The bytes of each collective that `run` starts."""
    sent: list[int] = []
    plain = dist.all_reduce

    def counting(tensor: Tensor, *args: Any, **keywords: Any) -> Any:
        sent.append(tensor.numel() * tensor.element_size())
        return plain(tensor, *args, **keywords)

    dist.all_reduce = counting
    try:
        run()
    finally:
        dist.all_reduce = plain
    return sent


def traffic() -> None:
    params = digits.init_params(0)
    batch = digits.pairs(digits.load()["train"], BATCH, torch.Generator().manual_seed(0))
    theta = sum(leaf.numel() for leaf in params.values())
    cheap = functools.partial(gn.all_reduce, squared_norms=True)
    without = lambda stats: gn.all_reduce(stats._replace(grads=()))._replace(grads=stats.grads)
    layer, everything = params[digits.W].numel(), lambda path: True
    cases: list[tuple[str, Any, gn.Balancer, Any, str, int]] = [
        ("plain data parallelism", None, gn.static(), gn.all_reduce, "1 + T + θ", 1 + T + theta),
        ("z", None, gn.gradnorm(), gn.all_reduce, "1 + 3T + θ", 1 + 3 * T + theta),
        (
            "last shared weight",
            layer,
            gn.gradnorm(where=digits.W),
            gn.all_reduce,
            "1 + T + T·W + θ",
            1 + T + T * layer + theta,
        ),
        (
            "all parameters",
            theta,
            gn.gradnorm(where=everything),
            gn.all_reduce,
            "1 + T + T·θ + θ",
            1 + T + T * theta + theta,
        ),
        (
            "last shared weight, squared norms only",
            layer,
            gn.gradnorm(where=digits.W),
            cheap,
            "1 + 2T + θ",
            1 + 2 * T + theta,
        ),
        (
            "all parameters, squared norms only",
            theta,
            gn.gradnorm(where=everything),
            cheap,
            "1 + 2T + θ",
            1 + 2 * T + theta,
        ),
        ("z, gradients reduced by another", None, gn.gradnorm(), without, "1 + 3T", 1 + 3 * T),
        (
            "last shared weight, gradients reduced by another",
            layer,
            gn.gradnorm(where=digits.W),
            without,
            "1 + T + T·W",
            1 + T + T * layer,
        ),
        (
            "z, `fixed_ratio` (two passes)",
            None,
            gn.fixed_ratio(),
            gn.all_reduce,
            "(1 + 3T) + (1 + T + θ)",
            2 + 4 * T + theta,
        ),
    ]
    rows = []
    for name, _, method, reduce, formula, numbers in cases:
        sent = counted(lambda m=method, r=reduce: m.grad(m.init(T), params, digits.loss_fn, batch, reduce=r))
        assert sum(sent) == 4 * numbers, (name, sent, numbers)
        rows.append([name, str(len(sent)), formula, size(sum(sent)), f"{sum(sent) / (4 * theta):.4f}"])
    print(f"\nT = {T}, θ = {theta:,} parameters, W = {layer:,}, float32: 4 bytes per number of the formula.")
    title = "Reduced per step: counted, and equal to the formula"
    table(title, ["norms at", "collectives", "numbers", "bytes", "of the gradients alone"], rows)


# ---- the error of averaged squared norms


def ranks(batch: dict[str, Tensor], count: int) -> list[dict[str, Tensor]]:
    pieces = {name: leaf.chunk(count) for name, leaf in batch.items()}
    return [{name: piece[r] for name, piece in pieces.items()} for r in range(count)]


def both(params: Any, batch: Any, weights: Tensor, count: int) -> tuple[gn.TaskStats, Tensor]:
    """Exact stats of `count` ranks, and the root of their mean squared norms."""
    run = functools.partial(gn.measure, params, digits.loss_fn, weights=weights, where=digits.W)
    parts = [run(part) for part in ranks(batch, count)]
    return gn.merge(*parts), torch.stack([part.grad_norms for part in parts]).square().mean(0).sqrt()


def train(count: int, cheap: bool, seed: int = 0) -> tuple[Any, Tensor]:
    """Parameters and weights after a run of GradNorm on `count` simulated ranks."""
    data, draw = digits.load()["train"], torch.Generator().manual_seed(seed)
    params = {name: leaf.requires_grad_() for name, leaf in digits.init_params(seed).items()}
    optimizer, method = torch.optim.Adam(params.values(), lr=1e-3), gn.gradnorm(where=digits.W)
    state = method.init(T)
    for _ in range(STEPS):
        stats, upper = both(params, digits.pairs(data, BATCH, draw), state.weights, count)
        state, _ = method.balance(state, stats._replace(grad_norms=upper) if cheap else stats)
        gn.write_grads(params, stats.grads)
        optimizer.step()
    return {name: leaf.detach() for name, leaf in params.items()}, state.weights


def bias() -> None:
    data, rows, moved = digits.load()["train"], [], []
    trained, exact = train(1, False)
    for when, params in (("at the start", digits.init_params(0)), (f"after {STEPS} steps", trained)):
        for count in (2, 4, 8):
            draw, excess = torch.Generator().manual_seed(1), []
            for _ in range(20):
                stats, upper = both(params, digits.pairs(data, BATCH, draw), torch.ones(T), count)
                excess.append(upper / stats.grad_norms - 1)
            mean = torch.stack(excess).mean(0)
            rows.append([when, str(count), *(f"{100 * x:.2f}" for x in mean.tolist())])
    names = gn.task_names(digits.heads)
    table(
        f"n̂ / n − 1 in percent, norms at the last shared weight, {BATCH} examples on all ranks together, mean of 20",
        ["", "ranks", *names],
        rows,
    )
    for count in (2, 4, 8):
        sure, guess = train(count, False)[1], train(count, True)[1]
        moved.append(
            [f"{count}, exact", *(f"{x:.4f}" for x in sure.tolist()), f"{float((sure - exact).abs().max()):.0e}"]
        )
        moved.append(
            [
                f"{count}, squared norms",
                *(f"{x:.4f}" for x in guess.tolist()),
                f"{float((guess - exact).abs().max()):.0e}",
            ]
        )
    one = ["1", *(f"{x:.4f}" for x in exact.tolist()), "0"]
    table(f"Task weights after {STEPS} steps, float32", ["ranks", *names, "largest gap to 1 rank"], [one, *moved])


# ---- on paper


def on_paper(gpus: int = 1024, backbone: float = 7e9, tasks: int = 20, width: int = 4096, d_ff: int = 11008) -> None:
    positions = 4096  # of one sequence on each GPU
    ring = 2 * (gpus - 1) / gpus  # what a ring all-reduce sends per GPU, in buffers
    z = positions * width
    rows = [["the gradients themselves, by DDP", "2θ", size(2 * backbone), "2·(R−1)/R·2θ", size(ring * 2 * backbone)]]
    rows.append(["z", "2Tz", size(2 * tasks * z), "2·(R−1)/R·4(1 + 3T)", size(ring * 4 * (1 + 3 * tasks))])
    for name, w in (
        (f"last layer {width}×{width}", width * width),
        (f"last layer {width}×{d_ff}", width * d_ff),
        ("all parameters", backbone),
    ):
        memory, wire = (2 + 8) * tasks * w, ring * 4 * (1 + tasks + tasks * w)
        rows.append([name, "2TW + 8TW", size(memory), "2·(R−1)/R·4(1 + T + TW)", size(wire)])
    few = size(ring * 4 * (1 + 2 * tasks))
    rows.append(
        [f"last layer {width}×{width}, squared norms, Gram", "2Tz", size(2 * tasks * z), "2·(R−1)/R·4(1 + 2T)", few]
    )
    table(
        f"On paper: R = {gpus} GPUs, θ = {backbone:.0e} parameters, T = {tasks}, z = {positions}×{width} per GPU",
        ["norms at", "memory per GPU", "", "sent per GPU and step, ring", ""],
        rows,
    )
    print(f"""
Nothing of this was run. Memory is what balancing adds to a plain step: at z, every task's gradient there in bfloat16
(2 bytes); at parameters, every task's gradient in bfloat16, and in float32 what is summed and the buffer of the
collective. The gradients' own traffic is the wrapper's, DDP's or FSDP's, in bfloat16 here; `all_reduce` gets
`grads=()` then. Where FSDP shards the parameters, task gradients of all of them would need T whole copies all the same:
take norms at z or at one layer there. Norms at z add {4 * (1 + 3 * tasks)} bytes to what plain training reduces: they
cost the latency of one collective, and no bandwidth.""")


def main() -> None:
    torch.set_num_threads(1)
    print("# Communication\n\nPrinted by `python benchmarks/communication.py`. Seeds 0 and 1; no timing.")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    traffic()
    dist.destroy_process_group()
    bias()
    on_paper()


if __name__ == "__main__":
    main()
