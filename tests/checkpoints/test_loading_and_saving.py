"""load and save: bitwise round trips in a new process, the record next to the tensors, atomic files."""

import functools
import json
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

import normswap
from normswap.checkpoints import saving
from normswap.checkpoints.formats import formats
from normswap.checkpoints.io import atomic_files
from normswap.checkpoints.reading import read_checkpoint, read_record, stored_importance_weights
from normswap.checkpoints.record import Record, Step
from normswap.checkpoints.saving import compute_sha256
from normswap.errors import ArchitectureError, CheckpointError, NormswapError, PlanError
from tests.helpers import files

TENSOR_FILES = pytest.mark.parametrize("name", ["model.pt", "model.safetensors"])

_IN_A_FRESH_PROCESS = """
import sys, torch, normswap
torch.set_num_threads(1)
x = torch.load("x.pt")
outputs = []
for name in sys.argv[1:]:
    model = normswap.load(name, trust=name.startswith("module")).model
    outputs += [model.eval()(x).detach(), model.train()(x).detach()]
torch.save(outputs, "outputs.pt")
"""


@pytest.fixture
def x() -> Tensor:
    return torch.randn(files.SHAPE)


def converted(x: Tensor, **options: Any) -> normswap.Conversion:
    """The small network, converted, with gates that have left their vertex."""
    conversion = normswap.convert(files.small_model(), x, **options)
    with torch.no_grad():
        for layer in conversion.replaced.values():
            layer.mean_weight.copy_(torch.tensor([0.2, 0.1, 0.7]))
            layer.var_weight.copy_(torch.tensor([0.0, 0.25, 0.75]))
    return conversion


def same_bits(a: nn.Module, b: nn.Module) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return list(first) == list(second) and all(
        first[key].dtype == second[key].dtype and torch.equal(first[key], second[key]) for key in first
    )


