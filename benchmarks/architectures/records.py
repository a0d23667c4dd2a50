"""Record every architecture of timm and torchvision: tensors, dimensions that depend on arguments, fingerprint.

Models are built on the `meta` device and allocate nothing. To find the dimensions that depend on an argument, a model
is built with other values: such a dimension is a polynomial of the argument, of degree 1 (classes, input channels) or
2 (image size).
"""

import contextlib
import os
import sys
import time
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn
from torchvision import models as torchvision_models

from benchmarks.architectures.facts import facts, fingerprint
from benchmarks.paths import ROOT
from benchmarks.records import append_line, read_lines
from normswap.checkpoints.architecture.index import Symbol
from normswap.checkpoints.architecture.registry import build_architecture
from normswap.errors import ArchitectureError

Shapes = dict[str, tuple[int, ...]]

# Modules of torchvision that are not in the index, with the reason.
EXCLUDED = {
    "torchvision.models.quantization": "the tensors equal those of the float model; quantized networks have no norms",
}
_IMAGE_SIZE = {"timm": "img_size", "torchvision": "image_size"}
# Two builds define a line, and the default build must be a point of it. Both arguments vary at once: with these values
# no dimension is linear in both.
_CLASSES, _CHANNELS = (7, 13), (5, 1)
COMMON_SIZES = (224, 448)
_FILLING = ("normal_", "uniform_", "erfinv_", "mul_", "add_", "clamp_", "zero_", "fill_")


def catalog() -> list[str]:
    """Return the names of all architectures, `zoo:NAME`, in the order of the lists of the zoos."""
    excluded = {
        name
        for module in EXCLUDED
        for name in torchvision_models.list_models(module=getattr(torchvision_models, module.rpartition(".")[2]))
    }
    names = [name for name in torchvision_models.list_models() if name not in excluded]
    return [f"timm:{name}" for name in timm.list_models()] + [f"torchvision:{name}" for name in names]


def describe(architecture: str) -> dict[str, Any]:
    """Return the record of one architecture: names, dimensions, default arguments, fingerprint, facts."""
    zoo, _, _ = architecture.partition(":")
    started = time.perf_counter()
    model = built(architecture)
    shapes = shapes_of(model)
    described = facts(model, _input_size(model))
    with_head = _attempt(architecture, num_classes=_CLASSES[0])
    no_head = with_head is not None and shapes.items() < with_head.items()
    if no_head:  # the default has no head: `num_classes` adds one
        shapes = with_head or {}
    templates, defaults = _linear_templates(architecture, shapes)
    prints = [fingerprint(built(architecture, **({"num_classes": 7} if "num_classes" in defaults else {})))]
    headless = _headless(architecture) if "num_classes" in defaults else None
    head = None
    if headless is not None:
        bare = shapes_of(headless)
        if bare.items() <= shapes.items():
            head = [index for index, key in enumerate(shapes) if key not in bare]
            prints.append(fingerprint(headless))
    size_prints = _with_image_size(architecture, zoo, model, shapes, templates, defaults)
    if no_head and "num_classes" in defaults:
        defaults["num_classes"] = 0
    return {
        "architecture": architecture,
        "entries": [[key, templates.get(key, list(shape))] for key, shape in shapes.items()],
        "defaults": defaults,
        "head": head,
        "function": "".join(prints),
        "function at sizes": size_prints,
        "unsaved": any(module._non_persistent_buffers_set for module in model.modules()),
        "facts": described,
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": round(time.perf_counter() - started, 2),
    }


def built(architecture: str, *, device: str = "meta", **keywords: Any) -> nn.Module:
    """Return the model with these keyword arguments, in evaluation mode."""
    text = ",".join([architecture, *(f"{key}={value}" for key, value in keywords.items())])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if device != "meta":
            return build_architecture(text).eval()
        with _no_initial_values():
            try:
                with torch.device("meta"):
                    return build_architecture(text).eval()
            except ArchitectureError as error:
                if "meta tensor" not in str(error):
                    raise
            with _parameters_without_values():
                return build_architecture(text).eval()


