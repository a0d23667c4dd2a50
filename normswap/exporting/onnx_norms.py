"""Compact layers as nodes of ONNX: one operator while a network is traced, translated into standard ONNX operators.

A layer as one operator makes the trace as short as that of the BN network, so the export takes no longer; torch would
trace 30 operations for each. Weight and bias are inputs of the operator, so that they keep their names.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy
import onnx
import torch
from onnxscript import ir
from onnxscript import opset18 as op
from torch import Tensor, nn

from normswap.baking.compact_norm import CompactNorm

torch.library.define("normswap::compact_norm", "(Tensor x, Tensor? weight, Tensor? bias, int site) -> Tensor")


def _infer_shape(x: Tensor, weight: Tensor | None, bias: Tensor | None, site: int) -> Tensor:
    return torch.empty_like(x)


torch.library.register_fake("normswap::compact_norm", _infer_shape)


class NormTranslation:
    """Traces the compact layers of a network as operators, and translates these.

    Args:
        network: the network; its layers are traced as operators within `tracing()`.
    """

    def __init__(self, network: nn.Module) -> None:
        self._layers = [module for module in network.modules() if isinstance(module, CompactNorm)]

    @property
    def table(self) -> dict[Any, Any]:
        """The translation for `torch.onnx.export(custom_translation_table=)`."""

        def translate(x: Any, weight: Any, bias: Any, site: int) -> Any:  # torch adds attributes, which no method has
            return self._translate(x, weight, bias, site)

        return {torch.ops.normswap.compact_norm.default: translate}

    @contextmanager
    def tracing(self) -> Iterator[None]:
        """Let the layers call the operator while the block runs."""
        for site, layer in enumerate(self._layers):
            vars(layer)["normalise"] = _operator_call(layer, site)
        try:
            yield
        finally:
            for layer in self._layers:
                vars(layer).pop("normalise", None)

    def _translate(self, x: Any, weight: Any, bias: Any, site: int) -> Any:
        """Emit the nodes of one layer; the formula is that of `CompactNorm`."""
        layer, rank = self._layers[site], len(x.shape)
        is_cast = x.dtype not in (ir.DataType.FLOAT, ir.DataType.DOUBLE)
        wide = op.Cast(x, to=onnx.TensorProto.FLOAT) if is_cast else x
        if is_cast:
            weight, bias = (None if t is None else op.Cast(t, to=onnx.TensorProto.FLOAT) for t in (weight, bias))
        if rank > 2:  # (C, 1, ...), of which a constant is made if weights need not keep their names
            axes = _integers(*range(1, rank - 1))
            weight, bias = (None if t is None else op.Unsqueeze(t, axes) for t in (weight, bias))
        mean, var = _Tables(layer, rank, numpy.float64 if x.dtype == ir.DataType.DOUBLE else numpy.float32).moments(
            wide
        )
        deviation = op.Sqrt(var)
        scale = op.Reciprocal(deviation) if weight is None else op.Div(weight, deviation)
        product = op.Mul(mean, scale)
        shift = op.Neg(product) if bias is None else op.Sub(bias, product)
        if is_cast:
            scale, shift = (op.Cast(each, to=int(x.dtype)) for each in (scale, shift))
        return op.Add(op.Mul(x, scale), shift)


class _Tables:
    """Emits the moments of a layer as tables that broadcast with x: (N, C, 1, ...), (N, 1, 1, ...) or (C, 1, ...)."""

    def __init__(self, layer: CompactNorm, rank: int, number_type: Any) -> None:
        self._layer, self._rank, self._type = layer, rank, number_type
        self._uses_ln = bool(layer.mean_weights["ln"]) or layer.ln_factor is not None

    def moments(self, x: Any) -> tuple[Any, Any]:
        """Emit mixed mean and mixed variance plus eps of x (N, C, *spatial)."""
        layer = self._layer
        mean, var = self._optional(layer.mean_offset), self._optional(layer.var_offset)
        if not (layer.needs_positions or self._uses_ln):
            return mean, var
        if not layer.needs_positions and layer.num_groups == 1:  # one pass for `ln` alone
            ln_mean, ln_var = _two_passes(x, range(1, self._rank), with_var=True)
        else:
            with_var = layer.in_factor is not None or self._uses_ln
            in_mean, in_var = _two_passes(x, range(2, self._rank), with_var=with_var)
            mean = _add(self._scaled(in_mean, layer.mean_weights["in"]), mean)
            if layer.in_factor is not None:
                var = _add(op.Mul(in_var, self._constant(layer.in_factor)), var)
            if not self._uses_ln:
                return mean, var
            ln_mean, ln_var = self._pool_channels(in_mean, in_var)
        ln_var = op.Add(ln_var, self._constant(layer.eps))
        mean = _add(mean, self._scaled(ln_mean, layer.mean_weights["ln"]))
        if layer.ln_shift is not None:
            mean = _add(mean, op.Mul(op.Sqrt(ln_var), self._constant(layer.ln_shift)))
        if layer.ln_factor is not None:
            var = _add(var, op.Mul(ln_var, self._constant(layer.ln_factor)))
        return mean, var

    def _pool_channels(self, mean: Any, var: Any) -> tuple[Any, Any]:
        """Emit mean and variance over the channels, or over groups of them, from the tables (N, C, 1, ...)."""
        layer, axis = self._layer, _integers(1)
        grouped = layer.num_groups != 1
        if grouped:
            shape, axis = _integers(0, layer.num_groups, -1), _integers(2)
            mean, var = op.Reshape(mean, shape), None if var is None else op.Reshape(var, shape)
        pooled_mean = op.ReduceMean(mean, axis, keepdims=1)
        centred = op.Sub(mean, pooled_mean)
        pooled_var = op.ReduceMean(_add(var, op.Mul(centred, centred)), axis, keepdims=1)
        if not grouped:
            return pooled_mean, pooled_var
        of_channels, flat = op.Shape(mean), _integers(0, layer.num_features, *(1,) * (self._rank - 2))
        return op.Reshape(op.Expand(pooled_mean, of_channels), flat), op.Reshape(
            op.Expand(pooled_var, of_channels), flat
        )

    def _scaled(self, table: Any, weight: float) -> Any:
        return None if weight == 0 else table if weight == 1 else op.Mul(table, self._constant(weight))

    def _optional(self, value: Tensor | None) -> Any:
        return None if value is None else self._constant(value)

    def _constant(self, value: Tensor | float) -> Any:
        """Emit a number, or a table (C, 1, ...) of numbers (C,)."""
        array = value.detach().cpu().numpy() if isinstance(value, Tensor) else numpy.asarray(value)
        if array.ndim:
            array = array.reshape(-1, *(1,) * (self._rank - 2))
        return op.Constant(value=onnx.numpy_helper.from_array(array.astype(self._type)))


def _two_passes(x: Any, axes: range, *, with_var: bool) -> tuple[Any, Any]:
    """Emit mean and variance over axes of x, which keep size 1; the variance is None if it is not needed or 0."""
    if not axes:  # one position
        return x, None
    reduced = _integers(*axes)
    mean = op.ReduceMean(x, reduced, keepdims=1)
    if not with_var:
        return mean, None
    centred = op.Sub(x, mean)
    return mean, op.ReduceMean(op.Mul(centred, centred), reduced, keepdims=1)


def _operator_call(layer: CompactNorm, site: int) -> Any:
    def call(x: Tensor) -> Tensor:
        normalised: Tensor = torch.ops.normswap.compact_norm(x, layer.weight, layer.bias, site)
        return normalised

    return call


def _integers(*values: int) -> Any:
    return op.Constant(value=onnx.numpy_helper.from_array(numpy.array(values, dtype=numpy.int64)))


def _add(first: Any, second: Any) -> Any:
    """Emit a sum; None counts as 0."""
    return second if first is None else first if second is None else op.Add(first, second)
