"""benchmarks/evidence: the protocol is fair, the statistics are right, and a tiny run comes to its report."""

from __future__ import annotations

import importlib
import json
import math
import sys
from pathlib import Path

import pytest
import torch

import gradnorm_func as gn

pytest.importorskip("sklearn")
sys.path.insert(0, str(Path(__file__).parents[1]))
try:
    data, defaults, methods, problems, protocol, report, results, main = (
        importlib.import_module(f"benchmarks.evidence.{name}")
        for name in ("data", "defaults", "methods", "problems", "protocol", "report", "results", "__main__")
    )
finally:
    sys.path.pop(0)

TINY = protocol.Protocol(steps=10, seeds=2)


@pytest.fixture(scope="module")
def diabetes():
    return problems.make("diabetes")


def case_of(problem, condition="normalised"):
    return methods.Case(problem, condition, [0, 1], lambda name: pytest.fail("no weights of others"))


@pytest.mark.parametrize("name", data.BUNDLED)
def test_losses_are_normalised_and_splits_share_no_row(name):
    source = data.ALL[name]()
    for task, classes in source.classes.items():
        y = source.train[task]
        if classes:
            share = torch.bincount(y, minlength=classes) / len(y)
            constant = torch.nn.functional.cross_entropy(share.log().expand(len(y), -1), y) / source.units[task]
        else:
            constant = (y - y.mean()).square().mean()
        assert float(constant) == pytest.approx(1, rel=0.01), task
        assert source.units[task] > 0
    rows = [{tuple(row) for row in split["x"].tolist()} for split in source[:3]]
    assert not rows[0] & rows[1]
    assert not rows[0] & rows[2]
    again = data.ALL[name]()
    assert all(torch.equal(again.test[key], column) for key, column in source.test.items())


def test_scales_multiply_losses_and_nothing_else(diabetes):
    params, batch = diabetes.params(0), next(diabetes.batches(0, 1))
    losses = {c: diabetes.loss_fn(torch.tensor(diabetes.scale(c)))(params, batch) for c in problems.CONDITIONS}
    for condition, found in losses.items():
        for task, scale in zip(diabetes.tasks, diabetes.scale(condition), strict=True):
            torch.testing.assert_close(found[task], scale * losses["normalised"][task])
    assert diabetes.scale("x100") == [100.0, 1.0, 1.0, 1.0]
    assert diabetes.scale("raw")[diabetes.tasks.index("progression")] > 1000


def trials_of(val, test=None):
    val = torch.tensor(val)
    shape = (*val.shape[:3], 1)
    errors = {"val": val, "test": val if test is None else torch.tensor(test)}
    return protocol.Trials([0.1 * 3**i for i in range(len(val))], errors, torch.ones(shape))


def test_the_choice_is_that_of_the_validation_part():
    """Over two rates, one setting, two seeds, two evaluations, one task: the test part has no say."""
    val = [[[[[4.0], [2.0]], [[2.0], [8.0]]]], [[[[1.0], [9.0]], [[1.0], [9.0]]]]]
    test = [[[[[1.0], [1.0]], [[1.0], [1.0]]]], [[[[5.0], [0.1]], [[7.0], [0.1]]]]]
    choice = protocol.choose(trials_of(val, test), None, None)
    assert choice.rate == 1
    assert choice.val.tolist() == [[1.0], [1.0]]
    assert choice.test.tolist() == [[5.0], [7.0]], "at the evaluation with the lowest validation error"
    worse = protocol.choose(trials_of([val[0]], [test[0]]), None, None)
    assert worse.val.tolist() == [[2.0], [2.0]]


def test_tasks_alone_are_chosen_one_by_one():
    """Two rates, two settings, one seed, one evaluation, two tasks: setting i is for task i."""
    val = [[[[[5.0, 0.0]]], [[[0.0, 1.0]]]], [[[[2.0, 9.0]]], [[[9.0, 3.0]]]]]
    trials = trials_of((torch.tensor(val) + 0.5).tolist())._replace(weights=torch.ones(2, 2, 1, 2))
    found = protocol.choices(trials, methods.Method(gn.static(), alone=True))
    assert [(c.rate, c.setting, c.val.tolist()) for c in found] == [(1, 0, [[2.5]]), (0, 1, [[1.5]])]


def test_the_grid_grows_until_the_best_is_inside(diabetes, monkeypatch):
    """With errors that are lowest at a rate far outside of the first grid."""
    asked = []

    def train(case, method, settings, rates, _):
        asked.append(rates)
        errors = torch.tensor([abs(math.log(rate / 3.0)) + 0.1 for rate in rates])[:, None, None, None, None]
        shape = (len(rates), 1, 2, 1, 4)
        return protocol.Trials(rates, dict.fromkeys(("val", "test"), errors.expand(shape)), torch.ones(*shape[:3], 4))

    monkeypatch.setattr(protocol, "train", train)
    record = protocol.measure(case_of(diabetes), methods.METHODS["equal"], TINY)
    assert record["rates"] == [pytest.approx(2.187)]
    assert not record["at_edge"]
    assert len(asked) == 4
    assert sum(map(len, asked)) == record["trials"]


