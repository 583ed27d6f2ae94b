"""Branches of low rank on layers of random weights: what they cost beside `gptq`, and the output error on other tokens.

    OMP_NUM_THREADS=1 python benchmarks/low_rank_cost.py                # the seven layers of a block of SmolLM2-135M
    OMP_NUM_THREADS=1 python benchmarks/low_rank_cost.py --ranks 8 32 128 --bits 3

Errors are sums over the layers of the mean squared output error over the output's power, on tokens that no solver has
seen; "numbers" are those that a branch adds, over those of the weight. Weights are normal, inputs correlated, some
channels larger (as in `gptq_cost.py`): branches of float16, weights in blocks.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
from numpy.typing import NDArray

from bitwright.graph import Op, OpKind, ParamRole
from bitwright.grids import Blockwise, QuantSpec, encoding_of_weights
from bitwright.statistics import LayerMoments
from bitwright.technique import Layer
from bitwright_techniques.gptq import GptqSettings, round_layer
from bitwright_techniques.low_rank import LowRankSettings, correct_layer

BLOCK = ("576x576", "192x576", "192x576", "576x576", "1536x576", "1536x576", "576x1536")
Array = NDArray[np.float32]


def drawn(rng: np.random.Generator, rows: int, features: int, tokens: int) -> tuple[Array, Array, Array]:
    """A weight, tokens to solve on, and others."""
    weight = rng.standard_normal((rows, features), np.float32) / np.float32(np.sqrt(features))
    mixing = rng.standard_normal((features // 4, features), np.float32)
    mixing *= np.where(rng.random(features) < 0.01, 10, 1).astype(np.float32)
    some = rng.standard_normal((2 * tokens, features // 4), np.float32) @ mixing
    some += rng.standard_normal(some.shape, np.float32) * np.float32(0.5 * some.std())
    seen, others = np.split(some, 2)
    return weight, seen, others


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="*", default=BLOCK, help="outputs x inputs")
    parser.add_argument("--group", type=int, default=32, help="features of one scale")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--ranks", type=int, nargs="*", default=(16, 64))
    parser.add_argument("--pairs", type=int, default=3, help="times that `gptq` and the first rank behind it are run")
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    spent = np.zeros((options.pairs, 2))
    methods = ["nearest", "gptq"]
    errors = {(m, r): 0.0 for m in methods for r in (0, *options.ranks)}
    sizes = dict.fromkeys(options.ranks, 0)
    numbers = 0
    for shape in options.shapes:
        weight, seen, others = drawn(rng, *map(int, shape.split("x")), options.tokens)
        op = Op("layer", OpKind.LINEAR, "MatMul", ("x",), ("y",), {ParamRole.WEIGHT: "w"}, None)
        moments = LayerMoments(op, weight.shape[1], paired=False)
        moments.update(seen)
        moments.settle()
        spec = QuantSpec(options.bits, granularity=Blockwise(0, 1, options.group))
        layer = Layer(op, weight, None, moments, encoding_of_weights(weight, spec))
        power = float(np.square(others @ weight.T).sum())
        numbers += weight.size
        for method in methods:
            for rank in options.ranks:
                settings = LowRankSettings(rank=rank, rounding=method, least_gain=0)
                found = correct_layer(layer, settings, {"layer": "float16"})
                error = weight - found.weight
                left = error - found.extra["up"] @ found.extra["down"]
                errors[method, rank] += float(np.square(others @ left.T).sum()) / power
                errors[method, 0] += float(np.square(others @ error.T).sum()) / power / len(options.ranks)
                sizes[rank] += int(found.figures["parameters"]) * (method == "gptq")
        for pair in range(options.pairs):
            begin = time.process_time()
            round_layer(layer, GptqSettings(inputs="float"))
            middle = time.process_time()
            correct_layer(layer, LowRankSettings(rank=options.ranks[0]), {"layer": "float16"})
            spent[pair] += middle - begin, time.process_time() - middle
    print(f"{'rounding':>10}   {'no branch':>10}" + "".join(f"   {f'rank {r}':>10}" for r in options.ranks))
    for method in methods:
        print(f"{method:>10}" + "".join(f"   {errors[method, r]:10.5f}" for r in (0, *options.ranks)))
    print(f"{'numbers':>10}   {'':>10}" + "".join(f"   {100 * sizes[r] / numbers:8.1f} %" for r in options.ranks))
    ratio = np.median(spent[:, 1] / spent[:, 0])
    a, b = np.median(spent, axis=0)
    print(f"CPU seconds: gptq {a:.2f}, with a branch {b:.2f}, ratio {ratio:.2f} (medians of {options.pairs} pairs)")


if __name__ == "__main__":
    main()
