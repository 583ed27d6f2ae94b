"""AutoRound: rows are iterations of a block × sequences of each (0x8: nearest, its own search of scales), the grid, and
the type."""

from __future__ import annotations

import torch
from auto_round import AutoRound
from common import bench, forward, weights
from transformers import AutoTokenizer

run = bench()
schedule, kind, symmetry = run.row.split(" ")
iterations, sequences = map(int, schedule.split("x"))
net = run.network()
rounder = AutoRound(
    net, AutoTokenizer.from_pretrained(run.folder), iters=iterations, bits=4,
    group_size=32 if kind == "block32" else -1, sym=symmetry == "sym", dataset=run.tokens(),
    nsamples=len(run.calibration), seqlen=run.calibration.shape[1], batch_size=sequences, device_map="cpu",
    enable_torch_compile=False,
)  # fmt: skip
tuned, _ = run.seconds(rounder.quantize)
found = weights(tuned)  # in bfloat16, as all of the network is after it: here the layers alone are its
net = run.network()
with torch.no_grad():
    for name, weight in weights(net).items():
        weight.copy_(found[name])
run.same_type(net, 32 if kind == "block32" else 0)
run.end(forward(net), "auto-round", "torch")
