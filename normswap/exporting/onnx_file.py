"""ONNX models from traced programs: standard operators, names of dimensions, moments in float32.

torch translates the program to opset 18, where GroupNorm is Reshape and InstanceNormalization; later opsets are reached
by conversion, since torch would emit GroupNormalization for them, which TensorRT does not read.
"""

import re
from collections.abc import Mapping
from typing import Any

import onnx
import torch
from onnxscript import ir, optimizer, rewriter, version_converter
from onnxscript.rewriter.rules import common as rules

from normswap.errors import ModelError
from normswap.surgery.graphs.exported_program import suppress_output
from normswap.text import first_line

_TRANSLATED_OPSET = 18
_LARGEST = 2**31 - 1  # bytes of one protobuf
# torch emits such nodes for any network, and these rules remove them.
_CLEANING = (
    "no_op_cast_rule",
    "no_op_expand_rule",
    "cast_constant_of_shape_rule",
    "cast_constant_of_shape_without_value_rule",
    "reshape_reshape_rule",
    "materialize_reshape_shape_rule",
    "fuse_pad_into_conv_rule",
    "dropout_inference_rule",
    "remove_optional_bias_from_conv_rule",
    "remove_optional_bias_from_conv_transpose_rule",
    "remove_optional_bias_from_gemm_rule",
)
_FOLDING = (
    "fuse_batchnorm_into_conv_rule",
    "fuse_batchnorm_into_conv_transpose_rule",
    "fuse_batchnorm_into_gemm_rule",
)


def build_onnx(
    program: torch.export.ExportedProgram,
    translations: Mapping[Any, Any],
    *,
    opset: int,
    fold: bool,
    symbols: Mapping[str, str],
    sizes: Mapping[str, int],
) -> onnx.ModelProto:
    """Return the ONNX model of a traced program.

    Args:
        program: the program.
        translations: translations of own operators, `NormTranslation.table`.
        opset: the version of the operators.
        fold: fold BatchNorm into the convolution or linear layer before it; else weights keep their names.
        symbols: names for symbolic dimensions, by the program's own.
        sizes: lower bounds of free dimensions by name, which become metadata of the model.

    Raises:
        ModelError: torch cannot translate the program, or the result is no valid ONNX model of this opset.
    """
    try:
        with suppress_output():
            exported: Any = torch.onnx.export(
                program,
                dynamo=True,
                optimize=False,
                opset_version=_TRANSLATED_OPSET,
                verbose=False,
                custom_translation_table=dict(translations),
            )
            model = exported.model
            _simplify(model, fold=fold)
            _compute_norms_in_float32(model)
            _rename_dimensions(model, symbols)
            if opset != _TRANSLATED_OPSET:
                version_converter.convert_version(model, opset)
            model.producer_name = "normswap"
            model.metadata_props.update({f"smallest_{name}": str(bound) for name, bound in sizes.items()})
            proto: onnx.ModelProto = ir.to_proto(model)
    except Exception as error:
        raise ModelError(f"torch cannot export the network to ONNX: {_reason(error)}") from error
    _check(proto, opset)
    return proto


def _reason(error: BaseException) -> str:
    """The first line of the innermost cause: torch wraps it in a report of many lines."""
    while error.__cause__ is not None:
        error = error.__cause__
    return first_line(error)


def _simplify(model: ir.Model, *, fold: bool) -> None:
    """Fold constants and BatchNorm, and remove nodes that do nothing."""
    weights = set() if fold else set(model.graph.initializers)
    names = (*_CLEANING, *_FOLDING) if fold else _CLEANING
    chosen = [getattr(rules, name) for name in names]

    def should_fold(node: ir.Node) -> bool | None:
        uses_weight = any(value is not None and value.name in weights for value in node.inputs)
        return False if uses_weight and node.op_type != "Shape" else None

    passes: Any = ir.passes.common
    passes.InlinePass()(model)
    optimizer.fold_constants(model, should_fold=should_fold)
    rewriter.RewritePass(chosen)(model)
    optimizer.fold_constants(model, should_fold=should_fold)
    for each in (
        passes.RemoveUnusedNodesPass(),
        passes.RemoveUnusedFunctionsPass(),
        passes.RemoveUnusedOpsetsPass(),
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        passes.DeduplicateInitializersPass(),
        passes.CommonSubexpressionEliminationPass(),
        passes.OutputFixPass(),
        passes.NameFixPass(),
    ):
        each(model)


def _compute_norms_in_float32(model: ir.Model) -> None:
    """Cast around InstanceNormalization in half precision, which has no attribute for the precision of its moments."""
    halves = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
    for node in list(model.graph):
        if node.op_type != "InstanceNormalization" or node.inputs[0] is None or node.inputs[0].dtype not in halves:
            continue
        half = node.inputs[0].dtype
        casts = [ir.node("Cast", [value], attributes={"to": int(ir.DataType.FLOAT)}) for value in node.inputs]
        for index, cast in enumerate(casts):
            cast.outputs[0].dtype = ir.DataType.FLOAT
            node.replace_input_with(index, cast.outputs[0])
        model.graph.insert_before(node, casts)
        output = node.outputs[0]
        back = ir.node("Cast", [output], attributes={"to": int(half)})
        back.outputs[0].dtype, back.outputs[0].shape = half, output.shape
        output.dtype = ir.DataType.FLOAT
        for user, index in list(output.uses()):
            if user is not back:
                user.replace_input_with(index, back.outputs[0])
        if output in model.graph.outputs:
            model.graph.outputs[model.graph.outputs.index(output)] = back.outputs[0]
        model.graph.insert_after(node, back)
    ir.passes.common.NameFixPass()(model)


def _rename_dimensions(model: ir.Model, symbols: Mapping[str, str]) -> None:
    """Give symbolic dimensions of all values names such as `batch`, also inside expressions."""
    if not symbols:
        return
    pattern = re.compile(r"\b(" + "|".join(map(re.escape, symbols)) + r")\b")
    values = [*model.graph.inputs, *(output for node in model.graph for output in node.outputs)]
    for value in values:
        if value.shape is None:
            continue
        for index, size in enumerate(value.shape):
            if isinstance(size, ir.SymbolicDim) and size.value is not None:
                value.shape[index] = pattern.sub(lambda match: symbols[match[0]], size.value)


def _check(proto: onnx.ModelProto, opset: int) -> None:
    versions = {each.domain: each.version for each in proto.opset_import}
    used = {node.domain for node in proto.graph.node}
    if used - {""}:
        raise ModelError(f"the ONNX model has operators that are not standard, of {', '.join(sorted(used - {''}))}")
    if versions.get("") != opset:
        raise ModelError(f"the ONNX model cannot be written in opset {opset}: use opset={versions.get('')}")
    if proto.ByteSize() > _LARGEST:
        raise ModelError("the ONNX model is larger than 2 GB, the limit of one file: use to='pt2', or dtype='float16'")
    try:
        onnx.checker.check_model(proto, full_check=True)
    except Exception as error:
        raise ModelError(f"the ONNX model is not valid: {first_line(error)}") from error
