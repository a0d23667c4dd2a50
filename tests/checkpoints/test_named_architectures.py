"""An architecture named by a file never runs, downloads or opens anything, and builds nothing that is too large."""

import json
import socket
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from click.testing import CliRunner

import normswap
from normswap.checkpoints.architecture.permissions import check_configuration, check_keywords, limit_allocation
from normswap.checkpoints.architecture.registry import build_architecture, check_untrusted_name, parse_architecture
from normswap.cli import main
from normswap.errors import ArchitectureError, CheckpointError

NAME = "timm:test_resnet"
CODE = (
    "open({marker!r}, 'w').close()\n"
    "from transformers import PretrainedConfig\nclass C(PretrainedConfig): model_type = 'x'\n"
)


@pytest.fixture(scope="module")
def state() -> dict[str, Any]:
    torch.manual_seed(0)
    return timm.create_model("test_resnet").state_dict()


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def connect(*_: Any) -> None:
        raise AssertionError("a connection to the network")

    monkeypatch.setattr(socket.socket, "connect", connect)


@pytest.fixture
def marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that appears if code of the folder `d` ran, with other code and weights around it."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "it-ran"
    Path("d").mkdir()
    Path("d/conf.py").write_text(CODE.format(marker=str(path)))
    Path("d/config.json").write_text(
        json.dumps({"architectures": ["ResNetModel"], "model_type": "x", "auto_map": {"AutoConfig": "conf.C"}})
    )
    Path("net.py").write_text(f"open({str(path)!r}, 'w').close()\ndef build(): pass\n")
    Path("config.json").write_text(json.dumps({"architecture": "test_resnet"}))
    return path


