"""Q/DQ pairs: put behind a tensor for all its readers, or around a parameter that is stored as integers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from bitwright.errors import EncodingError, ModelError
from bitwright.graph import Graph, Param, ParamId, free_name
from bitwright.grids import Blockwise, Encoding, PerChannel, PerTensor, fixed_layout
from bitwright.placement import SiteId
from bitwright_onnx.export.storage import stored
from bitwright_onnx.graph.opset import opset_of
from bitwright_onnx.graph.optable import turns_weight
from bitwright_onnx.graph.subgraph import values_of
from bitwright_onnx.graph.tensors import tensor_array
from bitwright_onnx.simulate.site_ops import (
    NodeList,
    SiteContext,
    fixed_site,
    form_of,
    from_float32,
    in_float32,
    merged,
)

LAZY_BYTES = 2**20
"""Codes of larger float parameters are computed when they are written."""


@dataclass(frozen=True)
class _Codes:
    """A parameter's codes, computed from the float values that its tensor had when the pair was made."""

    tensor: ir.TensorProtocol
    param: Param
    codes: Callable[[NDArray[np.float32]], NDArray[Any]]

    def __call__(self) -> NDArray[Any]:
        return self.codes(_canonical_values(self.tensor, self.param))


def canonical_values(value: ir.Value, param: Param) -> NDArray[np.float32]:
    """A parameter's values in canonical layout.

    Raises:
        ModelError: they aren't an initializer of the main graph.
    """
    if value.const_value is None:
        raise ModelError(f"parameter {param.id!r} is not an initializer of the main graph")
    return _canonical_values(value.const_value, param)


def _canonical_values(tensor: ir.TensorProtocol, param: Param) -> NDArray[np.float32]:
    native = tensor_array(tensor)
    layout = param.layout or tuple(range(native.ndim))
    return np.asarray(native.transpose(layout), np.float32).reshape(param.shape)


