"""What `normswap convert` writes, and how: a content with its record, or a program exported again."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from normswap.cli.progress import stage
from normswap.cli.wish import ConvertOptions

if TYPE_CHECKING:
    from concurrent.futures import Future

    from rich.console import Console
    from torch import nn

    from normswap.checkpoints.content.hf_trainer import SidecarFiles
    from normswap.checkpoints.content.key_prefixes import StoredNames
    from normswap.checkpoints.converted_content import AddedState
    from normswap.checkpoints.formats.formats import Container
    from normswap.checkpoints.loading import Checkpoint
    from normswap.checkpoints.record import OriginalNorm, Record
    from normswap.surgery.plan import SwapPlan
    from normswap.verification.equivalence import Verification


@dataclass(frozen=True)
class ConvertedWeights:
    """A conversion on its way into a file: what it adds, under which names, what the sites were, the proof, and the
    inputs it was made on; `module` if the file holds one, `notes` on what file and model do not share.
    """

    plan: "SwapPlan"
    names: "StoredNames"
    new: "AddedState"
    architecture: str | None = None
    module: "nn.Module | None" = None
    originals: Mapping[str, "OriginalNorm"] = field(default_factory=dict)
    verification: "Verification | None" = None
    inputs: Any = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class OutputWriter:
    """A result, the container that it is to be written as, and the SHA-256 of the source, unless nothing is written."""

    wish: ConvertOptions
    source: "Checkpoint"
    result: ConvertedWeights
    container: "Container"
    digest: "Future[str] | None"

    @property
    def notes(self) -> tuple[str, ...]:
        """What becomes of what the model does not have, and of what is no content: files beside it, a graph."""
        graph_note = "the program: left out, these are its weights (--trust without --arch converts its graph)"
        left_out = (graph_note,) if self.source.container == "exported program" and self.source.program is None else ()
        return (*self.result.notes, *self._sidecar_files.notes, *left_out)

    def prepare_content(self, content: Any) -> Any:
        """Return what is to be written of a converted content: itself, or the converted program exported again.

        Raises:
            SwapError: it cannot be exported again.
        """
        if self.source.program is None or self.result.module is None:
            return content
        from normswap.surgery.graphs.exported_program import reexport

        with stage("exporting the converted program"):
            program = reexport(self.source.program.program, self.result.module, self.result.inputs)
        return self.source.program._replace(program=program)

    def write(self, content: Any, console: "Console") -> None:
        """Write what `final` returned, read it back and compare.

        Raises:
            CheckpointError, SwapError: it cannot be written, or what is read back differs.
        """
        from normswap.checkpoints.saving import read_notes, write_content, write_program
        from normswap.reports.tables import read_back_line

        source, target = self.source, self.wish.target
        with stage(f"writing {target.name}"):
            record = self.record()
            if source.program is not None:
                inputs, original = self.result.inputs, source.program.program
                error = write_program(content, original, target, record, inputs=inputs, source=source.origin)
                console.print(read_back_line(error))
            else:
                origin, sidecar_files = source.origin, self._sidecar_files.files
                template = origin.copy if origin.copy.is_dir() else None
                notes = read_notes(source)
                write_content(
                    content,
                    target,
                    self.container,
                    record,
                    template=template,
                    sidecar_files=sidecar_files,
                    source=origin,
                    notes=notes,
                )

    @cached_property
    def _sidecar_files(self) -> "SidecarFiles":
        """What a trainer keeps in further files of a folder, where the output is one that has a place for it."""
        from normswap.checkpoints.content.hf_trainer import SidecarFiles, trainer_state
        from normswap.checkpoints.converted_content import find_networks
        from normswap.checkpoints.formats.formats import FOLDERS

        if self.wish.weights_only or self.container not in FOLDERS:
            return SidecarFiles({}, ())
        origin = self.source.origin
        networks = find_networks(self.source, self.result.names, self.result.new)
        found = trainer_state(origin.copy, networks)
        return found._replace(notes=tuple(map(origin.replace_copy_path, found.notes)))

    def record(self) -> "Record":
        """Return what the file says of its converted network, and of those that were converted before."""
        from normswap.checkpoints.architecture.registry import make_folder_relative
        from normswap.checkpoints.formats.formats import FOLDERS
        from normswap.checkpoints.record import Record, Step
        from normswap.checkpoints.saving import stored_as

        source, result = self.source, self.result
        named = result.architecture
        digest = self.digest.result() if self.digest else None
        networks = source.record.networks if source.record and not self.wish.weights_only else {}
        several = networks or self.wish.is_one_of_several_entries
        details = (
            *((source.contents.entry,) if several and source.contents.entry else ()),
            *(() if result.verification or source.program is not None else ("not verified",)),
        )
        detail = ", ".join(details) or None
        step = Step.now("converted", source=self.wish.file.name, sha256=digest, detail=detail)
        return Record(
            payload=source.payload,
            architecture=make_folder_relative(named, source.path) if self.container in FOLDERS else named,
            plan=result.plan,
            verification=result.verification,
            history=(*(source.record.history if source.record else ()), step),
            originals=result.originals,
            entry=None if self.wish.weights_only else source.contents.entry or None,
            stored_as=stored_as(result.names, result.plan),
            networks=networks,
        )
