"""functional: a module as a pure function of its parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Concatenate, Literal, TypeAlias, overload

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils.parametrizations import _SpectralNorm

from gradnorm_func._tools.substitute import Places, unset_buffers

Params: TypeAlias = Mapping[str, Tensor]
# The layers of torch that renew their buffers in train mode.
_RENEWING = (_NormBase, _SpectralNorm)


@overload
def functional(
    module: nn.Module, prefix: str = "", *, buffers: Literal[False] | None = None
) -> Callable[Concatenate[Params, ...], Any]: ...


@overload
def functional(
    module: nn.Module, prefix: str = "", *, buffers: Literal[True]
) -> Callable[Concatenate[Params, ...], tuple[Any, dict[str, Tensor]]]: ...


def functional(module: nn.Module, prefix: str = "", *, buffers: bool | None = None) -> Callable[..., Any]:
    r"""A module as a pure function of params, the flat dict of `named_parameters()`.

    Args:
        module: any module: the whole model, or a part of it. It is the same after a call as before it.
        prefix: the path of `module` inside the model whose parameters `params` holds: `functional(model.trunk,
            "trunk")` reads the entries "trunk....". "" is the whole model.
        buffers: what becomes of new buffers, such as the running statistics that batch norm in train mode computes:
            True returns (output, new buffers), a dict with prefixed names, which the loss gives out as aux and
            `gn.write_buffers` writes into the model after the step; False drops them. By default there must be none.
            `params` may hold buffers' values under their names, those of the module are used otherwise.

    Returns:
        A function `(params, *args, **kwargs) -> output`. Threads that call one module take turns, and activation
        checkpointing inside the module recomputes on the same `params`.

    Raises:
        ValueError: if params has no entry for a parameter of the module, or if the module has new buffers and nobody
            has said what becomes of them (under torch.compile only torch's own layers are asked).

    Example:
        >>> import torch, gradnorm_func as gn
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.ReLU(), torch.nn.Linear(2, 1))
        >>> params = dict(model.named_parameters())
        >>> first = gn.functional(model[0], "0")
        >>> first(params, torch.ones(5, 3)).shape
        torch.Size([5, 2])
    """
    places: Places | None = None

    def call(params: Params, *args: Any, **kwargs: Any) -> Any:
        nonlocal places
        if torch.compiler.is_compiling():
            out, new_buffers, changed = _traced(module, prefix, params, args, kwargs)
        else:
            if places is None or not places.fit():
                places = Places(module, prefix)
            values = _look_up(params, places.names, prefix)
            out, new_buffers, changed = places.call(values, params, args, kwargs)
        if changed and buffers is None:
            raise ValueError(
                f"the module is in train mode and has a new value for its buffer {changed[0]!r}, which would be lost: "
                "take it by functional(..., buffers=True), which returns (output, new buffers), give these out as aux, "
                "and call gn.write_buffers(model, aux) after the step; or leave the buffers as they are, by "
                "functional(..., buffers=False), or by eval() of that layer"
            )
        return (out, new_buffers) if buffers else out

    return call


def _traced(
    module: nn.Module, prefix: str, params: Params, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, dict[str, Tensor], list[str]]:
    """The same by torch's own function, which a compiler can read."""
    dot = f"{prefix}." if prefix else ""
    names = [name for name, _ in module.named_parameters()]
    buffers = {name: params.get(dot + name, buffer).clone() for name, buffer in module.named_buffers()}
    unset = {name: params.get(dot + name) for name in unset_buffers(module)}
    values = _look_up(params, [dot + name for name in names], prefix)
    tensors: dict[str, Any] = dict(zip(names, values, strict=True)) | buffers | unset
    out = torch.func.functional_call(module, tensors, args, kwargs)
    # Whether a tensor was written to is no question that a compiler answers.
    renewing = [name for name, part in module.named_modules() if isinstance(part, _RENEWING) and part.training]
    changed = [dot + name for name in buffers if name.rpartition(".")[0] in renewing]
    changed += [dot + name for name, value in unset.items() if tensors[name] is not value]
    return out, {dot + name: tensors[name] for name in (*buffers, *unset) if tensors[name] is not None}, changed


def _look_up(params: Params, names: list[str], prefix: str) -> list[Tensor]:
    try:
        return [params[name] for name in names]
    except (KeyError, TypeError, IndexError) as error:
        if not isinstance(params, Mapping):
            raise ValueError(
                f"params={type(params).__name__}: the function of a module takes the dict of its parameters first, "
                "dict(model.named_parameters()), and then what the module takes"
            ) from None
        if any("_orig_mod." in name for name in params):
            raise ValueError(
                f"params has no {error.args[0]!r}: a part that is compiled on its own cannot stand in a compiled "
                "step, where it has other names; take one torch.compile away"
            ) from None
        raise ValueError(
            f"params has no {error.args[0]!r}: give dict(model.named_parameters()), and as prefix= the path of the "
            f"part in the model (prefix={prefix!r} now). A parameter that is tied to one of another part is there "
            "under the first of its names only: give dict(model.named_parameters(remove_duplicate=False))"
        ) from None
