"""What a user asked of `normswap convert`, and what can be told of it before anything slow is done."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from normswap.checkpoints.io.atomic_files import check_readable, check_writable
from normswap.cli.options import InputSpec
from normswap.cli.outputs import is_folder_for, output_path, select_format

if TYPE_CHECKING:
    from normswap.checkpoints.formats.formats import Container
    from normswap.checkpoints.loading import Checkpoint

NO_ARCHITECTURE = "none"


@dataclass(frozen=True)
class ConvertOptions:
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
    synchronize: bool
    plan: Path | None
    save_plan: Path | None
    weights_only: bool
    verify: bool
    tolerance: float | None
    dry_run: bool
    trust: bool
    force: bool
    is_one_of_several_entries: bool = False

    @property
    def target(self) -> Path:
        """Where the model goes: `model.normswap.pt` beside `model.pt` unless told otherwise.

        Of an exported program it is the program only where that may be loaded, else its weights.
        """
        return output_path(self.file, self.output, "normswap", as_program=self.trust and self.arch is None)

    @property
    def without_architecture(self) -> bool:
        """Whether nobody is to know the architecture."""
        return self.arch == NO_ARCHITECTURE

    def check(self) -> None:
        """Refuse what can be refused before torch is imported.

        Raises:
            click.UsageError: options exclude one another.
            CheckpointError: the input is missing, or an output cannot be written.
        """
        selects_sites = self.include or self.exclude or self.kinds or self.gate is not None or self.synchronize
        if self.plan is not None and selects_sites:
            raise click.UsageError(
                "--plan decides everything: leave --include, --exclude, --kinds, --gate and --synchronize out"
            )
        if not self.verify and self.tolerance is not None:
            raise click.UsageError("--tolerance has no meaning with --no-verify")
        if self.without_architecture and (self.inputs or self.kinds or self.plan or self.gate or self.synchronize):
            raise click.UsageError(
                "--arch none knows names only: leave --input, --kinds, --plan, --gate and --synchronize out"
            )
        if self.save_plan is not None and self.save_plan.resolve() == self.target.resolve():
            raise click.UsageError("--save-plan and the output have the same name: choose another for one of them")
        check_readable(self.file)
        if self.plan is not None:
            check_readable(self.plan)
        # A dry run is refused for what would refuse the real one.
        check_writable(self.target, replace=self.force, as_folder=is_folder_for(self.file, self.target))
        if self.save_plan is not None:
            check_writable(self.save_plan, replace=self.force)

    def container(self, source: "Checkpoint") -> "Container":
        """Return the kind of the output: what the name given with -o says, else the input's own.

        Raises:
            CheckpointError: that kind cannot hold what the file holds.
        """
        named = self.output is not None
        return select_format(self.target, source, named=named, weights_only=self.weights_only)


def options_per_entry(
    options: ConvertOptions, entries: Sequence[str], archs: Sequence[str], inputs: Sequence[InputSpec]
) -> tuple[ConvertOptions, ...]:
    """Return what is asked for each network of a file: one wish, or one for each of several entries.

    Raises:
        click.UsageError: architectures or inputs cannot be told apart, or an option is for one network only.
    """
    if len(entries) > 1:
        _check_multiple_entries(options, entries)
    elif len(archs) > 1:
        raise click.UsageError(f"--arch: expected one, got {len(archs)}: name the networks with --entry")
    names: Sequence[str | None] = entries or [None]
    if len(archs) not in (0, 1, len(names)):
        raise click.UsageError(f"--arch: expected one, or one for each of {len(names)} --entry, got {len(archs)}")
    unknown = [spec.entry for spec in inputs if spec.entry is not None and spec.entry not in entries]
    if unknown:
        raise click.UsageError(f"--input {unknown[0]}=...: there is no --entry {unknown[0]}")
    return tuple(
        replace(
            options,
            entry=name,
            arch=(archs[index] if len(archs) > 1 else archs[0]) if archs else None,
            inputs=_select_inputs(name, index, names, inputs),
            is_one_of_several_entries=len(names) > 1,
        )
        for index, name in enumerate(names)
    )


def _check_multiple_entries(options: ConvertOptions, entries: Sequence[str]) -> None:
    duplicate = next((name for name in entries if entries.count(name) > 1), None)
    if duplicate is not None:
        raise click.UsageError(f"--entry {duplicate} is given twice: give each network once")
    for option, given in (
        ("--plan", options.plan),
        ("--save-plan", options.save_plan),
        ("--weights-only", options.weights_only),
    ):
        if given:
            raise click.UsageError(f"{option} is for one network: give one --entry")


def _select_inputs(
    name: str | None, index: int, names: Sequence[str | None], inputs: Sequence[InputSpec]
) -> tuple[InputSpec, ...]:
    """The inputs of one network: those with its name; else the only one, or the one in its place."""
    named_specs = tuple(replace(spec, entry=None) for spec in inputs if spec.entry is not None and spec.entry == name)
    unnamed_specs = tuple(spec for spec in inputs if spec.entry is None)
    if named_specs or len(names) == 1 or len(unnamed_specs) < 2:
        return named_specs or unnamed_specs
    if len(unnamed_specs) != len(names) or len(unnamed_specs) != len(inputs):
        raise click.UsageError(
            f"--input: expected one, or one for each of {len(names)} --entry, got {len(unnamed_specs)}: name the network, such "
            f"as --input {name}=2x3x224x224"
        )
    return (unnamed_specs[index],)
