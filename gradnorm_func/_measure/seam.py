"""The seam engine: per-task gradients of a `multi_task_loss` from one ordinary backward pass.

Each head gets its own copy of the representation z as a differentiation input, so the backward pass through the
heads yields every ∂L_i/∂z separately; their weighted sum goes on into the backbone. Norms at z are then free, and
norms at W need T pullbacks from z to W alone.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradnorm_func._core import tree
from gradnorm_func._core.loss import MultiTaskLoss, SharedLinear, StackedHeads, task_vector
from gradnorm_func._measure import linear, ownership
from gradnorm_func._measure.plan import (
    AuxBox,
    Exchange,
    Measured,
    PerTask,
    Plan,
    fresh_casts,
    pull_all,
    quiet,
    row_norms,
    split_aux,
    unbatchable,
    vjp_aux,
    wide,
)


@fresh_casts
def seam(loss: MultiTaskLoss, params: Any, batch: Any, plan: Plan) -> Measured:
    """All that `plan` asks for, of a loss with a backbone."""
    leaves, treedef = tree.flatten(params)
    everything = list(range(len(leaves)))
    if torch.compiler.is_compiling() or tree.inside_transform():
        # A compiler drops the zeros by itself, and under a transform every leaf may require grad anyway.
        return _Pass(loss, batch, plan, leaves, treedef, everything, everything, leaves).run()[0]
    leaves = [leaf.detach() for leaf in leaves]
    by_shared, by_heads = loss.ownership.get(treedef, (everything, everything))
    partial = len(by_shared) + len(by_heads) < 2 * len(leaves)
    constants = ownership.tripwires(leaves) if partial else leaves
    this = _Pass(loss, batch, plan, leaves, treedef, by_shared, by_heads, constants)
    measured, tripped = this.run()
    if tripped:  # a part read a leaf that it used not to read: from now on it is asked about all of them
        loss.ownership[treedef] = (everything, everything)
        return seam(loss, params, batch, plan)
    # Without weights, W alone was differentiated in the shared part, so that nothing is known of its other leaves.
    if this.discover and (plan.weights is not None or not this.at):
        unread = set(everything) - this.read_by_shared - this.read_by_heads
        loss.ownership[treedef] = (sorted(this.read_by_shared | unread), sorted(this.read_by_heads | unread))
    return measured


class _Crossing(NamedTuple):
    """What is known once the heads have been run back to z: tensors only."""

    vector: Tensor  # (T,) losses
    norms: Any  # (T,) at W
    example_norms: Any  # (T,), at z
    task_grads: list[Tensor]  # leaves of W, each (T, ...)
    z_total: list[Tensor]  # leaves of Σ w_i ∂L_i/∂z
    head_grads: list[Tensor]  # Σ w_i ∂L_i/∂θ, for the leaves that the heads own
    w_grads: list[Tensor]  # Σ w_i ∂L_i/∂W not by way of z, where heads read W themselves
    aux: list[Tensor]
    kept: Any = ()


class _Pass:
    """One pass over one batch: shared part, heads, what lies between, and the way back."""

    def __init__(
        self,
        loss: MultiTaskLoss,
        batch: Any,
        plan: Plan,
        leaves: list[Tensor],
        treedef: Any,
        by_shared: list[int],
        by_heads: list[int],
        constants: list[Tensor],
    ) -> None:
        self.loss, self.batch, self.plan, self.leaves, self.treedef = loss, batch, plan, leaves, treedef
        self.by_shared, self.by_heads, self.constants = by_shared, by_heads, constants
        self.quiet = quiet()
        self.plain = not (torch.compiler.is_compiling() or tree.inside_transform())
        self.discover = self.plain and treedef not in loss.ownership
        self.watching = constants is not leaves
        self.read_by_shared: set[int] = set()
        self.read_by_heads: set[int] = set()
        self.shared_box, self.heads_box = AuxBox(), AuxBox()
        self.z_treedef: Any = None
        self.bias_first = False
        self.one_by_one = False
        self.wanted = self._linear_leaves()
        # W, if it is neither z nor the layer of a `shared_linear`. Heads that may read it get a copy of it each.
        self.at = list(plan.at or []) if plan.norms and self.wanted is None else []
        if isinstance(loss.heads, StackedHeads):  # a stacked head sees its own parameters only
            self.direct: list[int] = []
            self.heads_own = tree.select(tree.unflatten(treedef, leaves), loss.heads.path)
        else:
            self.direct = [i for i in self.at if i in by_heads]
            self.heads_own = [i for i in by_heads if i not in self.direct]

    def run(self) -> tuple[Measured, bool]:
        """What was measured, and whether a part read a leaf that it is not known to read."""
        plan = self.plan
        own = [self.leaves[i] for i in self.by_shared]
        pull: Callable[..., Any] | None = None
        with self.quiet():
            if not self.at:
                z, pull, (layer, shared_aux) = self._vjp(self._shared, own)
                crossing = self._cross(z, layer, None)
            elif plan.weights is None:
                z, (crossing, shared_aux) = self._z_of_w(own)
            else:
                z, pull, (crossing, shared_aux) = self._vjp(self._z_of_w, own)
            grads: Any = ()
            if plan.weights is not None and pull is not None:
                grads = self._assemble(crossing, list(self._last_pull(pull, crossing.z_total)[0]))
        tripped = self.watching and any(leaf.requires_grad for leaf in (*z, crossing.vector))
        vector = crossing.vector
        stacked = isinstance(self.loss.heads, StackedHeads)
        losses = vector if stacked else self.loss.structure(vector.unbind())
        aux_parts = [(self.shared_box, shared_aux), (self.heads_box, crossing.aux)]
        if self.watching:  # aux may read tripwires, or anything else that requires grad
            aux_parts = [(box, [leaf.detach() for leaf in tensors]) for box, tensors in aux_parts]
        aux = tuple(box.fill(tensors) for box, tensors in aux_parts) if plan.has_aux else ()
        measured = Measured(
            losses, vector, crossing.norms, crossing.example_norms, crossing.task_grads, grads, aux, self.z_treedef,
            crossing.kept,
        )  # fmt: skip
        return measured, tripped

    def _vjp(self, fn: Callable[..., Any], *primals: Any) -> Any:
        """vjp with aux; when watching, a tripwire that is read makes what comes out require grad."""
        with torch.enable_grad() if self.watching else nullcontext():
            return vjp_aux(fn, *primals)

    def _last_pull(self, pull: Callable[..., Any], cotangents: Any) -> Any:
        """A pullback that is not called again: what was saved for it is freed on the way, as in a plain step."""
        return pull(cotangents, retain_graph=False) if self.plain else pull(cotangents)

    def _shared(self, own: list[Tensor]) -> tuple[list[Tensor], Any]:
        """Leaves of z, and a loss of the backbone alone; as aux (h, y) of a `shared_linear` and the user's tensors."""
        return self._shared_at(tree.replace(self.constants, self.by_shared, own))

    def _shared_at(self, leaves: list[Tensor]) -> tuple[list[Tensor], Any]:
        params = tree.unflatten(self.treedef, leaves)
        z, layer, aux = self.loss.shared(params, self.batch)
        z_leaves, self.z_treedef = tree.flatten(z)
        for leaf in z_leaves:
            if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
                raise ValueError(f"the backbone returned {type(leaf).__name__}; z must be floating-point tensors only")
        if self.plan.exchange is not None and self.plan.exchange.backbone_loss is not None:
            z_leaves = [*z_leaves, task_vector([self.plan.exchange.backbone_loss(params, z, self.batch)])[0]]
        self.one_by_one = bool(self.at) and self.plan.vectorize and unbatchable(z_leaves)
        if self.discover:
            self.read_by_shared |= ownership.read_by(z_leaves, leaves)
        return z_leaves, (list(layer), self.shared_box.strip(aux))

    def _z_of_w(self, own: list[Tensor]) -> tuple[list[Tensor], Any]:
        """z as a function of what the trunk owns; inside it, z as a function of W alone."""
        base = tree.replace(self.constants, self.by_shared, own)
        z, pull_w, (layer, aux) = self._vjp(
            lambda w: self._shared_at(tree.replace(base, self.at, w)), [base[i] for i in self.at]
        )
        if self.discover:
            self.read_by_shared |= ownership.read_by(z, base)
        with self.quiet():
            return z, (self._cross(z, layer, pull_w), aux)

    def _heads(self, copies: list[Tensor]) -> tuple[Tensor, Callable[..., Any], list[Tensor]]:
        """T separate heads, each with its own z, the leaves of which come task by task: losses, pullback, aux."""
        heads, width = self.loss.functions, self.z_treedef.num_leaves

        # All copies in two flat lists, task by task: torch.func walks its arguments in Python, several times.
        def of_task(i: int, flat: list[Tensor], count: int) -> list[Tensor]:
            return flat[i * count : (i + 1) * count]

        def run(own: list[Tensor], copies: list[Tensor], ws: list[Tensor]) -> tuple[Tensor, Any]:
            base, outs = tree.replace(self.constants, self.heads_own, own), []
            for i, head in enumerate(heads):
                at = of_task(i, ws, len(self.direct))
                params = tree.unflatten(self.treedef, tree.replace(base, self.direct, at))
                out = head(params, tree.unflatten(self.z_treedef, of_task(i, copies, width)), self.batch)
                outs.append(split_aux(out, self.plan.has_aux, "a head"))
            vector = task_vector(self.loss.structure([loss for loss, _ in outs]))
            if self.discover:
                for i in range(len(heads)):
                    found = tree.replace(base, self.direct, of_task(i, ws, len(self.direct)))
                    self.read_by_heads |= ownership.read_by([vector], found)
            return vector, self.heads_box.strip(
                self.loss.structure([aux for _, aux in outs]) if self.plan.has_aux else ()
            )

        w = [self.leaves[i] for i in self.direct]
        own = [self.leaves[i] for i in self.heads_own]
        vector, pull, aux = self._vjp(run, own, copies, w * len(heads))
        pull_once = pull if callable(self.plan.weights) else partial(self._last_pull, pull)

        def pull_heads(cotangents: Tensor) -> tuple[list[Tensor], list[PerTask], list[Tensor]]:
            own, copies, ws = pull_once(cotangents)
            z_grads = [copies[k::width] for k in range(width)]
            return own, z_grads, [torch.stack(ws[k :: len(w)]) for k in range(len(w))]

        return vector, pull_heads, aux

    def _stacked(self, copies: list[Tensor], heads: StackedHeads) -> tuple[Tensor, Callable[..., Any], list[Tensor]]:
        """T heads of one architecture, under vmap; `copies` are the leaves of z with a task axis."""

        def run(own: list[Tensor], copies: list[Tensor]) -> tuple[Tensor, Any]:
            params = tree.unflatten(self.treedef, tree.replace(self.constants, self.heads_own, own))
            mapped = heads.mapped(0)
            out = mapped(tree.subtree(params, heads.path), tree.unflatten(self.z_treedef, copies), self.batch)
            losses, aux = split_aux(out, self.plan.has_aux, "a head")
            self.read_by_heads.update(self.heads_own)
            return task_vector(losses), self.heads_box.strip(aux)

        own = [self.leaves[i] for i in self.heads_own]
        vector, pull, aux = self._vjp(run, own, copies)
        pull_once = pull if callable(self.plan.weights) else partial(self._last_pull, pull)
        return vector, lambda cotangents: (*pull_once(cotangents), []), aux

    def _cross(self, z: list[Tensor], layer: list[Tensor], pull_w: Callable[..., Any] | None) -> _Crossing:
        """Through the heads and back to z; the norms at W; the weights; the sum that goes on into the trunk."""
        plan, heads = self.plan, self.loss.heads
        if self.plain:
            z = [leaf.detach() for leaf in z]
        if plan.exchange is not None:
            return self._exchange(z, plan.exchange)
        if isinstance(heads, StackedHeads):
            count = self.leaves[self.heads_own[0]].shape[0]
            vector, pull_heads, aux = self._stacked([leaf.expand(count, *leaf.shape) for leaf in z], heads)
        else:
            vector, pull_heads, aux = self._heads(z * len(self.loss.functions))
        plan.check_count(vector)
        scale = plan.weights if isinstance(plan.weights, Tensor) else torch.ones_like(vector)
        seeds = plan.seeds(scale, vector.dtype)
        head_grads, z_grads, direct = pull_heads(seeds)
        norms: Any = ()
        example_norms: Any = ()
        task_grads: list[Tensor] = []
        if pull_w is not None:
            task_grads = list(pull_all(pull_w, [_stack(leaf) for leaf in z_grads], plan, self.one_by_one)[0])
            for i, grad in zip(self.direct, direct, strict=True):
                task_grads[self.at.index(i)] = task_grads[self.at.index(i)] + grad
            norms = row_norms(task_grads)
        elif plan.norms and self.wanted is not None:
            assert isinstance(self.loss.last_shared, SharedLinear)
            y_grads = linear.before_activation(self.loss.last_shared, layer[1], z_grads[0])
            if plan.task_grads:
                weight = tree.lookup(tree.unflatten(self.treedef, self.leaves), self.loss.last_shared.weight)
                found = linear.gradients(layer[0], _stack(y_grads), self.wanted)
                task_grads = [grad.to(weight.dtype) for grad in found]
                norms = row_norms(task_grads)
                if self.bias_first:  # they come as (weight, bias), but the leaves of W in leaf order
                    task_grads.reverse()
            else:
                norms = linear.norms(layer[0], y_grads, self.wanted)
        elif plan.norms:
            norms, example_norms = _norms_at_z(z_grads)
            task_grads = [_stack(leaf) for leaf in z_grads] if plan.task_grads else []
        if isinstance(plan.weights, Tensor) and plan.norms:  # undo the weights that the cotangents carried
            scale = plan.unscaled(seeds.to(wide(seeds)))  # as rounded
            norms = _unweighted(norms, scale.abs())
            example_norms = _unweighted(example_norms, scale.abs()) if isinstance(example_norms, Tensor) else ()
            task_grads = [_unweighted(plan.widened(grad), scale) for grad in task_grads]
        elif callable(plan.weights):
            scale = plan.weights(vector, norms, example_norms)
            z_grads = [_scaled(leaf, scale) for leaf in z_grads]
            head_grads, _, direct = pull_heads(plan.seeds(scale, vector.dtype))
        z_total = [] if plan.weights is None else [_total(leaf) for leaf in z_grads]
        w_grads = [grad.sum(0) for grad in direct]
        return _Crossing(vector, norms, example_norms, task_grads, z_total, head_grads, w_grads, aux)

    def _exchange(self, z: list[Tensor], exchange: Exchange) -> _Crossing:
        """Through the heads and back, where what they get of z and what z gets of them is the method's affair."""
        count = self.z_treedef.num_leaves
        z, backbone_loss = z[:count], z[count:]
        spread = exchange.spread(z, self.z_treedef)
        if isinstance(self.loss.heads, StackedHeads):
            vector, pull_heads, aux = self._stacked(spread, self.loss.heads)
        else:
            vector, pull_heads, aux = self._heads(
                [leaf for copy in zip(*map(torch.unbind, spread), strict=True) for leaf in copy]
            )
        head_grads, z_grads, _ = pull_heads(exchange.scale(vector).to(vector.dtype))
        cotangents, kept = exchange.gather(vector, z, backbone_loss, [_stack(leaf) for leaf in z_grads])
        return _Crossing(vector, (), (), [], cotangents, head_grads, [], aux, kept)

    def _assemble(self, crossing: _Crossing, trunk_grads: list[Tensor]) -> list[Tensor]:
        """∇ Σ w_i L_i, leaf by leaf: what came through the trunk, plus what the heads found themselves."""
        grads: dict[int, Tensor] = {}
        for indices, found in (
            (self.by_shared, trunk_grads),
            (self.heads_own, crossing.head_grads),
            (self.direct, crossing.w_grads),
        ):
            for i, grad in zip(indices, found, strict=True):
                grads[i] = grads[i] + grad if i in grads else grad
        return [grads[i] for i in range(len(self.leaves))]

    def _linear_leaves(self) -> tuple[bool, bool] | None:
        """Whether W is the weight and the bias of the `shared_linear`; None if it is anything else."""
        layer, at = self.loss.last_shared, self.plan.at
        if at is None or not isinstance(layer, SharedLinear):
            return None
        names = tree.paths(tree.unflatten(self.treedef, self.leaves))
        chosen = [names[i] for i in at]
        self.bias_first = chosen[0] == layer.bias
        if not set(chosen) <= {layer.weight, layer.bias}:
            return None
        return layer.weight in chosen, layer.bias in chosen


