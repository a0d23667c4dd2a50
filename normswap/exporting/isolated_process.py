"""Runs an exported file in a process of its own that cannot import normswap; started by `isolated_check`.

Usage: python isolated_process.py REQUEST.json. The request names the kind of the file, the file, one file of inputs for
each case, and the file for the outputs. An ONNX file needs numpy and onnxruntime only, and its inputs and outputs are
`.npz` files; other kinds need torch, and theirs are lists of tensors.
"""

import importlib
import json
import sys
from pathlib import Path
from typing import Any


class BlockedPackage:
    """A finder that refuses to import a package."""

    def __init__(self, package: str) -> None:
        self._package = package

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        """Raise for the package and its modules; find nothing else.

        Raises:
            ImportError: `name` is the package, or in it.
        """
        if name.partition(".")[0] == self._package:
            raise ImportError(f"{name} is blocked in this process")


def block(package: str) -> None:
    """Make a package impossible to import, and check that it is."""
    finder: Any = BlockedPackage(package)
    sys.meta_path.insert(0, finder)
    try:
        importlib.import_module(package)
    except ImportError:
        return
    sys.exit(f"{package} could be imported")


def run_onnx(request: dict[str, Any]) -> None:
    """Run an ONNX file on all cases in onnxruntime, on the CPU."""
    numpy: Any = importlib.import_module("numpy")
    runtime: Any = importlib.import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    session = runtime.InferenceSession(request["file"], options, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]
    outputs = {}
    for case, file in enumerate(request["inputs"]):
        with numpy.load(file) as stored:
            values = [stored[key] for key in stored.files]
        for index, output in enumerate(session.run(None, dict(zip(names, values, strict=True)))):
            outputs[f"{case:03}_{index:03}"] = output
    numpy.savez(request["outputs"], **outputs)


def run_torch(request: dict[str, Any]) -> None:
    """Run a `.pt2` file, or weights in a pickled module, on all cases."""
    torch: Any = importlib.import_module("torch")
    leaves: Any = importlib.import_module("torch.utils._pytree").tree_leaves
    model = _load_program(torch, request) if request["kind"] == "pt2" else _load_weights(torch, request)
    outputs = []
    with torch.no_grad():
        for file in request["inputs"]:
            args, kwargs = torch.load(file, weights_only=False)
            outputs.append([leaf for leaf in leaves(model(*args, **kwargs)) if isinstance(leaf, torch.Tensor)])
    torch.save(outputs, request["outputs"])


def _load_program(torch: Any, request: dict[str, Any]) -> Any:
    with open(request["file"], "rb") as stream:
        return torch.export.load(stream).module()


def _load_weights(torch: Any, request: dict[str, Any]) -> Any:
    """Load weights into the module of the request, which has other values."""
    try:
        model = torch.load(request["module"], weights_only=False)
    except (ImportError, AttributeError) as error:
        sys.exit(f"the code of the network cannot be imported: {error}")
    if request["safetensors"]:
        weights = importlib.import_module("safetensors.torch").load_file(request["file"])
    else:
        weights = torch.load(request["file"], weights_only=True)
    model.load_state_dict(weights, strict=True)
    return model.eval()


def main() -> None:
    """Run the request of the command line."""
    block("normswap")
    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    # The network's code may be beside the user's program, which is not the program of this process.
    sys.path += [entry for entry in request["path"] if entry not in sys.path]
    (run_onnx if request["kind"] == "onnx" else run_torch)(request)


if __name__ == "__main__":
    main()
