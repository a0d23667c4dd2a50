"""Outputs, nodes and export times of converted networks against those of the BN network, and the error of each site."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import onnx
import onnxruntime
import torch
from torch import Tensor, nn

import normswap
from benchmarks.export.networks import Network, build, convert, move_gates
from normswap.layers.switch_norm import SwitchNorm
from normswap.surgery.importance import gated_modules
from normswap.surgery.model_outputs import relative_l2


def measure_outputs(network: Network) -> dict[str, Any]:
    """Return errors, nodes and seconds of the ONNX files and the program of one network with moved gates."""
    model, x = build(network)
    vertex, moved = convert(model, x, moved=False), convert(model, x, moved=True)
    two = move_gates(convert(model, x, moved=False), ("ln", "bn"))
    sites = len(gated_modules(moved))
    with tempfile.TemporaryDirectory() as folder:
        paths = {name: Path(folder, name) for name in ("a.onnx", "a.pt2")}

        def run(of: nn.Module, name: str, **options: Any) -> normswap.Exported:
            return normswap.export(of, paths[name], example_inputs=x, overwrite=True, **options)

        run(model, "a.onnx", verify=False)  # torch's first export takes longer
        files = {"bn": run(model, "a.onnx"), "vertex": run(vertex, "a.onnx"), "two": run(two, "a.onnx", verify=False)}
        files |= {"moved": run(moved, "a.onnx"), "half": run(moved, "a.onnx", dtype="float16")}
        program = run(moved, "a.pt2")
    nodes = {name: file.nodes or 0 for name, file in files.items()}
    return {
        "sites": sites,
        "nodes": nodes,
        "per_site_two": (nodes["two"] - nodes["bn"]) / sites,
        "per_site_three": (nodes["moved"] - nodes["bn"]) / sites,
        "seconds": {name: files[name].seconds for name in ("bn", "vertex", "moved")},
        "errors": {
            "onnx": _worst(files["moved"]),
            "vertex": _worst(files["vertex"]),
            "half": _worst(files["half"]),
            "pt2": _worst(program),
        },
        "inputs": [case.inputs for case in files["moved"].cases],
        "free": {size.name: size.at_least for size in files["moved"].free},
    }


def _worst(file: normswap.Exported) -> float:
    return max(case.relative_error for case in file.cases)


def measure_sites(network: Network) -> dict[str, Any]:
    """Return the error of the output of each site in ONNX, in float32 and float16, with all that goes before it."""
    model, x = build(network)
    moved = convert(model, x, moved=True)
    reference = _site_outputs(moved, x)
    found = {}
    for dtype in ("float32", "float16"):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "a.onnx")
            normswap.export(moved, path, example_inputs=x, dtype=dtype, verify=False)  # type: ignore[arg-type]
            outputs = _run_with_sites(onnx.load(path), x, len(reference))
        errors = [relative_l2(a, b.float()) for a, b in zip(reference, outputs, strict=True)]
        found[dtype] = {"median": median(errors), "largest": max(errors)}
    return found


def _site_outputs(model: nn.Module, x: Tensor) -> list[Tensor]:
    """The outputs of the sites in the order in which they run."""
    outputs: list[Tensor] = []
    handles = [
        module.register_forward_hook(lambda _module, _inputs, output: outputs.append(output.detach().clone()))
        for module in model.modules()
        if isinstance(module, SwitchNorm)
    ]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return outputs


def _run_with_sites(proto: onnx.ModelProto, x: Tensor, count: int) -> Sequence[Tensor]:
    """Run a model with the values of its sites, which torch names after the traced operator, as outputs."""
    names = ["compact_norm" + f"_{index}" * bool(index) for index in range(count)]
    del proto.graph.output[:]
    proto.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in names)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    given = session.get_inputs()[0]
    values = x.half() if "float16" in given.type else x
    return [torch.from_numpy(value) for value in session.run(None, {given.name: values.numpy()})]
