"""Putting our grids into a converted TFLite file: scales, zero points, weights and biases, bit for bit.

The converter takes ranges as (minimum, maximum) and computes scales from them in its own way, and weights' scales from
the weights; both come out a few units in the last place beside ours, or further where a technique chose other scales.
So the file that it makes decides which operators there are, and this module what stands in their tensors.

int8 tensors have one scale and zero point, weights one a channel with zero point 0 and codes −127..127, biases int32
with scale s_input · s_weight (tensorflow.org, "LiteRT 8-bit quantization specification").
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from bitwright.errors import EncodingError
from bitwright.grids import Encoding, PerTensor
from bitwright_keras.export.tflite_file import INT8, INT32, TensorGrid, TfliteFile
from bitwright_keras.export.tflite_floats import in_float, requantized

TOLERANCE = 1e-5
"""Relative difference up to which a scale of the converter is taken for one of ours."""
LINEAR: Mapping[str, tuple[int, int, int]] = {
    # operator: which of its inputs are data, weight and bias
    "CONV_2D": (0, 1, 2), "DEPTHWISE_CONV_2D": (0, 1, 2), "FULLY_CONNECTED": (0, 1, 2), "CONV_3D": (0, 1, 2),
    "TRANSPOSE_CONV": (2, 1, 3),
}  # fmt: skip


@dataclass(frozen=True)
class Parameter:
    """A quantized parameter.

    Attributes:
        id: of the site.
        values: float, canonical layout.
        encoding: its grid; None for the weight of a linear op that stays in float.
        bias: float values of the bias of the op whose weight it is.
        transposed: the weight of a transposed convolution, (in, out, *kernel).
        codes: integers of the values, where they aren't `encoding.quantize(values)` to the last midpoint.
    """

    id: str
    values: NDArray[np.float32]
    encoding: Encoding | None
    bias: NDArray[np.float32] | None = None
    transposed: bool = False
    codes: NDArray[np.int32] | None = None


@dataclass
class Placed:
    """What became of the grids.

    Attributes:
        sites: site → index of the tensor that has its grid.
        foreign: int8 tensors whose grid is none of ours: fixed by the operator, or left to the converter.
        floats: integer tensors whose operators have to be in float → the parameter, and its values in their layout.
    """

    sites: dict[str, int] = field(default_factory=dict)
    foreign: list[str] = field(default_factory=list)
    floats: dict[int, tuple[Parameter, NDArray[np.float32]]] = field(default_factory=dict)


def activation_grid(site: str, encoding: Encoding) -> tuple[np.float32, int]:
    """Scale and zero point of an activation in int8; uint8 is the same grid with all codes moved by 128.

    Raises:
        EncodingError: TFLite's int8 kernels have no such grid.
    """
    if encoding.float_format is not None or encoding.bits != 8:
        kind = encoding.float_format or f"{encoding.bits} bits"
        raise EncodingError(
            f"activation {site!r} has {kind}, and int8 TFLite kernels take 8; use activations='int8' or 'uint8', "
            "or leave the tensor in float"
        )
    if not isinstance(encoding.granularity, PerTensor):
        raise EncodingError(f"activation {site!r} has several scales; int8 TFLite kernels take one")
    if encoding.grid.steps != 255:
        raise EncodingError(f"activation {site!r} drops the lowest code; TFLite's activations use all 256")
    return np.float32(encoding.scale), int(encoding.zero_point) - (0 if encoding.signed else 128)


def weight_grid(parameter: Parameter) -> tuple[NDArray[np.float32], NDArray[np.int32], NDArray[np.int32]]:
    """Scales, zero points and integer codes (canonical layout) of a weight, moved to int8.

    Raises:
        EncodingError: TFLite has no such weights.
    """
    site, encoding = parameter.id, parameter.encoding
    assert encoding is not None
    if encoding.float_format is not None or encoding.bits > 8 or encoding.scale.ndim > 1:
        raise EncodingError(
            f"parameter {site!r}: int8 TFLite kernels take integer weights of up to 8 bits, with one scale or one for "
            "each channel"
        )
    shift = 0 if encoding.signed else 128
    codes = encoding.quantize(parameter.values) if parameter.codes is None else parameter.codes
    return encoding.scale, encoding.zero_point - shift, codes - shift


def place(
    file: TfliteFile,
    activations: Mapping[str, tuple[str, Encoding]],
    parameters: Sequence[Parameter],
) -> Placed:
    """Replace the converter's grids by ours, in place.

    Args:
        file: converted with our ranges.
        activations: site → (name of its TensorFlow op, encoding), in the graph's order.
        parameters: quantized parameters with their values.

    Raises:
        EncodingError: an encoding that TFLite has no grid for.
    """
    placed = Placed()
    _activations(file, activations, placed)
    weights = _weights(file, parameters, placed)
    for kind, operator in list(file.operators()):
        weight = int(operator.inputs[LINEAR[kind][1]]) if kind in LINEAR else -1
        if weight in placed.floats:
            parameter, values = placed.floats[weight]
            in_float(file, operator, LINEAR[kind], values, parameter.bias)
    _biases(file, weights)
    requantized(file)
    return placed


def _activations(file: TfliteFile, activations: Mapping[str, tuple[str, Encoding]], placed: Placed) -> None:
    wanted = {site: activation_grid(site, encoding) for site, (_, encoding) in activations.items()}
    names = {i: _parts(file.name(i)) for i in range(len(file.tensors))}
    claimed: dict[int, list[str]] = {}
    for index, tensor in enumerate(file.tensors):
        grid = file.grid(index)
        if grid is None or tensor.type != INT8 or file.constant(index) is not None:
            continue
        near = [s for s, (scale, zero) in wanted.items() if _is(grid, scale, zero)]
        if not near:
            placed.foreign.append(file.name(index))
            continue
        named = [s for s in near if _mentions(names[index], activations[s][0])]
        # Tensors that share a grid share its very numbers, so that any of the near ones gives the right bits.
        best = min(named or near, key=lambda s: abs(float(wanted[s][0]) - float(grid.scale[0])))
        file.set_grid(index, np.asarray(wanted[best][0]), np.asarray(wanted[best][1]))
        # A kernel that took several ops in mentions all of them; its output is that of the last.
        named = [s for s in named if activations[s][0] == activations[named[-1]][0]]
        claimed[index] = named or (near if len({wanted[s] for s in near}) == 1 else [])
    for site in activations:
        exact = [i for i, sites in claimed.items() if site in sites and _mentions(names[i], activations[site][0])]
        if exact:
            placed.sites[site] = exact[0]
        elif len(alone := [i for i, sites in claimed.items() if sites == [site]]) == 1:
            placed.sites[site] = alone[0]


def _is(grid: TensorGrid, scale: np.float32, zero: int) -> bool:
    return (
        len(grid.scale) == 1
        and int(grid.zero_point[0]) == zero
        and abs(float(grid.scale[0]) - float(scale)) <= TOLERANCE * float(scale)
    )


def _parts(name: str) -> list[str]:
    """Names of the TensorFlow ops that a tensor was fused from."""
    return name.split(";")


def _mentions(parts: Sequence[str], op: str) -> bool:
    """Whether an op is among them; the converter numbers what would have the same name."""
    last = parts[-1]
    return op in parts or (last.startswith(op) and last[len(op) :].isdigit())


def _weights(file: TfliteFile, parameters: Sequence[Parameter], placed: Placed) -> dict[int, Parameter]:
    """Integer constants that hold one of the parameters get its scales and codes."""
    found: dict[int, Parameter] = {}
    for index, tensor in enumerate(file.tensors):
        grid, codes = file.grid(index), file.constant(index)
        if grid is None or codes is None or tensor.type != INT8:
            continue
        real = _real(codes, grid)
        for parameter in parameters:
            order = _layout(parameter, real, grid)
            if order is None:
                continue
            if parameter.encoding is None:
                placed.floats[index] = parameter, parameter.values.reshape(order.shape).transpose(order.axes)
                break
            scale, zero, ours = weight_grid(parameter)
            channels = len(grid.scale) if len(grid.scale) > 1 else scale.size
            if len(grid.scale) == 1 and scale.size > 1:
                raise EncodingError(
                    f"parameter {parameter.id!r}: the TFLite operator takes one scale, and it has {scale.size}; "
                    "quantize it per tensor"
                )
            shape = (channels,)
            moved = ours.reshape(order.shape).transpose(order.axes).reshape(codes.shape)
            if moved.min(initial=0) < -127 and _is_weight(file, index):
                raise EncodingError(
                    f"parameter {parameter.id!r} uses the code −128, which TFLite's kernels don't allow in weights; "
                    "use target tflite-int8, or one with strict_symmetric"
                )
            file.set_grid(index, np.broadcast_to(scale, shape), np.broadcast_to(zero, shape))
            file.set_constant(index, moved)
            found[index] = parameter
            placed.sites[parameter.id] = index
            break
        else:
            placed.foreign.append(file.name(index))
    return found


def _is_weight(file: TfliteFile, index: int) -> bool:
    return any(kind in LINEAR and operator.inputs[LINEAR[kind][1]] == index for kind, operator in file.operators())


def _real(codes: NDArray[np.integer], grid: TensorGrid) -> NDArray[np.float64]:
    shape = [-1 if i == grid.axis else 1 for i in range(codes.ndim)] if len(grid.scale) > 1 else [1] * codes.ndim
    scale, zero = (np.asarray(v, np.float64).reshape(shape) for v in (grid.scale, grid.zero_point))
    return (codes - zero) * scale


@dataclass(frozen=True)
class _Layout:
    """How canonical values become a tensor's: reshaped to `shape`, then transposed by `axes`."""

    shape: tuple[int, ...]
    axes: tuple[int, ...]


