"""Solving layers on workers: seconds by layer size, bytes that travel, scaling. The figures of docs/clusters.md.

    python benchmarks/cluster.py sweep             # seconds and bytes by K and N, and the cost model fitted to them
    python benchmarks/cluster.py scaling           # a transformer's layers on 0, 1 and 2 processes, and 2 Dask workers

Layers are random: normal weights, and moments of correlated normal inputs. Set OMP_NUM_THREADS=1. The sweep's
seconds are the processor's; for scaling nothing else may run: `load` is what the machine was busy with meanwhile.
"""

from __future__ import annotations

import argparse
import itertools
import os
import pickle
import time
from functools import partial

import numpy as np

from bitwright.graph import Op, OpKind, ParamRole
from bitwright.grids import QuantSpec, encoding_of_weights
from bitwright.layerwise import solution
from bitwright.statistics import LayerMoments
from bitwright.technique import Layer, seeded
from bitwright.workers import open_workers
from bitwright_techniques import adaround, gptq, seq_mse

SWEEP = [(256, 256), (256, 1024), (512, 512), (512, 2048), (1024, 1024), (1024, 4096), (2048, 2048), (4096, 1024)]
"""(K, N)."""


def adarounded(layer, settings):
    return adaround.round_layer(layer, settings, seeded(0, layer.op.id))


RULES = {
    "gptq": partial(gptq.round_layer, settings=gptq.GptqSettings(inputs="float", bias_correction=True)),
    "adaround": partial(adarounded, settings=adaround.AdaRoundSettings(inputs="float", bias_correction=True)),
    "seq_mse": partial(seq_mse.scale_layer, settings=seq_mse.SeqMseSettings(inputs="float")),
}


def made(name: str, features: int, outputs: int, seed: int = 0) -> Layer:
    rng = np.random.default_rng(seed)
    op = Op(name, OpKind.LINEAR, "MatMul", ("x",), ("y",), {ParamRole.WEIGHT: "w"})
    moments = LayerMoments(op, features, 1, paired=False)
    mixing = rng.normal(0, 1, (64, features)).astype(np.float32) / 8
    for _ in range(4):
        x = rng.normal(0, 1, (features // 2, features)) + rng.normal(0, 1, (features // 2, 64)) @ mixing
        moments.update(x.astype(np.float32))
    weight = rng.normal(0, features**-0.5, (outputs, features)).astype(np.float32)
    return Layer(op, weight, None, moments, encoding_of_weights(weight, QuantSpec(4, True, True)))


def sweep() -> None:
    rows = []
    print("technique       K      N   CPU s     MB sent   MB returned")
    for rule, solve in RULES.items():
        for features, outputs in SWEEP:
            layer = made("layer", features, outputs)
            begin = time.process_time()
            result = solution(solve, layer)
            seconds = time.process_time() - begin
            sent, returned = len(pickle.dumps((solve, layer), 5)), len(pickle.dumps(result, 5))
            rows.append((rule, features, outputs, seconds))
            print(
                f"{rule:10} {features:6} {outputs:6} {seconds:9.2f} {sent / 1e6:9.1f} {returned / 1e6:9.1f}", flush=True
            )
    print("\nseconds = a K³ + b N K² + c N K, fitted to relative errors")
    for rule in RULES:
        _, k, n, t = (np.array(c) for c in zip(*[r for r in rows if r[0] == rule], strict=True))
        k, n = k.astype(float), n.astype(float)
        terms = np.stack([k**3, n * k**2, n * k], 1)
        a, b, c = nonnegative(terms / t[:, None])
        off = terms @ [a, b, c] / t
        print(
            f"{rule:10} a = {a:.3g}, b = {b:.3g}, c = {c:.3g}; model over measured {off.min():.2f} to {off.max():.2f}"
        )
        for parameters, width, blocks in TRANSFORMERS:
            layers = [(width, width)] * 4 + [(width, 4 * width), (4 * width, width)]
            total = blocks * sum(a * k**3 + b * n * k**2 + c * n * k for k, n in layers)
            sent = blocks * sum(8 * k * k + 4 * n * k for k, n in layers) / 1e9
            returned = blocks * sum(4 * n * k for k, n in layers) / 1e9
            print(f"    {parameters:7} {total / 3600:12.3g} core hours, {sent:9.3g} GB sent, {returned:9.3g} returned")


TRANSFORMERS = (("1e9", 2048, 20), ("1e10", 5120, 32), ("1e11", 12288, 55))
"""Parameters, width d and blocks, 12 d² a block."""


def nonnegative(terms: np.ndarray) -> np.ndarray:
    """Least squares to ones with no factor below 0: the best of all choices of terms."""
    count, best = terms.shape[1], (np.inf, np.zeros(terms.shape[1]))
    for chosen in (c for n in range(1, count + 1) for c in itertools.combinations(range(count), n)):
        found, *_ = np.linalg.lstsq(terms[:, chosen], np.ones(len(terms)), rcond=None)
        error = float(np.square(terms[:, chosen] @ found - 1).sum())
        if (found >= 0).all() and error < best[0]:
            best = error, np.zeros(count)
            best[1][list(chosen)] = found
    return best[1]


def scaling(rule: str, width: int, blocks: int) -> None:
    shapes = [(width, width)] * 4 + [(width, 4 * width), (4 * width, width)]
    layers = [made(f"{b}.{i}", *shape, seed=b) for b in range(blocks) for i, shape in enumerate(shapes)]
    solve = RULES[rule]
    wall: dict[str, float] = {}
    results = {}
    for name, given in (("here", None), ("1 process", pool_of_one), ("2 processes", 2), ("2 of Dask", "local:2")):
        try:
            workers = open_workers(given)
        except ImportError as error:
            print(name, error)
            continue
        if workers is None:
            begin = time.perf_counter()
            results[name] = [solution(solve, layer) for layer in layers]
        else:
            with workers:
                # Workers import and warm up first.
                warm = made("warm", 64, 64)
                list(workers.map(solution, [(solve, warm)] * workers.width, ["warm"] * workers.width))
                begin = time.perf_counter()
                results[name] = list(workers.map(solution, [(solve, x) for x in layers], [x.op.id for x in layers]))
                wall[name] = time.perf_counter() - begin
        wall.setdefault(name, time.perf_counter() - begin)
        equal = all(np.array_equal(a.weight, b.weight) for a, b in zip(results[name], results["here"], strict=True))
        told = f"{wall[name]:.1f} s, bit-equal {equal}; load {os.getloadavg()[0]:.1f}"
        print(f"{rule}, {len(layers)} layers, {name}: {told}", flush=True)
    if "2 processes" in wall:
        print(f"1 process / 2 processes = {wall['1 process'] / wall['2 processes']:.2f}")


def pool_of_one():
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    return ProcessPoolExecutor(1, mp_context=get_context("spawn"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("sweep", "scaling"))
    parser.add_argument("--rule", choices=tuple(RULES), default="adaround")
    parser.add_argument("--width", type=int, default=768, help="d: a block has four layers of d × d and two of d × 4d")
    parser.add_argument("--blocks", type=int, default=3)
    arguments = parser.parse_args()
    threads = os.environ.get("OMP_NUM_THREADS")
    print(f"load {os.getloadavg()[0]:.1f}, {os.cpu_count()} processors, OMP_NUM_THREADS={threads}")
    sweep() if arguments.what == "sweep" else scaling(arguments.rule, arguments.width, arguments.blocks)
