"""Draws the pictures of the gallery: `python docs/gallery.py`, in about a minute."""

from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import torch

import gradnorm_func as gn
from gradnorm_func import plot
from gradnorm_func.demo import digits

mpl.use("agg")
STEPS, SEEDS, W = 300, 3, digits.W
TASKS = gn.task_names(digits.heads)
PICTURES = Path(__file__).parent / "pictures"


def batches(seed):
    draw = torch.Generator().manual_seed(seed)
    return [digits.pairs(digits.load()["train"], 64, draw) for _ in range(STEPS)]


def train(balancer, seed=0, loss_fn=digits.loss_fn):
    torch.manual_seed(seed)
    adam = lambda leaves: torch.optim.Adam(leaves, lr=3e-3)
    return gn.train(digits.init_params(seed), loss_fn, batches(seed), balancer=balancer, optimizer=adam)


def two_losses(params, batch):
    losses = digits.loss_fn(params, batch)
    return {"left digit": losses["left"], "reconstruction": 10 * losses["image"]}


def front():
    """Final losses of two of the tasks, of static weights from one end to the other, and of two methods."""
    shares = torch.tensor([0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 0.98])
    final = lambda run: run.history.losses[-30:].mean(0)
    sweep = [final(train(gn.static([2 * s, 2 - 2 * s]), loss_fn=two_losses)) for s in shares.tolist()]
    methods = {
        name: final(train(balancer, loss_fn=two_losses)) for name, balancer in (
            ("GradNorm", gn.gradnorm(where=W)), ("uncertainty", gn.uncertainty())
        )
    }
    return torch.stack(sweep), shares, methods


def cosines(run_params):
    return gn.task_cosine_similarity(digits.loss_fn, run_params, batches(0)[0], where=W)


def course():
    """Cosines between the task gradients, at every tenth step of a run."""
    params, rows, state, balancer = digits.init_params(0), [], None, gn.gradnorm(where=W)
    for k, start in enumerate(range(0, STEPS, 10)):
        rows.append(cosines(params))
        adam = lambda leaves: torch.optim.Adam(leaves, lr=3e-3)
        run = gn.train(
            params, digits.loss_fn, batches(0)[start : start + 10], balancer=balancer, state=state, optimizer=adam
        )
        params, state = run.params, run.state
    return torch.stack(rows)
