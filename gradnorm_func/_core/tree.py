"""Pytrees: flattening, dotted paths, selection of W, norms. The one module that owns leaf order."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias, TypeVar

import optree
import torch
from torch import Tensor

PyTree: TypeAlias = Any
# What holds parameters: a tensor, or nested dicts, lists, tuples and NamedTuples of tensors; but no module.
Params = TypeVar("Params", bound=Tensor | Mapping[Any, Any] | Sequence[Any])
Where: TypeAlias = str | Sequence[str] | Callable[[str], bool] | None
# The same as an argument type, down to its leaves; a state is one, too.
Tensors: TypeAlias = Tensor | Mapping[Any, "Tensors"] | Sequence["Tensors"]


def flatten(tree: PyTree) -> tuple[list[Any], Any]:
    """Leaves and structure in optree's order: keys of a dict sorted, fields of a tuple as they stand."""
    if torch.compiler.is_compiling():
        boxes, treedef = optree.tree_flatten(optree.tree_map(_Box, tree))
        return [box.leaf for box in boxes], treedef
    leaves, treedef = optree.tree_flatten(tree)
    return leaves, treedef


class _Box:
    """Around each leaf under torch.compile: a dict of nothing but constants (heads, a mask), flattened by optree 0.20,
    is folded by Dynamo to a constant that it then cannot represent."""

    def __init__(self, leaf: Any) -> None:
        self.leaf = leaf


def by_key(tree: PyTree) -> PyTree:
    """What has an entry for each task, plain dicts in place of all mappings, so that keys are sorted: optree leaves an
    OrderedDict in its own order, which parameters are to keep, and takes other mappings for leaves."""
    if isinstance(tree, (Mapping, torch.nn.ModuleDict)):
        return {key: by_key(entry) for key, entry in tree.items()}
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*map(by_key, tree))
    return type(tree)(map(by_key, tree)) if type(tree) in (list, tuple) else tree


def nones(tree: PyTree, *above: str) -> list[str]:
    """Dotted paths of what is None, which has no leaf."""
    entries = tree.items() if isinstance(tree, Mapping) else enumerate(tree) if isinstance(tree, (list, tuple)) else ()
    return [
        path
        for key, entry in entries
        for path in ([".".join([*above, str(key)])] if entry is None else nones(entry, *above, str(key)))
    ]


def unflatten(treedef: Any, leaves: Iterable[Any]) -> PyTree:
    """The inverse of `flatten`."""
    return optree.tree_unflatten(treedef, leaves)


def tree_map(fn: Callable[..., Any], tree: PyTree, *rest: PyTree) -> PyTree:
    """`fn` applied leaf by leaf."""
    return optree.tree_map(fn, tree, *rest)


def paths(tree: PyTree) -> list[str]:
    """Dotted path of every leaf: `{"trunk": {"0": w}}` and `{"trunk.0": w}` both read `trunk.0`."""
    dotted = []
    if torch.compiler.is_compiling():
        tree = optree.tree_map(_Box, tree)
    for path in optree.tree_paths(tree):
        node, parts = tree, []
        for entry in path:
            fields = getattr(node, "_fields", None)
            parts.append(fields[entry] if fields is not None and isinstance(entry, int) else str(entry))
            node = node[entry] if isinstance(node, (dict, list, tuple)) else None
        dotted.append(".".join(parts))
    return dotted


def select(tree: PyTree, where: Where) -> list[int]:
    """Indices of the leaves that `where` names; None names them all."""
    names = paths(tree)
    if where is None:
        return list(range(len(names)))
    _check_where(where, names, tree)
    if callable(where):
        selected = [i for i, name in enumerate(names) if _named_by(where, name)]
        if not selected:
            raise ValueError(f"where={where!r} selects no parameter; the paths are {_shorten(names)}")
        return selected
    prefixes = [where] if isinstance(where, str) else list(where)
    if not prefixes:
        raise ValueError(
            f"where=[] selects no parameter; give a path such as {names[0]!r}, or None for the default"
            if names
            else "where=[]: params has no leaves"
        )
    for prefix in prefixes:
        if not any(_below(name, prefix) for name in names):
            parents = {".".join(name.split(".")[:k]) for name in names for k in range(1, name.count(".") + 2)}
            near = difflib.get_close_matches(prefix, sorted(parents), n=3, cutoff=0.4) or names
            raise ValueError(f"where={prefix!r} matches no parameter; did you mean one of {_shorten(near)}?")
    return [i for i, name in enumerate(names) if any(_below(name, prefix) for prefix in prefixes)]


