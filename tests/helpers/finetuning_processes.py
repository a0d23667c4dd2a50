"""Run by torchrun as `finetuning_processes.py FOLDER`: a run, the same one interrupted, and that one taken up again.

A script of its own, since a process that imports the tests would first import every library of models.
"""

import signal
import sys
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import PartialState

from normswap.errors import RunInterrupted
from normswap.finetune.recipe import Recipe, parse_recipe
from normswap.finetune.trainer import run_recipe


def recipe(folder: Path, name: str) -> Recipe:
    whole = parse_recipe(
        name,
        {
            "model": {"architecture": "timm:test_resnet,num_classes=10,output_stride=8"},
            "data": {"source": "digits:shifted", "image_size": 32, "batch_size": 2, "flip": 0.5},
            "train": {"steps": 6, "accumulation": 2, "ema_decay": 0.9, "importance_lr": 0.05},
            "run": {"output": str(folder / name), "log_every": 2},
        },
    )
    return replace(whole, name="digits")


def main(folder: Path) -> None:
    torch.set_num_threads(1)

    def stop(step: int, _steps: int) -> None:
        # One process alone is asked, and between two looks in common.
        if step == 3 and PartialState().process_index == 1:
            signal.raise_signal(signal.SIGTERM)

    run_recipe(recipe(folder, "whole"))
    try:
        run_recipe(recipe(folder, "parts"), on_step=stop)
    except RunInterrupted as error:
        (folder / f"stopped{PartialState().process_index}").write_text(str(error))
    run_recipe(recipe(folder, "parts"), resume=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
