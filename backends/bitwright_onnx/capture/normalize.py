"""Bringing every model into one form when it is opened, so that the rest of the backend meets few spellings.

After `normalize`: opset ≥ 13; functions inlined; Constant nodes and constant subexpressions are initializers, none
of which is also an input; Identity nodes are gone but where they name an output; every node has a name of its own;
a constant added to each channel of a convolution without bias is its bias; parameters of different kinds are
arrays of their own; Gemm has alpha = beta = 1 and a bias of shape (out,); shapes and types are inferred as far as
ONNX (or else ONNX Runtime) can. The outputs' values are those of the model as given, and tensors that are left keep
their names.
"""

from __future__ import annotations

import logging

import onnx_ir as ir
import onnx_ir.passes.common as passes

from bitwright.errors import ModelError
from bitwright_onnx.capture.bombs import (
    check_inlined_size,
    forget_computed_shapes,
    propagates_far,
    states_large_numbers,
)
from bitwright_onnx.capture.folding import (
    bypass_constant_identities,
    cast_to_known_types,
    fold_constants,
    fold_static_shapes,
)
from bitwright_onnx.capture.inlining import Inlining
from bitwright_onnx.capture.unsharing import unshare_roles
from bitwright_onnx.capture.wellformed import refuse_malformed
from bitwright_onnx.graph.opset import MINIMUM_OPSET, raise_opset
from bitwright_onnx.graph.rewrites import rewrite, turn_gemms
from bitwright_onnx.graph.subgraph import values_of
from bitwright_onnx.graph.tensors import reason
from bitwright_onnx.graph.value_types import refuse_no_tensors, restore_types
from bitwright_onnx.simulate.session import compile_session

_ROUNDS = 6
"""Of folding constants: sizes that are computed from folded ones are known in the next."""


def normalize(model: ir.Model) -> ir.Model:
    """The model in normal form. Works in place on a model that the caller owns, except where it must be converted.

    Raises:
        ModelError: the model has no outputs, an input or an output is not a tensor, a tensor is produced twice, or its
            opset can't be raised; a node isn't what its operator's schema says (see `wellformed`).
    """
    if not model.graph.outputs:
        raise ModelError("the model has no outputs")
    refuse_malformed(model)
    refuse_no_tensors(model.graph)
    if "ai.onnx" in model.opset_imports:
        model.opset_imports.setdefault("", model.opset_imports.pop("ai.onnx"))
    if model.functions:
        passes.RemoveUnusedFunctionsPass()(model)  # type: ignore[no-untyped-call]
        check_inlined_size(model)
        try:
            Inlining()(model)
        except Exception as error:
            raise ModelError(f"its functions can't be written out: {reason(error)}") from error
    _refuse_double_producers(model.graph)
    passes.RemoveInitializersFromInputsPass()(model)
    _name_nodes(model)
    try:
        passes.TopologicalSortPass()(model)
    except Exception as error:
        raise ModelError("the graph has a cycle") from error
    model = raise_opset(model, MINIMUM_OPSET)
    passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    _name_nodes(model)
    passes.TopologicalSortPass()(model)
    passes.RemoveUnusedNodesPass()(model)
    forget_computed_shapes(model.graph)
    for _ in range(_ROUNDS):
        infer_shapes(model)
        bypass_constant_identities(model.graph)
        cast_to_known_types(model.graph)
        turn_gemms(model.graph)
        if not (fold_static_shapes(model.graph) | fold_constants(model)):
            break
    _ask_runtime_for_types(model)
    rewrite(model.graph)
    unshare_roles(model.graph)
    passes.RemoveUnusedNodesPass()(model)
    return model


def infer_shapes(model: ir.Model) -> None:
    """Fill in shapes and types by ONNX's inference, with data propagation where that can't run away (see `bombs`).

    Where inference fails, nothing changes.
    """
    logger = logging.getLogger("onnx_ir.passes.common.shape_inference")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        far = propagates_far(model.graph)
        if not far and states_large_numbers(model.graph):
            passes.ShapeInferencePass(check_type=False, strict_mode=False, data_prop=False)(model)
            far = propagates_far(model.graph)
        passes.ShapeInferencePass(check_type=False, strict_mode=False, data_prop=not far)(model)
    finally:
        logger.setLevel(level)
    restore_types(model.graph)


class _NodeNames:
    def generate_node_name(self, node: ir.Node) -> str:
        return node.name or next((o.name for o in node.outputs if o.name), None) or node.op_type

    def generate_value_name(self, value: ir.Value) -> str:
        return value.name or "tensor"


def _name_nodes(model: ir.Model) -> None:
    passes.NameFixPass(name_generator=_NodeNames())(model)


def _refuse_double_producers(graph: ir.Graph) -> None:
    seen: set[str] = set()
    for node in graph:
        for name in (o.name for o in node.outputs if o.name):
            if name in seen:
                raise ModelError(f"tensor {name!r} is produced twice, again by node {node.name or node.op_type!r}")
            seen.add(name)


def _ask_runtime_for_types(model: ir.Model) -> None:
    """Types and ranks that ONNX's inference left open (behind custom ops), as ONNX Runtime sees them."""
    values = values_of(model.graph)
    unknown = [n for n, v in values.items() if v.producer() is not None and n and (v.dtype is None or v.shape is None)]
    if not unknown:
        return
    try:
        outputs = compile_session(model, unknown, optimize=False).get_outputs()
    except Exception:
        # Without the custom ops' library nobody knows; such tensors are taken to be float.
        return
    for output in outputs:
        kind = output.type.removeprefix("tensor(").removesuffix(")").upper()
        if kind in ir.DataType.__members__:
            values[output.name].dtype = values[output.name].dtype or ir.DataType[kind]
            if values[output.name].shape is None and output.shape:
                values[output.name].shape = ir.Shape([d if isinstance(d, int) else None for d in output.shape])
