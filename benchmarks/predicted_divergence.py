"""A language model's weights in 4 and 8 bits: the divergence that gradients predict, beside the one that is measured.

    pip install torch transformers safetensors scipy        # in an environment with bitwright
    python benchmarks/predicted_divergence.py FOLDER        # config.json, model.safetensors and a tokenizer

`mixed_precision` with `sensitivities="fisher"` gives each weight 4 or 8 bits within a budget of bytes, without an
evaluation; beside each such assignment a random one of the same budget. Divergences from the float network are in nats
a token, measured ± half of their 95 % confidence interval on text of `language_model.py`'s third kind; gradients and
moments are of its first. Last, Spearman's rank correlation of predicted and measured.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import language_model
import numpy as np
import torch

from bitwright import QuantSim, mixed_precision
from bitwright.metrics import metric_factory, student


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--budgets", type=float, nargs="*", default=[0.55, 0.65, 0.75, 0.85])
    parser.add_argument("--narrow", default="int4", help="type of the narrow candidate")
    parser.add_argument("--length", type=int, default=256, help="tokens of a sequence")
    parser.add_argument("--calibrate", type=int, default=4, help="sequences for gradients and moments")
    parser.add_argument("--test", type=int, default=6, help="sequences")
    parser.add_argument("--layers", type=int, help="the first so many alone, to try the script")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    kinds = language_model.sequences(options.folder, None, options.length)
    calibration = language_model.spread(kinds[0], options.calibrate)
    test = language_model.spread(kinds[2], options.test)
    net = language_model.opened(options.folder, options.layers)
    sample = {"input_ids": torch.from_numpy(calibration["input_ids"][:1])}
    sim = QuantSim(net, sample, target=language_model.TARGET, activations="float")
    data, begin = sim.open(calibration, batch_size=1), time.process_time()
    found = mixed_precision(
        sim, data, candidates=["int8/float", f"{options.narrow}/float"], budget=options.budgets[0],
        cost="weight_bytes", sensitivities="fisher",
    )  # fmt: skip
    print(f"{len(found.assignment)} weights, predicted and solved in {time.process_time() - begin:.0f} CPU seconds")
    alone = {(s.group, s.candidate): s for s in found.sensitivities}
    wide, narrow = (f"{t} × float" for t in ("int8", options.narrow))
    rng = np.random.default_rng(0)
    rows: list[tuple[float, float]] = []
    half = student(0.975, options.test - 1)
    (wanted,) = sim.predict(sim.open(test, batch_size=1), simulated=False)

    def told(name: str, assignment: dict[str, str]) -> None:
        predicted = sum(alone[g, c].kl or 0.0 for g, c in assignment.items())
        cost = sum(alone[g, c].cost for g, c in assignment.items())
        share = cost / sum(alone[g, wide].cost for g in assignment)
        types = {str(sim.graph.op(g).weight): c.split()[0] for g, c in assignment.items()}
        twin = sim.retyped(types).calibrate(data)
        (logits,) = twin.predict(sim.open(test, batch_size=1))
        metric = metric_factory("kl")()
        metric.add(test, logits, wanted)
        rows.append((predicted, metric.value()))
        count = list(assignment.values()).count(narrow)
        print(
            f"{name:14} {share:6.1%}   predicted {predicted:.4f}   measured {metric.value():.4f} "
            f"± {half * (metric.terms.error or 0.0):.4f}   {count} in {options.narrow}",
            flush=True,
        )

    for budget in options.budgets:
        within = [p for p in found.front if p.relative_cost <= budget]
        told(
            f"solved {budget:g}", max(within, key=lambda p: p.relative_cost).assignment if within else found.assignment
        )
        assignment = dict.fromkeys(found.assignment, narrow)
        for g in rng.permutation(list(assignment)):
            trial = {**assignment, str(g): wide}
            if sum(alone[k, c].cost for k, c in trial.items()) <= budget * found.reference_cost:
                assignment = trial
        told(f"random {budget:g}", assignment)
    ranks = [np.argsort(np.argsort(column)) for column in zip(*rows, strict=True)]
    print(f"rank correlation of {len(rows)} assignments: {np.corrcoef(*ranks)[0, 1]:.3f}")


if __name__ == "__main__":
    main()
