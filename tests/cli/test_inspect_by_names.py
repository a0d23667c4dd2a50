"""`inspect` without an architecture: what names and shapes tell, and what to type for more."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from click.testing import CliRunner, Result
from torch import Tensor, nn

import normswap
from normswap.checkpoints.content.state_dict import NormTensors, survey
from normswap.checkpoints.formats.formats import encode
from normswap.cli import main
from tests.helpers import files

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")


class Own(nn.Module):
    """A network that no zoo has: batch norms in two parts, a LayerNorm, a GroupNorm, a norm without an affine part."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16))
        self.decoder = nn.Sequential(nn.Conv2d(16, 8, 3), nn.BatchNorm2d(8, affine=False), nn.GroupNorm(2, 8))
        self.norm = nn.LayerNorm(8, bias=False)
        self.last = nn.Linear(8, 4)


BATCH_NORMS = {"encoder.1": 8, "encoder.3": 16, "decoder.1": 8}
OTHERS = {"decoder.2": 8, "norm": 8}
PARAMETERS = sum(parameter.numel() for parameter in Own().parameters())


@pytest.fixture
def state() -> dict[str, Tensor]:
    return Own().state_dict()


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def shown(*arguments: str | Path) -> str:
    result = run("inspect", *arguments)
    assert result.exit_code == 0, result.output
    return " ".join(result.stdout.split())


def document(*arguments: str | Path) -> dict[str, Any]:
    result = run("inspect", *arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)  # type: ignore[no-any-return]


def norms_of(weights: dict[str, Any], *, statistics: bool) -> dict[str, int]:
    return {norm["fqn"]: norm["channels"] for norm in weights["norms"] if norm["statistics"] == statistics}


def _zip(state: dict[str, Tensor], folder: Path) -> Path:
    torch.save(state, folder / "own.pt")
    return folder / "own.pt"


def _legacy(state: dict[str, Tensor], folder: Path) -> Path:
    torch.save(state, folder / "own.pth", _use_new_zipfile_serialization=False)
    return folder / "own.pth"


def _safetensors(state: dict[str, Tensor], folder: Path) -> Path:
    safetensors.torch.save_file(state, folder / "own.safetensors")
    return folder / "own.safetensors"


def _folder(state: dict[str, Tensor], folder: Path) -> Path:
    (folder / "own").mkdir()
    safetensors.torch.save_file(state, folder / "own" / "model.safetensors", {"format": "pt"})
    return folder / "own"


def _distributed(state: dict[str, Tensor], folder: Path) -> Path:
    (folder / "step").mkdir()
    encode(folder / "step", "distributed folder", state, "{}")
    (folder / "step" / "normswap.json").unlink()
    return folder / "step"


CONTAINERS = {
    "torch zip": _zip,
    "legacy pickle": _legacy,
    "safetensors": _safetensors,
    "safetensors folder": _folder,
    "distributed folder": _distributed,
}


@pytest.mark.parametrize("container", CONTAINERS)
def test_an_own_model_shows_its_norms_without_an_architecture(
    container: str, state: dict[str, Tensor], tmp_path: Path
) -> None:
    path = CONTAINERS[container](state, tmp_path)
    text = shown(path)
    assert f"{path.name} architecture unknown, {container}" in text
    for word in ("encoder", "decoder", "8 to 16", "encoder.1, encoder.3", f"{PARAMETERS:,} parameters"):
        assert word in text
    assert (
        "3 batch norms with running statistics, 2 norms without running statistics (LayerNorm, GroupNorm, ...)" in text
    )
    assert "type: --arch path/file.py:function" in text
    assert "type: --arch none --no-verify (with normswap convert: converts the 3 batch norms by their names)" in text
    found = document(path)
    (weights,) = found["weights"]
    assert (found["container"], found["architecture"], found["converted"]) == (container, None, False)
    assert norms_of(weights, statistics=True) == BATCH_NORMS
    assert norms_of(weights, statistics=False) == OTHERS
    assert (weights["parameters"], weights["tensors"], weights["batch_norms"]) == (PARAMETERS, len(state), 3)
    assert {"--arch path/file.py:function", "--arch none --no-verify"} <= {*found["next"]}


def test_what_is_to_be_typed_works(state: dict[str, Tensor], tmp_path: Path) -> None:
    path = _zip(state, tmp_path)
    assert run("convert", path, "--arch", "none", "--no-verify").exit_code == 0
    code = Path(__file__).read_text().partition("class Own")[2].partition("\n\n\n")[0]
    (tmp_path / "own.py").write_text(f"from torch import nn\n\nclass Own{code}\n")
    assert "encoder.1" in shown(path, "--arch", f"{tmp_path / 'own.py'}:Own")


