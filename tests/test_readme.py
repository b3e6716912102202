"""The README's code runs as it stands."""

import re
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import gradnorm_func as gn

README = (Path(__file__).parent.parent / "README.md").read_text()
DIFF = re.findall(r"```diff\n(.*?)```", README, re.DOTALL)[0]
STEP, LOOP = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def newcomer():
    """What a reader has already: a model, data whose second loss is a large one, an optimizer."""
    torch.manual_seed(0)
    parts = {"trunk": torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh()), "kind": torch.nn.Linear(16, 3)}
    model = torch.nn.ModuleDict(parts | {"price": torch.nn.Linear(16, 1)})
    draw = lambda: {"x": torch.randn(32, 8), "kind": torch.randint(3, (32,)), "price": 10 * torch.rand(32)}
    batches = [draw() for _ in range(30)]
    return {
        "torch": torch,
        "F": F,
        "gn": gn,
        "model": model,
        "batches": batches,
        "trunk": model["trunk"],
        "heads": torch.nn.ModuleDict({name: model[name] for name in ("kind", "price")}),
        "criterion": {"kind": F.cross_entropy, "price": lambda out, y: F.mse_loss(out.squeeze(-1), y)},
        "loader": [(batch["x"], batch) for batch in batches],
        "optimizer": torch.optim.Adam(model.parameters(), lr=1e-3),
    }


def version(sign):
    """The diff's old code, or its new code."""
    return "\n".join(line[1:] for line in DIFF.splitlines() if line[:1] in (" ", sign))


def test_the_diff_is_of_a_plain_loop_and_balances():
    before, after = newcomer(), newcomer()
    start = [p.detach().clone() for p in before["model"].parameters()]
    exec(version("-"), before)
    exec(version("+"), after)
    for names in (before, after):
        assert any(not torch.equal(a, b) for a, b in zip(start, names["model"].parameters(), strict=True))
    kind, price = after["state"].weights
    assert 0 < price < kind / 3
    assert after["state"].step == 30


def test_the_step_and_the_loop(capsys, monkeypatch):
    pytest.importorskip("matplotlib").use("agg")
    monkeypatch.setattr(torch, "compile", lambda step, **_: step)  # tests/test_compile.py is for that
    names = newcomer() | {"balancer": gn.gradnorm()}
    from gradnorm_func import plot

    exec(STEP, names)
    assert "price" in capsys.readouterr().out
    kind, price = names["state"].weights
    assert 0 < price < kind / 3
    exec(LOOP, names | {"plot": plot})


def test_its_words_are_true():
    assert len(README.splitlines()) <= 130
    assert "@@" not in README
    for name in re.findall(r"`gn\.(\w+)", README):
        assert hasattr(gn, name), name
