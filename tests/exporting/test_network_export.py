"""`export`: the files run without normswap, sizes stay free, and nothing is written if a check fails."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normswap
from normswap.errors import ArgumentError, CheckpointError, ModelError, SwapError
from normswap.exporting import export_options, isolated_check, onnx_file
from normswap.exporting.dynamic_shapes import FreeSize
from normswap.exporting.export_options import DTYPES, FIRST_OPSET, LAST_OPSET, TARGETS
from tests.exporting import networks
from tests.helpers import files

onnx: Any = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")
FREE = (FreeSize("batch"), FreeSize("height", 3), FreeSize("width", 3))


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("name", ["model.onnx", "model.pt2"])
def test_a_network_runs_at_other_sizes_without_normswap(name: str, tmp_path: Path) -> None:
    result = normswap.export(networks.moved(), tmp_path / name, example_inputs=networks.example())
    assert result.free == FREE
    assert {case.inputs[0] for case in result.cases} == {"1", "2", "5"}
    assert len({case.inputs[2:] for case in result.cases}) == 2
    assert all(case.relative_error < 1e-5 for case in result.cases)
    assert result.bytes == (tmp_path / name).stat().st_size
    assert "Outputs without normswap" in str(result)
    assert result.to_dict()["path"] == str(tmp_path / name)


def test_at_bn_a_network_has_the_nodes_of_bn(tmp_path: Path) -> None:
    x = networks.example()
    model = networks.converted()
    exported = normswap.export(model, tmp_path / "sn.onnx", example_inputs=x, verify=False)
    original = normswap.export(normswap.revert(model), tmp_path / "bn.onnx", example_inputs=x, verify=False)
    assert exported.nodes == original.nodes
    assert exported.notes == ("not verified: verify=False",)


def test_without_folding_weights_keep_their_names(tmp_path: Path) -> None:
    model = networks.moved()
    path = tmp_path / "sn.onnx"
    normswap.export(model, path, example_inputs=networks.example(), fold=False, opset=20, verify=False)
    proto = onnx.load(path)
    names = {each.name for each in proto.graph.initializer}
    weights = {name for name in model.state_dict() if name.endswith(("weight", "bias")) and "mean_" not in name}
    assert {name for name in weights if "var_" not in name} <= names
    assert [each.version for each in proto.opset_import] == [20]
    shape = proto.graph.input[0].type.tensor_type.shape.dim
    assert [each.dim_param or each.dim_value for each in shape] == ["batch", 3, "height", "width"]
    assert {each.key: each.value for each in proto.metadata_props}["smallest_height"] == "3"


def test_the_model_stays_as_it_was(tmp_path: Path) -> None:
    model = networks.moved().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    normswap.export(model, tmp_path / "a.onnx", example_inputs=networks.example(), verify=False)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert isinstance(model.norm, normswap.SwitchNorm2d)


def test_a_short_dimension_stays_free_from_its_own_size_on(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, stride=4), nn.BatchNorm2d(8)).eval()
    x = torch.randn(2, 3, 4, 16)  # one row of positions, so the width decides
    converted = networks.move(normswap.convert(model, x).model, (0.2, 0.3, 0.5))
    result = normswap.export(converted, tmp_path / "a.onnx", example_inputs=x, verify=False)
    assert result.free == (FreeSize("batch"), FreeSize("height", 4), FreeSize("width", 7))


def test_a_size_that_the_trace_reduces_to_one_is_fixed(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv3d(3, 8, 3, stride=4, padding=1), nn.BatchNorm3d(8)).eval()
    x = torch.randn(2, 3, 4, 16, 16)
    converted = networks.move(normswap.convert(model, x).model, (0.2, 0.3, 0.5))
    result = normswap.export(converted, tmp_path / "a.pt2", example_inputs=x, verify=False)
    assert "depth" not in [size.name for size in result.free]
    assert result.notes[0].startswith("depth: fixed to the size of the example input")


class Fixed(nn.Module):
    """A network for one size, as with position embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.position = nn.BatchNorm2d(3), nn.Parameter(torch.randn(1, 3, 12, 12))

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.position)


def test_sizes_that_the_network_fixes_are_noted(tmp_path: Path) -> None:
    result = normswap.export(Fixed(), tmp_path / "a.onnx", example_inputs=torch.randn(2, 3, 12, 12), verify=False)
    assert result.free == (FreeSize("batch"),)
    assert result.notes[0].startswith("height and width: fixed to the size of the example input")


