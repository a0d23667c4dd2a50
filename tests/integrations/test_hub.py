"""Model cards and uploads; the Hub is replaced by a folder."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import timm
import torch
from torch import nn

import normswap

X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def converted() -> tuple[nn.Module, normswap.Conversion]:
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=3).eval()
    return model, normswap.convert(model, X, exclude=["layer1.*"])


@pytest.fixture
def file(tmp_path: Path, converted: tuple[nn.Module, normswap.Conversion]) -> Path:
    model, conversion = converted
    verification = normswap.verify(model, conversion.model, [X])
    path = tmp_path / "sn.safetensors"
    options: dict[str, Any] = {"plan": conversion.plan, "verification": verification}
    normswap.save(conversion.model, path, architecture="timm:test_resnet,num_classes=3", **options)
    return path


class Hub:
    """Stores commits as folders, with the calls of `HfApi` that an upload needs."""

    def __init__(self, folder: Path, error: Exception | None = None) -> None:
        self.folder, self.error = folder, error
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def __call__(self, token: str | None = None) -> "Hub":
        self.calls.append(("login", {"token": token}))
        return self

    def create_repo(self, repo_id: str, **options: Any) -> None:
        if self.error is not None:
            raise self.error
        self.calls.append(("create_repo", {"repo_id": repo_id, **options}))

    def create_commit(self, repo_id: str, operations: list[Any], **options: Any) -> Any:
        self.calls.append(("create_commit", {"repo_id": repo_id, **options}))
        for operation in operations:
            path = self.folder / operation.path_in_repo
            path.parent.mkdir(parents=True, exist_ok=True)
            with operation.as_file() as content:
                path.write_bytes(content.read())
        return SimpleNamespace(pr_url=None, commit_url=f"https://hub/{repo_id}/commit/1")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "HfApi", hub)
    return hub


# --- cards ------------------------------------------------------------------------------------------------------------


def test_the_metadata_of_a_card_is_read_by_the_hub_library(file: Path) -> None:
    extra = {"license": "mit", "tags": ["birds", "timm"], "datasets": ["imagenet-1k"]}
    card = huggingface_hub.ModelCard(normswap.write_model_card(file, repo_id="me/sn", metadata=extra))
    data = card.data.to_dict()
    assert data["library_name"] == "normswap"
    assert data["tags"] == ["normswap", "pytorch", "switchable-normalization", "timm", "birds"]
    assert (data["license"], data["datasets"]) == ("mit", ["imagenet-1k"])
    assert card.text.strip().startswith("# sn\n")


def test_a_card_shows_what_the_record_contains(file: Path, converted: tuple[nn.Module, normswap.Conversion]) -> None:
    text = normswap.write_model_card(file)
    report = normswap.read_report(file)
    sites, skips = len(converted[1].plan.swaps), len(converted[1].plan.skips)
    assert (
        f"`timm:test_resnet,num_classes=3`, converted by normswap to Switchable Normalization at {sites} sites" in text
    )
    assert f"({skips} norms stayed). When it was converted, it computed the function" in text
    for part in (report.plan, "Verification", "History", "Importance weights", "outputs in evaluation"):
        assert str(part) in text
    assert all(site.fqn in text for site in report.sites)
    assert str(file.parent) not in text


def test_a_card_says_if_nothing_was_compared_or_the_comparison_failed(file: Path, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    done = normswap.convert(model, X)
    other = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    for verification, expected in (
        (
            None,
            "A network, converted by normswap to Switchable Normalization at 1 site. The file has no record",
        ),
        (normswap.verify(other, done.model, [X]), "it did not compute the function of the original network"),
    ):
        normswap.save(done.model, tmp_path / "own.pt", plan=done.plan, verification=verification)
        assert expected in normswap.write_model_card(tmp_path / "own.pt")


def test_the_code_in_a_card_loads_the_file(
    file: Path, monkeypatch: pytest.MonkeyPatch, converted: tuple[nn.Module, normswap.Conversion]
) -> None:
    card = normswap.write_model_card(file, repo_id="me/sn")
    code = card.partition("```python\n")[2].partition("```")[0]
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repo, name: {"me/sn": file.parent / name}[repo])
    found: dict[str, Any] = {}
    exec(code, found)
    assert torch.equal(found["model"].eval()(X), converted[1].model.eval()(X))


def test_the_code_in_a_card_names_the_architecture_that_the_file_lacks(tmp_path: Path) -> None:
    done = normswap.convert(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), X)
    normswap.save(done.model, tmp_path / "own.pt", plan=done.plan)
    text = normswap.write_model_card(tmp_path / "own.pt", repo_id="me/own")
    assert 'normswap.load(hf_hub_download("me/own", "own.pt"), architecture=build_model).model' in text


def test_a_card_is_written_once(file: Path, tmp_path: Path) -> None:
    output = tmp_path / "README.md"
    text = normswap.write_model_card(file, output)
    assert output.read_text(encoding="utf-8") == text
    with pytest.raises(normswap.CheckpointError, match="exists already"):
        normswap.write_model_card(file, output)
    assert normswap.write_model_card(file, output, overwrite=True) == text


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"tags": "birds"}, "metadata: expected a list of strings as tags, got 'birds'"),
        ({"license": object()}, "metadata: not the metadata of a model card: "),
    ],
)
def test_metadata_that_a_card_cannot_have_is_refused(file: Path, metadata: dict[str, Any], message: str) -> None:
    with pytest.raises(normswap.ArgumentError, match=message):
        normswap.write_model_card(file, metadata=metadata)


# --- uploads ----------------------------------------------------------------------------------------------------------


def test_a_file_is_uploaded_with_its_card(file: Path, hub: Hub) -> None:
    address = normswap.push_to_hub(file, "me/sn", private=True, token="hf_secret", metadata={"license": "mit"})
    assert address == "https://hub/me/sn/commit/1"
    assert [name for name, _ in hub.calls] == ["login", "create_repo", "create_commit"]
    assert hub.calls[0][1] == {"token": "hf_secret"}
    assert hub.calls[1][1] == {"repo_id": "me/sn", "private": True, "exist_ok": True}
    assert sorted(path.name for path in hub.folder.iterdir()) == ["README.md", "sn.safetensors"]
    assert (hub.folder / "sn.safetensors").read_bytes() == file.read_bytes()
    card = (hub.folder / "README.md").read_text(encoding="utf-8")
    assert card == normswap.write_model_card(file, repo_id="me/sn", metadata={"license": "mit"})
    assert "hf_secret" not in card


def test_a_model_is_saved_and_uploaded(hub: Hub, converted: tuple[nn.Module, normswap.Conversion]) -> None:
    done = converted[1]
    options: dict[str, Any] = {"plan": done.plan, "architecture": "timm:test_resnet,num_classes=3"}
    normswap.push_to_hub(done.model, "me/sn", revision="dev", create_pr=True, commit_message="Add it", **options)
    assert hub.calls[2][1] == {
        "repo_id": "me/sn", "commit_message": "Add it", "revision": "dev", "create_pr": True
    }  # fmt: skip
    loaded = normswap.load(hub.folder / "model.safetensors").model
    assert torch.equal(loaded.eval()(X), done.model.eval()(X))


@pytest.mark.filterwarnings("ignore")  # of transformers
def test_a_folder_is_uploaded_without_hidden_files(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    transformers = pytest.importorskip("transformers", reason="needs transformers")

    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    transformers.ResNetForImageClassification(config).save_pretrained(tmp_path / "bn")
    normswap.convert_file(tmp_path / "bn", tmp_path / "sn", example_inputs=X)
    (tmp_path / "sn" / ".cache").mkdir()
    (tmp_path / "sn" / ".cache" / "lock").touch()
    (tmp_path / "sn" / "README.md").write_text("old")
    hub = request.getfixturevalue("hub")  # after transformers was imported, which refers to HfApi
    normswap.push_to_hub(tmp_path / "sn", "me/sn")
    expected = {path.name for path in (tmp_path / "sn").iterdir()} - {".cache"}
    assert {path.name for path in hub.folder.iterdir()} == expected
    card = (hub.folder / "README.md").read_text(encoding="utf-8")
    assert 'normswap.load(snapshot_download("me/sn")).model' in card
    assert json.loads((hub.folder / "config.json").read_text())["model_type"] == "resnet"
    assert normswap.load(hub.folder).plan is not None


def test_without_a_connection_one_line_says_what_to_do(file: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.error = ConnectionError("no route to host\nand more")
    with pytest.raises(normswap.CheckpointError) as caught:
        normswap.push_to_hub(file, "me/sn")
    assert str(caught.value) == (
        "me/sn: nothing was uploaded (ConnectionError: no route to host): check the name, the connection and the token "
        "(hf auth login)"
    )
    assert not hub.folder.exists()


def test_the_hub_library_cannot_reach_a_closed_port(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    api = huggingface_hub.HfApi

    def closed(token: str | None = None) -> huggingface_hub.HfApi:
        return api(endpoint="http://127.0.0.1:9", token=token)

    monkeypatch.setattr(huggingface_hub, "HfApi", closed)
    with pytest.raises(normswap.CheckpointError, match=r"^me/sn: nothing was uploaded \(Connect\w*Error: .*$"):
        normswap.push_to_hub(file, "me/sn", token="hf_none")
    with pytest.raises(normswap.CheckpointError, match="HFValidationError: Repo id must be in the form"):
        normswap.push_to_hub(file, "me/sn/more", token="hf_none")


def test_arguments_of_save_are_refused_for_a_file(file: Path, hub: Hub) -> None:
    with pytest.raises(normswap.ArgumentError, match="plan: for a model only, and the source is a file: remove it"):
        normswap.push_to_hub(file, "me/sn", plan=None)
    assert hub.calls == []