@pytest.mark.multiprocess
@pytest.mark.slow
def test_a_fresh_process_computes_the_same_bits(tmp_path: Path, x: Tensor) -> None:
    conversion = converted(x)
    names = ["model.pt", "model.safetensors", "module.pt"]
    for name in names:
        normswap.save(
            conversion.model,
            tmp_path / name,
            plan=conversion.plan,
            architecture=None if name == "module.pt" else files.ARCH,
            payload="module" if name == "module.pt" else "state dict",
        )
    torch.save(x, tmp_path / "x.pt")
    command = [sys.executable, "-c", _IN_A_FRESH_PROCESS, *names]
    subprocess.run(command, cwd=tmp_path, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    outputs = torch.load(tmp_path / "outputs.pt")
    expected = [conversion.model.eval()(x), conversion.model.train()(x)]
    assert len(outputs) == 2 * len(names)
    assert all(torch.equal(found, wanted) for found, wanted in zip(outputs, expected * len(names), strict=True))


@TENSOR_FILES
def test_plan_architecture_verification_and_history_travel(tmp_path: Path, x: Tensor, name: str) -> None:
    original = files.small_model()
    conversion = normswap.convert(original, x)
    verification = normswap.verify(original, conversion.model, [x])
    past = (Step("trained", "2026-01-01T00:00:00+00:00", "0.0.1"),)
    normswap.save(
        conversion.model,
        tmp_path / name,
        plan=conversion.plan,
        architecture=files.ARCH,
        verification=verification,
        history=past,
    )
    loaded = normswap.load(tmp_path / name)
    assert loaded.plan == conversion.plan
    assert loaded.history[:-1] == past
    assert (loaded.history[-1].action, loaded.history[-1].normswap) == ("saved", normswap.__version__)
    assert loaded.rest == {}
    record = read_record(tmp_path / name)
    assert record is not None
    assert record.architecture == files.ARCH
    assert record.verification == verification
    assert same_bits(loaded.model, conversion.model)


def test_the_record_is_no_key_among_the_tensors(tmp_path: Path, x: Tensor) -> None:
    conversion = converted(x)
    normswap.save(conversion.model, tmp_path / "model.pt", plan=conversion.plan, architecture=files.ARCH)
    normswap.save(conversion.model, tmp_path / "model.safetensors", plan=conversion.plan, architecture=files.ARCH)
    for state in (
        torch.load(tmp_path / "model.pt", weights_only=True),
        torch.load(tmp_path / "model.pt", weights_only=True, mmap=True),
        safetensors.torch.load_file(tmp_path / "model.safetensors"),
    ):
        twin = normswap.convert(files.small_model(), plan=conversion.plan).model
        twin.load_state_dict(state, strict=True)
        assert same_bits(twin, conversion.model)


def test_the_record_is_readable_with_common_tools(tmp_path: Path, x: Tensor) -> None:
    conversion = converted(x)
    normswap.save(conversion.model, tmp_path / "model.pt", plan=conversion.plan, architecture=files.ARCH)
    normswap.save(conversion.model, tmp_path / "model.safetensors", plan=conversion.plan, architecture=files.ARCH)
    with zipfile.ZipFile(tmp_path / "model.pt") as archive:
        assert archive.testzip() is None
        in_zip = json.loads(archive.read("archive/normswap.json"))
    with safetensors.safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        in_metadata = json.loads(file.metadata()["normswap"])
    for record in (in_zip, in_metadata):
        assert record["architecture"] == files.ARCH
        assert len(record["plan"]["swaps"]) == files.SITES


def test_the_record_of_a_pickled_module_is_read_without_running_it(tmp_path: Path, x: Tensor) -> None:
    conversion = converted(x)
    normswap.save(conversion.model, tmp_path / "module.pt", plan=conversion.plan, payload="module")
    record = read_record(tmp_path / "module.pt")
    assert record is not None
    assert (record.payload, record.plan) == ("module", conversion.plan)


@TENSOR_FILES
def test_state_dicts_come_back_in_evaluation(tmp_path: Path, name: str) -> None:
    normswap.save(files.small_model().train(), tmp_path / name, architecture=files.ARCH)
    assert not any(module.training for module in normswap.load(tmp_path / name).model.modules())


def test_pickled_modules_keep_their_flags(tmp_path: Path) -> None:
    model = files.small_model().train()
    model.layer1.eval()
    torch.save(model, tmp_path / "module.pt")
    loaded = normswap.load(tmp_path / "module.pt", trust=True).model
    assert [m.training for m in loaded.modules()] == [m.training for m in model.modules()]


@pytest.mark.parametrize("legacy", [False, True])
def test_a_plain_state_dict_has_no_plan(tmp_path: Path, legacy: bool) -> None:
    model = files.small_model()
    torch.save(model.state_dict(), tmp_path / "bn.pt", _use_new_zipfile_serialization=not legacy)
    loaded = normswap.load(tmp_path / "bn.pt", architecture=files.ARCH)
    assert (loaded.plan, loaded.history) == (None, ())
    assert same_bits(loaded.model, model)


def test_an_architecture_may_be_a_module_or_a_function(tmp_path: Path) -> None:
    model = files.small_model()
    torch.save(model.state_dict(), tmp_path / "bn.pt")
    given = files.scrambled(files.small_model())
    before = {key: value.clone() for key, value in given.state_dict().items()}
    for architecture in (given, files.small_model):
        assert same_bits(normswap.load(tmp_path / "bn.pt", architecture=architecture).model, model)
    assert all(torch.equal(before[key], value) for key, value in given.state_dict().items())


@TENSOR_FILES
@pytest.mark.parametrize("build", [files.TiedNet, files.FunctionalNet], ids=["tied", "functional"])
def test_ties_and_functional_sites_come_back(
    tmp_path: Path, x: Tensor, name: str, build: Callable[[], nn.Module]
) -> None:
    conversion = normswap.convert(build().eval(), x)
    assert conversion.plan.swaps
    normswap.save(conversion.model, tmp_path / name, plan=conversion.plan)
    loaded = normswap.load(tmp_path / name, architecture=build).model
    assert same_bits(loaded, conversion.model)
    assert torch.equal(loaded(x), conversion.model(x))
    if build is files.TiedNet:
        assert loaded.norm is loaded.again
        assert loaded.first.weight is loaded.second.weight


def test_safetensors_store_tied_tensors_once(tmp_path: Path) -> None:
    normswap.save(files.TiedNet(), tmp_path / "tied.safetensors")
    stored = safetensors.torch.load_file(tmp_path / "tied.safetensors")
    record = read_record(tmp_path / "tied.safetensors")
    assert record is not None
    assert record.tied["second.weight"] == "first.weight"
    assert "second.weight" not in stored
    assert len(stored) + len(record.tied) == len(files.TiedNet().state_dict())


def test_tensors_that_overlap_in_part_are_stored_one_by_one(tmp_path: Path) -> None:
    model = nn.BatchNorm1d(4)
    whole = torch.arange(6.0)
    model.running_mean, model.running_var = whole[:4], whole[2:]
    normswap.save(model, tmp_path / "views.safetensors")
    loaded = normswap.load(tmp_path / "views.safetensors", architecture=lambda: nn.BatchNorm1d(4)).model
    assert loaded.running_mean.tolist() == [0, 1, 2, 3]
    assert loaded.running_var.tolist() == [2, 3, 4, 5]


@TENSOR_FILES
def test_channels_last_comes_back(tmp_path: Path, name: str) -> None:
    model = files.small_model().to(memory_format=torch.channels_last)
    normswap.save(model, tmp_path / name, architecture=files.ARCH)
    loaded = normswap.load(tmp_path / name).model
    strides = [{key: value.stride() for key, value in m.state_dict().items()} for m in (model, loaded)]
    assert strides[0] == strides[1]


@pytest.mark.slow
@TENSOR_FILES
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_types_of_the_file_come_back(tmp_path: Path, name: str, dtype: torch.dtype, x: Tensor) -> None:
    conversion = normswap.convert(files.small_model().to(dtype), x.to(dtype))
    normswap.save(conversion.model, tmp_path / name, plan=conversion.plan, architecture=files.ARCH)
    loaded = normswap.load(tmp_path / name).model
    assert same_bits(loaded, conversion.model)
    assert torch.equal(loaded(x.to(dtype)), conversion.model(x.to(dtype)))


@TENSOR_FILES
@pytest.mark.parametrize("gate", ["simplex", "softmax"])
def test_the_kind_of_gate_comes_back(tmp_path: Path, x: Tensor, name: str, gate: str) -> None:
    conversion = normswap.convert(files.small_model(), x, gate=gate)
    layer = conversion.replaced["bn1"] if "bn1" in conversion.replaced else next(iter(conversion.replaced.values()))
    with torch.no_grad():
        layer.mean_weight.copy_(torch.tensor([-1.0, 0.5, 2.0]))  # as an optimizer leaves it, off the simplex
    normswap.save(conversion.model, tmp_path / name, plan=conversion.plan, architecture=files.ARCH)
    loaded = normswap.load(tmp_path / name).model
    assert same_bits(loaded, conversion.model)
    assert normswap.importance_weights(loaded) == normswap.importance_weights(conversion.model)
    assert stored_importance_weights(read_checkpoint(tmp_path / name)) == normswap.importance_weights(loaded)


def test_frozen_gates_stay_frozen(tmp_path: Path, x: Tensor) -> None:
    model = files.small_model()
    model.layer1.requires_grad_(False)
    conversion = normswap.convert(model, x)
    normswap.save(conversion.model, tmp_path / "model.pt", plan=conversion.plan, architecture=files.ARCH)
    loaded = normswap.load(tmp_path / "model.pt").model
    flags = [[p.requires_grad for n, p in m.named_parameters() if "_weight" in n] for m in (conversion.model, loaded)]
    assert flags[0] == flags[1]
    assert len({*flags[0]}) == 2


def test_the_importance_weights_of_a_pickled_module_are_read_from_it(tmp_path: Path, x: Tensor) -> None:
    conversion = converted(x)
    torch.save(conversion.model, tmp_path / "module.pt")
    found = stored_importance_weights(read_checkpoint(tmp_path / "module.pt", trust=True))
    assert found == normswap.importance_weights(conversion.model)


@pytest.mark.parametrize("change", [{"bn1.mean_weight": torch.ones(2)}, {"bn1.mean_weight": None}])
def test_importance_weights_that_do_not_fit_the_plan(tmp_path: Path, x: Tensor, change: dict[str, Any]) -> None:
    conversion = converted(x)
    state = {key: value for key, value in (conversion.model.state_dict() | change).items() if value is not None}
    record = Record("state dict", plan=conversion.plan)
    formats.encode(tmp_path / "a.pt", "torch zip", state, record.to_json())
    with pytest.raises(CheckpointError, match=r"a\.pt: the importance weights of 'bn1' do not fit its plan"):
        stored_importance_weights(read_checkpoint(tmp_path / "a.pt"))


def test_a_file_that_was_not_converted_has_no_importance_weights(tmp_path: Path) -> None:
    torch.save(files.small_model().state_dict(), tmp_path / "bn.pt")
    assert stored_importance_weights(read_checkpoint(tmp_path / "bn.pt")) == {}


def test_a_model_that_is_converted_already_is_only_filled(tmp_path: Path, x: Tensor) -> None:
    conversion = converted(x)
    normswap.save(conversion.model, tmp_path / "model.pt", plan=conversion.plan)
    twin = normswap.convert(files.small_model(), plan=conversion.plan).model
    assert same_bits(normswap.load(tmp_path / "model.pt", architecture=twin).model, conversion.model)


def test_an_existing_file_is_replaced_and_a_link_followed(tmp_path: Path) -> None:
    (tmp_path / "real.pt").write_bytes(b"old")
    (tmp_path / "link.pt").symlink_to(tmp_path / "real.pt")
    normswap.save(files.TiedNet(), tmp_path / "link.pt")
    assert (tmp_path / "link.pt").is_symlink()
    assert zipfile.is_zipfile(tmp_path / "real.pt")


@TENSOR_FILES
def test_files_are_as_readable_as_any_other(tmp_path: Path, name: str) -> None:
    (tmp_path / "other").touch()
    normswap.save(files.TiedNet(), tmp_path / name)
    assert (tmp_path / name).stat().st_mode == (tmp_path / "other").stat().st_mode


def test_sha256(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")
    assert compute_sha256(tmp_path / "abc").startswith("ba7816bf8f01cfea")


# What can go wrong while writing: the old file stays, nothing else does.


def _disk_full(*_: Any, **__: Any) -> None:
    raise OSError(28, "No space left on device")


def _disk_full_behind_torch(*_: Any, **__: Any) -> None:
    try:
        _disk_full()
    except OSError:
        raise RuntimeError("unexpected pos 948992 vs 948888")  # noqa: B904 - as torch's writer does


def _writes_something_else(path: Path, container: str, content: Any, record: str, **_: Any) -> None:
    key = next(key for key, value in content.items() if value.is_floating_point())
    formats.encode(path, container, {**content, key: content[key] + 1e-6}, record)


def _loses_the_record(path: Path, _container: str, content: Any, _record: str, **_: Any) -> None:
    torch.save(content, path)


WRITERS = {
    "disk full": (_disk_full, "cannot be written ([Errno 28] No space left on device)"),
    "disk full, as torch reports it": (
        _disk_full_behind_torch,
        "cannot be written ([Errno 28] No space left on device)",
    ),
    "another number": (_writes_something_else, "the new file does not read back the same: it was removed"),
    "no record": (_loses_the_record, "the new file does not read back the same: it was removed"),
}


@pytest.mark.parametrize(("writer", "message"), WRITERS.values(), ids=WRITERS)
def test_a_failed_write_leaves_everything_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writer: Callable[..., None], message: str
) -> None:
    (tmp_path / "model.pt").write_bytes(b"old")
    monkeypatch.setattr(saving, "encode", writer)
    with pytest.raises(CheckpointError, match=re.escape(message)):
        normswap.save(files.small_model(), tmp_path / "model.pt")
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.pt"]
    assert (tmp_path / "model.pt").read_bytes() == b"old"


def test_an_interrupted_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(path: Path, *_: Any, **__: Any) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(saving, "encode", interrupt)
    with pytest.raises(KeyboardInterrupt):
        normswap.save(files.TiedNet(), tmp_path / "model.pt")
    assert list(tmp_path.iterdir()) == []


def test_nan_and_negative_zero_are_written_as_they_are(tmp_path: Path) -> None:
    model = nn.BatchNorm1d(3)
    model.running_mean.copy_(torch.tensor([float("nan"), -0.0, float("inf")]))
    normswap.save(model, tmp_path / "model.safetensors")
    back = normswap.load(tmp_path / "model.safetensors", architecture=lambda: nn.BatchNorm1d(3)).model.running_mean
    assert torch.equal(back.view(torch.int32), model.running_mean.view(torch.int32))


# What save refuses.


def _unpicklable() -> nn.Module:
    model = files.TiedNet()
    model.activation = lambda x: x
    return model


def _with_extra_state() -> nn.Module:
    class Counting(nn.BatchNorm1d):
        def get_extra_state(self) -> int:
            return 3

        def set_extra_state(self, state: int) -> None:
            assert state == 3

    return Counting(4)


SAVE_REFUSALS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], type[NormswapError], str]] = {
    "no plan": (
        lambda: normswap.convert(files.small_model()).model,
        {},
        PlanError,
        f"the model has {files.SITES} converted sites and no plan: pass plan=conversion.plan",
    ),
    "another plan": (
        lambda: normswap.convert(files.small_model()).model,
        {"plan": normswap.plan_swaps(files.small_model(), gate="softmax")},
        PlanError,
        f"the plan is that of another model, they differ at {files.SITES} sites (",
    ),
    "a plan for a model that was not converted": (
        files.small_model,
        {"plan": normswap.plan_swaps(files.small_model())},
        PlanError,
        "pass the plan that convert returned",
    ),
    "unknown architecture": (
        files.small_model,
        {"architecture": "timm:tset_resnet"},
        ArchitectureError,
        "timm has no model 'tset_resnet'; nearest: test_resnet",
    ),
    "lambda inside": (
        _unpicklable,
        {"payload": "module"},
        CheckpointError,
        "): save it as a state dict",
    ),
    "no values": (
        lambda: files.TiedNet().to("meta"),
        {},
        CheckpointError,
        "the tensor 'stem.weight' is on the meta device and has no values: load the weights into the model first",
    ),
}


