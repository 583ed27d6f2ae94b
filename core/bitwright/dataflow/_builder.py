"""Making the graph of a model while it is captured: what an adapter tells of each op, and what follows from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from bitwright.dataflow._contraction import contracted
from bitwright.dataflow._emission import Emission
from bitwright.dataflow._layouts import Layout
from bitwright.dataflow._model import M
from bitwright.dataflow._nodes import Node, Nodes, Step, Value, ValueId
from bitwright.dataflow._norms import norms_merged
from bitwright.dataflow._recognize import recognized
from bitwright.errors import ModelError
from bitwright.graph import Attrs, ParamRole

Array = NDArray[Any]
Shape = Sequence[int | None]


class GraphBuilder:
    """Collects inputs, parameters and ops; `build` makes a model of them.

    What follows from these is worked out here: names, kinds, which operand is which parameter, parameters that are
    shared or used in another layout, what is computed from parameters alone, biases that a model adds separately,
    channel axes, and the norms, activations and pools that it spells out (`recognize`).
    """

    def __init__(self, *, recognize: bool = True) -> None:
        self._recognize = recognize
        self._values: dict[ValueId, Value] = {}
        self._layouts: dict[ValueId, Layout] = {}
        self._channels: dict[ValueId, int] = {}
        self._nodes: list[Node] = []
        self._derived: dict[ValueId, Node] = {}
        self._inputs: list[ValueId] = []

    # -- operands

    def input(self, name: str, shape: Shape, dtype: str = "float32", *, channel_axis: int | None = None) -> ValueId:
        """An input of the model.

        Args:
            name: the user's.
            shape: None for free lengths, such as the sample axis.
            dtype: numpy's name of it.
            channel_axis: where its channels lie, if nothing that reads it says so.
        """
        self._inputs.append(self._add(name, "input", shape, dtype, None))
        if channel_axis is not None:
            self._channels[self._inputs[-1]] = channel_axis
        return self._inputs[-1]

    def param(self, name: str, value: object, layout: Layout = Layout()) -> ValueId:  # noqa: B008 - immutable
        """A parameter. Ask for it once, however many ops use it.

        Args:
            name: the user's.
            value: its array, as the framework has it.
            layout: to the canonical layout, where the ops that use it don't say (`op`'s `layouts`).
        """
        array = np.asarray(value)
        found = self._add(name, "parameter", array.shape, array.dtype.name, array)
        self._layouts[found] = layout
        return found

    def constant(self, value: object, dtype: str | None = None) -> ValueId:
        """A literal: a number, indices, a mask. Floats that an op takes as an operand become parameters of it."""
        array = np.asarray(value, dtype)
        if array.dtype == np.float64 and dtype is None:
            array = array.astype(np.float32)
        return self._add(f"constant {len(self._values)}", "constant", array.shape, array.dtype.name, array)

    def known(self, value: ValueId) -> Array | None:
        """What a value holds, if it depends on no input."""
        return self._values[value].array

    def shape(self, value: ValueId) -> tuple[int | None, ...]:
        """A value's shape."""
        return self._values[value].shape

    # -- ops

    def op(
        self,
        type: str,
        operands: Sequence[ValueId | None],
        shapes: Sequence[Shape],
        function: Callable[..., Sequence[Any]],
        *,
        order: Sequence[int] | None = None,
        dtypes: Sequence[str] = (),
        attributes: Mapping[str, Any] | None = None,
        attrs: Attrs | None = None,
        layouts: Mapping[int, Layout] | None = None,
        roles: Mapping[int, ParamRole] | None = None,
        channels: tuple[int, int] | None = None,
        name: str = "",
        native: str = "",
        source: str | None = None,
    ) -> tuple[ValueId, ...]:
        """A call of the framework; returns its outputs.

        Args:
            type: the ONNX operator that it amounts to; any other name for an op that ONNX hasn't got, which runs in
                float and ends every pattern.
            operands: in ONNX's order; None for one that is absent.
            shapes: of the outputs, with None for free lengths.
            function: computes the outputs from the operands that are present, as arrays of the framework; pure.
            order: operands in the order that the function takes them, by position; as they stand by default.
            dtypes: of the outputs; float32 by default.
            attributes: by the names that ONNX gives them.
            attrs: the canonical attributes that this kind of op has.
            layouts: by position, from the operand as it is given to the canonical layout of a weight.
            roles: by position, of parameters that the type doesn't tell.
            channels: axis of the channels in the first operand and in the first output, for ops that have a say in it.
            name: the user's, if there is one; otherwise it is made up from the weight's, or the type.
            native: the framework's name of the type, for messages.
            source: where the user wrote it.

        Raises:
            ModelError: an operand is unknown, or the function fails on parameters alone.
        """
        for operand in operands:
            if operand is not None and operand not in self._values:
                raise ModelError(f"operand {operand!r} of a {native or type} is neither an input nor made before")
        dtypes = [*dtypes, *["float32"] * (len(shapes) - len(dtypes))]
        outputs = tuple(f"value {len(self._values) + i}" for i in range(len(shapes)))
        given = tuple(operands[i] for i in order) if order is not None else tuple(operands)
        step = Step(function, tuple(o for o in given if o is not None), outputs)
        node = Node(type, tuple(operands), outputs, (step,), dict(attributes or {}), attrs, dict(layouts or {}),
                    channels, dict(roles or {}), name, native or type, source)  # fmt: skip
        held = [self._values[o].array for o in step.operands]
        if all(array is not None for array in held):
            return self._computed(node, step, held)
        for value, shape, dtype in zip(outputs, shapes, dtypes, strict=True):
            self._values[value] = Value(value, "result", tuple(shape), dtype)
        self._nodes.append(node)
        return outputs

    def contraction(
        self,
        left: ValueId,
        right: ValueId,
        function: Callable[..., Sequence[Any]],
        *,
        contract: tuple[Sequence[int], Sequence[int]],
        batch: tuple[Sequence[int], Sequence[int]] = ((), ()),
        **told: Any,
    ) -> ValueId:
        """A sum of products over axes of two tensors, with what makes it a matrix product: transpositions, reshapes.

        Arrays of the framework need numpy's `reshape`, `transpose` and `@` for that.

        Args:
            left, right: operands.
            function: computes it.
            contract: axes of both that are summed over.
            batch: axes of both that run along together; they come first in the output, then the others of the left
                operand, then those of the right one.
            told: as `op` takes it.
        """
        axes = [(tuple(a), tuple(b)) for a, b in (contract, batch)]
        return contracted(self, left, right, axes[0], axes[1], function, told)

    def build(self, made: type[M], outputs: Sequence[ValueId], *, names: Sequence[str] = ()) -> M:
        """The model.

        Args:
            made: its type.
            outputs: of the model.
            names: the user's, of the outputs; otherwise they are called after the ops.

        Raises:
            ModelError: an output depends on no input.
        """
        for value in outputs:
            if self._values[value].known:
                raise ModelError("an output of the model depends on no input: it is a constant")
        nodes = Nodes(self._values, self._nodes, self._derived, outputs).living()
        if self._recognize:
            nodes = recognized(nodes)

        def emission(nodes: Nodes) -> Emission:
            return Emission(nodes, self._inputs, self._layouts, self._channels, names)

        found = emission(nodes)
        if self._recognize:
            nodes, changed = norms_merged(found.model(made).graph, found.nodes, found.node_of)
            found = emission(nodes) if changed else found
        return found.model(made)

    # -- inner

    def _add(
        self, name: str, kind: Literal["input", "parameter", "constant"], shape: Shape, dtype: str, array: Array | None
    ) -> ValueId:
        if name in self._values:
            raise ModelError(f"two inputs or parameters are called {name!r}; names must be unique")
        self._values[name] = Value(name, kind, tuple(shape), dtype, array)
        return name

    def _computed(self, node: Node, step: Step, held: Sequence[Array | None]) -> tuple[ValueId, ...]:
        try:
            results = [np.asarray(y) for y in step.function(*held)]
        except Exception as error:
            raise ModelError(f"a {node.native} of constants can't be computed: {error}") from error
        literal = all(self._values[o].kind == "constant" for o in step.operands)
        kind: Literal["constant", "derived"] = "constant" if literal else "derived"
        for value, array in zip(node.outputs, results, strict=True):
            self._values[value] = Value(value, kind, array.shape, array.dtype.name, array)
            if not literal:
                self._derived[value] = node
        return node.outputs