class Even(nn.Module):
    """A network that refuses odd heights."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.unflatten(2, (4, -1)).flatten(2, 3))


@pytest.mark.slow
@pytest.mark.multiprocess
def test_sizes_that_the_network_refuses_are_left_out(tmp_path: Path) -> None:
    result = normswap.export(Even(), tmp_path / "a.onnx", example_inputs=torch.randn(2, 3, 12, 12))
    assert all(int(case.inputs.split("x")[2]) % 4 == 0 for case in result.cases)


def test_what_torch_cannot_trace_is_one_line(tmp_path: Path) -> None:
    class Branching(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if x.sum() > 0 else x

    with pytest.raises(ModelError, match="torch cannot trace the network: "):
        normswap.export(Branching(nn.BatchNorm2d(3)), tmp_path / "a.onnx", example_inputs=torch.ones(2, 3, 4, 4))
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_file_that_computes_another_function_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = isolated_check.run_network
    monkeypatch.setattr(isolated_check, "run_network", lambda *args: [tensor / 1.01 for tensor in run(*args)])
    message = r"computes another function than the network: on \S+ outputs differ by 1.0e-02, expected at most 1.0e-04"
    with pytest.raises(ModelError, match=message):
        normswap.export(networks.converted(), tmp_path / "a.onnx", example_inputs=networks.example())
    monkeypatch.setattr(onnx_file, "_check", lambda proto, opset: proto.graph.ClearField("output"))
    with pytest.raises(ModelError, match="the exported file fails in a process without normswap: "):
        normswap.export(networks.converted(), tmp_path / "a.onnx", example_inputs=networks.example())
    assert not list(tmp_path.iterdir())


def test_onnx_models_that_are_not_standard_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def model(domain: str = "", opset: int = 18, kind: str = "Relu") -> Any:
        node = onnx.helper.make_node(kind, ["x"], ["y"], domain=domain)
        values = [onnx.helper.make_tensor_value_info(name, 1, [2]) for name in ("x", "y")]
        graph = onnx.helper.make_graph([node], "g", values[:1], values[1:])
        return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)])

    with pytest.raises(ModelError, match="has operators that are not standard, of own"):
        onnx_file._check(model("own"), 18)
    with pytest.raises(ModelError, match=r"cannot be written in opset 20: use opset=18"):
        onnx_file._check(model(), 20)
    with pytest.raises(ModelError, match="the ONNX model is not valid: "):
        onnx_file._check(model(kind="Nothing"), 18)
    monkeypatch.setattr(onnx_file, "_LARGEST", 10)
    with pytest.raises(ModelError, match="larger than 2 GB, the limit of one file: use to='pt2'"):
        onnx_file._check(model(), 18)


def test_what_torch_cannot_translate_is_one_line() -> None:
    with pytest.raises(ModelError, match="torch cannot export the network to ONNX: "):
        onnx_file.build_onnx(None, {}, opset=18, fold=True, symbols={}, sizes={})  # type: ignore[arg-type]


ARGUMENTS: dict[str, tuple[str, dict[str, Any], str]] = {
    "no kind": ("a.pt", {}, f"to: expected one of {', '.join(TARGETS)} for the file a.pt, got none"),
    "an unknown kind": ("a.onnx", {"to": "tflite"}, f"to: expected one of {', '.join(TARGETS)}, got 'tflite'"),
    "an unknown precision": ("a.onnx", {"dtype": "int8"}, f"dtype: expected one of {', '.join(DTYPES)}, got 'int8'"),
    "an old opset": ("a.onnx", {"opset": 11}, f"opset: expected a number from {FIRST_OPSET} to {LAST_OPSET}, got 11"),
    "opset of pt2": ("a.pt2", {"opset": 18}, "opset= applies to to='onnx' only: leave it out for to='pt2'"),
    "fold of pt2": ("a.pt2", {"fold": False}, "fold=False applies to to='onnx' only: leave it out for to='pt2'"),
    "dtype of weights": (
        "a.pt",
        {"to": "state-dict", "dtype": "float16"},
        "dtype= applies to to='onnx' and to='pt2' only",
    ),
    "bfloat16 in ONNX": ("a.onnx", {"dtype": "bfloat16"}, "dtype='bfloat16' has no kernels in onnxruntime"),
    "no path": ("", {}, "path: expected the name of a file, got ''"),
    "no boolean": ("a.onnx", {"fold": 1}, "fold: expected True or False, got an int"),
}


@pytest.mark.parametrize(("name", "options", "message"), ARGUMENTS.values(), ids=ARGUMENTS)
def test_bad_arguments(
    name: str, options: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ArgumentError, match=re.escape(message)):
        normswap.export(networks.converted(), name, example_inputs=networks.example(), **options)
    assert not list(tmp_path.iterdir())


def test_packages_that_are_missing_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export_options, "find_spec", lambda name: None)
    needed = "to='onnx' needs onnx, onnxscript, onnxruntime: pip install 'normswap[export]'"
    with pytest.raises(ModelError, match=re.escape(needed)):
        normswap.export(networks.converted(), tmp_path / "a.onnx", example_inputs=networks.example())
    with pytest.raises(ModelError, match=re.escape(needed.replace(", onnxruntime", ""))):
        normswap.export(networks.converted(), tmp_path / "a.onnx", example_inputs=networks.example(), verify=False)


def test_bad_paths_and_inputs(tmp_path: Path) -> None:
    model, x = networks.converted(), networks.example()
    with pytest.raises(
        CheckpointError, match=r"a.txt: expected a name that ends in .onnx for to='onnx': choose output='a"
    ):
        normswap.export(model, tmp_path / "a.txt", to="onnx", example_inputs=x)
    with pytest.raises(ModelError, match=r"the input size is unknown: pass example_inputs=torch.randn"):
        normswap.export(model, tmp_path / "a.onnx")
    with pytest.raises(ModelError, match="the forward pass fails on 2x5: "):
        normswap.export(model, tmp_path / "a.onnx", example_inputs=torch.randn(2, 5))
    small = r"last: expected at least two spatial positions for its `in` branch, got one on inputs of 2x3x2x2: pass"
    with pytest.raises(ModelError, match=small):
        normswap.export(networks.moved(), tmp_path / "a.onnx", example_inputs=torch.randn(2, 3, 2, 2))
    assert not list(tmp_path.iterdir())


# --- weights


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("name", ["weights.pt", "weights.safetensors"])
def test_plain_weights_load_into_the_original(name: str, tmp_path: Path) -> None:
    x = torch.randn(files.SHAPE)
    model = normswap.convert(files.small_model(), x).model
    result = normswap.export(model, tmp_path / name, to="state-dict", example_inputs=x)
    assert all(case.relative_error < 1e-6 for case in result.cases)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_network_whose_code_imports_normswap_is_noted(tmp_path: Path) -> None:
    model = networks.converted()
    result = normswap.export(model, tmp_path / "a.pt", to="state-dict", example_inputs=networks.example())
    assert result.notes == ("not verified: the network's own code imports normswap",)


def test_plain_weights_without_verification(tmp_path: Path) -> None:
    model, path = networks.converted(), tmp_path / "weights.pt"
    result = normswap.export(model, path, to="state-dict")
    assert result.notes[0].startswith("not verified: the input size is unknown: pass example_inputs=")
    original = networks.Net().eval()
    original.load_state_dict(torch.load(path), strict=True)
    x = networks.example()
    assert torch.allclose(original(x), model(x), atol=1e-6)


def test_a_network_that_cannot_be_pickled_is_noted(tmp_path: Path) -> None:
    class Local(networks.Net):
        """No other process can import it."""

    model = normswap.convert(Local().eval(), networks.example()).model
    result = normswap.export(model, tmp_path / "a.pt", to="state-dict", example_inputs=networks.example())
    assert result.notes[0].startswith("not verified: the network cannot be pickled (")
    assert not result.cases


def test_plain_weights_of_sites_that_mix_norms_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SwapError, match=r"no layer of torch computes 2 sites .* \(norm, last\).*: use to='onnx'"):
        normswap.export(networks.moved(), tmp_path / "a.pt", to="state-dict")
    with pytest.raises(SwapError, match=r"no layer of torch computes 2 sites .* \(norm, last\).*: use to='onnx'"):
        normswap.export(normswap.bake(networks.moved()).model, tmp_path / "a.pt", to="state-dict")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_network_that_a_program_defines_itself_is_noted(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(
        "import torch, normswap\n"
        "class Net(torch.nn.Sequential):\n"
        "    pass\n"
        "net = Net(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))\n"
        "x = torch.randn(2, 3, 8, 8)\n"
        "print(normswap.export(normswap.convert(net, x).model, 'w.pt', to='state-dict', example_inputs=x).notes)\n"
    )
    done = subprocess.run([sys.executable, "program.py"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "not verified: another process cannot import the network's own code (" in done.stdout
    (tmp_path / "net.py").write_text("import torch\nclass Net(torch.nn.Sequential):\n    pass\n")
    program = (
        (tmp_path / "program.py")
        .read_text()
        .replace("class Net(torch.nn.Sequential):\n    pass\n", "from net import Net\n")
    )
    (tmp_path / "program.py").write_text(program)
    (tmp_path / "w.pt").unlink()
    done = subprocess.run([sys.executable, "program.py"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "()\n"
