"""`push_to_hub`: a converted file and its model card in a repository on the Hugging Face Hub, in one commit."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import nn

from normswap.checkpoints.saving import save
from normswap.errors import ArgumentError, CheckpointError
from normswap.integrations.model_card import write_model_card
from normswap.text import first_line

_CARD = "README.md"


def push_to_hub(
    source: str | Path | nn.Module,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    metadata: Mapping[str, Any] | None = None,
    commit_message: str = "Upload a network converted by normswap",
    revision: str | None = None,
    create_pr: bool = False,
    **saved: Any,
) -> str:
    """Upload a converted file with a model card to the Hugging Face Hub: `normswap.push_to_hub("sn.pt", "user/name")`.

    The card is written from the record in the file (`normswap.write_model_card`) and replaces a `README.md` of the
    repository, which is created if it does not exist.

    Args:
        source: a converted file, a folder of shards, or a converted model, which is saved as `model.safetensors`.
        repo_id: the repository, such as `"user/name"`.
        private: whether a new repository is private; default: as the account is set.
        token: an access token; default: that of `hf auth login`.
        metadata: more metadata of the card, as in `normswap.write_model_card`.
        commit_message, revision, create_pr: the message and the branch of the commit, or whether to open a pull request
            with it.
        saved: for a model, arguments of `normswap.save`: `plan`, and so that others can load it `architecture`.

    Returns:
        The address of the commit, or of the pull request.

    Raises:
        ArgumentError: arguments of `save` without a model; a value in `metadata` is none that a card can have.
        CheckpointError: the file cannot be read, or the Hub cannot be reached or refuses the upload.
        NothingToDo: the file has no converted sites.
        PlanError: the plan is missing, or is not the plan of this model.

    Examples:
        >>> import torch, normswap
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
        >>> result = normswap.convert(model, torch.randn(2, 3, 16, 16))
        >>> normswap.save(result.model, "sn.pt", plan=result.plan)
        >>> normswap.push_to_hub("sn.pt", "me/sn", plan=result.plan)  # the file contains its plan
        Traceback (most recent call last):
        normswap.ArgumentError: plan: for a model only, and the source is a file: remove it
    """
    commit: dict[str, Any] = {"commit_message": commit_message, "revision": revision, "create_pr": create_pr}
    if isinstance(source, nn.Module):
        with TemporaryDirectory() as folder:
            file = Path(folder) / "model.safetensors"
            save(source, file, **saved)
            return push_to_hub(file, repo_id, private=private, token=token, metadata=metadata, **commit)
    if saved:
        raise ArgumentError(f"{', '.join(saved)}: for a model only, and the source is a file: remove it")
    card = write_model_card(source, repo_id=repo_id, metadata=metadata)
    files: dict[str, Path | bytes] = {**dict(_named_files(Path(source))), _CARD: card.encode()}
    return _upload(files, repo_id, private=private, token=token, commit=commit)


def _named_files(source: Path) -> Iterator[tuple[str, Path]]:
    """Yield a file, or the files of a folder except hidden ones and its card, with their names in the repository."""
    if source.is_file():
        yield source.name, source
        return
    for path in sorted(source.rglob("*")):
        name = path.relative_to(source)
        if path.is_file() and name != Path(_CARD) and not any(part.startswith(".") for part in name.parts):
            yield name.as_posix(), path


def _upload(
    files: Mapping[str, Path | bytes], repo_id: str, *, private: bool | None, token: str | None, commit: dict[str, Any]
) -> str:
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    unreachable: Any = HfHubHTTPError.__mro__[
        1
    ]  # the base class of errors in the HTTP client that the Hub's library uses

    operations = [
        huggingface_hub.CommitOperationAdd(path_in_repo=name, path_or_fileobj=content)
        for name, content in files.items()
    ]
    api = huggingface_hub.HfApi(token=token)
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        done = api.create_commit(repo_id, operations, **commit)
    except (unreachable, HFValidationError, OSError) as error:  # OSError: no connection, offline mode, no token
        raise CheckpointError(
            f"{repo_id}: nothing was uploaded ({type(error).__name__}: {first_line(error)}): check the name, the "
            "connection and the token (hf auth login)"
        ) from error
    return str(done.pr_url or done.commit_url)
