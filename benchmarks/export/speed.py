"""Time of exported networks in onnxruntime and OpenVINO: BN, converted with all gates at BN, and with moved gates."""

import importlib
import importlib.util
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import onnxruntime

import normswap
from benchmarks.export.networks import Network, build, convert

ROUNDS = 100
THREADS = 1


def measure_speed(network: Network) -> dict[str, dict[str, float]]:
    """Return milliseconds per batch by runtime and network: medians of runs that alternate in one process."""
    model, x = build(network)
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        files = {}
        for name, of in (
            ("bn", model),
            ("vertex", convert(model, x, moved=False)),
            ("moved", convert(model, x, moved=True)),
        ):
            files[name] = Path(folder, f"{name}.onnx")
            normswap.export(of, files[name], example_inputs=x, verify=False)
        for runtime, load in (("onnxruntime", _onnxruntime), ("OpenVINO", _openvino)):
            if runtime == "OpenVINO" and importlib.util.find_spec("openvino") is None:
                continue
            found[runtime] = _interleaved({name: load(path) for name, path in files.items()}, x.numpy())
    return found


def _interleaved(runs: dict[str, Callable[[Any], Any]], x: Any) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(ROUNDS + 3):
        for name, run in runs.items():
            start = time.perf_counter()
            run(x)
            times[name].append(1000 * (time.perf_counter() - start))
    return {name: median(values[3:]) for name, values in times.items()}


def _onnxruntime(path: Path) -> Callable[[Any], Any]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = THREADS
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: session.run(None, {name: x})


def _openvino(path: Path) -> Callable[[Any], Any]:
    openvino: Any = importlib.import_module("openvino")
    compiled = openvino.Core().compile_model(
        str(path), "CPU", {"INFERENCE_NUM_THREADS": THREADS, "INFERENCE_PRECISION_HINT": "f32"}
    )
    return lambda x: compiled(x)[0]
