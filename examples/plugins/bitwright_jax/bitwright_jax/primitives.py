"""What JAX's primitives are in ONNX's words. What isn't here runs as it is, in float, and ends every pattern."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import export, lax

from bitwright.dataflow import GraphBuilder, general_convolution, pool_window
from bitwright.graph import AxisAttrs, PoolAttrs, clipping

Told = dict[str, Any]
"""Arguments of `GraphBuilder.op`."""
UNARY = {
    "exp": "Exp", "log": "Log", "tanh": "Tanh", "logistic": "Sigmoid", "sqrt": "Sqrt", "neg": "Neg", "abs": "Abs",
    "erf": "Erf", "erfc": "Erfc", "log1p": "Log1p", "expm1": "Expm1", "floor": "Floor", "ceil": "Ceil", "sin": "Sin",
    "cos": "Cos", "sign": "Sign", "round": "Round", "not": "Not",
}  # fmt: skip
BINARY = {
    "add": "Add", "add_any": "Add", "sub": "Sub", "mul": "Mul", "div": "Div", "max": "Max", "min": "Min", "pow": "Pow",
    "lt": "Less", "le": "LessOrEqual", "gt": "Greater", "ge": "GreaterOrEqual", "eq": "Equal", "ne": "NotEqual",
    "and": "And", "or": "Or",
}  # fmt: skip
ELEMENTWISE = frozenset({*BINARY, "select_n"})
"""Their operands are broadcast against each other."""
_REDUCED = {
    "reduce_sum": "ReduceSum",
    "reduce_max": "ReduceMax",
    "reduce_min": "ReduceMin",
    "reduce_prod": "ReduceProd",
}


def convert(eqn: Any, operands: list[str], builder: GraphBuilder) -> Told:
    """What a primitive is: type, operands in ONNX's order, attributes, layouts."""
    name = eqn.primitive.name
    if name in UNARY or name in BINARY:
        return {"type": UNARY.get(name) or BINARY[name]}
    if name in _REDUCED:
        axes = tuple(eqn.params["axes"])
        attributes = {"axes": axes, "keepdims": 0}
        return {"type": _REDUCED[name], "attributes": attributes, "attrs": PoolAttrs(axes, keepdims=False)}
    special = _SPECIAL.get(name)
    told = None if special is None else special(eqn, operands, builder)
    return {"type": name} if told is None else told


def _power(exponent: float, operands: list[str], builder: GraphBuilder) -> Told:
    if exponent == 2:
        return {"type": "Mul", "operands": operands * 2, "order": (0,)}
    if exponent == -1:
        return {"type": "Reciprocal"}
    return {"type": "Pow", "operands": [*operands, builder.constant(np.float32(exponent))], "order": (0,)}


def _conv(eqn: Any, operands: list[str], builder: GraphBuilder) -> Told | None:
    p = eqn.params
    lhs, rhs, out = (tuple(s) for s in p["dimension_numbers"])
    ordered = all(list(s[2:]) == sorted(s[2:]) for s in (lhs, out)) and lhs[0] == out[0] == 0
    found = general_convolution(eqn.invars[1].aval.shape, rhs, p["window_strides"], p["padding"], p["lhs_dilation"],
                                p["rhs_dilation"], p["feature_group_count"])  # fmt: skip
    if found is None or not ordered or p["batch_group_count"] != 1:
        return None
    return {"type": found[0], "attrs": found[1], "layouts": {1: found[2]}, "channels": (lhs[1], out[1])}


def _window(eqn: Any, operands: list[str], builder: GraphBuilder) -> Told | None:
    p = eqn.params
    size, strides, pads, dilation = (
        p[k] for k in ("window_dimensions", "window_strides", "padding", "window_dilation")
    )
    found = pool_window(size, strides, dilation, pads)
    if found is None or any(d != 1 for d in p["base_dilation"]):
        return None
    attrs, channel = found
    told = {"type": "MaxPool", "attrs": attrs, "channels": (channel, channel)}
    if eqn.primitive.name == "reduce_window_max":
        return told
    ones = np.ones([1 if i in (0, channel) else n for i, n in enumerate(eqn.invars[0].aval.shape)], np.float32)
    inside = lax.reduce_window(ones, np.float32(0), lax.add, size, strides, pads, window_dilation=dilation)
    return {**told, "type": "SumPool", "attributes": {"inside": np.asarray(inside)}}


def _broadcast(eqn: Any, operands: list[str], builder: GraphBuilder) -> Told | None:
    before, after = (v.aval.shape for v in (eqn.invars[0], eqn.outvars[0]))
    kept = [after[i] for i in eqn.params["broadcast_dimensions"]]
    grown = any(n != 1 for i, n in enumerate(after) if i not in eqn.params["broadcast_dimensions"])
    return {"type": "Expand" if grown or kept != list(before) else "Reshape"}


def _clamp(eqn: Any, operands: list[str], builder: GraphBuilder) -> Told | None:
    low, high = (builder.known(operands[i]) for i in (0, 2))
    if low is None or high is None or low.size != 1 or high.size != 1:
        return None
    _, type, attrs = clipping(float(low.reshape(())), float(high.reshape(())))
    return {"type": type, "operands": operands[1:2], "attrs": attrs,
            "function": lambda x: [lax.clamp(jnp.asarray(low, x.dtype).reshape(()), x, jnp.asarray(high, x.dtype).reshape(()))]}  # fmt: skip # noqa: E501


