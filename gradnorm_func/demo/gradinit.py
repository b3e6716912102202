"""GradInit on real digits: deep networks without normalisation and Post-LN transformers without warm-up.

Default initialisation against GradInit, for SGD and Adam, at several learning rates. All seeds, and in training all
learning rates, run at once under `vmap`; a seed has the same first parameters and the same batches with both
initialisations. The learning rate is chosen for each of them on the validation split, and the test split looked at
once.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import grad_and_value, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

import gradnorm_func as gn
from gradnorm_func.demo.progress import Progress

BATCH_SIZE = 32
GUESSING = math.log(10)
INITS = ("default", "GradInit")
RATES = {"SGD": (0.01, 0.03, 0.1), "Adam": (1e-3, 3e-3, 1e-2)}
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
        out: Tensor = self.last(torch.relu(h))
        return out


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
        out: Tensor = self.last(x)
        return out


class PostLN(nn.Module):
    """Twelve Post-LN transformer layers over the eight rows of an image, torch's default initialisation."""

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
        out: Tensor = self.last(h.mean(-2))
        return out


NETS: dict[str, tuple[str, Callable[[], nn.Module]]] = {
    "residual": ("34-layer residual net,\nno normalisation", Residual),
    "post-ln": ("12-layer Post-LN transformer,\nno warm-up", PostLN),
    "plain": ("32-layer plain net,\nno normalisation", Plain),
}


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
        last = self.losses[-20:].mean(0)
        return ~(last <= GUESSING + 0.1)

    @property
    def stuck(self) -> Tensor:
        """(R, S): not diverged, but the loss ends at that of guessing."""
        last = self.losses[-20:].mean(0)
        return ~self.diverged & (last > GUESSING - 0.1)

    @property
    def best(self) -> int:
        """The learning rate that the validation split chooses."""
        return int(self.valid.mean(1).argmax())


class Result(NamedTuple):
    net: str
    optimizer: str
    runs: dict[str, Run]
    history: gn.GradInitInfo  # every field (steps, S, ...)
    gamma: float


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


def initialise(
    loss_fn: LossFn, params: Params, indices: Iterable[Tensor], p: int, gamma: float, lr: float
) -> tuple[Params, gn.GradInitInfo]:
    """GradInit of all seeds at once; every leaf of params has a leading axis of seeds."""
    optimizer = gn.rescale_adam(lr)
    start = lambda params: gn.gradinit_init_state(params, optimizer=optimizer)
    state = vmap(start)(params)
    step = vmap(
        lambda state, params, batch, after: gn.gradinit_step(
            state, params, loss_fn, batch, batch_after=after, p=p, gamma=gamma, optimizer=optimizer
        )
    )
    infos = []
    for row in indices:  # (S, 3 * BATCH_SIZE): two minibatches make S; the first and the third make S̃
        first, second, third = row.chunk(3, 1)
        state, info = step(state, params, torch.cat([first, second], 1), torch.cat([first, third], 1))
        infos.append(info)
    return vmap(gn.gradinit_apply)(state, params), gn.GradInitInfo(*(torch.stack(x) for x in zip(*infos, strict=True)))