def _zip(path: Path, state: dict[str, Any], architecture: str) -> None:
    torch.save(state, path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(f"{path.stem}/normswap.json", _record(architecture))


def _safetensors(path: Path, state: dict[str, Any], architecture: str) -> None:
    safetensors.torch.save_file(state, path, {"normswap": _record(architecture)})


def _folder(path: Path, state: dict[str, Any], architecture: str) -> None:
    path.mkdir()
    safetensors.torch.save_file(state, path / "model.safetensors")
    (path / "normswap.json").write_text(_record(architecture))


def _record(architecture: str) -> str:
    return json.dumps({"version": 1, "payload": "state dict", "architecture": architecture})


CONTAINERS = {"m.pt": _zip, "m.safetensors": _safetensors, "m": _folder}
HOSTILE = {
    "remote code": ("hf:d,trust_remote_code=True", "in another file or folder"),
    "another folder": (
        "hf:d",
        "pass architecture='hf:d' if you trust this folder, with its new path if it has moved, or trust",
    ),
    "an absolute folder": ("hf:/etc", "the config.json of another folder: pass architecture='hf:/etc'"),
    "a parent folder": ("hf:..", "the config.json of another folder"),
    "a repository": ("hf:user/model", "the config.json of another folder"),
    "no folder": ("hf:.", "in the config.json of a folder: pass architecture='hf:FOLDER' with that folder, or trust"),
    "a Python file": ("net.py:build", "in a Python file, which would be run"),
    "another Python file": ("hf:net.py:build", "in a Python file, which would be run"),
    "a function of a module": ("os:system", "expected one of timm:NAME"),
    "timm's hub": ("timm:hf-hub:user/model", "expected timm:NAME"),
    "timm's hub, spelt otherwise": ("timm:hf_hub:user/model", "expected timm:NAME"),
    "timm's folder": ("timm:local-dir:d", "expected timm:NAME"),
    "an address": ("timm:https://example.org/x", "expected timm:NAME"),
    "published weights": (f"{NAME},pretrained=True", "the weights come from the checkpoint"),
    "a configuration of weights": (f"{NAME},pretrained_cfg={{'file': 'x.pt'}}", "the weights come from the checkpoint"),
    "an overlay": (f"{NAME},pretrained_cfg_overlay={{'url': 'http://x'}}", "the weights come from the checkpoint"),
    "a checkpoint": (f"{NAME},checkpoint_path='x.pt'", "the weights come from the checkpoint"),
    "a cache": (f"{NAME},cache_dir='/tmp'", "the weights come from the checkpoint"),
    "remote code of timm": (
        f"{NAME},trust_remote_code=True",
        "the keyword 'trust_remote_code', which a file may not set",
    ),
    "a way to build": (f"{NAME},scriptable=True", "the keyword 'scriptable', which a file may not set"),
    "a feature class": (f"{NAME},feature_cls='fx'", "the keyword 'feature_cls', which a file may not set"),
    "a loader": (f"{NAME},pruned=True", "the keyword 'pruned', which a file may not set"),
    "a path for a layer": (f"{NAME},act_layer='a/b.py'", "expected numbers or a plain word"),
    "a dotted layer": (f"{NAME},norm_layer=torch.nn.BatchNorm2d", "expected numbers or a plain word"),
    "an object for a number": (f"{NAME},layers={{'a': 1}}", "expected numbers up to"),
    "a word for a number": (f"{NAME},num_classes=many", "expected numbers up to"),
    "no number": (f"{NAME},drop_rate=1e999", "expected numbers up to"),
    "a huge number": (f"{NAME},num_classes=1000000000000", "expected numbers up to"),
    "a long tuple": (f"{NAME},layers=({'1,' * 300})", "expected numbers up to"),
    "a deep tuple": (f"{NAME},layers=((((1,),),),)", "expected numbers up to"),
    "a deep expression": (f"{NAME},layers={'(' * 1000}", "expected numbers up to"),
    "a long chain": (f"{NAME},layers={'-' * 3000}1", "expected numbers up to"),
    "a long text": (f"{NAME},layers={'1' * 9000}", "expected at most 4,000 characters"),
    "more than the file": ("timm:resnet10t,num_classes=1000000", "it is not the architecture of this file"),
    "a tall network": (f"{NAME},layers=(9000,1,1,1)", "it is not the architecture of this file"),
    "weights of torchvision": ("torchvision:resnet18,weights='DEFAULT'", "the weights come from the checkpoint"),
    "weights of a backbone": (
        "torchvision:resnet18,weights_backbone='DEFAULT'",
        "the weights come from the checkpoint",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize(("architecture", "message"), HOSTILE.values(), ids=HOSTILE)
def test_a_record_never_runs_fetches_or_opens_anything(
    marker: Path, state: dict[str, Any], architecture: str, message: str
) -> None:
    _zip(Path("m.pt"), state, architecture)
    with pytest.raises(ArchitectureError) as caught:
        normswap.load("m.pt")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not marker.exists()


@pytest.mark.parametrize("name", CONTAINERS)
def test_a_record_never_runs_code(marker: Path, state: dict[str, Any], name: str) -> None:
    CONTAINERS[name](Path(name), state, "hf:d,trust_remote_code=True")
    with pytest.raises(ArchitectureError, match=r"pass it as architecture=, or pass trust=True"):
        normswap.load(name)
    assert normswap.load(name, architecture=NAME).model is not None
    assert not marker.exists()


COMMANDS: dict[str, list[str]] = {
    "inspect": ["inspect", "m.pt"],
    "convert": ["convert", "m.pt", "--input", "2x3x32x32"],
    "verify": ["verify", "good.pt", "m.pt", "--input", "2x3x32x32"],
    "calibrate": ["calibrate", "m.pt", "--data", "digits", "--no-download"],
    "identify": ["identify", "m.pt"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_runs_code_of_a_record(marker: Path, state: dict[str, Any], command: str) -> None:
    _zip(Path("m.pt"), state, "hf:d,trust_remote_code=True")
    _zip(Path("good.pt"), state, NAME)
    arguments = [word for word in COMMANDS[command] if word != "--no-download"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert not marker.exists()


def test_a_user_who_names_the_other_architecture_is_heard(marker: Path, state: dict[str, Any]) -> None:
    _zip(Path("m.pt"), state, "hf:d,trust_remote_code=True")
    _zip(Path("good.pt"), state, NAME)
    result = CliRunner().invoke(main, ["verify", "good.pt", "m.pt", "--arch", NAME, "--input", "2x3x32x32"])
    assert result.exit_code == 0, result.output
    assert not marker.exists()


def test_remote_code_needs_trust_even_if_the_user_types_it(marker: Path, state: dict[str, Any]) -> None:
    pytest.importorskip("transformers")
    torch.save(state, "m.pt")
    with pytest.raises(ArchitectureError, match=r"trust_remote_code runs Python code in the folder: pass trust=True"):
        normswap.load("m.pt", architecture="hf:d,trust_remote_code=True")
    assert not marker.exists()
    with pytest.raises(normswap.NormswapError):  # a ResNet of transformers, not of timm
        normswap.load("m.pt", architecture="hf:d,trust_remote_code=True", trust=True)
    assert marker.exists()


def test_a_recipe_needs_trust_for_remote_code(marker: Path) -> None:
    Path("r.toml").write_text(
        '[model]\narchitecture = "hf:d,trust_remote_code=True"\n[data]\nsource = "digits"\n[train]\nepochs = 1\n'
    )
    result = CliRunner().invoke(main, ["finetune", "r.toml"])
    assert result.exit_code == 2, result.output
    assert not marker.exists()


ALLOWED = [
    NAME,
    f"{NAME},num_classes=7,in_chans=1",
    f"{NAME},global_pool=avg,drop_rate=0.1,drop_path_rate=0.05",
    f"{NAME},global_pool='catavgmax',num_classes=10,output_stride=8",
    f"{NAME},layers=(1,1,1,2),act_layer=silu",
    f"{NAME},features_only=True,out_indices=(1,2)",
    "timm:test_vit,img_size=(96,64)",
    "timm:test_vit,img_size=96,num_classes=0,class_token=True",
    "timm:test_efficientnet,bn_eps=0.001,drop_path_rate=0.2",
    "torchvision:resnet18,num_classes=3,zero_init_residual=True",
    "torchvision:mobilenet_v3_small,width_mult=0.5,dropout=0.2",
    "torchvision:googlenet,aux_logits=False,init_weights=False",
]


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ALLOWED)
def test_the_records_of_today_are_built(tmp_path: Path, architecture: str) -> None:
    torch.manual_seed(0)
    model = build_architecture(architecture)
    normswap.save(model, tmp_path / "m.pt", architecture=architecture)
    loaded = normswap.load(tmp_path / "m.pt").model
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), loaded.state_dict().values(), strict=True)
    )


def test_every_identified_architecture_is_one_that_a_record_may_name() -> None:
    from normswap.checkpoints.architecture.index import shipped_index

    names = [f"{a.name},{','.join(f'{k}={v}' for k, v in a.defaults.items())}" for a in shipped_index().architectures]
    assert len(names) > 900
    for name in names:
        check_untrusted_name(name.rstrip(","))


WRAPPER = {
    "model_type": "timm_wrapper",
    "architectures": ["TimmWrapperForImageClassification"],
    "architecture": "test_resnet",
}
CONFIGURATIONS: dict[str, tuple[dict[str, Any], str]] = {
    "code": ({"model_type": "resnet", "auto_map": {"AutoConfig": "conf.C"}}, "has 'auto_map', which may run code"),
    "code of a part": (
        {"model_type": "detr", "backbone_config": {"model_type": "resnet", "auto_map": {"AutoModel": "conf.C"}}},
        "has 'auto_map', which may run code",
    ),
    "another file": (
        {"architecture": "test_resnet", "model_args": {"checkpoint_path": "../other.pth"}},
        "the keyword 'checkpoint_path', which a file may not set",
    ),
    "published weights": (
        {"architecture": "test_resnet", "model_args": {"pretrained": True}},
        "the keyword 'pretrained', which a file may not set",
    ),
    "arguments that are a list": ({"architecture": "test_resnet", "model_args": [1]}, "expected an object of keywords"),
    "timm's hub": (
        {"architecture": "hf-hub:user/model"},
        "architecture='hf-hub:user/model', expected a model of timm",
    ),
    "timm's folder": ({"architecture": "local-dir:d"}, "architecture='local-dir:d', expected a model of timm"),
    "no name": ({"architecture": ["x"]}, "architecture=['x'], expected a model of timm"),
    "a pooling that is a path": ({"architecture": "test_resnet", "global_pool": "../x"}, "global_pool='../x', "),
    "huge": ({"architecture": "test_resnet", "num_classes": 10**12}, "num_classes=1000000000000"),
    "a hub backbone": (
        {"model_type": "detr", "use_timm_backbone": False, "backbone": "gpt2"},
        "backbone='gpt2', expected a model of timm",
    ),
    "a path": ({"model_type": "resnet", "tokenizer": "/etc/passwd"}, "expected a plain value, not a path or a URL"),
    "a path in a list": ({"model_type": "resnet", "stages": [["a/b"]]}, "expected a plain value, not a path or a URL"),
    "a kernel": (
        {"model_type": "resnet", "_attn_implementation": "user/kernel"},
        "has '_attn_implementation', which may run code",
    ),
    "labels without end": (
        {"model_type": "resnet", "num_labels": 10**10},
        "has num_labels=10000000000, expected at most",
    ),
    "a huge layer": (
        {"model_type": "resnet", "architectures": ["ResNetModel"], "hidden_sizes": [10**6, 8, 8, 8], "depths": [1] * 4},
        "it is not the architecture of this file",
    ),
    "another class": ({"model_type": "resnet", "architectures": ["Trainer"]}, "expected a model class of transformers"),
    "another file in a wrapper": (
        WRAPPER | {"model_args": {"checkpoint_path": "../other.pth"}},
        "the keyword 'checkpoint_path', which a file may not set",
    ),
    "another file in a wrapper inside": (
        {"model_type": "detr", "backbone_config": WRAPPER | {"model_args": {"checkpoint_path": "other.pth"}}},
        "the keyword 'checkpoint_path', which a file may not set",
    ),
    "published weights in a wrapper": (
        WRAPPER | {"model_args": {"pretrained": True, "pretrained_cfg": {"file": "other.pth"}}},
        "the keyword 'pretrained', which a file may not set",
    ),
    "weights configured in a wrapper": (
        WRAPPER | {"model_args": {"pretrained_cfg": {"file": "other.pth"}}},
        "the keyword 'pretrained_cfg', which a file may not set",
    ),
    "a layer of a wrapper that is a path": (WRAPPER | {"model_args": {"norm_layer": "conf.C"}}, "or a plain word"),
    "a wrapper of timm's hub": (WRAPPER | {"architecture": "hf-hub:user/model"}, "expected a model of timm"),
    "arguments of a wrapper that are a text": (WRAPPER | {"model_args": "x"}, "expected an object of keywords"),
}


@pytest.mark.parametrize(("config", "message"), CONFIGURATIONS.values(), ids=CONFIGURATIONS)
def test_a_configuration_never_runs_fetches_or_opens_anything(
    marker: Path, state: dict[str, Any], config: dict[str, Any], message: str
) -> None:
    pytest.importorskip("transformers")
    Path("other.pth").write_bytes(b"")
    _folder(Path("m"), state, "hf:.")
    Path("m/config.json").write_text(json.dumps(config))
    Path("m/conf.py").write_text(Path("d/conf.py").read_text())
    with pytest.raises(ArchitectureError) as caught:
        normswap.load("m")
    assert message in str(caught.value)
    assert not marker.exists()


@pytest.mark.parametrize("text", ["[1, 2]", '"x"', "null"])
def test_a_configuration_that_is_no_object_is_refused(marker: Path, state: dict[str, Any], text: str) -> None:
    _folder(Path("m"), state, "hf:.")
    Path("m/config.json").write_text(text)
    with pytest.raises(ArchitectureError, match=r"config\.json: expected a JSON object, got"):
        normswap.load("m")


def test_a_record_in_its_own_folder_sets_only_listed_keywords(marker: Path, state: dict[str, Any]) -> None:
    _folder(Path("m"), state, "hf:.,scriptable=True")
    Path("m/config.json").write_text(json.dumps({"architecture": "test_resnet"}))
    with pytest.raises(ArchitectureError, match="the keyword 'scriptable', which a file may not set"):
        normswap.load("m")


def test_only_the_configuration_that_was_checked_is_used(marker: Path, state: dict[str, Any]) -> None:
    """transformers itself would read `config.4.0.0.json` here."""
    pytest.importorskip("transformers")
    _folder(Path("m"), state, "hf:.")
    malicious = {"model_type": "x", "auto_map": {"AutoConfig": "conf.C"}, "architectures": ["ResNetModel"]}
    good = {"model_type": "resnet", "architectures": ["ResNetModel"], "embedding_size": 8, "hidden_sizes": [8, 8, 8, 8]}
    Path("m/config.json").write_text(json.dumps({**good, "configuration_files": ["config.4.0.0.json"]}))
    Path("m/config.4.0.0.json").write_text(json.dumps(malicious))
    Path("m/conf.py").write_text(Path("d/conf.py").read_text())
    with pytest.raises(ArchitectureError, match="hf:m"):  # the weights are timm's
        normswap.load("m")
    assert not marker.exists()


def test_the_configuration_in_the_folder_is_found_at_any_path(marker: Path, state: dict[str, Any]) -> None:
    """A record in a file names no folder: `hf:.` is not the current one."""
    _folder(Path("m"), state, "hf:.,num_classes=1000")
    Path("m/config.json").write_text(json.dumps({"architecture": "test_resnet", "num_classes": 5}))
    assert normswap.load("m").model.num_classes == 1000
    Path("m").rename("n")
    assert normswap.load("n").model.num_classes == 1000
    _zip(Path("m.pt"), state, "hf:.")
    with pytest.raises(ArchitectureError, match="with that folder, or trust=True"):
        normswap.load("m.pt")


LINKED = {
    "weights": ("model.safetensors", "m"),
    "configuration": ("config.json", "m"),
    "a text": ("README.md", "m"),
    "an optimizer": ("optimizer.pt", "m"),
}


@pytest.mark.parametrize(("name", "folder"), LINKED.values(), ids=LINKED)
def test_a_link_out_of_a_folder_is_not_followed(marker: Path, state: dict[str, Any], name: str, folder: str) -> None:
    _folder(Path(folder), state, NAME)
    Path("secret").write_bytes(Path("m/model.safetensors").read_bytes())
    Path(folder, name).unlink(missing_ok=True)
    Path(folder, name).symlink_to("../secret")
    with pytest.raises(CheckpointError, match=r"a link to .*secret, outside the folder: replace the link"):
        normswap.load(folder)


@pytest.mark.parametrize("target", ["nowhere", "README.md"], ids=["nowhere", "itself"])
def test_a_link_that_is_no_file_is_reported_or_left_alone(marker: Path, state: dict[str, Any], target: str) -> None:
    _folder(Path("m"), state, NAME)
    Path("m/README.md").symlink_to(target)
    assert normswap.load("m").model is not None
    Path("m/.metadata").symlink_to(".metadata")
    assert normswap.load("m").model is not None


def test_the_cache_of_the_hub_is_made_of_links(marker: Path, state: dict[str, Any]) -> None:
    Path("hub/blobs").mkdir(parents=True)
    Path("hub/snapshots").mkdir()
    _folder(Path("hub/snapshots/0"), state, NAME)
    Path("hub/snapshots/0/model.safetensors").rename("hub/blobs/abc")
    Path("hub/snapshots/0/model.safetensors").symlink_to("../../blobs/abc")
    assert normswap.load("hub/snapshots/0").model is not None


@pytest.mark.parametrize("file", ["../x.safetensors", "/etc/x.safetensors", "a/../../x.safetensors"])
def test_an_index_leads_nowhere_else(marker: Path, state: dict[str, Any], file: str) -> None:
    Path("m").mkdir()
    safetensors.torch.save_file(state, "x.safetensors")
    Path("m/model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(state, file)}))
    with pytest.raises(CheckpointError, match="which is not in m: copy it there"):
        normswap.load("m")


MAKERS: dict[str, Callable[[], Any]] = {
    "zeros": lambda: torch.zeros(10**10),
    "a range": lambda: torch.arange(10**10),
    "a product": lambda: torch.zeros(40_000, 1) + torch.zeros(1, 40_000),
    "many": lambda: [torch.zeros(1) for _ in range(3_000)],
    "random numbers": lambda: torch.randn(10**10),
    "a diagonal": lambda: torch.eye(10**6),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_building_allocates_no_more_than_a_file_can_fill(tmp_path: Path, make: Callable[[], Any]) -> None:
    (tmp_path / "m.pt").write_bytes(b"x")
    with pytest.raises(ArchitectureError, match="building it needs more than"), limit_allocation(tmp_path / "m.pt", 1):
        make()


def test_a_limited_build_gives_the_same_numbers(tmp_path: Path) -> None:
    (tmp_path / "m.pt").write_bytes(b"x")
    torch.manual_seed(3)
    one = build_architecture(NAME).state_dict()
    torch.manual_seed(3)
    with limit_allocation(tmp_path / "m.pt", 1):
        other = build_architecture(NAME).state_dict()
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_list_of_keywords_says_which_is_wrong() -> None:
    check_keywords("x", {"num_classes": 3, "layers": [1, (2, 3)], "act_layer": "silu", "img_size": None})
    with pytest.raises(ArchitectureError, match=r"x has num_classes='3', expected numbers up to 1,000,000"):
        check_keywords("x", {"num_classes": "3"})
    with pytest.raises(ArchitectureError, match=r"x: expected a JSON object, got list"):
        check_configuration("x", [], models=list)
    assert parse_architecture(f"{NAME},layers=(1,2)").keywords == {"layers": (1, 2)}
