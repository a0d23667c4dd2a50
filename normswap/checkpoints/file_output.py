"""The output of a conversion: its path, its format, and how a converted file is written.

Importing this module does not import torch: the command line checks paths with it before it starts anything slow.
"""

import os
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from tempfile import gettempdir
from typing import TYPE_CHECKING, Any

from normswap.checkpoints.io.atomic_files import check_readable, check_writable, resolve_checkpoint_path
from normswap.errors import ArchitectureError, ArgumentError, CheckpointError, NothingToDo, PlanError

if TYPE_CHECKING:
    from concurrent.futures import Future

    from normswap.checkpoints.content.hf_trainer import SidecarFiles
    from normswap.checkpoints.converted_content import ConvertedWeights
    from normswap.checkpoints.formats.formats import FileFormat
    from normswap.checkpoints.loading import Architecture
    from normswap.checkpoints.reading import Checkpoint
    from normswap.checkpoints.record import Record
    from normswap.surgery.plan import SwapPlan
    from normswap.surgery.selection import SwapOptions
    from normswap.verification.equivalence import Verification

# Called with the name of a stage, returns a context manager that is open while the stage runs.
Progress = Callable[[str], AbstractContextManager[Any]]

# A name with one of these suffixes is a file, not a folder.
_FILE_SUFFIXES = {".pt", ".pth", ".bin", ".ckpt", ".tar", ".safetensors", ".pt2"}
_PROGRAM_SUFFIX = ".pt2"
NO_ARCHITECTURE = "none"
# The options of a swap that need no model.
_BY_NAMES_OPTIONS = ("include", "exclude", "bn_statistics", "match")
# `load` builds the models of these libraries from the name in the record alone.
_KNOWN_ZOOS = ("timm:", "torchvision:")


# --- paths ------------------------------------------------------------------------------------------------------------


def output_path(file: Path, output: str | Path | None, tag: str, *, as_program: bool = False) -> Path:
    """Return the path of the output for `file`: `output`, or `model.TAG.pt` next to `model.pt`.

    Args:
        tag: the word before the suffix in the default name.
        as_program: whether an exported program is written as a program; its weights alone are written as a `.pt` file.

    Raises:
        CheckpointError: `output` ends in a slash and what is written is a file.
    """
    if output is None:
        return _default_output(file, tag, as_program=as_program)
    if str(output).endswith(("/", os.sep)) and not is_folder_for(file, Path(output)):
        inside = str(Path(output) / _default_output(file, tag, as_program=as_program).name)
        hint = "" if Path(output).is_dir() else "create the folder and "
        raise CheckpointError(
            f"{output}: expected the name of a file, got that of a folder: {hint}pass output={inside!r}"
        )
    return Path(output)


def _default_output(file: Path, tag: str, *, as_program: bool) -> Path:
    source = resolve_checkpoint_path(file)
    suffix = (
        ".pth.tar" if source.name.endswith(".pth.tar") else source.suffix if source.suffix in _FILE_SUFFIXES else ""
    )
    written = ".pt" if suffix == _PROGRAM_SUFFIX and not as_program else suffix
    return source.with_name(f"{source.name.removesuffix(suffix)}.{tag}{written}")


def is_folder_for(file: Path, target: Path) -> bool:
    """Return whether `file`, changed and written to `target`, becomes a folder."""
    return resolve_checkpoint_path(file).is_dir() and target.suffix not in _FILE_SUFFIXES


def check_output(file: Path, target: Path, *, overwrite: bool) -> None:
    """Refuse an output path before any slow work is done for it; raises as `check_writable`."""
    check_writable(target, replace=overwrite, as_folder=is_folder_for(file, target))


def copy_folder(target: Path | None) -> Path:
    """Return the folder for the private copy of the source: that of the output, or TMPDIR if nothing is written.

    The file system of the output needs room for a file of that size anyway.
    """
    return Path(gettempdir()) if target is None else target.absolute().parent


# --- formats ----------------------------------------------------------------------------------------------------------


