"""``bitwright analyze --bank``: what each layer loses at its types, in closed form; no data, and nothing runs."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from bitwright.bank import Bank, tensor_noise, weight_noise
from bitwright.files import make_directory, write_text
from bitwright.simulation import QuantSim
from bitwright_analysis.scoring import decibels


@dataclass(frozen=True)
class LayerNoise:
    """One linear op.

    Attributes:
        layer: its name.
        weights_db: signal to noise of its output, in decibels, with rounded weights alone; None without noise.
        inputs_db: that of its input on its grid; None without noise, or where the input isn't quantized.
    """

    layer: str
    weights_db: float | None
    inputs_db: float | None


def layer_noises(sim: QuantSim, bank: Bank) -> list[LayerNoise]:
    """Every layer with a quantized weight of which the bank has moments, the noisiest weight first.

    Args:
        sim: calibrated; its float network is the bank's.
        bank: collected on it.

    Raises:
        InputError: the bank lacks a tensor.
    """
    found = []
    for op in sim.graph.linear_ops:
        if op.weight is None or op.weight not in sim.encodings or op.id not in bank.record.layers:
            continue
        weights = weight_noise(bank, op, sim.params[op.weight], sim.encodings[op.weight])
        tensor = op.data_inputs[0]
        root = sim.plan.root(tensor) if tensor in sim.plan else tensor
        # An input that takes its grid from another tensor has the values of that one, or a part of them.
        held = tensor in bank.record.tensors and root in sim.encodings
        inputs = tensor_noise(bank, tensor, sim.encodings[root]) if held else 0.0
        found.append(LayerNoise(op.id, decibels(weights), decibels(inputs)))
    return sorted(found, key=lambda n: float("inf") if n.weights_db is None else n.weights_db)


def write(noises: list[LayerNoise], out: Path) -> Path:
    """``layers.json``: a list of layers, the noisiest first."""
    return write_text(make_directory(out) / "layers.json", json.dumps([asdict(n) for n in noises], indent=1) + "\n")
