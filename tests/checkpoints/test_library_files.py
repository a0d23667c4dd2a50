"""Files and folders saved by safetensors and transformers: renamed tensors, tied tensors under one name."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from click.testing import CliRunner, Result
from torch import Tensor, nn

import normswap
from normswap.checkpoints.content.weight_loading import retie_tensors, untie_tensors
from normswap.checkpoints.reading import read_record
from normswap.cli import main
from normswap.errors import ArchitectureError
from normswap.layers.matching import MATCHING_BUFFERS
from tests.helpers import files

transformers = pytest.importorskip("transformers", minversion="5")


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def convert(*arguments: str | Path) -> Result:
    result = run("convert", *arguments)
    assert result.exit_code == 0, result.output
    return result


# Tied tensors.

_TIED = '''
import torch.nn as nn

class Net(nn.Module):
    """Three convolutions with one weight."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(3, 8, 3) for _ in range(3))
        self.b.weight = self.c.weight = self.a.weight
        self.bn = nn.BatchNorm2d(8)

    def forward(self, x):
        return self.bn(self.a(x)) + self.b(x) * self.c(x)

def net():
    return files_scrambled(Net()).eval()

from tests.helpers.files import scrambled as files_scrambled
'''


@pytest.fixture
def tied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], nn.Module]:
    """A network with tied tensors, in a Python file in the working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tied.py").write_text(_TIED)
    space: dict[str, Any] = {"__name__": "tied"}
    exec(_TIED, space)
    return space["net"]  # type: ignore[no-any-return]


def test_tied_weights_convert_as_their_library_writes_them(tied: Callable[[], nn.Module]) -> None:
    model = tied()
    safetensors.torch.save_model(model, "in.safetensors", metadata={"format": "pt", "author": "somebody"})
    convert("in.safetensors", "--arch", "tied.py:net", "--input", "2x3x9x9", "-o", "out.safetensors")
    with safetensors.safe_open("in.safetensors", "pt") as old, safetensors.safe_open("out.safetensors", "pt") as new:
        notes = new.metadata()
        assert {*old.keys()} < {*new.keys()}
        assert {**old.metadata(), **notes} == notes  # the names left out, and what the user noted
    loaded = normswap.load("out.safetensors", architecture=tied).model
    assert loaded.b.weight is loaded.c.weight is loaded.a.weight
    x = torch.randn(2, 3, 9, 9)
    assert torch.allclose(loaded(x), normswap.load("in.safetensors", architecture=tied).model(x), atol=1e-6)
    assert torch.allclose(loaded(x), model(x), atol=1e-6)
    twin = normswap.convert(tied(), torch.randn(2, 3, 9, 9)).model
    assert safetensors.torch.load_model(twin, "out.safetensors", strict=True) == (set(), [])
    assert torch.equal(twin(x), loaded(x))


def test_what_save_writes_the_library_loads_again(tied: Callable[[], nn.Module]) -> None:
    conversion = normswap.convert(tied())
    normswap.save(conversion.model, "sn.safetensors", plan=conversion.plan)
    safetensors.torch.save_model(conversion.model, "library.safetensors")
    with (
        safetensors.safe_open("sn.safetensors", "pt") as ours,
        safetensors.safe_open("library.safetensors", "pt") as its,
    ):
        assert [*ours.keys()] == [*its.keys()]
        assert {**ours.metadata(), **its.metadata()} == ours.metadata()
    twin = normswap.convert(tied()).model
    assert safetensors.torch.load_model(twin, "sn.safetensors", strict=True) == (set(), [])


@pytest.mark.parametrize("name", ["left_out.pt", "left_out.safetensors"])
def test_names_left_out_without_a_note_are_the_models_own_ties(tied: Callable[[], nn.Module], name: str) -> None:
    """As accelerate and transformers save: nothing tells which names are gone but the model itself."""
    state = {key: value for key, value in tied().state_dict().items() if key not in ("b.weight", "c.weight")}
    (torch.save if name.endswith(".pt") else safetensors.torch.save_file)(state, name)
    convert(name, "--arch", "tied.py:net", "--input", "2x3x9x9", "-o", f"out_{name}")
    loaded = normswap.load(f"out_{name}", architecture=tied).model
    assert torch.equal(loaded.a.weight, state["a.weight"])
    assert loaded.b.weight is loaded.a.weight
    half = {key: value.half() if value.is_floating_point() else value for key, value in state.items()}
    torch.save(half, "half.pt")
    assert normswap.load("half.pt", architecture=tied).model.b.weight.dtype == torch.float16


def test_a_norm_with_two_names_of_which_one_is_stored_converts(tmp_path: Path) -> None:
    model = files.TiedNet()
    safetensors.torch.save_model(files.scrambled(model), tmp_path / "in.safetensors")
    code = "from tests.helpers import files\ndef net():\n    return files.TiedNet()\n"
    (tmp_path / "two_names.py").write_text(code)
    arch, out = f"{tmp_path / 'two_names.py'}:net", tmp_path / "out.safetensors"
    convert(tmp_path / "in.safetensors", "--arch", arch, "--input", "2x3x9x9", "-o", out)
    loaded = normswap.load(out, architecture=files.TiedNet).model
    assert loaded.norm is loaded.again
    x = torch.randn(2, 3, 9, 9)
    assert torch.allclose(loaded(x), model.eval()(x), atol=1e-6)


def test_a_note_ties_what_the_model_does_not(tied: Callable[[], nn.Module]) -> None:
    def untied() -> nn.Module:
        model = tied()
        model.b.weight = nn.Parameter(torch.zeros_like(model.a.weight))
        return model

    model = tied()
    safetensors.torch.save_model(model, "in.safetensors")
    assert torch.equal(normswap.load("in.safetensors", architecture=untied).model.b.weight, model.a.weight)


def test_what_is_missing_and_not_tied_is_refused(tied: Callable[[], nn.Module]) -> None:
    state = {key: value for key, value in tied().state_dict().items() if not key.endswith("weight") or key[:2] == "bn"}
    torch.save(state, "bad.pt")
    with pytest.raises(ArchitectureError, match=r"3 missing: a\.weight, b\.weight, c\.weight"):
        normswap.load("bad.pt", architecture=tied)


def test_the_first_name_in_the_alphabet_is_kept() -> None:
    shared = torch.ones(3)
    stored = untie_tensors({"z": shared, "b": shared, "a": torch.ones(3)})
    assert (stored.tensors.keys(), stored.tied) == ({"b", "a"}, {"z": "b"})
    assert retie_tensors(stored.tensors, stored.tied, ())["z"] is stored.tensors["b"]


# Folders of transformers.


def _segformer() -> nn.Module:
    config = transformers.SegformerConfig(
        depths=[1] * 4, hidden_sizes=[8] * 4, num_attention_heads=[1] * 4, decoder_hidden_size=8, num_labels=2
    )
    return transformers.SegformerForSemanticSegmentation(config)  # type: ignore[no-any-return]


def _detr_backbone() -> Any:
    return transformers.TimmBackboneConfig(backbone="resnet10t", out_indices=[1, 2, 3, 4], features_only=True)


def _detr() -> nn.Module:
    config = transformers.DetrConfig(
        backbone_config=_detr_backbone(),
        use_timm_backbone=False,
        encoder_layers=1,
        decoder_layers=1,
        d_model=16,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        num_queries=5,
        num_labels=3,
    )
    return transformers.DetrForObjectDetection(config)  # type: ignore[no-any-return]


def _rt_detr() -> nn.Module:
    backbone = transformers.RTDetrResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1], layer_type="basic", out_features=["stage2"]
    )
    config = transformers.RTDetrConfig(
        backbone_config=backbone,
        encoder_hidden_dim=16,
        encoder_in_channels=[8],
        feat_strides=[8],
        encoder_ffn_dim=16,
        encoder_attention_heads=2,
        encode_proj_layers=[0],
        d_model=16,
        num_queries=5,
        decoder_in_channels=[16],
        num_feature_levels=1,
        decoder_ffn_dim=16,
        decoder_layers=1,
        decoder_attention_heads=2,
        num_denoising=0,
        num_labels=3,
    )
    return transformers.RTDetrForObjectDetection(config)  # type: ignore[no-any-return]


def _resnet() -> nn.Module:
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], num_labels=3)
    return transformers.ResNetForImageClassification(config)  # type: ignore[no-any-return]


def _timm_wrapper() -> nn.Module:
    config = transformers.TimmWrapperConfig(architecture="resnet10t", num_labels=2, model_args={"in_chans": 3})
    return transformers.TimmWrapperForImageClassification(config)  # type: ignore[no-any-return]


def _timm_wrapper_without_head() -> nn.Module:
    return transformers.TimmWrapperModel(transformers.TimmWrapperConfig(architecture="resnet10t"))  # type: ignore[no-any-return]


def _timm_backbone() -> nn.Module:
    return transformers.TimmBackbone(_detr_backbone())  # type: ignore[no-any-return]


MODELS: dict[str, Callable[[], nn.Module]] = {
    "SegFormer": _segformer,
    "DETR": _detr,
    "RT-DETR": _rt_detr,
    "ResNet": _resnet,
    "TimmWrapperForImageClassification": _timm_wrapper,
    "TimmWrapperModel": _timm_wrapper_without_head,
    "TimmBackbone": _timm_backbone,
}


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    yield
    transformers.logging.set_verbosity(before)


def _leaves(value: Any) -> list[Tensor]:
    from torch.utils._pytree import tree_leaves

    values = value.to_tuple() if hasattr(value, "to_tuple") else value
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _outputs(model: nn.Module) -> list[Tensor]:
    torch.manual_seed(1)
    x = torch.randn(2, 3, 64, 64)
    torch.manual_seed(2)
    with torch.no_grad():
        return _leaves(model.eval()(x))


def _reopened(cls: Any, folder: Path) -> tuple[nn.Module, dict[str, Any]]:
    if cls is transformers.TimmBackbone:  # whose from_pretrained takes names of timm only
        model = cls(transformers.TimmBackboneConfig.from_pretrained(folder))
        missing, unexpected = model.load_state_dict(
            safetensors.torch.load_file(folder / "model.safetensors"), strict=False
        )
        return model, {"missing_keys": missing, "unexpected_keys": unexpected}
    return cls.from_pretrained(folder, local_files_only=True, output_loading_info=True)  # type: ignore[no-any-return]


@pytest.mark.slow
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_a_folder_of_transformers_converts_without_any_option(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    source, target = tmp_path / "in", tmp_path / "in.normswap"
    model = files.scrambled(make())
    model.save_pretrained(source)
    convert(source, "--input", "2x3x64x64", "--no-verify")
    original, _ = _reopened(type(model), source)
    loaded = normswap.load(target)
    assert type(loaded.model) is type(model)
    assert loaded.plan is not None
    assert loaded.plan.swaps
    assert normswap.importance_weights(loaded.model).keys() == {swap.fqn for swap in loaded.plan.swaps}
    for expected, found in zip(_outputs(original), _outputs(loaded.model), strict=True):
        assert torch.allclose(expected, found, atol=1e-4, rtol=1e-4, equal_nan=True)


@pytest.mark.slow
@pytest.mark.parametrize("make", [_segformer, _rt_detr, _timm_wrapper], ids=["SegFormer", "RT-DETR", "TimmWrapper"])
def test_the_library_finds_all_its_tensors_in_a_converted_folder(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    """Under the names that it saves: nothing is missing, and only the gates are unknown to it."""
    source, target = tmp_path / "in", tmp_path / "out"
    files.scrambled(make()).save_pretrained(source)
    convert(source, "-o", target, "--no-verify", "--input", "2x3x64x64")
    old, new = (safetensors.torch.load_file(folder / "model.safetensors") for folder in (source, target))
    gates = {key for key in new if key.endswith(("mean_weight", "var_weight", *MATCHING_BUFFERS))}
    assert {*new} - gates == {*old}
    assert all(torch.equal(new[key], tensor) for key, tensor in old.items())
    assert all(key.rpartition(".")[0] + ".running_mean" in old for key in gates)
    _, report = _reopened(type(make()), target)
    assert [*report["missing_keys"]] == []
    ours = ("mean_weight", "var_weight", *MATCHING_BUFFERS)
    assert all(key.endswith(ours) for key in report["unexpected_keys"])


def test_importance_weights_are_shown_under_the_names_of_the_model(tmp_path: Path) -> None:
    make, source, target = _detr, tmp_path / "in", tmp_path / "out"
    files.scrambled(make()).save_pretrained(source)
    convert(source, "-o", target, "--no-verify", "--input", "2x3x64x64")
    result = run("inspect", target, "--json")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    planned = [swap["fqn"] for swap in document["plan"]["swaps"]]
    assert [*document["importance_weights"]] == planned
    record = read_record(target)
    assert record is not None
    assert record.stored_as  # some are under other names in the file


def test_copies_of_the_weights_under_saved_names_are_converted_too(tmp_path: Path) -> None:
    from transformers.core_model_loading import revert_weight_conversion

    model = files.scrambled(_segformer())
    model.save_pretrained(tmp_path / "in")
    saved = revert_weight_conversion(model, model.state_dict())
    assert saved.keys() != model.state_dict().keys()
    lightning = {f"model.{key}": value for key, value in saved.items()}
    torch.save({"state_dict": lightning, "state_dict_ema": dict(saved)}, tmp_path / "train.pt")
    result = convert(tmp_path / "train.pt", "--arch", f"hf:{tmp_path / 'in'}", "--no-verify")
    assert "state_dict_ema: converted too" in " ".join(result.output.split())
    content = torch.load(tmp_path / "train.normswap.pt")
    gates = [{key for key in content[name] if key.endswith("mean_weight")} for name in ("state_dict", "state_dict_ema")]
    assert {key.removeprefix("model.") for key in gates[0]} == gates[1] != set()
    assert normswap.load(tmp_path / "train.normswap.pt", architecture=f"hf:{tmp_path / 'in'}").plan is not None


def test_a_verified_conversion_needs_the_size_of_an_input_alone(tmp_path: Path) -> None:
    files.scrambled(_segformer()).save_pretrained(tmp_path / "in")
    result = convert(tmp_path / "in", "--input", "2x3x64x64", "--json")
    assert json.loads(result.stdout)["verification"]["passed"] is True
