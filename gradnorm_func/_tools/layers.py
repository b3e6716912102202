"""layer_analysis: which task pulls how hard, and against whom, at every layer of the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from gradnorm_func._core import tree
from gradnorm_func._core.loss import LossFn
from gradnorm_func._core.numerics import cosines, row_norms
from gradnorm_func._core.tasks import task_names
from gradnorm_func._core.tree import Tensors, Where
from gradnorm_func._measure.measure import named_losses, run_engine
from gradnorm_func._measure.plan import plan_of
from gradnorm_func._reduce.stats import gramian_of

MOST_COLUMNS = 10  # of tasks in a printed table


class LayerReport(NamedTuple):
    """The task gradients layer by layer, in the order in which params defines them. `print` shows a table."""

    losses: Any  # as `loss_fn` returned them; `gn.task_names` of it gives the order of the tasks
    norms: dict[str, Tensor]  # layer -> (T,) ‖∇_layer L_i‖, unweighted; exactly 0 where a task does not reach
    cosines: dict[str, Tensor]  # layer -> (T, T); 0 in the row and column of a task that does not reach

    def __str__(self) -> str:
        if any(norms.ndim != 1 for norms in self.norms.values()):  # a batch of reports, out of vmap
            return repr(self)
        return _table(self)


def layer_analysis(
    loss_fn: LossFn,
    params: Tensors,
    batch: Any,
    *,
    where: Where = None,
    by: Callable[[str], str] | None = None,
    has_aux: bool = False,
    vectorize: bool = True,
    chunk_size: int | None = None,
) -> LayerReport:
    r"""Norms of all task gradients and cosines between them, at every layer, from one vectorised pass.

    For a layer with parameters θ: :math:`n_i = \|\nabla_\theta L_i\|` and
    :math:`\cos_{ij} = \langle \nabla_\theta L_i, \nabla_\theta L_j \rangle / (n_i n_j)`. The last layer at which
    every norm is above 0 is the last shared one, the paper's W.

    Args:
        loss_fn, params, batch, vectorize, chunk_size: as in `measure`. All T task gradients are held at once, T
            times the memory of the parameters looked at: `where` bounds that, `chunk_size` what comes on top.
        where: the parameters to look at, as in `measure`; None is all of them, for a `multi_task_loss` too.
        by: from a parameter's path to the name of its layer: parameters of one name are taken together. None cuts
            the last part, so that the weight and bias of a module are one layer; `by=str` keeps every parameter
            apart.
        has_aux: then `loss_fn` returns (losses, aux), and the aux is dropped.

    Returns:
        LayerReport. `print` it, or draw it with `gradnorm_func.plot.layers`.

    Raises:
        ValueError: as `measure` does.

    Example:
        >>> import torch, gradnorm_func as gn
        >>> params = {"trunk.weight": torch.tensor([[1.0, 2.0]]), "trunk.bias": torch.zeros(1), "head": torch.ones(1)}
        >>> z = lambda params, x: torch.nn.functional.linear(x, params["trunk.weight"], params["trunk.bias"])
        >>> loss_fn = lambda params, x: {"fit": (z(params, x) * params["head"]).sum(), "size": -z(params, x).sum()}
        >>> print(gn.layer_analysis(loss_fn, params, torch.tensor([[2.0, 2.0]])))
        layer  fit  size  most opposed
        ----------------------------------
        trunk    3     3  fit / size -1.00
        head     6     .
        last layer that every task reaches: trunk
    """
    options: dict[str, Any] = {"has_aux": has_aux, "vectorize": vectorize, "chunk_size": chunk_size}
    everywhere = where if where is not None else lambda path: True
    plan = plan_of(params, loss_fn, batch, everywhere, None, "norms", task_grads=True, **options)
    measured, names = run_engine(plan), tree.paths(params)
    grads = dict(zip(plan.where or [], measured.stats.task_grads, strict=True))
    layers: dict[str, list[Tensor]] = {}
    for index in _defined_order(params):
        if index in grads:
            layer = names[index].rpartition(".")[0] or names[index] if by is None else by(names[index])
            layers.setdefault(layer, []).append(grads[index])
    return LayerReport(
        named_losses(plan, measured),
        {layer: row_norms(leaves) for layer, leaves in layers.items()},
        {layer: cosines(gramian_of(leaves)) for layer, leaves in layers.items()},
    )


def _defined_order(params: Any) -> list[int]:
    """Indices of the leaves in the order of definition: sorted, layer 10 would come before layer 2."""
    names = tree.paths(params)
    place = {name: i for i, name in enumerate(_walk(params, ""))}
    return sorted(range(len(names)), key=lambda i: place.get(names[i], len(place)))


def _walk(node: Any, path: str) -> list[str]:
    if isinstance(node, dict):
        children = [(str(key), child) for key, child in node.items()]
    elif isinstance(node, (list, tuple)):
        children = list(zip(getattr(node, "_fields", map(str, range(len(node)))), node, strict=True))
    else:
        return [path]
    return [name for key, child in children for name in _walk(child, f"{path}.{key}" if path else key)]


def _table(report: LayerReport) -> str:
    tasks = task_names(report.losses)
    summary = len(tasks) > MOST_COLUMNS
    rows = [["layer", *(["largest", "median", "smallest"] if summary else tasks), "most opposed"]]
    for layer, norms in report.norms.items():
        values = norms.tolist()
        cells = _extremes(norms, tasks) if summary else [_number(value) for value in values]
        rows.append([layer or "(params)", *cells, _most_opposed(report.cosines[layer].tolist(), values, tasks)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    sides = ["<", *[">"] * (len(widths) - 2), "<"]
    lines = ["  ".join(f"{c:{s}{w}}" for c, s, w in zip(row, sides, widths, strict=True)) for row in rows]
    lines.insert(1, "-" * len(lines[0]))
    reached = [layer for layer, norms in report.norms.items() if bool((norms > 0).all())]
    end = f"last layer that every task reaches: {reached[-1]}" if reached else "no layer that every task reaches"
    return "\n".join(line.rstrip() for line in [*lines, end])


def _extremes(norms: Tensor, tasks: list[str]) -> list[str]:
    """The largest norm and whose it is, the median, the smallest norm and whose it is."""
    largest, smallest = int(norms.argmax()), int(norms.argmin())
    ends = [f"{_number(float(norms[i]))} {tasks[i]}" for i in (largest, smallest)]
    return [ends[0], _number(float(norms.median())), ends[1]]


def _number(value: float) -> str:
    return "." if value == 0 else f"{value:.3g}"


def _most_opposed(cosines: list[list[float]], norms: list[float], tasks: list[str]) -> str:
    reached = [i for i, norm in enumerate(norms) if norm > 0]
    pairs = [(cosines[i][j], f"{tasks[i]} / {tasks[j]}") for i in reached for j in reached if i < j]
    return "{1} {0:+.2f}".format(*min(pairs)) if pairs else ""
