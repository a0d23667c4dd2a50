"""What holds for every test: one thread, the same random numbers, and the same warnings whatever ran before."""

import gc

import pytest
import torch

torch.set_num_threads(1)  # also while tests are collected: each core has a worker of its own
gc.disable()  # until all libraries are imported, which leaves next to no garbage


def pytest_collection_finish() -> None:
    """What has been imported is there to stay: it is not looked through again for the garbage of a test."""
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True)
def _deterministic() -> None:
    torch.set_num_threads(1)  # a test may have changed it
    torch.default_generator.manual_seed(0)  # torch.manual_seed takes milliseconds, for devices that are not there
    torch.set_warn_always(True)  # else a warning of torch's C++ code fails only the first test that causes it