def _norms_at_z(z_grads: list[PerTask]) -> tuple[Tensor, Tensor]:
    """(T,) norms over the batch and z, and the mean over examples of each example's norm."""
    per_leaf = [_example_norms(leaf) for leaf in z_grads]
    if len({norms.shape for norms in per_leaf}) > 1:  # no common example axis: the batch counts as one example
        per_leaf = [torch.linalg.vector_norm(norms, dim=1, keepdim=True) for norms in per_leaf]
    rows = per_leaf[0] if len(per_leaf) == 1 else torch.linalg.vector_norm(torch.stack(per_leaf), dim=0)
    return torch.linalg.vector_norm(rows, dim=1), rows.mean(1)


def _example_norms(leaf: PerTask) -> Tensor:
    """(T, B) norms of one leaf of z; the leading axis of z is the example axis."""
    if isinstance(leaf, Tensor):
        by_example = leaf.reshape(*leaf.shape[:2], -1) if leaf.ndim > 1 else leaf.reshape(-1, 1, 1)
        norms: Tensor = torch.linalg.vector_norm(by_example, dim=2, dtype=wide(leaf))
        return norms
    rows = [grad.reshape(*grad.shape[:1], -1) if grad.ndim else grad.reshape(1, 1) for grad in leaf]
    return torch.stack([torch.linalg.vector_norm(row, dim=1, dtype=wide(row)) for row in rows])


