"""Products of 8-bit activations and matrices of 8-bit blocks: spelled so that ONNX Runtime runs them.

The matrix is stored turned and read through a Transpose, which keeps the optimizer from a kernel that refuses blocks.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from bitwright_onnx.simulate.site_ops import NodeList

_BYTES = frozenset({ir.DataType.INT8, ir.DataType.UINT8})
_MOVING = frozenset(
    """
    Reshape Transpose Squeeze Unsqueeze Flatten Identity Slice Gather Split Expand Tile MaxPool DepthToSpace
    SpaceToDepth
    """.split()  # noqa: SIM905
)
"""Ops that ONNX Runtime moves a dequantization through."""


def _reads_bytes(value: ir.Value | None) -> bool:
    """Whether an operand was dequantized from 8-bit codes that are computed."""
    producer = None if value is None else value.producer()
    while producer is not None and producer.op_type in _MOVING and producer.inputs[0] is not None:
        producer = producer.inputs[0].producer()
    if producer is None or producer.op_type != "DequantizeLinear" or len(producer.inputs) < 3:
        return False
    zero = producer.inputs[2]
    return zero is not None and zero.const_value is not None and zero.const_value.dtype in _BYTES


def _blocks_of_bytes(value: ir.Value | None) -> tuple[ir.Node | None, ir.Node | None]:
    """The DequantizeLinear of an operand that is a stored matrix of 8-bit blocks, and the Transpose of its codes."""
    node = None if value is None else value.producer()
    if node is None or node.op_type != "DequantizeLinear" or not node.attributes.get_int("block_size", 0):
        return None, None
    codes = node.inputs[0]
    turn = None if codes is None else codes.producer()
    if turn is not None and turn.op_type == "Transpose":
        codes = turn.inputs[0]
    if (
        codes is None
        or codes.const_value is None
        or codes.const_value.dtype not in _BYTES
        or len(codes.shape or ()) != 2
    ):
        return None, None
    return node, turn


def turn_byte_blocks(graph: ir.Graph, fresh: Callable[[str], str]) -> None:
    """Change a QDQ graph in place; `fresh` makes names of its own from wanted ones.

    ONNX Runtime (1.32) makes a MatMulIntegerToFloat of a product of two dequantized operands of 8 bits, whatever
    their blocks are, and that kernel then refuses the scales. It doesn't look behind a Transpose.
    """
    for node in list(graph):
        if node.op_type != "MatMul" or node.domain != "" or not _reads_bytes(node.inputs[0]):
            continue
        blocks, turn = _blocks_of_bytes(node.inputs[1])
        if blocks is None:
            continue
        if turn is None:
            _store_turned(graph, fresh, blocks)
        else:  # the model reads the matrix transposed: let it do so behind the dequantization (see `_turn_blocks`)
            first = next((u for u, _ in turn.inputs[0].uses() if u.op_type == blocks.op_type), None)  # type: ignore[union-attr]
            assert first is not None
            chain = NodeList(fresh(f"{node.inputs[1].name}_read"))  # type: ignore[union-attr]
            y = chain("Transpose", first.outputs[0], perm=[1, 0])
            y.type = first.outputs[0].type
            graph.insert_before(node, chain.nodes)
            node.replace_input_with(1, y)
            for unused in (blocks, turn):
                if not any(True for _ in unused.outputs[0].uses()):
                    graph.remove(unused, safe=True)


def _store_turned(graph: ir.Graph, fresh: Callable[[str], str], blocks: ir.Node) -> None:
    """Store the codes of a matrix that products alone read turned, and transpose what is dequantized."""
    y = blocks.outputs[0]
    uses = list(y.uses())
    alike = all(u.op_type == "MatMul" and u.domain == "" and i == 1 for u, i in uses)
    if not alike or y.is_graph_output():
        return
    for value in blocks.inputs:
        assert value is not None and value.const_value is not None
        turned = np.ascontiguousarray(value.const_value.numpy().T)
        value.const_value = ir.Tensor(turned, dtype=value.const_value.dtype, name=value.name)
        value.shape = ir.Shape(turned.shape)
    axis = blocks.attributes.get_int("axis", 1)
    blocks.attributes["axis"] = ir.AttrInt64("axis", 1 - int(axis or 0) % 2)
    chain = NodeList(fresh(f"{y.name}_turned"))
    read = chain("Transpose", y, perm=[1, 0])
    read.type, read.shape = y.type, y.shape
    if y.shape is not None:
        y.shape = ir.Shape(tuple(y.shape)[::-1])
    graph.insert_after(blocks, chain.nodes)
    for user, index in uses:
        user.replace_input_with(index, read)
