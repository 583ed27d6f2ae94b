"""Recurrent layers as frameworks have them, by one LSTM, GRU or RNN of ONNX: the word "Recurrent".

The op reads (batch, steps, features), and the first states, if it has any, each (batch, units). Its call has

- attributes: `kind` ("LSTM", "GRU" or "RNN"), `activations` (with `activation_alpha`, `activation_beta`) of all
  directions in ONNX's order, `linear_before_reset` of a GRU; `backwards`: one direction, from the last step to the
  first, the sequence in the order of computation; `merge`: how two directions become one ("concat", "sum", "mul",
  "ave"); `results`, what each output is: "sequence" (batch, steps, units), "last" (of the sequence; the two directions
  merged), "state", "cell" (of an LSTM), and "state_reverse", "cell_reverse" of a second direction.
- operands 1 to 3: weights (directions, gates · units, features), recurrent weights (directions, gates · units, units)
  and biases (directions, 2 · gates · units), in ONNX's order of gates.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from bitwright.graph import Op
from bitwright_onnx.emit.layouts import attributes_of
from bitwright_onnx.emit.sheet import Sheet


def layer(sheet: Sheet, op: Op) -> list[ir.Value]:
    """All outputs of a recurrent layer."""
    given = attributes_of(op)
    (source, weights, recurrent, biases), initial = sheet.operands(op)[:4], sheet.operands(op)[4:]
    assert source is not None and recurrent is not None and recurrent.shape is not None
    directions, units = int(recurrent.shape[0]), int(recurrent.shape[2])  # type: ignore[arg-type]

    def numbers(*values: int) -> ir.Value:
        return sheet.literal(op, values)

    x = sheet.node(op, "Transpose", source, perm=[1, 0, 2])
    if given["backwards"]:
        x = sheet.node(op, "Slice", x, numbers(-1), numbers(-np.iinfo(np.int64).max), numbers(0), numbers(-1))
    named: dict[str, Any] = {name: given[name] for name in ("activation_alpha", "activation_beta") if given[name]}
    if given["kind"] == "GRU":
        named["linear_before_reset"] = given["linear_before_reset"]
    first = [sheet.node(op, "Unsqueeze", value, numbers(0)) for value in initial]
    operands = [x, weights, recurrent, biases, *([None, *first] if first else [])]
    direction = "bidirectional" if directions == 2 else "forward"
    whole, *ends = sheet.nodes_of(
        op, given["kind"], operands, 3 if given["kind"] == "LSTM" else 2,
        {"hidden_size": units, "direction": direction, "activations": given["activations"], **named},
    )  # fmt: skip

    def part(value: ir.Value, index: int, axis: int) -> ir.Value:
        return sheet.node(op, "Gather", value, sheet.literal(op, index), axis=axis)

    def merged(parts: list[ir.Value]) -> ir.Value:
        if len(parts) == 1:
            return parts[0]
        if given["merge"] == "concat":
            return sheet.node(op, "Concat", *parts, axis=-1)
        total = sheet.node(op, "Mul" if given["merge"] == "mul" else "Add", *parts)
        return (
            total if given["merge"] != "ave" else sheet.node(op, "Div", total, sheet.literal(op, 2.0, sheet.dtype(op)))
        )

    def result(role: str) -> ir.Value:
        if role == "sequence":
            return merged([
                sheet.node(op, "Transpose", part(whole, i, 1), perm=[1, 0, 2]) for i in range(directions)
            ])  # fmt: skip
        if role == "last":
            return merged([part(ends[0], i, 0) for i in range(directions)])
        kind, _, reverse = role.partition("_")
        return part(ends[0 if kind == "state" else 1], int(bool(reverse)), 0)

    return [result(role) for role in given["results"]]