def select_format(target: Path, source: "Checkpoint", *, named: bool, weights_only: bool | None = None) -> "FileFormat":
    """Return the format of the output: the one of its suffix if the user `named` it, else the format of the source.

    Args:
        weights_only: whether only the weights are written; None for a command that has no such option.

    Raises:
        CheckpointError: that format cannot store what the source contains.
    """
    from normswap.checkpoints.formats.formats import FOLDERS, check_suffix

    check_suffix(target)
    if source.file_format == "exported program":
        _check_program(target, source)
    if source.program is not None:
        return "exported program"
    if target.suffix == ".safetensors":
        _check_safetensors(target, source, weights_only)
        return "safetensors"
    if source.file_format in FOLDERS and target.suffix not in _FILE_SUFFIXES:
        return source.file_format
    return "safetensors" if not named and source.file_format == "safetensors" else "torch zip"


def _check_program(target: Path, source: "Checkpoint") -> None:
    if source.program is not None and target.suffix != _PROGRAM_SUFFIX:
        raise CheckpointError(
            f"{target}: expected a name that ends in {_PROGRAM_SUFFIX} for an exported program: choose "
            f"output='NAME{_PROGRAM_SUFFIX}', or convert only its weights by passing architecture="
        )
    if source.program is None and target.suffix == _PROGRAM_SUFFIX:
        raise CheckpointError(
            f"{target}: {_PROGRAM_SUFFIX} is for exported programs, but only weights are written: choose "
            "output='NAME.pt', or convert the program with trust=True and without architecture=, if you trust the "
            "source of the file"
        )


def _check_safetensors(target: Path, source: "Checkpoint", weights_only: bool | None) -> None:
    if source.payload == "module":
        raise CheckpointError(f"{target}: safetensors cannot store a pickled module: choose output='NAME.pt'")
    others = source.other_entries
    if others and not weights_only:
        hint = "" if weights_only is None else ", or drop them with weights_only=True"
        raise CheckpointError(
            f"{target}: safetensors stores tensors only, and this file also contains {', '.join(others)}: choose "
            f"output='NAME.pt'{hint}"
        )


# --- options ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NetworkOptions:
    """One network of a file to convert: its entry, its architecture and its example inputs, None for the defaults."""

    entry: str | None = None
    architecture: "Architecture | None" = None
    inputs: Any = None

    @property
    def by_names(self) -> bool:
        """Whether the tensors are converted by their names, without a model."""
        return isinstance(self.architecture, str) and self.architecture == NO_ARCHITECTURE


@dataclass(frozen=True)
class ConvertOptions:
    """The arguments of `convert_file`, checked by `check`."""

    file: Path
    output: str | Path | None = None
    networks: tuple[NetworkOptions, ...] = (NetworkOptions(),)
    swap: "SwapOptions | None" = None
    plan: "SwapPlan | None" = None
    data: Any = None
    data_name: str = "data"
    verify: bool = True
    tolerance: float | None = None
    weights_only: bool = False
    dry_run: bool = False
    trust: bool = False
    overwrite: bool = False

    @property
    def several(self) -> bool:
        """Whether several networks of the file are converted."""
        return len(self.networks) > 1

    @property
    def target(self) -> Path:
        """The output path. An exported program is written as one only if it may be loaded, else its weights are."""
        as_program = self.trust and self.networks[0].architecture is None
        return output_path(self.file, self.output, "normswap", as_program=as_program)

    def check(self) -> None:
        """Refuse arguments that exclude each other, and paths that cannot be read or written.

        Raises:
            ArgumentError, PlanError: two arguments exclude each other.
            CheckpointError: the file is missing, or the output cannot be written.
        """
        if not self.networks:
            raise ArgumentError("entry: expected at least one, got an empty list")
        swap = self._changed_swap_options()
        if self.plan is not None and swap:
            raise PlanError(f"plan= already decides which sites are swapped and how: leave {_list_arguments(swap)} out")
        if self.data is not None and swap.get("match") is False and not swap.keys() & {"start", "settings"}:
            raise ArgumentError("data= has no effect with match=False and without start=: leave one of them out")
        if not self.verify and self.tolerance is not None:
            raise ArgumentError("tolerance= has no effect with verify=False: leave one of them out")
        for network in self.networks:
            excluded = self.needing_model(network) if network.by_names else {}
            if excluded:
                raise ArgumentError(
                    f"architecture='none' converts tensors by their names only: leave {_list_arguments(excluded)} out"
                )
        if self.several:
            self._check_several()
        check_readable(self.file)
        # A dry run fails for what would make the real run fail.
        check_output(self.file, self.target, overwrite=self.overwrite)

    def needing_model(self, network: NetworkOptions) -> dict[str, Any]:
        """Return the given arguments that have no meaning without a model."""
        given = {"example_inputs": network.inputs, "plan": self.plan, "data": self.data}
        given |= self._changed_swap_options()
        return {name: value for name, value in given.items() if value is not None and name not in _BY_NAMES_OPTIONS}

    def _changed_swap_options(self) -> dict[str, Any]:
        """The swap options that differ from their defaults, by name."""
        if self.swap is None:
            return {}
        values = {each.name: getattr(self.swap, each.name) for each in fields(self.swap)}
        return {name: value for name, value in values.items() if value != getattr(type(self.swap)(), name)}

    def _check_several(self) -> None:
        entries = [network.entry for network in self.networks]
        duplicate = next((name for name in entries if entries.count(name) > 1), None)
        if duplicate is not None:
            raise ArgumentError(f"entry={duplicate!r} is given twice: name each network once")
        for name in ("plan", "weights_only"):
            if getattr(self, name):
                raise ArgumentError(f"{name}= applies to one network: pass one entry=")


