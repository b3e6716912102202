"""Draws the pictures of the gallery, `docs/pictures/*.png`: `python docs/gallery.py [NAME ...]`."""

import io
import sys
from pathlib import Path

import gradnorm_func as gn
import matplotlib as mpl
import matplotlib.pyplot as plt
import torch
from gradnorm_func import plot
from gradnorm_func.demo import digits
from PIL import Image

mpl.use("agg")
PICTURES = Path(__file__).parent / "pictures"
STEPS, SEEDS, EVERY, W = 300, 3, 10, digits.W
DATA = digits.load()
METHODS = {
    "equal weights": lambda: gn.static(where=W, norms=True),
    "GradNorm": lambda: gn.gradnorm(where=W),
    "fixed shares": lambda: gn.fixed_ratio(where=W),
}


def batches(seed, count=STEPS):
    draw = torch.Generator().manual_seed(seed)
    return [digits.pairs(DATA["train"], 64, draw) for _ in range(count)]


def adam(leaves):
    return torch.optim.Adam(leaves, lr=3e-3)


def train(balancer, seed=0, loss_fn=digits.loss_fn, tasks=tuple(digits.heads), steps=STEPS):
    heads = tuple(f"heads.{task}." for task in tasks)
    params = {
        name: value
        for name, value in digits.init_params(seed).items()
        if name.startswith(("trunk.", *heads))
    }
    return gn.train(params, loss_fn, batches(seed, steps), balancer=balancer, optimizer=adam)


def in_pieces(balancer, seed, look):
    """What `look` sees of the parameters at every tenth step of a run."""
    run, seen, parts = None, [], batches(seed)
    for start in range(0, STEPS, EVERY):
        params = digits.init_params(seed) if run is None else run.params
        seen.append(look(params))
        going_on = (
            {} if run is None else {"state": run.state, "optimizer_state": run.optimizer_state}
        )
        piece = parts[start : start + EVERY]
        run = gn.train(params, digits.loss_fn, piece, balancer=balancer, optimizer=adam, **going_on)
    return torch.stack(seen)


def pictures():
    """From a function's name to what draws it."""
    run, equal = train(METHODS["GradNorm"]()), train(METHODS["equal weights"]())
    losses, names, batch = digits.loss_fn, digits.heads, batches(1, 1)[0]
    test = digits.pairs(DATA["test"], 2000, torch.Generator().manual_seed(9))
    wrong = lambda params: digits.errors(params, test)[0]
    cosines = lambda params: gn.task_cosine_similarity(digits.loss_fn, params, batch, where=W)
    report = gn.layer_analysis(digits.loss_fn, digits.init_params(0), batch)

    def compare():
        errors = {
            name: torch.stack([in_pieces(balancer(), seed, wrong) for seed in range(SEEDS)])
            for name, balancer in METHODS.items()
        }
        steps = range(0, STEPS, EVERY)
        return plot.compare(errors, steps=steps, label="left digit, % wrong (test)")

    def pareto():
        tasks = ("image", "left")
        heads = {task: digits.heads[task] for task in tasks}
        two = gn.multi_task_loss(digits.backbone, heads, last_shared=digits.last_shared)
        last = lambda balancer: train(balancer, 0, two, tasks).history.losses[-30:].mean(0)
        shares = torch.tensor([0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 0.98])
        front = torch.stack([last(gn.static({"image": 2 * s, "left": 2 - 2 * s})) for s in shares])
        points = {"GradNorm": last(gn.gradnorm(where=W)), "uncertainty": last(gn.uncertainty())}
        return plot.pareto(front, methods=points, shares=shares, names=tasks)

    def results():
        errors = {
            name: torch.stack(
                [digits.errors(train(make(), seed).params, test) for seed in range(SEEDS)]
            )
            for name, make in METHODS.items()
        }
        return plot.results(errors, baseline="equal weights", names=list(digits.METRICS))

    def sweep():
        base = digits.errors(train(METHODS["equal weights"](), steps=100).params, test)
        grid = {"alpha": [0.0, 0.5, 1.0, 2.0], "rate": [0.003, 0.01, 0.03, 0.1]}
        result = gn.sweep(
            digits.init_params,
            losses,
            batches(0, 100),
            grid=grid,
            seeds=range(2),
            balancer=lambda alpha, rate: gn.gradnorm(where=W, alpha=alpha, optimizer=gn.adam(rate)),
            optimizer=gn.adam(3e-3),
            metric=lambda params: (digits.errors(params, test) / base).log().mean().exp(),
        )
        return plot.sweep(result, label="error / that of equal weights (mean)")

    return {
        "overview": lambda: plot.overview(run.history, names=names, smooth=5),
        "weights": lambda: plot.weights(run.history, names=names),
        "grad_norms": lambda: plot.grad_norms(run.history, names=names, smooth=5),
        "shares": lambda: plot.shares(equal.history, names=names, smooth=5),
        "loss_ratios": lambda: plot.loss_ratios(run.history, names=names, smooth=5),
        "inverse_rates": lambda: plot.inverse_rates(equal.history, names=names, smooth=5),
        "conflicts": lambda: plot.conflicts(cosines(run.params), names=names),
        "conflict_course": lambda: plot.conflict_course(
            in_pieces(METHODS["GradNorm"](), 0, cosines), names=names, steps=range(0, STEPS, EVERY)
        ),
        "layers": lambda: plot.layers(report),
        "compare": compare,
        "results": results,
        "sweep": sweep,
        "pareto": pareto,
    }


def save(name, drawn):
    """As a PNG of a few colours: a tenth of the size, and nobody sees it."""
    buffer = io.BytesIO()
    figure = getattr(drawn, "figure", drawn)
    figure.savefig(buffer, dpi=130, bbox_inches="tight", facecolor="white")
    Image.open(buffer).convert("RGB").quantize(96).save(PICTURES / f"{name}.png", optimize=True)
    plt.close("all")


if __name__ == "__main__":
    draw = pictures()
    for name in sys.argv[1:] or plot.__all__:
        save(name, draw[name]())
        print(name, (PICTURES / f"{name}.png").stat().st_size // 1024, "KiB")
