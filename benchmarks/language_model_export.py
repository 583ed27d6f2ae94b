"""A language model's export from PyTorch, weights alone in 8 bits: CPU seconds, and memory above what there was.

    pip install torch transformers safetensors              # in an environment with bitwright
    python benchmarks/language_model_export.py FOLDER       # config.json, model.safetensors and a tokenizer

Memory is the process's (VmHWM and VmRSS of Linux), in MiB.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import language_model
import torch

from bitwright import QuantSim


def status(key: str) -> float:
    """A size of this process, in MiB."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:")) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, help="the first so many alone, to try the script")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    net = language_model.opened(options.folder, options.layers)
    data = language_model.spread(language_model.sequences(options.folder, None, 256)[0], 1)
    size = sum(p.numel() * p.element_size() for p in net.parameters()) / 2**20
    begin = time.process_time()
    sample = {"input_ids": torch.from_numpy(data["input_ids"])}
    sim = QuantSim(net, sample, target=language_model.TARGET, activations="float")
    print(f"open       {time.process_time() - begin:6.1f} CPU s")
    sim.calibrate(sim.open(data, batch_size=1))
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak begins anew
    before, begin = status("VmRSS"), time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        sim.export(folder)
        seconds, peak = time.process_time() - begin, status("VmHWM") - before
        print(
            f"export     {seconds:6.1f} CPU s, {peak:.0f} MiB at its peak, {peak / size:.2f} of the model's {size:.0f}"
        )
        for file in sorted(p for p in Path(folder).rglob("*") if p.is_file()):
            print(f"  {file.name:24} {file.stat().st_size / 2**20:8.1f} MiB")


if __name__ == "__main__":
    main()
