"""bitwright in PyTorch: weights only; rows are techniques, joined by `+`, and what they take for weights."""

from __future__ import annotations

import torch
from common import bench

from bitwright.simulation import QuantSim

TARGETS = {"sym": "default_per_channel", "asym": "w4a16_asymmetric"}
CODES = {"sym": "int4", "asym": "uint4"}
BLOCKS = {"block32": ":block32", "channel": ""}
FLOAT = {"*embed_tokens": {"weights": "float"}, "*lm_head": {"weights": "float"}}

run = bench()
steps, kind, symmetry = run.row.split(" ")


class Logits(torch.nn.Module):
    """Token ids → logits alone."""

    def __init__(self, net: torch.nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.net(input_ids=input_ids).logits


net = Logits(run.network())


def quantized() -> QuantSim:
    sim = QuantSim(
        net, {"input_ids": run.tokens()[0]}, target=TARGETS[symmetry], weights=CODES[symmetry] + BLOCKS[kind],
        activations="float", overrides=FLOAT,
    )  # fmt: skip
    data = sim.open({"input_ids": run.calibration}, batch_size=1)
    for step in steps.split("+"):
        if step != "nearest":
            sim.apply(step, data)
    return sim.calibrate(data)


sim = run.seconds(quantized)
run.end(lambda ids: sim.predict({"input_ids": ids})[0], "bitwright", "torch")
