"""A training run that outlives SIGKILL, for a process of its own."""

import os
import signal
import threading

import torch
from toys import make_params, make_problem

import gradnorm_func as gn

STEPS, EVERY = 60, 5


def main(folder, fraction=None):
    """Goes on from the last checkpoint in the folder, and leaves `end.pt` there.

    With a fraction in [0, 1) a thread kills the process that far along what is left to do, wherever the step may be
    then, the writing of a checkpoint included.
    """
    torch.set_num_threads(1)
    problem, method = make_problem(), gn.gradnorm(where="trunk.1.weight", alpha=0.5)
    params = {path: leaf.requires_grad_() for path, leaf in make_params().items()}
    optimizer = torch.optim.Adam(params.values(), lr=0.01)
    state, draw, start = method.init(3, dtype=torch.float64), torch.Generator().manual_seed(1), 0
    checkpoint = folder / "checkpoint.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        with torch.no_grad():
            for path, leaf in params.items():
                leaf.copy_(saved["params"][path])
        optimizer.load_state_dict(saved["optimizer"])
        state, start = gn.load_state(state, saved["state"]), saved["step"]
        draw.set_state(saved["draw"])
    kill_at = None if fraction is None else start + fraction * (STEPS - start)
    for step in range(start, STEPS):
        if kill_at is not None and step + 1 > kill_at:
            # In a moment, for this step to be under way; a step takes milliseconds.
            threading.Timer(0.004 * (kill_at - step), os.kill, (os.getpid(), signal.SIGKILL)).start()
            kill_at = None
        x = torch.randn(12, 5, generator=draw, dtype=torch.float64)
        y = torch.randn(12, 3, generator=draw, dtype=torch.float64)
        grads, state, _ = method.grad(state, params, problem.seam, (x, y), micro_batches=3)
        gn.write_grads(params, grads)
        optimizer.step()
        if (step + 1) % EVERY == 0:
            # Complete or not there: the name is given to a file that is already whole.
            torch.save(
                {
                    "params": params,
                    "optimizer": optimizer.state_dict(),
                    "state": gn.state_dict(state),
                    "draw": draw.get_state(),
                    "step": step + 1,
                },
                folder / "next.pt",
            )
            os.replace(folder / "next.pt", checkpoint)
    if fraction is not None:
        signal.pause()  # the shot is on its way
    end = {path: leaf.detach() for path, leaf in params.items()}
    torch.save({"params": end, "state": gn.state_dict(state)}, folder / "end.pt")
