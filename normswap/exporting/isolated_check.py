"""An exported file, run in a process that cannot import normswap and compared with the network.

The cases are the example inputs with other batch sizes and other sizes of images, drawn from the values of the example.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import inf
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from normswap.errors import ModelError
from normswap.model_state import call_arguments, call_model, preserved_state
from normswap.surgery.arguments import describe_inputs, describe_shapes
from normswap.surgery.graphs.exported_program import suppress_output
from normswap.surgery.model_outputs import relative_l2
from normswap.text import first_line

Kind = Literal["onnx", "pt2", "state-dict"]
# Accepted relative L2 error of the outputs by the dtype of the file, and the factor of the response to rounded inputs.
_LIMITS = {torch.float32: 1e-4, torch.float64: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
_RESPONSE_FACTOR = 10.0
_SCRIPT = Path(__file__).with_name("isolated_process.py")


_BLOCKED = "normswap is blocked in this process"
_NO_CODE = "the code of the network cannot be imported: "


class CodeUnavailable(ModelError):  # noqa: N818 - a reason, not a mistake
    """The code of a network imports normswap, or is no module, so its weights cannot be run in another process."""


@dataclass(frozen=True)
class ExportCase:
    """One comparison of an exported file with the network.

    Attributes:
        inputs: the shapes of the inputs.
        relative_error: the largest relative L2 error of an output.
        limit: the largest accepted error: 1e-4 (float16: 1e-2, bfloat16: 5e-2), or ten times the change of the
            network's own outputs if its inputs are rounded, if that is larger.
    """

    inputs: str
    relative_error: float
    limit: float


class IsolatedCheck:
    """Compares an exported file with a network on several inputs.

    Args:
        network: the network, in evaluation and in its own precision.
        cases: the inputs, the example first; others that the network itself does not accept are left out.
        dtype: the precision of the file.

    Raises:
        ModelError: the network fails on the example.
    """

    def __init__(self, network: nn.Module, cases: Sequence[Any], dtype: torch.dtype) -> None:
        self._network, self._dtype = network, dtype
        self._cases, self._references = [cases[0]], [run_network(network, _as_network(network, cases[0]))]
        for case in cases[1:]:
            with suppress(ModelError):
                self._references.append(run_network(network, _as_network(network, case)))
                self._cases.append(case)

    def run(
        self, file: Path, kind: Kind, *, module: nn.Module | None = None, as_safetensors: bool = False
    ) -> tuple[ExportCase, ...]:
        """Run the file on all cases in another process.

        Args:
            module: for weights alone, a module that they are loaded into.
            as_safetensors: whether the weights are in that format.

        Raises:
            ModelError: the file fails, or an output differs by more than the limit.
        """
        with TemporaryDirectory(prefix="normswap-") as folder:
            found_in = [str(Path(entry).absolute()) for entry in sys.path]
            request = {"kind": kind, "file": str(file.absolute()), "safetensors": as_safetensors, "path": found_in}
            found = self._run_process(request, Path(folder), module)
        compared = tuple(map(self.compare, self._cases, self._references, found))
        worst = max(compared, key=lambda case: case.relative_error / case.limit)
        if worst.relative_error > worst.limit:
            raise ModelError(
                f"the exported file computes another function than the network: on {worst.inputs} outputs differ by "
                f"{worst.relative_error:.1e}, expected at most {worst.limit:.1e} (relative L2)"
            )
        return compared

    def _run_process(self, request: dict[str, Any], folder: Path, module: nn.Module | None) -> list[list[Tensor]]:
        as_arrays = request["kind"] == "onnx"
        write = _write_arrays if as_arrays else _write_tensors
        inputs = [write(folder / f"inputs{index}", case) for index, case in enumerate(self._cases)]
        request |= {"inputs": inputs, "outputs": str(folder / "outputs.npz"), "module": str(folder / "module")}
        if module is not None:
            torch.save(module, folder / "module")
        (folder / "request.json").write_text(json.dumps(request), encoding="utf-8")
        command = [sys.executable, "-P", "-W", "ignore", str(_SCRIPT), str(folder / "request.json")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            if module is not None and _BLOCKED in done.stderr:
                raise CodeUnavailable("the network's own code imports normswap")
            if module is not None and _NO_CODE in done.stderr:
                missing = done.stderr.partition(_NO_CODE)[2].splitlines()[0]
                raise CodeUnavailable(f"another process cannot import the network's own code ({missing})")
            reason = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
            raise ModelError(f"the exported file fails in a process without normswap: {reason}")
        found: list[list[Tensor]] = (_read_arrays if as_arrays else torch.load)(folder / "outputs.npz")
        return found

    def compare(self, case: Any, reference: Sequence[Tensor], found: Sequence[Tensor]) -> ExportCase:
        """Compare outputs of the file with those of the network, which runs in its own precision."""
        error, limit = _largest_error(reference, found), _LIMITS[self._dtype]
        if error > limit:
            rounded = tree_map_only(Tensor, self._round, _as_network(self._network, case))
            limit = max(limit, _RESPONSE_FACTOR * _largest_error(reference, run_network(self._network, rounded)))
        return ExportCase(describe_shapes(case), error, limit)

    def compare_in_process(self, network: nn.Module) -> ExportCase:
        """Compare another network with the network, on the example."""
        outputs = run_network(network, _as_network(network, self._cases[0]))
        return self.compare(self._cases[0], self._references[0], outputs)

    def _round(self, tensor: Tensor) -> Tensor:
        return tensor * (1 + torch.finfo(self._dtype).eps) if tensor.is_floating_point() else tensor


def _as_network(network: nn.Module, inputs: Any) -> Any:
    """Return inputs in the precision of a network."""
    own = next((p.dtype for p in network.parameters() if p.is_floating_point()), torch.float32)
    return tree_map_only(Tensor, lambda t: t.to(own) if t.is_floating_point() else t, inputs)


def run_network(network: nn.Module, inputs: Any) -> list[Tensor]:
    """Return the tensors that a network in evaluation returns.

    Raises:
        ModelError: the network fails.
    """
    with preserved_state(network.modules()), torch.no_grad():
        try:
            leaves = tree_leaves(call_model(network, inputs))
        except Exception as error:
            raise ModelError(f"the forward pass fails on {describe_inputs(inputs)}: {first_line(error)}") from error
    return [leaf.detach().clone() for leaf in leaves if isinstance(leaf, Tensor)]


def _largest_error(reference: Sequence[Tensor], found: Sequence[Tensor]) -> float:
    if len(reference) != len(found):
        return inf
    pairs = zip(reference, found, strict=True)
    return max((relative_l2(first, second.to(first.dtype)) for first, second in pairs), default=0.0)


def _write_arrays(path: Path, case: Any) -> str:
    leaves = [leaf for leaf in tree_leaves(call_arguments(case)) if isinstance(leaf, Tensor)]
    numpy.savez(path, *(leaf.numpy(force=True) for leaf in leaves))
    return f"{path}.npz"


def _write_tensors(path: Path, case: Any) -> str:
    with suppress_output():
        torch.save(call_arguments(case), path)
    return str(path)


def _read_arrays(path: Path) -> list[list[Tensor]]:
    cases: dict[str, list[Tensor]] = {}
    with numpy.load(path) as stored:
        for key in sorted(stored.files):
            cases.setdefault(key.partition("_")[0], []).append(torch.from_numpy(stored[key]))
    return list(cases.values())
