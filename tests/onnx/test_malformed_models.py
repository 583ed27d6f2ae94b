"""Files that no exporter writes: every one is refused by name when it is opened, never by an error from within."""

from __future__ import annotations

import copy

import numpy as np
import onnx
import pytest
from builders import ModelBuilder
from onnx import helper

from bitwright import QuantSim
from bitwright.errors import ModelError


def _good() -> onnx.ModelProto:
    b = ModelBuilder(opset=17)
    b.node("Conv", [b.input("x", [1, 2, 6, 6]), b.weight("w", 4, 2, 3, 3)], "c", "conv", kernel_shape=[3, 3])
    b.node("MaxPool", ["c"], "p", "pool", kernel_shape=[2, 2])
    b.node("Transpose", ["p"], "t", "turn", perm=[0, 2, 3, 1])
    b.node("Add", ["t", b.const("one", np.float32(1))], "a", "add")
    b.node("LeakyRelu", ["a"], b.output("y"), "relu", alpha=0.1)
    return b.build()


def _node(model: onnx.ModelProto, name: str) -> onnx.NodeProto:
    return next(n for n in model.graph.node if n.name == name)


def _attribute(name, key, value):
    def change(model):
        node = _node(model, name)
        kept = [a for a in node.attribute if a.name != key]
        del node.attribute[:]
        node.attribute.extend([*kept, *([] if value is None else [helper.make_attribute(key, value)])])

    return change


def _inputs(name, *inputs):
    def change(model):
        _node(model, name).input[:] = inputs

    return change


def _outputs(name, *outputs):
    def change(model):
        _node(model, name).output[:] = outputs

    return change


def _delete_weight(model):
    del model.graph.initializer[0]


def _constant_of_two(model):
    made = helper.make_node("Constant", [], ["k"], "k", value_float=1.0)
    made.attribute.append(helper.make_attribute("value_int", 1))
    model.graph.node.insert(0, made)
    _node(model, "add").input[1] = "k"


def _constant_of_no_type(model):
    held = onnx.numpy_helper.from_array(np.float32(1))
    held.data_type = 77
    model.graph.node.insert(0, helper.make_node("Constant", [], ["k"], "k", value=held))
    _node(model, "add").input[1] = "k"


def _output_of_nothing(model):
    model.graph.output[0].name = "nowhere"


def _nul(model):
    held = model.graph.initializer[0]
    held.ClearField("raw_data")
    held.data_location = onnx.TensorProto.EXTERNAL
    held.external_data.append(onnx.StringStringEntryProto(key="location", value="we\0ights"))


CASES = {
    "no inputs": (_inputs("conv"), "conv.*has 0 inputs"),
    "one input of two": (_inputs("conv", "x"), "conv.*has 1 inputs"),
    "too many inputs": (_inputs("relu", "a", "a"), "relu.*has 2 inputs"),
    "an input left out": (_inputs("add", "", "one"), "add.*has no input 'A'"),
    "no outputs": (_outputs("pool"), "pool.*has 0 outputs|'p'"),
    "a deleted weight": (_delete_weight, "conv.*reads 'w'"),
    "an unknown tensor": (_inputs("add", "t", "nowhere"), "add.*reads 'nowhere'"),
    "an output of nothing": (_output_of_nothing, "output 'nowhere'"),
    "pads too short": (_attribute("conv", "pads", [1, 1]), "conv.*different numbers of axes"),
    "odd pads": (_attribute("conv", "pads", [1, 1, 1]), "conv.*different numbers of axes"),
    "strides too long": (_attribute("pool", "strides", [1, 1, 1]), "pool.*different numbers of axes"),
    "stride 0": (_attribute("conv", "strides", [0, 1]), "strides.*positive"),
    "group 0": (_attribute("conv", "group", 0), "group"),
    "an axis twice": (_attribute("turn", "perm", [0, 0, 1, 2]), r"perm.*\[0, 0, 1, 2\]"),
    "perm of one axis": (_attribute("turn", "perm", [0]), "turn|Transpose|perm"),
    "a list for a number": (_attribute("relu", "alpha", [0.1, 0.2]), "alpha.*FLOATS"),
    "a word for a number": (_attribute("conv", "group", "two"), "group.*STRING"),
    "an attribute of its own": (_attribute("relu", "slope", 0.1), "slope.*doesn't have"),
    "a missing attribute": (_attribute("pool", "kernel_shape", None), "kernel_shape.*needs"),
    "a constant with two values": (_constant_of_two, "2 attributes"),
    "a constant of no type": (_constant_of_no_type, "77"),
    "NUL in a file's name": (_nul, "NUL"),
}


@pytest.mark.parametrize("name", CASES)
def test_malformed_models_are_refused_by_name(name):
    change, message = CASES[name]
    model = copy.deepcopy(_good())
    change(model)
    with pytest.raises(ModelError, match=message):
        QuantSim(model).predict({"x": np.ones((1, 2, 6, 6), np.float32)}, simulated=False)


def test_the_model_as_it_was_is_fine():
    assert len(QuantSim(_good()).graph.ops) == 5


def test_a_function_that_calls_itself():
    model = _good()
    body = [helper.make_node("Again", ["i"], ["o"], domain="own")]
    model.functions.append(helper.make_function("own", "Again", ["i"], ["o"], body, [helper.make_opsetid("own", 1)]))
    model.opset_import.append(helper.make_opsetid("own", 1))
    _node(model, "relu").CopyFrom(helper.make_node("Again", ["a"], ["y"], "relu", domain="own"))
    with pytest.raises(ModelError, match=r"Again.*calls itself"):
        QuantSim(model)
