"""Archives of torch.export: weights are read without running code, programs are loaded only with trust."""

import contextlib
import io
import json
import pickle
import re
import shutil
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.export.pt2_archive._package import package_pt2

import normswap
from normswap.checkpoints import saving
from normswap.checkpoints.formats.pt2_archive import Program, load_program
from normswap.checkpoints.reading import read_checkpoint, read_header
from normswap.checkpoints.record import Record
from normswap.cli import main
from normswap.errors import CheckpointError, ModelError, SwapError
from normswap.layers.matching import MATCHING_BUFFERS
from normswap.surgery.graphs.exported_program import (
    check_equivalent,
    difference,
    program_inputs,
    program_module,
    reexport,
)
from normswap.surgery.plan import SwapPlan
from tests.helpers import files

MODES = ("training", "evaluation")
GATES = {f"{site}.{point}" for site in ("batch_norm", "batch_norm_1") for point in ("mean_weight", "var_weight")}
CONSTANTS = {f"{site}.{name}" for site in ("batch_norm", "batch_norm_1") for name in MATCHING_BUFFERS}


class Net(nn.Module):
    """Norms with and without affine parameters, tied weights, a constant, a buffer that is in no state dict."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.plain = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.BatchNorm2d(8, affine=False)
        self.first, self.second = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
        self.second.weight = self.first.weight
        self.register_buffer("scale", torch.full((8,), 0.5), persistent=False)
        self.constant = torch.arange(8.0)

    def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        x = self.plain(self.norm(self.stem(x)).relu()) * self.scale[:, None, None]
        x = self.second(self.first(x.mean((2, 3)))) + self.constant
        return x if shift is None else x + shift


def net(*, training: bool = True) -> Net:
    torch.manual_seed(3)
    model = Net()
    for norm in (model.norm, model.plain):
        norm.running_mean.normal_(0, 0.3)
        norm.running_var.uniform_(0.5, 2)
    return model.train(training)


def x(batch: int = 3) -> Tensor:
    return torch.randn(batch, 3, 8, 8, generator=torch.Generator().manual_seed(batch))


@cache
def archive(mode: str) -> bytes:
    """A program of `Net` with a dynamic batch size from 2 to 32, and an extra file."""
    dynamic = {"x": {0: Dim("batch", min=2, max=32)}}
    program = torch.export.export(net(training=mode == "training"), (x(),), dynamic_shapes=dynamic)
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={"labels.txt": "cat dog"})
    return buffer.getvalue()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "model.pt2").write_bytes(archive("training"))
    return tmp_path / "model.pt2"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A program and what `normswap convert --trust` made of it."""
    path = tmp_path_factory.mktemp("programs") / "model.pt2"
    path.write_bytes(archive("training"))
    ok("convert", path, "--trust")
    return path, path.with_name("model.normswap.pt2")


def ok(*arguments: object) -> str:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result.output


def edited(path: Path, change: Callable[[dict[str, bytes]], object]) -> Path:
    """The archive written again, its members changed."""
    with zipfile.ZipFile(path) as reader:
        root = reader.namelist()[0].partition("/")[0]
        members = {name.partition("/")[2]: reader.read(name) for name in reader.namelist()}
    change(members)
    with zipfile.ZipFile(path, "w") as writer:
        for name, data in members.items():
            writer.writestr(f"{root}/{name}", data)
    return path


# --- the weights, without trust ---------------------------------------------------------------------------------------


def test_the_weights_are_the_models_own_bit_for_bit_and_tied(path: Path) -> None:
    read, expected = read_checkpoint(path).weights, net().state_dict()
    assert read.keys() == expected.keys()
    assert all(torch.equal(read[key], value) and read[key].dtype == value.dtype for key, value in expected.items())
    assert read["first.weight"].data_ptr() == read["second.weight"].data_ptr()


