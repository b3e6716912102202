"""What type checkers say about a user's script: the types are part of the contract."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

PREAMBLE = """
from collections.abc import Mapping
from typing import Any, assert_type

import torch
from torch import Tensor, nn

import gradnorm_func as gn

model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
params = {name: leaf.detach() for name, leaf in model.named_parameters()}
x = torch.ones(4, 3)


def loss_fn(params: Mapping[str, Tensor], batch: Tensor) -> dict[str, Tensor]:
    z = gn.functional(model)(params, batch)
    return {"a": z.sum(), "b": z.square().sum()}


def make_params(seed: int) -> dict[str, Tensor]:
    return params


state = gn.init_state(2)
balancer = gn.fixed_ratio()
grads, weights, info = gn.gradnorm_grad(state, params, loss_fn, x)
"""

# A line of the script, and what is wrong with it: words of mypy's message, where pyright too must say something.
# None is a line that both must take.
ROWS = [
    # a step
    ("assert_type(info, gn.GradNormInfo)", None),
    ("assert_type(info.inverse_rates, Tensor)", None),
    ("assert_type(grads, dict[str, Tensor])", None),
    ("info.weightz", 'no attribute "weightz"'),
    ("gn.gradnorm_grad(state, params, loss_fn)", "No overload variant"),
    ("gn.gradnorm_grad(state, params, loss_fn, x, alfa=1.0)", "No overload variant"),
    ("gn.gradnorm_grad(state, model, loss_fn, x)", "No overload variant"),
    ("assert_type(gn.gradnorm_update(state, params, loss_fn, x), gn.GradNormState)", None),
    # balancers
    ("balancer.grad(balancer.init(2), params, loss_fn, x)[2].finite", None),
    ("balancer.grad(balancer.init(2), params, loss_fn, x)[2].finites", 'no attribute "finites"'),
    ("balancer.grad(balancer.init(2), params, loss_fn)", "No overload variant"),
    ("balancer.grad(balancer.init(2), params, loss_fn, x, masks=None)", "No overload variant"),
    ("gn.gradnorm(alfa=1.0)", 'Unexpected keyword argument "alfa"'),
    # functional
    ("gn.functional(model)(params, x, flag=True)", None),
    ("assert_type(gn.functional(model, buffers=True)(params, x), tuple[Any, dict[str, Tensor]])", None),
    ('gn.functional(model[0], "0")(dict(model.named_parameters()), x)', None),
    ("gn.functional(model)(model, x)", 'incompatible type "Sequential"'),
    ("gn.functional(model)()", "Too few arguments"),
    ('gn.functional("trunk")', "No overload variant"),
    ("gn.functional(model, buffer=True)", "No overload variant"),
    # write_grads
    ("gn.write_grads(model, params)", None),
    ("gn.write_grads(model.parameters(), list(params.values()))", None),
    ('gn.write_grads({"trunk": [x, x], "head": {"w": x}}, {"trunk": [x, x], "head": {"w": x}})', None),
    ("gn.write_grads(model, model)", 'incompatible type "Sequential"'),
    ('gn.write_grads(model, {"weight": 1.0})', '"str": "float"'),
    # checkpoints and loggers
    ("assert_type(gn.load_state(state, gn.state_dict(state)), gn.GradNormState)", None),
    ("gn.load_state(state, gn.state_dict(state)).weights", None),
    ("gn.load_state(state, gn.state_dict(state)).weightz", 'no attribute "weightz"'),
    ("gn.load_state(gn.state_dict(state))", 'Missing positional argument "saved"'),
    ("gn.state_dict(model)", 'incompatible type "Sequential"'),
    ('assert_type(gn.state_dict(state)["weights"], Tensor)', None),
    # train
    ("assert_type(gn.train(params, loss_fn, [x])[0], dict[str, Tensor])", None),
    ("assert_type(gn.train(params, loss_fn, [x])[2], gn.GradNormInfo)", None),
    ("gn.train(params, loss_fn, [x], balancer=balancer)[2].finite", None),
    ("gn.train(params, loss_fn, [x], balancer=balancer)[2].inverse_rates", 'no attribute "inverse_rates"'),
    ("gn.train(params, loss_fn, [x], mask=lambda batch: batch.shape[0] > 1)", None),
    ("gn.train(params, loss_fn, [x], mask=lambda batch: batch.shapes)", 'no attribute "shapes"'),
    ("gn.train(model, loss_fn, [x])", "No overload variant"),
    ("gn.train(params, loss_fn)", "No overload variant"),
    ("gn.train(params, loss_fn, [x], step=1)", 'Unexpected keyword argument "step"'),
    ("gn.train(params, loss_fn, [x], optimizer=gn.adam(0.1))", "No overload variant"),
    # sweep
    ("assert_type(gn.sweep(params, loss_fn, [x]).params, dict[str, Tensor])", None),
    ("assert_type(gn.sweep(make_params, loss_fn, [x], seeds=range(3)).run(0)[0], dict[str, Tensor])", None),
    ('gn.sweep(make_params, loss_fn, [x], metric=lambda params: params["a"].sum()).best', None),
    ('gn.sweep(params, loss_fn, [x], grid={"rate": [0.1, 1]}, optimizer=lambda rate: gn.sgd(rate))', None),
    ('gn.sweep(params, loss_fn, [x], grid={"rate": 0.1})', '"str": "float"'),
    ("assert_type(gn.sweep(params, loss_fn, [x]).history.inverse_rates, Tensor)", None),
    ("gn.sweep(params, loss_fn, [x], balancer=lambda b: gn.fixed_ratio(budget=b)).history.finite", None),
    (
        "gn.sweep(params, loss_fn, [x], balancer=lambda b: gn.fixed_ratio(budget=b)).history.inverse_rates",
        'no attribute "inverse_rates"',
    ),
    ("gn.sweep(params, loss_fn, [x]).history_", 'no attribute "history_"'),
    ("gn.sweep(params, loss_fn, [x], chunks=2)", 'Unexpected keyword argument "chunks"'),
    # analysis
    ("assert_type(gn.task_gramian(loss_fn, params, x), Tensor)", None),
    ("assert_type(gn.task_grads(loss_fn, params, x, has_aux=True), tuple[Any, Any, Any])", None),
    ("losses, grads = gn.task_grads(loss_fn, params, x)", None),
    ("losses, grads, aux = gn.task_grads(loss_fn, params, x)", "Need more than 2 values to unpack"),
    ("gn.task_grad_norms(loss_fn, model, x)", 'incompatible type "Sequential"'),
    ("gn.task_grad_norms(loss_fn, params)", 'Missing positional argument "batch"'),
    ('assert_type(gn.layer_analysis(loss_fn, params, x).norms["0"], Tensor)', None),
    ("gn.layer_analysis(loss_fn, params, x).angles", 'no attribute "angles"'),
]


def script(folder):
    """The script, and the number of its line of each row."""
    path, first = folder / "script.py", PREAMBLE.count("\n")
    # Each row in a function of its own, so that no name of one is seen by another.
    lines = [f"def row_{i}() -> None: {line}" for i, (line, _) in enumerate(ROWS)]
    path.write_text(PREAMBLE + "\n".join(lines) + "\n")
    return path, [first + i + 1 for i in range(len(ROWS))]


def errors_by_line(pairs):
    errors = {}
    for line, message in pairs:
        errors.setdefault(line, []).append(message)
    return errors


def by_mypy(path):
    # Not that of the package, which has options of its own, and one for each worker: two at once break it.
    cache = ROOT / ".mypy_cache" / f"script-{os.environ.get('PYTEST_XDIST_WORKER', 'alone')}"
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file=", f"--cache-dir={cache}", path]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode in (0, 1), run.stderr
    return errors_by_line((int(n), text) for n, text in re.findall(r"script\.py:(\d+): error: (.*)", run.stdout))


def by_pyright(path):
    (path.parent / "pyrightconfig.json").write_text(json.dumps({"extraPaths": [str(ROOT)]}))
    command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable, "-p", path.parent]
    run = subprocess.run(command, cwd=path.parent, capture_output=True, text=True, check=False)
    if run.returncode not in (0, 1):
        pytest.skip(f"pyright does not run here: {run.stderr[-200:]}")
    found = json.loads(run.stdout)["generalDiagnostics"]
    return errors_by_line(
        (entry["range"]["start"]["line"] + 1, entry["message"]) for entry in found if entry["severity"] == "error"
    )


@pytest.fixture(scope="module", params=["mypy", "pyright"])
def checked(request, tmp_path_factory):
    """(name of the checker, for each row the errors that it reports); it reports none outside of the rows."""
    if importlib.util.find_spec(request.param) is None:
        pytest.skip(f"{request.param} is not installed")
    path, numbers = script(tmp_path_factory.mktemp(request.param))
    errors = {"mypy": by_mypy, "pyright": by_pyright}[request.param](path)
    rows = [errors.pop(number, []) for number in numbers]
    assert not errors, "the preamble has errors"
    return request.param, rows


@pytest.mark.parametrize("row", range(len(ROWS)), ids=[line for line, _ in ROWS])
def test_row(checked, row):
    checker, errors = checked[0], checked[1][row]
    words = ROWS[row][1]
    if words is None:
        assert errors == []
    else:
        assert errors, "nothing was said"
        assert checker != "mypy" or any(words in error for error in errors), errors
