"""QDQ models: the float graph with QuantizeLinear/DequantizeLinear pairs that integer runtimes turn into integer ops.

Every site that the plan quantizes gets exactly one pair: activations Q and DQ, parameters an initializer of
integers and a DQ. The dequantized tensor takes the site's own name (that of a model input: `<input>_dequantized`),
around it lie `<tensor>_float`, `<tensor>_quantized`, `<tensor>_scale` and `<tensor>_zero_point`.

Storage: the narrowest ONNX integer type that holds the codes (4, 8, 16 bits, int32 for biases). An activation grid
smaller than its type (3, 5, 6, 7 or 9 to 15 bits, strict grids) gets a Clip beside its Q, since Q saturates at the
type's ends only. float16 and bfloat16 sites are casts there and back; fp8 has Q and DQ of its own. A range at run time
is DynamicQuantizeLinear and DequantizeLinear where ONNX has it (uint8, one range for the tensor), which ONNX Runtime
multiplies in integers, and otherwise the grid's formula in standard ops.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from bitwright.backend import Bundle
from bitwright.calibration import bias_encoding, guarded
from bitwright.errors import EncodingError, ModelError
from bitwright.graph import Graph, Param, ParamId, free_name, preserves_grid
from bitwright.grids import Blockwise, Encoding, EncodingTable, PerChannel, PerTensor, fixed_layout
from bitwright.placement import Derived, OwnForms, Plan, SiteId, SiteKind
from bitwright_onnx.capture.writing import save_model
from bitwright_onnx.export.byte_blocks import turn_byte_blocks
from bitwright_onnx.export.float_biases import split_large_biases
from bitwright_onnx.export.storage import opset_for, storage_type, stored
from bitwright_onnx.graph.opset import MINIMUM_OPSET, opset_of, raise_opset
from bitwright_onnx.graph.optable import turns_weight
from bitwright_onnx.graph.subgraph import values_of
from bitwright_onnx.graph.tensors import tensor_array
from bitwright_onnx.simulate.session import has_quantize_linear
from bitwright_onnx.simulate.site_ops import (
    NodeList,
    SiteContext,
    fixed_site,
    form_of,
    from_float32,
    in_float32,
    merged,
)

NAMES = "bitwright.names"
"""Metadata key of a QDQ file: JSON of site → dequantized tensor, where they differ."""
FORMS = "bitwright.forms"
"""The same, of dequantized tensor → site, for further forms of a bias that ops of several scales share."""
LAZY_BYTES = 2**20
"""Codes of larger float parameters are computed when they are written."""
RUNTIME_DOMAIN = "com.microsoft"
"""ONNX Runtime's own QuantizeLinear and DequantizeLinear, which don't depend on the model's opset."""


@dataclass(frozen=True)
class QdqReport:
    """What was written.

    Attributes:
        path: the file.
        names: site → its dequantized tensor, where it isn't the site's own name.
        raised: weights whose scales were raised so that their int32 biases fit, with the channels.
        skipped: quantized sites without a pair, with the reason.
    """

    path: Path
    names: Mapping[SiteId, str] = field(default_factory=dict)
    raised: Mapping[ParamId, tuple[int, ...]] = field(default_factory=dict)
    skipped: Mapping[SiteId, str] = field(default_factory=dict)


def write_qdq(
    model: ir.Model,
    graph: Graph,
    plan: Plan,
    encodings: Mapping[SiteId, Encoding],
    path: str | Path,
    *,
    packed: bool = True,
) -> QdqReport:
    """Write a QDQ model, atomically.

    Args:
        model: the float model, with the weights that are to be quantized; never changed.
        graph: its canonical graph.
        plan: the sites.
        encodings: of every site with a specification; shared ones may be left out, biases follow from the others.
        path: the file to write.
        packed: keep codes of up to 4 bits in ONNX's 4-bit types (opset 21). ONNX Runtime has integer kernels for
            those in matrix products only; without, they are kept as 8-bit codes of the same values, which its
            convolutions take too.

    Raises:
        EncodingError: an encoding that ONNX has no ops for (the message names the site).
        ModelError: the model's opset can't be raised to what the encodings need.
        InputError: the file can't be written.
    """
    built, report = build_qdq(model, graph, plan, encodings, packed=packed)
    written = save_model(built, path)
    return QdqReport(written, report.names, report.raised, report.skipped)


def export_qdq(
    model: ir.Model, graph: Graph, plan: Plan, encodings: Mapping[SiteId, Encoding], path: str | Path
) -> Bundle:
    """`write_qdq`, as the bundle that `Backend.export` returns."""
    report = write_qdq(model, graph, plan, encodings, path)
    return Bundle({"qdq": report.path}, report.names)


def build_qdq(
    model: ir.Model, graph: Graph, plan: Plan, encodings: Mapping[SiteId, Encoding], *, packed: bool = True
) -> tuple[ir.Model, QdqReport]:
    """The QDQ model in memory; arguments and errors as `write_qdq`."""
    table, raised = _table(model, graph, plan, encodings)
    kinds = {s: storage_type(e, computed=_is_computed(plan, graph, s), packed=packed) for s, e in table.items()}
    opset = max((opset_for(e, kinds[s]) for s, e in table.items()), default=MINIMUM_OPSET)
    work = raise_opset(model, opset)
    if work is model:
        work = model.clone()
        work.graph.meta.update(model.graph.meta)
    writer = _Writer(work, graph)
    skipped: dict[SiteId, str] = {}
    for site in plan:
        if isinstance(plan[site].decision, OwnForms) and site in writer.values:
            groups = _bias_groups(graph, plan, site, table)
            if len(groups) == len(graph.users(site)):
                writer.parameter(site, next(iter(groups.values())), ir.DataType.INT32, groups)
    for site in plan.quantized:
        if site not in table:
            skipped[site] = "it has no encoding"
        elif site not in writer.values:
            skipped[site] = "the model has no such tensor"
        elif _is_computed(plan, graph, site):
            writer.activation(site, table[site], kinds[site])
        elif site not in graph.params:
            skipped[site] = "no op of the ONNX model reads it as a parameter; it stays in float"
        else:
            writer.parameter(site, table[site], kinds[site], _bias_groups(graph, plan, site, table))
    turn_byte_blocks(work.graph, writer.fresh)
    split_large_biases(work, writer.initializer, writer.fresh)
    _runnable_pairs(work)
    work.metadata_props[NAMES] = json.dumps(writer.names)
    if writer.forms:
        work.metadata_props[FORMS] = json.dumps(writer.forms)
    return work, QdqReport(Path(), writer.names, raised, skipped)


