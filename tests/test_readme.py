"""The README's code runs as it stands."""

import re
from pathlib import Path

import torch

README = Path(__file__).parent.parent / "README.md"


def test_first_example_runs_and_balances(capsys):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) >= 2
    names: dict = {}
    exec(blocks[0], names)
    assert "price" in capsys.readouterr().out
    # The price loss is the large one: its weight must have fallen below the other's.
    kind, price = names["state"].weights
    assert 0 < price < kind
    # The second block goes on from the first, with a loss_fn that has no seam.
    names["my_loss_fn"] = lambda params, batch: dict(names["loss_fn"](params, batch))
    names["params"] = dict(names["model"].named_parameters())
    exec(blocks[1].replace("trunk.2.weight", "trunk.2"), names)
    assert torch.allclose(names["info"].grad_norms > 0, torch.tensor([True, True]))


def test_length():
    assert len(README.read_text().splitlines()) <= 120
