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
        number_type = numpy.float64 if x.dtype == ir.DataType.DOUBLE else numpy.float32
        spatial = _integers(*range(2, rank))
        table = _Tables(layer, rank, number_type)
        mean, var = table.moments(wide, spatial)
        if is_cast:
            weight, bias = (None if t is None else op.Cast(t, to=onnx.TensorProto.FLOAT) for t in (weight, bias))
        deviation = op.Sqrt(var)
        scale = op.Reciprocal(deviation) if weight is None else op.Div(weight, deviation)
        product = op.Mul(mean, scale)
        shift = op.Neg(product) if bias is None else op.Sub(bias, product)
        if is_cast:
            scale, shift = (op.Cast(each, to=int(x.dtype)) for each in (scale, shift))
        scaled = op.Mul(x, _unsqueeze(scale, rank, varies=table.var_varies))
        return op.Add(scaled, _unsqueeze(shift, rank, varies=table.mean_varies or table.var_varies))


class _Tables:
    """Emits the moments of a layer as tables: (N, C) if they vary with the sample, else (C,)."""

    def __init__(self, layer: CompactNorm, rank: int, number_type: Any) -> None:
        self._layer, self._rank, self._type = layer, rank, number_type

    @property
    def mean_varies(self) -> bool:
        """Whether the mixed mean depends on the sample."""
        return any(self._layer.mean_weights.values())

    @property
    def var_varies(self) -> bool:
        """Whether the mixed variance depends on the sample."""
        return self._layer.in_factor is not None or self._layer.ln_factor is not None

    def moments(self, x: Any, spatial: Any) -> tuple[Any, Any]:
        """Emit mixed mean and mixed variance plus eps of x (N, C, *spatial)."""
        layer = self._layer
        mean, var = self._optional(layer.mean_offset), self._optional(layer.var_offset)
        if not (layer.needs_positions or self._uses_ln):
            return mean, var
        instance_mean, instance_var = self._instance_moments(x, spatial)
        mean = _add(self._scaled(instance_mean, layer.mean_weights["in"]), mean)
        if layer.in_factor is not None and instance_var is not None:
            var = _add(op.Mul(instance_var, self._constant(layer.in_factor)), var)
        if self._uses_ln:
            ln_mean, ln_var = self._layer_moments(instance_mean, instance_var)
            mean = _add(mean, self._scaled(ln_mean, layer.mean_weights["ln"]))
            if layer.ln_shift is not None:
                mean = _add(mean, op.Mul(op.Sqrt(ln_var), self._constant(layer.ln_shift)))
            if layer.ln_factor is not None:
                var = _add(var, op.Mul(ln_var, self._constant(layer.ln_factor)))
        return mean, var

    @property
    def _uses_ln(self) -> bool:
        return bool(self._layer.mean_weights["ln"]) or self._layer.ln_factor is not None

    def _instance_moments(self, x: Any, spatial: Any) -> tuple[Any, Any]:
        """Emit mean and variance of each sample and channel; the variance is None if there is one position."""
        if self._rank == 2:
            return x, None
        mean = op.ReduceMean(x, spatial, keepdims=1)
        if self._layer.in_factor is None and not self._uses_ln:
            return op.Squeeze(mean, spatial), None
        centred = op.Sub(x, mean)
        return op.Squeeze(mean, spatial), op.ReduceMean(op.Mul(centred, centred), spatial, keepdims=0)

    def _layer_moments(self, mean: Any, var: Any) -> tuple[Any, Any]:
        """Emit mean and variance plus eps over the channels, or over groups of them, of each sample."""
        layer, axis = self._layer, _integers(1)
        if layer.num_groups != 1:
            grouped, axis = _integers(0, layer.num_groups, -1), _integers(2)
            mean, var = op.Reshape(mean, grouped), None if var is None else op.Reshape(var, grouped)
        pooled_mean = op.ReduceMean(mean, axis, keepdims=1)
        centred = op.Sub(mean, pooled_mean)
        pooled = op.ReduceMean(_add(var, op.Mul(centred, centred)), axis, keepdims=1)
        pooled_var = op.Add(pooled, self._constant(layer.eps))
        if layer.num_groups != 1:
            shape = op.Shape(mean)
            flat = _integers(0, layer.num_features)
            pooled_mean, pooled_var = (op.Reshape(op.Expand(t, shape), flat) for t in (pooled_mean, pooled_var))
        return pooled_mean, pooled_var

    def _scaled(self, table: Any, weight: float) -> Any:
        return None if weight == 0 else table if weight == 1 else op.Mul(table, self._constant(weight))

    def _optional(self, value: Tensor | None) -> Any:
        return None if value is None else self._constant(value)

    def _constant(self, value: Tensor | float) -> Any:
        array = value.detach().cpu().numpy() if isinstance(value, Tensor) else numpy.asarray(value)
        return op.Constant(value=onnx.numpy_helper.from_array(array.astype(self._type)))


def _operator_call(layer: CompactNorm, site: int) -> Any:
    def call(x: Tensor) -> Tensor:
        normalised: Tensor = torch.ops.normswap.compact_norm(x, layer.weight, layer.bias, site)
        return normalised

    return call


def _integers(*values: int) -> Any:
    return op.Constant(value=onnx.numpy_helper.from_array(numpy.array(values, dtype=numpy.int64)))


def _unsqueeze(table: Any, rank: int, *, varies: bool) -> Any:
    """A table, (N, C) if it varies with the sample or else (C,), that broadcasts with (N, C, *spatial)."""
    return table if rank == 2 else op.Unsqueeze(table, _integers(*range(2 if varies else 1, rank - (not varies))))


def _add(first: Any, second: Any) -> Any:
    """Emit a sum; None counts as 0."""
    return second if first is None else first if second is None else op.Add(first, second)
