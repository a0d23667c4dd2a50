"""The arguments of an export with their checks, and its result."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args

from normswap.checkpoints.io.atomic_files import check_writable
from normswap.errors import ArgumentError, CheckpointError, ModelError
from normswap.exporting.dynamic_shapes import FreeSize
from normswap.exporting.isolated_check import ExportCase
from normswap.text import printable_as

Target = Literal["onnx", "pt2", "state-dict", "published-layout"]
ExportDtype = Literal["float32", "float16", "bfloat16"]
TARGETS: tuple[str, ...] = get_args(Target)
DTYPES: tuple[str, ...] = get_args(ExportDtype)
FIRST_OPSET, LAST_OPSET = 18, 23
_SUFFIXES: Mapping[str, tuple[str, ...]] = {
    "onnx": (".onnx",),
    "pt2": (".pt2",),
    "state-dict": (".pt", ".pth", ".bin", ".safetensors"),
    "published-layout": (".pt", ".pth", ".tar"),
}
_TARGET_OF_SUFFIX: Mapping[str, Target] = {".onnx": "onnx", ".pt2": "pt2"}
# The kinds of files that are traced on example inputs.
TRACED: tuple[str, ...] = ("onnx", "pt2")


@printable_as("exported")
@dataclass(frozen=True)
class Exported:
    """The result of `export`; `print` shows it as a table.

    Attributes:
        path: the file.
        to: its kind, as the argument of `export`.
        bytes: its size.
        seconds: the time that tracing and translating took.
        dtype: the precision of the network in the file.
        opset: the version of ONNX operators; None for other files.
        nodes: the number of ONNX nodes; None for other files.
        folded: whether BatchNorm was folded into the layers before it.
        free: the dimensions of the inputs that may have any size, each with its lower bound.
        cases: the comparisons with the network, in a process that cannot import normswap; empty if there was none.
        notes: what to know about the file.

    Examples:
        >>> import torch, normswap
        >>> model, x = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8)), torch.randn(2, 3, 16, 16)
        >>> converted = normswap.convert(model, x).model
        >>> exported = normswap.export(converted, "weights.pt", to="state-dict", verify=False)
        >>> exported.to, exported.notes
        ('state-dict', ('not verified: verify=False',))
    """

    path: Path
    to: Target
    bytes: int
    seconds: float
    dtype: str
    opset: int | None = None
    nodes: int | None = None
    folded: bool = False
    free: tuple[FreeSize, ...] = ()
    cases: tuple[ExportCase, ...] = ()
    notes: tuple[str, ...] = ()

    __module__ = "normswap"

    def to_dict(self) -> dict[str, Any]:
        """Return the result as plain lists, dicts, strings and numbers."""
        return {**asdict(self), "path": str(self.path)}


@dataclass(frozen=True)
class ExportOptions:
    """The arguments of `export` that are not the network, checked by `check`."""

    path: Path
    to: Target
    fold: bool = True
    opset: int | None = None
    dtype: str | None = None
    verify: bool = True
    overwrite: bool = False

    def check(self) -> None:
        """Refuse arguments that exclude each other, and a path that cannot be written.

        Raises:
            ArgumentError: an argument has no such value, or does not apply to this kind of file.
            CheckpointError: the name of the file has another suffix, or it cannot be written.
            ModelError: a package is not installed.
        """
        if self.to not in TARGETS:
            raise ArgumentError(f"to: expected one of {', '.join(TARGETS)}, got {self.to!r}")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ArgumentError(f"dtype: expected one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if self.opset is not None and not FIRST_OPSET <= self.opset <= LAST_OPSET:
            raise ArgumentError(f"opset: expected a number from {FIRST_OPSET} to {LAST_OPSET}, got {self.opset!r}")
        if self.to != "onnx" and (self.opset is not None or not self.fold):
            name = "opset=" if self.opset is not None else "fold=False"
            raise ArgumentError(f"{name} applies to to='onnx' only: leave it out for to='{self.to}'")
        if self.to not in TRACED and self.dtype is not None:
            raise ArgumentError(f"dtype= applies to to='onnx' and to='pt2' only: leave it out for to='{self.to}'")
        if self.to == "onnx" and self.dtype == "bfloat16":
            raise ArgumentError("dtype='bfloat16' has no kernels in onnxruntime: use dtype='float16', or to='pt2'")
        if self.path.suffix not in _SUFFIXES[self.to]:
            expected = " or ".join(_SUFFIXES[self.to])
            raise CheckpointError(
                f"{self.path}: expected a name that ends in {expected} for to='{self.to}': choose "
                f"output='{self.path.stem}{_SUFFIXES[self.to][0]}'"
            )
        missing = [name for name in self._packages if find_spec(name) is None]
        if missing:
            raise ModelError(f"to='onnx' needs {', '.join(missing)}: pip install 'normswap[export]'")
        check_writable(self.path, replace=self.overwrite)

    @property
    def _packages(self) -> tuple[str, ...]:
        """The packages that this kind of file needs beside torch."""
        if self.to != "onnx":
            return ()
        return ("onnx", "onnxscript", "onnxruntime") if self.verify else ("onnx", "onnxscript")


def target_of(path: Path, to: str | None) -> Any:
    """Return the kind of file: `to`, or by default that of the suffix.

    Raises:
        ArgumentError: `to` is missing, and the suffix belongs to several kinds.
    """
    found = to or _TARGET_OF_SUFFIX.get(path.suffix)
    if found is None:
        raise ArgumentError(f"to: expected one of {', '.join(TARGETS)} for the file {path.name}, got none")
    return found
