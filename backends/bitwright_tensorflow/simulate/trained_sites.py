"""The grid of one site in training: variables for its numbers, and what the graph computes from them.

In regular quantization-aware training activations keep their grids; a parameter's grid follows its values: in every
step, it is what min-max calibration would make of them. A grid that was chosen otherwise keeps its ratio to the
min-max one; frozen grids don't follow.

In range learning, scale = `scale` · exp(`log_scale`) and zero point = `zero_point` + `zero_shift` · steps. Both start
at 0, so that the start is bit-equal and one learning rate suits grids of all sizes. Zero points at an end of the codes
(behind a ReLU) and symmetric grids keep theirs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import tensorflow as tf

from bitwright.backend import Training
from bitwright.errors import EncodingError
from bitwright.graph import Param, TensorId
from bitwright.grids import Blockwise, Encoding, Granularity, Groups, PerChannel, PerTensor
from bitwright.grids import two_level as two_level_encoding
from bitwright_tensorflow.graph.forms import Form, Reshaped, Transposed
from bitwright_tensorflow.graph.model import Array
from bitwright_tensorflow.simulate.fake_quant import NAMESPACE, Ends, Node, kind_of, trained
from bitwright_tensorflow.simulate.instrument import Instrument
from bitwright_tensorflow.simulate.weight_ranges import min_max_numbers, one_sided, two_level

UNSCALED = ("float16", "bfloat16")
"""Float formats without a scale."""
_UNSET = Encoding(8, False, False, np.ones((), np.float32), np.zeros((), np.int32))


@dataclass(frozen=True)
class Operand:
    """A parameter where its op reads it.

    Attributes:
        symbol: its values in native layout.
        param: the canonical record.
        form: native → canonical.
    """

    symbol: Node
    param: Param
    form: Form

    def placed(self, granularity: Granularity) -> tuple[Node, Granularity, Callable[[Node], Node]]:
        """Values that the granularity can be spread over, the granularity in their layout, and the way back."""
        layout = self.form.layout
        if isinstance(granularity, PerTensor) or layout == tuple(range(len(self.param.shape))):
            return self.symbol, granularity, lambda y: y
        if layout is not None:
            axis = layout[granularity.axis]
            if isinstance(granularity, Blockwise):
                native: Granularity = replace(granularity, axis=axis, block_axis=layout[granularity.block_axis])
            else:
                native = PerChannel(axis)
            return self.symbol, native, lambda y: y
        return stepped(self.symbol, self.form), granularity, lambda y: stepped_back(y, self.form)


def stepped(x: Node, form: Form) -> Node:
    """Native values in canonical layout, as graph ops."""
    for step in form.steps:
        x = tf.transpose(x, step.order) if isinstance(step, Transposed) else tf.reshape(x, step.shape)
    return x


def stepped_back(x: Node, form: Form) -> Node:
    """Canonical values in native layout, as graph ops."""
    for step, before in zip(reversed(form.steps), reversed(form.shapes[:-1]), strict=True):
        if isinstance(step, Reshaped):
            x = tf.reshape(x, before)
        else:
            x = tf.transpose(x, [int(i) for i in np.argsort(step.order)])
    return x


@dataclass(eq=False)
class TrainedSite:
    """One root site of a trainable simulation.

    Args:
        prefix: name scope of its variables and nodes.
        encoding: what it starts with; None builds a bypassed 8-bit grid.
        training: how grids are trained.
        operand: where the site is a parameter.

    Attributes:
        learned, moves, follows: whether scale and zero point are trained, and whether the grid follows a parameter.
    """

    prefix: str
    encoding: Encoding | None
    training: Training
    operand: Operand | None = None
    learned: bool = field(init=False)
    moves: bool = field(init=False)
    follows: bool = field(init=False)
    _form: Encoding = field(init=False)
    _ends: Ends = field(init=False)
    _on: Node = field(init=False)
    _now: tuple[TensorId, TensorId] = field(init=False)
    _base: TensorId | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        form = self.encoding or _UNSET
        fixed = form.frozen or form.float_format in UNSCALED or self.encoding is None
        grid = form.grid
        inside = (form.zero_point > grid.qmin) & (form.zero_point < grid.qmax)
        self.learned = self.training.range_learning and not fixed
        self.moves = self.learned and not form.symmetric and form.float_format is None and bool(inside.any())
        self.follows = self.operand is not None and not self.training.range_learning and not fixed
        self._form = form

    # -- building

    def build(self, ins: Instrument) -> None:
        """Make the variables, and the nodes that compute the numbers in force."""
        form, kind = self._form, kind_of(self._form)
        wide = tf.float64 if kind == "wide" else tf.float32
        shape = form.scale.shape

        def variable(name: str, dtype: Any, shape: Sequence[int], trainable: bool = False) -> Node:
            return ins.variable(f"{self.prefix}/{name}", dtype, shape, trainable=trainable)

        self._on = variable("on", tf.bool, ())
        scale, zero = variable("scale", tf.float32, shape), variable("zero_point", wide, shape)
        qmin, qmax = variable("qmin", wide, ()), variable("qmax", wide, ())
        log_scale = variable("log_scale", tf.float32, shape, True) if self.learned else None
        shift = variable("zero_shift", tf.float32, shape, True) if self.moves else None
        ratio = variable("ratio", tf.float64, shape) if self.follows else None
        stop = tf.stop_gradient
        with ins.scratch.as_default(), tf.name_scope(f"{self.prefix}/"):
            if ratio is not None:
                scale, zero = self._followed(ratio, zero)
            if log_scale is not None:
                scale = scale * tf.exp(log_scale)
                if isinstance(form.granularity, Blockwise) and form.granularity.decompressed_bits is not None:
                    scale = stop(two_level(scale, form)) + (scale - stop(scale))
            if shift is not None:
                moved = zero + shift * tf.cast(qmax - qmin, tf.float32)
                snapped = NAMESPACE.clip(tf.round(moved), qmin, qmax)
                inside = tf.logical_and(zero > qmin, zero < qmax)
                zero = tf.where(inside, stop(snapped) + (moved - stop(moved)), zero)
            scale = tf.identity(scale, name="scale_now")
            zero = tf.identity(zero, name="zero_point_now")
            self._now = (scale.name, zero.name)
            self._ends = Ends(kind, tf.cast(scale, wide), zero, qmin, qmax, self.learned, self.moves)

    def _followed(self, ratio: Node, stored: Node) -> tuple[Node, Node]:
        assert self.operand is not None
        form, stop = self._form, tf.stop_gradient
        values, granularity, _ = self.operand.placed(form.granularity)
        values = stop(tf.cast(values, tf.float32))
        scale, zero = min_max_numbers(values, form, Groups.of(tuple(values.shape.as_list()), granularity))
        base = tf.identity(two_level(scale, form), name="min_max_scale")
        self._base = base.name
        scale = two_level(tf.cast(tf.cast(base, tf.float64) * ratio, tf.float32), form)
        zero = tf.where(tf.equal(ratio, 1.0), tf.cast(zero, stored.dtype), stored)
        return stop(scale), stop(zero)

    def apply(self, ins: Instrument, x: Node | Operand, scope: str) -> Node:
        """x on the grid; x is an activation or the parameter.

        Raises:
            EncodingError: the granularity doesn't fit the tensor.
        """
        with ins.scratch.as_default(), tf.name_scope(f"{scope}/"):
            if isinstance(x, Operand):
                values, granularity, back = x.placed(self._form.granularity)
            else:
                values, granularity, back = x, self._form.granularity, lambda y: y
            groups = _groups(values, granularity, scope)
            factor: Node | float = 1.0
            if self.training.gradient_scale and self.learned:
                factor = self._factor(values)
            return back(trained(values, self._ends, groups, self._on, factor=factor, name="value"))

    def _factor(self, x: Node) -> Node:
        """`gradients.lsq_factor`, of a tensor whose size isn't known before it runs."""
        elements = tf.cast(tf.size(x), tf.float32) / float(math.prod(self._form.scale.shape))
        qmax = tf.cast(self._ends.qmax, tf.float32)
        return tf.cast(tf.math.rsqrt(tf.maximum(elements, 1.0) * qmax), self._ends.scale.dtype)

    # -- encodings

    def takes(self, encoding: Encoding | None) -> bool:
        """Whether an encoding can be installed without another graph."""
        if encoding is None:
            return True
        if self.encoding is None:
            return False
        fresh = TrainedSite(self.prefix, encoding, self.training, self.operand)
        return self._structure == fresh._structure

    @property
    def _structure(self) -> tuple[object, ...]:
        form = self._form
        kind = (kind_of(form), form.granularity, form.scale.shape, self.learned, self.moves, self.follows)
        return (*kind, form.symmetric, one_sided(form), form.bits, form.signed, form.strict) if self.follows else kind

    @property
    def trained(self) -> tuple[str, ...]:
        """Names of the variables that are trained."""
        names = [name for name, there in (("log_scale", self.learned), ("zero_shift", self.moves)) if there]
        return tuple(f"{self.prefix}/{name}" for name in names)

    def install(self, encoding: Encoding | None) -> dict[str, Array]:
        """Values of the variables for an encoding that it `takes`; `ratio` comes later (`ratios`)."""
        if encoding is None:
            values: dict[str, Array] = {"on": np.asarray(False)}
            if self.encoding is None:
                values |= self._numbers(_UNSET)
        else:
            self.encoding = self._form = encoding
            values = {"on": np.asarray(True), **self._numbers(encoding)}
        return {f"{self.prefix}/{name}": value for name, value in values.items()}

    def _numbers(self, encoding: Encoding) -> dict[str, Array]:
        wide = np.float64 if kind_of(encoding) == "wide" else np.float32
        grid, shape = encoding.grid, encoding.scale.shape
        found: dict[str, Array] = {
            "scale": encoding.scale,
            "zero_point": encoding.zero_point.astype(wide),
            "qmin": np.asarray(grid.qmin, wide),
            "qmax": np.asarray(grid.qmax, wide),
        }
        if self.learned:
            found["log_scale"] = np.zeros(shape, np.float32)
        if self.moves:
            found["zero_shift"] = np.zeros(shape, np.float32)
        if self.follows:
            found["ratio"] = np.ones(shape, np.float64)
        return found

    @property
    def base(self) -> TensorId | None:
        """The tensor of the min-max scale of a parameter's present values."""
        return self._base if self.follows else None

    def ratios(self, base: Array) -> dict[str, Array]:
        """`ratio` for the present encoding, from the value of `base`."""
        ratio = self._form.scale.astype(np.float64) / base.astype(np.float64)
        return {f"{self.prefix}/ratio": ratio}

    @property
    def now(self) -> tuple[TensorId, TensorId]:
        """Tensors of the scale and zero point in force."""
        return self._now

    def present(self, on: bool, scale: Array, zero: Array) -> Encoding | None:
        """The encoding for the values of `now`."""
        if not on:
            return None
        form = self._form
        codes = np.rint(zero).astype(np.int32)
        if np.array_equal(scale, form.scale) and np.array_equal(codes, form.zero_point):
            return form
        found = form.with_(scale=scale, zero_point=codes, block_scale=None)
        if self.learned:
            found = found.with_(source="range learning", frozen=True)
        return two_level_encoding(found)


def _groups(x: Node, granularity: Granularity, name: str) -> Groups:
    if isinstance(granularity, PerTensor):
        return Groups.of((), granularity)
    if x.shape.rank is None:
        raise EncodingError(f"{name!r} has no known rank, so only one scale for the whole tensor can be trained")
    # Reshaping leaves one free length open.
    shape = tuple(-1 if n is None else n for n in x.shape.as_list())
    if isinstance(granularity, Blockwise) and shape.count(-1) > 1:
        raise EncodingError(f"{name!r} has several free dimensions; a blockwise grid can't be trained on it")
    return Groups.of(shape, granularity)
