"""Training deep networks from default initialisation and from GradInit's: what accuracy does each reach?

    OMP_NUM_THREADS=1 python benchmarks/gradinit_training.py [--nets residual post-ln plain] [--seeds 5] [--steps 200]

About seven minutes for the two nets of the default, on a core of its own. The table is in
`benchmarks/gradinit_training.md`.

scikit-learn's 8x8 digits; SGD at six learning rates and Adam at five. All seeds and all learning rates train at once
under `vmap`; a seed has the same first parameters and the same batches with both initialisations. The validation split
chooses the learning rate for each initialisation; the test split is looked at once.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import grad_and_value, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

import gradnorm_func as gn

BATCH_SIZE = 32
GUESSING = math.log(10)  # the loss of ten equal probabilities
SCALE_LR = 0.01  # of GradInit's factors
RATES = {"SGD": (1e-5, 1e-4, 1e-3, 0.01, 0.03, 0.1), "Adam": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)}
NORM = {"SGD": (2, 1.0), "Adam": (1, 1000.0)}  # p and γ: the norm that belongs to the optimizer, and its threshold
Params = dict[str, Tensor]
LossFn = Callable[[Params, Tensor], Tensor]


class Residual(nn.Module):
    """34 linear layers, 16 residual blocks of two, no normalisation; He's initialisation, the default of ResNets."""

    def __init__(self, blocks: int = 16, width: int = 64) -> None:
        super().__init__()
        self.first = nn.Linear(64, width)
        self.inner = nn.ModuleList(nn.Linear(width, width) for _ in range(2 * blocks))
        self.last = nn.Linear(width, 10)
        for layer in (self.first, *self.inner, self.last):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        for one, two in zip(self.inner[::2], self.inner[1::2], strict=True):
            h = h + two(torch.relu(one(torch.relu(h))))
        return self.last(torch.relu(h))


class Plain(nn.Module):
    """32 linear layers with ReLU and nothing else, torch's default initialisation: the gradient vanishes."""

    def __init__(self, depth: int = 32, width: int = 64) -> None:
        super().__init__()
        sizes = [64] + [width] * (depth - 1)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(sizes))
        self.last = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.relu(layer(x))
        return self.last(x)


class PostLN(nn.Module):
    """Twelve Post-LN transformer layers over the eight rows of an image, torch's default initialisation, no warm-up."""

    def __init__(self, depth: int = 12, width: int = 16) -> None:
        super().__init__()
        self.embed = nn.Linear(8, width)
        self.position = nn.Parameter(0.02 * torch.randn(8, width))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True) for _ in range(depth)
        )
        self.last = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x.reshape(*x.shape[:-1], 8, 8)) + self.position
        for layer in self.layers:
            h = layer(h)
        return self.last(h.mean(-2))


NETS: dict[str, Callable[[], nn.Module]] = {"residual": Residual, "post-ln": PostLN, "plain": Plain}


class Split(NamedTuple):
    x: Tensor  # (N, 64) standardised pixels
    y: Tensor  # (N,)


class Run(NamedTuple):
    """One initialisation of one net, trained with one optimizer: R learning rates, S seeds."""

    losses: Tensor  # (steps, R, S) of the training batches
    valid: Tensor  # (R, S) final accuracy, %
    test: Tensor  # (R, S) final accuracy, %

    @property
    def diverged(self) -> Tensor:
        """(R, S): the loss ends not finite, or worse than that of guessing."""
        return ~(self.losses[-20:].mean(0) <= GUESSING + 0.1)

    @property
    def stuck(self) -> Tensor:
        """(R, S): not diverged, but the loss ends at that of guessing."""
        return ~self.diverged & (self.losses[-20:].mean(0) > GUESSING - 0.1)

    @property
    def best(self) -> int:
        """The learning rate that the validation split chooses."""
        return int(self.valid.mean(1).argmax())


def load() -> tuple[Split, Split, Split]:
    """Training, validation and test split of scikit-learn's 8x8 digits."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    x, y = torch.as_tensor(images, dtype=torch.float32)[order], torch.as_tensor(labels)[order]
    x = (x - x[:1000].mean()) / x[:1000].std()
    return Split(x[:1000], y[:1000]), Split(x[1000:1300], y[1000:1300]), Split(x[1300:], y[1300:])


def draw(seeds: Sequence[int], steps: int, size: int, salt: int, count: int) -> Tensor:
    """(steps, S, size) indices of training examples; a batch repeats none."""
    columns = []
    for seed in seeds:
        make = torch.Generator().manual_seed(1000 * salt + seed)
        columns.append(torch.stack([torch.randperm(count, generator=make)[:size] for _ in range(steps)]))
    return torch.stack(columns, 1)


def initialise(loss_fn: LossFn, params: Params, indices: Tensor, p: int, gamma: float) -> tuple[Params, Tensor]:
    """GradInit of all seeds at once, every leaf with a leading axis of seeds; and the (steps, S) gradient norms."""
    optimizer = gn.rescale_adam(SCALE_LR)

    def step(state: Any, params: Params, batch: Tensor, after: Tensor) -> Any:
        return gn.gradinit_step(state, params, loss_fn, batch, batch_after=after, p=p, gamma=gamma, optimizer=optimizer)

    state = vmap(lambda params: gn.gradinit_init_state(params, optimizer=optimizer))(params)
    norms = []
    for row in indices:  # (S, 3 * BATCH_SIZE): two minibatches make S; the first and the third make S̃
        first, second, third = row.chunk(3, 1)
        state, info = vmap(step)(state, params, torch.cat([first, second], 1), torch.cat([first, third], 1))
        norms.append(info.grad_norm)
    return vmap(gn.gradinit_apply)(state, params), torch.stack(norms)


def train(
    loss_fn: LossFn, params: Params, optimizer: str, rates: Sequence[float], indices: Tensor
) -> tuple[Params, Tensor]:
    """SGD with momentum 0.9, or Adam, at constant learning rates; R x S runs at once, and the (steps, R, S) losses."""
    seeds = len(next(iter(params.values())))
    params = {name: leaf.repeat(len(rates), *[1] * (leaf.ndim - 1)) for name, leaf in params.items()}
    rate = torch.tensor(rates).repeat_interleave(seeds)
    mean = {name: torch.zeros_like(leaf) for name, leaf in params.items()}
    square = {name: torch.zeros_like(leaf) for name, leaf in params.items()}
    step, losses = vmap(grad_and_value(loss_fn)), []
    for k, row in enumerate(indices, 1):
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernel has no batching rule
            grads, loss = step(params, row.repeat(len(rates), 1))
        losses.append(loss.reshape(len(rates), seeds))
        for name, grad in grads.items():
            eta = rate.reshape(-1, *[1] * (grad.ndim - 1))
            if optimizer == "SGD":
                mean[name] = 0.9 * mean[name] + grad
                params[name] = params[name] - eta * mean[name]
            else:
                mean[name] = 0.9 * mean[name] + 0.1 * grad
                square[name] = 0.999 * square[name] + 0.001 * grad.square()
                size = (square[name] / (1 - 0.999**k)).sqrt() + 1e-8
                params[name] = params[name] - eta * mean[name] / (1 - 0.9**k) / size
    return params, torch.stack(losses)


def accuracy(call: Callable[..., Tensor], params: Params, split: Split, seeds: int) -> Tensor:
    """(R, S) in percent, of R x S networks."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        correct = vmap(lambda params: call(params, split.x).argmax(-1) == split.y)(params)
    return 100 * correct.float().mean(1).reshape(-1, seeds)


