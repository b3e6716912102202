"""Draws the pictures of the gallery, `docs/pictures/*.png`, in about a minute."""

import io
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


def train(balancer, seed=0, loss_fn=digits.loss_fn):
    return gn.train(
        digits.init_params(seed), loss_fn, batches(seed), balancer=balancer, optimizer=adam
    )


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
    names, batch = digits.heads, batches(1, 1)[0]
    test = digits.pairs(DATA["test"], 2000, torch.Generator().manual_seed(9))
    wrong = lambda params: digits.errors(params, test)[0]
    cosines = lambda params: gn.task_cosine_similarity(digits.loss_fn, params, batch, where=W)
    report = gn.layer_analysis(digits.loss_fn, digits.init_params(0), batch)

    def compare():
        errors = {
            name: torch.stack([in_pieces(balancer(), seed, wrong) for seed in range(SEEDS)])
            for name, balancer in METHODS.items()
        }
        plot.compare(errors, steps=range(0, STEPS, EVERY), label="left digit, % wrong (test)")

    def pareto():
        two = lambda params, batch: {
            "left": (all_six := digits.loss_fn(params, batch))["left"],
            "image": all_six["image"],
        }
        last = lambda balancer: train(balancer, loss_fn=two).history.losses[-30:].mean(0)
        shares = torch.tensor([0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 0.98])
        front = torch.stack(
            [last(gn.static([2 * s, 2 - 2 * s])) for s in shares.tolist()]
        )  # tasks: image, left
        points = {"GradNorm": last(gn.gradnorm(where=W)), "uncertainty": last(gn.uncertainty())}
        plot.pareto(front, methods=points, shares=shares, names=["image", "left"])

    return {
        "overview": lambda: plot.overview(run.history, names=names, smooth=5),
        "weights": lambda: plot.weights(run.history, names=names),
        "grad_norms": lambda: plot.grad_norms(run.history, names=names, smooth=5),
        "loss_ratios": lambda: plot.loss_ratios(run.history, names=names, smooth=5),
        "inverse_rates": lambda: plot.inverse_rates(equal.history, names=names, smooth=5),
        "conflicts": lambda: plot.conflicts(cosines(run.params), names=names),
        "conflict_course": lambda: plot.conflict_course(
            in_pieces(METHODS["GradNorm"](), 0, cosines), names=names
        ),
        "layers": lambda: plot.layers(report),
        "compare": compare,
        "pareto": pareto,
    }


def save(name):
    """As a PNG of a few colours: a tenth of the size, and nobody sees it."""
    figure = plt.gcf()
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=130, bbox_inches="tight", facecolor="white")
    Image.open(buffer).convert("RGB").quantize(96).save(PICTURES / f"{name}.png", optimize=True)
    plt.close("all")


if __name__ == "__main__":
    for name, draw in pictures().items():
        draw()
        save(name)
        print(name, (PICTURES / f"{name}.png").stat().st_size // 1024, "KiB")
