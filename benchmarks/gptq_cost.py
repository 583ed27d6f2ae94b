"""GPTQ beside the textbook's, both in numpy on the same tokens: CPU time and output error on other tokens, by layer.

    OMP_NUM_THREADS=1 python benchmarks/gptq_cost.py                    # the seven layers of a block of SmolLM2-135M
    OMP_NUM_THREADS=1 python benchmarks/gptq_cost.py --group 0 --shapes 2048x2048 8192x2048

The textbook's is algorithm 1 of Frantar et al. 2023 as the reference implementation has it: float32, lazy updates of
128 columns, scales that cover a group's values when its turn comes, 1 % damping, columns as they stand. Both take
tokens in sequences of 256 and sum their second moments. Weights are normal, inputs correlated, some channels larger.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
from numpy.typing import NDArray

from bitwright.graph import Op, OpKind, ParamRole
from bitwright.grids import Blockwise, PerChannel, QuantSpec, encoding_of_weights
from bitwright.statistics import LayerMoments
from bitwright.technique import Layer
from bitwright_techniques.gptq import GptqSettings, round_layer

BLOCK = ("576x576", "192x576", "192x576", "576x576", "1536x576", "1536x576", "576x1536")
SEQUENCE = 256
Array = NDArray[np.float32]


def textbook(weight: Array, tokens: Array, group: int, bits: int, damping: float = 0.01, block: int = 128) -> Array:
    """Rounded weight (out, in)."""
    features = weight.shape[1]
    gram = np.zeros((features, features), np.float32)
    for start in range(0, len(tokens), SEQUENCE):
        part = tokens[start : start + SEQUENCE]
        gram += part.T @ part
    gram[np.diag_indices(features)] += damping * np.diag(gram).mean()
    upper = np.linalg.cholesky(np.linalg.inv(gram)).T
    free, values = np.ascontiguousarray(weight.T), np.empty((features, len(weight)), np.float32)
    top = 2 ** (bits - 1) - 1
    scale = np.abs(free).max(axis=0) / (top + 0.5)
    for begin in range(0, features, block):
        end = min(begin + block, features)
        part, spread = free[begin:end], np.empty((end - begin, len(weight)), np.float32)
        for k in range(end - begin):
            if group and (begin + k) % group == 0:
                scale = np.abs(part[k : k + group]).max(axis=0) / (top + 0.5)
            value = np.clip(np.rint(part[k] / scale), -top - 1, top) * scale
            values[begin + k] = value
            spread[k] = (part[k] - value) / upper[begin + k, begin + k]
            part[k + 1 :] -= upper[begin + k, begin + k + 1 : end, None] * spread[k]
        free[end:] -= upper[begin:end, end:].T @ spread
    return values.T


def ours(weight: Array, tokens: Array, group: int, bits: int) -> Array:
    """As `textbook`, by `gptq` at its defaults for transformers (each layer on its float inputs)."""
    op = Op("layer", OpKind.LINEAR, "MatMul", ("x",), ("y",), {ParamRole.WEIGHT: "w"}, None)
    moments = LayerMoments(op, weight.shape[1], paired=False)
    for start in range(0, len(tokens), SEQUENCE):
        moments.update(tokens[start : start + SEQUENCE])
    spec = QuantSpec(bits, granularity=Blockwise(0, 1, group) if group else PerChannel(0))
    layer = Layer(op, weight, None, moments, encoding_of_weights(weight, spec))
    return round_layer(layer, GptqSettings(inputs="float")).weight


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="*", default=BLOCK, help="outputs x inputs")
    parser.add_argument("--group", type=int, default=32, help="features of one scale; 0: one scale a row")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--pairs", type=int, default=5, help="times that both are run in turn")
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    totals = np.zeros((options.pairs, 2))
    print(f"{'layer':>10}   textbook, s   ours, s   error of the textbook's   of ours")
    for shape in options.shapes:
        rows, features = map(int, shape.split("x"))
        weight = rng.standard_normal((rows, features), np.float32) / np.float32(np.sqrt(features))
        mixing = rng.standard_normal((features // 4, features), np.float32) * np.where(
            rng.random(features) < 0.01, 10, 1
        )
        some = rng.standard_normal((2 * options.tokens, features // 4), np.float32) @ mixing.astype(np.float32)
        some += rng.standard_normal(some.shape, np.float32) * np.float32(0.5 * some.std())
        seen, others = np.split(some, 2)
        spent, errors = np.empty_like(totals), [0.0, 0.0]
        for pair in range(options.pairs):
            for i, solve in enumerate((textbook, ours)):
                begin = time.process_time()
                rounded = solve(weight, seen, options.group, options.bits)
                spent[pair, i] = time.process_time() - begin
                errors[i] = float(np.square(others @ (rounded - weight).T).sum() / np.square(others @ weight.T).sum())
        totals += spent
        (a, b), (e, f) = np.median(spent, axis=0), errors
        print(f"{shape:>10}   {a:11.2f}   {b:7.2f}   {e:23.5f}   {f:7.5f}", flush=True)
    a, b = np.median(totals, axis=0)
    ratio = np.median(totals[:, 1] / totals[:, 0])
    print(f"CPU seconds: textbook {a:.2f}, ours {b:.2f}, ratio {ratio:.2f} (medians of {options.pairs} pairs)")


if __name__ == "__main__":
    main()
