"""The benchmarks that train: their solutions solve their equations, their comparisons are fair, every script runs."""

from __future__ import annotations

import importlib
import math
import re
import sys
from pathlib import Path

import pytest
import torch
from torch.func import grad, hessian, vmap


def load(name):
    """A module of `benchmarks/`. Its folder comes off the path again: a script there is called like a package."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
    hidden = sys.modules.pop("models", None)  # the tests have a module of that name too
    try:
        return importlib.import_module(name)
    finally:
        sys.path.pop(0)
        sys.modules.pop("models", None)
        if hidden is not None:
            sys.modules["models"] = hidden


equations, pinn = load("equations"), load("pinn")
F64 = torch.float64


# ------------------------------------------------------------------------------------------------ the equations


def test_burgers_solution_solves_burgers_equation():
    """Start, edge and equation, the last by differentiating the quadrature: they have one solution."""
    x = torch.linspace(-1, 1, 41, dtype=F64)
    u = equations.burgers_solution
    torch.testing.assert_close(u(torch.zeros(()), x), -torch.sin(math.pi * x))
    torch.testing.assert_close(u(x.abs(), torch.ones(())), torch.zeros_like(x), rtol=0, atol=1e-12)
    t, x = torch.rand(200, dtype=F64) + 1e-3, torch.cat([2 * torch.rand(150) - 1, 0.02 * torch.randn(50)]).to(F64)
    u_t, u_x = vmap(grad(u, (0, 1)))(t, x)
    u_xx = vmap(grad(grad(u, 1), 1))(t, x)
    residual = u_t + u(t, x) * u_x - equations.VISCOSITY * u_xx
    assert u_x.abs().max() > 20, "the shock is among the points"
    assert residual.abs().max() < 1e-9 * u_x.abs().max()
    torch.testing.assert_close(u(t, x, nodes=120), u(t, x), rtol=1e-10, atol=1e-10)


def test_helmholtz_solution_solves_helmholtz_equation(monkeypatch):
    """A residual of the exact solution, put in the network's place, is zero."""
    equation = equations.helmholtz()
    a, b = math.pi, 2 * math.pi

    def exact(params, points):
        x, y = points.unbind(-1)
        u = torch.sin(a * x) * torch.sin(b * y)
        first = torch.stack([a * torch.cos(a * x) * torch.sin(b * y), b * torch.sin(a * x) * torch.cos(b * y)])
        return equations.Jet(u, first, torch.stack([-a * a * u, -b * b * u]))

    monkeypatch.setattr(equations, "network", exact)
    monkeypatch.setattr(equations, "field", lambda params, points: exact(params, points).value)
    points = {name: x.to(F64) for name, x in equation.sample(1, torch.Generator().manual_seed(0)).items()}
    for name, residual in equation.residuals.items():
        assert residual({}, points[name]).abs().max() < 1e-6, name  # the sampled edge is float32
    assert equation.error({}) < 1e-6


def test_the_network_knows_its_derivatives():
    params = {name: leaf.to(F64) for name, leaf in equations.init_params(0).items()}
    params = {name: leaf + 0.1 * torch.randn_like(leaf) for name, leaf in params.items()}
    points = torch.randn(5, 3, 2, dtype=F64)
    jet = equations.network(params, points)
    value = lambda point: equations.field(params, point)

    torch.testing.assert_close(jet.value, equations.field(params, points))
    each = lambda fn: vmap(vmap(fn))(points)
    assert jet.second.abs().min() > 0
    torch.testing.assert_close(jet.first, each(grad(value)).movedim(-1, 0))
    torch.testing.assert_close(jet.second, each(hessian(value)).diagonal(dim1=-2, dim2=-1).movedim(-1, 0))


@pytest.mark.parametrize("name", equations.EQUATIONS)
def test_points_lie_where_they_belong(name):
    equation = equations.EQUATIONS[name]()
    points = equation.sample(3, torch.Generator().manual_seed(0))
    assert sorted(points) == sorted(equation.residuals)
    low = 0 if name == "burgers" else -1
    for x in points.values():
        assert x.shape[0] == 3
        assert (x[..., 0] >= low).all()
        assert (x.abs() <= 1).all()
    edge = points["boundary"].abs()
    assert ((edge == 1).any(-1) if name == "helmholtz" else edge[..., 1] == 1).all()
    if name == "burgers":
        assert not points["initial"][..., 0].any()


