"""Vision transformers with random weights: decibels of the outputs on images that weren't calibrated on.

    pip install torch transformers            # in an environment with bitwright
    python benchmarks/vision_transformers.py
    python benchmarks/vision_transformers.py --only vit --seeds 1 --places

Networks are built from configurations of transformers; nothing is downloaded. `vit` has its class token at zero and
positions of deviation 0.02, as many are initialized, so that the class token is far smaller than the patches on the
same grid; `swin` has linear layers by Xavier, without which its signals fade to nothing. 16 images of noise to
calibrate, 64 others to measure.

Rows: types of weights and activations; "family" with the overrides that `quant_analyzer` proposes from the calibration
images (`bitwright_analysis.family_types`), nothing else. Columns: signal to noise of the logits over all images, and
what the worst image has. `--places` adds, for each kind of tensor, what the outputs have with the sites of that kind
alone on their grids, and the same with all but them.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from bitwright import QuantSim
from bitwright.backend import Tap
from bitwright.graph import transformer
from bitwright_analysis.family_types import family_types

os.environ.setdefault("HF_HUB_OFFLINE", "1")

TARGET = "default_per_channel"
W16A16 = {"weights": "int16", "activations": "uint16"}
ROWS: Mapping[str, tuple[dict[str, Any], bool]] = {
    "W16A16": (W16A16, False),
    "W16A16 minmax": ({**W16A16, "scheme": "minmax"}, False),
    "W16A16 minmax:2": ({**W16A16, "scheme": "minmax:2"}, False),
    "W16A16 family": (W16A16, True),
    "W8A8": ({}, False),
    "W8A8 family": ({}, True),
}
"""Options of `QuantSim`, and whether the family's types are applied."""


class Logits(nn.Module):
    """Images (n, 3, size, size) → logits (n, 10)."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.net(pixel_values=pixel_values).logits


def vit(layers: int = 6) -> tuple[nn.Module, int]:
    from transformers import ViTConfig, ViTForImageClassification

    net = ViTForImageClassification(
        ViTConfig(hidden_size=96, num_hidden_layers=layers, num_attention_heads=4, intermediate_size=384,
                  image_size=64, patch_size=16, num_labels=10)
    )  # fmt: skip
    with torch.no_grad():
        net.vit.embeddings.cls_token.zero_()
        net.vit.embeddings.position_embeddings.normal_(0, 0.02)
    return net, 64


def swin() -> tuple[nn.Module, int]:
    from transformers import SwinConfig, SwinForImageClassification

    net = SwinForImageClassification(
        SwinConfig(image_size=64, patch_size=4, embed_dim=32, depths=[2, 2], num_heads=[2, 4], window_size=4,
                   num_labels=10)
    )  # fmt: skip
    for module in net.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
    return net, 64


NETS: Mapping[str, Callable[[], tuple[nn.Module, int]]] = {"vit": vit, "vit12": lambda: vit(12), "swin": swin}


def images(seed: int, count: int, size: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, 3, size, size)).astype(np.float32)


def decibels(noise: float) -> float:
    return -10 * math.log10(max(noise, 1e-30))


def outputs(sim: QuantSim, x: np.ndarray, simulated: bool) -> np.ndarray:
    return np.concatenate([sim.predict([x[i : i + 16]], simulated=simulated)[0] for i in range(0, len(x), 16)])


def noise(real: np.ndarray, seen: np.ndarray) -> tuple[float, float]:
    """(all images, worst image), in decibels."""
    lost, power = (np.square(v, dtype=np.float64).sum(axis=1) for v in (seen - real, real))
    return decibels(lost.sum() / power.sum()), decibels(float((lost / power).max()))


def places(sim: QuantSim, x: np.ndarray) -> list[tuple[str, int, float, float]]:
    """(kind, sites, outputs with these alone on their grids, outputs with all but these), in decibels."""
    found = transformer(sim.graph)
    groups: dict[str, set[str]] = {}
    for site in sim.plan.activations:
        op = sim.graph.producer(site)
        place = None if found is None else next((found.places[t] for t in (site, *sim.plan.tied(site))
                                                 if t in found.places), None)  # fmt: skip
        name = place.value if place is not None else "input" if op is None else f"other {op.type}"
        groups.setdefault(name, set()).add(site)
    groups["weights"] = set(sim.plan.parameters)
    table = sim.table
    every = {site for sites in groups.values() for site in sites}
    simulation = sim.backend.simulate(sim.native, sim.plan, table)
    taps = [Tap(t) for t in sim.graph.outputs]

    def run(sites: set[str]) -> float:
        simulation.set({s: table[s] if s in sites else None for s in every})
        session = simulation.session(taps)
        (name,) = sim.graph.inputs
        seen = np.concatenate([session.run({name: x[i : i + 16]})[taps[0]] for i in range(0, len(x), 16)])
        return noise(real, np.asarray(seen))[0]

    real = outputs(sim, x, False)
    return sorted(((k, len(s), run(s), run(every - s)) for k, s in groups.items()), key=lambda row: row[2])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=list(NETS), choices=list(NETS))
    parser.add_argument("--rows", nargs="*", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--calibrate", type=int, default=16, help="images")
    parser.add_argument("--test", type=int, default=64, help="images")
    parser.add_argument("--places", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for name in options.only:
        for seed in range(options.seeds):
            torch.manual_seed(seed)
            net, size = NETS[name]()
            seen, other = images(1000 + seed, options.calibrate, size), images(2000 + seed, options.test, size)
            for row in options.rows:
                how, family = ROWS[row]
                begin = time.process_time()
                sim = QuantSim(Logits(net).eval(), seen[:2], target=TARGET, **how).calibrate([seen])
                told = ""
                if family:
                    types = family_types(sim, sim.open([seen]))
                    overrides = {} if types is None else types.overrides
                    sim = QuantSim(Logits(net).eval(), seen[:2], target=TARGET, overrides=overrides, **how)
                    sim.calibrate([seen])
                    changed = [] if types is None else [s.proposed for s in types.sites if s.proposed != s.present]
                    told = ", ".join(f"{changed.count(t)} of {len(sim.plan.activations)} activations {t}"
                                     for t in dict.fromkeys(changed))  # fmt: skip
                here = noise(outputs(sim, seen, False), outputs(sim, seen, True))[0]
                there, worst = noise(outputs(sim, other, False), outputs(sim, other, True))
                print(
                    f"{name:6} {seed} {row:16} {there:6.1f} dB, worst image {worst:6.1f}; calibrated on {here:6.1f}  "
                    f"{time.process_time() - begin:5.1f} CPU s  {told}",
                    flush=True,
                )
                if options.places:
                    for kind, count, alone, without in places(sim, other):
                        print(f"    {kind:24} {count:4} sites: alone {alone:6.1f} dB, all others {without:6.1f}")


if __name__ == "__main__":
    main()