def _layouts(parameter: Parameter) -> Iterator[_Layout]:
    """Layouts that TFLite may hold a parameter in: (out, *kernel, in), depthwise (1, *kernel, out), or as it is."""
    shape = parameter.values.shape
    rank = len(shape)
    yield _Layout(shape, tuple(range(rank)))
    for spread in (shape, (*shape[:2], 1, *shape[2:])) if rank >= 3 else ():
        kernel = tuple(range(2, len(spread)))
        if parameter.transposed:
            yield _Layout(spread, (1, *kernel, 0))
            continue
        yield _Layout(spread, (0, *kernel, 1))
        yield _Layout(spread, (1, *kernel, 0))
    if rank == 2:
        yield _Layout(shape, (1, 0))


def _layout(parameter: Parameter, real: NDArray[np.float64], grid: TensorGrid) -> _Layout | None:
    """The layout in which a parameter is what a tensor holds, up to the converter's rounding."""
    if parameter.values.size != real.size:
        return None
    shape = [-1 if i == grid.axis else 1 for i in range(real.ndim)] if len(grid.scale) > 1 else [1] * real.ndim
    step = np.asarray(grid.scale, np.float64).reshape(shape)
    for layout in _layouts(parameter):
        values = parameter.values.reshape(layout.shape).transpose(layout.axes)
        if values.ndim != real.ndim and sorted(d for d in values.shape if d > 1) != [d for d in real.shape if d > 1]:
            continue
        same = [d for d in values.shape if d != 1] == [d for d in real.shape if d != 1]
        if same and (np.abs(values.reshape(real.shape) - real) <= 0.501 * step).all():
            return layout
    return None


