"""llmcompressor: its one-shot entry with its modifiers for weights; rows are a modifier, the grid, and the type."""

from __future__ import annotations

from common import bench, forward
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.awq import AWQModifier
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier

MODIFIERS = {"gptq": GPTQModifier, "awq": AWQModifier, "nearest": QuantizationModifier}

run = bench()
technique, kind, symmetry = run.row.split(" ")
group = {"strategy": "group", "group_size": 32} if kind == "block32" else {"strategy": "channel"}
weights = QuantizationArgs(num_bits=4, type="int", symmetric=symmetry == "sym", **group)
groups = {"layers": QuantizationScheme(targets=["Linear"], weights=weights)}
data = Dataset.from_dict({"input_ids": run.calibration.tolist(), "attention_mask": (run.calibration >= 0).tolist()})
net = run.network()


def quantized():
    oneshot(
        model=net, dataset=data, recipe=MODIFIERS[technique](config_groups=groups, ignore=["lm_head"]), batch_size=1,
        num_calibration_samples=len(run.calibration), max_seq_length=run.calibration.shape[1],
        shuffle_calibration_samples=False,
    )  # fmt: skip


run.seconds(quantized)
if technique == "gptq":  # the others leave weights to be rounded in each pass
    run.same_type(net, 32 if kind == "block32" else 0)
run.end(forward(net.eval()), "llmcompressor", "compressed-tensors", "torch")