def _is_computed(plan: Plan, graph: Graph, site: SiteId) -> bool:
    """Whether a site's codes are computed; what another framework computes from parameters alone is stored here."""
    return plan[site].kind is SiteKind.ACTIVATION and site not in graph.params


def _runnable_pairs(model: ir.Model) -> None:
    """Take Q and DQ from ONNX Runtime's own domain where it doesn't have them in the model's opset yet."""
    if has_quantize_linear(opset_of(model)):
        return
    for node in model.graph.all_nodes():
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            node.domain = RUNTIME_DOMAIN
            model.opset_imports[RUNTIME_DOMAIN] = 1


def _table(
    model: ir.Model, graph: Graph, plan: Plan, encodings: Mapping[SiteId, Encoding]
) -> tuple[dict[SiteId, Encoding], dict[ParamId, tuple[int, ...]]]:
    """One encoding for each quantized site, with weight scales that leave room for the biases."""
    own = EncodingTable({s: e for s, e in encodings.items() if s in plan and plan.root(s) == s})
    values = values_of(model.graph)
    # What no op reads (of a layer whose result isn't used) isn't in the file, and needs no room.
    biases = {s: _canonical(values[s], graph.params[s]) if s in values else np.zeros(1, np.float32) for s in plan
              if isinstance(plan[s].decision, Derived | OwnForms)}  # fmt: skip
    safe = guarded(plan, own, biases)
    raised = {
        s: tuple(int(c) for c in np.flatnonzero(safe[s].scale != own[s].scale)) for s in safe if safe[s] is not own[s]
    }
    table: dict[SiteId, Encoding] = {}
    for site in plan.quantized:
        encoding = safe.get(plan.root(site))
        if encoding is not None and not isinstance(plan[plan.root(site)].decision, Derived):
            table[site] = encoding
    for site in plan.quantized:
        decision = plan[plan.root(site)].decision
        if isinstance(decision, Derived) and all(s in table for s in decision.sites):
            bias = bias_encoding(*(table[s] for s in decision.sites))
            if bias is not None:
                table[site] = bias
    return table, raised


def _bias_groups(graph: Graph, plan: Plan, site: SiteId, table: Mapping[SiteId, Encoding]) -> dict[str, Encoding]:
    """Ops that share a bias but not its scale, each with the grid of its own accumulator.

    An integer kernel takes s_input·s_weight for granted, so one dequantized bias can't serve two scales.
    """
    found: dict[str, Encoding] = {}
    if not isinstance(plan[plan.root(site)].decision, Derived | OwnForms):
        return found
    for op in graph.users(site):
        weight, source = table.get(op.weight or ""), _carried(graph, op.data_inputs[:1], table)
        if weight is not None and source is not None:
            own = bias_encoding(source, weight)
            if own is not None and (site not in table or not own.equals(table[site])):
                found[op.id] = own
    return found


def _carried(graph: Graph, tensors: Sequence[str], table: Mapping[SiteId, Encoding]) -> Encoding | None:
    """The grid of an operand's values: its own, or that of what ops between (transposes, zero pads) only move."""
    while tensors and tensors[0] not in table:
        op = graph.producer(tensors[0])
        tensors = op.data_inputs[:1] if op is not None and preserves_grid(op) else ()
    return table[tensors[0]] if tensors else None


@dataclass(frozen=True)
class _Codes:
    """A parameter's codes, computed from the float values that its tensor had when the pair was made."""

    tensor: ir.TensorProtocol
    param: Param
    codes: Callable[[NDArray[np.float32]], NDArray[Any]]

    def __call__(self) -> NDArray[Any]:
        return self.codes(_canonical_values(self.tensor, self.param))


def _canonical(value: ir.Value, param: Param) -> NDArray[np.float32]:
    if value.const_value is None:
        raise ModelError(f"parameter {param.id!r} is not an initializer of the main graph")
    return _canonical_values(value.const_value, param)


def _canonical_values(tensor: ir.TensorProtocol, param: Param) -> NDArray[np.float32]:
    native = tensor_array(tensor)
    layout = param.layout or tuple(range(native.ndim))
    return np.asarray(native.transpose(layout), np.float32).reshape(param.shape)


class _Writer:
    """Puts pairs into a model that it owns."""

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
        canonical = _canonical(value, param)
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
            q = self.computed(f"{name}_quantized", native, kind, _Codes(value.const_value, param, codes_of))
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
        array = np.asarray(array, order="C")  # ascontiguousarray would give scalars an axis
        dtype = kind or ir.DataType.from_numpy(array.dtype)
        fresh = self.fresh(name)
        tensor = ir.Tensor(array.astype(dtype.numpy(), copy=False), dtype=dtype, name=fresh)
        made = ir.Value(name=fresh, type=ir.TensorType(dtype), shape=ir.Shape(array.shape), const_value=tensor)
        self.model.graph.register_initializer(made)
        return made

    def computed(
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
