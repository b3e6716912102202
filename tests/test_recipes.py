"""The recipes run as a reader would run them, and each proves that it equals one process; broken, it says so."""

import os
import re
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
RECIPES = ROOT / "notebooks" / "recipes"
NEEDS = {"accelerate_loop": "accelerate", "hf_trainer": "transformers", "lightning_manual": "lightning"}
SCRIPTS = ("plain", "ddp", "fsdp2", "accelerate_loop", "hf_trainer", "lightning_manual", "resume")
PROOF = re.compile(r"^weights \[(.+)\]; largest difference from one process: (\S+)$", re.MULTILINE)

slow = pytest.mark.slow
RUNS = [
    ("plain", 1),
    ("ddp", 2),
    ("fsdp2", 2),
    ("accelerate_loop", 1),
    ("accelerate_loop", 2),
    ("hf_trainer", 1),
    pytest.param("hf_trainer", 2, marks=slow),
    ("lightning_manual", 1),
    pytest.param("lightning_manual", 2, marks=slow),
    ("resume", 1),
    pytest.param("ddp", 3, marks=slow),
    pytest.param("fsdp2", 3, marks=slow),
]
# What a newcomer may get wrong, by script: what stands there, and what is put in its place.
FAULTS = [
    ("plain", 1, "gn.write_grads(model, grads)", "gn.write_grads(model, {k: 1.1 * g for k, g in grads.items()})"),
    (
        "ddp",
        2,
        "gn.all_reduce(gn.measure_losses(losses, copies, num_examples=n))",
        "gn.measure_losses(losses, copies, num_examples=n)._replace(num_examples=ranks * n)",
    ),
    pytest.param("ddp", 2, "share = ranks * n / stats.num_examples", "share = 1", marks=slow),
    pytest.param("ddp", 2, "info.weights)", "state.weights)", marks=slow),
    pytest.param("fsdp2", 2, "scale=share, ", "", marks=slow),
    pytest.param("accelerate_loop", 1, "gn.merge(running, stats)", "stats", marks=slow),
    pytest.param("accelerate_loop", 2, "gn.all_reduce(running) if many else running", "running", marks=slow),
    pytest.param("hf_trainer", 1, "gn.merge(self.balance.running, stats)", "stats", marks=slow),
    pytest.param("hf_trainer", 1, "        if checkpoint:", "        if False:", marks=slow),
    pytest.param(
        "lightning_manual",
        1,
        'gn.load_state(self.balance_state, checkpoint["balancer"])',
        "self.balance_state",
        marks=slow,
    ),
    pytest.param(
        "lightning_manual", 2, "gn.all_reduce(stats) if self.trainer.world_size > 1 else stats", "stats", marks=slow
    ),
    pytest.param("resume", 1, 'gn.load_state(state, saved["balancer"])', "state", marks=slow),
]


def run(script, processes, folder, *arguments):
    """Exit status and output of a script, by torchrun if in several processes; nothing of it outlives the limit."""
    if script.stem in NEEDS and not find_spec(NEEDS[script.stem]):
        pytest.skip(f"{NEEDS[script.stem]} is not installed")
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    checkpoints = [str(folder / "checkpoints")] if script.stem in ("hf_trainer", "lightning_manual") else []
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        [sys.executable, *launch, str(script), *checkpoints, *arguments],
        cwd=folder,
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=240)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return process.returncode, output


def check(status, output):
    assert status == 0, output
    assert "Warning" not in output, output
    [(weights, difference)] = PROOF.findall(output)  # by one rank, once
    values = [float(w) for w in weights.split(", ")]
    assert max(abs(w - 1) for w in values) > 0.3, "weights that did not move prove nothing"
    assert 0 <= float(difference) < 1e-10


@pytest.mark.parametrize(("name", "processes"), RUNS)
def test_a_recipe_equals_one_process(name, processes, tmp_path):
    status, output = run(RECIPES / f"{name}.py", processes, tmp_path)
    check(status, output)
    if name == "resume":
        assert "bit for bit the unbroken run: True" in output


@slow
def test_the_plain_loop_compiled(tmp_path):
    check(*run(RECIPES / "plain.py", 1, tmp_path, "--compile"))


@pytest.mark.parametrize(("name", "processes", "right", "wrong"), FAULTS)
def test_a_broken_recipe_says_so(name, processes, right, wrong, tmp_path):
    text = (RECIPES / f"{name}.py").read_text()
    assert text.count(right) == 1
    (tmp_path / f"{name}.py").write_text(text.replace(right, wrong))
    (tmp_path / "toy.py").write_text((RECIPES / "toy.py").read_text())
    status, output = run(tmp_path / f"{name}.py", processes, tmp_path)
    assert status != 0
    assert "the two runs differ" in output
    assert all(float(difference) > 1e-6 for _, difference in PROOF.findall(output))


def test_recipes_are_short_and_say_how_to_run():
    assert {path.stem for path in RECIPES.glob("*.py")} == {*SCRIPTS, "toy"}
    for name in SCRIPTS:
        text = (RECIPES / f"{name}.py").read_text()
        assert len(text.splitlines()) < 60, name
        assert f"{name}.py" in text.split('"""')[1], name
