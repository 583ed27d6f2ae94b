"""What the benchmarks of quantization-aware training (qat_*.py) share: options, and a line for each network."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import fashion_mnist


def parser(description):
    """Options that all of them have."""
    found = argparse.ArgumentParser(description=description)
    found.add_argument("--data", type=Path, default=fashion_mnist.FOLDER)
    found.add_argument("--epochs", type=int, default=4, help="of QAT; float training takes 1.5 times as many")
    found.add_argument("--limit", type=int, default=60000)
    found.add_argument("--rate", type=float, default=2e-3)
    found.add_argument("--grid-factor", type=float, default=5.0, help="learning rate of learned grids to weights'")
    found.add_argument("--seed", type=int, default=0, help="order of the images in QAT")
    return found


class Lines:
    """Prints accuracy in percent, loss, and the seconds since the line before."""

    def __init__(self):
        self.begin = time.perf_counter()

    def __call__(self, what, measured, more=""):
        accuracy, loss = measured
        seconds = time.perf_counter() - self.begin
        print(f"{what:30} {accuracy:6.2f} %  loss {loss:.4f}  {seconds:6.1f} s  {more}".rstrip(), flush=True)
        self.begin = time.perf_counter()
