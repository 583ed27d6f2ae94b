"""Block reconstruction: learn weights' roundings and scales by the output error of a block of the network at a time.

BRECQ (Li et al. 2021, *BRECQ: Pushing the Limit of Post-Training Quantization by Block Reconstruction*): minimise
‖f(x̂; Ŵ) − f(x; W)‖² over a block f, with AdaRound's relaxed roundings, blocks one after another. Learned scales are
those of range learning; they clip, as in OmniQuant (Shao et al. 2024).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from bitwright.backend import Capability
from bitwright.graph import Graph, OpId, ParamId, TensorId
from bitwright.placement import Plan
from bitwright.statistics import Request
from bitwright.technique import Block, Context, LayerResult, Outcome, Report, blocks_of
from bitwright.technique import Settings as BaseSettings
from bitwright_techniques.layerwise_outcome import outcome_of, select_layers
from bitwright_techniques.learned_weights import LearnedWeight, Learning
from bitwright_techniques.network_blocks import network_blocks
from bitwright_techniques.rounding_relaxation import Relaxation

Array = NDArray[np.float32]


class BlockReconstructionSettings(BaseSettings):
    """Settings of `BlockReconstruction`.

    Attributes:
        rounding: learn to which of its two neighbours each weight goes; otherwise weights are rounded to nearest.
        scales: learn the scales, which clip; otherwise, and where they are frozen, they stay as they came.
        iterations: steps of descent for each block.
        learning_rate, scale_rate: of Adam, on relaxed roundings and on the logarithms of scales.
        regularization, beta, warm_start: of the relaxation, as of `adaround`: λ, of the mean over
            all roundings, beside the block's relative error; β from and to; share of the steps before it sets in.
        samples: calibration samples for each step.
        quantized_inputs: each block makes up for the error of those before it.
        quantized_activations: activations are quantized too, in the block and before it.
        additions: residual sums that a block has: 2 is a decoder layer of a transformer, two residual blocks of a
            convolutional network.
        layers: layers that end a block, where it has fewer sums.
        include, exclude: names or glob patterns of layers; nothing included means all.
    """

    rounding: bool = True
    scales: bool = True
    iterations: int = Field(300, ge=1)
    learning_rate: float = Field(0.03, gt=0)
    scale_rate: float = Field(1e-3, gt=0)
    regularization: float = Field(1.0, ge=0)
    beta: tuple[float, float] = (20.0, 2.0)
    warm_start: float = Field(0.2, ge=0, lt=1)
    samples: int = Field(8, ge=1)
    quantized_inputs: bool = True
    quantized_activations: bool = True
    additions: int = Field(2, ge=1)
    layers: int = Field(8, ge=1)
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _something(self) -> BlockReconstructionSettings:
        if not (self.rounding or self.scales):
            raise ValueError("nothing to learn: rounding or scales")
        return self


class BlockReconstruction:
    """Block-wise learning of the weights of convolutions, transposed convolutions and linear layers."""

    name: ClassVar[str] = "block_reconstruction"
    Settings: ClassVar[type[BaseSettings]] = BlockReconstructionSettings
    requires: ClassVar[frozenset[Capability]] = frozenset({Capability.DIFFERENTIABLE, Capability.PARTIAL_EXECUTION})

    def statistics(self, graph: Graph, plan: Plan, settings: BlockReconstructionSettings) -> tuple[Request, ...]:
        """None: blocks run on the data themselves."""
        return ()

    def needs_data(self, settings: BlockReconstructionSettings) -> bool:
        """Always."""
        return True

    def apply(self, ctx: Context[BlockReconstructionSettings]) -> Outcome:
        """Learn the weights of every selected layer.

        Returns:
            Weights on their grid and frozen encodings; with `rounding` off, scales that are kept.

        Raises:
            InputError: no calibration data, or a pattern that matches no layer.
        """
        s, walk = ctx.settings, blocks_of(ctx, self.name)
        ops, skipped = select_layers(ctx, s.include, s.exclude, skip_frozen=not s.rounding)
        skipped = {**skipped, **{op: reason for op in ops if (reason := _obstacle(ctx, op))}}
        ops = [op for op in ops if op not in skipped]
        spans = network_blocks(ctx.graph, set(ops), additions=s.additions, layers=s.layers)
        places = {span.ops: i for i, span in enumerate(spans)}  # names of ops differ between frameworks

        def solve(block: Block) -> Mapping[OpId, LayerResult]:
            return _learned(block, s, ctx.graph, ctx.rng(f"block {places[block.span.ops]}"))

        results = walk(spans, solve, quantized_inputs=s.quantized_inputs, quantized_activations=s.quantized_activations)
        rows: list[tuple[Any, ...]] = []
        for span in spans:
            figures = results[span.ops[0]].figures
            rows.append((span.name, len(span.ops), *(figures[k] for k in ("before", "after", "seconds"))))
        rows += [(op, reason, "", "", "") for op, reason in skipped.items()]
        columns = ("block", "layers", "error before", "error after", "seconds")
        return outcome_of(ctx, results, _report(rows[: len(spans)], tuple(rows), columns), weights=s.rounding)


def _obstacle(ctx: Context[Any], op: OpId) -> str:
    weight = ctx.graph.op(op).weight or ""
    encoding = ctx.encodings[weight]
    if encoding.pair_limit is not None:
        return "sums of neighbouring codes have a limit (Encoding.pair_limit)"
    if encoding.frozen and np.array_equal(encoding.fake_quantize(np.asarray(ctx.params[weight])), ctx.params[weight]):
        return f"its codes are chosen ({encoding.held_by or encoding.source or 'loaded'})"
    return ""


def _report(blocks: list[tuple[Any, ...]], rows: tuple[tuple[Any, ...], ...], columns: tuple[str, ...]) -> Report:
    if not blocks:
        return Report("no layer to learn", {}, columns, rows)
    before, after = (float(np.mean([row[i] for row in blocks])) for i in (2, 3))
    figures = {
        "blocks": float(len(blocks)),
        "layers": float(sum(row[1] for row in blocks)),
        "before": before,
        "after": after,
        "seconds": float(sum(row[4] for row in blocks)),
    }
    share = 100 * (1 - after / before) if before > 0 else 0.0
    told = f"{figures['layers']:.0f} layers learned in {len(blocks)} blocks; output error {share:.0f} % lower"
    return Report(told, figures, columns, rows)


def _learned(
    block: Block, s: BlockReconstructionSettings, graph: Graph, rng: np.random.Generator
) -> Mapping[OpId, LayerResult]:
    """Descend, and take the result where the block's error on all data is lower than that of nearest rounding."""
    began = time.perf_counter()
    how = Learning(s.rounding, s.scales, s.learning_rate, s.scale_rate)
    schedule = Relaxation(s.iterations, s.learning_rate, s.beta, s.warm_start)
    params: dict[OpId, ParamId] = {op: graph.op(op).weight or "" for op in block.span.ops}
    learned = {p: LearnedWeight(block.weights[p], block.encodings[p], how) for p in params.values()}
    powers = _Powers.of(block)
    nearest = {p: w.nearest for p, w in learned.items()}
    before = powers.error(block, nearest)
    batches = _batches(block, s.samples, rng)
    for step in range(s.iterations):
        values, beta = {p: w.relaxed() for p, w in learned.items()}, schedule.beta_at(step)
        total: dict[ParamId, Array] = {}
        taken = next(batches)
        for i in taken:
            pull = partial(powers.cotangents, block.targets(i), len(taken))
            for p, g in block.network.gradients(block.inputs(i), values, pull).items():
                total[p] = g if p not in total else total[p] + g
        for p, w in learned.items():
            w.descend(total[p], beta, s.regularization / len(learned))
    after = powers.error(block, {p: w.rounded() for p, w in learned.items()})
    figures = {"before": before, "after": after if after < before else before}
    found: dict[OpId, LayerResult] = {}
    for op, p in params.items():
        weight, encoding = learned[p].result(BlockReconstruction.name)
        if not after < before:  # NaN too
            came = block.encodings[p]
            if s.rounding:
                weight, came = nearest[p], came.with_(frozen=True, source=BlockReconstruction.name)
            encoding = came
        found[op] = LayerResult(weight, encoding, None, {**figures, "seconds": time.perf_counter() - began})
    return found


