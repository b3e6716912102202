"""The tape: run a function once, pull cotangents back through it. The one primitive under all engines.

Two ways, the same numbers:

- in plain eager mode by autograd itself. It follows the graph, so that what a part does not read costs nothing, and
  whatever plain PyTorch can train may stand in a loss: activation checkpointing, compiled sub-modules, old-style
  `autograd.Function`, residuals by `requires_grad_()` and `torch.autograd.grad(create_graph=True)`;
- by `torch.func.vjp` under `torch.compile` and inside of `vmap`, `grad`, `jvp`: composable and traceable, and a
  compiler drops what nobody uses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.func import vjp, vmap

from gradnorm_func._core import tree
from gradnorm_func._core.numerics import full_precision
from gradnorm_func._core.tracing import traced

# What tapes record: leaves -> (outputs, anything else the caller wants to have)
Recorded = Callable[[list[Tensor]], tuple[list[Tensor], Any]]
# One gradient for each input; None where autograd knows that the outputs do not depend on it.
Grads = list[Tensor | None]


class Pull(Protocol):
    """Cotangents of the outputs -> gradients of the inputs."""

    def __call__(
        self, cotangents: Sequence[Tensor], wanted: Sequence[int] | None = None, *, last: bool = False
    ) -> Grads:
        """`wanted` are the indices of the inputs, None is all; `last` frees the graph on the way, as a plain step."""


class Tape(NamedTuple):
    """A function that has been run."""

    outputs: list[Tensor]  # cut from the graph
    aux: Any  # as it was returned, with its graph
    pull: Pull
    saved: list[Tensor]  # the outputs with their graph, where autograd recorded it; [] otherwise

    def pull_rows(
        self, cotangents: list[Tensor], wanted: Sequence[int] | None, *, vectorize: bool, chunk_size: int | None
    ) -> Grads:
        """The pullback over a leading task axis: cotangents (T, ...) -> gradients (T, ...), or None."""
        if vectorize and not any(map(_needs_a_loop, nodes(out.grad_fn for out in self.saved))):
            try:
                return _vectorized(self.pull, cotangents, wanted, chunk_size)
            except RuntimeError:  # an operation without a batching rule, such as a compiled sub-module
                if not self.saved:
                    raise
        rows = [self.pull([leaf[i] for leaf in cotangents], wanted) for i in range(cotangents[0].shape[0])]
        return [None if column[0] is None else torch.stack(column) for column in zip(*rows, strict=True)]


def tape(fn: Recorded, inputs: Sequence[Tensor]) -> Tape:
    """`fn(inputs)`, recorded: its outputs, what else it returned, and the pullback."""
    return _by_torch_func(fn, inputs) if traced() else _by_autograd(fn, inputs)


@contextmanager
def fresh_casts() -> Iterator[None]:
    """Around a pass: nothing stays of the casts of parameters that autocast remembers.

    It remembers them until the user's autocast ends, and every pass has leaves of its own: under an autocast around a
    whole training loop, memory would grow by a copy of the parameters with every step.
    """
    torch.clear_autocast_cache()
    try:
        yield
    finally:
        torch.clear_autocast_cache()


def _by_autograd(fn: Recorded, inputs: Sequence[Tensor]) -> Tape:
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            "torch.inference_mode() records no gradients: use torch.no_grad() here, which is no obstacle"
        )
    leaves = [x if x.is_leaf and x.requires_grad else x.detach().requires_grad_() for x in inputs]
    try:
        with torch.enable_grad():
            outputs, aux = fn(leaves)
    except RuntimeError as error:
        _refuse_in_place(error)
        raise
    cut = [out.detach() for out in outputs]

    def pull(cotangents: Sequence[Tensor], wanted: Sequence[int] | None = None, *, last: bool = False) -> Grads:
        return gradients(outputs, leaves if wanted is None else [leaves[i] for i in wanted], cotangents, last=last)

    return Tape(cut, aux, pull, outputs)


def gradients(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], cotangents: Sequence[Tensor], *, last: bool
) -> Grads:
    """Of outputs that autograd has recorded, at any tensors that they depend on; None where they do not."""
    pairs = [(out, c) for out, c in zip(outputs, cotangents, strict=True) if out.requires_grad]
    if not pairs or not inputs:
        return [None] * len(inputs)
    heads, seeds = zip(*pairs, strict=True)
    try:
        with full_precision(outputs[0]):
            grads = torch.autograd.grad(heads, inputs, seeds, retain_graph=not last, allow_unused=True)
    except RuntimeError as error:
        if "use_reentrant" in str(error):
            raise ValueError(
                "torch keeps a reentrant checkpoint from torch.autograd.grad: give the torch.utils.checkpoint in "
                "the loss use_reentrant=False"
            ) from error
        raise
    return dense(grads)


WRITTEN = (
    "the loss writes in place to z or to a parameter, as nn.ReLU(inplace=True) as the first layer of a head does: give "
    "that layer inplace=False"
)


def _refuse_in_place(error: RuntimeError) -> None:
    """Says what a head does that writes to its copy of z, which plain PyTorch lets pass."""
    if "leaf Variable that requires grad is being used in an in-place" in str(error):
        raise ValueError(WRITTEN) from error


def _by_torch_func(fn: Recorded, inputs: Sequence[Tensor]) -> Tape:
    constants = _Constants()

    def run(leaves: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        outputs, aux = fn(leaves)
        return outputs, constants.take(aux)

    try:
        outputs, pull_all, tensors = vjp(run, list(inputs), has_aux=True)  # type: ignore[misc]
    except RuntimeError as error:
        if "mutate a captured Tensor" in str(error):
            raise ValueError(
                "loss_fn writes to a tensor that is none of its arguments, such as a buffer of batch norm in train "
                "mode: call the module by gn.functional(module, prefix, buffers=True), which returns (output, new "
                "buffers), and give these out as aux"
            ) from error
        _refuse_in_place(error)
        raise

    def pull(cotangents: Sequence[Tensor], wanted: Sequence[int] | None = None, *, last: bool = False) -> Grads:
        del last  # whoever traces frees what it likes
        with full_precision(outputs[0]):
            grads = pull_all(list(cotangents))[0]
        return dense(grads if wanted is None else [grads[i] for i in wanted])

    return Tape(outputs, constants.put(tensors), pull, [])


def dense(grads: Sequence[Tensor | None]) -> Grads:
    """Those of an `Embedding(sparse=True)` are dense from here on: for norms, and for sums over tasks and copies."""
    return [grad.to_dense() if grad is not None and grad.layout is torch.sparse_coo else grad for grad in grads]


class _Constants:
    """What of aux is no tensor: torch.func takes tensors only, so that the rest stays behind and is put back.

    By torch's own pytree, for the order of leaves does not matter here, and Dynamo knows it better: of a dict with no
    leaves, which an aux may well be, optree's flatten does not trace.
    """

    def take(self, aux: Any) -> list[Tensor]:
        leaves, self.treedef = pytree.tree_flatten(aux)
        self.leaves = [None if isinstance(leaf, Tensor) else (leaf,) for leaf in leaves]
        return [leaf for leaf in leaves if isinstance(leaf, Tensor)]

    def put(self, tensors: list[Tensor]) -> Any:
        rest = iter(tensors)
        return pytree.tree_unflatten([next(rest) if leaf is None else leaf[0] for leaf in self.leaves], self.treedef)


def leaves_of(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The beginnings of graphs of our own, where autograd records: what a tape takes as they are, several tapes too."""
    return list(tensors) if traced() else [x.detach().requires_grad_() for x in tensors]


