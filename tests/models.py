"""Small models of many kinds, each written once and run two ways: classically, and as pure functions.

A model is a `ModuleDict` whose parts are called by path, `m("trunk", x)`. `Classic` calls the modules themselves, for
the reference; `Pure` calls `gn.functional` of them with given params, for the package.
"""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import optree
import torch
from oracle import Reference, reference
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import gradnorm_func as gn

WEIGHTS = {"a": 0.3, "b": 1.7, "c": 0.9, "d": 2.6}
Losses = namedtuple("Losses", "c a b")
# Insertion order is not sorted order, so a mix-up of the two shows. Each: builder from {name: loss}, order of leaves.
STRUCTURES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "tensor": (lambda t: torch.stack([t["c"], t["a"], t["b"]]), "cab"),
    "dict": (lambda t: {"c": t["c"], "a": t["a"], "b": t["b"]}, "abc"),
    "list": (lambda t: [t["c"], t["a"], t["b"]], "cab"),
    "tuple": (lambda t: (t["c"], t["a"], t["b"]), "cab"),
    "namedtuple": (lambda t: Losses(**t), "cab"),
    "nested": (lambda t: {"x": [t["c"], {"y": t["a"]}], "b": t["b"]}, "bca"),
}


class Classic:
    """The model as torch users know it: modules that hold their parameters and write to their buffers."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, path: str, *inputs: Any) -> Tensor:
        return self.model.get_submodule(path)(*inputs)

    def weight(self, path: str) -> Tensor:
        return self.model.get_parameter(path)


class Pure:
    """The same model as a function of params; what batch norm computes is collected in `buffers`."""

    def __init__(self, model: nn.Module, params: dict[str, Tensor]) -> None:
        self.model, self.params, self.buffers = model, params, {}

    def __call__(self, path: str, *inputs: Any) -> Tensor:
        out, new = gn.functional(self.model.get_submodule(path), path, buffers=True)(self.params, *inputs)
        self.buffers |= new
        return out

    def weight(self, path: str) -> Tensor:
        return self.params[path]


@dataclass(frozen=True, eq=False)
class Case:
    """A model with T tasks. W may be any of `where`; `sparse` are those at which some task's gradient is zero."""

    model: nn.Module
    batch: Any
    backbone: Callable[[Any, Any], Any]  # (m, batch) -> h
    tasks: dict[str, Callable[[Any, Any, Any], Tensor]]  # (m, z, batch) -> loss
    where: dict[str, Any]
    sparse: frozenset[str] = frozenset()
    last: str | None = None  # path of the last shared layer, a Linear
    activation: Callable[[Tensor], Tensor] | None = None
    has_aux: bool = False
    memo: dict[Any, Any] = field(default_factory=dict)

    def params(self, requires_grad: bool = False) -> dict[str, Tensor]:
        return {k: p.detach().clone().requires_grad_(requires_grad) for k, p in self.model.named_parameters()}

    def paths(self, where: Any) -> list[str]:
        """The paths that `where` names, sorted."""
        names = sorted(name for name, _ in self.model.named_parameters())
        if where is None or callable(where):
            return [name for name in names if where is None or where(name)]
        prefixes = [where] if isinstance(where, str) else where
        return [name for name in names if any(name == p or name.startswith(p + ".") for p in prefixes)]

    def through_last(self, m: Any, h: Any) -> Any:
        if self.last is None:
            return h
        y = m(self.last, h)
        return y if self.activation is None else self.activation(y)

    def loss_fn(self, structure: Callable[[dict[str, Any]], Any] = dict) -> Callable[..., Any]:
        """One plain loss function, with no seam to be seen."""

        def loss_fn(params: dict[str, Tensor], batch: Any) -> Any:
            m = Pure(self.model, params)
            z = self.through_last(m, self.backbone(m, batch))
            losses = structure({name: task(m, z, batch) for name, task in self.tasks.items()})
            return (losses, m.buffers) if self.has_aux else losses

        return loss_fn

    def seam(self, last: str, heads: Callable[[dict[str, Any]], Any] = dict) -> gn._core.loss.MultiTaskLoss:
        """The same with its seam; `last` says how the last shared layer is given: within, function or linear."""

        def backbone(params: dict[str, Tensor], batch: Any) -> Any:
            m = Pure(self.model, params)
            h = self.backbone(m, batch)
            h = self.through_last(m, h) if last == "within" else h
            return (h, m.buffers) if self.has_aux else h

        def head(task: Callable[..., Any]) -> Callable[..., Any]:
            def run(params: dict[str, Tensor], z: Any, batch: Any) -> Any:
                m = Pure(self.model, params)
                loss = task(m, z, batch)
                return (loss, m.buffers) if self.has_aux else loss

            return run

        given = {
            "within": lambda: None,
            "function": lambda: lambda params, h: self.through_last(Pure(self.model, params), h),
            "linear": lambda: gn.shared_linear(f"{self.last}.weight", f"{self.last}.bias", self.activation),
        }
        functions = heads({name: head(task) for name, task in self.tasks.items()})
        return gn.multi_task_loss(backbone, functions, last_shared=given[last](), has_aux=self.has_aux)

    def reference(self, where: Any, at_z: bool = False) -> Reference:
        """Classic autograd's answer at z or at the parameters `where`; `total` is at the same."""
        return reference_of(self, None if at_z else tuple(self.paths(where)))

    def new_buffers(self) -> dict[str, Tensor]:
        model = deepcopy(self.model)
        run_classic(self, model)
        return dict(model.named_buffers())