def train(
    loss_fn: LossFn, params: Params, optimizer: str, rates: Sequence[float], indices: Iterable[Tensor]
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


def compare(nets: Sequence[str], seeds: Sequence[int], steps: int, init_steps: int, scale_lr: float) -> list[Result]:
    """Everything: each net, each optimizer, both initialisations."""
    training, valid, test = load()
    progress = Progress(3 * len(RATES) * len(nets), (2 * steps + init_steps) // 3)
    results = []
    for net in nets:
        modules = []
        for seed in seeds:
            torch.manual_seed(seed)
            modules.append(NETS[net][1]())
        stacked, _ = torch.func.stack_module_state(modules)
        start = {name: leaf.detach() for name, leaf in stacked.items()}
        call = gn.functional(modules[0])

        def loss_fn(params: Params, rows: Tensor, call: Any = call) -> Tensor:
            return nn.functional.cross_entropy(call(params, training.x[rows]), training.y[rows])

        for optimizer, rates in RATES.items():
            p, gamma = (2, 1.0) if optimizer == "SGD" else (1, 1000.0)
            label = f"{net}, {optimizer}"
            indices = draw(seeds, init_steps, 3 * BATCH_SIZE, 1, len(training.y))
            learned, history = initialise(
                loss_fn, start, progress.watch(indices, f"{label}: GradInit"), p, gamma, scale_lr
            )
            runs = {}
            for init, params in zip(INITS, (start, learned), strict=True):
                indices = draw(seeds, steps, BATCH_SIZE, 2, len(training.y))
                trained, losses = train(
                    loss_fn, params, optimizer, rates, progress.watch(indices, f"{label}: training, {init}")
                )
                scores = []
                for split in (valid, test):
                    correct = lambda params, split=split, call=call: call(params, split.x).argmax(-1) == split.y
                    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
                        scores.append(100 * vmap(correct)(trained).float().mean(1).reshape(len(rates), len(seeds)))
                runs[init] = Run(losses, *scores)
            results.append(Result(net, optimizer, runs, history, gamma))
    progress.close()
    return results


def table(results: Sequence[Result]) -> str:
    """One line for each net, optimizer and initialisation."""
    seeds = results[0].runs[INITS[0]].test.shape[1]
    head = ["net", "", "", "test accuracy, %", "at", "diverged there, of all", "stuck there, of all"]
    form = "{:10} {:5} {:8} {:>16} {:>9} {:>24} {:>24}"
    lines = [form.format(*head)]
    for result in results:
        for init, run in result.runs.items():
            test = run.test[run.best]
            accuracy = f"{test.mean():.1f}" + (f" ± {test.std():.1f}" if seeds > 1 else "")
            rate = f"lr {RATES[result.optimizer][run.best]:g}"
            bad = [
                f"{int(which[run.best].sum())} of {seeds}, {int(which.sum())} of {which.numel()}"
                for which in (run.diverged, run.stuck)
            ]
            lines.append(form.format(result.net, result.optimizer, init, accuracy, rate, *bad))
    return "\n".join(lines)


def draw_figure(path: str, results: Sequence[Result]) -> None:
    """A row for each net and optimizer: GradInit's own course, the training loss, the accuracy by learning rate."""
    import matplotlib
    from matplotlib.figure import Figure

    from gradnorm_func.demo.figure import STYLE, smooth

    colours = {"default": "#D55E00", "GradInit": "#0072B2"}
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11.5, 1 + 2.5 * len(results)), layout="constrained")
        axes = figure.subplots(len(results), 3, squeeze=False)
        for row, result in zip(axes, results, strict=True):
            norm, loss, accuracy = row
            norm.plot(result.history.grad_norm.numpy(), color=colours["GradInit"], linewidth=0.9, alpha=0.8)
            norm.axhline(result.gamma, color="0.4", linestyle="--", linewidth=1)
            norm.text(1.01, result.gamma, r"$\gamma$", transform=norm.get_yaxis_transform(), va="center")
            norm.set_yscale("log")
            title = NETS[result.net][0]
            norm.set_ylabel(f"{title}\n{result.optimizer}", fontweight="bold")
            for shift, (init, run) in zip((-1, 1), result.runs.items(), strict=True):
                curves = smooth(run.losses[:, run.best], 10)
                loss.plot(curves.numpy(), color=colours[init], linewidth=0.7, alpha=0.45)
                rate = RATES[result.optimizer][run.best]
                count = int(run.diverged[run.best].sum())
                label = f"{init}, lr {rate:g}" + (f" ({count} diverged)" if count else "")
                loss.plot(curves.median(1).values.numpy(), color=colours[init], linewidth=2, label=label)
                places = torch.arange(len(run.test)).double() + 0.07 * shift
                accuracy.plot(places, run.test.mean(1), color=colours[init], marker="o", label=init)
                seeds = run.test.shape[1]
                dots = {"color": colours[init], "alpha": 0.5, "markersize": 5}
                accuracy.plot(places.repeat_interleave(seeds), run.test.flatten(), ".", **dots)
                for k, place in enumerate(places.tolist()):
                    counts = {"diverged": int(run.diverged[k].sum()), "stuck": int(run.stuck[k].sum())}
                    accuracy.annotate(
                        "\n".join(f"{count} {word}" for word, count in counts.items() if count),
                        (place, float(run.test[k].mean())), xytext=(25 * shift, 6), textcoords="offset points",
                        ha="center", fontsize=8, color=colours[init],
                    )  # fmt: skip
            loss.axhline(GUESSING, color="0.4", linestyle="--", linewidth=1, zorder=0)
            loss.text(
                1, GUESSING, "guessing", transform=loss.get_yaxis_transform(), ha="right", va="bottom", fontsize=8
            )
            loss.set_yscale("log")
            loss.set_ylim(3e-3, 30)
            loss.legend(fontsize=8, loc="lower left")
            accuracy.set_xticks(range(len(run.test)), [f"{rate:g}" for rate in RATES[result.optimizer]])
            accuracy.set_ylim(0, 102)
            accuracy.set_xlim(-0.5, len(run.test) - 0.5)
        for ax, text in zip(
            axes[0],
            ("gradient norm during GradInit", "training loss, best learning rate", "test accuracy (%)"),
            strict=True,
        ):
            ax.set_title(text)
        for ax, text in zip(axes[-1], ("GradInit step", "training step", "learning rate"), strict=True):
            ax.set_xlabel(text)
        figure.savefig(path, dpi=130)


def add_arguments(parser: argparse.ArgumentParser, path: Callable[[str], str] = str) -> None:
    """The options of this demo; `path` converts the name of the figure."""

    def at_least(low: int) -> Callable[[str], int]:
        def convert(text: str) -> int:
            if not text.isdigit() or int(text) < low:
                raise argparse.ArgumentTypeError(f"{text!r} must be an integer, at least {low}")
            return int(text)

        return convert

    def rate(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not 0 < value <= 1:
            raise argparse.ArgumentTypeError(f"{text!r} must be a number above 0 and at most 1")
        return value

    names = list(NETS)
    parser.add_argument("--nets", nargs="+", choices=names, default=names[:2], metavar="NET",
                        help=f"which of {', '.join(names)} (default: {' '.join(names[:2])})")  # fmt: skip
    parser.add_argument("--seeds", type=at_least(1), default=5, metavar="N", help="runs of each kind (default: 5)")
    parser.add_argument("--steps", type=at_least(20), default=200, help="training steps (default: 200)")
    parser.add_argument("--init-steps", type=at_least(1), default=100, help="steps of GradInit (default: 100)")
    parser.add_argument("--scale-lr", type=rate, default=0.01, metavar="LR", help="of the scales (default: 0.01)")
    parser.add_argument("--out", type=path, default="gradinit.png", metavar="FILE",
                        help="the figure (default: gradinit.png)")  # fmt: skip


def run(args: argparse.Namespace) -> None:
    """Trains, prints the table, saves the figure."""
    results = compare(args.nets, range(args.seeds), args.steps, args.init_steps, args.scale_lr)
    print(table(results))
    print("Accuracy: mean ± standard deviation over the seeds, at the learning rate that the validation split chooses.")
    print("Diverged: the training loss ends not finite, or above that of guessing. Stuck: it ends at that of guessing.")
    draw_figure(args.out, results)
