"""Model cards of the Hugging Face Hub: what the record of a converted file contains, for those who find it there."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from normswap.checkpoints.io.atomic_files import atomic_write, check_writable
from normswap.errors import ArgumentError
from normswap.reports.file_report import Report, read_report
from normswap.text import first_line, pluralize

_TAGS = ("normswap", "pytorch", "switchable-normalization")
_ZOOS = ("timm", "torchvision", "transformers")


def write_model_card(
    file: str | Path,
    output: str | Path | None = None,
    *,
    repo_id: str = "USER/NAME",
    metadata: Mapping[str, Any] | None = None,
    entry: str | None = None,
    trust: bool = False,
    overwrite: bool = False,
) -> str:
    """Return the model card of a converted file, and write it if `output` is given.

    The card says how to load the file, and shows what `normswap report` shows: plan, verification, history and
    importance weights. Everything is read from the file. Nothing is sent to the Hub.

    Args:
        file: a converted file, or a folder of shards.
        output: the Markdown file to write, such as `README.md`.
        repo_id: the repository on the Hub that the card names.
        metadata: more metadata of the card, such as `{"license": "apache-2.0", "datasets": ["imagenet-1k"]}`. A list of
            `tags` is added to those of normswap.
        entry: which of several converted networks in the file.
        trust: unpickle objects that run code.
        overwrite: replace an existing `output`.

    Returns:
        The card: metadata as YAML, and Markdown.

    Raises:
        CheckpointError: `file` cannot be read, or `output` not written.
        NothingToDo: the file has no converted sites.
        ArgumentError: a value in `metadata` is none that a card can have.

    Examples:
        >>> import torch, normswap
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
        >>> result = normswap.convert(model, torch.randn(2, 3, 16, 16))
        >>> normswap.save(result.model, "sn.pt", plan=result.plan)
        >>> card = normswap.write_model_card("sn.pt", repo_id="me/sn", metadata={"license": "mit"})
        >>> card.splitlines()[:3]
        ['---', 'library_name: normswap', 'license: mit']
    """
    if output is not None:
        check_writable(Path(output), replace=overwrite)
    report = replace(read_report(file, entry=entry, trust=trust), file=Path(file).name)
    sections = (
        f"---\n{_metadata(report, metadata or {})}\n---",
        f"# {repo_id.rpartition('/')[2]}",
        _summary(report),
        f"## Use\n\n```python\n{_loading(Path(file), repo_id, report)}\n```",
        *([f"## Plan\n\n```text\n{report.plan}\n```"] if report.plan else []),
        f"## Report\n\n```text\n{report}\n```",
    )
    card = "\n\n".join(sections) + "\n"
    if output is not None:
        with atomic_write(Path(output)) as temporary:
            temporary.write_text(card, encoding="utf-8")
    return card


def _metadata(report: Report, metadata: Mapping[str, Any]) -> str:
    """Return the metadata of a card as YAML."""
    from huggingface_hub import ModelCard, ModelCardData

    zoo = (report.architecture or "").partition(":")[0]
    own = [*_TAGS, *([zoo] if zoo in _ZOOS else [])]
    tags = metadata.get("tags") or []
    if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
        raise ArgumentError(f"metadata: expected a list of strings as tags, got {tags!r}")
    values = {"library_name": "normswap", **metadata, "tags": list(dict.fromkeys((*own, *tags)))}
    try:
        text: str = ModelCardData(**values).to_yaml()
        ModelCard(f"---\n{text}\n---\n")  # as the Hub reads it
    except Exception as error:  # the library and its YAML writer raise many classes
        raise ArgumentError(f"metadata: not the metadata of a model card: {first_line(error)}") from error
    return text


def _summary(report: Report) -> str:
    """Return a paragraph: what the file is, and whether it was compared with the original."""
    name = f"`{report.architecture}`" if report.architecture else "A network"
    sites = pluralize(len(report.sites), "site")
    skips = f" ({pluralize(len(report.skips), 'norm')} stayed)" if report.skips else ""
    compared = {
        None: "The file has no record of a comparison with the original network.",
        True: "When it was converted, it computed the function of the original network (see the report).",
        False: "When it was converted, it did not compute the function of the original network (see the report).",
    }[None if report.verification is None else report.verification.passed]
    return f"{name}, converted by normswap to Switchable Normalization at {sites}{skips}. {compared}"


def _loading(file: Path, repo_id: str, report: Report) -> str:
    """Return the code that loads the model from the Hub."""
    function, argument = ("snapshot_download", "") if file.is_dir() else ("hf_hub_download", f', "{file.name}"')
    given = "" if report.architecture or file.is_dir() else ", architecture=build_model"
    lines = (
        *(["# build_model: a function that returns the original network"] if given else []),
        f"import normswap\nfrom huggingface_hub import {function}\n",
        f'model = normswap.load({function}("{repo_id}"{argument}){given}).model',
    )
    return "\n".join(lines)