def _stack(leaf: PerTask) -> Tensor:
    return leaf if isinstance(leaf, Tensor) else torch.stack(leaf)


def _total(leaf: PerTask) -> Tensor:
    total: Tensor = leaf.sum(0) if isinstance(leaf, Tensor) else sum(leaf[1:], leaf[0])
    return total


def _scaled(leaf: PerTask, scale: Tensor) -> PerTask:
    if isinstance(leaf, Tensor):
        rows = leaf.to(wide(leaf))
        return (rows * _as_column(scale, rows)).to(leaf.dtype)
    weights = scale.to(wide(leaf[0])).unbind()
    return [(weight * grad.to(weight.dtype)).to(grad.dtype) for weight, grad in zip(weights, leaf, strict=True)]


def _unweighted(rows: Tensor, scale: Tensor) -> Tensor:
    """Rows (T, ...) of sizes that carry a weight, without it; NaN where it was 0, but with a derivative that is not."""
    size = _as_column(scale, rows)
    used = size != 0
    return torch.where(used, rows / torch.where(used, size, 1.0), torch.nan)


def _as_column(scale: Tensor, rows: Tensor) -> Tensor:
    """(T,) shaped to scale the rows of (T, ...)."""
    return scale.to(rows.dtype).reshape(-1, *[1] * (rows.ndim - 1))
