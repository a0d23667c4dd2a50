"""A BN in evaluation after a convolution or a linear layer: folded into the weight and the bias of that layer.

The graph of the network shows which layer comes before a norm, and that its output goes nowhere else.
"""

import copy
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from normswap.baking.rules.replacement import turn_into
from normswap.surgery.norms.classes import NormSpec, read_norm

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
# Relative difference of folded and separate layers in float64, on a random input.
_LIMIT = 1e-9


def find_foldable(
    graph: fx.Graph, modules: Mapping[str, nn.Module], norm: str, *, input_rank: int | None
) -> tuple[str | None, str]:
    """Return the name of the layer into which the norm of this name can be folded, or None and the reason.

    Args:
        graph: the graph of the network in evaluation mode, with norms as leaves.
        modules: the modules of the network by all their names.
        input_rank: the number of dimensions of the input of the norm, None if unknown.
    """
    spec = read_norm(modules[norm])
    if spec is None or spec.kind not in ("bn", "frozen bn") or spec.target is None:
        return None, "it is no plain Batch Normalization"
    if not isinstance(modules[norm].running_mean, Tensor):
        return None, "it has no running statistics"
    if any(name not in modules[norm]._modules for name in _modules_after(spec)):
        return None, "its forward runs functions after the norm"
    calls = Counter(id(modules[str(node.target)]) for node in graph.nodes if node.op == "call_module")
    nodes = [node for node in graph.nodes if node.op == "call_module" and modules[str(node.target)] is modules[norm]]
    if len(nodes) != 1:
        return None, f"it is called {len(nodes)} times"
    source = next((value for value in (*nodes[0].args, *nodes[0].kwargs.values())), None)
    if not isinstance(source, fx.Node) or source.op != "call_module":
        return None, "its input is not the output of a convolution or a linear layer"
    name = str(source.target)
    problem = _layer_problem(modules[name], calls, source, input_rank) or _tensor_problem(name, modules)
    if problem is None and not _computes_the_same(modules[name], modules[norm], spec):
        problem = f"{name} computes another function of its weight than {type(modules[name]).__name__}"
    return (None, problem) if problem else (name, "")


def fold_norm(layer: Any, norm: Any) -> None:
    """Fold a BN into the layer before it; the norm becomes an identity, or the modules that it runs after the norm."""
    spec = read_norm(norm)
    assert spec is not None
    dtype = layer.weight.dtype
    wide: Any = [
        None if each is None else each.detach().double()
        for each in (layer.weight, layer.bias, norm.running_mean, norm.running_var, norm.weight, norm.bias)
    ]
    weight, bias, mean, var, scale, shift = wide
    fused = fuse_conv_bn_weights(weight, bias, mean, var, spec.eps or 0.0, scale, shift, isinstance(layer, _TRANSPOSED))
    trains = layer.weight.requires_grad
    with torch.no_grad():
        layer.weight.copy_(fused[0])
        if layer.bias is not None:
            layer.bias.copy_(fused[1])
    if layer.bias is None:
        layer.bias = nn.Parameter(fused[1].detach().to(dtype), requires_grad=trains)
    _leave_identity(norm, _modules_after(spec))


def can_prepare_fold(layer: nn.Module, norm: nn.Module) -> bool:
    """Return whether a plan that folds `norm` into `layer` fits their classes."""
    spec = read_norm(norm)
    is_foldable = spec is not None and spec.kind in ("bn", "frozen bn") and isinstance(norm.running_mean, Tensor)
    return is_foldable and isinstance(layer, (*_CONVOLUTIONS, *_TRANSPOSED, nn.Linear))


def prepare_fold(layer: Any, norm: Any) -> None:
    """Give two modules the structure that `fold_norm` leaves, without values."""
    spec = read_norm(norm)
    assert spec is not None
    if layer.bias is None:
        count = norm.running_mean.shape[0]
        layer.bias = nn.Parameter(torch.zeros(count, dtype=layer.weight.dtype, device=layer.weight.device))
    _leave_identity(norm, _modules_after(spec))


def _leave_identity(norm: nn.Module, then: tuple[str, ...]) -> None:
    """Turn a norm into the modules that its forward runs after the norm, in place."""
    rest = nn.Sequential()
    for name in then:
        rest.add_module(name, norm._modules[name])
    turn_into(norm, rest if then else nn.Identity())


def _modules_after(spec: NormSpec) -> tuple[str, ...]:
    """The names of the modules that the forward of a norm runs after it, in order."""
    return spec.then or tuple(getattr(spec.target, "then", ()))


def _layer_problem(layer: nn.Module, calls: Counter[int], node: fx.Node, input_rank: int | None) -> str | None:
    """Why a layer cannot take up the norm after it, judged by its class and the graph."""
    if not isinstance(layer, (*_CONVOLUTIONS, *_TRANSPOSED, nn.Linear)):
        return "its input is not the output of a convolution or a linear layer"
    if isinstance(layer, nn.Linear) and input_rank != 2:
        return (
            "the shape of its input is unknown: pass example_inputs="
            if input_rank is None
            else ("it normalizes another dimension than the output of the linear layer")
        )
    if isinstance(layer, _TRANSPOSED) and layer.groups != 1:
        return "the layer before it is a transposed convolution with groups"
    if calls[id(layer)] != 1:
        return f"the layer before it is called {calls[id(layer)]} times"
    if len(node.users) != 1:
        return "the output of the layer before it is used elsewhere too"
    hooks = (layer._forward_hooks, layer._forward_pre_hooks)
    if any(hooks):
        return "the layer before it has hooks"
    return None


def _tensor_problem(name: str, modules: Mapping[str, nn.Module]) -> str | None:
    """Why the tensors of a layer cannot change: they are computed, or other modules use them."""
    layer = modules[name]
    if not isinstance(layer._parameters.get("weight"), nn.Parameter) or "bias" not in layer._parameters:
        return "the weight of the layer before it is computed (pruned, or parametrized)"
    own = {id(parameter) for parameter in layer._parameters.values() if parameter is not None}
    others = {id(each): each for each in modules.values() if each is not layer}
    if any(id(parameter) in own for each in others.values() for parameter in each._parameters.values()):
        return "the layer before it shares its weight with another one"
    return None


def _computes_the_same(layer: nn.Module, norm: nn.Module, spec: NormSpec) -> bool:
    """Whether folding is exact, which a class with another use of its weight would break, on a random input."""
    first, second = copy.deepcopy(layer).double().eval(), copy.deepcopy(norm).double().eval()
    x = _random_input(first)
    with torch.no_grad():
        expected = second(first(x))
        fold_norm(first, second)
        found = second(first(x))
    return bool((found - expected).norm() <= _LIMIT * expected.norm().clamp(min=1e-30))


def _random_input(layer: Any) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    options: Any = {"generator": generator, "dtype": torch.float64}
    if isinstance(layer, nn.Linear):
        return torch.randn(2, layer.in_features, **options).to(layer.weight.device)
    sizes = [(size - 1) * step + 2 for size, step in zip(layer.kernel_size, layer.dilation, strict=True)]
    return torch.randn(2, layer.in_channels, *sizes, **options).to(layer.weight.device)