def _batches(block: Block, samples: int, rng: np.random.Generator) -> Iterator[list[int]]:
    """For each step the numbers of batches that make up so many samples; all have had their turn before one has two."""
    sizes = [len(next(iter(block.targets(i).values()))) for i in range(block.count)]
    held: list[int] = []
    while True:
        taken: list[int] = []
        while sum(sizes[i] for i in taken) < samples and len(taken) < block.count:
            held = held or [int(i) for i in rng.permutation(block.count)]
            taken.append(held.pop())
        yield taken


@dataclass(frozen=True)
class _Powers:
    """The loss: the squared error of each tensor that the block hands on, over its mean power; tensors count alike.

    Attributes:
        mean: mean square of each tensor over all data.
    """

    mean: Mapping[TensorId, float]

    @classmethod
    def of(cls, block: Block) -> _Powers:
        """Of what the float network hands on."""
        squares = dict.fromkeys(block.span.taps, 0.0)
        counts = dict.fromkeys(block.span.taps, 0)
        for i in range(block.count):
            for t, v in block.targets(i).items():
                squares[t] += float(np.square(v, dtype=np.float64).sum())
                counts[t] += v.size
        tiny = float(np.finfo(np.float32).tiny)
        return cls({t: max(squares[t] / max(counts[t], 1), tiny) for t in squares})

    def cotangents(
        self, wanted: Mapping[TensorId, NDArray[Any]], parts: int, made: Mapping[TensorId, NDArray[Any]]
    ) -> Mapping[TensorId, NDArray[Any]]:
        """The gradient of the loss to each tensor of one of so many batches."""
        return {
            t: (v - wanted[t]) * np.float32(2 / (self.mean[t] * v.size * parts * len(made))) for t, v in made.items()
        }

    def error(self, block: Block, values: Mapping[ParamId, Array]) -> float:
        """The mean over tensors of their squared error over their power, on all data."""
        squares, counts = dict.fromkeys(self.mean, 0.0), dict.fromkeys(self.mean, 0)
        for i in range(block.count):
            wanted = block.targets(i)
            for t, v in block.network.run(block.inputs(i), values).items():
                squares[t] += float(np.square(v - wanted[t], dtype=np.float64).sum())
                counts[t] += v.size
        return float(np.mean([squares[t] / counts[t] / self.mean[t] for t in self.mean]))
