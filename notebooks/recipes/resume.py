"""A checkpoint holds the balancer's state too: killed at any step, a run goes on to the very bits of an unbroken one.

python resume.py"""

import os
import random
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from toy import STEPS, Model, batches, prove

import gradnorm_func as gn


def train(file, kill_at=None):
    model, balancer = Model(), gn.gradnorm()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    state, start = balancer.init(3, dtype=torch.float64), 0
    if file.exists():
        saved = torch.load(file, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        # The template is a fresh state of the same balancer. Without L(0) and the moments in it, the weights of the
        # run would be the same for a moment only.
        state, start = gn.load_state(state, saved["balancer"]), saved["step"]
    for step, batch in list(enumerate(batches()))[start:]:
        losses, copies = model(**batch)
        optimizer.zero_grad()
        weights = balancer.weights(state, gn.measure_losses(losses, needs="losses"))  # those from before the step
        gn.weighted_sum(losses, weights).backward()
        stats = gn.measure_losses(losses, copies, weights=weights)
        state, info = balancer.balance(state, stats)
        if step == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if info.finite:
            optimizer.step()
        if step % 3 == 2:
            parts = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "balancer": gn.state_dict(state)}
            torch.save({**parts, "step": step + 1}, file.with_suffix(".new"))
            os.replace(file.with_suffix(".new"), file)  # whole or not there, whenever the kill comes
    return [state.weights, *model.parameters()]


if __name__ == "__main__" and len(sys.argv) == 3:
    train(Path(sys.argv[1]), kill_at=int(sys.argv[2]))
elif __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        kill_at, file = random.randrange(3, STEPS), Path(folder) / "run.pt"
        died = subprocess.run([sys.executable, __file__, str(file), str(kill_at)]).returncode
        unbroken, resumed = train(Path(folder) / "unbroken.pt"), train(file)
    same = died == -signal.SIGKILL and all(torch.equal(a, b) for a, b in zip(unbroken, resumed, strict=True))
    print(f"killed at step {kill_at}; resumed, bit for bit the unbroken run: {same}")
    prove(resumed[0], resumed[1:])
    raise SystemExit(not same)
