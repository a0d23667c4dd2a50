"""Run as `python two_processes_calibrating.py FOLDER`: two processes that calibrate with batches of their own.

What each came to is stored in FOLDER under its rank, with what one process comes to on all batches. It forks itself,
since torch takes longer to import than this takes to run.
"""

import os
import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn

from normswap import calibrate, convert
from normswap.errors import NormswapError

BATCHES = [torch.randn(n, 3, 5, 5, generator=torch.Generator().manual_seed(n)).double() * n for n in (4, 2, 3)]
# What each of the two processes brings.
SHARES = {"unequal": (BATCHES[:2], BATCHES[2:]), "one empty": (BATCHES, [])}
WAYS: dict[str, dict[str, bool]] = {"": {}, " layer by layer": {"layer_by_layer": True}, " matched": {"match": True}}


class Block(nn.Module):
    """A functional site."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("var", torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.mean, self.var, training=self.training)


def net() -> Any:
    torch.manual_seed(5)
    model = nn.Sequential(nn.SyncBatchNorm(3), nn.Conv2d(3, 4, 3), Block(), nn.ReLU(), nn.BatchNorm2d(4)).double()
    return convert(model, BATCHES[0], exclude=["0"], bn_statistics="batch").model


def calibrated(batches: list[Tensor], **options: Any) -> tuple[dict[str, Tensor], list[Any]]:
    model = net()
    result = calibrate(model, batches, **options)
    layers = [[layer.fqn, layer.values, layer.calls] for layer in result.layers]
    return {name: value.clone() for name, value in model.named_buffers()}, [layers, result.batches, result.passes]


def run(rank: int, folder: str) -> None:
    results: dict[str, Any] = {"layers": {}}
    # Pooled over processes or not: in one pass each batch is normalized by itself, so it is the same.
    results["alone"] = {
        f"{name}{way}": calibrated(BATCHES, **options)[0] for name in SHARES for way, options in WAYS.items()
    }
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    for name, shares in SHARES.items():
        for way, options in WAYS.items():
            results[f"{name}{way}"], results["layers"][f"{name}{way}"] = calibrated(shares[rank], **options)
    try:
        calibrate(net(), [BATCHES[1] / (0.0 if rank else 1.0)])
    except NormswapError as error:
        results["refused"] = str(error)
    torch.save(results, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


torch.set_num_threads(1)
other = os.fork()
run(0 if other else 1, sys.argv[1])
if other:
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(other, 0)[1]))
