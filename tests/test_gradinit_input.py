"""What GradInit refuses, and in which words."""

import math

import pytest
import torch
from gradinit_cases import small, small_loss

import gradnorm_func as gn
from gradnorm_func._gradinit.reinit import reinit_zeros


@pytest.mark.parametrize(
    ("hyper", "message"),
    [
        ({"gamma": 0.0}, r"gamma=0.0 must be positive"),
        ({"gamma": -1.0}, r"gamma=-1.0 must be positive"),
        ({"gamma": math.nan}, r"gamma=nan must be positive"),
        ({"p": 3}, r"p=3 must be 2, if training will use SGD, or 1"),
        ({"eta": 0.0}, r"eta=0.0 must be positive"),
        ({"form": "papr"}, r"form='papr' must be 'paper' or 'simple'"),
        ({"where": "a.weigth"}, r"where='a.weigth' matches no parameter; did you mean one of 'a.weight'"),
        ({"frozen": "c"}, r"'c' matches no parameter"),
        ({"biases": "c"}, r"'c' matches no parameter"),
        ({"where": "a", "frozen": "a"}, r"leave nothing to scale"),
        ({"min_scale": -0.1}, r"min_scale=-0.1 must lie in \[0, 1\]"),
        ({"min_bias_scale": 2.0}, r"min_bias_scale=2.0 must lie in"),
        ({"max_scale": 0.5}, r"max_scale=0.5 must be at least 1"),
        ({"loss_scale": 0.0}, r"loss_scale=0.0 must be positive"),
        ({"weights": [1.0]}, r"weights is for T losses"),
        ({"optimizer": gn.sgd(0.1)}, r"the state holds RescaleAdamState, but this optimizer keeps SGDState"),
    ],
)
def test_bad_hyperparameters(hyper, message):
    params, batch = small()
    state = gn.gradinit_init_state(params)
    saved = gn.state_dict(state)
    with pytest.raises(ValueError, match=message):
        gn.gradinit_step(state, params, small_loss, batch, **hyper)
    assert all(torch.equal(leaf, saved[path]) for path, leaf in gn.state_dict(state).items())


def test_bad_params_states_and_losses():
    params, batch = small()
    state = gn.gradinit_init_state(params)
    with pytest.raises(ValueError, match=r"'n' is torch.int64; only floating-point"):
        gn.gradinit_init_state({"n": torch.arange(3)})
    with pytest.raises(ValueError, match="params has no leaves"):
        gn.gradinit_init_state({})
    with pytest.raises(ValueError, match=r"state has 3 scales, but params has 1 leaves"):
        gn.gradinit_step(state, params["b"], small_loss, batch)
    with pytest.raises(ValueError, match=r"state has 3 scales"):
        gn.gradinit_apply(state, params["b"])
    with pytest.raises(ValueError, match=r"not a GradInitState"):
        gn.gradinit_step(gn.init_state(2), params, small_loss, batch)
    with pytest.raises(ValueError, match=r"shape \(7, 3\): reduce it"):
        gn.gradinit_step(state, params, lambda q, b: b[0] @ q["a"]["weight"].T, batch)
    with pytest.raises(ValueError, match="weights has 3 entries, but loss_fn returned 2 losses"):
        gn.gradinit_step(
            state, params, lambda q, b: torch.stack([small_loss(q, b)] * 2), batch, weights=[1.0, 2.0, 3.0]
        )


def test_bad_procedures():
    params, batch = small()
    with pytest.raises(ValueError, match="steps=0 must be an integer, at least 1"):
        gn.gradinit(params, small_loss, [batch], steps=0)
    with pytest.raises(ValueError, match="batches ran out after 4: give a list or a DataLoader"):
        gn.gradinit(params, small_loss, iter([batch] * 4), steps=2, progress=False)
    with pytest.raises(ValueError, match="batches ran out after 0"):
        gn.gradinit(params, small_loss, [], steps=2, progress=False)
    with pytest.raises(ValueError, match="joins minibatches along axis 0"):
        gn.gradinit(params, lambda q, _: small_loss(q, batch), [1.0], steps=1, progress=False)
    with pytest.raises(ValueError, match=r"std=0.0 must be positive"):
        reinit_zeros(params, 0.0)
    for keywords in ({"learning_rate": 0.0}, {"b1": 1.0}, {"eps": 0.0}, {"clip": 0.0}):
        with pytest.raises(ValueError, match=f"{next(iter(keywords))}="):
            gn.rescale_adam(**keywords)
