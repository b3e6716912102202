"""Micro-batches: how a batch is cut, how many examples a part holds, and what their sums come back as."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from gradnorm_func._core import tree


def split(batch: Any, micro_batches: int | None) -> list[tuple[Any, float]]:
    """(part, its number of examples) for each of the parts of a batch; None is the whole batch, as it is.

    Every tensor is cut along its first axis; what has none goes into every part whole. Tensors of one length hold that
    many examples, and the parts may differ by one. Of tensors of several lengths (the point sets of a PINN) each loss
    is a mean over another, so that no count fits them all: the parts must be equal then, and count as one together.
    """
    leaves, treedef = tree.flatten(batch)
    cut = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.ndim > 0]
    sizes = sorted({leaves[i].shape[0] for i in cut})
    examples = float(sizes[0]) if len(sizes) == 1 and sizes[0] > 0 else 1.0
    if micro_batches is None:
        return [(batch, examples)]
    if isinstance(micro_batches, bool) or not isinstance(micro_batches, int) or micro_batches < 1:
        raise ValueError(f"micro_batches={micro_batches!r} must be an integer, at least 1, or None for the whole batch")
    if not cut:
        raise ValueError(
            f"micro_batches={micro_batches}, but batch={type(batch).__name__} holds no tensor with a first axis to "
            "cut: give it as a pytree of tensors (a dict for a class of its own), or merge the stats of your own parts"
        )
    if sizes[0] < micro_batches:
        raise ValueError(
            f"micro_batches={micro_batches}, but a tensor of the batch has {sizes[0]} entries along its first axis: "
            f"at most {sizes[0]} micro-batches can be made of it"
        )
    if len(sizes) > 1 and any(size % micro_batches for size in sizes):
        raise ValueError(
            f"micro_batches={micro_batches} must divide every length if the tensors of the batch differ in theirs "
            f"(they have {sizes}): parts of unequal shares have no common weight. What is no example (class weights, "
            "a grid) does not belong into the batch: let loss_fn close over it, or wrap it in what is no pytree"
        )
    pieces = {i: leaves[i].tensor_split(micro_batches) for i in cut}
    parts = []
    for m in range(micro_batches):
        part = [pieces[i][m] if i in pieces else leaf for i, leaf in enumerate(leaves)]
        count = pieces[cut[0]][m].shape[0] if len(sizes) == 1 else 1 / micro_batches
        parts.append((tree.unflatten(treedef, part), float(count)))
    return parts


def as_params(grads: Any, params: Any) -> Any:
    """Gradients in the dtypes of the parameters: those of half precision were summed over the parts in float32."""
    return tree.tree_map(lambda grad, leaf: grad.to(leaf.dtype), grads, params) if tree.flatten(grads)[0] else grads
