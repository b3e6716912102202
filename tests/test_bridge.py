"""Models under plain autograd: DDP and FSDP2 in several processes, compiled, checkpointed, mixed precision."""

import time

import bridge_cases as cases
import pytest
import torch
import torch.multiprocessing as mp
from bridge_cases import CONFIGS, FEW, Config

import gradnorm_func as gn

F64 = torch.float64


def launch(tmp_path, ranks, jobs, seconds=300):
    """The results of all ranks; nothing that hangs outlives the limit."""
    context = mp.start_processes(
        cases.run_rank, (ranks, str(tmp_path), jobs), nprocs=ranks, join=False, start_method="spawn"
    )
    end = time.monotonic() + seconds
    try:
        while not context.join(timeout=1):  # raises what a process raised
            assert time.monotonic() < end, f"no answer within {seconds} s"
    finally:
        for process in context.processes:
            process.kill()
    return [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(ranks)]


def gap(found, expected):
    """The largest relative difference between two histories, field by field."""
    pairs = [(found.weights, expected.weights), (found.norms, expected.norms)]
    pairs += [(found.grads[name], grad) for name, grad in expected.grads.items()]
    pairs += [(found.params[name], value) for name, value in expected.params.items()]
    assert all(reference.norm() > 0 for _, reference in pairs), "the reference must not be zero"
    return max(float((a - b).norm() / b.norm()) for a, b in pairs)


def compare(tmp_path, ranks, configs, steps, seconds=300):
    found = launch(tmp_path, ranks, [(cases.train, config, steps) for config in configs], seconds)
    gaps = {}
    for config, *histories in zip(configs, *found, strict=True):
        expected = cases.reference(config, steps)
        gaps[config] = max(gap(history, expected) for history in histories)
    print(f"{len(gaps)} configurations, {ranks} processes, {steps} steps: largest difference {max(gaps.values()):.1e}")
    assert max(gaps.values()) < 1e-10, {config: size for config, size in gaps.items() if not size < 1e-10}


def test_two_processes_equal_one(tmp_path):
    compare(tmp_path, 2, FEW, steps=20)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_every_combination(tmp_path, ranks):
    compare(tmp_path, ranks, CONFIGS, steps=50, seconds=3000)