def copy_of(leaf: Tensor) -> Tensor:
    """The same values as the beginning of another graph, so that what two readers make of it stays apart."""
    return leaf if traced() else leaf.detach()


def without_graph(aux: Any) -> Any:
    """What a tape returned beside its outputs, cut from the graph."""
    return aux if traced() else tree.tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, aux)


def _vectorized(pull: Pull, cotangents: list[Tensor], wanted: Sequence[int] | None, chunk_size: int | None) -> Grads:
    """vmap takes tensors only, so that what is None for one row, and then for all, stays outside of it."""
    unread: list[bool] = []

    def one(row: list[Tensor]) -> list[Tensor]:
        grads = pull(row, wanted)
        unread[:] = [grad is None for grad in grads]
        return [grad for grad in grads if grad is not None]

    rows = iter(vmap(one, chunk_size=chunk_size)(cotangents))
    return [None if missing else next(rows) for missing in unread]


def nodes(roots: Iterable[Any]) -> Iterator[Any]:
    """Every node of the autograd graph below some nodes, these included."""
    todo = [root for root in roots if root is not None]
    seen = set(todo)
    while todo:
        node = todo.pop()
        yield node
        for parent, _ in node.next_functions:
            if parent is not None and parent not in seen:
                seen.add(parent)
                todo.append(parent)


def _needs_a_loop(node: Any) -> bool:
    """Whether vmap cannot run this node's backward pass, or only slowly and with a warning."""
    name = node.name()
    if "WeightNorm" in name:
        return True
    if "Norm" in name:  # no rule for an input of one dtype and parameters or buffers of another, as under autocast
        read = (getattr(node, f"_saved_{field}", None) for field in ("input", "weight", "running_mean"))
        return len({tensor.dtype for tensor in read if isinstance(tensor, Tensor)}) > 1
    return "ScaledDotProduct" in name or "MkldnnRnn" in name
