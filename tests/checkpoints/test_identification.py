"""Identification of the architecture of a state dict: candidates, their differences, groups by function, no guesses."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from click.testing import CliRunner
from torch import nn
from torchvision import models as torchvision_models

import normswap
from benchmarks.architectures.facts import fingerprint
from benchmarks.architectures.functions import difference
from benchmarks.architectures.records import built
from benchmarks.architectures.records import shapes_of as shapes_of_model
from normswap.checkpoints.architecture import index
from normswap.checkpoints.architecture.identification import (
    Identification,
    describe_ambiguity,
    describe_no_match,
    identify,
    require_unique,
)
from normswap.checkpoints.architecture.index import Symbol, decode_index, encode_index, shipped_index
from normswap.checkpoints.architecture.registry import build_architecture
from normswap.cli import main
from normswap.errors import ArchitectureError

Shapes = dict[str, tuple[int, ...]]

# One of each kind: stems, heads, position embeddings, relative positions, auxiliary heads, no head, no norms.
TIMM = (
    "coat_lite_tiny",
    "convnext_atto",
    "cs3darknet_focus_s",
    "deit_tiny_distilled_patch16_224",
    "densenet121",
    "dla34",
    "efficientformer_l1",
    "efficientnet_b0",
    "fastvit_t8",
    "ghostnet_100",
    "hrnet_w18_small",
    "inception_v3",
    "levit_128s",
    "maxvit_tiny_rw_224",
    "mixer_s32_224",
    "mobilenetv3_small_100",
    "mobilevit_xxs",
    "pit_ti_224",
    "poolformer_s12",
    "regnetx_002",
    "repvgg_a0",
    "resnest14d",
    "resnet18",
    "resnetv2_50",
    "rexnet_100",
    "swin_tiny_patch4_window7_224",
    "tf_efficientnet_b0",
    "test_byobnet",
    "tresnet_m",
    "vgg11_bn",
    "visformer_tiny",
    "vit_small_patch14_dinov2",
    "vit_tiny_patch16_224",
    "xcit_nano_12_p16_224",
)
TORCHVISION = (
    "alexnet",
    "fasterrcnn_mobilenet_v3_large_fpn",
    "googlenet",
    "lraspp_mobilenet_v3_large",
    "mobilenet_v2",
    "r3d_18",
    "raft_small",
    "regnet_y_400mf",
    "resnet18",
    "shufflenet_v2_x0_5",
    "swin_t",
    "vit_b_32",
)
# The names of what torchvision does not let one choose.
FIXED = ("raft_small",)
pytestmark = pytest.mark.slow


def decide_on(shapes: Shapes) -> str:
    return require_unique(identify(shapes))


def shapes_of(architecture: str) -> Shapes:
    return shapes_of_model(built(architecture))


def names_of(found: Identification) -> list[str]:
    return [candidate.architecture for candidate in found.candidates]


@pytest.mark.parametrize("name", [f"timm:{n}" for n in TIMM] + [f"torchvision:{n}" for n in TORCHVISION])
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_the_true_architecture_is_among_the_candidates(name: str) -> None:
    zoo, _, model = name.partition(":")
    changed = f"{name},num_classes=10" + (",in_chans=1" if zoo == "timm" else "")
    for architecture in (name,) if model in FIXED else (name, changed):
        found = identify(shapes_of(architecture))
        assert architecture in names_of(found)
        assert found.matches == ()
        (true,) = (one for one in found.candidates if one.architecture == architecture)
        for one in found.candidates:  # a network of another image size by its name is resized
            assert one.num_mismatches == 0
            assert {k: v for k, v in one.keywords.items() if k != "img_size"}.items() == true.keywords.items()


# Changes to a file of timm's mobilenetv3_small_050 with 7 classes, and the expected identification.


def without_counters(shapes: Shapes) -> Shapes:
    return {name: shape for name, shape in shapes.items() if not name.endswith("num_batches_tracked")}


def without_head(shapes: Shapes) -> Shapes:
    return {name: shape for name, shape in shapes.items() if not name.startswith("classifier.")}


def with_another_head(shapes: Shapes) -> Shapes:
    return without_head(shapes) | {"classifier.0.weight": (64, 1024), "classifier.2.weight": (7, 64)}


def with_a_head_more(shapes: Shapes) -> Shapes:
    return shapes | {"aux_head.weight": (7, 24), "aux_head.bias": (7,)}


def with_leftovers(shapes: Shapes) -> Shapes:
    return shapes | {"conv_stem.total_ops": (1,), "conv_stem.total_params": (1,)}


TOLERATED: dict[Callable[[Shapes], Shapes], tuple[str, int, int]] = {
    without_counters: ("num_classes=7", 34, 0),
    without_head: ("num_classes=0", 0, 0),
    with_another_head: ("num_classes=0", 0, 2),
    with_a_head_more: ("num_classes=7", 0, 2),
    with_leftovers: ("num_classes=7", 0, 2),
}
SMALL = "timm:mobilenetv3_small_050"


@pytest.mark.parametrize("change", TOLERATED, ids=lambda change: change.__name__)
def test_missing_and_additional_tensors_are_tolerated_and_counted(change: Callable[[Shapes], Shapes]) -> None:
    keyword, missing, unexpected = TOLERATED[change]
    changed = change(shapes_of(f"{SMALL},num_classes=7"))
    (candidate,) = (c for c in identify(changed).candidates if c.architecture == f"{SMALL},{keyword}")
    assert (candidate.missing.count, candidate.unexpected.count) == (missing, unexpected)
    assert set(candidate.unexpected.names) <= changed.keys()
    assert decide_on(changed) == f"{SMALL},{keyword}"


@pytest.mark.parametrize(
    ("added", "message"),
    [
        ("norm_pre.weight", "1 unexpected: norm_pre.weight"),  # CLIP's, a step of the function
        ("fc_norm.weight", "1 unexpected: fc_norm.weight"),
        ("pre_logits.fc.weight", "1 unexpected: pre_logits.fc.weight"),
        ("classifier.extra", "1 unexpected: classifier.extra"),  # inside the network's own head
        ("blocks.9.weight", "1 unexpected: blocks.9.weight"),
    ],
)
def test_a_tensor_that_could_take_part_in_the_function_is_not_tolerated(added: str, message: str) -> None:
    with pytest.raises(ArchitectureError, match=rf"fit no model of timm .*; nearest: {SMALL} \({message}\)"):
        decide_on(shapes_of(SMALL) | {added: (3,)})


def test_the_nearest_architectures_come_with_what_does_not_fit() -> None:
    shapes = shapes_of(SMALL)
    del shapes["conv_stem.weight"]
    shapes["classifier.bias"] = (11,)
    shapes["bn1.weight"] = (2, 2)
    shapes["another"] = ()
    found = identify(shapes)
    best = found.matches[0]
    assert found.candidates == ()
    assert best.architecture == SMALL
    assert best.missing.names == ("conv_stem.weight",)
    assert best.unexpected.names == ("another",)
    assert best.misshaped.names == ("bn1.weight", "classifier.bias")
    assert best.num_mismatches == 4
    assert [match.num_mismatches for match in found.matches] == sorted(match.num_mismatches for match in found.matches)


def test_an_image_size_is_read_off_and_sizes_of_one_network_are_one_function() -> None:
    assert decide_on(shapes_of("timm:vit_tiny_patch16_224,img_size=96")) == "timm:vit_tiny_patch16_224,img_size=96"
    found = identify(shapes_of("timm:vit_tiny_patch16_384"))
    assert {"timm:vit_tiny_patch16_384", "timm:vit_tiny_patch16_224,img_size=384"} <= {*names_of(found)}
    assert [group[0].architecture for group in found.functions] == ["timm:vit_tiny_patch16_384"]


def test_a_detector_without_counters_had_frozen_norms_and_is_not_taken_for_one_with_batch_norm() -> None:
    shapes = shapes_of("torchvision:fasterrcnn_mobilenet_v3_large_fpn")
    assert names_of(identify(shapes))
    assert not identify(without_counters(shapes)).candidates


# Groups of architectures with the same tensors: identification must group them as their outputs do.


def grouped(found: Identification, first: str, second: str) -> bool:
    (group,) = (group for group in found.functions if first in [one.architecture for one in group])
    return second in [one.architecture for one in group]


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ("timm:resnet18", "torchvision:resnet18", True),
        ("timm:resnet18", "timm:resnetblur18", False),
        ("timm:efficientnet_b0", "timm:tf_efficientnet_b0", False),
        ("timm:mobilenetv4_conv_aa_medium", "timm:mobilenetv4_conv_blur_medium", False),
    ],
)
def test_names_count_as_one_exactly_where_the_networks_compute_the_same(first: str, second: str, same: bool) -> None:
    found = identify(shapes_of(first))
    assert {first, second} <= {*names_of(found)}
    assert grouped(found, first, second) is same
    assert (difference(first, second, sizes=((40, 40), (33, 47))) == "") is same


def test_what_differs_in_function_is_reported_with_what_to_type() -> None:
    shapes = shapes_of("timm:tf_efficientnet_b0,num_classes=10")
    with pytest.raises(ArchitectureError, match="different functions: pass architecture='timm:") as caught:
        decide_on(shapes)
    text = str(caught.value)
    assert "architecture='timm:efficientnet_b0,num_classes=10' (norm BatchNorm eps 1e-05; convolution Conv2d;" in text
    assert (
        "architecture='timm:tf_efficientnet_b0,num_classes=10' (norm BatchNorm eps 0.001; convolution Conv2d, Conv2d"
        in text
    )
    assert "\n" not in text


def test_every_two_functions_of_the_sample_differ_in_something_that_is_reported() -> None:
    for name in ("resnet50", "efficientnet_b0", "mobilenetv4_conv_medium", "swinv2_tiny_window8_256"):
        facts = [*identify(shapes_of(f"timm:{name}")).differences().values()]
        assert len(facts) > 1
        assert all(facts.count(one) == 1 and one for one in facts), name


class Scaled(nn.Module):
    def __init__(self, scale: Any, *, bias: bool = True) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2, bias=bias)
        self.scale = scale


def test_a_fingerprint_sees_plain_attributes_functions_and_unsaved_buffers() -> None:
    same = [(1.0, 1.0), ((1, 2), (1, 2)), (torch.relu, torch.relu), ({"a": [None]}, {"a": [None]})]
    for one, other in same:
        assert fingerprint(Scaled(one)) == fingerprint(Scaled(other))
    one, two = Scaled(1), Scaled(1)
    one.register_buffer("table", torch.zeros(3), persistent=False)
    different = [(1.0, 2.0), (torch.relu, torch.sigmoid), (object(), object()), (torch.ones(1), torch.ones(1))]
    pairs = [(Scaled(a), Scaled(b)) for a, b in different] + [(one, two), (Scaled(1), Scaled(1, bias=False))]
    for first, second in pairs:
        assert fingerprint(first) != fingerprint(second)


# Hostile inputs


@pytest.mark.parametrize(
    "shapes",
    [
        {},
        {"": ()},
        {"fc.weight": ()},
        {"fc.weight": (10**40, 512), "fc.bias": (0,), "conv1.weight": (64, 10**30, 7, 7)},
        {"conv1.weight": (-1, 3, 7, 7)},
        {f"layer{i}": (i,) for i in range(1_000_000)},
        {"pos_embed": (1, 2**70, 192), "cls_token": (1, 1, 192)},
    ],
    ids=["nothing", "no name", "0-d", "huge", "negative", "a million names", "a huge image"],
)
def test_nothing_fits_hostile_shapes(shapes: Shapes) -> None:
    assert identify(shapes).candidates == ()
    with pytest.raises(ArchitectureError, match=r"(resemble|fit) no model of timm \S+, torchvision \S+"):
        decide_on(shapes)


def test_a_million_added_names_and_a_whole_network() -> None:
    shapes = shapes_of(SMALL) | {f"head_{i}.weight": (i,) for i in range(1_000_000)}
    assert identify(shapes).candidates == ()


def test_absurd_dimensions_are_no_arguments() -> None:
    shapes = shapes_of("timm:vit_tiny_patch16_224")
    for name, shape in {
        "head.bias": (2**40,),
        "pos_embed": (1, 198, 192),
        "patch_embed.proj.weight": (192, 0, 16, 16),
    }.items():
        changed = shapes | {name: shape}
        assert name in identify(changed).matches[0].misshaped.names


@pytest.mark.parametrize(
    ("symbol", "size", "value"),
    [
        (Symbol("num_classes", 0, 1, 0, 1), 10, 10),
        (Symbol("num_classes", 0, 4, 2, 1), 10, 2),
        (Symbol("num_classes", 0, 4, 2, 1), 11, None),
        (Symbol("img_size", 1, 0, 256, 256), 197, 224),
        (Symbol("img_size", 1, 0, 256, 256), 198, None),
        (Symbol("img_size", 1, -32, 256, 256), 169 - 127, None),
        (Symbol("num_classes", 0, 1, 0, 1), 0, None),
    ],
)
def test_an_argument_is_solved_for_or_nothing_is(symbol: Symbol, size: int, value: int | None) -> None:
    assert symbol.solve(size) == value


# The index


def test_the_index_is_small_and_comes_back_from_its_bytes() -> None:
    index = shipped_index()
    assert len(files("normswap.checkpoints.architecture").joinpath("architectures.bin").read_bytes()) < 1_500_000
    few, end = 40, int(index.bounds[40])
    part = replace(
        index,
        architectures=index.architectures[:few],
        name_ids=index.name_ids[:end],
        template_ids=index.template_ids[:end],
        heads=index.heads[:end],
        bounds=index.bounds[: few + 1],
    )
    again = decode_index(encode_index(part))
    assert again.architectures == part.architectures
    assert (again.names, again.templates, again.versions) == (part.names, part.templates, part.versions)
    for name in ("name_ids", "template_ids", "heads", "bounds"):
        assert (getattr(again, name) == getattr(part, name)).all()


def test_the_index_knows_every_model_of_its_versions() -> None:
    index = shipped_index()
    known = {architecture.name for architecture in index.architectures}
    quantized = {*torchvision_models.list_models(module=torchvision_models.quantization)}
    if index.versions["timm"] == version("timm"):
        own = {*timm.list_models()} - {"fuzzing_net"}  # which another test may have registered in this process
        assert {f"timm:{name}" for name in own} == {n for n in known if n.startswith("timm:")}
    if index.versions["torchvision"].partition("+")[0] == version("torchvision").partition("+")[0]:
        wanted = {f"torchvision:{name}" for name in torchvision_models.list_models() if name not in quantized}
        assert wanted == {name for name in known if name.startswith("torchvision:")}


@pytest.mark.parametrize("data", [b"", b"normswap architectures 1\n", b"normswap architectures 1\nxyz", b"other"])
def test_a_damaged_index_is_reported(data: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "architectures.bin").write_bytes(data)
    monkeypatch.setattr(index, "files", lambda _package: tmp_path)
    with pytest.raises(ArchitectureError, match=r"index of architectures cannot be read .*: install normswap again"):
        shipped_index.__wrapped__()


@pytest.mark.multiprocess
def test_identifying_imports_no_zoo_and_builds_nothing() -> None:
    code = (
        "import sys; from normswap.checkpoints.architecture.identification import identify; "
        "identify({'fc.bias': (10,)}); "
        "print(sorted({'timm', 'torchvision'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# The command


def run(*arguments: str) -> Any:
    return CliRunner().invoke(main, ["identify", *arguments], catch_exceptions=False)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path


def write(architecture: str, path: str = "model.pt") -> None:
    torch.save(build_architecture(architecture).state_dict(), path)


def test_one_function_is_named_with_what_to_type(folder: Path) -> None:
    write(f"{SMALL},num_classes=7")
    result = run("model.pt")
    assert result.exit_code == 0
    assert f"type: --arch {SMALL},num_classes=7\n" in result.stdout
    assert f"searched: the models of timm {shipped_index().versions['timm']}" in result.stdout
    document = json.loads(run("model.pt", "--json").stdout)
    assert document["architecture"] == f"{SMALL},num_classes=7"
    assert document["functions"][0][0]["keywords"] == {"num_classes": 7}


def test_several_functions_are_distinguished_and_exit_with_1(folder: Path) -> None:
    write("timm:resnet18")
    result = run("model.pt")
    assert result.exit_code == 1
    assert "torchvision:resnet18" in result.stdout
    assert "BlurPool2d" in result.stdout
    assert "pass --arch timm:resnet18 (" in result.stderr
    document = json.loads(run("model.pt", "--json").stdout)
    assert document["architecture"] is None
    assert document["differences"].keys() == {"timm:resnet18", "timm:resnetblur18"}


def test_a_stranger_exits_with_1(folder: Path) -> None:
    torch.save(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).state_dict(), "model.pt")
    result = run("model.pt")
    assert result.exit_code == 1
    assert "pass --arch timm:NAME, or --arch path/file.py:function for your own model" in result.stderr
    shapes = shapes_of(SMALL)
    torch.save({**{n: torch.zeros(s) for n, s in shapes.items()}, "norm_pre.bias": torch.zeros(3)}, "model.pt")
    result = run("model.pt")
    assert result.exit_code == 1
    assert "Nearest architecture" in result.stdout
    assert "1 unexpected: norm_pre.bias" in result.stdout


def test_a_file_that_names_it_itself_is_accepted(folder: Path) -> None:
    model = build_architecture("timm:test_resnet")
    normswap.save(model, "model.pt", architecture="timm:test_resnet")
    assert run("model.pt").stdout == "model.pt was written by normswap as timm:test_resnet: --arch is not needed\n"
    assert json.loads(run("model.pt", "--json").stdout) == {
        "file": "model.pt",
        "architecture": "timm:test_resnet",
        "recorded": True,
    }


def test_a_pickled_module_is_identified_only_where_it_is_trusted(folder: Path) -> None:
    torch.save(build_architecture("timm:test_resnet"), "module.pth")
    assert run("module.pth").exit_code == 2
    assert "type: --arch timm:test_resnet\n" in run("module.pth", "--trust").stdout


def test_the_messages_speak_of_the_same_identification() -> None:
    several, none = identify(shapes_of("timm:resnet18")), identify({})
    assert describe_ambiguity(several).count("architecture=") == len(several.functions)
    assert "resemble no model" in describe_no_match(none)
