"""torchao: weights only in int4; rows are how scales are chosen, the grid, and the type."""

from __future__ import annotations

import torch
from common import bench, forward
from torchao.quantization import IntxWeightOnlyConfig, PerAxis, PerGroup, quantize_
from torchao.quantization.quant_api import Int4WeightOnlyConfig
from torchao.quantization.quant_primitives import MappingType
from torchao.quantization.quantize_.workflows import IntxChooseQParamsAlgorithm

run = bench()
technique, kind, symmetry = run.row.split(" ")
net = run.network()


def layers(module, name):
    return isinstance(module, torch.nn.Linear) and "lm_head" not in name


def gptq(step):
    from torchao.prototype.gptq import GPTQConfig

    return GPTQConfig(step=step, base_config=Int4WeightOnlyConfig(group_size=32))


def quantized():
    if technique == "gptq":
        quantize_(net, gptq("observe"), filter_fn=layers)
        for tokens in run.tokens():
            net(tokens)
        quantize_(net, gptq("convert"), filter_fn=layers)
        return
    chosen = {"nearest": "AFFINE", "hqq": "HQQ_SCALE_ONLY"}[technique]
    config = IntxWeightOnlyConfig(
        torch.int4, PerGroup(32) if kind == "block32" else PerAxis(0),
        MappingType.SYMMETRIC if symmetry == "sym" else MappingType.ASYMMETRIC,
        intx_choose_qparams_algorithm=IntxChooseQParamsAlgorithm[chosen],
    )  # fmt: skip
    quantize_(net, config, filter_fn=layers)


run.seconds(quantized)
run.end(forward(net), "torchao", "torch")
