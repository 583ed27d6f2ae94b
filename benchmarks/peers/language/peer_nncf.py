"""NNCF: `compress_weights` of the OpenVINO model, which has all its options; rows are those, the grid, and the type."""

from __future__ import annotations

import nncf
import numpy as np
import openvino
from common import bench, weights

FOUR = {"sym": "<Type: 'int4_t'>", "asym": "<Type: 'uint4_t'>"}

run = bench()
options, kind, symmetry = run.row.split(" ")
net = run.network()


class Logits(type(net)):  # type: ignore[misc]
    """Token ids → logits alone."""

    def forward(self, input_ids):
        mask = input_ids >= 0  # without one, transformers looks for packed sequences by an op that OpenVINO lacks
        return super().forward(input_ids=input_ids, attention_mask=mask, use_cache=False).logits


net.__class__ = Logits
model = openvino.convert_model(net, example_input=run.tokens()[0], input=[("input_ids", [1, -1], np.int64)])
dataset = nncf.Dataset([{"input_ids": row[None]} for row in run.calibration])
chosen = {name: True for name in ("awq", "scale_estimation", "gptq") if name in options.split("+")}

exact = {
    "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0, "INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1,
    "NUM_STREAMS": 1,
}  # fmt: skip


def session(network):
    """Logits of token ids, with activations in float: OpenVINO rounds them to 8 bits beside 4-bit weights by itself."""
    compiled = openvino.compile_model(network, "CPU", exact)
    return lambda ids: compiled([ids])[0]


run.same(session(model))


def quantized():
    return nncf.compress_weights(
        model, mode=nncf.CompressWeightsMode[f"INT4_{symmetry.upper()}"], ratio=1.0,
        group_size=32 if kind == "block32" else -1, dataset=dataset if chosen else None,
        subset_size=len(run.calibration), backup_mode=nncf.BackupMode.NONE, **chosen,
    )  # fmt: skip


model = run.seconds(quantized)
constants = [op for op in model.get_ops() if op.get_type_name() == "Constant"]
ranks = [len(op.get_output_shape(0)) for op in constants if str(op.get_element_type()) == FOUR[symmetry]]
count = ranks.count(3 if kind == "block32" else 2)
assert count >= len(weights(net)), f"{count} of {len(weights(net))} layers have 4 bits"
run.end(session(model), "nncf", "openvino", "torch")
