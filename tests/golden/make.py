"""How the golden files were written: by normswap 0.1.0, commit e7b137c, before its modules moved.

A record, not a tool: it imports names and modules of that version, and the files must never be written again (see
`README.md`). It was run in the root of the repository as `python tests/golden/make.py`.
"""

import copy
import importlib.util
import json
import lzma
import math
import os
import pickle
import pickletools
import re
import shutil
import signal
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import chdir, contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import timm.layers
import timm.utils
import torch
import torch.distributed.checkpoint
import transformers
from click.testing import CliRunner
from normswap.checkpoints.checkpoint import read_record
from normswap.documents import jsonable
from normswap.layers.gates import GatedModule
from torch import Tensor, fx, nn
from torch._export.serde.serialize import GraphModuleSerializer
from torch.optim.swa_utils import AveragedModel

import normswap
import normswap.errors
from normswap.cli import main

HERE = Path(__file__).resolve().parent


def load_networks() -> Any:
    """`networks.py` as the module that the pickles name."""
    spec = importlib.util.spec_from_file_location("golden_networks", HERE / "networks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["golden_networks"] = module
    spec.loader.exec_module(module)
    return module


networks: Any = load_networks()


def scrambled(model: nn.Module) -> nn.Module:
    """Give every norm statistics and parameters that matter."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        last = name.rpartition(".")[2].removeprefix("original")
        if name.endswith(("mean_weight", "var_weight")) or not tensor.is_floating_point():
            continue
        if last.endswith("var"):
            tensor.data.uniform_(0.5, 2)
        elif last.endswith("mean"):
            tensor.data.normal_(0, 0.3)
        elif tensor.dim() == 1:
            tensor.data.uniform_(0.5, 1.5)
    return model


def moved(model: nn.Module) -> nn.Module:
    """Move all gates away from where they started."""
    for layer in model.modules():
        if isinstance(layer, GatedModule):
            for gate, shares in zip((layer.mean_weight, layer.var_weight), ((0.2, 0.3, 0.5), (0.1, 0.5, 0.4))):  # noqa: B905
                point = torch.tensor(shares[-gate.numel() :], dtype=gate.dtype)
                gate.data.copy_(point / point.sum() if layer.gate == "simplex" else point.log())
    return model


def stock() -> nn.Module:
    layers = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)
    return scrambled(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)))


def fused() -> nn.Module:
    act = timm.layers.BatchNormAct2d(4, act_layer=nn.SiLU)
    return scrambled(nn.Sequential(nn.Conv2d(3, 4, 3), act, networks.NormRelu(4)))


def synchronized() -> nn.Module:
    return scrambled(nn.Sequential(nn.Conv2d(3, 4, 3), nn.SyncBatchNorm(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)))


def kinds() -> nn.Module:
    norms = nn.InstanceNorm2d(4, affine=True), nn.GroupNorm(1, 4)
    return scrambled(nn.Sequential(nn.Conv2d(3, 4, 3), *norms, networks.FrozenBatchNorm2d(4), nn.BatchNorm2d(4)))


def converted_kinds(x: Tensor) -> nn.Module:
    settings: Any = {"1": {"branches": ("in", "ln", "bn"), "bn_statistics": "renorm"}}
    model = normswap.convert(kinds().double(), x, kinds=("bn", "in", "gn1"), settings=settings, exclude=["4"]).model
    normswap.freeze_statistics(model)  # the hooks of a BN layer, and what an SN layer did before
    return model


def as_traced(x: Tensor) -> nn.Module:
    return fx.symbolic_trace(moved(normswap.convert(stock().double(), x).model))


def edited_graph(x: Tensor) -> nn.Module:
    traced = fx.symbolic_trace(scrambled(networks.Called()).double().eval())
    return moved(normswap.convert(traced, x).model)


def in_place(x: Tensor) -> nn.Module:
    model = scrambled(networks.Shared()).double()
    model.bn.register_forward_hook(networks.hook)
    return normswap.convert(model, x, inplace=True).model


def averaged(x: Tensor) -> nn.Module:
    return AveragedModel(moved(normswap.convert(stock().double(), x).model))


def timm_averaged(x: Tensor) -> nn.Module:
    return timm.utils.ModelEmaV3(moved(normswap.convert(stock().double(), x).model))


def known() -> dict[str | type, Any]:
    name = "golden_networks.NormRelu"
    return normswap.KNOWN_NORMS | {name: partial(normswap.read_norm_act, then=("relu",))}


MODELS: dict[str, Callable[[Tensor], nn.Module]] = {
    "stock": lambda x: normswap.convert(stock().double(), x).model,
    "moved": lambda x: moved(normswap.convert(stock().double(), x).model),
    "float32": lambda x: moved(normswap.convert(stock(), x.float()).model),
    "functional": lambda x: normswap.convert(scrambled(networks.Functional()).double(), x).model,
    "functional_partly": lambda x: moved(
        normswap.convert(scrambled(networks.Functional()).double(), x, exclude=["batch_norm"]).model
    ),
    "fused": lambda x: moved(normswap.convert(fused().double(), x, norms=known()).model),
    "in_place": in_place,
    "synchronized": lambda x: normswap.convert(synchronized().double(), x, synchronize=True).model,
    "scratch": lambda x: nn.Sequential(nn.Conv2d(3, 4, 3), normswap.SwitchNorm2d(4)).double(),
    "ranks": lambda x: moved(networks.Ranks().double()),
    "kinds": converted_kinds,
    "graph": lambda x: normswap.convert(scrambled(networks.Dropping()).double(), x, as_graph=True).model,
    "traced": as_traced,
    "edited_graph": edited_graph,
    "averaged": averaged,
    "timm_averaged": timm_averaged,
}


def output(model: nn.Module, x: Tensor) -> Tensor:
    y = model(x)
    return y if isinstance(y, Tensor) else y.logits


def results_on(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """What a model gives: in evaluation, in training, the gradient of its input and its buffers thereafter."""
    model = model.eval()
    found = {"evaluation": output(model, x).detach().clone()}
    inside = x.clone().requires_grad_()
    torch.manual_seed(1)
    y = output(model.train(), inside)
    y.square().sum().backward()
    buffers = [buffer.double().flatten() for buffer in model.buffers()]
    found |= {"training": y.detach().clone(), "buffers": torch.cat(buffers) if buffers else torch.zeros(0)}
    return {**found, "gradient": inside.grad if inside.grad is not None else torch.zeros(0)}


def make_models(folder: Path) -> None:
    folder.mkdir()
    expected: dict[str, Tensor] = {}
    for name, make in MODELS.items():
        torch.manual_seed(0)
        x = torch.randn(networks.SHAPE, dtype=torch.float64)
        model = make(x)
        expected["input"] = x
        x = x.float() if name == "float32" else x
        torch.save(model, folder / f"{name}.pt")
        (folder / f"{name}.pickle").write_bytes(pickle.dumps(model))
        for key, tensor in results_on(model, x).items():
            expected[f"{name}/{key}"] = tensor.contiguous()
    safetensors.torch.save_file(expected, folder / "expected.safetensors")


# --- what functions return, as objects --------------------------------------------------------------------------------


def make_results(path: Path) -> None:
    """What functions return, which programs may pickle: plans, proofs, records, recipes, errors."""
    torch.manual_seed(0)
    x = torch.randn(networks.SHAPE, dtype=torch.float64)
    model = stock().double()
    conversion = normswap.convert(model, x)
    proof = normswap.verify(model, conversion.model, [x])
    trained = copy.deepcopy(model)
    optimizer = torch.optim.SGD(trained.parameters(), lr=0.1)
    with tempfile.TemporaryDirectory() as there, chdir(there):
        normswap.save(conversion.model, "model.pt", plan=conversion.plan, verification=proof)
        record = read_record(Path("model.pt"))
        loaded = normswap.load("model.pt", architecture=model)
    results = {
        "conversion": conversion,
        "training": normswap.convert_training(trained, optimizer, example_inputs=x),
        "plan": normswap.plan_swaps(networks.Sites().double(), x),
        "sites": normswap.find_norm_sites(model, x),
        "verification": proof,
        "calibration": normswap.calibrate(copy.deepcopy(conversion.model), [x, x]),
        "importance": normswap.importance_weights(conversion.model),
        "record": record,
        "loaded": loaded,
        "recipe": normswap.read_recipe("digits_small_batch"),
        "errors": [error("why") for error in ERRORS],
        "readers": READERS,
    }
    path.write_bytes(pickle.dumps(results))


ERRORS = [
    error
    for error in vars(normswap.errors).values()
    # `RunInterrupted` of that version cannot be pickled: its second argument gets lost.
    if isinstance(error, type) and error.__module__ == "normswap.errors" and error.__name__ != "RunInterrupted"
]
READERS = [normswap.read_batch_norm, normswap.read_group_norm, normswap.read_instance_norm, normswap.read_norm_act]


# --- plans ------------------------------------------------------------------------------------------------------------


def make_plans(folder: Path) -> None:
    folder.mkdir()
    torch.manual_seed(0)
    x = torch.randn(networks.SHAPE, dtype=torch.float64)
    model = scrambled(networks.Sites()).double()
    choices: dict[str, Any] = {"exclude": ["excluded"], "kinds": ("bn", "in")}
    settings: Any = {"instance": {"branches": ("in", "bn")}, "bn": {"train_gates": False, "bn_statistics": "renorm"}}
    plan = normswap.plan_swaps(model, x, **choices, settings=settings)
    (folder / "sites.json").write_text(plan.to_json())
    edited = normswap.plan_swaps(model, x, **choices, synchronize=True).to_dict()
    edited["settings"] = {"*": {"gate": "softmax"}, "re:^(bn|act)$": {"branches": ["ln", "bn"], "synchronize": False}}
    (folder / "with_settings.json").write_text(json.dumps(edited, indent=2) + "\n")
    (folder / "with_settings_applied.json").write_text(normswap.SwapPlan.from_dict(edited).to_json())
    expected = {"input": x}
    for name in ("sites", "with_settings"):
        converted = copy.deepcopy(model)
        normswap.apply_plan(converted, normswap.SwapPlan.from_json((folder / f"{name}.json").read_text()))
        expected |= {f"{name}/{key}": tensor.contiguous() for key, tensor in results_on(converted, x).items()}
    state = {f"state/{name}": tensor for name, tensor in model.state_dict().items()}
    safetensors.torch.save_file(expected | state, folder / "expected.safetensors")


# --- files ------------------------------------------------------------------------------------------------------------

IMAGES = (2, 3, 32, 32)
BY_FILE = ("--arch", "networks.py:classifier", "--input", "2x3x32x32")
TIMM = "timm:test_efficientnet,channel_multiplier=0.05,num_classes=2"


def images() -> Tensor:
    """The input of all files: a formula, and no numbers to store."""
    return torch.arange(math.prod(IMAGES)).double().mul(0.7).sin().float().view(IMAGES)


def command(*arguments: str) -> str:
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, f"{arguments}: {done.output}"
    return done.stdout


@contextmanager
def no_stack_traces() -> Iterator[None]:
    """Leave out of exported programs where in which file each node came from: those are paths of one machine."""
    serializer: Any = GraphModuleSerializer
    whole = serializer.serialize_metadata

    def without(self: Any, node: fx.Node) -> Any:
        return {key: value for key, value in whole(self, node).items() if key != "stack_trace"}

    serializer.serialize_metadata = without
    try:
        yield
    finally:
        serializer.serialize_metadata = whole


def trained_checkpoint() -> dict[str, Any]:
    model = scrambled(networks.classifier())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    average = copy.deepcopy(model)
    model(torch.randn(IMAGES)).square().mean().backward()
    optimizer.step()
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5)
    states = {"state_dict": model, "state_dict_ema": average, "optimizer": optimizer, "scheduler": scheduler}
    return {**{name: owner.state_dict() for name, owner in states.items()}, "epoch": 3}


def make_files(folder: Path) -> None:
    """Files that `normswap.save` and the command wrote; paths in them are relative to the folder."""
    folder.mkdir()
    shutil.copy(HERE / "networks.py", folder)
    torch.manual_seed(0)
    with chdir(folder), no_stack_traces():
        content = trained_checkpoint()
        torch.save(content, "last.pt")
        torch.distributed.checkpoint.save({"state_dict": content["state_dict"]}, checkpoint_id="dcp", no_dist=True)
        config = transformers.ResNetConfig(
            embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", num_labels=2
        )
        scrambled(transformers.ResNetForImageClassification(config)).save_pretrained("hf", max_shard_size="3KB")
        model = scrambled(networks.classifier()).eval()
        torch.export.save(torch.export.export(model, (torch.randn(IMAGES),)), "program.pt2")
        command("convert", "last.pt", *BY_FILE, "--save-plan", "saved_plan.json")
        command("convert", "dcp", *BY_FILE)
        command("convert", "hf", "--arch", "hf:hf", "--input", "2x3x32x32")
        command("convert", "program.pt2", "--input", "2x3x32x32", "--trust")
        x = images()
        conversion = normswap.convert(model, x)
        options: Any = {"plan": conversion.plan, "verification": normswap.verify(model, conversion.model, [x])}
        normswap.save(moved(conversion.model), "saved.pt", architecture="networks.py:classifier", **options)
        normswap.save(conversion.model, "saved.safetensors", architecture="networks.py:classifier", **options)
        normswap.save(conversion.model, "saved_module.pt", payload="module", **options)
        model = scrambled(timm.create_model("test_efficientnet", channel_multiplier=0.05, num_classes=2)).bfloat16()
        conversion = normswap.convert(model, x.bfloat16())
        normswap.save(moved(conversion.model), "named.safetensors", plan=conversion.plan, architecture=TIMM)
        expected: dict[str, Tensor] = {}
        for name, options in LOADED.items():
            loaded = normswap.load(name, **options).model
            own = x.bfloat16() if name.startswith("named") else x
            if name.endswith(".pt2"):  # a program has no other mode
                expected[f"{name}/evaluation"] = loaded(own).detach().clone()
                continue
            found = results_on(loaded, own)
            del found["gradient"]  # as large as the images
            expected |= {f"{name}/{key}": tensor.contiguous() for key, tensor in found.items()}
        safetensors.torch.save_file(expected, "expected.safetensors")
        for name in ("networks.py", "program.pt2"):
            Path(name).unlink()
        for name in ("dcp", "hf", "__pycache__"):
            shutil.rmtree(name, ignore_errors=True)


# How `normswap.load` is called for each file.
BY_NAME: dict[str, Any] = {"architecture": "networks.py:classifier"}
LOADED: dict[str, dict[str, Any]] = {
    "last.normswap.pt": BY_NAME,
    "dcp.normswap": BY_NAME,
    "hf.normswap": {},
    "saved.pt": BY_NAME,
    "saved.safetensors": BY_NAME,
    "saved_module.pt": {"trust": True},
    "named.safetensors": {},
    "program.normswap.pt2": {"trust": True},
}


# --- a run ------------------------------------------------------------------------------------------------------------

RECIPE = """# A run of six steps on digits, interrupted after the third one.

[model]
architecture = "networks.py:classifier"

[data]
source = "digits:shifted"
image_size = 32
batch_size = 4

[train]
steps = 6
lr = 0.05
importance_lr = 0.1
ema_decay = 0.9
batch_price = 0.05

[run]
output = "run"
log_every = 2
"""


def make_run(folder: Path) -> None:
    """A run that was interrupted, and what it came to where it went on."""
    folder.mkdir()
    (folder / "recipe.toml").write_text(RECIPE)
    with tempfile.TemporaryDirectory() as there, chdir(there):
        shutil.copy(HERE / "networks.py", there)
        recipe = normswap.read_recipe(folder / "recipe.toml")

        def stop(step: int, _steps: int) -> None:
            if step == 3:
                os.kill(os.getpid(), signal.SIGINT)

        try:
            normswap.run_recipe(recipe, trust=True, on_step=stop)
        except normswap.errors.RunInterrupted as interrupted:
            print(interrupted)
        shutil.copytree("run", folder / "run", ignore=shutil.ignore_patterns("tensorboard"))
        outcome = normswap.run_recipe(recipe, resume=True, trust=True)
        document = jsonable({**asdict(outcome), "output": str(outcome.output), "model": str(outcome.model)})
        (folder / "outcome.json").write_text(json.dumps(document, indent=2) + "\n")
        model = {name: tensor.contiguous() for name, tensor in torch.load(outcome.model).items()}
        safetensors.torch.save_file(model, folder / "model.safetensors")


# --- what the command prints ------------------------------------------------------------------------------------------

SHORT = ("--set", "train.steps=2", "--set", "run.output=short")
COMMANDS: dict[str, tuple[str, ...]] = {
    "inspect": ("inspect", "last.pt", *BY_FILE),
    "inspect without an architecture": ("inspect", "last.pt"),
    "inspect converted": ("inspect", "last.normswap.pt", *BY_FILE[:2]),
    "convert": ("convert", "last.pt", *BY_FILE, "-o", "out.pt"),
    "convert a dry run": ("convert", "last.pt", *BY_FILE, "-o", "none.pt", "--dry-run"),
    "convert without proof": ("convert", "last.pt", *BY_FILE, "-o", "unproved.pt", "--no-verify"),
    "convert by names": ("convert", "last.pt", "--arch", "none", "--no-verify", "-o", "names.pt"),
    "convert two networks": (
        *("convert", "last.pt", *BY_FILE, "-o", "two.pt", "--no-verify"),
        *("--entry", "state_dict", "--entry", "state_dict_ema"),
    ),
    "convert again": ("convert", "last.normswap.pt", *BY_FILE),
    "verify": ("verify", "last.pt", "last.normswap.pt", *BY_FILE),
    "verify another": ("verify", "last.pt", "saved.pt", *BY_FILE),
    "calibrate": (
        *("calibrate", "last.normswap.pt", "--arch", "networks.py:classifier", "-o", "calibrated.pt"),
        *("--data", "digits", "--input-size", "32", "--batches", "2"),
    ),
    "identify": ("identify", "last.pt"),
    "identify converted": ("identify", "named.safetensors"),
    "finetune": ("finetune", "recipe.toml", "--trust", *SHORT),
    "a missing file": ("inspect", "missing.pt"),
}


def key_paths(document: Any, place: str = "") -> Iterator[str]:
    """The places of all values in a JSON document; items of lists share theirs."""
    if isinstance(document, dict) and document:
        for key, value in document.items():
            yield from key_paths(value, f"{place}.{key}" if place else key)
    elif isinstance(document, list) and document:
        for item in document:
            yield from key_paths(item, f"{place}[]")
    else:
        yield place


def make_keys(path: Path) -> None:
    found = {}
    with tempfile.TemporaryDirectory() as there, chdir(there):
        shutil.copytree(HERE / "files", there, dirs_exist_ok=True)
        for name in ("networks.py", "run/recipe.toml"):
            shutil.copy(HERE / name, there)
        for name, arguments in COMMANDS.items():
            done = CliRunner().invoke(main, [*arguments, "--json"])
            document = json.loads(done.stdout) if done.stdout else None
            keys = sorted({*key_paths(document)}) if document is not None else []
            found[name] = {"arguments": arguments, "exit_code": done.exit_code, "keys": keys}
    path.write_text(json.dumps(found, indent=1) + "\n")


# --- which names the pickles hold -------------------------------------------------------------------------------------


def names_in(data: bytes) -> set[tuple[str, str]]:
    """The globals of normswap and of `networks.py` in a pickle, and those that code in it imports."""
    found: set[tuple[str, str]] = set()
    texts: list[str] = []
    memo: dict[int, str] = {}
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name in ("GLOBAL", "INST"):
            module, _, name = str(argument).partition(" ")
            found.add((module, name))
        elif opcode.name == "STACK_GLOBAL":
            found.add((texts[-2], texts[-1]))
        elif opcode.name in ("BINUNICODE", "SHORT_BINUNICODE", "UNICODE"):
            texts.append(str(argument))
            found |= {*re.findall(r"^from (normswap[\w.]*) import (\w+)", str(argument), re.M)}
        elif opcode.name in ("MEMOIZE", "BINPUT", "LONG_BINPUT"):
            memo[len(memo) if argument is None else argument] = texts[-1] if texts else ""
        elif opcode.name in ("BINGET", "LONG_BINGET"):
            texts.append(memo.get(argument, ""))
    return {(module, name) for module, name in found if module.partition(".")[0] in ("normswap", "golden_networks")}


def pickles_in(folder: Path) -> Iterator[tuple[str, bytes]]:
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.suffix == ".pickle":
            yield name, path.read_bytes()
        elif path.suffix == ".pt":
            with zipfile.ZipFile(path) as archive:
                yield from ((name, archive.read(n)) for n in archive.namelist() if n.endswith(".pkl"))


def make_names(path: Path) -> None:
    found = {name: sorted(names_in(data)) for name, data in pickles_in(HERE)}
    path.write_text(json.dumps({name: names for name, names in found.items() if names}, indent=1) + "\n")


def make_all(steps: Sequence[str]) -> None:
    warnings.simplefilter("ignore")
    targets = {
        "models": make_models,
        "results.pickle": make_results,
        "plans": make_plans,
        "files": make_files,
        "run": make_run,
        "json_keys.json": make_keys,
        "pickled_names.json": make_names,
    }
    for name, make in targets.items():
        if not steps or name in steps:
            make(HERE / name)
    for path in sorted(HERE.rglob("*")):  # last, since the steps read what others wrote; tests unpack a copy
        if path.suffix in (".pt", ".pickle", ".pt2", ".distcp", ".safetensors"):
            path.with_name(f"{path.name}.xz").write_bytes(lzma.compress(path.read_bytes()))
            path.unlink()


if __name__ == "__main__":
    make_all(sys.argv[1:])
