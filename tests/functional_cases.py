"""What the tests of `functional` share: other parameters than the module's own, and that nothing of it has changed."""

import copy

import torch
from toys import same_bits


def other_params(module, prefix=""):
    """Tensors of other values than the module's own."""
    return {prefix + name: torch.randn_like(leaf) for name, leaf in module.named_parameters()}


def with_params(module, params):
    """A module that has these parameters itself: the reference."""
    twin = copy.deepcopy(module)
    twin.load_state_dict(params, strict=False)
    return twin


def tensors_of(module):
    """Every tensor, and which object it is."""
    return [
        (name, id(leaf), leaf.detach().clone()) for name, leaf in [*module.named_parameters(), *module.named_buffers()]
    ]


def assert_unchanged(module, before):
    after = tensors_of(module)
    assert [row[:2] for row in before] == [row[:2] for row in after]
    assert same_bits([row[2] for row in before], [row[2] for row in after])
    assert all(leaf.grad is None for leaf in module.parameters())