def compare(net: str, seeds: Sequence[int], steps: int, init_steps: int) -> dict[tuple[str, str], Run]:
    """Runs of one net by optimizer and initialisation."""
    training, valid, test = load()
    modules = []
    for seed in seeds:
        torch.manual_seed(seed)
        modules.append(NETS[net]())
    stacked, _ = torch.func.stack_module_state(modules)
    start, call = {name: leaf.detach() for name, leaf in stacked.items()}, gn.functional(modules[0], buffers=False)

    def loss_fn(params: Params, rows: Tensor) -> Tensor:
        return nn.functional.cross_entropy(call(params, training.x[rows]), training.y[rows])

    runs, clock = {}, time.perf_counter()
    for optimizer, rates in RATES.items():
        indices = draw(seeds, init_steps, 3 * BATCH_SIZE, 1, len(training.y))
        learned, norms = initialise(loss_fn, start, indices, *NORM[optimizer])
        print(
            f"{net}, {optimizer}: GradInit took the gradient norm from {norms[0].median():.3g} to "
            f"{norms[-1].median():.3g} (median of the seeds)",
            flush=True,
        )
        indices = draw(seeds, steps, BATCH_SIZE, 2, len(training.y))
        for init, params in (("default", start), ("GradInit", learned)):
            trained, losses = train(loss_fn, params, optimizer, rates, indices)
            scores = [accuracy(call, trained, split, len(seeds)) for split in (valid, test)]
            runs[optimizer, init] = Run(losses, *scores)
        print(f"[{time.perf_counter() - clock:4.0f} s] {net}, {optimizer}", file=sys.stderr, flush=True)
    return runs


def table(net: str, runs: dict[tuple[str, str], Run]) -> str:
    """A row for each optimizer and initialisation: accuracy at the chosen learning rate, and at each of them."""
    lines = []
    for (optimizer, init), run in runs.items():
        chosen = run.test[run.best]
        spread = f" ± {chosen.std():.1f}" if len(chosen) > 1 else ""
        every = ", ".join(f"{row.mean():.1f} at {rate:g}" for rate, row in zip(RATES[optimizer], run.test, strict=True))
        lost = f"{int(run.diverged.sum())} and {int(run.stuck.sum())} of {run.test.numel()}"
        at = f"{chosen.mean():.1f}{spread} at {RATES[optimizer][run.best]:g}"
        lines.append(f"| {net} | {optimizer} | {init} | {at} | {every} | {lost} |")
    return "\n".join(lines)


HEADER = """\
| net | optimizer | initialisation | test accuracy, % | by learning rate | diverged and stuck |
|---|---|---|---|---|---|"""


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = list(NETS)
    parser.add_argument("--nets", nargs="+", choices=names, default=names[:2], help=f"default: {' '.join(names[:2])}")
    parser.add_argument("--seeds", type=int, default=5, metavar="N", help="runs of each kind (default: 5)")
    parser.add_argument("--steps", type=int, default=200, help="training steps (default: 200)")
    parser.add_argument("--init-steps", type=int, default=100, help="steps of GradInit (default: 100)")
    args = parser.parse_args(argv)
    if min(args.seeds, args.steps, args.init_steps) < 1:
        parser.error("--seeds, --steps and --init-steps must be at least 1")
    torch.set_num_threads(1)
    print(f"seeds 0 ... {args.seeds - 1}, {args.init_steps} steps of GradInit, {args.steps} of training", flush=True)
    rows = [table(net, compare(net, range(args.seeds), args.steps, args.init_steps)) for net in args.nets]
    print("\n".join(["", HEADER, *rows, ""]))
    print("Test accuracy: mean ± standard deviation over the seeds, at the learning rate that the validation split")
    print("chooses. Diverged: the loss ends not finite, or above that of guessing. Stuck: it ends at that of guessing.")


if __name__ == "__main__":
    main()
