"""Run as `python two_processes.py FOLDER`: two processes that train an original and its conversion in DDP.

A script of its own, since a process that imports the tests would first import every library of models; it forks
itself, since torch takes longer to import than this takes to run.
"""

import os
import sys
from typing import Any

import torch
import torch._dynamo  # which DDP would else import in each process
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from normswap import convert
from normswap.errors import SwapError


def net() -> Any:
    torch.manual_seed(5)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3))
    return model.double()


def step(model: Any, x: Tensor) -> dict[str, Tensor]:
    """One training step: output, gradients and buffers."""
    model.zero_grad()
    y = model(x)
    y.square().sum().backward()
    gradients = {f"{name}.grad": parameter.grad for name, parameter in model.module.named_parameters()}
    found = {"output": y.detach(), **gradients, **dict(model.module.named_buffers())}
    return {name: tensor.clone() for name, tensor in found.items()}


def train(rank: int, x: Tensor, **options: Any) -> list[dict[str, Tensor]]:
    """What original and conversion give in the second step, after each process had statistics of its own."""
    model = DistributedDataParallel(net(), **options)
    model.module[1].running_mean += rank
    converted = convert(model, x, bn_statistics="batch").model
    kept = {"kept": converted.module[1].running_mean.clone()}
    return [[step(m, x) for _ in range(2)][1] for m in (model, converted)] + [kept]


def run(rank: int, folder: str) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    x = torch.randn(4, 3, 9, 9, generator=torch.Generator().manual_seed(7)).double().chunk(2)[rank]
    results: dict[str, Any] = {"synced": train(rank, x), "local": train(rank, x, forward_sync_buffers=False)}
    try:
        convert(DistributedDataParallel(net()), exclude=["1"] if rank else [])
    except SwapError as error:
        results["refused"] = str(error)
    torch.save(results, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


torch.set_num_threads(1)
other = os.fork()
run(0 if other else 1, sys.argv[1])
if other:
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(other, 0)[1]))
