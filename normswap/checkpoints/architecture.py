"""Architectures by name: `timm:NAME[,key=value...]` or `torchvision:NAME[,key=value...]` -> nn.Module.

The only room that imports model zoos. It builds code that is installed, with random weights: nothing is downloaded,
no file is read and no code that a name points at is run, so that a name may come from a file.
"""

import ast
import difflib
import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn

from normswap.errors import ArchitectureError
from normswap.surgery.tracing import first_line

# Keywords that fetch or read weights: the weights come from the file alone.
_WEIGHT_KEYWORDS = re.compile(r"pretrained|checkpoint|weights|cache_dir|progress")


@dataclass(frozen=True)
class ArchitectureName:
    """A parsed architecture name: which zoo, which model, with which keywords."""

    scheme: str
    model: str
    keywords: Mapping[str, Any]


def parse_architecture(text: str) -> ArchitectureName:
    """Return the parts of `scheme:NAME[,key=value...]`; values are Python literals, or else strings.

    Raises:
        ArchitectureError: no or an unknown scheme, no name, or a keyword that is none or concerns weights.
    """
    scheme, colon, rest = text.partition(":")
    if not colon or scheme not in _ZOOS:
        near = f"timm:{text}" if not colon else "timm:" + rest
        raise ArchitectureError(
            f"architecture {text!r}: expected one of {', '.join(f'{zoo}:NAME' for zoo in _ZOOS)}, such as {near}"
        )
    # A comma separates only where a keyword follows, so that values can be tuples.
    model, *pairs = re.split(r",(?=\s*\w+\s*=)", rest)
    if not re.fullmatch(r"[\w.\-]+", model):
        raise ArchitectureError(f"architecture {text!r}: expected {scheme}:NAME[,key=value...], got the name {model!r}")
    return ArchitectureName(scheme, model, dict(_keyword(text, pair) for pair in pairs))


def check_architecture(text: str) -> ArchitectureName:
    """Return the parts of `text` if its zoo has the model.

    Raises:
        ArchitectureError: as `parse_architecture`; or the zoo does not have it, with the nearest names.
    """
    name = parse_architecture(text)
    names = _ZOOS[name.scheme].names()
    if name.model.partition(".")[0] not in names:
        near = difflib.get_close_matches(name.model, names, n=3) or ["none, see its list_models()"]
        raise ArchitectureError(f"{name.scheme} has no model {name.model!r}; nearest: {', '.join(near)}")
    return name


def build_architecture(text: str) -> nn.Module:
    """Build the model that `text` names, with random weights.

    Raises:
        ArchitectureError: as `check_architecture`, or the zoo's builder fails.
    """
    name = check_architecture(text)
    try:
        return _ZOOS[name.scheme].build(name.model, **name.keywords)
    except Exception as error:
        raise ArchitectureError(f"{text}: cannot be built: {first_line(error)}") from error


def default_input_shape(model: nn.Module, architecture: str | None) -> tuple[int, ...] | None:
    """Return the shape (2, C, H, W) of an input of the real size, or None where nothing tells it.

    timm's configuration of a model tells the size; channels follow the keyword `in_chans` of the architecture.
    """
    config = getattr(model, "pretrained_cfg", None)
    size = config.get("input_size") if isinstance(config, dict) else None
    if not size:
        return None
    keywords = parse_architecture(architecture).keywords if architecture else {}
    size = (keywords.get("in_chans", size[0]), *_pair(keywords.get("img_size", size[1:])))
    return (2, *(int(length) for length in size))


def _pair(size: Any) -> tuple[int, ...]:
    return tuple(size) if isinstance(size, tuple | list) else (size, size)


def _keyword(text: str, pair: str) -> tuple[str, Any]:
    key, value = (part.strip() for part in pair.split("=", 1))
    if _WEIGHT_KEYWORDS.match(key):
        raise ArchitectureError(f"architecture {text!r}: leave {key!r} out, the weights come from the file")
    if value in ("true", "false", "none"):
        raise ArchitectureError(f"architecture {text!r}: expected a Python value, write {key}={value.capitalize()}")
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value


class _Zoo(NamedTuple):
    names: Callable[[], list[str]]
    build: Callable[..., nn.Module]


# The zoos are typed in some of their versions only: results are annotated here.


def _timm_names() -> list[str]:
    import timm

    names: list[str] = timm.list_models()
    return names


def _build_timm(name: str, **keywords: Any) -> nn.Module:
    import timm

    model: nn.Module = timm.create_model(name, pretrained=False, **keywords)
    return model


def _torchvision_names() -> list[str]:
    from torchvision import models

    names: list[str] = models.list_models()
    return names


def _build_torchvision(name: str, **keywords: Any) -> nn.Module:
    from torchvision import models

    builder = models.get_model_builder(name)
    accepted = inspect.signature(builder).parameters
    # Detectors fetch weights for their backbone unless told otherwise; two old classifiers warn of a slow start.
    off = {key: None for key in ("weights", "weights_backbone") if key in accepted}
    slow = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    model: nn.Module = builder(**off, **slow | keywords)
    return model


_ZOOS: Mapping[str, _Zoo] = {
    "timm": _Zoo(_timm_names, _build_timm),
    "torchvision": _Zoo(_torchvision_names, _build_torchvision),
}