class PairWriter:
    """Puts pairs into a model that it owns.

    Attributes:
        names: site → its dequantized tensor, where it isn't the site's own name.
        forms: dequantized tensor → site, of further forms of a bias.
    """

    def __init__(self, model: ir.Model, graph: Graph) -> None:
        self.model = model
        self.params = graph.params
        self.values = values_of(model.graph)
        self.names: dict[SiteId, str] = {}
        self.forms: dict[str, SiteId] = {}
        made = (
            (op.id, self.values[op.outputs[0]].producer())
            for op in graph
            if op.outputs and op.outputs[0] in self.values
        )
        self._ops = {node: op for op, node in made if node is not None}
        """By the node that writes an op's output, which is the one that reads its bias."""
        self._first = model.graph[0] if len(model.graph) else None
        self._taken = {str(v.name) for v in ir.convenience.create_value_mapping(model.graph).values()}

    def activation(self, site: SiteId, encoding: Encoding, kind: ir.DataType) -> None:
        """A pair behind the tensor, for all its readers."""
        value, graph = self.values[site], self.model.graph
        dtype = value.dtype or ir.DataType.FLOAT
        uses = list(value.uses())
        is_input = value.is_graph_input()
        chain = NodeList(self.fresh(f"{site}_qdq"))
        if str(encoding.run_time) == "uint8:dynamic":
            y = self._dynamic(chain, value, site)
        elif encoding.run_time is not None or encoding.float_format in ("float16", "bfloat16"):
            form, known = form_of(encoding, None), merged(form_of(encoding, None), encoding)

            def operand(suffix: str) -> ir.Value:
                return self.initializer(f"{site}_{suffix}", known[suffix])

            y = fixed_site(chain, value, SiteContext(form, dtype, opset_of(self.model)), operand, encoding)
        else:
            y = self._pair(chain, value, site, encoding, kind)
        y.type, y.shape = value.type, value.shape
        for user, index in uses:
            user.replace_input_with(index, y)
        self._open_clip(site, value, encoding, kind)
        if is_input:
            # A model output that is an input goes by the input's name and stays as it is.
            y.name = self.names[site] = self.fresh(f"{site}_dequantized")
            self._at_start(chain)
            return
        for index, output in enumerate(graph.outputs):
            if output is value:
                graph.outputs[index] = y
        producer = value.producer()
        if producer is None:  # a constant, for example what was folded into one
            self._at_start(chain)
            graph.initializers.pop(str(value.name), None)
            value.name = self.fresh(f"{site}_float")
            graph.register_initializer(value)
        else:
            graph.insert_after(producer, chain.nodes)
            value.name = self.fresh(f"{site}_float")
        y.name = site

    def _dynamic(self, chain: NodeList, x: ir.Value, site: SiteId) -> ir.Value:
        dtype = x.dtype or ir.DataType.FLOAT
        made = [ir.Value(name=self.fresh(f"{site}_{part}")) for part in ("quantized", "scale", "zero_point")]
        x = in_float32(chain, x, dtype)
        chain.nodes.append(ir.node("DynamicQuantizeLinear", [x], outputs=made, name=f"{chain.prefix}/dynamic"))
        return from_float32(chain, chain("DequantizeLinear", *made), dtype)

    def _pair(self, chain: NodeList, x: ir.Value, site: SiteId, encoding: Encoding, kind: ir.DataType) -> ir.Value:
        dtype = x.dtype or ir.DataType.FLOAT
        if kind is ir.DataType.INT32:
            raise EncodingError(
                f"activation {site!r}: QuantizeLinear has no 32-bit type; give it at most 16 bits or leave it in float"
            )
        shape = tuple(x.shape) if x.shape is not None else ()
        layout = encoding.granularity
        if isinstance(layout, Blockwise):
            raise EncodingError(
                f"activation {site!r}: blockwise grids of activations can't be exported; use one scale a channel or one"
            )
        axis = {"axis": layout.axis % len(shape)} if isinstance(layout, PerChannel) else {}
        scale = self.initializer(f"{site}_scale", encoding.scale)
        zero = self.initializer(f"{site}_zero_point", encoding.zero_point, kind)
        x = in_float32(chain, x, dtype)
        grid = encoding.grid
        clipped = encoding.float_format is None and grid.steps != 2**kind.bitwidth - 1
        if clipped and kind.bitwidth > 8:
            # ONNX Runtime clips no 16-bit integers. The ends are codes times scale, so that codes come out the same.
            if not isinstance(layout, PerTensor):
                raise EncodingError(
                    f"activation {site!r}: {encoding.bits}-bit codes a channel can't be exported; use 8 or 16"
                )
            low = self.initializer(f"{site}_minimum", encoding.minimum)
            x = chain("Clip", x, low, self.initializer(f"{site}_maximum", encoding.maximum))
        q = chain("QuantizeLinear", x, scale, zero, **axis)
        q.name = self.fresh(f"{site}_quantized")
        if clipped and kind.bitwidth <= 8:
            low = self.initializer(f"{site}_lowest", np.asarray(grid.qmin), kind)
            q = chain("Clip", q, low, self.initializer(f"{site}_highest", np.asarray(grid.qmax), kind))
        return from_float32(chain, chain("DequantizeLinear", q, scale, zero, **axis), dtype)

    def _open_clip(self, site: SiteId, value: ir.Value, encoding: Encoding, kind: ir.DataType) -> None:
        """Move the bounds of a Clip before Q to the grid's ends where those saturate it to the very same codes.

        The grid of a clipped ReLU ends at its bound but for the last bit of 255·scale, and ONNX Runtime drops a Clip
        (without which it makes no integer kernel of the op before) only if its bounds enclose the grid's.
        """
        node = value.producer()
        if node is None or node.op_type != "Clip" or node.domain != "" or encoding.float_format is not None:
            return
        if encoding.scale.ndim or encoding.grid.steps != 2**kind.bitwidth - 1:
            return
        ends = ((1, encoding.minimum, encoding.grid.qmin), (2, encoding.maximum, encoding.grid.qmax))
        for index, end, code in ends:
            bound = node.inputs[index] if len(node.inputs) > index else None
            tensor = None if bound is None else bound.const_value
            if bound is None or tensor is None or tensor.dtype is not ir.DataType.FLOAT:
                continue
            limit = tensor_array(tensor).astype(np.float32)
            inside = limit > end if index == 1 else limit < end
            if inside and int(encoding.quantize(limit)) == code:
                name = f"{site}_{'minimum' if index == 1 else 'maximum'}"
                node.replace_input_with(index, self.initializer(name, np.asarray(end)))

    def parameter(self, site: ParamId, encoding: Encoding, kind: ir.DataType, others: Mapping[str, Encoding]) -> None:
        """Integers in place of the parameter; `others` are ops that need the same values on another grid."""
        value, graph = self.values[site], self.model.graph
        param = self.params[site]
        canonical = canonical_values(value, param)
        uses = list(value.uses())
        is_output = value.is_graph_output()
        main = self._stored(site, value, kind, canonical, encoding)
        if isinstance(encoding.granularity, Blockwise) and encoding.float_format is None:
            turns = [use.node for use in uses if turns_weight(use.node)]
            self._turn_blocks(site, turns, main)
            uses = [use for use in uses if use.node not in turns]
        apart: list[tuple[Encoding, ir.Value]] = []
        for user, index in uses:
            own = others.get(self._ops.get(user, ""))
            if own is None or own.equals(encoding):
                user.replace_input_with(index, main)
                continue
            twin = next((v for e, v in apart if e.equals(own)), None)
            if twin is None:
                name = f"{site}_{len(apart) + 2}"
                twin = self._stored(name, value, kind, canonical, own)
                twin.name = self.fresh(name)
                self.forms[twin.name] = site
                apart.append((own, twin))
            user.replace_input_with(index, twin)
        if is_output:
            main.name = self.names[site] = self.fresh(f"{site}_dequantized")
        else:
            del graph.initializers[site]
            main.name = site

    def _turn_blocks(self, site: ParamId, turns: list[ir.Node], main: ir.Value) -> None:
        """Dequantize a transpose of the stored codes where the model reads a matrix of blocks transposed.

        ONNX Runtime multiplies by blocks (MatMulNBits) only where a product reads what is dequantized as it is. The
        codes are in the file once: it folds the transpose of a constant. Other grids need none of this, there it
        moves the transpose by itself.
        """
        producer = main.producer()
        while producer is not None and producer.op_type == "Cast":
            producer = producer.inputs[0].producer() if producer.inputs[0] is not None else None
        if not turns or producer is None:
            return
        chain = NodeList(self.fresh(f"{site}_turned"))
        q, *numbers = producer.inputs
        codes = chain("Transpose", q, perm=[1, 0])
        codes.type = q.type if q is not None else None
        operands = []
        for suffix, number in zip(("scale", "zero_point"), numbers, strict=False):
            assert number is not None and number.const_value is not None
            turned = np.ascontiguousarray(number.const_value.numpy().T)
            operands.append(self.initializer(f"{site}_turned_{suffix}", turned, number.const_value.dtype))
        axis, size = (producer.attributes.get_int(k) for k in ("axis", "block_size"))
        assert axis is not None and size is not None
        y = chain("DequantizeLinear", codes, *operands, axis=1 - axis % 2, block_size=size)
        y = from_float32(chain, y, main.dtype or ir.DataType.FLOAT)
        y.type = main.type
        self._at_start(chain)
        for turn in turns:
            turn.outputs[0].replace_all_uses_with(y)
            self.model.graph.remove(turn, safe=True)

    def _stored(
        self, name: str, value: ir.Value, kind: ir.DataType, canonical: NDArray[np.float32], encoding: Encoding
    ) -> ir.Value:
        param = self.params[str(value.name)]
        assert value.const_value is not None
        native = tensor_array(value.const_value).shape
        dtype = value.const_value.dtype
        layout = param.layout or tuple(range(len(native)))
        back = np.argsort(layout)
        canonical_native = tuple(native[i] for i in layout)

        def codes_of(values: NDArray[np.float32]) -> NDArray[Any]:
            return stored(values, encoding, kind).reshape(canonical_native).transpose(back)

        if canonical.nbytes < LAZY_BYTES:
            q = self.initializer(f"{name}_quantized", codes_of(canonical), kind)
        else:
            q = self._computed(f"{name}_quantized", native, kind, _Codes(value.const_value, param, codes_of))
        chain = NodeList(self.fresh(f"{name}_dq"))
        if encoding.float_format in ("float16", "bfloat16"):
            y = chain.cast(q, dtype)
        else:
            scale, zero, attributes = _native_numbers(encoding, param, layout, canonical_native, back)
            operands = [self.initializer(f"{name}_scale", scale)]
            if encoding.float_format is None:
                operands.append(self.initializer(f"{name}_zero_point", zero, kind))
            y = from_float32(chain, chain("DequantizeLinear", q, *operands, **attributes), dtype)
        y.type, y.shape = ir.TensorType(dtype), ir.Shape(native)
        self._at_start(chain)
        return y

    def _at_start(self, chain: NodeList) -> None:
        if self._first is None:
            self.model.graph.extend(chain.nodes)
        else:
            self.model.graph.insert_before(self._first, chain.nodes)

    def initializer(self, name: str, array: NDArray[Any], kind: ir.DataType | None = None) -> ir.Value:
        """A new initializer, called so or nearly so."""
        array = np.asarray(array, order="C")  # ascontiguousarray would give scalars an axis
        dtype = kind or ir.DataType.from_numpy(array.dtype)
        fresh = self.fresh(name)
        tensor = ir.Tensor(array.astype(dtype.numpy(), copy=False), dtype=dtype, name=fresh)
        made = ir.Value(name=fresh, type=ir.TensorType(dtype), shape=ir.Shape(array.shape), const_value=tensor)
        self.model.graph.register_initializer(made)
        return made

    def _computed(
        self, name: str, shape: tuple[int, ...], kind: ir.DataType, make: Callable[[], NDArray[Any]]
    ) -> ir.Value:
        """An initializer whose values are computed whenever they are asked for, and so not held until then."""
        fresh = self.fresh(name)

        def tensor() -> ir.TensorProtocol:
            return ir.Tensor(np.asarray(make(), order="C").astype(kind.numpy(), copy=False), dtype=kind, name=fresh)

        lazy = ir.LazyTensor(tensor, kind, ir.Shape(shape), name=fresh)
        made = ir.Value(name=fresh, type=ir.TensorType(kind), shape=ir.Shape(shape), const_value=lazy)
        self.model.graph.register_initializer(made)
        return made

    def fresh(self, name: str) -> str:
        """A name that nothing in the model has."""
        chosen = free_name(name, self._taken, 2)
        self._taken.add(chosen)
        return chosen


