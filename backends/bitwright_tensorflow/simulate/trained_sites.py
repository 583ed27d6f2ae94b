"""The grid of one site in training: variables for its numbers, and what the graph computes from them.

Which grids follow parameters and which are learned is the core's policy, `bitwright.grids._training_rules`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import tensorflow as tf

from bitwright.backend import Training
from bitwright.errors import EncodingError
from bitwright.graph import Param, TensorId
from bitwright.grids import (
    NUMPY,
    UNSET,
    Blockwise,
    Encoding,
    Granularity,
    GridPolicy,
    Groups,
    PerTensor,
    fixed_layout,
    followed,
    learned_scale,
    learned_zero,
    min_max_grid,
    one_sided,
    present,
    ratio_to,
    run_time_rounded,
    stored_granularity,
)
from bitwright_tensorflow.graph.layouts import Layout, Reshaped, Transposed
from bitwright_tensorflow.graph.model import Array
from bitwright_tensorflow.simulate.fake_quant import (
    NAMESPACE,
    Ends,
    Node,
    chosen,
    compiles,
    in_one_pass,
    kind_of,
    trained,
)
from bitwright_tensorflow.simulate.instrument import Instrument


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
    form: Layout

    def placed(self, granularity: Granularity) -> tuple[Node, Granularity, Callable[[Node], Node]]:
        """Values that the granularity can be spread over, the granularity in their layout, and the way back."""
        layout, granularity = self.form.layout, fixed_layout(granularity)
        if isinstance(granularity, PerTensor) or layout == tuple(range(len(self.param.shape))):
            return self.symbol, granularity, lambda y: y
        if layout is not None:
            return self.symbol, stored_granularity(granularity, layout), lambda y: y
        return stepped(self.symbol, self.form), granularity, lambda y: stepped_back(y, self.form)


def stepped(x: Node, form: Layout) -> Node:
    """Native values in canonical layout, as graph ops."""
    for step in form.steps:
        x = tf.transpose(x, step.order) if isinstance(step, Transposed) else tf.reshape(x, step.shape)
    return x


def stepped_back(x: Node, form: Layout) -> Node:
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
        derived: the site's encoding follows from others.

    Attributes:
        policy: what training does with the grid.
    """

    prefix: str
    encoding: Encoding | None
    training: Training
    operand: Operand | None = None
    derived: bool = False
    policy: GridPolicy = field(init=False)
    _form: Encoding = field(init=False)
    _ends: Ends = field(init=False)
    _on: Node = field(init=False)
    _now: tuple[TensorId, TensorId] = field(init=False)
    _base: TensorId | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self._form = self.encoding or UNSET
        learning = self.training.range_learning
        self.policy = GridPolicy.of(
            self.encoding, parameter=self.operand is not None, range_learning=learning, derived=self.derived
        )

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
        log_scale = variable("log_scale", tf.float32, shape, True) if self.policy.learns else None
        shift = variable("zero_shift", tf.float32, shape, True) if self.policy.moves else None
        ratio = variable("ratio", tf.float64, shape) if self.policy.follows else None
        with ins.scratch.as_default(), tf.name_scope(f"{self.prefix}/"):
            if ratio is not None:
                scale, zero = self._followed(ratio, zero)
            if log_scale is not None:
                scale = learned_scale(NAMESPACE, scale, log_scale, form)
            if shift is not None:
                zero = learned_zero(NAMESPACE, zero, shift, qmin, qmax)
            scale = tf.identity(scale, name="scale_now")
            zero = tf.identity(zero, name="zero_point_now")
            self._now = (scale.name, zero.name)
            self._ends = Ends(kind, tf.cast(scale, wide), zero, qmin, qmax, self.policy.learns, self.policy.moves)

    def _followed(self, ratio: Node, stored: Node) -> tuple[Node, Node]:
        assert self.operand is not None
        values, granularity, _ = self.operand.placed(self._form.granularity)
        values = tf.stop_gradient(tf.cast(values, tf.float32))
        groups = Groups.of(tuple(values.shape.as_list()), granularity)
        scale, zero = min_max_grid(NAMESPACE, groups.cut(NAMESPACE, values), self._form, groups)
        base = tf.identity(scale, name="min_max_scale")
        self._base = base.name
        return followed(NAMESPACE, base, tf.cast(zero, stored.dtype), ratio, stored, self._form)

    def apply(self, ins: Instrument, x: Node | Operand, scope: str) -> Node:
        """x on the grid; x is an activation or the parameter.

        Raises:
            EncodingError: the granularity doesn't fit the tensor.
        """
        with ins.scratch.as_default(), tf.name_scope(f"{scope}/"):
            if self._form.run_time is not None and not isinstance(x, Operand):
                y = run_time_rounded(NAMESPACE, tf.cast(x, tf.float32), self._form.run_time, trained=True)
                return tf.identity(tf.cast(chosen(self._on, y, tf.cast(x, tf.float32)), x.dtype), name="value")
            if isinstance(x, Operand):
                values, granularity, back = x.placed(self._form.granularity)
            else:
                values, granularity, back = x, self._form.granularity, lambda y: y
            groups = _groups(values, granularity, scope)
            factor: Node | float = 1.0
            if self.training.gradient_scale and self.policy.learns:
                factor = self._factor(values)
            compiled = compiles(values, parameter=isinstance(x, Operand))
            with in_one_pass(compiled):
                y = trained(values, self._ends, groups, self._on, factor=factor, name="value", compiled=compiled)
            return back(y)

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
        fresh = TrainedSite(self.prefix, encoding, self.training, self.operand, self.derived)
        return self._structure == fresh._structure

    @property
    def _structure(self) -> tuple[object, ...]:
        form = self._form
        kind = (kind_of(form), form.granularity, form.scale.shape, self.policy)
        if not self.policy.follows:
            return kind
        return (*kind, form.symmetric, one_sided(form), form.bits, form.signed, form.strict)

    @property
    def trained(self) -> tuple[str, ...]:
        """Names of the variables that are trained."""
        names = [
            name for name, there in (("log_scale", self.policy.learns), ("zero_shift", self.policy.moves)) if there
        ]
        return tuple(f"{self.prefix}/{name}" for name in names)

    def install(self, encoding: Encoding | None) -> dict[str, Array]:
        """Values of the variables for an encoding that it `takes`; `ratio` comes later (`ratios`)."""
        if encoding is None:
            values: dict[str, Array] = {"on": np.asarray(False)}
            if self.encoding is None:
                values |= self._numbers(UNSET)
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
        if self.policy.learns:
            found["log_scale"] = np.zeros(shape, np.float32)
        if self.policy.moves:
            found["zero_shift"] = np.zeros(shape, np.float32)
        if self.policy.follows:
            found["ratio"] = np.ones(shape, np.float64)
        return found

    @property
    def base(self) -> TensorId | None:
        """The tensor of the min-max scale of a parameter's present values."""
        return self._base if self.policy.follows else None

    def ratios(self, base: Array) -> dict[str, Array]:
        """`ratio` for the present encoding, from the value of `base`."""
        return {f"{self.prefix}/ratio": ratio_to(NUMPY, self._form.scale, base)}

    @property
    def now(self) -> tuple[TensorId, TensorId]:
        """Tensors of the scale and zero point in force."""
        return self._now

    def present(self, on: bool, scale: Array, zero: Array) -> Encoding | None:
        """The encoding for the values of `now`."""
        return present(self._form, scale, zero, self.policy.learns) if on else None


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
