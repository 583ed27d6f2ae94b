"""What the tests of workers have done in other processes; imports little, as each process imports it."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from bitwright.errors import InputError

if TYPE_CHECKING:
    from bitwright.technique import Layer, LayerResult


def logged(folder: Path, name: str) -> int:
    """Note that a task runs; how often it has by now."""
    with (folder / name).open("a") as file:
        file.write("x")
    return (folder / name).stat().st_size


def square(folder: Path, n: int, kills: int = 0) -> int:
    """n², after its worker has been killed so often."""
    if logged(folder, str(n)) <= kills:
        os.kill(os.getpid(), signal.SIGKILL)
    return n * n


def fail(n: int) -> int:
    raise InputError(f"{n} can't be used")


def shifted(layer: Layer, folder: Path | None = None, killed: str = "") -> LayerResult:
    """Nearest rounding, and a bias that depends on every bit of the moments."""
    from bitwright.technique import LayerResult

    if folder is not None and logged(folder, layer.op.id) == 1 and layer.op.id == killed:
        os.kill(os.getpid(), signal.SIGKILL)
    encoding = layer.encoding.with_(frozen=True, source="test")
    shift = layer.moments.qq.sum() * 1e-6 + layer.moments.mean_quantized.sum() * 1e-3
    outputs = len(layer.weight) if layer.bias is None else len(layer.bias)
    return LayerResult(encoding.fake_quantize(layer.weight), encoding, np.full(outputs, shift, np.float32))


def slow(layer: Layer) -> LayerResult:
    time.sleep(0.05 if layer.op.id == "q" else 0)
    return shifted(layer)


def guilty(layer: Layer, folder: Path) -> LayerResult:
    logged(folder, layer.op.id)
    if layer.op.id == "gate_fc":
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGKILL)
    return shifted(layer)