@contextlib.contextmanager
def _parameters_without_values() -> Iterator[None]:
    """Put only parameters on `meta`: torchvision's RegNets compute their widths with tensors that need values."""
    original = nn.Module.register_parameter

    def register(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None:
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
        original(module, name, parameter)

    nn.Module.register_parameter = register  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]


@contextlib.contextmanager
def _no_initial_values() -> Iterator[None]:
    """Skip operations that fill tensors on `meta`. They have no effect there and take half of the time."""
    originals = {name: getattr(torch.Tensor, name) for name in _FILLING}

    def passing(original: Any) -> Any:
        return lambda tensor, *args, **kwargs: tensor if tensor.is_meta else original(tensor, *args, **kwargs)

    for name, original in originals.items():
        setattr(torch.Tensor, name, passing(original))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(torch.Tensor, name, original)


def shapes_of(model: nn.Module) -> Shapes:
    """Return names and shapes of the tensors in a state dict."""
    return {key: tuple(value.shape) for key, value in model.state_dict().items() if isinstance(value, torch.Tensor)}


def _attempt(architecture: str, **keywords: Any) -> Shapes | None:
    """Return the shapes with these arguments, or None if the model does not take them."""
    try:
        return shapes_of(built(architecture, **keywords))
    except Exception:  # noqa: BLE001 - builders raise different errors for unknown arguments
        return None


def _linear_templates(architecture: str, shapes: Shapes) -> tuple[dict[str, Any], dict[str, int]]:
    templates: dict[str, Any] = {}
    defaults: dict[str, int] = {}
    both = [_attempt(architecture, num_classes=n, in_chans=c) for n, c in zip(_CLASSES, _CHANNELS, strict=True)]
    if all(found is not None and found.keys() == shapes.keys() for found in both):
        _fit(shapes, both, {"num_classes": _CLASSES, "in_chans": _CHANNELS}, templates, defaults)
        return templates, defaults
    for keyword, values in (("num_classes", _CLASSES), ("in_chans", _CHANNELS)):
        found = [_attempt(architecture, **{keyword: value}) for value in values]
        if all(one is not None and one.keys() == shapes.keys() for one in found):
            _fit(shapes, found, {keyword: values}, templates, defaults)
    return templates, defaults


def _fit(
    shapes: Shapes,
    found: Sequence[Any],
    arguments: Mapping[str, Sequence[int]],
    templates: dict[str, Any],
    defaults: dict[str, int],
) -> None:
    """Add the dimensions that are polynomials of one argument. Skip an argument if its dimensions disagree."""
    changed = {key for key, shape in shapes.items() if any(one[key] != shape for one in found)}
    for keyword, values in arguments.items():
        fitted: dict[str, Any] = {}
        solutions: set[int] = set()
        for key in changed:
            dims: list[Any] = []
            for axis, size in enumerate(shapes[key]):
                points = [one[key][axis] for one in found]
                polynomial = _polynomial(values, points) if len({size, *points}) > 1 else None
                value = _default(polynomial, size, keyword) if polynomial else None
                if polynomial and value is not None:
                    solutions.add(value)
                    dims.append([keyword, *polynomial])
                else:
                    dims.append(size)
            fitted[key] = dims
        if len(solutions) == 1:
            defaults[keyword] = solutions.pop()
            for key, dims in fitted.items():
                if any(isinstance(dim, list) for dim in dims):
                    old = templates.get(key, list(shapes[key]))
                    templates[key] = [new if isinstance(new, list) else o for o, new in zip(old, dims, strict=True)]


def _polynomial(values: Sequence[int], points: Sequence[int]) -> list[int] | None:
    """Return integers (a, b, c, d) such that (a x^2 + b x + c) / d fits the points, or None for a constant."""
    if len(set(points)) == 1:
        return None
    if len(values) == 2:
        slope = Fraction(points[1] - points[0], values[1] - values[0])
        coefficients = [Fraction(0), slope, points[0] - slope * values[0]]
    else:
        (x, y, z), (p, q, r) = values, points
        second = (Fraction(r - p, z - x) - Fraction(q - p, y - x)) / (z - y)
        slope = Fraction(q - p, y - x) - second * (x + y)
        coefficients = [second, slope, p - second * x * x - slope * x]
    if coefficients[0] < 0 or (coefficients[0] == 0 and coefficients[1] <= 0):
        return None
    common = 1
    for coefficient in coefficients:
        common = common * coefficient.denominator // _gcd(common, coefficient.denominator)
    return [*(int(coefficient * common) for coefficient in coefficients), common]


