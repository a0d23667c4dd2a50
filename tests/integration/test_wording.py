"""What messages say: Python's arguments in Python, options on the command line, and what to pass instead."""

import ast
import inspect
import io
import re
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from click.testing import CliRunner, Result
from torch import nn

import normswap
from normswap.checkpoints.formats.formats import needs_trust
from normswap.cli import main
from normswap.cli.console import OPTIONS, translate_arguments
from normswap.errors import ArchitectureError, ArgumentError, CheckpointError, DataError, ModelError, NormswapError
from normswap.finetune.data.loaders import DataSettings
from tests.helpers import files

PACKAGE = Path(normswap.__file__).parent


class Net(nn.Sequential):
    """A network of one norm."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))


def x() -> torch.Tensor:
    return torch.randn(2, 3, 8, 8)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a file of the small network, one of an own network, and the code of that."""
    monkeypatch.chdir(tmp_path)
    torch.save(files.small_model().state_dict(), "bn.pt")
    torch.save(files.TiedNet().state_dict(), "own.pt")
    Path("own.py").write_text(
        "from tests.helpers.files import TiedNet\n\n"
        "def build(width=8):\n    return TiedNet()\n\n"
        "class Other:\n    pass\n"
    )
    return tmp_path


# One message, two faces.


def library_texts() -> list[tuple[str, str]]:
    """Every text in the library's code that is no docstring, by place."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        if "cli" in path.relative_to(PACKAGE).parts:
            continue
        tree = ast.parse(path.read_text())
        docs = {
            id(node.body[0].value)
            for node in ast.walk(tree)
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
            and node.body
            and isinstance(node.body[0], ast.Expr)
        }
        found += [
            (f"{path.relative_to(PACKAGE)}:{node.lineno}", node.value)
            for node in ast.walk(tree)
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs
        ]
    return found


def option_first(text: str) -> bool:
    """Whether a text names an option of the command line other than in brackets behind an argument of Python."""
    # Another program's, a whole command, and a note that a plan carries to the command line.
    foreign = ("--multi_gpu", "normswap convert --save-plan", " --resume", "use --input ")
    for words in foreign:
        text = text.replace(words, "")
    return re.search(r"(?<![\w(-])--[a-z]", text) is not None


def test_the_library_names_arguments_of_python_not_options() -> None:
    assert [place for place, text in library_texts() if option_first(text)] == []


@pytest.mark.parametrize(("text", "found"), [("pass --trust", True), ("pass trust=True (--trust)", False)])
def test_an_option_in_a_text_is_found(text: str, found: bool) -> None:
    assert option_first(text) is found


def test_every_argument_that_becomes_an_option_is_one_and_the_option_is_there() -> None:
    options = {
        word for command in main.commands.values() for p in command.params for word in (*p.opts, *p.secondary_opts)
    }
    assert {option.name for option in OPTIONS.values()} <= options
    functions = [f for name in normswap.__all__ if inspect.isfunction(f := getattr(normswap, name))]
    arguments = {name for function in functions for name in inspect.signature(function).parameters}
    assert OPTIONS.keys() - arguments == {"image_size"}  # of `DataSettings`


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("pass trust=True if", "pass --trust if"),
        ("pass architecture='timm:resnet18,num_classes=4' or", "pass --arch timm:resnet18,num_classes=4 or"),
        ("leave architecture= out", "leave --arch out"),
        ("kinds=('bn', 'in') (--kinds bn,in)", "--kinds bn,in"),
        ("pass example_inputs=torch.randn(2, 3, 8, 8).", "pass --input 2x3x8x8."),
        ("give image_size=(224, 320)", "give --input-size 224x320"),
        ("kinds: expected some of", "--kinds: expected some of"),
        ("which kinds= does not include", "which --kinds does not include"),
        ("another function. Measure the distance with normswap.measure_distance.", "another function."),
        ("with normswap.calibrate(model, batches, only=...), or", "with normswap calibrate --data ... --only ..., or"),
        ("model.architecture=x, my_trust=True", "model.architecture=x, my_trust=True"),
    ],
)
def test_an_argument_is_shown_as_the_option_that_means_it(message: str, shown: str) -> None:
    assert translate_arguments(message) == shown


def test_one_failure_is_reported_as_an_argument_in_python_and_as_an_option_on_the_command_line(folder: Path) -> None:
    torch.save(Net(), "module.pt")
    with pytest.raises(CheckpointError, match="pass trust=True if you trust") as caught:
        normswap.load("module.pt")
    assert "--" not in str(caught.value)
    shown = run("convert", "module.pt").stderr
    assert "pass --trust if you trust" in shown
    assert "trust=True" not in shown


# What is no module.

MISTAKEN = {
    "a state dict": (
        lambda: Net().state_dict(),
        r"got a state dict \(7 tensors\).*load_state_dict.*normswap\.load\(path",
    ),
    "a path": (lambda: "model.pt", r"got the path 'model\.pt': pass normswap\.load\('model\.pt'\)\.model"),
    "a Path": (lambda: Path("model.pt"), "got the path 'model.pt'"),
    "a checkpoint": (lambda: {"state_dict": Net().state_dict(), "epoch": 1}, r"got a checkpoint \(a dict with 'state"),
    "a class": (lambda: Net, r"got the class Net: pass an instance, such as Net\(\)"),
    "a function": (lambda: x, "got the function x: pass the module that it returns"),
    "a conversion": (lambda: normswap.convert(Net()), r"got a Conversion: pass its \.model"),
    "a tensor": (x, "got a Tensor: pass the model first, then its inputs"),
    "a list": (lambda: [Net()], r"got a list of 1 modules: pass one at a time"),
    "nothing": (lambda: None, "expected a torch.nn.Module, got None"),
}


@pytest.mark.parametrize(("make", "message"), MISTAKEN.values(), ids=MISTAKEN)
def test_what_is_no_module_is_refused_with_what_to_pass(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=f"model: expected a torch.nn.Module, {message}"
                       if "expected" not in message else message):  # fmt: skip
        normswap.convert(make(), x())


def entry_points() -> dict[str, Callable[[Any], Any]]:
    """Every public function that takes a model, with a model to be given."""
    plan = normswap.plan_swaps(Net())
    optimizer = torch.optim.SGD(Net().parameters(), lr=0.1)
    return {
        "apply_plan": lambda m: normswap.apply_plan(m, plan),
        "bake": normswap.bake,
        "batch_dependence": normswap.batch_dependence,
        "calibrate": lambda m: normswap.calibrate(m, [x()]),
        "export": lambda m: normswap.export(m, "a.onnx", example_inputs=x()),
        "adaptation_parameters": normswap.adaptation_parameters,
        "analyze": lambda m: normswap.analyze(m, [x()]),
        "convert": normswap.convert,
        "convert_training": lambda m: normswap.convert_training(m, optimizer),
        "exempt_gates": lambda m: normswap.exempt_gates(m, optimizer),
        "find_norm_sites": normswap.find_norm_sites,
        "fixed_sample_statistics": lambda m: ExitStack().enter_context(normswap.fixed_sample_statistics(m, x())),
        "freeze_statistics": normswap.freeze_statistics,
        "gate_impurity": normswap.gate_impurity,
        "importance_weights": normswap.importance_weights,
        "load_norm_state": lambda m: normswap.load_norm_state(m, {}),
        "measure_distance": lambda m: normswap.measure_distance(m, Net(), [x()]),
        "norm_state": normswap.norm_state,
        "open_data": lambda m: normswap.open_data(DataSettings("digits"), model=m),
        "param_groups": normswap.param_groups,
        "plan_swaps": normswap.plan_swaps,
        "plot_importance": normswap.plot_importance,
        "pool_statistics": lambda m: normswap.pool_statistics(m, [{}], [1]),
        "revert": normswap.revert,
        "save": lambda m: normswap.save(m, "never.pt"),
        "set_importance": lambda m: normswap.set_importance(m, {}),
        "set_bn_statistics": lambda m: normswap.set_bn_statistics(m, "running"),
        "split_state": normswap.split_state,
        "synchronize_statistics": normswap.synchronize_statistics,
        "trainable_gates": normswap.trainable_gates,
        "unfreeze_statistics": normswap.unfreeze_statistics,
        "update_statistics": lambda m: normswap.update_statistics(m, [x()]),
        "verify": lambda m: normswap.verify(m, Net(), [x()]),
        "limit_gate_steps": lambda m: normswap.limit_gate_steps(m, optimizer),
        "watch_importance": lambda m: normswap.watch_importance(m, optimizer, write=print),
    }


def test_every_function_that_takes_a_model_refuses_what_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    calls = entry_points()
    takes_model = {
        name
        for name in normswap.__all__
        if inspect.isfunction(f := getattr(normswap, name))
        and {"model", "original"} & {*inspect.signature(f).parameters}
    }
    assert calls.keys() == takes_model
    for call in calls.values():
        for wrong in (Net().state_dict(), "model.pt"):
            with pytest.raises(ArgumentError, match=r"^(model|original): expected a torch\.nn\.Module, got "):
                call(wrong)
    with pytest.raises(ArgumentError, match=r"^converted: expected a torch.nn.Module, got a Conversion"):
        normswap.verify(Net(), normswap.convert(Net()), [x()])
    assert not list(tmp_path.iterdir())


WRONG_ARGUMENTS = {
    "plan": (lambda: normswap.convert(Net(), plan=normswap.convert(Net())), "plan: expected a SwapPlan .*got a Conv"),
    "plan of save": (lambda: normswap.save(Net(), "a.pt", plan={}), "plan: expected a SwapPlan .*got a dict"),  # type: ignore[arg-type]
    "plan as a dict": (lambda: normswap.SwapPlan.from_json({}), "text: expected a plan as JSON, such as Path"),  # type: ignore[arg-type]
    "norms": (lambda: normswap.convert(Net(), norms=[Net]), "norms: expected a table such as KNOWN_NORMS"),  # type: ignore[arg-type]
    "include": (lambda: normswap.convert(Net(), include=3), "include: expected a list of patterns"),  # type: ignore[arg-type]
    "tolerance": (lambda: normswap.verify(Net(), Net(), [x()], tolerance="1"), "tolerance: expected a relative error"),  # type: ignore[arg-type]
    "path": (
        lambda: normswap.load(Net().state_dict()),
        "path: expected the name of a file or a folder, got an? Ordered",
    ),  # type: ignore[arg-type]
    "path of save": (lambda: normswap.save(Net(), 3), "path: expected the name of a file, got an int"),  # type: ignore[arg-type]
    "architecture": (lambda: normswap.save(Net(), "a.pt", architecture=Net()), "architecture: expected a name such as"),  # type: ignore[arg-type]
    "verification": (lambda: normswap.save(Net(), "a.pt", verification=True), "verification: expected what verify"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize(("call", "message"), WRONG_ARGUMENTS.values(), ids=WRONG_ARGUMENTS)
def test_an_argument_of_a_wrong_type_is_named(
    call: Callable[[], Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ArgumentError, match=message):
        call()
    assert not list(tmp_path.iterdir())


def test_the_architecture_of_load_can_be_no_state_dict(folder: Path) -> None:
    with pytest.raises(ArgumentError, match=r"architecture: expected 'timm:NAME'.* got OrderedDict"):
        normswap.load("own.pt", architecture=files.TiedNet().state_dict())  # type: ignore[arg-type]


# What are no inputs.

INPUTS = {
    "a shape": ((2, 3, 32, 32), r"\(2, 3, 32, 32\) is a shape: pass a tensor, such as torch\.randn\(2, 3, 32, 32\)"),
    "a Size": (torch.Size([2, 3, 8, 8]), r"\(2, 3, 8, 8\) is a shape"),
    "a list": ([2, 3, 8, 8], r"\(2, 3, 8, 8\) is a shape"),
    "numpy": (x().numpy(), r"a numpy array: pass a tensor, such as torch\.from_numpy\(x\)\.float\(\)"),
    "a text": ("cat.jpg", "'cat.jpg' is a string: pass a tensor"),
    "a loader": (torch.utils.data.DataLoader([0]), r"a DataLoader: pass the inputs of one batch"),
    "labelled": ((x(), torch.tensor([1, 0])), "images and labels: pass only the images"),
    "a list of tensors": ([x()], "a list is one argument: pass a tuple for several arguments"),
    "one image": (x()[0], "one image without a batch dimension: pass 2x3x8x8"),
}


@pytest.mark.parametrize(("inputs", "message"), INPUTS.values(), ids=INPUTS)
def test_inputs_that_a_model_cannot_take_are_reported_with_what_to_pass(inputs: Any, message: str) -> None:
    with pytest.raises(ModelError, match=f"the model fails on an input of .*{message}"):
        normswap.plan_swaps(Net(), inputs)
    with pytest.raises(ModelError, match=f"the original model fails on an input of .*{message}"):
        normswap.verify(Net(), Net(), [inputs])


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        (x(), r"got one Tensor: pass \[x\]"),
        (x().numpy(), r"got one ndarray from numpy: pass \[torch\.from_numpy\(x\)\]"),
        ((2, 3, 8, 8), r"got the shape \(2, 3, 8, 8\): pass \[torch\.randn\(2, 3, 8, 8\)\]"),
        ("images", "got one str: pass"),
        (None, "got one NoneType: pass"),
    ],
)
def test_one_input_is_no_list_of_inputs(batches: Any, message: str) -> None:
    with pytest.raises(ModelError, match=f"batches: expected a list of inputs, {message}"):
        normswap.verify(Net(), Net(), batches)
    with pytest.raises(DataError, match=f"batches: expected a list of inputs, {message}"):
        normswap.calibrate(Net(), batches)
    with pytest.raises(DataError, match=f"loader: expected a list of inputs, {message}"):
        normswap.update_statistics(Net(), batches)


# Architectures.

NAMES = {
    "no function": ("own.py", "expected path/file.py:function to build the model, such as own.py:build; it defines"),
    "a colon only": ("own.py:", "such as own.py:build; it defines build, Other"),
    "no file": ("nowhere.py", "such as nowhere.py:build (the file nowhere.py does not exist)"),
    "none": ("none", "'none' builds no model, which is needed here: pass timm:NAME, or path/file.py:function"),
    "weights": ("own.pt", "'own.pt': expected a model, got a file of weights"),
    "a slash": ("timm/resnet18", "such as timm:resnet18"),
    "torchvision": ("torchvision.models.resnet18", "such as torchvision:resnet18"),
    "of a class": ("timm:ResNet18", "timm has no model 'ResNet18'; nearest: resnet18"),
    "of the other zoo": ("torchvision:test_resnet", "no model 'test_resnet'; timm has: timm:test_resnet"),
    "keyword of timm": ("timm:test_resnet,num_clases=7", "'num_clases'; did you mean num_classes?"),
    "keyword of torchvision": ("torchvision:resnet18,num_clases=7", "'num_clases'; did you mean num_classes?"),
    "own keyword": ("own.py:build,widht=3", "'widht'; did you mean width?"),
    "keyword like none": ("own.py:build,zzz=3", "'zzz'; it takes width"),
}  # fmt: skip


@pytest.mark.parametrize(("name", "message"), NAMES.values(), ids=NAMES)
def test_a_mistaken_architecture_is_reported_with_the_nearest(folder: Path, name: str, message: str) -> None:
    with pytest.raises(ArchitectureError, match=re.escape(message)):
        normswap.load("own.pt", architecture=name)
    assert not name.startswith("own.py:") or "own.py" not in sys.modules


def test_a_wrong_architecture_is_reported_with_the_one_that_fits(folder: Path) -> None:
    with pytest.raises(
        ArchitectureError, match=r"do not fit timm:test_vit.*the tensors fit architecture='timm:test_resnet,"
    ):
        normswap.load("bn.pt", architecture="timm:test_vit")
    with pytest.raises(ArchitectureError, match="the tensors fit architecture='timm:test_resnet,num_classes=7'"):
        normswap.load("bn.pt", architecture=files.TiedNet)
    refused = run("convert", "bn.pt", "--arch", "timm:test_vit")
    assert (refused.exit_code, "the tensors fit --arch timm:test_resnet,num_classes=7" in refused.stderr) == (2, True)
    with pytest.raises(ArchitectureError) as caught:
        normswap.load("own.pt", architecture="timm:test_resnet")
    assert "the tensors fit" not in str(caught.value)


def test_an_own_model_is_informed_of_own_code_and_of_names(folder: Path) -> None:
    with pytest.raises(ArchitectureError, match=r"architecture='path/file\.py:function' for your own model"):
        normswap.load("own.pt")
    messages = {command: run(command, "own.pt").stderr for command in ("convert", "identify", "calibrate")}
    del messages["calibrate"]  # wants --data first
    for message in messages.values():
        assert "--arch path/file.py:function for your own model" in message
    assert messages["convert"].endswith("or convert the tensors by their names: --arch none, --no-verify\n")
    assert "--arch path/file.py:function" in run("inspect", "own.pt").stdout
    beyond = files.small_model().state_dict() | {"more.running_mean": torch.ones(2), "more.running_var": torch.ones(2)}
    torch.save(beyond, "beyond.pt")
    assert "--arch none, --no-verify" in run("convert", "beyond.pt", "--arch", files.ARCH).stderr


def test_our_own_gates_do_not_hide_an_architecture(folder: Path) -> None:
    model = timm.create_model("test_resnet", num_classes=7)
    conversion = normswap.convert(model)
    normswap.save(conversion.model, "converted.pt", plan=conversion.plan)
    loaded = normswap.load("converted.pt")
    assert type(loaded.model) is type(model)
    assert loaded.plan == conversion.plan
    assert "type: --arch timm:test_resnet,num_classes=7" in run("identify", "converted.pt").stdout


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["bn.pt", "--arch", files.ARCH], 'normswap.load("bn.normswap.pt").model'),
        (
            ["own.pt", "--arch", "own.py:build,width=3"],
            'normswap.load("own.normswap.pt", architecture="own.py:build,width=3").model',
        ),
        (["module.pt", "--trust"], 'normswap.load("module.normswap.pt", trust=True).model'),
        (["bn.pt", "--arch", files.ARCH, "--trust"], 'normswap.load("bn.normswap.pt").model'),
        (["objects.pt", "--arch", files.ARCH, "--trust"], 'normswap.load("objects.normswap.pt", trust=True).model'),
    ],
)  # fmt: skip
def test_the_next_line_loads_what_was_written(folder: Path, arguments: list[str], line: str) -> None:
    torch.save(files.small_model(), "module.pt")
    torch.save({"state_dict": files.small_model().state_dict(), "options": nn.Identity}, "objects.pt")
    result = run("convert", *arguments, "--no-verify")
    assert result.exit_code == 0, result.output
    assert result.stdout.endswith(f"next: model = {line}\n")
    assert isinstance(eval(line, {"normswap": normswap}), nn.Module)


def test_only_pickled_objects_need_trust(folder: Path) -> None:
    torch.save({"a": nn.Identity}, "objects.pt")
    assert (needs_trust(Path("bn.pt")), needs_trust(Path("objects.pt"))) == (False, True)


# Files.

CONTENTS = {
    "numpy arrays": (lambda: {"fc.weight": x().numpy()}, "a mapping of arrays, such as 'fc.weight' (ndarray), not of"),
    "a list": (lambda: [x(), x()], "a list of 2 unnamed items (Tensor)"),
    "whole numbers as names": (lambda: {0: x(), 1: x()}, "a mapping with the key 0 (int), whose tensors have no names"),
    "nothing": (dict, "an empty mapping"),
}  # fmt: skip


@pytest.mark.parametrize(("make", "message"), CONTENTS.values(), ids=CONTENTS)
def test_a_file_without_a_state_dict_is_reported_with_how_to_save_one(
    folder: Path, make: Callable[[], Any], message: str
) -> None:
    torch.save(make(), "odd.pt")
    for command in ("convert", "inspect", "identify"):
        shown = run(command, "odd.pt", "--trust").stderr
        assert f"odd.pt: expected a state dict or a module, got {message}" in shown
        assert ": save the model's own weights with torch.save(model.state_dict(), path)" in shown


def test_the_selected_weights_are_named_if_a_file_contains_several(folder: Path) -> None:
    state = files.small_model().state_dict()
    torch.save({"state_dict": state, "state_dict_ema": state}, "two.pt")
    options = ("--arch", files.ARCH, "--input", "2x3x64x64")
    for command in ("inspect", "convert"):
        shown = " ".join(run(command, "two.pt", *options).stdout.split())
        assert "entry state_dict (not state_dict_ema)" in shown
    torch.save({"a": state, "b": state}, "two.pt")
    assert "has several models ('a', 'b'): select one, such as --entry a" in run("inspect", "two.pt", *options).stderr
    with pytest.raises(CheckpointError, match="select one, such as entry='a'"):
        normswap.load("two.pt")


def test_a_dry_run_is_refused_for_what_refuses_the_real_one(folder: Path) -> None:
    Path("bn.normswap.pt").write_bytes(b"mine")
    refused = run("convert", "bn.pt", "--arch", files.ARCH, "--no-verify", "--dry-run")
    assert (refused.exit_code, "bn.normswap.pt: exists already" in refused.stderr) == (2, True)
    assert run("convert", "bn.pt", "--arch", files.ARCH, "--no-verify", "--dry-run", "--force").exit_code == 0
    assert Path("bn.normswap.pt").read_bytes() == b"mine"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_every_encoding_of_a_terminal_works(folder: Path, encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("own.pt").rename("öwn☃.pt")
    monkeypatch.setenv("COLUMNS", "24")  # so narrow that rich shortens words with a letter that is not in ASCII
    written = io.BytesIO()
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding))
        main(["inspect", "öwn☃.pt", "--arch", "own.py:build", "--input", "2x3x8x8"], standalone_mode=False)
        sys.stdout.flush()
        shown = written.getvalue().decode(encoding)
    assert ("☃" if encoding == "utf-8" else r"\u2603") in shown
    assert ("…" if encoding in ("utf-8", "cp1252") else "...") in shown


def test_a_name_that_torch_cannot_be_given_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(Net().state_dict(), "a.pt")
    try:
        Path("a.pt").rename("b\udcff.pt")
    except (OSError, UnicodeEncodeError):
        pytest.skip("the file system takes UTF-8 only")
    with pytest.raises(NormswapError, match=r"the name has bytes outside the encoding of file names"):
        normswap.load("b\udcff.pt", architecture=Net)


OTHERS = {
    "an image": (b"\x89PNG\r\n\x1a\n", "got an image (PNG)"),
    "ONNX": (b"\x08\x07\x12\x07pytorch", "got probably ONNX: convert the Python model, then export it again"),
    "Keras": (b"\x89HDF\r\n", "got an HDF5 file, as Keras writes"),
    "numpy": (b"\x93NUMPY\x01", "got a numpy array: torch.save a state dict of tensors"),
    "gzip": (b"\x1f\x8b\x08", "got a gzip archive: unpack it first"),
    "a program": (b"\x7fELF\x02", "got a program"),
}


@pytest.mark.parametrize(("head", "message"), OTHERS.values(), ids=OTHERS)
def test_a_file_of_another_kind_is_named(tmp_path: Path, head: bytes, message: str) -> None:
    (tmp_path / "model.bin").write_bytes(head + bytes(100))
    with pytest.raises(CheckpointError, match=re.escape(message)):
        normswap.load(tmp_path / "model.bin")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("https://example.org/model.pt", ": normswap does not open URLs, download the file first"),
        ("~/nowhere.pt", f"pass {Path('~/nowhere.pt').expanduser()}"),
    ],
)
def test_a_path_that_is_none_is_reported_with_what_to_pass(path: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=re.escape(message)):
        normswap.load(path)
    assert message in run("convert", path).stderr


def test_no_torch_file_is_written_under_the_name_of_another_format(folder: Path) -> None:
    refused = run("convert", "bn.pt", "--arch", files.ARCH, "--no-verify", "-o", "model.onnx")
    assert (refused.exit_code, "model.onnx: expected a name that ends in .pt" in refused.stderr) == (2, True)
    with pytest.raises(CheckpointError, match=r"a\.npz: expected a name that ends in .* normswap does not write"):
        normswap.save(Net(), "a.npz")
    assert not Path("model.onnx").exists()


def test_another_width_is_not_taken_for_another_number_of_classes(folder: Path) -> None:
    wider = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    torch.save(Net().state_dict(), "net.pt")
    with pytest.raises(ArchitectureError, match="with another shape") as caught:
        normswap.load("net.pt", architecture=wider)
    assert "num_classes" not in str(caught.value)
