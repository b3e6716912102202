"""What every test stands on: a seed, one thread, and no compiled graph left over from another test."""

import sys

import pytest
import torch


@pytest.fixture(autouse=True)
def _same_start():
    torch.manual_seed(0)
    torch.set_num_threads(1)
    yield
    if "torch._dynamo" in sys.modules:  # importing it only to reset it would cost more than most tests
        torch._dynamo.reset()
