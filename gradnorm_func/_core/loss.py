"""What a loss is: T scalars from (params, batch), with or without a visible seam between trunk and heads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from gradnorm_func._core import tree
from gradnorm_func._core.tree import PyTree

LossFn: TypeAlias = Callable[[PyTree, Any], Any]


class SharedLinear(NamedTuple):
    """The last shared layer, known to be linear; made by `shared_linear`."""

    weight: str
    bias: str | None
    activation: Callable[[Tensor], Tensor] | None

    def linear(self, params: PyTree, h: Tensor) -> Tensor:
        """h @ weight.T + bias, before the activation."""
        bias = None if self.bias is None else tree.lookup(params, self.bias)
        return torch.nn.functional.linear(h, tree.lookup(params, self.weight), bias)

    def activate(self, y: Tensor) -> Tensor:
        """z of what `linear` gives."""
        return y if self.activation is None else self.activation(y)

    def __call__(self, params: PyTree, h: Tensor) -> Tensor:
        return self.activate(self.linear(params, h))


class StackedHeads(NamedTuple):
    """T heads of one architecture; made by `stacked_heads`."""

    head: Callable[[PyTree, Any, Any], Any]
    path: str
    batch_dims: Any
    randomness: str

    def __call__(self, params: PyTree, z: Any, batch: Any) -> Any:
        """All T losses of one z, as a (T,) tensor."""
        return self.mapped(None)(tree.subtree(params, self.path), z, batch)

    def mapped(self, z_dim: int | None) -> Callable[[PyTree, Any, Any], Any]:
        """`head` over the task axis of its parameters, its part of the batch and, if `z_dim` is 0, of z."""
        return torch.func.vmap(self.head, in_dims=(0, z_dim, self.batch_dims), randomness=self.randomness)


class MultiTaskLoss:
    """A loss_fn with a visible seam; made by `multi_task_loss`."""

    def __init__(
        self,
        backbone: Callable[[PyTree, Any], Any] | None,
        heads: PyTree,
        last_shared: Callable[[PyTree, Any], Any] | SharedLinear | None,
        has_aux: bool,
    ) -> None:
        self.backbone = backbone
        self.heads = heads
        self.last_shared = last_shared
        self.has_aux = has_aux
        # In task order. Done here and by hand: torch.compile cannot flatten a dict of functions.
        self.names: list[Any] = sorted(heads) if isinstance(heads, Mapping) else []
        self.functions: list[Callable[..., Any]] = []
        if not isinstance(heads, StackedHeads):
            self.functions = [heads[name] for name in self.names] if self.names else list(heads)
        if has_aux:
            self.functions = [_with_aux(head) for head in self.functions]

    def __repr__(self) -> str:
        if isinstance(self.heads, StackedHeads):
            return f"MultiTaskLoss(stacked_heads at {self.heads.path!r})"
        return f"MultiTaskLoss({self.names or f'{len(self.functions)} tasks'})"

    def structure(self, per_task: Sequence[Any]) -> Any:
        """What belongs to each task, in task order, in the structure of `heads`."""
        if isinstance(self.heads, Mapping):
            by_name = dict(zip(self.names, per_task, strict=True))
            return {name: by_name[name] for name in self.heads}
        return list(per_task)

    def shared(self, params: PyTree, batch: Any, of_layer: PyTree = None) -> tuple[Any, tuple[Any, ...], Any]:
        """The representation z, (h, pre-activation) if the last layer is a `shared_linear`, and the aux; `of_layer` are
        other params for that layer alone."""
        assert self.backbone is not None
        h = self.backbone(params, batch)
        h, aux = h if self.has_aux else (h, ())
        if isinstance(self.last_shared, SharedLinear):
            y = self.last_shared.linear(params if of_layer is None else of_layer, h)
            return self.last_shared.activate(y), (h, y), aux
        return (h if self.last_shared is None else self.last_shared(params, h)), (), aux

    def __call__(self, params: PyTree, batch: Any) -> Any:
        if self.backbone is None:
            outs = [head(params, batch) for head in self.functions]
            shared_aux = ()
        else:
            z, _, shared_aux = self.shared(params, batch)
            if isinstance(self.heads, StackedHeads):
                out = self.heads(params, z, batch)
                return (out[0], (shared_aux, out[1])) if self.has_aux else out
            outs = [head(params, z, batch) for head in self.functions]
        if not self.has_aux:
            return self.structure(outs)
        losses = self.structure([out[0] for out in outs])
        return losses, (shared_aux, self.structure([out[1] for out in outs]))


def _with_aux(head: Callable[..., Any]) -> Callable[..., Any]:
    """A head that returns its loss alone has an empty aux: often the backbone is the only one that has any."""

    def run(*args: Any) -> Any:
        out = head(*args)
        return (out, ()) if isinstance(out, Tensor) else out

    return run


def multi_task_loss(
    backbone: Callable[[PyTree, Any], Any] | None,
    heads: Mapping[str, Callable[..., Any]] | Sequence[Callable[..., Any]] | StackedHeads,
    *,
    last_shared: Callable[[PyTree, Any], Any] | SharedLinear | None = None,
    has_aux: bool = False,
) -> MultiTaskLoss:
    r"""A loss_fn with a visible seam: :math:`L_i = \mathrm{head}_i(\theta, z)` of one shared representation z.

    The engine gives each head its own copy of z, so one ordinary backward pass yields every
    :math:`\partial L_i / \partial z` separately: per-task gradients at the price of a plain training step.

    A PINN has `backbone=None`: what its losses share are the parameters. `docs/pinns.md` says what to mind there.

    Args:
        backbone: `backbone(params, batch) -> h`, the shared part: a tensor, or a pytree of tensors. None makes
            the parameters themselves what is shared: each `head(params, batch)` gets its own copy of them
            (a PINN's residual, boundary and initial losses on different points).
        heads: `{"name": head}` or a list of heads, `head(params, z, batch) -> scalar`; or `stacked_heads(...)`.
            A head may read any parameter *except* those of a `shared_linear` used as W; `check` tells.
        last_shared: `last_shared(params, h) -> z`, the last shared layer, which the backbone then leaves out: any
            function, or `shared_linear(...)`, at whose weight the norms are cheapest. W is named by `where` alone.
        has_aux: then the backbone returns `(h, aux)` and every head `(loss, aux)`, or the loss alone, and then its aux
            is (); the aux of the loss is `(backbone_aux, heads_aux)`, the second in the structure of `heads`.

    Returns:
        A callable `loss_fn(params, batch) -> losses`, the losses in the structure of `heads`.

    Raises:
        ValueError: for fewer than two heads, something that is no function, or `last_shared` or
            `stacked_heads` without a backbone.

    Example:
        >>> import torch, gradnorm_func as gn
        >>> loss_fn = gn.multi_task_loss(
        ...     lambda params, x: torch.tanh(x @ params["trunk"]),
        ...     {"sum": lambda params, z, x: (z.sum(-1) - x.sum(-1)).square().mean(),
        ...      "size": lambda params, z, x: (z @ params["size"] - x.norm(dim=-1)).square().mean()},
        ... )
        >>> params = {"trunk": torch.eye(3), "size": torch.ones(3)}
        >>> sorted(loss_fn(params, torch.ones(4, 3)))
        ['size', 'sum']
    """
    if backbone is not None and not callable(backbone):
        raise ValueError(f"backbone={backbone!r} must be a function (params, batch) -> h, or None")
    _refuse_module("backbone", backbone, "params, batch")
    if last_shared is not None and not callable(last_shared):
        raise ValueError(f"last_shared={last_shared!r} must be a function (params, h) -> z; see gn.shared_linear")
    if backbone is None and last_shared is not None:
        raise ValueError("last_shared needs a backbone: with backbone=None every parameter is shared")
    if isinstance(heads, StackedHeads):
        if backbone is None:
            raise ValueError("stacked_heads needs a backbone; with backbone=None give a dict or list of loss functions")
        return MultiTaskLoss(backbone, heads, last_shared, has_aux)
    if not isinstance(heads, (Mapping, Sequence)):
        raise ValueError(f"heads={heads!r} must be a dict or a list of functions, or gn.stacked_heads(...)")
    if len(heads) < 2:
        raise ValueError(f"heads has {len(heads)} task(s); balancing needs at least two")
    for name, head in heads.items() if isinstance(heads, Mapping) else enumerate(heads):
        if not callable(head):
            raise ValueError(f"heads[{name!r}]={head!r} must be a function (params, z, batch) -> scalar")
        _refuse_module(f"heads[{name!r}]", head, "params, z, batch")
    return MultiTaskLoss(backbone, heads, last_shared, has_aux)


def _refuse_module(argument: str, part: Any, arguments: str) -> None:
    """A module has parameters of its own, which are not those of params."""
    if isinstance(part, torch.nn.Module) and any(True for _ in part.parameters()):
        raise ValueError(
            f"{argument}={type(part).__name__} is a module, and must be a function of ({arguments}): write "
            f"call = gn.functional(module, path), and lambda {arguments}: ... call(params, ...)"
        )


def shared_linear(
    weight: str, bias: str | None = None, activation: Callable[[Tensor], Tensor] | None = None
) -> SharedLinear:
    r"""The last shared layer as a linear one, :math:`z = \mathrm{activation}(h A^\top + b)`.

    Knowing that it is linear, the engine gets the norms at its weight from the gradients at z: by T small
    matrix products, or by the Gram identity :math:`\|B^\top H\|^2 = \langle BB^\top, HH^\top \rangle`,
    whichever takes fewer multiplications for the shapes at hand. Near a stationary point the terms of the latter
    cancel: a norm below a hundredth of :math:`\|B\| \|H\|` has few digits in float32. On a CPU in eager mode the direct
    way is taken then; where nobody may ask (a GPU, a compiler), it is what is reported.

    Args:
        weight: path of the weight, shape (out, in), as in `torch.nn.Linear`.
        bias: path of the bias, shape (out,), or None.
        activation: an elementwise or any other function of one tensor, or None. It must be deterministic.

    Returns:
        A callable for `multi_task_loss(..., last_shared=...)`. W stays z until `where=` names these paths, which then
        takes the fast way. The backbone must not apply the layer, too: `check` and a step at W say so.

    Example:
        >>> import torch, gradnorm_func as gn
        >>> layer = gn.shared_linear("a", activation=torch.relu)
        >>> layer({"a": torch.tensor([[1.0, -1.0]])}, torch.tensor([[3.0, 1.0], [1.0, 3.0]]))
        tensor([[2.],
                [0.]])
    """
    if not isinstance(weight, str) or not (bias is None or isinstance(bias, str)):
        raise ValueError(f"weight={weight!r} and bias={bias!r} must be paths into params, such as 'trunk.6.weight'")
    return SharedLinear(weight, bias, activation)


def stacked_heads(
    head: Callable[[PyTree, Any, Any], Any], path: str, *, batch_dims: Any = None, randomness: str = "error"
) -> StackedHeads:
    r"""T heads of one architecture with stacked parameters, run as one `vmap`.

    `torch.func.stack_module_state` feeds it::

        stacked, _ = torch.func.stack_module_state(list_of_heads)          # every leaf (T, ...)
        params = trunk_params | {f"heads.{name}": leaf for name, leaf in stacked.items()}

    Args:
        head: `head(head_params, z, batch) -> scalar`, for one task; `head_params` is what lies below `path`,
            without the task axis.
        path: the prefix below which the stacked parameters lie, every leaf of shape (T, ...).
        batch_dims: which axis of each part of the batch is the task axis, in the form of `vmap`'s `in_dims`
            (`(None, 1)` for a batch `(x, y)` with y of shape (B, T, ...)); None gives every head the whole batch.
        randomness: as in `torch.func.vmap`, for heads with dropout: "error", "different" or "same".

    Returns:
        The `heads` argument of `multi_task_loss`; the losses are a (T,) tensor.

    Example:
        >>> import torch, gradnorm_func as gn
        >>> heads = gn.stacked_heads(lambda p, z, y: (z @ p["w"] - y).square().mean(), "heads", batch_dims=1)
        >>> params = {"heads.w": torch.ones(5, 3)}
        >>> heads(params, torch.zeros(8, 3), torch.ones(8, 5))
        tensor([1., 1., 1., 1., 1.])
    """
    if not callable(head):
        raise ValueError(f"head={head!r} must be a function (head_params, z, batch) -> scalar")
    if randomness not in ("error", "different", "same"):
        raise ValueError(f"randomness={randomness!r} must be 'error', 'different' or 'same', as in torch.func.vmap")
    return StackedHeads(head, path, batch_dims, randomness)