@pytest.mark.parametrize(("build", "options", "error", "message"), SAVE_REFUSALS.values(), ids=SAVE_REFUSALS)
def test_save_refuses(
    tmp_path: Path,
    build: Callable[[], nn.Module],
    options: dict[str, Any],
    error: type[NormswapError],
    message: str,
) -> None:
    with pytest.raises(error, match=re.escape(message)):
        normswap.save(build(), tmp_path / "model.pt", **options)
    assert list(tmp_path.iterdir()) == []


def test_safetensors_store_no_module(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError,
        match="safetensors stores tensors only, no pickled module, extra state or training checkpoint: use a name",
    ):
        normswap.save(files.small_model(), tmp_path / "model.safetensors", payload="module")
    assert list(tmp_path.iterdir()) == []


def test_safetensors_store_no_extra_state(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no pickled module, extra state or training"):
        normswap.save(_with_extra_state(), tmp_path / "model.safetensors")
    normswap.save(_with_extra_state(), tmp_path / "model.pt")
    assert normswap.load(tmp_path / "model.pt", architecture=_with_extra_state).model is not None


def test_a_text_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "plan.json").write_text("old")
    monkeypatch.setattr(atomic_files.os, "replace", _disk_full)
    with pytest.raises(CheckpointError, match=r"plan\.json: cannot be written \(No space left on device\): free some"):
        atomic_files.write_text(tmp_path / "plan.json", "new")
    assert [entry.name for entry in tmp_path.iterdir()] == ["plan.json"]
    assert (tmp_path / "plan.json").read_text() == "old"


