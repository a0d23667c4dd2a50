"""What holds for every test: one thread, the same random numbers, and the same warnings whatever ran before."""

import pytest
import torch

torch.set_num_threads(1)  # also while tests are collected: each core has a worker of its own


@pytest.fixture(autouse=True)
def _deterministic() -> None:
    torch.set_num_threads(1)  # a test may have changed it
    torch.manual_seed(0)
    torch.set_warn_always(True)  # else a warning of torch's C++ code fails only the first test that causes it
