"""`FakeQuantize`: the layer at a site. It holds the encoding in variables, and rounds what passes to the grid."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
from keras import ops

from bitwright.grids import (
    NUMPY,
    UNSET,
    WIDE,
    Encoding,
    Grid,
    GridPolicy,
    Groups,
    PerChannel,
    PerTensor,
    encoding_kind,
    encoding_of_kind,
    followed,
    learned_scale,
    learned_zero,
    lsq_factor,
    min_max_grid,
    moving,
    present,
    ratio_to,
    run_time_rounded,
    two_level,
)
from bitwright_keras.graph.engine import switched, value_of
from bitwright_keras.graph.layouts import Layout
from bitwright_keras.simulate.rounding import NAMESPACE, round_to_float, round_to_grid, round_wide

COMPILED_FROM = 2**13
"""Values of a sample from which training compiles an activation's rounding: for fewer it takes longer than it saves."""
COMPILED_PARAMETER = 2**16
"""Values from which it compiles a parameter's."""


@keras.saving.register_keras_serializable(package="bitwright")
class FakeQuantize(keras.layers.Layer):  # type: ignore[misc]
    """Rounds a tensor to its site's grid, or passes it while bypassed.

    A parameter's grid follows its values at each step; with `learns`, the grid is trained: see
    `bitwright.grids._training_rules`.

    Args:
        encoding: of the site; its numbers go into variables, its kind is part of the configuration. None bypasses.
        layout: of the parameter, (native shape, order, canonical shape); None for activations.
        learns: the grid is trained.
        evened: its gradients are scaled as LSQ does (`gradients.lsq_factor`).
        follows: whether a parameter's grid may follow its values.
        grid_rate: learned grids move so many times as far as an optimizer moves their variables; see
            `training.set_grid_rate`.
    """

    def __init__(
        self,
        encoding: Encoding | Mapping[str, Any] | None = None,
        layout: Any = None,
        learns: bool = False,
        evened: bool = False,
        follows: bool = False,
        grid_rate: float = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self._on_start = encoding is not None
        self._form = _of_config(encoding) if isinstance(encoding, Mapping) else encoding or UNSET
        self._layout = None if layout is None else Layout(*(tuple(int(n) for n in part) for part in layout))
        self.learns, self.evened, self.follows, self.grid_rate = learns, evened, follows, grid_rate
        shape = self._form.scale.shape
        self.scale = self._number("scale", shape, 1.0)
        self.low = self._number("low", shape, 0.0)
        self.high = self._number("high", shape, 255.0)
        self.enabled = self.add_weight(
            shape=(), dtype="bool", initializer="zeros", trainable=False, name="enabled", autocast=False
        )
        self.log_scale = self.zero_shift = self.ratio = self.following = None
        if self.policy.learns:
            self.log_scale = self._number("log_scale", shape, 0.0, trainable=True)
        if self.policy.moves:
            self.zero_shift = self._number("zero_shift", shape, 0.0, trainable=True)
        if follows:
            self.ratio = self._number("ratio", shape, 1.0, dtype="float64")
            self.following = self.add_weight(
                shape=(), dtype="bool", initializer="zeros", trainable=False, name="following", autocast=False
            )
        self.built = True
        if isinstance(encoding, Encoding):
            self._assign(encoding)

    def _number(
        self, name: str, shape: tuple[int, ...], value: float, *, trainable: bool = False, dtype: str = "float32"
    ) -> Any:
        return self.add_weight(
            shape=shape, dtype=dtype, initializer=keras.initializers.Constant(value), trainable=trainable, name=name,
            autocast=False,
        )  # fmt: skip

    @property
    def policy(self) -> GridPolicy:
        """What training does with the grid."""
        return GridPolicy.of(self._form, parameter=self.follows, range_learning=self.learns)

    # -- the encoding

    def takes(self, encoding: Encoding | None) -> bool:
        """Whether an encoding can be set without building the layer anew: only numbers differ."""
        if encoding is None:
            return True
        old = self._form
        same = (old.granularity, old.float_format, old.scale.shape) == (
            encoding.granularity, encoding.float_format, encoding.scale.shape,
        )  # fmt: skip
        if not same or (old.grid.steps >= WIDE) != (encoding.grid.steps >= WIDE):
            return False
        if encoding.run_time is not None:  # all of it is in the ops
            return old.equals(encoding)
        if not (self.learns or self.follows):
            return True
        kind = (old.bits, old.signed, old.symmetric, old.strict, old.frozen)
        return kind == (encoding.bits, encoding.signed, encoding.symmetric, encoding.strict, encoding.frozen) and bool(
            np.array_equal(old.zero_point, encoding.zero_point) or not self.learns
        )

    def set(self, encoding: Encoding | None, parameter: Any = None) -> None:
        """Install an encoding that `takes` allows; None bypasses the site.

        Args:
            encoding: in canonical layout.
            parameter: the parameter's present values (a tensor, native layout), where the site is one.
        """
        if encoding is None:
            self.enabled.assign(False)
            return
        self._form = encoding
        self._assign(encoding)
        if self.following is not None and self.ratio is not None and parameter is not None:
            self.following.assign(not encoding.frozen)
            if not encoding.frozen:
                base = ops.convert_to_numpy(self._min_max(parameter)[0])
                self.ratio.assign(ratio_to(NUMPY, encoding.scale, base))

    def _assign(self, encoding: Encoding) -> None:
        grid = encoding.grid
        zero = encoding.zero_point.astype(np.float64)
        self.scale.assign(encoding.scale)
        self.low.assign((grid.qmin - zero).astype(np.float32))
        self.high.assign((grid.qmax - zero).astype(np.float32))
        for learned in (self.log_scale, self.zero_shift):
            if learned is not None:
                learned.assign(np.zeros(encoding.scale.shape, np.float32))
        self.enabled.assign(True)

    def get(self, parameter: Any = None) -> Encoding | None:
        """The encoding in force; None while bypassed. Learned and followed numbers are read off the device."""
        if not self.on:
            return None
        scale, low, _ = self.numbers(parameter)
        zero = self._form.grid.qmin - ops.convert_to_numpy(low).astype(np.float64)
        return present(self._form, ops.convert_to_numpy(scale).astype(np.float32), zero, self.learns)

    @property
    def on(self) -> bool:
        """Whether it rounds; otherwise values pass as they are."""
        return bool(ops.convert_to_numpy(value_of(self.enabled)))

    # -- rounding

    def numbers(self, parameter: Any = None) -> tuple[Any, Any, Any]:
        """Scale and the grid's ends as seen from its zero, in the encoding's shape; differentiable where learned."""
        scale, low, high = (value_of(v) for v in (self.scale, self.low, self.high))
        form, grid = self._form, self._form.grid
        if self.follows and parameter is not None:
            base, zero = self._min_max(parameter)
            stored = ops.cast(grid.qmin - low, "float64")
            moved, zero = followed(NAMESPACE, base, zero, value_of(self.ratio), stored, form)
            zero, following = ops.cast(zero, "float32"), value_of(self.following)
            scale = ops.where(following, moved, scale)
            low = ops.where(following, grid.qmin - zero, low)
            high = ops.where(following, grid.qmax - zero, high)
        if self.log_scale is not None:
            scale = learned_scale(NAMESPACE, scale, self._learned(self.log_scale), form)
        if self.zero_shift is not None:
            shift = self._learned(self.zero_shift)
            zero = learned_zero(NAMESPACE, grid.qmin - low, shift, float(grid.qmin), float(grid.qmax))
            low, high = grid.qmin - zero, grid.qmax - zero
        return scale, low, high

    def _min_max(self, parameter: Any) -> tuple[Any, Any]:
        """Scale and zero point (float64) of the grid that covers the parameter's present values."""
        cut, groups = self._cut(parameter)
        return min_max_grid(NAMESPACE, cut, self._form, groups)

    def _learned(self, variable: keras.Variable) -> Any:
        value = value_of(variable)
        # The gradient stays that of the grid's own logarithm: plain gradient descent isn't sped up twice.
        return value if self.grid_rate == 1 else value + ops.stop_gradient((self.grid_rate - 1) * value)

    def call(self, x: Any, training: bool | None = None) -> Any:
        """x on the grid, in x's type.

        Args:
            x: the site's values.
            training: whether gradients are wanted; only then is anything compiled.
        """
        on = switched(self.enabled)
        if on is not None:
            return self._round(x) if on else x
        compiled = bool(training) and self._large(x)
        return ops.cond(value_of(self.enabled), lambda: self._round(x, compiled), lambda: x)

    def _large(self, x: Any) -> bool:
        if self._layout is not None:
            return bool(math.prod(x.shape) >= COMPILED_PARAMETER)
        return bool(math.prod(n or 1 for n in x.shape[1:]) >= COMPILED_FROM)

    def _round(self, x: Any, compiled: bool = False) -> Any:
        dtype = keras.backend.standardize_dtype(x.dtype)
        value = x if dtype == "float32" else ops.cast(x, "float32")
        if self._form.run_time is not None:
            y = run_time_rounded(NAMESPACE, value, self._form.run_time, trained=True)
            return y if dtype == "float32" else ops.cast(y, dtype)
        scale, low, high = self.numbers(value if self._layout is not None else None)
        groups, cut = None, value
        if self._layout is None:
            s, low, high = (self._spread(v, len(x.shape)) for v in (scale, low, high))
        else:
            cut, groups = self._cut(value)
            s, low, high = (groups.broadcast(NAMESPACE, v) for v in (scale, low, high))
        form, learned = self._form, self.log_scale is not None
        factor = lsq_factor(self._elements(x), form.grid) if self.evened else 1.0
        if form.float_format is not None:
            y = round_to_float(cut, s, form.float_format, learned=learned, factor=factor)
        elif form.grid.steps >= WIDE:
            y = round_wide(cut, s, low, high)
        else:
            moves = self.zero_shift is not None
            y = round_to_grid(cut, s, low, high, learned=learned, moves=moves, factor=factor, compiled=compiled)
        if groups is not None:
            y = self._joined(y, groups)
        return y if dtype == "float32" else ops.cast(y, dtype)

    def _elements(self, x: Any) -> int:
        """How many elements share a scale; of an activation, in one sample."""
        if self._layout is not None:
            return Groups.of(self._layout.shape, self._form.granularity).elements
        sizes = [n or 1 for n in x.shape[1:]]
        if isinstance(self._form.granularity, PerChannel):
            del sizes[self._form.granularity.axis - 1]
        return int(np.prod(sizes))

    def _spread(self, values: Any, rank: int) -> Any:
        """Numbers of an activation, ready to broadcast."""
        layout = self._form.granularity
        if isinstance(layout, PerTensor):
            return values
        assert isinstance(layout, PerChannel)
        return ops.reshape(values, [-1 if i == layout.axis % rank else 1 for i in range(rank)])

    def _cut(self, x: Any) -> tuple[Any, Groups]:
        """A parameter with its blocks as an axis of their own; in its own layout where that will do."""
        layout, granularity = self._layout, self._form.granularity
        assert layout is not None
        if isinstance(granularity, PerTensor):
            return x, Groups.of(layout.native, granularity)
        if isinstance(granularity, PerChannel) and not layout.merges:
            return x, Groups.of(layout.native, PerChannel(layout.order[granularity.axis]))
        groups = Groups.of(layout.shape, granularity)
        return groups.cut(NAMESPACE, ops.reshape(ops.transpose(x, layout.order), layout.shape)), groups

    def _joined(self, y: Any, groups: Groups) -> Any:
        layout, granularity = self._layout, self._form.granularity
        assert layout is not None
        if isinstance(granularity, PerTensor) or (isinstance(granularity, PerChannel) and not layout.merges):
            return y
        split = tuple(layout.native[i] for i in layout.order)
        return ops.transpose(ops.reshape(groups.joined(NAMESPACE, y), split), tuple(np.argsort(layout.order)))

    # -- as a Keras layer

    def compute_mask(self, x: Any, previous_mask: Any = None) -> None:
        """None: captured models hand masks to the layers that read them as tensors of their own."""

    def compute_output_spec(self, x: Any) -> Any:
        """The input's shape and type."""
        return keras.KerasTensor(x.shape, dtype=x.dtype)

    def get_config(self) -> dict[str, Any]:
        """The kind of grid, without numbers: these are weights."""
        layout = self._layout
        return {
            **super().get_config(),
            "encoding": _config_of(self._form) if self._on_start else None,
            "layout": None if layout is None else [list(layout.native), list(layout.order), list(layout.shape)],
            "learns": self.learns,
            "evened": self.evened,
            "follows": self.follows,
            "grid_rate": self.grid_rate,
        }

    def load_own_variables(self, store: Any) -> None:
        """Numbers, and with them the kind's zero points."""
        super().load_own_variables(store)
        zero = self._form.grid.qmin - ops.convert_to_numpy(value_of(self.low)).astype(np.float64)
        scale = ops.convert_to_numpy(value_of(self.scale))
        if np.isfinite(scale).all() and (scale > 0).all():
            self._form = two_level(
                self._form.with_(scale=scale, zero_point=np.rint(zero).astype(np.int32), block_scale=None)
            )


def _config_of(encoding: Encoding) -> dict[str, Any]:
    return {
        "kind": encoding_kind(encoding),
        "shape": list(encoding.scale.shape),
        "moves": bool(moving(encoding).any()),
    }


def _of_config(config: Mapping[str, Any]) -> Encoding:
    shape = tuple(config["shape"])
    kind = config["kind"]
    grid = Grid.of(kind["bits"], signed=kind["signed"], strict=kind["strict"])
    zero = grid.qmin + 1 if config["moves"] else grid.qmin  # the numbers themselves are loaded as weights
    if kind["symmetric"]:
        zero = 0
    return two_level(encoding_of_kind(kind, np.ones(shape, np.float32), np.full(shape, zero, np.int32)))
