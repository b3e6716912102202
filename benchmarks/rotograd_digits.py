"""RotoGrad on six tasks: test errors against equal weights, beside GradNorm.

    OMP_NUM_THREADS=1 python benchmarks/rotograd_digits.py [--seeds 5] [--steps 500] [--alpha 0.12]

About a minute and a half on a core of its own; `benchmarks/rotograd_digits.md` holds the table.

The data, the model and the first two methods are the demo's. Nothing is tuned. RotoGrad's two methods divide the losses
by L(0), as in the paper; their rotations are folded into the heads before the test.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import gradnorm_func as gn
from gradnorm_func.demo import compare, digits


def methods(alpha: float) -> list[compare.Method]:
    """The four of the table."""
    roto = functools.partial(gn.rotograd, digits.WIDTH, normalize=True)
    return [
        compare.equal(),
        compare.gradnorm(alpha, 0.025),
        compare.Method("RotoGrad", "scale='rotograd'", roto(), compare.fresh),
        compare.Method("RotoGradNorm", f"alpha = {alpha:.3g}", roto(scale="gradnorm", alpha=alpha), compare.fresh),
    ]


def run(method: compare.Method, data: digits.Digits, test: digits.Batch, seed: int, steps: int) -> tuple[Tensor, Any]:
    """Test errors of one training, and its history."""
    params, state, history = compare.train(method, data, seed, steps, iter)
    if isinstance(state, gn.RotoGradState):
        params = gn.fold_rotations(params, state, {task: f"heads.{task}.weight" for task in digits.HEADS})
    return digits.errors(params, test), history


def cosines(history: Any) -> tuple[float, float]:
    """Mean cosine of the task gradients in the last fifth: as the heads see them, and after rotating back."""
    pairs = torch.triu(torch.ones_like(history.cosines[0], dtype=torch.bool), 1)
    last = slice(-max(1, len(history.cosines) // 5), None)
    return tuple(float(c[last][:, pairs].mean()) for c in (history.head_cosines, history.cosines))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, metavar="N", help="runs per method (default: 5)")
    parser.add_argument("--steps", type=int, default=500, help="training steps a run (default: 500)")
    parser.add_argument("--alpha", type=float, default=0.12, help="GradNorm's and RotoGradNorm's (default: 0.12)")
    args = parser.parse_args(argv)
    if min(args.seeds, args.steps) < 1:
        parser.error("--seeds and --steps must be at least 1")
    torch.set_num_threads(1)
    data = digits.load()
    test = digits.pairs(data["test"], compare.EVALUATION_PAIRS, torch.Generator().manual_seed(0))
    results, start = [], time.perf_counter()
    for method in methods(args.alpha):
        runs = [run(method, data["train"], test, seed, args.steps) for seed in range(args.seeds)]
        results.append(compare.Result(method, 0, torch.stack([errors for errors, _ in runs]), runs[0][1]))
        print(f"[{time.perf_counter() - start:4.0f} s] {method.name}", file=sys.stderr, flush=True)
    print(f"Digit pairs, six tasks: {args.steps} steps, seeds 0 ... {args.seeds - 1}, nothing tuned:\n")
    print(compare.table(results))
    for result in results:
        if isinstance(result.history, gn.RotoGradInfo):
            before, after = cosines(result.history)
            print(
                f"{result.method.name}, seed 0: mean cosine of the task gradients in the last fifth of training "
                f"{before:+.2f} as the heads see them, {after:+.2f} after rotating back."
            )


if __name__ == "__main__":
    main()