def _list_arguments(names: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}=" for name in names)


# --- writing ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OutputWriter:
    """Writes one converted network with the rest of its file.

    Attributes:
        options: the arguments of `convert_file`.
        network: the arguments that concern this network.
        source: the content of the source, with this network selected.
        weights: the converted network.
        file_format: the format of the output.
        digest: the SHA-256 of the source; None if nothing is written.
    """

    options: ConvertOptions
    network: NetworkOptions
    source: "Checkpoint"
    weights: "ConvertedWeights"
    file_format: "FileFormat"
    digest: "Future[str] | None"

    @property
    def notes(self) -> tuple[str, ...]:
        """What happened to tensors that the model does not have, to a graph, and to the other files in the folder."""
        graph_note = (
            "the program: left out, only its weights are converted (trust=True without architecture= converts all)"
        )
        left_out = (
            (graph_note,) if self.source.file_format == "exported program" and self.source.program is None else ()
        )
        return (*self.weights.notes, *self._sidecar_files.notes, *left_out)

    def prepare_content(self, content: Any, progress: Progress) -> Any:
        """Return what is written for a converted content: the content, or the converted program, exported again.

        Raises:
            SwapError: the program cannot be exported again.
        """
        if self.source.program is None or self.weights.module is None:
            return content
        from normswap.surgery.graphs.exported_program import reexport

        with progress("exporting the converted program"):
            program = reexport(self.source.program.program, self.weights.module, self.weights.inputs)
        return self.source.program._replace(program=program)

    def write(self, content: Any, progress: Progress) -> float | None:
        """Write what `prepare_content` returned, read it back and compare.

        Returns:
            How far the outputs of a program that was read back differ from the original; None for other files.

        Raises:
            CheckpointError, SwapError: it cannot be written, or what was read back differs.
        """
        from normswap.checkpoints.saving import read_notes, write_content, write_program

        origin = self.source.origin
        with progress(f"writing {self.options.target.name}"):
            record = self.record()
            if self.source.program is not None:
                # A network that starts without `bn` is compared with itself, since it computes another function.
                original = content.program if self.weights.distance else self.source.program.program
                return write_program(
                    content, original, self.options.target, record, inputs=self.weights.inputs, source=origin
                )
            write_content(
                content,
                self.options.target,
                self.file_format,
                record,
                template=origin.copy if origin.copy.is_dir() else None,
                sidecar_files=self._sidecar_files.files,
                source=origin,
                notes=read_notes(self.source),
            )
        return None

    @cached_property
    def _sidecar_files(self) -> "SidecarFiles":
        """The further files of a Trainer's folder, if the output is a folder too."""
        from normswap.checkpoints.content.hf_trainer import SidecarFiles, trainer_state
        from normswap.checkpoints.converted_content import find_networks
        from normswap.checkpoints.formats.formats import FOLDERS

        if self.options.weights_only or self.file_format not in FOLDERS:
            return SidecarFiles({}, ())
        origin = self.source.origin
        networks = find_networks(self.source, self.weights.names, self.weights.new)
        found = trainer_state(origin.copy, networks)
        return found._replace(notes=tuple(map(origin.replace_copy_path, found.notes)))

    def _uses_data(self) -> bool:
        """Whether branches were matched to data."""
        return self.options.data is not None and any(swap.matched for swap in self.weights.plan.swaps)

    def record(self) -> "Record":
        """Return the record of the output: this network, and the networks that were converted before."""
        from normswap.checkpoints.architecture.efficientnet_pytorch import LAYOUT, describe_names
        from normswap.checkpoints.architecture.registry import make_folder_relative
        from normswap.checkpoints.formats.formats import FOLDERS
        from normswap.checkpoints.record import Record, Step
        from normswap.checkpoints.saving import stored_as

        source, weights = self.source, self.weights
        named = weights.architecture
        digest = self.digest.result() if self.digest else None
        networks = source.record.networks if source.record and not self.options.weights_only else {}
        details = (
            *((source.contents.entry,) if (networks or self.options.several) and source.contents.entry else ()),
            *(() if weights.verification or weights.distance or source.program is not None else ("not verified",)),
            *((f"matched to {self.options.data_name}",) if self._uses_data() else ()),
            *((f"names of {LAYOUT} mapped to timm's",) if describe_names(weights.names.rename) else ()),
        )
        step = Step.now("converted", source=self.options.file.name, sha256=digest, detail=", ".join(details) or None)
        return Record(
            payload=source.payload,
            architecture=make_folder_relative(named, source.path) if self.file_format in FOLDERS else named,
            plan=weights.plan,
            verification=weights.verification,
            distance=weights.distance,
            history=(*(source.record.history if source.record else ()), step),
            originals=weights.originals,
            entry=None if self.options.weights_only else source.contents.entry or None,
            stored_as=stored_as(weights.names, weights.plan),
            networks=networks,
        )

    def load_arguments(self) -> tuple[str, ...]:
        """Return the arguments of `load` for the output, as Python code."""
        from normswap.checkpoints.formats.formats import needs_trust

        source, architecture, target = self.source, self.weights.architecture, self.options.target
        arguments = []
        if architecture is None and source.payload == "state dict":
            arguments.append("architecture=your_model")
        elif architecture is not None and not architecture.startswith(_KNOWN_ZOOS):
            in_same_folder = target.is_dir() and architecture == f"hf:{source.path}"
            arguments += [] if in_same_folder else [f'architecture="{architecture}"']
        several = (source.record is not None and source.record.networks) or self.options.several
        if several and self.network.entry is not None:
            arguments.append(f'entry="{self.network.entry}"')
        if source.payload != "state dict" or (self.options.trust and needs_trust(target)):
            arguments.append("trust=True")
        return tuple(arguments)


