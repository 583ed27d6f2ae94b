"""Rewriting a part of a model into its simulation: chains behind its sites, numbers as inputs or constants."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from bitwright.graph import Param
from bitwright.grids import Encoding
from bitwright_onnx.graph.opset import opset_of
from bitwright_onnx.simulate.session import has_quantize_linear
from bitwright_onnx.simulate.site_ops import NodeList, SiteContext, SiteForm, fixed_site, live_site, merged


def fake_quantized(native: NDArray[Any], param: Param, encoding: Encoding) -> NDArray[Any]:
    """A parameter in native layout and type, rounded to its grid."""
    layout = param.layout or tuple(range(native.ndim))
    permuted = native.transpose(layout)
    quantized = encoding.fake_quantize(permuted.reshape(param.shape).astype(np.float32, copy=False))
    return np.asarray(quantized.reshape(permuted.shape).transpose(np.argsort(layout)), native.dtype, order="C")


class Lowering:
    """Puts chains into a part, which it owns.

    The names of a tensor move with its quantized values: readers, taps and model outputs find these under the old
    name. A quantized model input can't take over its name and is called `<input>/quantized`.
    """

    def __init__(self, part: ir.Model) -> None:
        self._graph = part.graph
        self._opset = opset_of(part)
        self._taken = {str(v.name) for v in ir.convenience.create_value_mapping(part.graph).values()}
        self._operands: dict[str, ir.Value] = {}
        self.live_inputs: list[str] = []
        """Names of the inputs that live chains have added."""

    def live(self, value: ir.Value, form: SiteForm, prefix: str) -> str:
        """A chain whose numbers are inputs `<prefix>/<suffix>`; returns the name of the quantized tensor."""
        known = merged(form, None)

        def operand(suffix: str) -> ir.Value:
            array = known[suffix]
            dtype = ir.TensorType(ir.DataType.from_numpy(array.dtype))
            made = ir.Value(name=f"{prefix}/{suffix}", type=dtype, shape=ir.Shape([None] * array.ndim))
            self._graph.inputs.append(made)
            self.live_inputs.append(f"{prefix}/{suffix}")
            return made

        chain = NodeList(f"{value.name}/quantize")
        place, once = self._place(value, form), self._once(prefix, operand)
        y = self._attach(value, chain, lambda: live_site(chain, value, place, once))
        return self._named(value, y, outputs=True)

    def fixed(self, value: ir.Value, form: SiteForm, prefix: str, encoding: Encoding) -> str:
        """A chain whose numbers are constants; returns the name of the quantized tensor."""
        known = merged(form, encoding)

        def operand(suffix: str) -> ir.Value:
            name = f"{prefix}/{suffix}"
            made = ir.Value(name=name, const_value=ir.tensor(known[suffix], name=name))
            self._graph.register_initializer(made)
            return made

        chain, place = NodeList(f"{value.name}/quantize"), self._place(value, form)
        y = self._attach(value, chain, lambda: fixed_site(chain, value, place, self._once(prefix, operand), encoding))
        # A model output that is an input goes by the input's name, so it stays as it is.
        return self._named(value, y, outputs=False)

    def is_pair(self, value: ir.Value, form: SiteForm, encoding: Encoding) -> bool:
        """Whether a fixed chain would be a pair of QuantizeLinear and DequantizeLinear, and no more."""
        return self._place(value, form).is_pair(encoding)

    def _place(self, value: ir.Value, form: SiteForm) -> SiteContext:
        return SiteContext(form, value.dtype or ir.DataType.FLOAT, self._opset, has_quantize_linear(self._opset))

    def _once(self, prefix: str, make: Callable[[str], ir.Value]) -> Callable[[str], ir.Value]:
        """Sites that share an encoding share its operands."""

        def operand(suffix: str) -> ir.Value:
            name = f"{prefix}/{suffix}"
            if name not in self._operands:
                self._operands[name] = make(suffix)
            return self._operands[name]

        return operand

    def _attach(self, value: ir.Value, chain: NodeList, build: Callable[[], ir.Value]) -> ir.Value:
        uses = list(value.uses())
        y = build()
        y.type, y.shape = value.type, value.shape
        for user, index in uses:
            user.replace_input_with(index, y)
        producer = value.producer()
        if producer is not None:
            self._graph.insert_after(producer, chain.nodes)
        elif len(self._graph):
            self._graph.insert_before(self._graph[0], chain.nodes)
        else:
            self._graph.extend(chain.nodes)
        return y

    def _named(self, value: ir.Value, y: ir.Value, *, outputs: bool) -> str:
        is_input = value.is_graph_input()
        name = str(value.name)
        if outputs or not is_input:
            for index, output in enumerate(self._graph.outputs):
                if output is value:
                    self._graph.outputs[index] = y
        if is_input:
            y.name = self._fresh(f"{name}/quantized")
        else:
            value.name, y.name = self._fresh(f"{name}/float"), name
        return str(y.name)

    def _fresh(self, name: str) -> str:
        while name in self._taken:
            name += "_"
        self._taken.add(name)
        return name
