"""What holds for every test: one thread, the same random numbers, and the same warnings whatever ran before."""

import gc
import os
from collections.abc import Generator

import pytest
import torch

from tests.helpers.systems import missing_here

torch.set_num_threads(1)  # also while tests are collected: each core has a worker of its own

# Without a GPU, Triton's kernels are interpreted: asked for before whichever test imports Triton first.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Imports leave next to no garbage, and what they made stays: nothing looks it through again and again."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what this system cannot run, with the reason."""
    for item in items:
        needed = missing_here(getattr(item, "originalname", item.name))
        if needed is not None:
            item.add_marker(pytest.mark.skip(reason=f"needs {needed}"))


@pytest.fixture(autouse=True)
def _deterministic() -> None:
    torch.set_num_threads(1)  # a test may have changed it
    torch.default_generator.manual_seed(0)  # torch.manual_seed takes milliseconds, for devices that are not there
    torch.set_warn_always(True)  # else a warning of torch's C++ code fails only the first test that causes it


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-snapshots", action="store_true", help="write the expected outputs of commands again")