def test_entries_prefixes_and_optimizers_are_named(state: dict[str, Tensor], tmp_path: Path) -> None:
    wrapped = {f"module.{key}": value for key, value in state.items()}
    optimizer = torch.optim.SGD(Own().parameters(), 0.1).state_dict()
    torch.save({"state_dict": wrapped, "state_dict_ema": state, "optimizer": optimizer}, tmp_path / "train.pt")
    text = shown(tmp_path / "train.pt")
    assert "all names start with module." in text
    assert "optimizer: the state of an optimizer" in text
    assert "type: --entry state_dict_ema (to choose these weights)" in text
    found = document(tmp_path / "train.pt")
    assert [(one["entry"], one["prefix"]) for one in found["weights"]] == [
        ("state_dict", "module."),
        ("state_dict_ema", ""),
    ]
    assert found["optimizers"] == ["optimizer"]
    chosen = document(tmp_path / "train.pt", "--entry", "state_dict_ema")
    assert [one["entry"] for one in chosen["weights"]] == ["state_dict_ema"]
    assert norms_of(chosen["weights"][0], statistics=True) == BATCH_NORMS
    refused = run("inspect", tmp_path / "train.pt", "--entry", "nowhere")
    assert refused.exit_code == 2
    assert "no weights at 'nowhere'" in refused.stderr


def test_a_file_with_several_networks_shows_each(state: dict[str, Tensor], tmp_path: Path) -> None:
    other = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).state_dict()
    torch.save({"generator": state, "discriminator": other}, tmp_path / "gan.pt")
    found = document(tmp_path / "gan.pt")
    assert {one["entry"]: one["batch_norms"] for one in found["weights"]} == {"generator": 3, "discriminator": 1}
    assert {"--entry generator", "--entry discriminator"} <= {*found["next"]}
    text = shown(tmp_path / "gan.pt")
    assert "generator" in text
    assert "discriminator" in text
    (chosen,) = document(tmp_path / "gan.pt", "--entry", "discriminator")["weights"]
    assert norms_of(chosen, statistics=True) == {"1": 4}


def test_an_ambiguous_file_shows_its_norms_and_what_fits(tmp_path: Path) -> None:
    import timm

    torch.save(timm.create_model("resnet18").state_dict(), tmp_path / "r18.pt")
    identified = run("identify", tmp_path / "r18.pt", "--json")
    assert identified.exit_code == 1
    functions = [group[0]["architecture"] for group in json.loads(identified.stdout)["functions"]]
    found = document(tmp_path / "r18.pt")
    assert len(functions) > 1
    assert found["candidates"] == functions
    assert {f"--arch {name}" for name in functions} <= {*found["next"]}
    (weights,) = found["weights"]
    assert weights["batch_norms"] == 20
    text = shown(tmp_path / "r18.pt")
    assert "layer1" in text
    assert f"type: --arch {functions[0]} (fits all tensors)" in text


def test_a_file_without_norm_tensors_says_so(tmp_path: Path) -> None:
    torch.save(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).state_dict(), tmp_path / "mlp.pt")
    result = run("inspect", tmp_path / "mlp.pt")
    assert result.exit_code == 1
    assert "no norm tensors" in result.stdout
    assert "mlp.pt: no tensor in this file has the name of a norm: nothing to convert" in result.stderr
    assert "--arch none" not in result.stdout
    as_json = run("inspect", tmp_path / "mlp.pt", "--json")
    assert as_json.exit_code == 1
    assert json.loads(as_json.stdout)["weights"][0]["norms"] == []


def test_arch_none_shows_names_of_a_known_model_too(tmp_path: Path) -> None:
    torch.save(files.small_model().state_dict(), tmp_path / "bn.pt")
    found = document(tmp_path / "bn.pt", "--arch", "none")
    assert found["weights"][0]["batch_norms"] == files.SITES
    assert found["architecture"] is None


def test_an_inspected_file_without_an_architecture_that_changes_is_refused(
    state: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import normswap.checkpoints.content.state_dict as room

    path = _zip(state, tmp_path)
    original: Callable[[Any], Any] = room.survey

    def changed(content: Any) -> Any:
        shutil.copy(path, tmp_path / "twin.pt")
        (tmp_path / "twin.pt").replace(path)
        return original(content)

    monkeypatch.setattr(room, "survey", changed)
    result = run("inspect", path)
    assert result.exit_code == 2
    assert "changed while normswap read it (another file replaced it)" in " ".join(result.stderr.split())


def test_errors_about_the_file_stay_errors(tmp_path: Path) -> None:
    path = _zip(Own().state_dict(), tmp_path)
    assert run("inspect", path, "--arch", "timm:resnet18").exit_code == 2
    torch.save({"epoch": 3}, tmp_path / "empty.pt")
    assert "expected a state dict or a module" in run("inspect", tmp_path / "empty.pt").stderr


def test_importance_weights_without_a_plan_are_seen() -> None:
    conversion = normswap.convert(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)))
    (weights,) = survey(conversion.model.state_dict()).weights
    assert weights.norms == (NormTensors("1", 8, statistics=True, converted=True),)
    assert weights.batch_norms == ()


def test_modules_are_grouped_by_what_is_around_them(state: dict[str, Tensor]) -> None:
    (weights,) = survey({f"model.{key}": value for key, value in state.items()}).weights
    assert {name: [norm.fqn for norm in norms] for name, norms in weights.groups().items()} == {
        "encoder": ["model.encoder.1", "model.encoder.3"],
        "decoder": ["model.decoder.1", "model.decoder.2"],
        "": ["model.norm"],
    }


def test_many_groups_are_cut_and_counted(tmp_path: Path) -> None:
    blocks = {f"block{i}": nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)) for i in range(30)}
    torch.save(nn.ModuleDict(blocks).state_dict(), tmp_path / "deep.pt")
    text = shown(tmp_path / "deep.pt")
    assert "6 more" in text
    assert "30 batch norms with running statistics" in text
