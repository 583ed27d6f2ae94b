"""The canonical graph: how every backend shows its model to the core, in one vocabulary and one layout.

Layouts of parameters: conv (out, in/groups, *kernel), transposed conv (in, out/groups, *kernel),
linear (out, in). Activations keep the model's own layout; `Tensor.channel_axis` says where channels lie. What a linear
op reads and computes has its features on the last axis, though the network's channels may lie on another (tokens).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitwright.errors import ModelError

OpId = str
TensorId = str
ParamId = str


class OpKind(StrEnum):
    """What an op does, as far as a technique may care. `OPAQUE` ops run in float and end every pattern."""

    CONV = "conv"
    CONV_TRANSPOSE = "conv_transpose"
    LINEAR = "linear"
    MATMUL = "matmul"  # of two activations
    EMBEDDING = "embedding"
    BATCH_NORM = "batch_norm"
    LAYER_NORM = "layer_norm"
    NORM = "norm"  # group, instance, RMS
    RELU = "relu"
    CLIPPED_RELU = "clipped_relu"  # clip(x, 0, maximum): ReLU6 and the like
    PRELU = "prelu"  # leaky ReLU too
    ACTIVATION = "activation"  # any other elementwise function of one input
    SOFTMAX = "softmax"
    ADD = "add"
    MUL = "mul"
    ELEMENTWISE = "elementwise"  # sub, div, max, min, pow, where, …
    CONCAT = "concat"
    SPLIT = "split"
    AVERAGE_POOL = "average_pool"  # global pooling and ReduceMean too
    MAX_POOL = "max_pool"
    RESIZE = "resize"
    RESHAPE = "reshape"  # reshape, flatten, squeeze, unsqueeze, expand
    TRANSPOSE = "transpose"
    SLICE = "slice"  # slice, gather with constant indices, split-like selection
    PAD = "pad"
    IDENTITY = "identity"  # dropout in eval mode too
    RECURRENT = "recurrent"
    OPAQUE = "opaque"


CONSTANT_KINDS = frozenset({OpKind.ADD, OpKind.MUL, OpKind.ELEMENTWISE, OpKind.CONCAT, OpKind.MATMUL})
"""Ops whose constant float operand is a parameter of role CONSTANT."""
FLOAT_DTYPES = frozenset({"float32", "float16", "bfloat16", "float64"})

LINEAR_KINDS = frozenset({OpKind.CONV, OpKind.CONV_TRANSPOSE, OpKind.LINEAR})
"""Ops that are a matrix product of input rows with one weight (see `linear_form`)."""


class ParamRole(StrEnum):
    """What a parameter is to its op."""

    WEIGHT = "weight"
    BIAS = "bias"
    GAMMA = "gamma"
    BETA = "beta"
    MEAN = "mean"
    VAR = "var"
    SLOPE = "slope"
    CONSTANT = "constant"  # a constant operand of an elementwise op
    RECURRENT = "recurrent"


@dataclass(frozen=True, slots=True)
class ConvAttrs:
    """Geometry of a convolution over `len(kernel)` spatial axes; pads are (begin, end) for each axis."""

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[tuple[int, int], ...]
    groups: int = 1
    output_padding: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class BatchNormAttrs:
    """Batch normalization in inference: y = γ·(x − μ)/√(var + epsilon) + β, channels on `axis`."""

    epsilon: float
    axis: int = 1


@dataclass(frozen=True, slots=True)
class ActivationAttrs:
    """Bounds of a clip (None: open); `alpha` of a leaky ReLU."""

    minimum: float | None = None
    maximum: float | None = None
    alpha: float | None = None


@dataclass(frozen=True, slots=True)
class PoolAttrs:
    """Average pooling: `axes` that are averaged away whole (global), or a window given like a convolution's."""

    axes: tuple[int, ...] = ()
    window: ConvAttrs | None = None
    count_include_pad: bool = False
    keepdims: bool = True


@dataclass(frozen=True, slots=True)
class AxisAttrs:
    """The axis of a concat, split or softmax."""

    axis: int


@dataclass(frozen=True, slots=True)
class RecurrentAttrs:
    """What each output of a recurrent op holds, in order: 0 all hidden states, 1 the last one, 2 the cell state
    (ONNX's Y, Y_h, Y_c; those that the model leaves out are missing)."""

    outputs: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ProductAttrs:
    """Of a product of two activations that isn't their matrix product as they stand: whether the last two axes of the
    first and of the second operand are exchanged before; None where other axes are contracted."""

    transposed: tuple[bool, bool] | None


Attrs = ConvAttrs | BatchNormAttrs | ActivationAttrs | PoolAttrs | AxisAttrs | RecurrentAttrs | ProductAttrs