def _named_by(where: Callable[[str], Any], name: str) -> bool:
    """What a predicate says of a path."""
    try:
        found = where(name)
    except Exception as error:
        kind = type(error).__name__
        raise ValueError(f"where= raised {kind} ({error}) for the path {name!r}: {_PREDICATE.format(name)}") from error
    if isinstance(found, (str, Tensor, Mapping)):
        raise ValueError(f"where= returned {type(found).__name__} for the path {name!r}: {_PREDICATE.format(name)}")
    return bool(found)


_PREDICATE = (
    "it may be a path, where={0!r}, a list of paths, or a function from a path to True or False, "
    'where=lambda path: path.startswith("trunk")'
)


def lookup(tree: PyTree, path: str) -> Any:
    """The one leaf at a dotted path."""
    if isinstance(tree, dict) and path in tree:
        return tree[path]
    names = paths(tree)
    if path not in names:
        near = difflib.get_close_matches(path, names, n=3, cutoff=0.4) or names
        raise ValueError(f"no parameter at {path!r}; did you mean one of {_shorten(near)}?")
    return flatten(tree)[0][names.index(path)]


def subtree(tree: PyTree, prefix: str) -> PyTree:
    """What lies below a prefix: a nested subtree, or the flat entries with the prefix taken off."""
    if isinstance(tree, dict):
        if prefix in tree:
            return tree[prefix]
        below = {key[len(prefix) + 1 :]: leaf for key, leaf in tree.items() if str(key).startswith(prefix + ".")}
        if below:
            return below
    node = tree
    for part in prefix.split("."):
        if isinstance(node, dict) and part in node:
            node = node[part]
        elif isinstance(node, tuple) and part in getattr(node, "_fields", ()):
            node = getattr(node, part)
        elif isinstance(node, (list, tuple)) and part.isdigit() and int(part) < len(node):
            node = node[int(part)]
        else:
            raise ValueError(f"nothing in params below {prefix!r}; the paths are {_shorten(paths(tree))}")
    return node


def replace(leaves: list[Any], indices: Sequence[int], values: Sequence[Any]) -> list[Any]:
    """A copy of `leaves` with new values at some indices."""
    out = list(leaves)
    for index, value in zip(indices, values, strict=True):
        out[index] = value
    return out


def check_params(params: PyTree) -> None:
    """Every leaf must be a floating-point tensor, for only those have gradients."""
    check_leaves(flatten(params)[0], params)


def check_leaves(leaves: list[Any], params: PyTree) -> None:
    """`check_params` of params that have been flattened."""
    if isinstance(params, (torch.nn.Module, Iterator)):
        raise ValueError(
            f"params is a {type(params).__name__}; it takes parameters by name: dict(model.named_parameters())"
        )
    for index, leaf in enumerate(leaves):
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            kind = leaf.dtype if isinstance(leaf, Tensor) else type(leaf).__name__
            raise ValueError(
                f"params leaf {paths(params)[index]!r} is {kind}; only floating-point tensors have gradients: "
                "pass it in batch, or close over it in loss_fn"
            )
    if not leaves:
        raise ValueError("params has no leaves: there is nothing to differentiate")


def _check_where(where: Any, names: list[str], tree: PyTree) -> None:
    """W has a name here: the tensors themselves are others in every step."""
    for entry in where if isinstance(where, (list, tuple)) else [where]:
        if isinstance(entry, (Tensor, torch.nn.Module)):
            name_of = {id(leaf): name for name, leaf in zip(names, flatten(tree)[0], strict=True)}
            own = [entry] if isinstance(entry, Tensor) else entry.parameters()
            same = [name_of[id(x)] for x in own if id(x) in name_of]
            raise ValueError(
                f"where={type(entry).__name__} is no path: W is named by its dotted path in params, "
                f"where={(same or names)[0]!r}" + ("" if same else f"; the paths are {_shorten(names)}")
            )


def _below(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def _shorten(names: Sequence[str], most: int = 8) -> str:
    shown = ", ".join(repr(name) for name in names[:most])
    return shown + (f", ... ({len(names)} in all)" if len(names) > most else "")
