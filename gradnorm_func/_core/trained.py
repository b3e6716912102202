"""Which leaves of params training moves: no frozen one, and no tensor twice. What shares its memory with what."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gradnorm_func._core import tree
from gradnorm_func._core.tracing import traced


class Trained(NamedTuple):
    """What training moves, by index in leaf order."""

    first: list[int]  # for every leaf, the first one that is the same tensor: tied parameters are one
    moved: list[int]  # the first ones that are not frozen

    @classmethod
    def of(cls, leaves: Sequence[Tensor]) -> Trained:
        """What training moves of some leaves, by what they say themselves.

        A parameter of a module that does not require grad is frozen, and so is any tensor beside others that do. Plain
        tensors none of which requires grad are all trained: nobody has said otherwise.
        """
        marked = any(leaf.requires_grad for leaf in leaves)
        first = first_places(leaves)
        frozen = [not leaf.requires_grad and (marked or isinstance(leaf, nn.Parameter)) for leaf in leaves]
        moved = [i for i, place in enumerate(first) if i == place and not frozen[i]]
        if not moved:
            raise ValueError(
                "every parameter is frozen (requires_grad is False), so nothing would be trained: call "
                "requires_grad_() on those that are to move"
            )
        return cls(first, moved)

    def sums(self, grads: Sequence[Tensor]) -> list[Tensor]:
        """The gradient of each that moves; one at several places gets the sum of theirs."""
        totals = {i: grads[i] for i in self.moved}
        for i, place in enumerate(self.first):
            if i != place and place in totals:
                totals[place] = totals[place] + grads[i]
        return list(totals.values())


def first_places(leaves: Sequence[Tensor]) -> list[int]:
    """For every leaf, the index of the first one that is the same tensor."""
    seen: dict[Any, int] = {}
    return [seen.setdefault(_identity(leaf), i) for i, leaf in enumerate(leaves)]


def retied(params: Any) -> Any:
    """Params in which parameters that share their memory are one object, as all that looks at params can see."""
    leaves, treedef = tree.flatten(params)
    return tree.unflatten(treedef, [leaves[i] for i in first_places(leaves)])


def _identity(leaf: Tensor) -> Any:
    """What is equal for two leaves that are one: `state_dict` makes a new object for every name of one memory."""
    if traced() or type(leaf) not in (Tensor, nn.Parameter) or leaf.layout is not torch.strided or not leaf.data_ptr():
        return id(leaf)
    return leaf.device, leaf.data_ptr(), leaf.dtype, leaf.shape, leaf.stride()


def apart(grads: Sequence[Tensor]) -> list[Tensor]:
    """Gradients in memory of their own, as `backward` would leave them.

    Those of what is added, `W + ΔW`, are one tensor to autograd, and that of a number is a part of the weights: what
    writes in place, such as clipping, would act twice, or on a state.
    """
    seen: set[int] = set()
    out = []
    for grad in grads:
        if type(grad) is Tensor and grad.layout is torch.strided:
            storage = grad.untyped_storage()
            if storage.data_ptr() in seen or storage.nbytes() != grad.numel() * grad.element_size():
                grad = grad.clone()
            else:
                seen.add(storage.data_ptr())
        out.append(grad)
    return out
