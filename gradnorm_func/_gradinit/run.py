"""GradInit's whole procedure: minibatches in, rescaled parameters out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from gradnorm_func._core import tree
from gradnorm_func._core.loss import LossFn
from gradnorm_func._core.tree import Where
from gradnorm_func._gradinit.step import GradInitInfo, GradInitState, gradinit_apply, gradinit_init_state, gradinit_step
from gradnorm_func._tools.train import compiled


def gradinit(
    params: Any,
    loss_fn: LossFn,
    batches: Iterable[Any],
    *,
    steps: int,
    overlap: bool = True,
    reinit_std: float | None = None,
    generator: torch.Generator | None = None,
    compile: bool = False,
    progress: bool = True,
    **hyper: Any,
) -> tuple[Any, GradInitState, GradInitInfo]:
    r"""Learns the scales of all parameters, and returns the parameters rescaled.

    For an `nn.Module`, in train mode and with its dropout at 0::

        params, _, _ = gn.gradinit(dict(model.named_parameters()), loss_fn, loader, steps=400)
        model.load_state_dict(params, strict=False)

    with `call = gn.functional(model)` and, say, `loss_fn = lambda params, b: cross_entropy(call(params, b[0]), b[1])`.
    Batch norm then uses the statistics of the batch, and the running ones stay as they are.

    Args:
        params, loss_fn: as in `gradinit_step`.
        batches: minibatches, gone through again and again: a list, a DataLoader, or an iterator that is long enough.
            In the paper's form each step joins two along axis 0 to S, and the first of them and a third to S̃; so
            they must be pytrees of tensors whose axis 0 is the example.
        steps: how many; the authors take 390 of 2 x 128 images, or 780 of 2 x 64.
        overlap: False makes S̃ of two minibatches of its own.
        reinit_std: first give parameters that are zero everywhere, such as biases, normal values of this standard
            deviation, for zeros have no scale to learn; see `gradinit_reinit`.
        generator: of these values.
        compile: run the steps as one compiled graph.
        progress: show a progress bar, if tqdm is installed.
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
        params = gradinit_reinit(params, std=reinit_std, where=hyper.get("where"), generator=generator)
    state = gradinit_init_state(params, optimizer=hyper.get("optimizer"))

    def step(state: GradInitState, batch: Any, after: Any) -> tuple[GradInitState, GradInitInfo]:
        return gradinit_step(state, params, loss_fn, batch, batch_after=after, **hyper)

    run = compiled(step) if compile else step
    draw = _draws(_endless(batches), hyper.get("form", "paper") != "simple", overlap)
    history: list[GradInitInfo] = []
    with _bar(steps, progress) as show:
        for index in range(steps):
            state, info = run(state, *next(draw))
            # Scales cannot mend a loss that is not finite, and more steps would all be skipped alike. This is the
            # procedure's one wait for the device.
            if not bool(info.loss.isfinite()):
                raise ValueError(
                    f"loss_fn returned {float(info.loss)} in step {index}: look for invalid values in the batch, or "
                    "start from smaller parameters (GradInit needs a finite loss to improve on)"
                )
            history.append(info)
            show(info)
    stacked = tree.tree_map(lambda *rows: torch.stack(rows), *history)
    if not bool(stacked.finite.any()):
        raise ValueError(
            f"in none of the {steps} steps was the gradient finite, so no scale was learned: use a wider dtype, a "
            "smaller loss_scale, or smaller parameters"
        )
    return gradinit_apply(state, params), state, stacked


def gradinit_reinit(
    params: Any, *, std: float = 0.01, where: Where = None, generator: torch.Generator | None = None
) -> Any:
    r"""Normal values in place of parameters that are zero everywhere, which have no scale to learn.

    Args:
        params: pytree of floating-point tensors; nothing is written to it.
        std: standard deviation of the new values, > 0.
        where: what may be given new values, as in `gradinit_step`.
        generator: of the values.

    Returns:
        The same tensors but for those that were zero. Which those are is decided on the device, so random numbers
        are drawn for all that `where` names.

    Raises:
        ValueError: for a std that is not positive, an unknown path, or params that are not floating point.

    Example:
        >>> import torch, gradnorm_func as gn
        >>> params = gn.gradinit_reinit({"weight": torch.ones(2), "bias": torch.zeros(2)})
        >>> params["weight"], bool((params["bias"] != 0).all())
        (tensor([1., 1.]), True)

    Source: `reinit_zeros` of gradinit 0.1.1.
    """
    if not std > 0:
        raise ValueError(f"std={std} must be positive")
    tree.check_params(params)
    leaves, treedef = tree.flatten(params)
    fresh: dict[int, Tensor] = {}
    with torch.no_grad():
        for i in tree.select(params, where):
            leaf = leaves[i]
            if id(leaf) not in fresh:  # a tied parameter is one, and stays one
                values = std * torch.randn(leaf.shape, generator=generator, dtype=leaf.dtype, device=leaf.device)
                fresh[id(leaf)] = torch.where((leaf == 0).all(), values, leaf)
    return tree.unflatten(treedef, [fresh.get(id(leaf), leaf) for leaf in leaves])


def _endless(batches: Iterable[Any]) -> Iterator[Any]:
    """The minibatches again and again; the end of what can be gone through only once is an error."""
    count = 0
    while True:
        before = count
        for batch in batches:
            count += 1
            yield batch
        if count == before:
            raise ValueError(
                f"batches ran out after {count}: give a list or a DataLoader, which can be gone through again, "
                "or an iterator with enough for all steps (three a step in the paper's form, four without overlap)"
            )


def _draws(stream: Iterator[Any], pairs: bool, overlap: bool) -> Iterator[tuple[Any, Any]]:
    """(S, S̃) of every step; the simple form takes the minibatches as they come."""
    while True:
        first = next(stream)
        if not pairs:
            yield first, None
            continue
        batch = _join(first, next(stream))
        yield batch, _join(first if overlap else next(stream), next(stream))


def _join(a: Any, b: Any) -> Any:
    def cat(x: Any, y: Any) -> Tensor:
        if not isinstance(x, Tensor) or x.ndim == 0:
            raise ValueError(
                "the paper's form joins minibatches along axis 0, so they must be pytrees of tensors with that axis, "
                f"not {type(x).__name__ if not isinstance(x, Tensor) else 'scalars'}: write the loop over "
                "gradinit_step(..., batch, batch_after=...) yourself"
            )
        return torch.cat([x, y])

    return tree.tree_map(cat, a, b)


def _bar(steps: int, progress: bool) -> Any:
    """A context manager whose value shows an Info."""
    quiet: Callable[[GradInitInfo], None] = lambda info: None
    if not progress:
        return nullcontext(quiet)
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return nullcontext(quiet)

    class Bar:
        def __enter__(self) -> Callable[[GradInitInfo], None]:
            self.bar = tqdm(total=steps, desc="gradinit", leave=False)
            return self.show

        def show(self, info: GradInitInfo) -> None:
            self.bar.update()
            self.bar.set_postfix(loss=f"{float(info.loss):.3g}", norm=f"{float(info.grad_norm):.3g}", refresh=False)

        def __exit__(self, *error: object) -> None:
            self.bar.close()

    return Bar()
