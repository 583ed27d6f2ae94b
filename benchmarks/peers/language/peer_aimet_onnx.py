"""AIMET-onnx: weights only, in blocks; rows are the technique, the grid, and the type."""

from __future__ import annotations

import onnx
import onnxruntime
import torch
from aimet_onnx import QuantizationSimModel, apply_seq_mse
from aimet_onnx.quantsim import set_blockwise_quantization_for_weights
from aimet_onnx.utils import duplicate_shared_initializers
from common import bench, weights

run = bench()
technique, kind, symmetry = run.row.split(" ")
net = run.network()


class Logits(torch.nn.Module):
    """Token ids → logits alone."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net

    def forward(self, input_ids):
        mask = input_ids >= 0
        return self.net(input_ids=input_ids, attention_mask=mask, use_cache=False).logits


path = run.work / f"aimet_{technique}.onnx"
torch.onnx.export(
    Logits(), (run.tokens()[0],), path, input_names=["input_ids"], output_names=["logits"], dynamo=True,
    external_data=False, verbose=False,
)  # fmt: skip
model = onnx.load(path)
duplicate_shared_initializers(model.graph)  # AIMET asks for it: embedding and head are one matrix
matrices = {x.name: tuple(x.dims) for x in model.graph.initializer if len(x.dims) == 2}
products = [n for n in model.graph.node if n.op_type in {"MatMul", "Gemm"}]
others = sorted(n.name for n in products if not any(max(matrices.get(i, (10**9,))) < 10_000 for i in n.input))
kept = {i for n in products if n.name not in others for i in n.input if i in matrices}
assert len(kept) == len(weights(net)), f"{len(kept)} layers"
feeds = [{"input_ids": row[None]} for row in run.calibration]


def plain(session):
    return lambda ids: session.run(None, {"input_ids": ids})[0]


options = onnxruntime.SessionOptions()
options.intra_op_num_threads = options.inter_op_num_threads = 1
run.same(plain(onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])))


def quantized() -> QuantizationSimModel:
    sim = QuantizationSimModel(
        model, param_type="int4", activation_type="int16", providers=["CPUExecutionProvider"],
        session_options_kwargs={"intra_op_num_threads": 1, "inter_op_num_threads": 1},
    )  # fmt: skip
    for name, quantizer in sim.qc_quantize_op_dict.items():
        if name not in kept:
            quantizer.enabled = False
    if kind == "block32":
        set_blockwise_quantization_for_weights(
            sim, ("MatMul", "Gemm"), 4, symmetry == "sym", 32, nodes_to_exclude=others
        )
    if technique == "seq_mse":
        apply_seq_mse(sim, feeds, nodes_to_exclude=others)
    sim.compute_encodings(feeds[:1])
    return sim


sim = run.seconds(quantized)
run.end(plain(sim.session), "aimet-onnx", "onnxruntime")