@dataclass(frozen=True, eq=False, slots=True)
class Constant:
    """A literal operand, such as the indices of a gather; two of the same type and values are equal.

    Args:
        value: whatever makes an array; Python's floats become float32, its integers int64.
    """

    value: Any

    def __post_init__(self) -> None:
        array = np.asarray(self.value)
        if not array.size and not isinstance(self.value, np.ndarray):
            array = array.astype(np.int64)  # a list of no axes
        if array.dtype == np.float64 and not isinstance(self.value, np.ndarray | np.generic):
            array = array.astype(np.float32)
        object.__setattr__(self, "value", array)

    @property
    def array(self) -> NDArray[Any]:
        """The values."""
        return np.asarray(self.value)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Constant):
            return NotImplemented
        mine, theirs = self.array, other.array
        return mine.dtype == theirs.dtype and mine.shape == theirs.shape and mine.tobytes() == theirs.tobytes()

    def __hash__(self) -> int:
        return hash((self.array.dtype.str, self.array.shape))


AttributeValue = int | float | str | tuple[int, ...] | tuple[float, ...] | tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Call:
    """What else an op's computation needs, in ONNX's words (opset 20): with it, and with the parameters' values, a
    graph can be run or written as a file. `bitwright.graph.NEEDS` says what each type must have.

    Axes count in the tensor's own layout, whatever that is. What is absent has ONNX's default.

    Attributes:
        attributes: by the names that ONNX's operator gives them (`perm`, `axis`, `keepdims`, …).
        operands: those that are no activations, by position among ONNX's operands: a literal, or the role of the
            parameter that stands there. Roles may be left out where `operands` finds them by itself.
        type: ONNX's operator, where the op's own `type` is no name of one (as of most OPAQUE ops).
    """

    attributes: Mapping[str, AttributeValue] = field(default_factory=dict)
    operands: Mapping[int, Constant | ParamRole] = field(default_factory=dict)
    type: str = ""


@dataclass(frozen=True, slots=True)
class Param:
    """A parameter in canonical layout. `layout[i]` is the native axis that canonical axis i comes from; None where that
    is the canonical order, or no order of axes says it."""

    id: ParamId
    shape: tuple[int, ...]
    dtype: str = "float32"
    layout: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class Tensor:
    """An activation; unknown dimensions are None.

    Attributes:
        mask: it holds −∞ or what stands for it (see `masks`), which no grid has a place for.
    """

    id: TensorId
    shape: tuple[int | None, ...] | None = None
    dtype: str = "float32"
    channel_axis: int | None = None
    mask: bool = False

    @property
    def is_float(self) -> bool:
        """Only float tensors are ever quantized, masks never."""
        return not self.mask and self.dtype in FLOAT_DTYPES


@dataclass(frozen=True, slots=True)
class Op:
    """One operation.

    Attributes:
        id: the user's name for it, unique in the graph.
        kind: canonical kind.
        type: canonical ONNX operator name ("Conv", "Gemm", "Relu", …), which target configurations are keyed by.
        inputs: activations only, in operand order; parameters are in `params`. None for an absent optional one.
        outputs: activations.
        params: by role; a parameter used by two ops has one id.
        native: the framework's own name of the type, for messages.
        source: where the user wrote it, if known.
        call: what else its computation needs, where the backend says so; nothing that a technique has to look at.
    """

    id: OpId
    kind: OpKind
    type: str
    inputs: tuple[TensorId | None, ...]
    outputs: tuple[TensorId, ...]
    params: Mapping[ParamRole, ParamId] = field(default_factory=dict)
    attrs: Attrs | None = None
    native: str = ""
    source: str | None = None
    call: Call | None = None

    @property
    def output(self) -> TensorId:
        """The first output."""
        return self.outputs[0]

    @property
    def data_inputs(self) -> tuple[TensorId, ...]:
        """The inputs that are present."""
        return tuple(t for t in self.inputs if t is not None)

    @property
    def weight(self) -> ParamId | None:
        """The weight's id, if the op has one."""
        return self.params.get(ParamRole.WEIGHT)


