"""Run as `python sharding_processes.py FOLDER`: two processes run recipes with sharded parameters.

A script of its own that forks, since a process that imports the tests would first import every library of models. The
test judges by the files of the runs, and by what each process saw.
"""

import os
import shutil
import socket
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor

from normswap import convert
from normswap.errors import RecipeError
from normswap.finetune import trainer
from normswap.finetune.optimization import build_average, build_optimizer
from normswap.finetune.recipe import Recipe, parse_recipe
from normswap.finetune.sharding import distribute_weights
from normswap.finetune.tables import TrainTable
from normswap.finetune.trainer import run_recipe
from normswap.surgery.importance import gate_parameters

STEPS, SAVED = 20, 16


def recipe(folder: Path, name: str, *, batch_size: int = 2, **train: Any) -> Recipe:
    """A run on the model in FOLDER/start.pt; one process with twice the batch size sees the images of two."""
    keys = {"steps": STEPS, "ema_decay": 0.9, "importance_lr": 0.05, "gate_warmup_steps": 5, "batch_penalty": 0.03}
    return parse_recipe(
        "digits",
        {
            "model": {"checkpoint": str(folder / "start.pt")},
            "data": {"source": "digits:shifted", "image_size": 32, "batch_size": batch_size, "flip": 0.5},
            "train": {"sharding": "fsdp", "accumulation": 2, **keys, **train},
            "run": {"output": str(folder / name), "log_every": 4, "save_every": SAVED},
        },
    )


# --- a small network in float64 ---------------------------------------------------------------------------------------


class Scaled(nn.Module):
    """Its scale has no dimension, so it cannot be sharded."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


def small_network() -> nn.Module:
    """A converted network whose statistics are those of the joint batch."""
    torch.manual_seed(5)
    block = nn.Sequential(nn.Conv2d(8, 9, 3, bias=False), nn.BatchNorm2d(9), nn.ReLU(inplace=True))
    whole = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), block, Scaled(), nn.Flatten(), nn.Linear(36, 5))
    return convert(whole.double(), torch.zeros(2, 3, 6, 6).double(), bn_statistics="batch", synchronize=True).model


def train_small(optimizer: str, part: slice, *, sharding: str) -> dict[str, Tensor]:
    """Weights, buffers, moving average and optimizer state after some steps; the state is loaded again halfway."""
    model, x = small_network(), torch.randn(STEPS, 6, 3, 6, 6, generator=torch.Generator().manual_seed(7)).double()
    table = TrainTable(optimizer=optimizer, importance_lr=0.02, sharding=sharding)
    task = SimpleNamespace(own_loop=None, example_inputs=lambda _: x[0, :2])
    average = build_average(model, 0.9)
    AcceleratorState._reset_state()  # it keeps the precision of the last run
    weights = distribute_weights(
        SimpleNamespace(model=model, task=task, training=None), table, average, Accelerator(cpu=True)
    )
    built = build_optimizer(model, table)
    for step, batch in enumerate(x):
        with weights.micro_batch(is_last=True):
            F.cross_entropy(weights.network(batch[part]), torch.arange(6)[part] % 5).backward()
        weights.finish_backward()
        built.step()
        built.zero_grad()
        average.update(model, step=step)
        if step == STEPS // 2:
            state = weights.optimizer_state(built)
            if sharding == "fsdp":  # the first process has the state, and all read it from a file
                states = [state]
                distributed.broadcast_object_list(states, 0)
                state = states[0]
            weights.load_optimizer_state(built, state)
    found: dict[str, Tensor] = {}
    for name, source in (("model", model), ("average", average.module)):
        with weights.whole(source) as whole:
            found |= {f"{name}.{key}": value.clone() for key, value in whole.state_dict().items()}
    entries = weights.optimizer_state(built)["state"]
    return found | {f"{key}.{name}": value for key, entry in entries.items() for name, value in entry.items()}


# --- runs -------------------------------------------------------------------------------------------------------------


def watch_steps(seen: dict[str, Any]) -> None:
    """Note after each step how the parameters lie."""
    step = trainer._step

    def watched_step(run: Any, *args: Any) -> None:
        step(run, *args)
        parameters = {*run.model.parameters()} - {*gate_parameters(run.model).values()}
        shards = [parameter for parameter in parameters if isinstance(parameter, DTensor)]
        seen["parameters"] = len(shards), len(parameters)
        seen["values"] = sum(p.to_local().numel() for p in shards), sum(p.numel() for p in shards)

    trainer._step = watched_step


def main(folder: Path) -> dict[str, Any]:
    """Run all cases in this process."""
    rank = int(os.environ["RANK"])
    seen: dict[str, Any] = {}
    watch_steps(seen)

    def keep_state(number: int, _steps: int) -> None:
        if number == SAVED + 1 and rank == 0:
            (folder / "parts").mkdir()
            shutil.copy(folder / "whole" / "state.pt", folder / "parts")

    run_recipe(recipe(folder, "whole"), on_step=keep_state)
    run_recipe(recipe(folder, "parts"), resume=True)
    for optimizer in ("momentum", "adamw", "adafactorbv"):
        seen[optimizer] = train_small(optimizer, slice(3 * rank, 3 * rank + 3), sharding="fsdp")
    try:
        run_recipe(recipe(folder, "refused", optimizer="adafactor"))
    except RecipeError as error:
        seen["refused"] = str(error)
    AcceleratorState._reset_state()
    run_recipe(recipe(folder, "bf16", precision="bf16", steps=4))
    return seen


def run_process(rank: int, folder: Path, port: int) -> None:
    """Run one of the two processes as torchrun would start it."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    torch.set_num_threads(1)
    torch.save(main(folder), folder / f"seen{rank}.pt")
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        free_port = probe.getsockname()[1]
    other = os.fork()
    run_process(0 if other else 1, Path(sys.argv[1]), free_port)
    if other:
        sys.exit(os.waitstatus_to_exitcode(os.waitpid(other, 0)[1]))
