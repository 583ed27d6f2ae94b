"""From a quantized model in bitwright's terms to a program of the NPU."""

from __future__ import annotations

from typing import Any

import numpy as np

from bitwright.backend import ToCompile
from bitwright.errors import ModelError
from bitwright.graph import ActivationAttrs, ConvAttrs, Op, OpKind, ParamRole, PoolAttrs
from bitwright.grids import Encoding
from bitwright_acme_npu.program import Grid, Instruction, Program

FRACTION = 31
"""Bits behind the point of a multiplier's mantissa."""


def compile_model(model: ToCompile) -> Program:
    """The program of a model.

    Raises:
        ModelError: the NPU has no instruction for an op, or a tensor isn't on a grid that it has; names it.
    """
    return _Compiler(model).program()


class _Compiler:
    def __init__(self, model: ToCompile) -> None:
        self.graph, self.params, self.encodings = model.graph, model.params, model.encodings
        self.made = Program(list(model.graph.inputs), list(model.graph.outputs))
        self.fused: set[str] = set()

    def program(self) -> Program:
        for tensor in self.graph.inputs:
            self.grid(tensor)
        for op in self.graph:
            if op.id not in self.fused:
                self.compile(op)
        return self.made

    def grid(self, tensor: str) -> Grid:
        """The grid of a tensor, remembered for the program."""
        if tensor not in self.made.grids:
            encoding = self.encodings.get(tensor)
            if (
                encoding is None
                or encoding.float_format
                or encoding.scale.ndim
                or encoding.bits != 8
                or encoding.signed
            ):
                raise ModelError(f"the Acme NPU has uint8 tensors only; {tensor!r} isn't on such a grid")
            self.made.grids[tensor] = Grid(float(encoding.scale), int(encoding.zero_point))
        return self.made.grids[tensor]

    def compile(self, op: Op) -> None:
        match op.kind:
            case OpKind.CONV | OpKind.LINEAR if op.weight is not None:
                self.linear(op)
            case OpKind.ADD if len(op.data_inputs) == 2:
                tensor, bounds = self.with_activation(op)
                factors = [multiplier(self.grid(t).scale / self.grid(tensor).scale) for t in op.data_inputs]
                self.emit("add", op.data_inputs, tensor, {"factors": [[int(m), int(s)] for m, s in factors], **bounds})
            case OpKind.RELU | OpKind.CLIPPED_RELU:
                factor = self.grid(op.data_inputs[0]).scale / self.grid(op.output).scale
                self.emit("rescale", op.data_inputs, op.output, {"factor": _pair(factor), **self.bounds(op, op.output)})
            case OpKind.AVERAGE_POOL if isinstance(op.attrs, PoolAttrs) and op.attrs.axes:
                factor = self.grid(op.data_inputs[0]).scale / self.grid(op.output).scale
                numbers = {"axes": list(op.attrs.axes), "keepdims": op.attrs.keepdims, "scale": factor}
                self.emit("average", op.data_inputs, op.output, numbers)
            case OpKind.RESHAPE | OpKind.IDENTITY if self.grid(op.data_inputs[0]) == self.grid(op.output):
                self.emit("reshape", op.data_inputs, op.output, {"shape": self.shape(op.output)})
            case _:
                raise ModelError(f"the Acme NPU has no instruction for {op.id!r} ({op.type})")

    def linear(self, op: Op) -> None:
        """A convolution or matrix product, with the activation that follows it."""
        (source,), weight = op.data_inputs, op.weight
        encoding = self.encodings.get(weight)
        if encoding is None or encoding.float_format or encoding.bits > 8 or encoding.zero_point.any():
            raise ModelError(f"the Acme NPU has int8 weights with zero point 0; {weight!r} isn't on such a grid")
        if op.kind is OpKind.CONV and self.graph.tensors[source].channel_axis not in (None, 1):
            raise ModelError(f"the Acme NPU has channels on axis 1; {source!r} hasn't")
        tensor, bounds = self.with_activation(op)
        codes = encoding.quantize(np.asarray(self.params[weight]))
        scales = np.broadcast_to(np.asarray(_per_channel(encoding, weight), np.float64), (len(codes),))
        of_products = scales * self.grid(source).scale
        bias = np.zeros(len(codes), np.int64)
        if (name := op.params.get(ParamRole.BIAS)) is not None:
            bias = np.rint(np.asarray(self.params[name], np.float64) / of_products).astype(np.int64)
        factors = np.array([multiplier(f) for f in of_products / self.grid(tensor).scale], np.int64)
        arrays = {"weight": codes.astype(np.int8), "bias": np.clip(bias, -(2**31), 2**31 - 1), "factors": factors}
        numbers: dict[str, Any] = {}
        if isinstance(attrs := op.attrs, ConvAttrs):
            numbers = {"strides": attrs.strides, "dilations": attrs.dilations, "pads": attrs.pads,
                       "groups": attrs.groups}  # fmt: skip
        self.emit("conv" if op.kind is OpKind.CONV else "linear", op.data_inputs, tensor, {**numbers, **bounds}, arrays)

    def with_activation(self, op: Op) -> tuple[str, dict[str, int]]:
        """The tensor that an op writes, and its bounds: after the activation, where the target fuses it."""
        follower = self.graph.sole_consumer(op.output)
        if (
            op.output not in self.encodings
            and follower is not None
            and follower.kind in (OpKind.RELU, OpKind.CLIPPED_RELU)
        ):
            self.fused.add(follower.id)
            return follower.output, self.bounds(follower, follower.output)
        self.grid(op.output)
        return op.output, {"low": 0, "high": 255}

    def bounds(self, op: Op, tensor: str) -> dict[str, int]:
        """The codes that an activation lets pass."""
        grid = self.grid(tensor)
        low, high = 0.0, None
        if isinstance(op.attrs, ActivationAttrs):
            low = 0.0 if op.attrs.minimum is None else op.attrs.minimum
            high = op.attrs.maximum
        codes = [np.rint(low / grid.scale) + grid.zero, 255 if high is None else np.rint(high / grid.scale) + grid.zero]
        return {"low": int(np.clip(codes[0], 0, 255)), "high": int(np.clip(codes[1], 0, 255))}

    def shape(self, tensor: str) -> list[int]:
        """The shape of a sample."""
        shape = self.graph.tensors[tensor].shape or (None, None)
        sizes = [n for n in shape[1:] if n is not None]
        if len(sizes) < len(shape) - 1:
            raise ModelError(f"the Acme NPU needs fixed shapes; that of {tensor!r} isn't known")
        return sizes

    def emit(
        self, name: str, reads: Any, writes: str, numbers: dict[str, Any], arrays: dict[str, np.ndarray] | None = None
    ) -> None:
        self.grid(writes)
        own = {key: f"{len(self.made.instructions)}.{key}" for key in arrays or {}}
        self.made.arrays |= {own[key]: value for key, value in (arrays or {}).items()}
        self.made.instructions.append(Instruction(name, list(reads), writes, numbers, own))


def _per_channel(encoding: Encoding, weight: str) -> np.ndarray:
    if encoding.scale.ndim > 1:
        raise ModelError(f"the Acme NPU has one scale a channel; {weight!r} has blocks")
    return encoding.scale


def multiplier(factor: float) -> tuple[int, int]:
    """A factor as mantissa · 2^−shift, the mantissa in [2^30, 2^31)."""
    fraction, exponent = np.frexp(factor)
    mantissa = int(np.floor(fraction * 2**FRACTION + 0.5))
    if mantissa == 2**FRACTION:
        mantissa, exponent = mantissa // 2, exponent + 1
    return mantissa, FRACTION - int(exponent)


def _pair(factor: float) -> list[int]:
    return list(multiplier(factor))