def _native_numbers(
    encoding: Encoding,
    param: Param,
    layout: tuple[int, ...],
    canonical: tuple[int, ...],
    back: NDArray[np.intp],
) -> tuple[NDArray[Any], NDArray[Any], dict[str, int]]:
    """Scale, zero point and attributes of DequantizeLinear in the parameter's native layout."""
    how = fixed_layout(encoding.granularity)
    extra = len(canonical) - len(param.shape)
    if isinstance(how, PerTensor):
        return encoding.scale, encoding.zero_point, {}
    if isinstance(how, PerChannel):
        axis = how.axis % len(param.shape)
        if extra:
            # A bias kept with axes of length 1, (1, out) or (out, 1, 1): its channels are the axis that is longer.
            axis = next((i for i, n in enumerate(canonical) if n > 1), len(canonical) - 1)
        return encoding.scale, encoding.zero_point, {"axis": int(layout[axis])}
    # Blocks run along one axis; ONNX wants a scale for every index of all the others.
    axis, block_axis = how.axis % len(param.shape), how.block_axis % len(param.shape)
    shape = list(param.shape)
    shape[block_axis] = encoding.scale.shape[1]
    whole = [shape[i] if i in (axis, block_axis) else 1 for i in range(len(shape))]
    arrays = []
    for array in (encoding.scale, encoding.zero_point):
        two = array if axis < block_axis else array.T
        arrays.append(np.broadcast_to(two.reshape(whole), shape).transpose(back))
    return arrays[0], arrays[1], {"axis": int(layout[block_axis]), "block_size": how.block_size}
