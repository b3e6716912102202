"""What RotoGrad refuses, and with which words."""

from __future__ import annotations

import pytest
import torch
from rotograd_cases import F64, D, T, problem

import gradnorm_func as gn


@pytest.mark.parametrize(
    ("hyper", "message"),
    [
        ({"rotation_shape": 0}, "positive integers"),
        ({"rotation_shape": 1}, "at least|two features"),
        ({"scale": "both"}, r"scale='both' must be one of none, rotograd, gradnorm"),
        ({"form": "0.2"}, "must be one of paper"),
        ({"map": "qr"}, "must be one of exp, cayley"),
        ({"form": "0.1.2"}, "no scale part"),
        ({"alpha": 1.0}, "leave it out"),
        ({"alpha": -1.0, "scale": "gradnorm"}, "at least 0"),
        ({"burn_in": -1}, "cannot be negative"),
        ({"cooperative": -1}, "cannot be negative"),
    ],
)
def test_bad_hyperparameters(hyper, message):
    with pytest.raises(ValueError, match=message):
        gn.rotograd(hyper.pop("rotation_shape", D), **hyper)


def test_bad_states_and_losses():
    params, loss_fn, batch = problem()
    method = gn.rotograd(D)
    state = method.init(T, dtype=F64)
    with pytest.raises(ValueError, match="at least 2"):
        method.init(1)
    with pytest.raises(ValueError, match="need"):
        method.init(T, rotations=torch.eye(D))
    with pytest.raises(ValueError, match="orthogonal"):
        method.init(T, rotations=torch.ones(T, D, D))
    with pytest.raises(ValueError, match="initial_losses has 2"):
        method.init(T, initial_losses=[1.0, 2.0])
    with pytest.raises(ValueError, match="multi_task_loss"):
        method.grad(state, params, lambda p, b: torch.ones(3), batch)
    with pytest.raises(ValueError, match="without a backbone"):
        method.grad(state, params, gn.multi_task_loss(None, [lambda p, b: 0.0] * 3), batch)
    with pytest.raises(ValueError, match="3 heads, but the state was made for 2"):
        method.grad(method.init(2, dtype=F64), params, loss_fn, batch)
    seven = gn.rotograd(7)
    with pytest.raises(ValueError, match=r"rotation_shape=\(7,\).*do not fit z of shape \(8, 6\)"):
        seven.grad(seven.init(T, dtype=F64), params, loss_fn, batch)
    with pytest.raises(ValueError, match="do not fit z"):
        gn.rotograd(D, trailing_shape=3).grad(state, params, loss_fn, batch)
    with pytest.raises(ValueError, match="init of the same"):
        gn.rotograd(4).grad(state, params, loss_fn, batch)
    with pytest.raises(ValueError, match="not a RotoGradState"):
        method.grad(gn.init_state(3), params, loss_fn, batch)
    with pytest.raises(ValueError, match="another moving="):
        gn.rotograd(D, moving=False).grad(state, params, loss_fn, batch)
    with pytest.raises(ValueError, match="another moving="):
        gn.rotograd(D, optimizer=gn.sgd(0.1)).grad(state, params, loss_fn, batch)
    with pytest.raises(ValueError, match="none of the tasks"):
        gn.rotograd_task_fn(loss_fn)(params, state, "depth")
    with pytest.raises(ValueError, match="2 paths, but there are 3"):
        gn.fold_rotations(params, state, ["trunk", "trunk"])
    with pytest.raises(ValueError, match="features of z"):
        gn.fold_rotations(params, state, ["heads.t0", "heads.t1", "heads.t2"])