def _select(eqn: Any, operands: list[str], builder: GraphBuilder) -> Told | None:
    if len(operands) != 3 or eqn.invars[0].aval.dtype != bool:
        return None
    return {"type": "Where", "operands": [operands[0], operands[2], operands[1]], "order": (0, 2, 1)}


def _gather(eqn: Any, operands: list[str], builder: GraphBuilder) -> Told | None:
    """Rows of a matrix, or a slice at a known place."""
    d, table, indices = eqn.params["dimension_numbers"], eqn.invars[0].aval.shape, eqn.invars[1].aval.shape
    starts = builder.known(operands[1])
    if starts is not None and len(indices) == 1 and not d.collapsed_slice_dims and len(d.offset_dims) == len(table):
        places = zip(d.start_index_map, starts.reshape(-1).tolist(), strict=True)
        spans = {a: (s, s + eqn.params["slice_sizes"][a]) for a, s in places if not export.is_symbolic_dim(table[a])}
        if len(spans) == len(d.start_index_map) and all(s >= 0 and e <= table[a] for a, (s, e) in spans.items()):
            attributes = {"starts": tuple(s for s, _ in spans.values()), "ends": tuple(e for _, e in spans.values()),
                          "axes": tuple(spans), "steps": (1,) * len(spans)}  # fmt: skip
            cut = tuple(slice(*spans[a]) if a in spans else slice(None) for a in range(len(table)))
            return {"type": "Slice", "operands": operands[:1], "attributes": attributes, "function": lambda x: [x[cut]]}
    rank = len(indices) - 1
    rows = (d.collapsed_slice_dims, d.start_index_map, d.offset_dims) == ((0,), (0,), (rank,))
    if len(table) != 2 or not rows or tuple(eqn.params["slice_sizes"]) != (1, table[1]) or indices[-1] != 1:
        return None
    shape = builder.shape(operands[1])[:-1]
    (index,) = builder.op("Reshape", operands[1:], [shape], lambda i: [i[..., 0]], dtypes=["int32"])
    return {"type": "Gather", "operands": [operands[0], index], "attributes": {"axis": 0},
            "function": lambda t, i: [jnp.take(t, i, axis=0, mode="clip")]}  # fmt: skip


def _slice(eqn: Any, operands: list[str], builder: GraphBuilder) -> Told:
    starts, limits = eqn.params["start_indices"], eqn.params["limit_indices"]
    whole = [export.is_symbolic_dim(n) for n in limits]
    axes = tuple(i for i, w in enumerate(whole) if not w)
    steps = eqn.params["strides"] or (1,) * len(starts)
    attributes = {"starts": tuple(starts[i] for i in axes), "ends": tuple(limits[i] for i in axes), "axes": axes,
                  "steps": tuple(steps[i] for i in axes)}  # fmt: skip
    return {"type": "Slice", "attributes": attributes}


def _pad(eqn: Any, operands: list[str], builder: GraphBuilder) -> Told | None:
    value, config = builder.known(operands[1]), eqn.params["padding_config"]
    if value is None or any(low < 0 or high < 0 or inner for low, high, inner in config):
        return None
    pads = tuple(c[0] for c in config) + tuple(c[1] for c in config)
    return {"type": "Pad", "operands": [operands[0], None, operands[1]] if float(value) else operands[:1],
            "attributes": {"mode": "constant", "pads": pads},
            "function": lambda x, *_: [lax.pad(x, jnp.asarray(value, x.dtype), config)]}  # fmt: skip


_SPECIAL: Mapping[str, Callable[[Any, list[str], GraphBuilder], Told | None]] = {
    "square": lambda eqn, operands, builder: _power(2, operands, builder),
    "integer_pow": lambda eqn, operands, builder: _power(eqn.params["y"], operands, builder),
    "rsqrt": lambda eqn, operands, builder: _power(-0.5, operands, builder),
    "conv_general_dilated": _conv,
    "reduce_window_max": _window,
    "reduce_window_sum": _window,
    "broadcast_in_dim": _broadcast,
    "reshape": lambda *_: {"type": "Reshape"},
    "squeeze": lambda *_: {"type": "Reshape"},
    "expand_dims": lambda *_: {"type": "Reshape"},
    "transpose": lambda eqn, *_: {"type": "Transpose", "attributes": {"perm": tuple(eqn.params["permutation"])}},
    "rev": lambda eqn, *_: {"type": "Flip", "attributes": {"axes": tuple(eqn.params["dimensions"])}},
    "concatenate": lambda eqn, *_: {"type": "Concat", "attrs": AxisAttrs(eqn.params["dimension"])},
    "split": lambda eqn, *_: {"type": "Split", "attrs": AxisAttrs(eqn.params["axis"]),
                              "attributes": {"split": tuple(eqn.params["sizes"])}},
    "convert_element_type": lambda eqn, *_: {"type": "Cast", "attributes": {"to": str(eqn.outvars[0].aval.dtype)}},
    "clamp": _clamp,
    "select_n": _select,
    "gather": _gather,
    "slice": _slice,
    "pad": _pad,
}  # fmt: skip