# ------------------------------------------------------------------------------------------------ the PINNs


def test_every_method_gets_the_same_start_and_points():
    """The first step has all weights at 1, so after it every method is at the same place."""
    equation = equations.burgers()
    trainer = pinn.Trainer(equation, steps=1, eager=True)
    start = [equation.error(equations.init_params(seed)) for seed in (3, 4)]
    methods = [method for method in pinn.methods(equation) if method.name != pinn.STATIC]
    assert len(methods) == 5
    runs = [trainer.train(method, torch.ones(2), [3, 4]) for method in methods]
    for run in runs:
        torch.testing.assert_close(run.errors, runs[0].errors)
        assert all((run.errors[i] - start[i]).abs() > 1e-3 for i in (0, 1)), "a step was made"
    alone = trainer.train(methods[0], torch.ones(1), [4])
    torch.testing.assert_close(alone.errors[0], runs[0].errors[1], rtol=1e-4, atol=1e-5)
    assert (runs[0].errors[0] - runs[0].errors[1]).abs() > 1e-3


def test_pinn_prints_its_table(capsys):
    pinn.main(["--equation", "helmholtz", "--seeds", "2", "--steps", "1", "--eager"])
    out, err = capsys.readouterr()
    rows = {line.split("|")[1].strip(): line for line in out.splitlines() if line.startswith("|")}
    for name in (pinn.EQUAL, pinn.STATIC, pinn.GRADNORM, pinn.SCALED, pinn.AVERAGE, pinn.NORMS, pinn.KERNELS):
        assert re.search(r"\d\.\d\d ± \d+\.\d\d", rows[name])
    assert out.count("best of 3") == 3
    assert "Helmholtz: the smallest mean error is that of" in out
    assert err.count("\n") == 10


def test_the_table_follows_the_numbers():
    found = [
        pinn.Result(name, "", 0, torch.tensor(errors))
        for name, errors in ((pinn.EQUAL, [0.1, 0.4]), (pinn.SCALED, [0.2, 0.2]))
    ]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in pinn.table("X", found).splitlines()]
    assert rows[0][0] == "X"
    assert rows[2] == [pinn.EQUAL, "25.00 ± 21.21", "1.00", "10.0, 40.0"]
    assert rows[3] == [pinn.SCALED, "20.00 ± 0.00", "1.00", "20.0, 20.0"]
    assert "the smallest mean error is that of GradNorm, L(0) given" in pinn.verdict("X", found)
    assert "nearer than equal weights on 1." in pinn.verdict("X", found)


# ------------------------------------------------------------------------------------------------ the digits


def test_gradinit_training_prints_its_table(capsys):
    pytest.importorskip("sklearn")
    load("gradinit_training").main(["--nets", "residual", "--seeds", "2", "--steps", "5", "--init-steps", "2"])
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| residual")]
    assert [row.split(" | ")[1:3] for row in rows] == [
        [optimizer, init] for optimizer in ("SGD", "Adam") for init in ("default", "GradInit")
    ]


def test_rotograd_digits_prints_its_table(capsys):
    pytest.importorskip("sklearn")
    load("rotograd_digits").main(["--seeds", "2", "--steps", "3"])
    out = capsys.readouterr().out
    assert len(re.findall(r"\d ± \d", next(line for line in out.splitlines() if line.startswith("left digit")))) == 4
    assert out.count("mean cosine") == 2


def test_methods_prints_its_tables(capsys):
    load("methods").main(["--quick", "--no-compile", "--seconds", "0", "--methods", "aligned", "upgrad"])
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("| aligned", "| upgrad"))]
    assert len(rows) == 4
    assert all(re.search(r"\d\.\d\d", row) for row in rows)


@pytest.mark.parametrize("name", ["pinn", "gradinit_training", "rotograd_digits"])
def test_a_wrong_number_is_refused(name, capsys):
    with pytest.raises(SystemExit):
        load(name).main(["--seeds", "0"])
    assert re.search("--seeds.* must be at least 1", capsys.readouterr().err)
