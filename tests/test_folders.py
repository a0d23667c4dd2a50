"""Folders of weights: what their indexes may name, what is copied, and code that never runs."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoint_makers
import files
import pytest
import safetensors.torch
import torch
from torch.distributed import checkpoint as distributed

import normswap
from normswap.checkpoints.atomic import located
from normswap.errors import ArchitectureError, CheckpointError

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    return checkpoint_makers.LAYOUTS["Hugging Face shards, safetensors"].make(checkpoint_makers.trained(), tmp_path)


@pytest.fixture
def step(tmp_path: Path) -> Path:
    return checkpoint_makers.LAYOUTS["`torch.distributed.checkpoint`"].make(checkpoint_makers.trained(), tmp_path)


def load(folder: Path) -> normswap.Loaded:
    return normswap.load(folder, architecture=files.ARCH)


def test_the_index_stands_for_its_folder(shards: Path) -> None:
    index = shards / "model.safetensors.index.json"
    assert located(index) == shards
    assert normswap.load(index).model is not None


def test_a_converted_folder_has_an_index_of_all_its_tensors(shards: Path) -> None:
    from click.testing import CliRunner

    from normswap.cli import main

    (shards / "README.md").write_text("words")
    (shards / "optimizer.pt").write_bytes(b"not ours")
    result = CliRunner().invoke(main, ["convert", str(shards), "--input", "2x3x64x64"])
    assert result.exit_code == 0, result.output
    out = shards.with_name("sharded.normswap")
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {p.name for p in out.glob("*.safetensors")}
    for key, file in index["weight_map"].items():
        owner = key.rpartition(".")[0]
        neighbours = {f for k, f in index["weight_map"].items() if k.rpartition(".")[0] == owner}
        assert file in neighbours
        assert key in safetensors.torch.load_file(out / file)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in load(out).model.state_dict().values())
    assert (out / "README.md").read_text() == "words"
    assert not (out / "optimizer.pt").exists()
    again = CliRunner().invoke(main, ["convert", str(shards), "--input", "2x3x64x64", "--force"])
    assert "exists already, and a folder is never replaced: choose another name" in again.stderr


def _edit_index(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        path.write_text(json.dumps(change(index) or index))

    return edit


def _read(path: Path) -> dict[str, torch.Tensor]:
    # Copies: what safetensors gives lies in the file, which is about to be overwritten.
    return {key: value.clone() for key, value in safetensors.torch.load_file(path).items()}


def _in_two_shards(folder: Path) -> None:
    first = sorted(folder.glob("*.safetensors"))
    states = [_read(path) for path in first]
    safetensors.torch.save_file(states[1] | {next(iter(states[0])): torch.ones(1)}, first[1])


def _torch_under_the_name_of_safetensors(folder: Path) -> None:
    path = next(folder.glob("*.safetensors"))
    torch.save(_read(path), path)


def _lost_tensor(folder: Path) -> None:
    path = next(folder.glob("*.safetensors"))
    state = _read(path)
    state.popitem()
    safetensors.torch.save_file(state, path)


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no JSON": (
        lambda f: (f / "model.safetensors.index.json").write_text("{"),
        "expected an index of shards with a weig",
    ),
    "no map": (_edit_index(lambda index: {"metadata": {}}), "expected an index of shards with a weight_map"),
    "an empty map": (
        _edit_index(lambda index: {"weight_map": {}}),
        "expected an index of shards with a weight_map: copy",
    ),
    "a shard that is not there": (
        _edit_index(lambda index: index["weight_map"].update(x="lost.safetensors")),
        "names the shard 'lost.safetensors', which is not in",
    ),
    "a shard elsewhere": (
        _edit_index(lambda index: index["weight_map"].update(x="../../secret.safetensors")),
        "names the shard '../../secret.safetensors', which is not in",
    ),
    "a tensor twice": (_in_two_shards, "which another shard has too: remove the stale shards"),
    "another kind of file": (_torch_under_the_name_of_safetensors, "expected safetensors by its name, got torch zip"),
    "a lost tensor": (_lost_tensor, "the index names 1 tensors that no shard holds"),
    "no weights at all": (
        lambda f: [path.unlink() for path in f.glob("*safetensors*")],
        "got a folder without model.safetensors, pytorch_model.bin, an index of shards or .metadata",
    ),
}


@pytest.mark.parametrize(("damage", "message"), BROKEN.values(), ids=BROKEN)
def test_a_broken_folder_is_told(shards: Path, damage: Callable[[Path], Any], message: str) -> None:
    damage(shards)
    with pytest.raises(CheckpointError) as told:
        load(shards)
    assert message in str(told.value)


def test_a_shard_that_is_no_state_dict(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    torch.save([1, 2], folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="expected a state dict, got list"):
        load(folder)


def test_a_module_does_not_become_a_folder(shards: Path, tmp_path: Path) -> None:
    from normswap.checkpoints.record import Record
    from normswap.checkpoints.saving import write_content

    with pytest.raises(CheckpointError, match="a folder holds tensors by name, not a pickled module: use a name in"):
        write_content(files.small_model(), tmp_path / "out", "safetensors folder", Record("module"), like=shards)
    assert not (tmp_path / "out").exists()


# Distributed checkpoints.


def test_code_in_an_index_never_runs(step: Path, tmp_path: Path) -> None:
    (step / ".metadata").write_bytes(pickle.dumps(files.Payload(tmp_path / "it-ran")))
    with pytest.raises(
        CheckpointError, match=r"index of the distributed checkpoint names pathlib\.\S+, which is never run"
    ):
        load(step)
    assert not (tmp_path / "it-ran").exists()


def test_code_among_the_values_never_runs(tmp_path: Path) -> None:
    content = {"model": files.small_model().state_dict(), "extra": files.Payload(tmp_path / "it-ran")}
    distributed.save(content, checkpoint_id=tmp_path / "step", no_dist=True)
    with pytest.raises(CheckpointError, match=r"or holds pickled objects beside tensors and plain data \(Unsupported"):
        load(tmp_path / "step")
    assert not (tmp_path / "it-ran").exists()


def test_an_index_that_is_none(step: Path) -> None:
    (step / ".metadata").write_bytes(pickle.dumps(torch.Size([1])))
    with pytest.raises(CheckpointError, match="expected the index of a distributed checkpoint, got something else"):
        load(step)


def test_an_index_that_leads_elsewhere(step: Path) -> None:
    index = pickle.loads((step / ".metadata").read_bytes())
    for info in index.storage_data.values():
        info.relative_path = "../secret"
    (step / ".metadata").write_bytes(pickle.dumps(index))
    with pytest.raises(CheckpointError, match=r"names a file outside its folder \('\.\./secret'\)"):
        load(step)


def test_a_truncated_distributed_checkpoint(step: Path) -> None:
    data = next(step.glob("*.distcp"))
    data.write_bytes(data.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        load(step)


# Configurations.


CONFIGS = {
    "of an unknown class": (
        {"architectures": ["os"], "model_type": "resnet"},
        "expected a model class of transformers in",
    ),
    "of an unknown type": ({"architectures": ["ResNetModel"], "model_type": "nothing"}, "cannot be built: "),
    "of an unknown timm model": ({"architecture": "resnet19"}, "cannot be built: Unknown model (resnet19)"),
}


@pytest.mark.parametrize(("config", "message"), CONFIGS.values(), ids=CONFIGS)
def test_a_configuration_that_builds_nothing(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    torch.save(files.small_model().state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ArchitectureError) as told:
        normswap.load(tmp_path)
    assert message in str(told.value)


# What is recognised in order to be refused.


def test_an_exported_program_is_refused_with_the_way_out(tmp_path: Path) -> None:
    program = torch.export.export(files.TiedNet().eval(), (torch.randn(2, 3, 8, 8),))
    torch.export.save(program, tmp_path / "model.pt2")
    with pytest.raises(
        CheckpointError, match=r"an exported program, whose loading may run code: torch\.export\.load it"
    ):
        load(tmp_path / "model.pt2")


def test_folders_are_left_as_they_were(shards: Path, step: Path) -> None:
    for folder in (shards, step):
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        load(folder)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    shutil.rmtree(step)
