"""GradInit's whole procedure: minibatches in, rescaled parameters out."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar, Unpack

import torch

from gradnorm_func._core import tree
from gradnorm_func._core.compiling import compiled
from gradnorm_func._core.loss import LossFn
from gradnorm_func._core.progress import bar
from gradnorm_func._core.trained import retied
from gradnorm_func._gradinit.draws import drawn
from gradnorm_func._gradinit.reinit import reinit_zeros
from gradnorm_func._gradinit.settings import Options
from gradnorm_func._gradinit.state import GradInitInfo, GradInitState, gradinit_apply, gradinit_init_state
from gradnorm_func._gradinit.step import gradinit_step
from gradnorm_func._measure.check import doubts

P = TypeVar("P")


def gradinit(
    params: P,
    loss_fn: LossFn,
    batches: Iterable[Any],
    *,
    steps: int,
    overlap: bool = True,
    reinit_std: float | None = None,
    generator: torch.Generator | None = None,
    compile: bool = False,
    progress: bool | None = None,
    **hyper: Unpack[Options],
) -> tuple[P, GradInitState, GradInitInfo]:
    r"""Learns the scales of all parameters, and returns the parameters rescaled.

    For an `nn.Module`, in train mode and with its dropout at 0::

        params, _, _ = gn.gradinit(dict(model.named_parameters()), loss_fn, loader, steps=400)
        model.load_state_dict(params, strict=False)

    with `call = gn.functional(model, buffers=False)` and, say, the loss `lambda params, b: cross_entropy(call(params,
    b[0]), b[1])`. Batch norm then uses the statistics of the batch, and the running ones stay as they are.

    Args:
        params, loss_fn: as in `gradinit_step`.
        batches: minibatches, gone through again and again: a list, a DataLoader, or an iterator that is long enough.
            In the paper's form each step joins two along axis 0 to S, and the first of them and a third to S̃; so
            they must be pytrees of tensors whose axis 0 is the example.
        steps: how many; the authors take 390 of 2 x 128 images, or 780 of 2 x 64.
        overlap: False makes S̃ of two minibatches of its own.
        reinit_std: first give parameters that are zero everywhere, such as biases, normal values of this standard
            deviation, for zeros have no scale to learn. Which are zero is decided on the device, so random
            numbers are drawn for all that `where` names.
        generator: of these values.
        compile: run the steps as one compiled graph.
        progress: show a progress bar, if tqdm is installed; by default on a terminal only.
        **hyper: of `gradinit_step`: form, p, gamma, eta, where, frozen, optimizer, min_scale, ....

    Returns:
        (params, state, history): new parameters in the structure of the old, the state, and the Infos of all steps
        stacked, every field (steps, ...).

    Raises:
        ValueError: if the loss is not finite, if no step had a finite gradient, if the batches run out or cannot
            be joined, and as `gradinit_step` does. Nothing has been changed then.

    Example:
        >>> import torch, gradnorm_func as gn
        >>> loss_fn = lambda w, x: (x @ w - 1).square().mean()
        >>> w, state, history = gn.gradinit(torch.full((3,), 8.0), loss_fn, [torch.eye(3)], steps=60, progress=False)
        >>> history.grad_norm[[0, -1]]
        tensor([8.0829, 2.6328])

    Source: Zhu et al. 2021. Departure: every step draws the minibatches of both branches, whichever it takes.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps={steps!r} must be an integer, at least 1")
    if reinit_std is not None:
        params = reinit_zeros(params, reinit_std, where=hyper.get("where"), generator=generator)
    params = retied(params)
    state = gradinit_init_state(params, optimizer=hyper.get("optimizer"))

    def step(state: GradInitState, batch: Any, after: Any) -> tuple[GradInitState, GradInitInfo]:
        return gradinit_step(state, params, loss_fn, batch, batch_after=after, **hyper)

    run = compiled(step) if compile else step
    draw = drawn(batches, pairs=hyper.get("form", "paper") != "simple", overlap=overlap)
    history: list[GradInitInfo] = []
    for index in (shown := bar(range(steps), progress, "gradinit")):
        batch, after = next(draw)
        if index == 0:
            doubts(loss_fn, params, batch)  # refuses a module that the loss closes over
        state, info = run(state, batch, after)
        # Scales cannot mend a loss that is not finite, and more steps would all be skipped alike. This is the
        # procedure's one wait for the device.
        if not bool(info.loss.isfinite()):
            raise ValueError(
                f"loss_fn returned {float(info.loss)} in step {index}: look for invalid values in the batch, or "
                "start from smaller parameters (GradInit needs a finite loss to improve on)"
            )
        history.append(info)
        shown.note({"loss": info.loss, "norm": info.grad_norm})
    stacked: GradInitInfo = tree.tree_map(lambda *rows: torch.stack(rows), *history)
    if not bool(stacked.finite.any()):
        raise ValueError(
            f"in none of the {steps} steps was the gradient finite, so no scale was learned: use a wider dtype, a "
            "smaller loss_scale, or smaller parameters"
        )
    return gradinit_apply(state, params), state, stacked
