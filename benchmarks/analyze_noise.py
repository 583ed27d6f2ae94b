"""quant_analyzer on EfficientNet-Lite0: noise is put into one layer; does it name the layer? Do batches matter?

    python benchmarks/analyze_noise.py lite0.onnx --images imagenet.tar [--layers 5] [--steps 16]

The weights of one layer get a grid that is `--steps` times as coarse (16: as if it had lost 4 bits), the rest is W8A8.
Layers are drawn by a seeded generator. Then one analysis is repeated with another batch size.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from imagenet import photos

from bitwright import quant_analyzer
from bitwright.simulation import QuantSim


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--images", help="a .tar or folder of *_LABEL.jpg; default: foolbox's 20 photos")
    parser.add_argument("--samples", type=int, default=16, help="images that calibrate and are analysed")
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--steps", type=float, default=16.0)
    options = parser.parse_args()
    data = {"image": photos(options.images)[0][: options.samples]}

    def analysed(noisy: str | None, batch_size: int = 8):
        sim = QuantSim(options.model).apply("fold_batch_norm").calibrate(data)
        if noisy is not None:
            weight = sim.graph.op(noisy).weight
            held = sim.encodings[weight]
            sim.set({weight: held.with_(scale=held.scale * np.float32(options.steps))}, freeze=True)
        return quant_analyzer(sim, data, directions=("alone",), sweep_samples=8, batch_size=batch_size)

    layers = [op.id for op in QuantSim(options.model).graph.linear_ops]
    drawn = [layers[i] for i in np.random.default_rng(0).choice(len(layers), options.layers, replace=False)]
    named = 0
    for layer in drawn:
        ranking = [s.unit for s in analysed(layer).ranking("layer")]
        named += ranking[0] == layer
        print(f"noise in {layer}: at place {ranking.index(layer) + 1} of {len(ranking)}", flush=True)
    print(f"named first: {named} of {len(drawn)}")
    a, b = analysed(None, 8), analysed(None, 3)
    apart = max(abs(x.sqnr_db - y.sqnr_db) for x, y in zip(a.layers, b.layers, strict=True) if np.isfinite(x.sqnr_db))
    print(f"batches of 8 and of 3: SQNR of layers apart by at most {apart:.1e} dB")


if __name__ == "__main__":
    main()
