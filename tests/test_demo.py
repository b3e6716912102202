"""The demo through its command line: what it prints, what it saves, how it refuses."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import torch

from gradnorm_func.demo.__main__ import main

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")

from gradnorm_func.demo import compare, digits, toy


def is_png(path) -> bool:
    """A PNG of a size that only real curves have."""
    return path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 20_000


def test_digits_prints_a_table_and_saves_a_figure(tmp_path, capsys):
    path, threads = tmp_path / "out.png", torch.get_num_threads()
    assert main(["--steps", "4", "--seeds", "2", "--trials", "2", "--first-seed", "5", "--out", str(path)]) == 0
    out, err = capsys.readouterr()
    for word in (*(name for name, _ in digits.METRICS.values()), "equal weights", "tuned static", "GradNorm"):
        assert word in out
    rows = {line.split("  ")[0]: line for line in out.splitlines()}
    assert len(re.findall(r"\d\.\d\d ± \d+\.\d\d", rows["left digit"])) == 4
    assert len(re.findall(r"[+-]\d+\.\d ± \d+\.\d", rows["overall"])) == 3
    assert "Seeds 5, 6;" in out
    assert "best of 2" in out
    assert str(path) in out
    assert is_png(path)
    assert "run 15/15" in err  # 1 + 3 * 2 of the search, 4 * 2 of the table
    assert torch.get_num_threads() == threads


def test_alpha_given_is_alpha_used(tmp_path, capsys):
    main(["digits", "--quick", "--steps", "2", "--alpha", "0.7", "--out", str(tmp_path / "out.png")])
    out = capsys.readouterr().out
    assert "alpha = 0.7 (no search)" in out
    assert "±" not in out
    assert "static 1/L(0)" in out
    assert "tuned static" not in out, "nothing was tuned"


def test_toy_prints_final_numbers_and_saves_a_figure(tmp_path, capsys):
    path = tmp_path / "toy.png"
    assert main(["toy", "--tasks", "2", "--steps", "3", "--out", str(path)]) == 0
    out = capsys.readouterr().out
    assert "  1 100\n" in out
    assert "uncertainty weighting" in out
    assert "sum of L_i / L_i(0)" in out
    assert str(path) in out
    assert is_png(path)


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["--seeds", "0"], "at least 1"),
        (["--seeds", "x"], "an integer"),
        (["--steps", "1"], "at least 2"),
        (["--alpha", "-1"], "at least 0"),
        (["--alpha", "nan"], "a number"),
        (["--weight-lr", "0"], "above 0"),
        (["--out", "nowhere/at/all.png"], "existing, writable folder"),
        (["--out", "figure.txt"], ".png"),
        (["--nonsense"], "--nonsense"),
        (["train"], "invalid choice"),
        (["pinn"], "digits"),
        (["toy", "--tasks", "1"], "at least 2"),
        (["toy", "--seeds", "3"], "--seeds"),
    ],
)
def test_a_wrong_argument_gives_one_line(arguments, hint, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    out, err = capsys.readouterr()
    assert caught.value.code == 2
    assert out == ""
    assert err.count("\n") == 1
    assert hint in err


@pytest.mark.parametrize("missing", ["matplotlib", "sklearn"])
def test_a_missing_package_gives_one_line(missing, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(SystemExit) as caught:
        main([])
    out, err = capsys.readouterr()
    assert caught.value.code != 0
    assert out == ""
    assert err.count("\n") == 1
    assert 'pip install "gradnorm_func[demo]"' in err


def test_help_explains_both_commands(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert all(word in out for word in ("--seeds", "--alpha", "--trials", "--tasks", "--out", "uncertainty"))


def test_importing_the_library_imports_no_demo():
    code = "import sys, gradnorm_func; print([m for m in sys.modules if 'demo' in m or m in ('matplotlib', 'sklearn')])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_pairs_are_what_they_say():
    data = digits.load()
    batch = digits.pairs(data["train"], 500, torch.Generator().manual_seed(0))
    assert torch.equal(batch["sum"], (batch["left"] + batch["right"]).float())
    assert torch.equal(batch["parity"] == 1, (batch["left"] % 2 == 1) & (batch["right"] % 2 == 1))
    assert torch.equal(batch["active"], (batch["image"] > 0).float().sum(1))
    sizes = [len(part.labels) for part in data.values()]
    assert sum(sizes) == 1797
    assert min(sizes) >= 359


def test_every_method_gets_the_same_start_and_batches():
    data, seen = digits.load()["train"], []

    def keep(batches):
        for batch in batches:
            seen.append(batch["image"])
            yield batch

    methods = [compare.equal(), *(trials[0] for trials in compare.candidates(compare.Settings((0,), 2, 1, 0.1, 0.025)))]
    firsts = [compare.train(method, data, 3, 2, keep)[2].losses[0] for method in methods]
    assert len(methods) == 4
    for i, first in enumerate(firsts):
        assert torch.equal(first, firsts[0])
        assert torch.equal(seen[2 * i + 1], seen[1])


def test_change_and_verdict_follow_the_numbers():
    reference = torch.tensor([[2.0, 4.0]])
    assert compare.change(torch.tensor([[1.0, 4.0]]), reference).tolist() == [-25.0]
    errors = torch.ones(3, len(digits.METRICS))
    results = [
        compare.Result(compare.equal(), 0, errors, None),
        compare.Result(compare.gradnorm(0.0, 0.1), 0, errors * 1.1, None),
    ]
    said = compare.verdict(results)
    assert said.startswith("Best overall: equal weights")
    assert "GradNorm: 10.0 points behind" in said
    assert "GradNorm is worse than equal weights at: left digit" in said


def test_toy_is_the_function_of_the_paper():
    generator = torch.Generator().manual_seed(0)
    problem = toy.make_problem(3, generator)
    x, y = problem.sample(5, generator)
    matrices = problem.matrices.reshape(toy.INPUTS, 3, toy.OUTPUTS)
    for i in range(3):
        torch.testing.assert_close(y[:, i], problem.scales[i] * torch.tanh(x @ matrices[:, i]))
    shared = matrices.mean(1)
    assert 9 < float(shared.std()) < 12
    assert 3 < float((matrices - shared[:, None]).std() * 1.5**0.5) < 4
