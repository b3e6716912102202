"""The RotoGrad demo, as small as it goes."""

import argparse

import pytest

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from gradnorm_func.demo import rotograd


def arguments(*given):
    parser = argparse.ArgumentParser()
    rotograd.add_arguments(parser, str)
    return parser.parse_args(list(given))


def test_it_runs_and_reports(tmp_path, capsys):
    out = tmp_path / "figure.png"
    rotograd.run(arguments("--seeds", "2", "--toy-steps", "5", "--digit-seeds", "1", "--steps", "3", "--out", str(out)))
    text = capsys.readouterr().out
    assert out.stat().st_size > 10_000
    assert text.count(rotograd.ROTATED) == 2 * len(rotograd.TOYS)
    assert text.count("RotoGradNorm") == 2  # in the table, and its cosines


def test_the_convex_toy_does_what_the_notebook_says():
    convex = rotograd.TOYS[0]
    paths = rotograd.toys(2, 400, chosen=[convex], kinds=[rotograd.AS_THEY_ARE])
    reached = {name: (path.distances(convex) < rotograd.REACHED) for (_, _, name), path in paths.items()}
    assert reached[rotograd.ROTATED].all()
    assert not reached[rotograd.PLAIN].any()


@pytest.mark.parametrize("wrong", ["--seeds", "--toy-steps", "--steps"])
def test_a_wrong_number_is_refused(wrong):
    with pytest.raises(SystemExit):
        rotograd.run(arguments(wrong, "0"))
