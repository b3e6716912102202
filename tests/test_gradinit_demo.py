"""The GradInit demo, as small as it goes."""

import argparse

import pytest

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from gradnorm_func.demo import gradinit


def test_it_runs_and_reports(tmp_path, capsys):
    parser = argparse.ArgumentParser()
    gradinit.add_arguments(parser)
    out = tmp_path / "figure.png"
    gradinit.run(parser.parse_args(
        ["--nets", "residual", "--seeds", "2", "--steps", "20", "--init-steps", "3", "--out", str(out)]
    ))  # fmt: skip
    lines = capsys.readouterr().out.splitlines()
    assert out.stat().st_size > 10_000
    assert sum(line.startswith("residual") for line in lines) == 4
    assert sum("GradInit" in line for line in lines) == 2


@pytest.mark.parametrize("wrong", [["--seeds", "0"], ["--steps", "ten"], ["--nets", "resnet"]])
def test_a_wrong_argument_is_refused(wrong):
    parser = argparse.ArgumentParser()
    gradinit.add_arguments(parser)
    with pytest.raises(SystemExit):
        parser.parse_args(wrong)