def test_runs_are_those_of_a_loop_by_hand(diabetes):
    """The scale, the seed, the schedule and the decay arrive where they should."""
    case = case_of(diabetes, "x100")
    settings = [case.same("", alpha=0.5)]
    method = methods.Method(lambda alpha: gn.gradnorm(alpha=alpha))
    trials = protocol.train(case, method, settings, [1e-2], TINY)
    balancer = gn.gradnorm(alpha=0.5)
    for seed in (0, 1):
        current = {name: leaf.clone() for name, leaf in diabetes.params(seed).items()}
        groups = [{"params": [leaf], "weight_decay": 0.01 * name.endswith("weight")} for name, leaf in current.items()]
        stepper = torch.optim.AdamW(groups, lr=1e-2)
        state, errors, weights = balancer.init(4), [], []
        loss_fn = diabetes.loss_fn(torch.tensor([100.0, 1.0, 1.0, 1.0]))
        for t, batch in enumerate(diabetes.batches(seed, TINY.steps)):
            for group in stepper.param_groups:
                group["lr"] = 1e-2 * 0.5 * (1 + math.cos(math.pi * t / TINY.steps))
            grads, state, info = balancer.grad(state, current, loss_fn, batch)
            gn.write_grads(current, grads)
            stepper.step()
            errors.append(diabetes.errors(current)["test"])
            weights.append(info.weights)
        torch.testing.assert_close(trials.errors["test"][0, 0, seed], torch.stack(errors), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(trials.weights[0, 0, seed], torch.stack(weights).mean(0), rtol=1e-3, atol=1e-4)
    assert not torch.equal(trials.errors["test"][0, 0, 0], trials.errors["test"][0, 0, 1])


def test_the_control_holds_the_gradient():
    balancer = methods.equal_total()
    loss_fn = lambda w, x: [3 * w[0] + w[1], 50 * w[1]]
    grads, _, info = balancer.grad(balancer.init(2), torch.ones(2), loss_fn, None)
    torch.testing.assert_close(grads.norm(), torch.tensor(1.0))
    torch.testing.assert_close(grads[1] / grads[0], torch.tensor(17.0))
    assert info.weights[0] == info.weights[1]


def test_the_interval_holds_the_mean_and_pairs_the_seeds():
    same = report.bootstrap([torch.full((5,), -2.0), torch.full((5,), -2.0)])
    assert same == (-2.0, -2.0, -2.0)
    assert same.verdict == "wins"
    apart = report.bootstrap([torch.full((5,), -2.0), torch.full((5,), 4.0)])
    assert apart == (1.0, -2.0, 4.0), "data sets are drawn, too"
    assert apart.verdict == "ties"
    values = torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0])
    one = report.bootstrap([values])
    spread = 1.96 * float(values.std(correction=0)) / 5**0.5
    assert one.mean == 2.0
    assert one.high - one.low == pytest.approx(2 * spread, rel=0.1)
    assert one.verdict == "loses"


def test_searched_methods_are_compared_with_searched_equal_weights():
    """And the change is the log ratio, seed by seed."""
    key = lambda condition, method: results.Key("diabetes", "adam", condition, method)
    row = lambda *test: {"test": [[x, 1.0] for x in test], "tasks": ["a", "b"], "at_edge": False}
    records = {
        key("normalised", "equal"): row(1.0, 2.0),
        key("normalised", "equal, searched"): row(0.5, 1.0),
        key("x100", "gradnorm"): row(math.e, 2 * math.e),
        key("x100", "gradnorm, searched"): row(0.5, 1.0),
    }
    page, found = report.main_table(records, "adam", "x100")
    assert found["gradnorm"] == pytest.approx((50.0, 50.0, 50.0))
    assert found["gradnorm, searched"] == pytest.approx((0.0, 0.0, 0.0))
    assert "| gradnorm | +50.0 [+50.0, +50.0] | loses |  | +50.0 diabetes | +100 diabetes, a | +50.0 |" in page
    assert report.pairs(records, "adam", "normalised", "equal", "equal")["diabetes"].tolist() == [[0.0, 0.0]] * 2


def test_a_method_that_misses_a_data_set_has_no_mean():
    key = lambda name, method: results.Key(name, "adam", "normalised", method)
    row = lambda test: {"test": [[test]], "tasks": ["a"], "at_edge": False}
    records = {key("enb", "equal"): row(1.0), key("digits", "equal"): row(1.0), key("enb", "nash"): row(0.5)}
    page, found = report.main_table(records, "adam", "normalised")
    assert list(found) == ["equal"]
    assert "| nash |  |  |  | -69.3 enb | -69 enb, a |  | -69.3 |" in page


