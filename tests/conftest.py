"""What holds for every test: one thread, the same random numbers, and the same warnings whatever ran before."""

import os

import pytest
import torch

# Without a GPU, Triton's kernels are interpreted: asked for before whichever test imports Triton first.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def _deterministic() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    torch.set_warn_always(True)  # else a warning of torch's C++ code fails only the first test that causes it
