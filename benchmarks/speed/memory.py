"""Measure the memory of a training step: bytes saved for backward, and the peak of a network in a new process.

`benchmarks.speed.run` uses this module. `python -m benchmarks.speed.memory NETWORK original|converted DEVICE`
prints the peak in bytes.
"""

import argparse
import re
import statistics
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

import normswap
from benchmarks.paths import ROOT
from benchmarks.speed.records import Peak

_FORMS = ("original", "converted")
_STEPS = 2


def saved_bytes(module: nn.Module, x: Tensor) -> int:
    """Return the bytes of the distinct storages that a forward pass saves for backward.

    Parameters and buffers of `module` do not count; `x` counts if it is saved.
    """
    own = {_storage(tensor) for tensor in (*module.parameters(), *module.buffers())}
    sizes: dict[int, int] = {}
    alive = []  # otherwise a freed storage and the next one could have the same address

    def pack(tensor: Tensor) -> None:
        if _storage(tensor) not in own:
            alive.append(tensor.detach())
            sizes[_storage(tensor)] = tensor.untyped_storage().nbytes()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda packed: packed):
        module(x)
    return sum(sizes.values())


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def measure_peaks(networks: Iterable[str], processes: int, device: str) -> list[Peak]:
    """Measure networks and their conversions. Peaks are medians over new processes."""
    peaks = []
    for network in networks:
        found: dict[str, list[int]] = {form: [] for form in _FORMS}
        for _ in range(processes):
            for form in _FORMS:
                command = [sys.executable, "-m", "benchmarks.speed.memory", network, form, device]
                done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
                found[form].append(int(done.stdout))
        peaks.append(Peak(network, *(int(statistics.median(each)) for each in found.values())))
    return peaks


def peak_of_step(network: str, form: str, device: str) -> int:
    """Return the peak memory of training steps in this process in bytes, without the network and its input."""
    from benchmarks.speed.networks import NETWORKS  # here, so that other programs need no library of networks

    model = NETWORKS[network].build().to(device)
    x = torch.randn(NETWORKS[network].shape, device=device)
    if form == "converted":
        normswap.convert(model, inplace=True)
    before = _memory("VmRSS", device)
    for _ in range(_STEPS):
        model(x).sum().backward()
        model.zero_grad(set_to_none=True)
    return _memory("VmHWM", device) - before


def _memory(field: str, device: str) -> int:
    """Return the current (`VmRSS`) or peak (`VmHWM`) memory in bytes; on a GPU, the memory allocated by torch."""
    if device == "cuda":
        return torch.cuda.memory_allocated() if field == "VmRSS" else torch.cuda.max_memory_allocated()
    return process_memory(field)


def process_memory(field: str) -> int:
    """Return the current (`VmRSS`) or peak (`VmHWM`) memory of this process in bytes."""
    found = re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", help="name in benchmarks.speed.networks")
    parser.add_argument("form", choices=_FORMS)
    parser.add_argument("device", choices=("cpu", "cuda"))
    options = parser.parse_args()
    print(peak_of_step(options.network, options.form, options.device))