class Graph:
    """An immutable dataflow graph in topological order.

    Args:
        ops: every op; sorted topologically here if they aren't.
        tensors: every activation that an op reads or writes.
        params: every parameter.
        inputs, outputs: the model's own, in the user's order.

    Raises:
        ModelError: two ops share an id, a tensor has two producers or none, or the ops form a cycle.
    """

    def __init__(
        self,
        ops: Sequence[Op],
        tensors: Mapping[TensorId, Tensor],
        params: Mapping[ParamId, Param],
        inputs: Sequence[TensorId],
        outputs: Sequence[TensorId],
    ) -> None:
        self.tensors = dict(tensors)
        self.params = dict(params)
        self.inputs = tuple(inputs)
        self.outputs = tuple(outputs)
        self._producer: dict[TensorId, Op] = {}
        self._consumers: dict[TensorId, list[Op]] = {}
        self._users: dict[ParamId, list[Op]] = {}
        self._ops: dict[OpId, Op] = {}
        for op in ops:
            if op.id in self._ops:
                raise ModelError(f"two ops are called {op.id!r}; names must be unique")
            self._ops[op.id] = op
            for t in op.outputs:
                if t in self._producer or t in self.inputs:
                    raise ModelError(f"tensor {t!r} is produced twice (again by {op.id!r})")
                self._producer[t] = op
            for t in dict.fromkeys(op.data_inputs):
                self._consumers.setdefault(t, []).append(op)
            for p in dict.fromkeys(op.params.values()):
                self._users.setdefault(p, []).append(op)
        self.ops: tuple[Op, ...] = self._sorted()

    def _sorted(self) -> tuple[Op, ...]:
        waiting = {op.id: len({t for t in op.data_inputs if t in self._producer}) for op in self._ops.values()}
        for op in self._ops.values():
            for t in op.data_inputs:
                if t not in self._producer and t not in self.inputs:
                    raise ModelError(f"op {op.id!r} reads tensor {t!r}, which nothing produces")
        ready = deque(op for op in self._ops.values() if waiting[op.id] == 0)
        order: list[Op] = []
        while ready:
            op = ready.popleft()
            order.append(op)
            for t in op.outputs:
                for user in self._consumers.get(t, ()):
                    waiting[user.id] -= 1
                    if waiting[user.id] == 0:
                        ready.append(user)
        if len(order) != len(self._ops):
            raise ModelError("the graph has a cycle")
        return tuple(order)

    def op(self, id: OpId) -> Op:
        """The op of that id.

        Raises:
            ModelError: there is none.
        """
        try:
            return self._ops[id]
        except KeyError:
            raise ModelError(f"the model has no op {id!r}") from None

    def __contains__(self, id: object) -> bool:
        return id in self._ops

    def __iter__(self) -> Iterator[Op]:
        return iter(self.ops)

    def __len__(self) -> int:
        return len(self.ops)

    def producer(self, tensor: TensorId) -> Op | None:
        """The op that writes a tensor; None for a model input."""
        return self._producer.get(tensor)

    def consumers(self, tensor: TensorId) -> tuple[Op, ...]:
        """The ops that read a tensor."""
        return tuple(self._consumers.get(tensor, ()))

    def users(self, param: ParamId) -> tuple[Op, ...]:
        """The ops that use a parameter."""
        return tuple(self._users.get(param, ()))

    def sole_consumer(self, tensor: TensorId) -> Op | None:
        """The one op that reads a tensor that isn't a model output; None where the flow branches or ends."""
        users = self._consumers.get(tensor, ())
        return users[0] if len(users) == 1 and tensor not in self._output_set else None

    @cached_property
    def _output_set(self) -> frozenset[TensorId]:
        return frozenset(self.outputs)

    @cached_property
    def linear_ops(self) -> tuple[Op, ...]:
        """Convolutions and linear ops with a weight, in topological order."""
        return tuple(op for op in self.ops if op.kind in LINEAR_KINDS and op.weight is not None)

    @cached_property
    def unknown_ops(self) -> tuple[Op, ...]:
        """Ops of unknown kinds that compute floats, in topological order: no target quantizes what is inside them."""
        return tuple(
            op for op in self.ops if op.kind is OpKind.OPAQUE and any(self.tensors[t].is_float for t in op.outputs)
        )

    def layer_name(self, op: OpId) -> str:
        """What the model's author calls an op, for people to read: the module of its weight, where it alone has one.

        Exporters number ops ("node_Conv_810") and leave weights their names ("features.0.0.weight").
        """
        weight = self.op(op).weight if op in self else None
        if weight is None or len(self.users(weight)) > 1:
            return op
        module, _, last = weight.replace("/", ".").rpartition(".")
        return weight[: len(module)] if module and last in ("weight", "kernel") else op

    def is_depthwise(self, op: Op) -> bool:
        """A grouped convolution with one input channel a group."""
        weight = op.weight
        return (
            op.kind is OpKind.CONV
            and isinstance(op.attrs, ConvAttrs)
            and op.attrs.groups > 1
            and weight is not None
            and self.params[weight].shape[1] == 1
        )
