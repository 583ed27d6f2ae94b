"""Recipes against precisions on two real models: accuracy and seconds of each, one table a model.

    python benchmarks/recipes.py lite0 lite0.onnx --images imagenet.tar --json recipes.json
    python benchmarks/recipes.py minilm --data stsb-en-test.csv --json recipes.json

Lite0: top-1 in percent, per-channel weights, the first half of the images calibrates, the second is evaluated.
MiniLM: Spearman's correlation × 100 on STS-B (see minilm.py). Cells already in the JSON file aren't run again.
Seconds are CPU time of all threads, with calibration, without evaluation.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

TYPES = {
    "W8A8": ("int8", "uint8"),
    "W6A8": ("int6", "uint8"),
    "W4A8": ("int4", "uint8"),
    "W4A16": ("int4", "uint16"),
}
FOLD, CLE, CORRECT = ("fold_batch_norm", {}), ("cross_layer_equalization", {}), ("bias_correction", {})
CONVOLUTIONAL = {
    "nearest": (FOLD,),
    "cle": (FOLD, CLE),
    "bias_correction": (FOLD, CORRECT),
    "cle, bias_correction": (FOLD, CLE, CORRECT),
    "seq_mse": (FOLD, ("seq_mse", {})),
    "gptq": (FOLD, ("gptq", {})),
    "adaround": (FOLD, ("adaround", {})),
    "cle, adaround": (FOLD, CLE, ("adaround", {})),
}
TRANSFORMER = {
    "nearest": (),
    "bias_correction": (CORRECT,),
    "smooth_quant": (("smooth_quant", {}),),
    "seq_mse": (("seq_mse", {}),),
    "gptq": (("gptq", {}),),
    "adaround": (("adaround", {}),),
}
Measure = Callable[[str, str, tuple], tuple[float, float]]


def lite0(options: argparse.Namespace) -> tuple[float, Measure]:
    from imagenet import photos

    from bitwright.simulation import QuantSim

    images, labels = photos(options.images)
    half = len(images) // 2
    calibration, evaluation, truth = images[:half], {"image": images[half:]}, labels[half:]

    def score(sim: QuantSim, *, simulated: bool = True) -> float:
        return 100 * float((sim.predict(evaluation, simulated=simulated)[0].argmax(1) == truth).mean())

    def measure(weights: str, activations: str, steps: tuple) -> tuple[float, float]:
        begin = time.process_time()
        sim = QuantSim(options.model, weights=weights, activations=activations)
        for name, settings in steps:
            sim.apply(name, {"image": calibration[: options.samples]}, **settings)
        sim.calibrate({"image": calibration})
        seconds = time.process_time() - begin
        return score(sim), seconds

    return score(QuantSim(options.model), simulated=False), measure


def minilm(options: argparse.Namespace) -> tuple[float, Measure]:
    from minilm import correlation, embed, opened

    from bitwright.simulation import QuantSim

    held = opened(options.data, pairs=options.pairs, calibrate=128)

    def measure(weights: str, activations: str, steps: tuple) -> tuple[float, float]:
        begin = time.process_time()
        sim = QuantSim(held.captured, weights=weights, activations=activations)
        for name, settings in steps:
            sim.apply(name, held.calibration, **settings)
        sim.calibrate(held.calibration)
        seconds = time.process_time() - begin
        return 100 * correlation(embed(sim.model, held.batches), held.scores), seconds

    return 100 * correlation(embed(held.net, held.batches), held.scores), measure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("subject", choices=("lite0", "minilm"))
    parser.add_argument("model", nargs="?", type=Path, help="lite0.onnx")
    parser.add_argument("--images", help="a .tar or folder of *_LABEL.jpg")
    parser.add_argument("--data", type=Path, help="stsb-en-test.csv")
    parser.add_argument("--pairs", type=int, help="of sentences for MiniLM; default: all")
    parser.add_argument("--samples", type=int, default=64, help="images for the layer by layer techniques of Lite0")
    parser.add_argument("--types", default=",".join(TYPES))
    parser.add_argument("--recipes", help="only those whose name holds one of these words, by comma")
    parser.add_argument("--json", type=Path, default=Path("recipes.json"))
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = str(options.threads)
    done: dict[str, Any] = json.loads(options.json.read_text()) if options.json.exists() else {}
    plain, measure = (lite0 if options.subject == "lite0" else minilm)(options)
    recipes = CONVOLUTIONAL if options.subject == "lite0" else TRANSFORMER
    words = options.recipes.split(",") if options.recipes else [""]
    for kind in options.types.split(","):
        for name, steps in recipes.items():
            key = f"{options.subject}/{kind}/{name}"
            if key not in done and any(word in name for word in words):
                done[key] = measure(*TYPES[kind], steps)
                options.json.write_text(json.dumps(done, indent=1))
                print(f"{key:44} {done[key][0]:6.2f}  {done[key][1]:5.0f} s", flush=True)
    print(
        f"\n{options.subject}, float {plain:.2f}\n\n| recipe | "
        + " | ".join(TYPES)
        + " |\n|"
        + "---|" * (len(TYPES) + 1)
    )
    for name in recipes:
        cells = [done.get(f"{options.subject}/{kind}/{name}") for kind in TYPES]
        shown = ["" if cell is None else f"{cell[0]:.1f} ({cell[1]:.0f} s)" for cell in cells]
        print(f"| {name} | " + " | ".join(shown) + " |")


if __name__ == "__main__":
    main()
