"""convert_file: converts a checkpoint file into a new file, as the command `normswap convert` does.

Plan, convert, verify, convert the other entries of the file (EMA copies, optimizers, schedulers), write, read back and
compare. A conversion that cannot be verified, or that changes the function, is not written unless `verify=False`.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from torch import nn

from normswap.checkpoints.content.entries import read_named_entries
from normswap.checkpoints.content.key_prefixes import names_with_prefix
from normswap.checkpoints.content.state_dict import check_running_stats, initial_gates, plan_from_names
from normswap.checkpoints.converted_content import (
    AddedState,
    ConvertedWeights,
    collect_added_state,
    convert_file_content,
    merge_notes,
)
from normswap.checkpoints.file_output import (
    ConvertOptions,
    NetworkOptions,
    OutputWriter,
    Progress,
    copy_folder,
    describe_nothing_to_swap,
    require_verified,
    select_format,
    unverifiable,
)
from normswap.checkpoints.io.memory import keep_freed_memory
from normswap.checkpoints.loading import Architecture, OpenedModel, open_model
from normswap.checkpoints.reading import Checkpoint, file_size, read_checkpoint, read_header, select_entry
from normswap.checkpoints.record import Record
from normswap.checkpoints.saving import originals, sha256_in_background
from normswap.errors import ArchitectureError, ArgumentError, CheckpointError, NothingToDo
from normswap.layers.gating import BnStatistics, Gate
from normswap.surgery.arguments import list_batches, read_path, require_type
from normswap.surgery.conversion import Conversion, convert
from normswap.surgery.discovery.whole_model import Observation
from normswap.surgery.graphs.exported_program import program_module
from normswap.surgery.module_tree import copy_sharing_parameters
from normswap.surgery.plan import SwapPlan, require_plan
from normswap.surgery.planning import plan_and_observe
from normswap.surgery.selection import SiteFilter, Start, SwapOptions, choose_options
from normswap.text import pluralize, printable_as
from normswap.verification.distance import Distance, measure_distance
from normswap.verification.equivalence import Verification, check_tolerance, verify, verify_in_place
from normswap.verification.fast_comparison import verify_fast

# --- results ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NetworkConversion:
    """One converted network of a file.

    Attributes:
        entry: its entry in the file, None for the only network.
        description: what the file contains: kind of content, format, architecture, size.
        architecture: the name that builds it, None if unknown.
        plan: the decision for every norm site.
        verification: the measured differences, None if nothing was measured.
        distance: the distance from the original, in place of `verification` if the network starts without `bn`.
        unverified: why nothing was measured.
        already_converted: whether the plan is that of an earlier conversion, which leaves nothing to do.
    """

    entry: str | None
    description: str
    architecture: str | None
    plan: SwapPlan
    verification: Verification | None = None
    distance: Distance | None = None
    unverified: str | None = None
    already_converted: bool = False


@printable_as("file_conversion")
@dataclass(frozen=True, repr=False)
class FileConversion:
    """The result of `convert_file`; `print` shows it as the tables of `normswap convert`.

    Attributes:
        file: the file that was converted.
        output: the path of the new file.
        networks: the converted networks; one, unless several entries were converted.
        notes: what happened to the other entries of the file, a line each.
        written: whether the new file was written.
        bytes: its size.
        read_back_error: how far an exported program that was read back differs from the original (relative L2).
        load_arguments: what `load` needs for the new file, as Python code.
        several: whether several entries were named.

    Examples:
        >>> import torch, normswap
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
        >>> torch.save(model.state_dict(), "bn.pt")
        >>> x = torch.randn(2, 3, 16, 16)
        >>> result = normswap.convert_file("bn.pt", architecture=model, example_inputs=x)
        >>> result.output.name, result.written, len(result.plan.swaps)
        ('bn.normswap.pt', True, 1)
    """

    __module__ = "normswap"

    file: Path
    output: Path
    networks: tuple[NetworkConversion, ...] = ()
    notes: tuple[str, ...] = ()
    written: bool = False
    bytes: int | None = None
    read_back_error: float | None = None
    load_arguments: tuple[str, ...] = ()
    several: bool = False

    @property
    def plan(self) -> SwapPlan:
        """The plan of the network, of the first one if there are several."""
        return self.networks[0].plan

    @property
    def verification(self) -> Verification | None:
        """The verification of the network, of the first one if there are several; None if nothing was measured."""
        return self.networks[0].verification

    @property
    def architecture(self) -> str | None:
        """The name that builds the network, the first one if there are several."""
        return self.networks[0].architecture

    def __repr__(self) -> str:
        swaps = pluralize(sum(len(network.plan.swaps) for network in self.networks), "swap")
        return f"FileConversion({str(self.output)!r}, {swaps}, {'written' if self.written else 'not written'})"

    def to_dict(self) -> dict[str, Any]:
        """Return the result as plain data, the JSON of `normswap convert`."""
        document: dict[str, Any] = {
            "file": str(self.file),
            "output": str(self.output) if self.written else None,
            "written": self.written,
            "verification": None,
        }
        parts = {
            network.entry: {
                "architecture": network.architecture,
                "plan": network.plan.to_dict(),
                "verification": network.verification and network.verification.to_dict(),
                **({"distance": network.distance.to_dict()} if network.distance else {}),
            }
            for network in self.networks
        }
        document |= {"networks": parts} if self.several else next(iter(parts.values()), {})
        return document | {"carried": list(self.notes)} | ({"bytes": self.bytes} if self.written else {})

    def closing_lines(self) -> tuple[str, ...]:
        """Return what was written, and the call that loads it."""
        if not self.written:
            return (f"dry run: without dry_run=True this writes {self.output}",)
        arguments = ", ".join([f'"{self.output}"', *self.load_arguments])
        size = (self.bytes or 0) / 1e6
        return (f"wrote {self.output} ({size:.1f} MB)", f"next: model = normswap.load({arguments}).model")


# --- convert_file -----------------------------------------------------------------------------------------------------


def convert_file(
    path: str | Path,
    output: str | Path | None = None,
    *,
    architecture: Architecture | Mapping[str, Architecture] | None = None,
    entry: str | Sequence[str] | None = None,
    example_inputs: Any = None,
    plan: SwapPlan | None = None,
    include: Sequence[SiteFilter] | SiteFilter | None = None,
    exclude: Sequence[SiteFilter] | SiteFilter | None = None,
    kinds: Sequence[str] | None = None,
    gate: Gate | None = None,
    bn_statistics: BnStatistics | None = None,
    synchronize: bool | None = None,
    start: Start | None = None,
    num_groups: int | None = None,
    match: bool | None = None,
    untrained: Literal["keep", "uniform"] | None = None,
    data: Iterable[Any] | Callable[[nn.Module], Iterable[Any]] | None = None,
    options: SwapOptions | None = None,
    verify: bool = True,
    tolerance: float | None = None,
    weights_only: bool = False,
    dry_run: bool = False,
    trust: bool = False,
    overwrite: bool = False,
    progress: Callable[[str], AbstractContextManager[Any] | None] | None = None,
) -> FileConversion:
    """Convert a checkpoint file into a new file, as the command `normswap convert` does.

    EMA copies of the weights are converted by the same plan. The gates are added to the state of the optimizer as a
    last parameter group, and to that of the scheduler. All other entries, and the files of a Hugging Face `Trainer`,
    are copied. The file is written only if the converted model computes the same function, and then read back. With
    `start` it computes another function; its distance from the original is measured instead and recorded.

    Args:
        path: a checkpoint: a state dict, a training checkpoint, a pickled module, an exported program, a folder of
            shards.
        output: the file to write; a name in `.safetensors` becomes that format, other names torch's. Default:
            `model.normswap.pt` next to `model.pt`, in the format of the source.
        architecture: as for `load`. `"none"` converts tensors by their names, without a model, which cannot be
            verified. With several entries a mapping from entry to architecture, or one architecture for all.
        entry: which of several sets of weights to convert, such as `"state_dict_ema"`. A list converts several
            networks of one file.
        example_inputs: as for `convert`; or a function that takes the model and returns them. With several entries a
            mapping from entry to inputs, or one for all. Default: the inputs of an exported program, or a random batch
            of the size in timm's configuration.
        plan: apply this plan of `plan_swaps` instead of making one.
        include, exclude, kinds, gate, bn_statistics, synchronize, start, num_groups, match, untrained: which sites to
            swap and how, as for `convert`.
        data: as for `convert`; or a function that takes the model and returns it. The distance is measured on it too.
        options: the same, and the other options of `convert`, as one object.
        verify: compare the converted model with the original, in float64, and write the file only if they agree.
        tolerance: the largest relative L2 difference that counts as the same function. Default: 1e-9.
        weights_only: write only the converted weights; drop optimizer, epoch and EMA.
        dry_run: do everything except writing the file.
        trust: run the code that the file names: pickled objects.
        overwrite: replace an existing output file.
        progress: called with the name of each stage, such as `print`; it may return a context manager for the stage.

    Returns:
        `FileConversion`: the output path, the plan, the verification, and what happened to the other entries.

    Raises:
        NothingToDo: the file has no norm to convert or is converted already, or the converted model computes another
            function.
        CheckpointError: the file cannot be read, or the output cannot be written or does not read back the same.
        ArchitectureError: as `load`; or the conversion cannot be verified, since no model or no input size is known.
        PlanError, ModelError, SwapError: as `convert`.
        ArgumentError: an argument is of a wrong type, or two arguments exclude each other.

    Examples:
        >>> import torch, normswap
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
        >>> torch.save({"model": model.state_dict(), "epoch": 3}, "bn.pt")
        >>> normswap.convert_file("bn.pt", "sn.pt", architecture=model, example_inputs=torch.randn(2, 3, 16, 16))
        FileConversion('sn.pt', 1 swap, written)
    """
    flags = {"verify": verify, "weights_only": weights_only, "dry_run": dry_run, "trust": trust, "overwrite": overwrite}
    for name, flag in flags.items():
        require_type(flag, bool, name, "True or False")
    if plan is not None:
        require_plan(plan)
    if progress is not None and not callable(progress):
        raise ArgumentError(f"progress: expected a function of the name of a stage, got {progress!r:.80}")
    keywords: dict[str, Any] = {"include": include, "exclude": exclude, "kinds": kinds, "gate": gate}
    keywords |= {"bn_statistics": bn_statistics, "synchronize": synchronize, "start": start, "num_groups": num_groups}
    keywords |= {"match": match, "untrained": untrained}
    arguments = ConvertOptions(
        Path(read_path(path, "path", "the name of a file or a folder")),
        None if output is None else read_path(output, "output", "the name of a file"),
        tuple(NetworkOptions(*each) for each in read_named_entries(entry, architecture, example_inputs)),
        swap=choose_options(options, keywords),
        plan=plan,
        data=data,
        data_name="data",
        tolerance=tolerance,
        **flags,
    )

    def begin(stage: str) -> AbstractContextManager[Any]:
        context = None if progress is None else progress(stage)
        return nullcontext() if context is None else context

    return run_conversion(arguments, progress=begin)


def run_conversion(
    options: ConvertOptions, *, progress: Progress, report: Callable[[FileConversion], None] = lambda result: None
) -> FileConversion:
    """Convert a file; raises as `convert_file`.

    Args:
        progress: as for `convert_file`.
        report: called with the result so far, each time more of it is known.
    """
    check_tolerance(options.tolerance)
    options.check()
    return _Run(options, progress, report).convert()


class _Run:
    """One run of `convert_file`: the options, and the result so far."""

    def __init__(self, options: ConvertOptions, progress: Progress, report: Callable[[FileConversion], None]) -> None:
        self.options, self.progress, self._report = options, progress, report
        self.result = FileConversion(options.file, options.target, several=options.several)

    def convert(self) -> FileConversion:
        """Run all stages and return the result."""
        options = self.options
        checkpoint = self._read()
        named = options.output is not None
        file_format = select_format(options.target, checkpoint, named=named, weights_only=options.weights_only)
        digest = None if options.dry_run else sha256_in_background(checkpoint.origin.copy)
        notes: tuple[str, ...] = ()
        for index, network in enumerate(options.networks):
            weights = self._convert_network(network, checkpoint)
            converted = convert_file_content(checkpoint, weights, weights_only=options.weights_only)
            writer = OutputWriter(options, network, checkpoint, weights, file_format, digest)
            notes = merge_notes(notes, (*converted.notes, *writer.notes), [each.entry for each in options.networks])
            for following in options.networks[index + 1 : index + 2]:
                checkpoint = select_entry(checkpoint, converted.content, writer.record(), following.entry or "")
        self._update(notes=notes)
        content = writer.prepare_content(converted.content, self.progress)
        if options.dry_run:  # otherwise the writer checks
            checkpoint.origin.check_unchanged()
        else:
            error = writer.write(content, self.progress)
            size, arguments = file_size(options.target), writer.load_arguments()
            self._update(written=True, bytes=size, read_back_error=error, load_arguments=arguments)
        return self.result

    def _update(self, **changes: Any) -> None:
        self.result = replace(self.result, **changes)
        self._report(self.result)

    def _update_network(self, network: NetworkConversion) -> None:
        """Add a network to the result, or replace what is known about it."""
        known = [each for each in self.result.networks if each.entry != network.entry]
        self._update(networks=(*known, network))

    def _read(self) -> Checkpoint:
        """Read the file, with the first network selected."""
        options, first = self.options, self.options.networks[0]
        with self.progress("starting"):
            header = read_header(options.file, folder=copy_folder(None if options.dry_run else options.target))
        for network in options.networks:
            record = header.record
            self._refuse_converted(network, record and record.for_entry(network.entry or record.entry or ""))
        with self.progress(f"reading {header.path.name}"):
            trust = options.trust and not header.loads_weights_only(first.architecture)
            return read_checkpoint(header, trust=trust, entry=first.entry, mmap=True)

    def _refuse_converted(self, network: NetworkOptions, record: Record | None) -> None:
        if record is None or record.plan is None or not record.plan.swaps:
            return
        before = [each.entry for each in self.result.networks]
        found = NetworkConversion(network.entry, "", record.architecture, record.plan, already_converted=True)
        self._update_network(found)
        if before:
            raise NothingToDo(f"entry={network.entry!r} has the names and shapes of entry={before[0]!r}: leave it out")
        others = "" if network.entry is not None or record.entry is None else ", or name another network with entry="
        raise NothingToDo(
            f"{self.options.file}: nothing to do, {len(record.plan.swaps)} sites are converted already: to convert it "
            f"differently, convert the original file{others}"
        )

    def _convert_network(self, network: NetworkOptions, checkpoint: Checkpoint) -> ConvertedWeights:
        self._refuse_converted(network, checkpoint.record)
        if isinstance(checkpoint.weights, Mapping):
            check_running_stats(checkpoint.weights, name=str(checkpoint.path))
        convert_weights = self._convert_by_names if network.by_names else self._convert_with_model
        return convert_weights(network, checkpoint)

    def _convert_with_model(self, options: NetworkOptions, checkpoint: Checkpoint) -> ConvertedWeights:
        """Build the model, convert it, and compare it with the original."""
        opened = self._open_model(options, checkpoint)
        with self.progress("finding norm sites"):
            plan, observation = self.options.plan, None
            if plan is None:
                swap = choose_options(self.options.swap, {})
                plan, observation = plan_and_observe(opened.model, opened.inputs, swap)
        network = self._report_plan(options, checkpoint, plan, opened.architecture)
        if self.options.verify and opened.inputs is None:
            raise unverifiable("the input size is unknown", "example_inputs=torch.randn(2, 3, 224, 224)")
        with self.progress("converting"):
            # A model that is built here is not used otherwise: both models share its parameters.
            built_here, model = checkpoint.payload == "state dict", opened.model
            if checkpoint.program is not None:  # a copy of its graph would turn constants into buffers
                model = program_module(checkpoint.program.program)
            elif built_here:
                model = copy_sharing_parameters(opened.model)
            data = self.options.data(model) if callable(self.options.data) else self.options.data
            data = None if data is None else list_batches(data, "data")
            conversion = convert(model, plan=plan, inplace=checkpoint.payload != "module", data=data)
        new = collect_added_state(opened.model.state_dict(), conversion.model)
        replaced = originals(conversion.model, plan)
        verification, distance = self._compare(opened, conversion, data, observation, in_place=built_here)
        found: dict[str, Any] = {"verification": verification, "distance": distance}
        self._update_network(replace(network, **found, unverified=None if any(found.values()) else "verify=False"))
        require_verified(plan, verification)
        return ConvertedWeights(
            plan,
            opened.built.names,
            new,
            opened.architecture,
            module=None if built_here else conversion.model,
            originals=replaced,
            inputs=opened.inputs,
            notes=opened.notes(opened.architecture or plan.model_class),
            **found,
        )

    def _open_model(self, options: NetworkOptions, checkpoint: Checkpoint) -> OpenedModel:
        try:
            with self.progress("building the model"):
                return open_model(checkpoint, options.architecture, inputs=options.inputs, trust=self.options.trust)
        except ArchitectureError as error:
            if error.convertible_by_names and not self.options.needing_model(options):
                hint = "or convert the tensors by their names: architecture='none', verify=False"
                raise type(error)(f"{error}; {hint}") from error
            raise

    def _compare(
        self,
        opened: OpenedModel,
        conversion: Conversion,
        data: Sequence[Any] | None,
        observation: Observation | None,
        *,
        in_place: bool,
    ) -> tuple[Verification | None, Distance | None]:
        """The verification, or the distance of a network that starts without `bn`."""
        if not self.options.verify:
            return None, None
        models = opened.model, conversion.model
        if any(swap.start for swap in conversion.plan.swaps):
            with self.progress("measuring the distance from the original"):
                return None, measure_distance(*models, data or [opened.inputs])
        planned = {swap.fqn: swap.bn_statistics for swap in conversion.plan.swaps}
        arguments: Any = {"bn_statistics": planned, "progress": lambda check: self.progress(f"comparing: {check}")}
        verification = None
        if self.options.tolerance is None:
            with keep_freed_memory():
                verification = verify_fast(*models, opened.inputs, observation=observation, **arguments)
        if verification is None:
            compare = verify_in_place if in_place else verify
            verification = compare(*models, [opened.inputs], tolerance=self.options.tolerance, **arguments)
        return verification, None

    def _convert_by_names(self, options: NetworkOptions, checkpoint: Checkpoint) -> ConvertedWeights:
        """Convert the tensors by their names, without a model."""
        stored, file = checkpoint.weights, self.options.file
        if not isinstance(stored, Mapping):
            raise CheckpointError(f"{file}: a pickled module includes its architecture: leave architecture='none' out")
        names = names_with_prefix(stored, checkpoint.contents.prefix)
        state = {name: stored[key] for name, key in names.stored.items()}
        swap = self.options.swap or SwapOptions()
        chosen: Any = {name: getattr(swap, name) for name in ("include", "exclude", "bn_statistics", "match")}
        plan = plan_from_names(state, **chosen)
        network = self._report_plan(options, checkpoint, plan, None)
        if self.options.verify:
            remedy = "architecture='path/file.py:function' or 'timm:NAME'"
            raise unverifiable("with architecture='none' there is no model to run", remedy)
        self._update_network(replace(network, unverified="without an architecture there is no model to run"))
        gates = initial_gates(plan)
        return ConvertedWeights(plan, names, AddedState(gates, {}, tuple(gates)))

    def _report_plan(
        self, options: NetworkOptions, checkpoint: Checkpoint, plan: SwapPlan, architecture: str | None
    ) -> NetworkConversion:
        description = checkpoint.describe("by tensor names" if options.by_names else architecture)
        network = NetworkConversion(options.entry, description, architecture, plan)
        self._update_network(network)
        if not plan.swaps:
            raise NothingToDo(describe_nothing_to_swap(plan))
        return network