# --- refusals ---------------------------------------------------------------------------------------------------------


def unverifiable(reason: str, remedy: str) -> ArchitectureError:
    """Return the error for a conversion that cannot be verified, with what to pass."""
    return ArchitectureError(
        f"nothing written: {reason}, so the conversion cannot be verified: pass {remedy}, or verify=False to write it "
        "unverified"
    )


def require_verified(plan: "SwapPlan", verification: "Verification | None") -> None:
    """Refuse a conversion whose verification failed; None was not asked for.

    Raises:
        NothingToDo: the converted model computes another function.
    """
    if verification is not None and not verification.passed:
        difference = describe_difference(plan, verification)
        raise NothingToDo(f"nothing written: {difference}, or pass verify=False to write it anyway")


def describe_difference(
    plan: "SwapPlan", verification: "Verification", *, simplex: str = "gate='simplex'", exclude: str = "exclude="
) -> str:
    """Return why a verification failed, and which argument of the conversion to change.

    Args:
        plan: of the conversion.
        verification: one that failed.
        simplex, exclude: how the caller's user writes these two arguments.
    """
    if any(swap.gate == "softmax" for swap in plan.swaps):
        return f"softmax gates start at the uniform mix, which is another function: use {simplex}"
    failed = ", ".join(check.name for check in verification.checks if check.passed is False) or "see the notes"
    return f"the converted model does not compute the same function ({failed}): {exclude} the sites that differ most"


def describe_nothing_to_swap(plan: "SwapPlan") -> str:
    """Return why a plan swaps nothing."""
    if not plan.skips:
        return f"no norm sites in this model ({plan.model_class}): nothing to convert"
    reasons = Counter(skip.reason for skip in plan.skips)
    summary = "; ".join(f"{count} x {reason}" for reason, count in reasons.most_common(3))
    return f"none of the {len(plan.skips)} norm sites can be converted: {summary}"
