"""Folders of weights: which files an index may list, which files are copied, and that no code runs."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn
from torch.distributed import checkpoint as distributed

import normswap
from normswap.checkpoints.io.atomic_files import resolve_checkpoint_path
from normswap.errors import ArchitectureError, CheckpointError
from tests.helpers import checkpoint_makers, files

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
    assert resolve_checkpoint_path(index) == shards
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
    assert (out / "optimizer.pt").read_bytes() == b"not ours"
    assert "optimizer.pt: copied unchanged (" in " ".join(result.output.split())
    again = CliRunner().invoke(main, ["convert", str(shards), "--input", "2x3x64x64", "--force"])
    assert "exists already, and normswap replaces no folder: choose another name" in again.stderr


def test_other_entries_of_a_trainer_are_copied(tmp_path: Path) -> None:
    """As transformers' Trainer lays it out: training goes on from the converted folder with the old momentum."""
    from click.testing import CliRunner

    from normswap.cli import main

    model, folder = files.small_model(), tmp_path / "checkpoint-1"
    folder.mkdir()
    decayed = [p for p in model.parameters() if p.dim() > 1]
    groups = [{"params": decayed}, {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, 0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    model.train()(torch.randn(2, 3, 32, 32)).sum().backward()
    optimizer.step()
    scheduler.step()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    torch.save(scheduler.state_dict(), folder / "scheduler.pt")
    (folder / "rng_state.pth").write_bytes(b"never opened")
    (folder / "weights.h5").write_bytes(b"of another framework")
    result = CliRunner().invoke(main, ["convert", str(folder), "--arch", files.ARCH, "--no-verify"])
    assert result.exit_code == 0, result.output
    out = tmp_path / "checkpoint-1.normswap"
    assert (out / "rng_state.pth").read_bytes() == b"never opened"
    assert not (out / "weights.h5").exists()

    converted = load(out).model
    named = [p for name, p in converted.named_parameters() if not name.endswith(("mean_weight", "var_weight"))]
    like = torch.optim.AdamW(
        [{"params": [p for p in named if p.dim() > 1]}, {"params": [p for p in named if p.dim() == 1]}]
    )
    resumed = torch.optim.AdamW(normswap.param_groups(converted, like=like))
    schedule = torch.optim.lr_scheduler.LambdaLR(resumed, lambda step: 1 / (1 + step))
    resumed.load_state_dict(torch.load(out / "optimizer.pt"))
    schedule.load_state_dict(torch.load(out / "scheduler.pt"))
    assert [group["lr"] for group in resumed.param_groups] == pytest.approx([0.05, 0.05, 0.05])
    assert resumed.param_groups[2]["weight_decay"] == 0.0
    old, new = optimizer.state[decayed[0]], resumed.state[resumed.param_groups[0]["params"][0]]
    assert torch.equal(old["exp_avg"], new["exp_avg"])


OTHERS: dict[str, tuple[Callable[[nn.Module], list[nn.Parameter]], str]] = {
    "another network": (lambda _: [*nn.Linear(3, 5).parameters()], "fit no network in this file"),
    "one of as many parameters": (
        lambda model: [nn.Parameter(torch.ones(2, 2)) for _ in model.parameters()],
        "fit no network in this file",
    ),
    "the head alone": (
        lambda model: [p for name, p in model.named_parameters() if name.startswith("fc.")],
        "it has no parameter of a converted norm in the model",
    ),
}


@pytest.mark.parametrize(("parameters", "reason"), OTHERS.values(), ids=OTHERS)
def test_the_optimizer_of_another_network_in_a_folder_of_a_trainer_is_left(
    tmp_path: Path, parameters: Callable[[nn.Module], list[nn.Parameter]], reason: str
) -> None:
    from click.testing import CliRunner

    from normswap.cli import main

    model, folder = files.small_model(), tmp_path / "checkpoint-1"
    folder.mkdir()
    optimizer = torch.optim.AdamW(parameters(model), 0.1)
    sum(p.sum() for group in optimizer.param_groups for p in group["params"]).backward()
    optimizer.step()
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    torch.save(scheduler.state_dict(), folder / "scheduler.pt")
    result = CliRunner().invoke(main, ["convert", str(folder), "--arch", files.ARCH, "--no-verify"])
    assert result.exit_code == 0, result.output
    text, out = " ".join(result.output.split()), tmp_path / "checkpoint-1.normswap"
    assert "optimizer.pt: copied unchanged" in text
    assert reason in text
    for name in ("optimizer.pt", "scheduler.pt"):
        assert (out / name).read_bytes() == (folder / name).read_bytes()


def _edit_index(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        path.write_text(json.dumps(change(index) or index))

    return edit


def _read(path: Path) -> dict[str, torch.Tensor]:
    # Copies, since safetensors maps tensors from the file, which is overwritten below.
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
        "lists the shard 'lost.safetensors', which is not in",
    ),
    "a shard without a name": (
        _edit_index(lambda index: index["weight_map"].update(x={})),
        "lists the shard None, which is not in",
    ),
    "a shard with a very long name": (
        _edit_index(lambda index: index["weight_map"].update(x="x" * 5000)),
        "xxx, which is not in",
    ),
    "a shard elsewhere": (
        _edit_index(lambda index: index["weight_map"].update(x="../../secret.safetensors")),
        "lists the shard '../../secret.safetensors', which is not in",
    ),
    "a tensor twice": (_in_two_shards, "is in another shard too: remove the stale shards"),
    "another kind of file": (_torch_under_the_name_of_safetensors, "expected safetensors by its name, got torch zip"),
    "a lost tensor": (_lost_tensor, "index.json lists 1 tensors that are missing here ("),
    "no weights at all": (
        lambda f: [path.unlink() for path in f.glob("*safetensors*")],
        "got a folder without model.safetensors, pytorch_model.bin, an index of shards or .metadata",
    ),
}


@pytest.mark.parametrize(("damage", "message"), BROKEN.values(), ids=BROKEN)
def test_a_broken_folder_is_reported(shards: Path, damage: Callable[[Path], Any], message: str) -> None:
    damage(shards)
    with pytest.raises(CheckpointError) as caught:
        load(shards)
    assert message in str(caught.value)


def test_a_shard_that_is_no_state_dict(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    torch.save([1, 2], folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="expected a state dict, got list"):
        load(folder)


def test_a_module_does_not_become_a_folder(shards: Path, tmp_path: Path) -> None:
    from normswap.checkpoints.record import Record
    from normswap.checkpoints.saving import write_content

    with pytest.raises(CheckpointError, match="a folder stores tensors by name, not a pickled module: use a name"):
        write_content(files.small_model(), tmp_path / "out", "safetensors folder", Record("module"), template=shards)
    assert not (tmp_path / "out").exists()


# Distributed checkpoints.


def test_code_in_an_index_never_runs(step: Path, tmp_path: Path) -> None:
    (step / ".metadata").write_bytes(pickle.dumps(files.Payload(tmp_path / "it-ran")))
    with pytest.raises(
        CheckpointError, match=r"index of the distributed checkpoint names pathlib\.\S+, expected only the classes"
    ):
        load(step)
    assert not (tmp_path / "it-ran").exists()


def test_code_among_the_values_never_runs(tmp_path: Path) -> None:
    content = {"model": files.small_model().state_dict(), "extra": files.Payload(tmp_path / "it-ran")}
    distributed.save(content, checkpoint_id=tmp_path / "step", no_dist=True)
    with pytest.raises(CheckpointError, match=r"has pickled objects besides tensors and plain data \(\S+\)"):
        load(tmp_path / "step")
    assert not (tmp_path / "it-ran").exists()


def test_an_index_that_is_none(step: Path) -> None:
    (step / ".metadata").write_bytes(pickle.dumps(torch.Size([1])))
    with pytest.raises(CheckpointError, match="expected the index of a distributed checkpoint, got something else"):
        load(step)


def _larger(index: Any) -> None:
    index.state_dict_metadata["model.bn1.weight"].size = torch.Size([2**40])


def _bomb(index: Any) -> None:
    value: tuple[Any, ...] = ()
    for _ in range(60):
        value = (value, value)
    index.planner_data = {"x": value}


HOSTILE: dict[str, tuple[Callable[[Any], None], bytes, str]] = {
    "larger than the files": (
        _larger,
        b"",
        r"its index declares tensors of 4,398,0\d\d,\d{3},\d{3} bytes, the files have",
    ),
    "a tuple bomb": (_bomb, b"", "a nested tuple expands to .* entries: the file is malicious"),
    "a place far out": (lambda index: None, b"K\x01r\xff\xff\xff\x7f0", "truncated or damaged"),
    "a claim of bytes": (lambda index: None, b"\x8e\xff\xff\xff\xff\xff\0\0\0", "truncated or damaged"),
}


@pytest.mark.parametrize(("change", "opcodes", "message"), HOSTILE.values(), ids=HOSTILE)
def test_an_index_that_asks_for_memory_or_years(
    step: Path, change: Callable[[Any], None], opcodes: bytes, message: str
) -> None:
    index = pickle.loads((step / ".metadata").read_bytes())
    change(index)
    data = pickle.dumps(index, protocol=3)
    (step / ".metadata").write_bytes(data[:2] + opcodes + data[2:])
    with pytest.raises(CheckpointError, match=message):
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
    "of an unknown type": ({"architectures": ["ResNetModel"], "model_type": "nothing"}, "its builder failed: "),
    "of an unknown timm model": (
        {"architecture": "resnet19"},
        "='resnet19', expected a model of timm; nearest: resnet1",
    ),
}


@pytest.mark.parametrize(("config", "message"), CONFIGS.values(), ids=CONFIGS)
def test_a_configuration_that_builds_nothing(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    torch.save(files.small_model().state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ArchitectureError) as caught:
        normswap.load(tmp_path)
    assert message in str(caught.value)


def test_folders_are_left_as_they_were(shards: Path, step: Path) -> None:
    for folder in (shards, step):
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        load(folder)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    shutil.rmtree(step)
