"""Measure the memory of a training step: bytes saved for backward, and the peak of a network in a new process.

`benchmarks.speed.run` uses this module. `python -m benchmarks.speed.memory NETWORK original|converted BATCH DEVICE`
prints the peak in bytes.
"""

import argparse
import re
import statistics
import subprocess
import sys
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

import normswap
from benchmarks.paths import ROOT
from benchmarks.speed.records import Memory

FORMS = ("original", "converted")
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


def network_memory(network: str, batch: int, processes: int, device: str) -> Memory:
    """Measure a timm network and its conversion at 224 pixels. Peaks are medians over new processes."""
    x = torch.randn(batch, 3, 224, 224, device=device)
    saved = [saved_bytes(_network(network, form, device), x) for form in FORMS]
    peaks: dict[str, list[int]] = {form: [] for form in FORMS}
    for _ in range(processes):
        for form in FORMS:
            command = [sys.executable, "-m", "benchmarks.speed.memory", network, form, str(batch), device]
            done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
            peaks[form].append(int(done.stdout))
    original, converted = (statistics.median(found) for found in peaks.values())
    return Memory(network, batch, processes, (saved[0], saved[1]), (original, converted))


def _network(network: str, form: str, device: str) -> nn.Module:
    model: nn.Module = timm.create_model(network).to(device)
    return normswap.convert(model, inplace=True).model if form == "converted" else model


def peak_of_step(network: str, form: str, batch: int, device: str) -> int:
    """Return the peak memory of training steps in this process in bytes, without the network and its input."""
    model = _network(network, form, device)
    x = torch.randn(batch, 3, 224, 224, device=device)
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
    parser.add_argument("network", help="name of a timm model")
    parser.add_argument("form", choices=FORMS)
    parser.add_argument("batch", type=int, help="batch size")
    parser.add_argument("device", choices=("cpu", "cuda"))
    options = parser.parse_args()
    print(peak_of_step(options.network, options.form, options.batch, options.device))