def run_classic(case: Case, model: nn.Module, cut: bool = False) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Losses and the leaves of z; if cut, z is where the graph begins."""
    m = Classic(model)
    z = case.through_last(m, case.backbone(m, case.batch))
    z = optree.tree_map(lambda leaf: leaf.detach().requires_grad_(), z) if cut else z
    return {name: task(m, z, case.batch) for name, task in case.tasks.items()}, optree.tree_leaves(z)


def reference_of(case: Case, paths: tuple[str, ...] | None) -> Reference:
    """The reference at parameters or, for None, at z; of all that the tests ask, once per case."""
    if paths not in case.memo:
        model = deepcopy(case.model)
        losses, z = run_classic(case, model, cut=paths is None)
        wrt = z if paths is None else [model.get_parameter(path) for path in paths]
        case.memo[paths] = reference(losses, wrt, WEIGHTS)
    return case.memo[paths]


def mse(x: Tensor, y: Tensor) -> Tensor:
    return (x - y).square().mean()


def places(early: str, last: str = "last") -> dict[str, Any]:
    """The W that every model with a last shared Linear is asked about."""
    return {
        "z": None,
        "weight": f"{last}.weight",
        "layer": [last],
        "early": early,
        "heads": "heads",
        "mixed": [f"{last}.weight", early, "heads.a"],
        "all": lambda path: True,
    }


def mlp(**extra: nn.Module) -> Case:
    model = nn.ModuleDict(
        {
            "trunk": nn.Sequential(nn.Linear(5, 6), nn.Tanh()),
            "last": nn.Linear(6, 4),
            "heads": nn.ModuleDict({"a": nn.Linear(4, 2), "b": nn.Linear(4, 1), **extra}),
        }
    )
    tasks = {
        "c": lambda m, z, batch: 10 * (z.sum(-1) - batch[1].sum(-1)).square().mean(),  # a head with no parameters
        "a": lambda m, z, batch: mse(m("heads.a", z), batch[1]),
        "b": lambda m, z, batch: F.softplus(m("heads.b", z)).mean(),
    }
    batch = (torch.randn(8, 5), torch.randn(8, 2))
    return Case(
        model,
        batch,
        lambda m, batch: m("trunk", batch[0]),
        tasks,
        places("trunk.0.weight"),
        frozenset({"heads"}),
        "last",
        torch.tanh,
    )


def unused() -> Case:
    """Parameters that nobody reads, in trunk and head, and a task that reads neither z nor the trunk."""
    case = mlp(d=nn.Linear(4, 3))
    case.model["spare"] = nn.Linear(2, 2)
    tasks = case.tasks | {"d": lambda m, z, batch: m.weight("heads.d.bias").square().sum()}
    where = case.where | {"spare": ["spare", "last.weight"]}
    return Case(case.model, case.batch, case.backbone, tasks, where, frozenset(where), "last", torch.tanh)


def cnn() -> Case:
    """Batch norm in train mode, in the trunk and in one head: the new buffers come back as aux."""
    trunk = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(3, 2, 2), nn.Flatten()
    )
    heads = {"a": nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 3)), "b": nn.Linear(4, 1)}
    model = nn.ModuleDict({"trunk": trunk, "last": nn.Linear(8, 4), "heads": nn.ModuleDict(heads)})
    tasks = {
        "c": lambda m, z, batch: mse(z, batch["x"].mean((1, 2, 3))[:, None]),
        "a": lambda m, z, batch: F.cross_entropy(m("heads.a", z), batch["label"]),
        "b": lambda m, z, batch: mse(m("heads.b", z).squeeze(-1), batch["x"].std((1, 2, 3))),
    }
    batch = {"x": torch.randn(6, 1, 8, 8), "label": torch.tensor([0, 1, 2, 2, 1, 0])}
    return Case(
        model,
        batch,
        lambda m, batch: m("trunk", batch["x"]),
        tasks,
        places("trunk.0.weight"),
        frozenset({"heads"}),
        "last",
        None,
        has_aux=True,
    )


def transformer() -> Case:
    """z has three axes, (batch, sequence, width)."""

    def backbone(m: Any, x: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):  # the backward pass of the CPU's fused attention has no batching rule
            return m("block", x)

    block = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
    heads = nn.ModuleDict({"a": nn.Linear(4, 3), "b": nn.Linear(4, 1)})
    model = nn.ModuleDict({"block": block, "last": nn.Linear(4, 4), "heads": heads})
    tasks = {
        "c": lambda m, z, batch: mse(z, batch.flip(1)),
        "a": lambda m, z, batch: F.cross_entropy(m("heads.a", z).mT, batch.sum(-1).gt(0).long()),
        "b": lambda m, z, batch: mse(m("heads.b", z.mean(1)).squeeze(-1), batch.mean((1, 2))),
    }
    return Case(
        model,
        torch.randn(3, 5, 4),
        backbone,
        tasks,
        places("block.self_attn.in_proj_weight"),
        frozenset({"heads"}),
        "last",
        F.gelu,
    )


def embedding(tied: bool = False) -> Case:
    """Integer inputs. If tied, one head reads the embedding again, and another one a weight of the trunk."""
    parts = {"embed": nn.Embedding(7, 4), "trunk": nn.Linear(4, 4), "last": nn.Linear(4, 4)}
    model = nn.ModuleDict(parts | {"heads": nn.ModuleDict({"a": nn.Linear(4, 7), "b": nn.Linear(4, 1)})})

    def logits(m: Any, z: Tensor, tokens: Tensor) -> Tensor:
        out = z @ m.weight("embed.weight").T if tied else m("heads.a", z)
        return F.cross_entropy(out[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()) + m.weight("heads.a.bias").norm()

    def length(m: Any, z: Tensor, tokens: Tensor) -> Tensor:
        z = F.linear(z, m.weight("trunk.weight")) if tied else z
        return mse(m("heads.b", z.mean(1)).squeeze(-1), tokens.double().mean(1))

    tasks = {"c": lambda m, z, tokens: z.square().mean(), "a": logits, "b": length}
    where = places("embed.weight") | {"trunk": ["trunk.weight", "embed"]}
    return Case(
        model,
        torch.randint(0, 7, (4, 6)),
        lambda m, tokens: torch.tanh(m("trunk", m("embed", tokens))),
        tasks,
        where,
        frozenset({"heads"}),
        "last",
        None,
    )


def two_z() -> Case:
    """z is a pytree: a map and a vector for each example."""
    parts = {"fine": nn.Linear(5, 6), "coarse": nn.Linear(6, 3)}
    model = nn.ModuleDict(parts | {"heads": nn.ModuleDict({"a": nn.Linear(3, 2), "b": nn.Linear(6, 1)})})

    def backbone(m: Any, x: Tensor) -> dict[str, Tensor]:
        fine = torch.tanh(m("fine", x))
        return {"fine": fine, "coarse": m("coarse", fine.mean(1))}

    tasks = {
        "c": lambda m, z, x: mse(z["fine"].mean((1, 2)), z["coarse"].sum(-1)),
        "a": lambda m, z, x: m("heads.a", z["coarse"]).square().mean(),
        "b": lambda m, z, x: mse(m("heads.b", z["fine"]), x[..., :1]),
    }
    where = {"z": None, "early": "fine", "mixed": ["coarse.bias", "heads.b"], "all": lambda path: True}
    return Case(model, torch.randn(8, 3, 5), backbone, tasks, where, frozenset())


MAKERS = {
    "mlp": mlp,
    "unused": unused,
    "cnn": cnn,
    "transformer": transformer,
    "embedding": embedding,
    "tied": lambda: embedding(tied=True),
    "two_z": two_z,
}


@lru_cache
def make(name: str) -> Case:
    """A case, in float64; the same one at every call."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            return MAKERS[name]()
        finally:
            torch.set_default_dtype(default)