def _gcd(a: int, b: int) -> int:
    while b:
        a, b = b, a % b
    return a


def _default(polynomial: Sequence[int], size: int, keyword: str) -> int | None:
    """Return the argument that gives `size`, by the rule that the index uses."""
    value = Symbol(keyword, *polynomial).solve(size)
    # Values of one argument can fit a line of the other by chance: accept only a plausible default.
    if value is None or (keyword == "in_chans" and value > 16):
        return None
    return value


def _headless(architecture: str) -> nn.Module | None:
    try:
        return built(architecture, num_classes=0)
    except Exception:  # noqa: BLE001 - builders raise different errors
        return None


def _input_size(model: nn.Module) -> Sequence[int] | None:
    config = getattr(model, "pretrained_cfg", None)
    size = config.get("input_size") if isinstance(config, dict) else getattr(config, "input_size", None)
    return tuple(size) if size else None


def _with_image_size(
    architecture: str, zoo: str, model: nn.Module, shapes: Shapes, templates: dict[str, Any], defaults: dict[str, int]
) -> str | None:
    """Add the dimensions that depend on the image size. Return the fingerprint at two common sizes."""
    keyword = _IMAGE_SIZE[zoo]
    size = (_input_size(model) or (3, 224, 224))[-1]
    sizes = (size, 2 * size, 3 * size)
    found = []
    classes = {"num_classes": 7} if "num_classes" in defaults else {}
    for value in sizes:
        one = _attempt(architecture, **{keyword: value}, **classes)
        if one is not None:  # the head does not depend on the size
            one |= {key: shapes[key] for key in templates.keys() & one.keys() if "num_classes" in str(templates[key])}
        if one is None or one.keys() != shapes.keys() or (value == size and one != shapes):
            return None
        found.append(one)
        if len(found) == 2 and found[0] == found[1]:
            return None  # no shape depends on the size
    fitted: dict[str, Any] = {}
    known: dict[str, int] = {}
    _fit(shapes, found, {keyword: sizes}, fitted, known)
    unexplained = {key for key in shapes if any(one[key] != shapes[key] for one in found)} - fitted.keys()
    if known != {keyword: size} or unexplained or fitted.keys() & templates.keys():
        return None
    templates.update(fitted)
    defaults[keyword] = size
    try:
        return "".join(fingerprint(built(architecture, **{keyword: value}, **classes)) for value in COMMON_SIZES)
    except Exception:  # noqa: BLE001 - builders raise different errors
        return None


def describe_all(names: Sequence[str], path: Path, workers: int) -> None:
    """Append the record of each architecture that is not in the file; forked processes share the work."""
    path.parent.mkdir(parents=True, exist_ok=True)
    done = read_lines(path, key="architecture")
    left = [name for name in names if name not in done]
    children = []
    for worker in range(workers):
        pid = os.fork()
        if pid == 0:
            os._exit(_describe_some(left[worker::workers], path))
        children.append(pid)
    for pid in children:
        if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]):
            sys.exit("error: a worker failed (see above). Run the program again to continue.")


def _describe_some(names: Sequence[str], path: Path) -> int:
    torch.set_num_threads(1)
    failed = 0
    for name in names:
        try:
            record = describe(name)
        except Exception:  # noqa: BLE001 - print it and continue with the others
            print(f"{name}:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
            failed = 1
            continue
        append_line(path, record)
    return failed


def records(path: Path) -> list[dict[str, Any]]:
    """Return the records of the file, in the order of the catalog."""
    order = {name: index for index, name in enumerate(catalog())}
    found = read_lines(path, key="architecture")
    return sorted((r for name, r in found.items() if name in order), key=lambda r: order[r["architecture"]])


if __name__ == "__main__":
    describe_all(catalog(), ROOT / "build" / "architectures.jsonl", 2)