# What a record may not be.


def _edited(**changes: Any) -> str:
    return json.dumps(json.loads(Record("state dict").to_json()) | changes)


@functools.cache
def _good_verification() -> dict[str, Any]:
    """Of the smallest network, since every worker makes one while it collects the tests."""
    norm = nn.BatchNorm1d(2)
    return normswap.verify(norm, norm, [torch.randn(4, 2)]).to_dict()


def _verification_with(**changes: Any) -> str:
    return _edited(verification=_good_verification() | changes)


BAD_RECORDS = {
    "of the future": (_edited(version=4), "its normswap record has version 4, expected at most 3: update normswap"),
    "no JSON": ("{", "invalid normswap record (Expecting property name"),
    "a list": ("[]", "invalid normswap record (record: expected a table of named values, got [])"),
    "no version": ("{}", "invalid normswap record (record.version: expected a whole number, got None)"),
    "unknown payload": (
        _edited(payload="onnx"),
        "(record.payload: expected 'state dict' or 'module' or 'program', got 'onnx')",
    ),
    "unknown field": (_edited(color=1), "invalid normswap record (record: unknown name 'color'"),
    "wrong type": (_edited(architecture=3), "(record.architecture: expected a string, got 3)"),
    "damaged plan": (_edited(plan={"version": 1}), "invalid normswap record (the plan"),
    "a damaged verification": (
        _edited(verification={"passed": True}),
        "(record.verification: fp32_error, inputs, loosened, ",
    ),
    "damaged history": (_edited(history=[{"who": "me"}]), "(record.history[0]: unknown name 'who'"),
    "a list for a number": (
        _verification_with(tolerance=[1]),
        "(record.verification.tolerance: expected a number, got [1])",
    ),
    "a number for a truth": (
        _verification_with(passed=1),
        "(record.verification.passed: expected true or false, got 1)",
    ),
    "a truth for a number": (
        _verification_with(tolerance=True),
        "(record.verification.tolerance: expected a number, got True)",
    ),
    "a number beyond all": (
        _verification_with(tolerance=10**400),
        "expected a number, got a whole number that is too large)",
    ),
    "a verification without a list": (
        _verification_with(checks=3),
        "(record.verification.checks: expected a list",
    ),
    "a check that is none": (_verification_with(checks=[{"name": 3}]), "(record.verification.checks[0]"),
    "a field that checks have not": (_verification_with(checks=[{"who": 3}]), "checks[0]: unknown name 'who'"),
    "a damaged further network": (_edited(networks={"ema": 3}), "expected a table of named values, got 3)"),
    "nested too deeply": ("[" * 100_000 + "]" * 100_000, "invalid normswap record (maximum recursion depth exceeded"),
    "control characters": (_edited(torch="\x1b[31m"), "(expected printable text, got control characters in '\\x1b"),
    "a name with control characters": (_edited(tied={"\x1b": "a"}), "(expected printable text, got control charact"),
    "a surrogate": (_edited(torch="\ud800"), "(expected printable text, got control characters in '\\ud8"),
    "damaged ties": (_edited(tied={"a": 1}), "expected a string, got 1)"),
}


