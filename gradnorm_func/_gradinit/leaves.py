"""The initial parameters as a list, and which of them get a scale, move in training, are the same or are a bias."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from gradnorm_func._core import tree
from gradnorm_func._core.trained import first_places
from gradnorm_func._core.tree import Where


class Leaves(NamedTuple):
    """θ⁰ and its parts, by index in leaf order."""

    initial: list[Tensor]  # θ⁰
    treedef: Any
    first: list[int]  # for every leaf, the first one that is the same tensor: tied parameters are one
    trained: list[int]  # what training will move: no tensor twice, nothing frozen
    scaled: set[int]  # which of these get a scale


def leaves_of(params: Any, where: Where, frozen: Where) -> Leaves:
    """The leaves of params, sorted by what `where` and `frozen` name."""
    tree.check_params(params)
    initial, treedef = tree.flatten(params)
    first = first_places(initial)
    still = set() if frozen is None else {first[i] for i in tree.select(params, frozen)}
    trained = [i for i in range(len(initial)) if first[i] == i and i not in still]
    scaled = set(trained)
    if where is not None:
        scaled &= {first[i] for i in tree.select(params, where)}
    if not scaled:
        raise ValueError(f"where={where!r} and frozen={frozen!r} leave nothing to scale: name less in frozen")
    return Leaves(initial, treedef, first, trained, scaled)


def rescaled(leaves: Sequence[Tensor], first: Sequence[int], scales: Tensor) -> list[Tensor]:
    """θ_m = m θ⁰, leaf by leaf; what was one tensor is one again."""
    # The cast is for leaves without axes, whose dtype does not outweigh that of their scale.
    products = {i: (scales[i] * leaves[i]).to(leaves[i].dtype) for i in set(first)}
    return [products[i] for i in first]


def bias_places(params: Any, biases: Where) -> set[int]:
    """Which leaves are biases."""
    if biases is not None:
        return set(tree.select(params, biases))
    return {i for i, path in enumerate(tree.paths(params)) if "bias" in path.rsplit(".", 1)[-1]}
