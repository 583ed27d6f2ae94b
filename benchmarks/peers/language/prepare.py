"""Token ids that calibrate and that are tested on, and the float network's logits for the latter, as arrays."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
from language_model import opened, sequences, spread

parser = argparse.ArgumentParser()
parser.add_argument("folder", type=Path)
parser.add_argument("work", type=Path)
parser.add_argument("--text", type=Path)
parser.add_argument("--length", type=int, required=True)
parser.add_argument("--calibrate", type=int, required=True)
parser.add_argument("--test", type=int, required=True)
options = parser.parse_args()
torch.set_num_threads(1)
calibration, _, test = sequences(options.folder, options.text, options.length)
np.save(options.work / "calibration.npy", spread(calibration, options.calibrate)["input_ids"])
rows = spread(test, options.test)["input_ids"]
np.save(options.work / "test.npy", rows)
net = opened(options.folder, None)
kept = None
with torch.inference_mode():
    for index, row in enumerate(rows):
        logits = net(torch.from_numpy(row[None])).numpy()[0]
        if kept is None:
            shape = (len(rows), *logits.shape)
            kept = np.lib.format.open_memmap(options.work / "reference.npy", "w+", np.float32, shape)
        kept[index] = logits