def test_the_rule_of_the_defaults():
    """The worst data set first, then the mean, and of a tie the nearest to what was the default."""
    a = {alpha: name for name, (alpha, rate) in defaults.CANDIDATES.items() if rate == 0.025}
    rows = {a[0.0]: {"x": -9.0, "y": 1.5}, a[0.12]: {"x": -5.0, "y": -1.2}, a[0.5]: {"x": -5.0, "y": -1.0}}
    assert defaults.chosen(rows) == a[0.5]
    rows[a[0.5]] = {"x": -3.0, "y": -1.0}
    assert defaults.chosen(rows) == a[0.12]
    assert defaults.chosen({a[0.0]: {"x": 2.0}, a[1.5]: {"x": 1.5}}) == a[1.5]
    assert defaults.page({}) == ""


def test_names_with_commas():
    text = 'equal, searched,gradnorm,gn.gradnorm(alpha=0.5,form="log"),static from equal, searched'
    assert main.names(text) == [
        "equal, searched",
        "gradnorm",
        'gn.gradnorm(alpha=0.5,form="log")',
        "static from equal, searched",
    ]
    with pytest.raises(SystemExit, match="no method 'gradnrom'"):
        methods.method_of("gradnrom")


def test_a_tiny_run_comes_to_its_report(tmp_path, capsys):
    out = str(tmp_path / "evidence.json")
    call = ["--data", "diabetes", "--steps", "4", "--seeds", "2", "--out", out, "--conditions", "normalised,x100"]
    main.main([*call, "--methods", "equal"])
    main.main([*call, "--methods", "equal,single task,gradnorm,static from gradnorm"])
    progress = capsys.readouterr().err
    assert progress.count("/ equal:") == 2, "what is there is not measured again"
    rows = json.loads(Path(out).read_text())
    assert len(rows) == 8
    assert all(len(row["test"]) == 2 and len(row["test"][0]) == 4 for row in rows)
    assert {row["versions"]["torch"] for row in rows} == {torch.__version__}
    report.main([out])
    page = capsys.readouterr().out
    for heading in ("## adam, normalised", "## adam, x100", "what the scale of the losses does", "## Time"):
        assert heading in page
    (equal,) = [line for line in page.splitlines() if line.startswith("| equal | +0.0 [+0.0, +0.0]")]
    assert equal.endswith("| +0.0 |") or equal.endswith("| +0.0† |")
    assert "- wins: " in page
    assert "| static from gradnorm |" in page
    with pytest.raises(SystemExit, match="needs diabetes / adam / normalised / dwa first"):
        main.main([*call, "--methods", "static from dwa"])


def test_the_page_is_what_the_records_say():
    """`python -m benchmarks.evidence.report benchmarks/evidence/results/*.json > benchmarks/evidence/results.md`"""
    folder = Path(results.__file__).parent
    files = sorted(map(str, (folder / "results").glob("*.json")))
    assert files
    assert (folder / "results.md").read_text() == report.report(results.load(*files)) + "\n"


def test_the_table_of_methods_is_what_the_records_say():
    """The column "evidence" of docs/methods.md, which a person has written."""
    folder = Path(results.__file__).parent
    records = results.load(*sorted(map(str, (folder / "results").glob("*.json"))))
    records = {key: record for key, record in records.items() if key.data not in problems.PINNS}
    intervals = report.main_table(records, "adam", "normalised")[1]
    lines = (folder.parents[1] / "docs" / "methods.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.split("|")] for line in lines if line.startswith("| `")]
    told = {}
    for _, names, *cells in (row for row in rows if len(row) == 11):
        for name, words in zip(names.split(", "), cells[6].split("; "), strict=True):
            told[name.strip("`")] = words.replace("−", "-")
    assert {"gradnorm", "stch", "upgrad", "dualproj"} <= set(told)
    for name, words in told.items():
        if name in intervals and name != "static":
            assert words == str(intervals[name]), name
        else:
            assert words in ("–", "0"), name


def test_a_wrong_name_is_refused(capsys):
    for arguments in (["--data", "mnits"], ["--conditions", "x10"], ["--seeds", "0"]):
        with pytest.raises(SystemExit):
            main.main(arguments)
        assert re_error(capsys.readouterr().err)


def re_error(text):
    return "is none of" in text or "must be at least 1" in text


def test_a_pinn_is_shown_by_seeds_and_is_no_part_of_a_mean():
    versions = {"torch": "2", "gradnorm_func": "0", "python": "3"}
    of = lambda tasks, test: {
        "tasks": tasks, "test": test, "val": test, "at_edge": False, "step_cost": 1.0, "wall_s": 1.0, "steps": 10,
        "seeds": 2, "versions": versions,
    }  # fmt: skip
    key = lambda name, method: results.Key(name, "adam", "normalised", method)
    records = {
        key("enb", "equal"): of(["a", "b"], [[1.0, 1.0], [1.0, 1.0]]),
        key("enb", "nash"): of(["a", "b"], [[math.exp(0.1), math.exp(0.3)]] * 2),
        key("helmholtz", "equal"): of(["a", "b"], [[1.0], [0.5]]),
        key("helmholtz", "nash"): of(["a", "b"], [[0.01], [0.021]]),
    }
    page = report.report(records)
    assert "| nash | +20.0 [+20.0, +20.0] | loses |" in page
    assert "| equal | 100, 50 |" in page
    assert "| nash | 1.0, 2.1 |" in page
