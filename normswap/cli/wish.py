"""What a user asked of `normswap convert`, and what can be told of it before anything slow is done."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from normswap.checkpoints.atomic import check_readable, check_writable, located
from normswap.cli.options import InputSpec
from normswap.errors import CheckpointError

if TYPE_CHECKING:
    from normswap.checkpoints.checkpoint import Checkpoint
    from normswap.checkpoints.containers import Container

# Endings that name a file rather than a folder.
_FILES = {".pt", ".pth", ".bin", ".ckpt", ".tar", ".safetensors", ".pt2"}
_PROGRAM = ".pt2"
NO_ARCHITECTURE = "none"


@dataclass(frozen=True)
class Wish:
    """The arguments of `normswap convert`."""

    file: Path
    output: Path | None
    arch: str | None
    entry: str | None
    inputs: tuple[InputSpec, ...]
    include: tuple[str, ...]
    exclude: tuple[str, ...]
    kinds: tuple[str, ...] | None
    gate: str | None
    plan: Path | None
    save_plan: Path | None
    weights_only: bool
    verify: bool
    tolerance: float | None
    dry_run: bool
    trust: bool
    force: bool

    @property
    def target(self) -> Path:
        """Where the model goes: `model.normswap.pt` beside `model.pt` unless told otherwise.

        Of an exported program it is the program only where that may be loaded, else its weights.
        """
        if self.output is not None:
            return self.output
        source = located(self.file)
        ending = ".pth.tar" if source.name.endswith(".pth.tar") else source.suffix if source.suffix in _FILES else ""
        written = ".pt" if ending == _PROGRAM and not (self.trust and self.arch is None) else ending
        return source.with_name(f"{source.name.removesuffix(ending)}.normswap{written}")

    @property
    def names_only(self) -> bool:
        """Whether nobody is to know the architecture."""
        return self.arch == NO_ARCHITECTURE

    def check(self) -> None:
        """Refuse what can be refused before torch is imported.

        Raises:
            click.UsageError: options exclude one another.
            CheckpointError: the input is missing, or an output cannot be written.
        """
        if self.plan is not None and (self.include or self.exclude or self.kinds or self.gate is not None):
            raise click.UsageError("--plan decides everything: leave --include, --exclude, --kinds and --gate out")
        if not self.verify and self.tolerance is not None:
            raise click.UsageError("--tolerance has no meaning with --no-verify")
        if self.names_only and (self.inputs or self.kinds or self.plan or self.gate):
            raise click.UsageError("--arch none knows names only: leave --input, --kinds, --plan and --gate out")
        if self.save_plan is not None and self.save_plan.resolve() == self.target.resolve():
            raise click.UsageError("--save-plan and the output have the same name: choose another for one of them")
        check_readable(self.file)
        if self.plan is not None:
            check_readable(self.plan)
        as_folder = located(self.file).is_dir() and self.target.suffix not in _FILES
        if not self.dry_run:
            check_writable(self.target, replace=self.force, as_folder=as_folder)
        if self.save_plan is not None:
            check_writable(self.save_plan, replace=self.force)

    def container(self, source: "Checkpoint") -> "Container":
        """Return the kind of the output: what the name given with -o says, else the input's own.

        Raises:
            CheckpointError: that kind cannot hold what the file holds.
        """
        from normswap.checkpoints.containers import FOLDERS

        if source.container == "exported program":
            self._check_program(source)
        if source.program is not None:
            return "exported program"
        if self.target.suffix == ".safetensors":
            self._check_safetensors(source)
            return "safetensors"
        if source.container in FOLDERS and self.target.suffix not in _FILES:
            return source.container
        return "safetensors" if self.output is None and source.container == "safetensors" else "torch zip"

    def _check_program(self, source: "Checkpoint") -> None:
        if source.program is not None and self.target.suffix != _PROGRAM:
            raise CheckpointError(
                f"{self.target}: an exported program becomes one again: choose -o NAME{_PROGRAM}, or take its weights "
                "alone with --arch"
            )
        if source.program is None and self.target.suffix == _PROGRAM:
            raise CheckpointError(
                f"{self.target}: the weights alone are no exported program: choose -o NAME.pt, or convert the program "
                "with --trust and without --arch, if you trust where it comes from"
            )

    def _check_safetensors(self, source: "Checkpoint") -> None:
        if source.payload == "module":
            raise CheckpointError(f"{self.target}: safetensors holds no pickled module: choose -o NAME.pt")
        dropped = dropped_entries(source)
        if dropped and not self.weights_only:
            raise CheckpointError(
                f"{self.target}: safetensors holds tensors only, and this file holds {', '.join(dropped)} too: choose "
                "-o NAME.pt, or drop them with --weights-only"
            )


def dropped_entries(source: "Checkpoint") -> list[str]:
    """Return what --weights-only leaves behind, by name."""
    from normswap.checkpoints.contents import without

    return sorted(map(str, without(source.content, source.contents.weights)))