def _biases(file: TfliteFile, weights: Mapping[int, Parameter]) -> None:
    """int32 biases on the grid of their accumulator."""
    for kind, operator in file.operators():
        places = LINEAR.get(kind)
        if places is None or len(operator.inputs) <= places[2]:
            continue
        x, w, b = (int(operator.inputs[p]) for p in places)
        source, weight = file.grid(x), file.grid(w)
        old = file.grid(b) if b >= 0 else None
        if source is None or weight is None or old is None or file.tensors[b].type != INT32:
            continue
        codes = file.constant(b)
        assert codes is not None
        scale = np.asarray(source.scale[0] * weight.scale, np.float32)
        real = codes.astype(np.float64) * old.scale.astype(np.float64)
        parameter = weights.get(w)
        known = None if parameter is None else parameter.bias
        if known is not None and known.shape == real.shape and (np.abs(known - real) <= old.scale).all():
            real = known.astype(np.float64)
        ours = np.rint(real / np.maximum(scale.astype(np.float64), np.finfo(np.float64).tiny))
        if (np.abs(ours) > np.iinfo(np.int32).max).any():
            raise EncodingError(
                f"the bias behind {'a weight' if parameter is None else repr(parameter.id)} is too large for its int32 "
                "accumulator: a batch norm makes its weights negligible; fold batch norms first (fold_batch_norm)"
            )
        file.set_grid(b, np.broadcast_to(scale, old.scale.shape), np.zeros(old.scale.shape, np.int64))
        file.set_constant(b, ours)
