"""bake_file: the network in a converted file, baked into a new file that contains its weights alone."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from normswap.baking.bake_plan import BakePlan
from normswap.baking.network_baking import bake
from normswap.checkpoints.architecture.registry import make_folder_relative
from normswap.checkpoints.file_output import check_output, copy_folder, output_path, select_format
from normswap.checkpoints.formats.formats import FOLDERS
from normswap.checkpoints.io.atomic_files import check_readable
from normswap.checkpoints.loading import Architecture, OpenedModel, open_model
from normswap.checkpoints.reading import Checkpoint, file_size, read_checkpoint, read_header
from normswap.checkpoints.record import Record, Step
from normswap.checkpoints.saving import compute_sha256, write_content
from normswap.errors import CheckpointError, NothingToDo
from normswap.surgery.arguments import read_path
from normswap.text import printable_as

Progress = Callable[[str], AbstractContextManager[Any]]


@printable_as("baked_file")
@dataclass(frozen=True)
class BakedFile:
    """The result of `bake_file`.

    Attributes:
        file: the file that was read.
        output: the file that was written.
        architecture: the name that builds the original network.
        plan: what each site became.
        notes: what happened to the other entries of the file, a line each.
        bytes: the size of the output.

    Examples:
        >>> import torch, normswap
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
        >>> conversion = normswap.convert(model)
        >>> normswap.save(conversion.model, "sn.pt", plan=conversion.plan)
        >>> normswap.bake_file("sn.pt", "folded.pt", architecture=model, fold=True).plan
        BakePlan(1 site: 1 folded)
    """

    file: Path
    output: Path
    architecture: str | None
    plan: BakePlan
    notes: tuple[str, ...]
    bytes: int

    __module__ = "normswap"

    def to_dict(self) -> dict[str, Any]:
        """Return the result as plain data, the JSON of `normswap bake`."""
        return {**asdict(self), "file": str(self.file), "output": str(self.output), "counts": self.plan.counts}


def bake_file(
    path: str | Path,
    output: str | Path | None = None,
    *,
    architecture: Architecture | None = None,
    entry: str | None = None,
    example_inputs: Any = None,
    tolerance: float = 0.0,
    fold: bool = False,
    trust: bool = False,
    overwrite: bool = False,
    progress: Progress = nullcontext,
) -> BakedFile:
    """Bake the network in a converted file, as the command `normswap bake` does.

    The new file contains the weights alone, and its record says how `load` builds the baked network. If every site
    became its old Batch Normalization, the original architecture loads these weights too, without normswap.

    Args:
        path: a converted file with a state dict or a pickled module.
        output: the file to write; a name in `.safetensors` becomes that format, other names torch's. Default:
            `model.baked.pt` next to `model.pt`, in the format of the source.
        architecture, entry, trust: as for `load`.
        example_inputs: as for `bake`; or a function that takes the model and returns them. Default: a random batch of
            the size in timm's configuration, if there is one.
        tolerance, fold: as for `bake`.
        overwrite: replace an existing output file.
        progress: called with the name of each stage; returns a context manager for the stage.

    Returns:
        `BakedFile`: the output path, the bake plan, and what happened to the other entries.

    Raises:
        NothingToDo: the file is not converted, or was baked already.
        CheckpointError: the file cannot be read, or the output cannot be written.
        ArchitectureError, PlanError: as `load`.
        ArgumentError, ModelError: as `bake`.

    Examples:
        >>> import torch, normswap
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
        >>> conversion = normswap.convert(model)
        >>> normswap.save(conversion.model, "sn.pt", plan=conversion.plan)
        >>> normswap.bake_file("sn.pt", architecture=model).output.name
        'sn.baked.pt'
    """
    file = Path(read_path(path, "path", "the name of a file or a folder"))
    target = output_path(file, None if output is None else read_path(output, "output", "the name of a file"), "baked")
    check_readable(file)
    check_output(file, target, overwrite=overwrite)
    refuse_program_name(target)
    with progress(f"reading {file.name}"):
        header = read_header(file, folder=copy_folder(target))
        checkpoint = read_checkpoint(header, entry=entry, trust=trust and header.file_format != "exported program")
    _check_converted(checkpoint)
    file_format = select_format(target, checkpoint, named=output is not None, weights_only=True)
    if file_format in FOLDERS:
        raise CheckpointError(f"{target}: a baked network is written as one file: choose output='{target.name}.pt'")
    with progress("building the model"):
        opened = open_model(checkpoint, architecture, inputs=example_inputs, trust=trust)
    with progress("baking"):
        baked = bake(
            opened.model, opened.inputs, tolerance=tolerance, fold=fold, inplace=checkpoint.payload != "module"
        )
    model: nn.Module = baked.model
    with progress(f"writing {target.name}"):
        write_content(
            model if checkpoint.payload == "module" else model.state_dict(),
            target,
            file_format,
            _baked_record(opened, baked.plan, fold=fold),
            overwrite=overwrite,
            source=checkpoint.origin,
        )
    notes = tuple(f"{name}: left out, only the baked weights are written" for name in checkpoint.other_entries)
    return BakedFile(file, target, opened.architecture, baked.plan, notes, file_size(target))


def refuse_program_name(target: Path) -> None:
    """Refuse an output whose name is that of an exported program.

    Raises:
        CheckpointError: the name ends in .pt2.
    """
    if target.suffix == ".pt2":
        raise CheckpointError(
            f"{target}: .pt2 is for exported programs, but only weights are written: choose output='NAME.pt'"
        )


def _check_converted(checkpoint: Checkpoint) -> None:
    record, path = checkpoint.record, checkpoint.path
    if record is not None and record.baked is not None:
        raise NothingToDo(
            f"{path}: nothing to do, it was baked already: bake the converted file to bake it differently"
        )
    if record is None or record.plan is None or not record.plan.swaps:
        raise NothingToDo(f"{path}: nothing to bake, it is not converted: convert it with normswap convert {path.name}")
    if record.payload == "program":
        raise CheckpointError(f"{path}: an exported program cannot be baked: bake the file that it was exported from")


def _baked_record(opened: OpenedModel, plan: BakePlan, *, fold: bool) -> Record:
    checkpoint = opened.checkpoint
    old = checkpoint.record
    assert old is not None
    step = Step.now(
        "baked",
        source=checkpoint.path.name,
        sha256=compute_sha256(checkpoint.origin.copy),
        detail="folded" if fold else None,
    )
    architecture = old.architecture or make_folder_relative(opened.architecture, checkpoint.path)
    return Record(
        payload=checkpoint.payload,
        architecture=architecture,
        plan=old.plan,
        history=(*old.history, step),
        originals=old.originals,
        baked=replace(plan, measurement=None),
    )