@pytest.mark.parametrize(("text", "message"), BAD_RECORDS.values(), ids=BAD_RECORDS)
def test_a_bad_record_is_reported(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "model.pt"
    formats.encode(path, "torch zip", files.TiedNet().state_dict(), text)
    with pytest.raises(CheckpointError, match=re.escape(f"{path}: ") + ".*" + re.escape(message)):
        normswap.load(path, architecture=files.TiedNet)


def test_a_source_may_be_called_anything() -> None:
    step = Step.now("converted", source="a\udcffb\n\x1b.pt", sha256="0")
    assert step.source == "a?b??.pt"
    record = Record("state dict", history=(step,))
    assert Record.from_json(record.to_json()) == record


def test_a_record_survives_json() -> None:
    plan = normswap.plan_swaps(files.small_model())
    record = Record("module", files.ARCH, plan, None, (Step.now("converted", source="a.pt"),), {"a": "b"}, ("c",))
    assert Record.from_json(record.to_json()) == record


def test_ties_that_a_record_invents_are_left_aside(tmp_path: Path) -> None:
    record = Record("state dict", tied={"ghost": "nowhere"}, channels_last=("ghost", "norm.weight"))
    formats.encode(tmp_path / "model.pt", "torch zip", files.TiedNet().state_dict(), record.to_json())
    assert normswap.load(tmp_path / "model.pt", architecture=files.TiedNet).model is not None


def test_an_architecture_that_is_identified_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.save(files.small_model().state_dict(), tmp_path / "model.pt")
    with caplog.at_level("INFO", logger="normswap"):
        normswap.load(tmp_path / "model.pt")
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path / 'model.pt'}: identified as {files.ARCH} by the names and shapes of its tensors"
    ]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"path": ""}, "path: expected the name of a file or a folder, got ''"),
        ({"path": "a\0b"}, r"path: expected the name of a file or a folder, got 'a\x00b'"),
        ({"trust": "no"}, "trust: expected True or False, got a str"),
        ({"entry": ["model"]}, "entry: expected the name of an entry such as 'state_dict_ema', got a list"),
    ],
)
def test_load_refuses_a_wrong_argument_by_name(tmp_path: Path, arguments: dict[str, Any], text: str) -> None:
    torch.save(nn.BatchNorm2d(3).state_dict(), tmp_path / "bn.pt")
    with pytest.raises(normswap.ArgumentError, match=re.escape(text)):
        normswap.load(**{"path": tmp_path / "bn.pt", "architecture": nn.BatchNorm2d(3), **arguments})


def test_save_refuses_a_path_without_a_name() -> None:
    for path in ("", "a\0b"):
        with pytest.raises(normswap.ArgumentError, match="path: expected the name of a file, got"):
            normswap.save(nn.BatchNorm2d(3), path)
