"""A compiled step takes any number of batch sizes: the size is no part of the program."""

import pytest
import torch
from test_balancers import unique_graphs
from toys import BALANCERS, make_batch, make_problem

import gradnorm_func as gn

SIZES = (5, 8, 3, 12, 7, 16, 9, 4, 31)  # nine: torch stops recompiling at the eighth
# One of each kind of what is measured and of what the heads learn from; no rule sees the batch itself.
KINDS = ["gradnorm", "fixed-ratio", "ntk", "uncertainty", "famo", "cagrad", "nash", "user"]
METHODS = {name: BALANCERS[name] for name in KINDS} | {
    "rotograd": lambda where, **more: gn.rotograd(6, **more),
    "rotograd-package": lambda where, **more: gn.rotograd(6, form="0.1.6", map="exp", moving=False, normalize=True),
}


def graphs_over(sizes, balancer, loss_fn, marked=False):
    params, state = make_problem(dtype=torch.float32).params, balancer.init(3)
    before = unique_graphs()

    @torch.compile(fullgraph=True, backend="eager")
    def step(state, params, batch):
        return balancer.grad(state, params, loss_fn, batch)

    for t, size in enumerate(sizes):
        batch = make_batch(t, dtype=torch.float32, size=size)
        if marked:
            for leaf in batch:
                torch._dynamo.mark_dynamic(leaf, 0)
        expected = balancer.grad(state, params, loss_fn, batch)
        found = step(state, params, batch)
        assert expected[0]["trunk.0"].norm() > 0
        torch.testing.assert_close(found[:2], expected[:2], rtol=1e-3, atol=1e-4, equal_nan=True)
        state = expected[1]
    return unique_graphs() - before


@pytest.mark.parametrize("name", ["gradnorm", "fixed-ratio"])
def test_nine_sizes(name):
    """A set of shapes was hashed in the norms at z, so that each size was another graph, and the ninth raised."""
    assert graphs_over(SIZES, METHODS[name](None), make_problem().seam) == 2


@pytest.mark.parametrize("name", METHODS)
def test_sizes_that_are_marked(name):
    """One graph: `mark_dynamic` fails where a size is made a constant."""
    assert graphs_over(SIZES[:3], METHODS[name](None), make_problem().seam, marked=True) == 1


@pytest.mark.parametrize("form", ["seam", "general", "separable"])
def test_sizes_at_other_places(form):
    where = "trunk.1.weight" if form == "seam" else None
    # At a `shared_linear` one graph for the Gram identity, which small batches take, and one for the direct way.
    most = 2 if form == "seam" else 1
    assert graphs_over(SIZES[:3], gn.gradnorm(where=where), getattr(make_problem(), form), marked=True) <= most