class ManyTypes(nn.Module):
    """A buffer of every type, of no dimension, without elements, transposed, and a part of another one."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        numbers = torch.tensor([[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]])
        types = ("uint8", "int8", "int16", "int32", "int64", "float16", "float64", "bfloat16", "complex64")
        more = ("complex32", "complex128", "uint16", "uint32", "uint64")
        small = ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu")
        for name in (*types, *more, *small, "bool"):
            self.register_buffer(f"{name}_", numbers.to(getattr(torch, name)))
        self.register_buffer("number", torch.tensor(7))
        self.register_buffer("empty", torch.ones(0, 4))
        self.register_buffer("transposed", numbers.t())
        self.register_buffer("part", torch.arange(9.0)[2:5])

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


@pytest.mark.filterwarnings("ignore:No complete tensor found in the group:UserWarning")
@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental:UserWarning")
def test_weights_of_every_type_and_form_are_read(tmp_path: Path) -> None:
    model = ManyTypes()
    torch.export.save(torch.export.export(model, (torch.ones(1, 2),)), tmp_path / "model.pt2")
    read = read_checkpoint(tmp_path / "model.pt2").weights
    for key, value in model.state_dict().items():
        assert (read[key].dtype, read[key].shape, read[key].stride()) == (value.dtype, value.shape, value.stride())
        assert (
            read[key].contiguous().view(-1).untyped_storage().tolist()[: value.nbytes]
            == (value.contiguous().untyped_storage().tolist()[: value.nbytes])
        ), key


def test_of_several_programs_the_user_names_one(tmp_path: Path) -> None:
    program = torch.export.export(net(), (x(),))
    path = tmp_path / "model.pt2"
    package_pt2(str(path), exported_programs={"large": program, "small": program})
    with pytest.raises(CheckpointError, match=r"such as entry="):
        normswap.load(path, architecture=Net)
    loaded = normswap.load(path, architecture=Net, entry="small").model
    assert torch.equal(loaded(x()), net(training=False)(x()))
    with pytest.raises(
        CheckpointError, match=r"expected one program, got 2 in one archive: save each with torch.export.save, or"
    ):
        normswap.load(path, trust=True)


def test_an_architecture_takes_the_weights_alone_whether_trusted_or_not(path: Path) -> None:
    for trust in (False, True):
        loaded = normswap.load(path, architecture=Net, trust=trust)
        assert type(loaded.model) is Net
        assert torch.equal(loaded.model(x()), net(training=False)(x()))
    output = ok("convert", path, "--arch", "none", "--no-verify", "--trust")
    assert "the program: left out, only its weights are converted" in " ".join(output.split())
    converted = normswap.load(path.with_name("model.normswap.pt"), architecture=Net)
    assert normswap.importance_weights(converted.model).keys() == {"norm", "plain"}


# --- the program, where it is trusted ---------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_a_program_is_converted_into_one_that_computes_the_same(
    converted: tuple[Path, Path], path: Path, mode: str
) -> None:
    target = path.with_name("model.normswap.pt2")
    if mode == "training":
        path, target = converted
    else:
        path.write_bytes(archive(mode))
        assert "Read back  computes the same function as the original" in ok("convert", path, "--trust")
    extra = {"labels.txt": "", "normswap.json": ""}
    after, before = torch.export.load(target, extra_files=extra), torch.export.load(path)
    assert extra["labels.txt"] == "cat dog"
    assert json.loads(extra["normswap.json"])["payload"] == "program"

    # Nothing else changed.
    # A program in training uses batch statistics, to which no branch is matched.
    constants = CONSTANTS if mode == "evaluation" else set()
    assert after.state_dict.keys() - before.state_dict.keys() == GATES | constants
    assert all(torch.equal(after.state_dict[key], value) for key, value in before.state_dict.items())
    assert after.constants.keys() == before.constants.keys()
    assert [(r.lower, r.upper) for r in after.range_constraints.values()] == [
        (r.lower, r.upper) for r in before.range_constraints.values()
    ]
    # On another size of batch than it was exported on, running statistics too; and its gates are alive.
    modules = [program.module() for program in (before, after)]
    outputs = [module(x(7)) for module in modules]
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)
    first, second = (dict(module.named_buffers()) for module in modules)
    for key, value in first.items():
        torch.testing.assert_close(second[key], value, rtol=1e-4, atol=1e-5)
    assert first["norm.num_batches_tracked"] == (mode == "training")
    outputs[1].square().sum().backward()
    assert all(parameter.grad.abs().max() > 0 for name, parameter in modules[1].named_parameters() if name in GATES)
    with pytest.raises(AssertionError, match="Guard failed"):
        modules[1](x(40))


@pytest.mark.slow
def test_a_converted_program_reports_what_it_is(converted: tuple[Path, Path]) -> None:
    target = converted[1]
    loaded = normswap.load(target, trust=True)
    assert [swap.fqn for swap in loaded.plan.swaps] == ["batch_norm", "batch_norm_1"]
    assert [step.action for step in loaded.history] == ["converted"]
    torch.testing.assert_close(loaded.model(x()), net()(x()), rtol=1e-4, atol=1e-5)
    shown = [json.loads(ok("inspect", target, "--json", *trust)) for trust in ((), ("--trust",))]
    assert shown[0] == shown[1]
    assert shown[0]["importance_weights"]["batch_norm"]["mean"] == {"in": 0.0, "ln": 0.0, "bn": 1.0}
    assert run("convert", target, "--trust").exit_code == 1
    for architecture in (None, Net):
        with pytest.raises(CheckpointError, match=r"program can only be used with its graph: pass trust=True"):
            normswap.load(target, architecture=architecture)


def test_a_graph_that_was_changed_is_refused(converted: tuple[Path, Path], tmp_path: Path) -> None:
    target = Path(shutil.copy(converted[1], tmp_path))
    edited(target, lambda members: None)
    assert read_header(target).record is not None
    edited(target, lambda m: m.update({"models/model.json": m["models/model.json"].replace(b"relu", b"tanh")}))
    with pytest.raises(CheckpointError, match="changed after normswap wrote the file"):
        normswap.load(target, trust=True)


@pytest.mark.slow
def test_two_programs_are_compared_in_their_own_precision(converted: tuple[Path, Path], tmp_path: Path) -> None:
    path, target = converted
    found = json.loads(ok("verify", path, target, "--trust", "--json"))
    assert found["passed"]
    assert found["error"] < found["limit"] == 1e-4
    other = tmp_path / "other.pt2"
    other.write_bytes(archive("evaluation"))
    refused = run("verify", path, target, "--trust", "--bn-statistics", "batch")
    assert refused.exit_code == 2
    assert "--bn-statistics: the mode of exported programs is fixed" in refused.stderr
    result = run("verify", other, path, "--trust")
    assert (result.exit_code, result.stdout.startswith("outputs and buffers differ by inf")) == (1, True)
    assert "does not compute the same function" in result.stderr


def test_a_plan_and_a_dry_run(path: Path) -> None:
    stored = path.with_name("plan.json")
    ok("convert", path, "--trust", "--dry-run", "--no-verify", "--exclude", "batch_norm", "--save-plan", stored)
    assert {entry.name for entry in path.parent.iterdir()} == {"model.pt2", "plan.json"}
    assert [swap.fqn for swap in SwapPlan.from_json(stored.read_text()).swaps] == ["batch_norm_1"]


# --- what must never run, and what is refused -------------------------------------------------------------------------


def _opaque(members: dict[str, bytes], payload: bytes) -> None:
    """A constant that is a pickle of its own."""
    name = "data/constants/model_constants_config.json"
    config = json.loads(members[name])
    entry = {"path_name": "opaque_obj_0", "is_param": False, "use_pickle": True, "tensor_meta": None}
    config["config"]["extra"] = entry
    members |= {name: json.dumps(config).encode(), "data/constants/opaque_obj_0": payload}


def _weight(members: dict[str, bytes], payload: bytes) -> None:
    """A weight that is a pickle of its own."""
    name = "data/weights/model_weights_config.json"
    config = json.loads(members[name])
    entry = config["config"]["stem.weight"] | {"use_pickle": True, "path_name": "weight_99"}
    config["config"]["stem.weight"] = entry
    members |= {name: json.dumps(config).encode(), "data/weights/weight_99": payload}


def _inputs(members: dict[str, bytes], payload: bytes) -> None:
    members["data/sample_inputs/model.pt"] = payload


@pytest.mark.parametrize("plant", [_opaque, _weight, _inputs])
def test_what_is_pickled_in_an_archive_runs_only_where_it_is_trusted(
    path: Path, tmp_path: Path, plant: Callable[[dict[str, bytes], bytes], None]
) -> None:
    marker = tmp_path / "it-ran"
    payload = pickle.dumps(files.Payload(marker), protocol=2)
    edited(path, lambda members: plant(members, payload))
    for command in ("inspect", "convert", "identify"):
        for arch in ((), ("--arch", "none", "--no-verify")) if command == "convert" else ((),):
            run(command, path, *arch)
    for architecture in (None, Net):
        try:
            normswap.load(path, architecture=architecture)
        except normswap.NormswapError:
            assert plant is _weight or architecture is None
    assert not marker.exists()
    with contextlib.suppress(CheckpointError):
        normswap.load(path, trust=True)
    assert marker.exists(), "the payload is none"


def config_of(change: Callable[[dict[str, Any]], object]) -> Callable[[dict[str, bytes]], None]:
    """What changes the entry of a weight."""

    def edit(members: dict[str, bytes]) -> None:
        name = "data/weights/model_weights_config.json"
        config = json.loads(members[name])
        change(config["config"]["norm.weight"])
        members[name] = json.dumps(config).encode()

    return edit


def meta(**fields: Any) -> Callable[[dict[str, bytes]], None]:
    return config_of(lambda entry: entry["tensor_meta"].update(fields))


BAD: dict[str, tuple[Callable[[dict[str, bytes]], object], str]] = {
    "pickled weights": (
        config_of(lambda entry: entry.update(use_pickle=True)),
        "1 weights are pickled objects ('norm.weight'); loading them may run code: pass trust=True",
    ),
    "an older torch": (lambda m: m.update({"data/weights/model.pt": b""}), "of an older torch, with pickled"),
    "torch 2.4": (
        lambda m: m.update({"serialized_state_dict.pt": b""}),
        "of an older torch, with pickled weights",
    ),
    "compiled": (
        lambda m: (m.pop("models/model.json"), m.update({"data/aotinductor/model/a.so": b""})),
        "expected an exported program, got compiled code of AOTInductor without one",
    ),
    "no program": (lambda m: m.pop("models/model.json"), "got an archive without one"),
    "an unknown type": (
        meta(dtype=99),
        "'norm.weight' has the dtype 99 and the layout 7 of torch.export, which normswap",
    ),
    "sparse": (meta(layout=2), "has the dtype 7 and the layout 2"),
    "beyond its record": (
        meta(sizes=[{"as_int": 9}]),
        "'norm.weight' declares 36 bytes, its record has 32: the file is damaged",
    ),
    "beyond by its offset": (meta(storage_offset={"as_int": 1}), "'norm.weight' declares 36 bytes, its record has 32"),
    "beyond by its steps": (meta(strides=[{"as_int": 2}]), "'norm.weight' declares 60 bytes, its record has 32"),
    "a repeated number": (
        meta(sizes=[{"as_int": 2**40}], strides=[{"as_int": 0}]),
        "a tensor declares the shape 1099511627776, the file has",
    ),
    "a negative size": (meta(sizes=[{"as_int": -8}]), "truncated or damaged (expected a number, got {'as_int': -8})"),
    "a symbol": (meta(sizes=[{"as_expr": "s0"}]), "truncated or damaged ("),
    "no strides": (meta(strides=[]), "'norm.weight' has no record, or a shape and strides of different lengths"),
    "no record": (config_of(lambda entry: entry.update(path_name="weight_77")), "'norm.weight' has no record, or"),
    "no config": (lambda m: m.pop("data/weights/model_weights_config.json"), "truncated or damaged ("),
    "no JSON": (lambda m: m.update({"data/weights/model_weights_config.json": b"{"}), "truncated or damaged ("),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_an_archive_that_contradicts_itself_is_refused(
    path: Path, change: Callable[[dict[str, bytes]], object], message: str
) -> None:
    edited(path, change)
    with pytest.raises(CheckpointError, match=re.escape(message)):
        normswap.load(path, architecture=Net)
    assert run("convert", path, "--arch", "none", "--no-verify").exit_code == 2
    assert [entry.name for entry in path.parent.iterdir()] == ["model.pt2"]


def test_a_damaged_program_is_one_line_where_it_is_trusted(path: Path) -> None:
    edited(path, lambda members: members.update({"models/model.json": b"{}"}))
    with pytest.raises(CheckpointError, match="truncated or damaged, or from another version of torch"):
        normswap.load(path, trust=True)


def test_weights_and_programs_are_not_named_alike(path: Path) -> None:
    refused = run("convert", path, "--arch", "none", "--no-verify", "-o", path.with_name("a.pt2"))
    assert "only weights are written: choose -o NAME.pt, or convert the program" in refused.stderr
    refused = run("convert", path, "--trust", "-o", path.with_name("a.pt"))
    assert "for an exported program: choose -o NAME.pt2, or convert only its weights" in refused.stderr


@pytest.fixture(scope="module")
def program() -> ExportedProgram:
    return torch.export.export(net(), (x(),))


def write(program: ExportedProgram, path: Path, *, original: ExportedProgram | None = None) -> float:
    return saving.write_program(Program(program, {"a": "b"}), original or program, path, Record("program"), inputs=None)


def test_what_computes_something_else_is_not_kept(program: ExportedProgram, tmp_path: Path) -> None:
    other = torch.export.export(net(training=False), (x(),))
    with pytest.raises(
        SwapError, match=r"computes another function \(relative L2 inf, expected at most 1.0e-04\): convert the Py"
    ):
        write(other, tmp_path / "a.pt2", original=program)
    assert list(tmp_path.iterdir()) == []
    assert write(program, tmp_path / "a.pt2") == 0


def _flipped(path: Path) -> Program:
    back = load_program(path)
    back.program.state_dict["norm.weight"].data.view(-1)[0] += 1
    return back


def _without_texts(path: Path) -> Program:
    return load_program(path)._replace(extra_files={})


@pytest.mark.parametrize("damaged", [_flipped, _without_texts])
def test_what_is_read_back_must_be_what_was_written(
    program: ExportedProgram, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damaged: Callable[[Path], Program]
) -> None:
    monkeypatch.setattr(saving, "load_program", damaged)
    with pytest.raises(CheckpointError, match="the new file does not read back the same: it was removed"):
        write(program, tmp_path / "a.pt2")
    assert list(tmp_path.iterdir()) == []


def test_a_program_that_cannot_be_saved_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"a.pt2: cannot be written \(.*\)$"):
        write(None, tmp_path / "a.pt2")  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


# --- exported again ---------------------------------------------------------------------------------------------------


def test_inputs_by_position_and_by_name_are_those_of_the_program_alone() -> None:
    program = torch.export.export(net(), (x(),), {"shift": torch.ones(8)})
    assert program_inputs(program) is None
    converted = normswap.convert(program_module(program), inplace=True).model
    assert check_equivalent(program, reexport(program, converted)) < 1e-5


@pytest.mark.slow
def test_a_program_without_inputs_is_exported_on_those_that_are_given() -> None:
    program = torch.export.export(net(), (x(),))
    program.example_inputs = None
    converted = normswap.convert(program_module(program), x(), inplace=True).model
    assert program_inputs(program) is None
    with pytest.raises(
        SwapError,
        match=r"has no example inputs, which are needed to export it again: pass some, such as example_inputs=",
    ):
        reexport(program, converted)
    assert check_equivalent(program, reexport(program, converted, x()), x()) < 1e-5
    with pytest.raises(SwapError, match="cannot be exported again"):
        reexport(program, converted, x(5))


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x: Tensor, times: int) -> Tensor:
        return self.norm(x) * times


def test_a_number_that_is_free_cannot_stay_so() -> None:
    program = torch.export.export(Counting(), (x(), 3), dynamic_shapes={"x": None, "times": Dim.DYNAMIC})
    with pytest.raises(SwapError, match="would accept other inputs than the original"):
        reexport(program, program_module(program))


class Moody(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


def test_what_cannot_be_exported_again_says_what_can_be_done() -> None:
    program = torch.export.export(net(), (x(),))
    with pytest.raises(SwapError, match=r"cannot be exported again \(.*: convert the Python model and export that, or"):
        reexport(program, Moody())


def test_a_difference_is_judged_by_what_rounding_does_to_the_original() -> None:
    program, other = (torch.export.export(net(training=mode), (x(),)) for mode in (True, False))
    assert difference(program, program) == (0.0, 1e-4)
    assert difference(program, other) == (float("inf"), 1e-4)
    program.example_inputs = None
    with pytest.raises(ModelError, match=r"the program fails on 5x3x8x8: Expected input at"):
        difference(program, program, x(5))


def test_a_program_is_calibrated_by_its_weights(path: Path) -> None:
    result = run("calibrate", path, "--data", "digits", "--trust")
    assert result.exit_code == 2
    assert "weights of an exported program can be calibrated: leave --trust out, or pass --arch" in result.output
