"""A language model from a folder of transformers: divergence from float and perplexity, by row, and the time.

    pip install torch transformers safetensors              # in an environment with bitwright
    python benchmarks/language_model.py FOLDER              # config.json, model.safetensors and a tokenizer
    python benchmarks/language_model.py FOLDER --rows w8a16 gptq-block32 --test 12
    python benchmarks/language_model.py FOLDER --row 'w8a16 htp={"target": "htp_v73", "activations": "uint16"}'

Text: Python's own help topics (`pydoc_data.topics`), or `--text FILE`, cut into sequences. Of three in turn the first
is for calibration, the second for what searches evaluate, the third for the figures: none is in two of them.

Columns: KL, the mean over tokens of the divergence from the float model, in nats; ratio, its perplexity over the float
model's, each ± half of its 95 % confidence interval, sequences being taken as independent; seconds of work (techniques
and calibration, or the search) on so many threads as `--threads` says. `--also FILE` measures on another text too.
`auto` is one command, without a word on which sites are sensitive; what it spends is printed. `family` is W8A8 with the
types that `bitwright validate --data` proposes from the calibration text.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from bitwright import QuantSim, auto_quantize
from bitwright.metrics import student
from bitwright_analysis.family_types import family_types
from bitwright_search.evaluation import ByMetric

os.environ.setdefault("HF_HUB_OFFLINE", "1")

TARGET = "default_per_channel"
EIGHT = {"*embed_tokens": {"weights": "int8"}, "*lm_head": {"weights": "int8"}}
W4 = {"weights": "int4", "activations": "float", "target": TARGET, "overrides": EIGHT}
"""Weights only, layers in 4 bits; embedding and head have 8, tied or, once rotated, apart."""
BLOCKS = {**W4, "weights": "int4:block32"}
ROWS: dict[str, tuple[dict[str, Any], list[Any]]] = {
    "w8a16": ({"target": TARGET, "activations": "uint16"}, []),
    "w8": ({"target": TARGET, "activations": "float"}, []),
    "w8a8": ({"target": TARGET}, []),
    "nearest-block32": (BLOCKS, []),
    "gptq-block32": (BLOCKS, ["gptq"]),
    "nearest-low-rank": (BLOCKS, [["low_rank", {"rounding": "nearest"}]]),
    "gptq-low-rank": (BLOCKS, ["low_rank"]),
    "gptq-low-rank-64": (BLOCKS, [["low_rank", {"rank": 64}]]),
    "nearest": (W4, []),
    "gptq": (W4, ["gptq"]),
    "rotate-gptq": (W4, ["rotate", "gptq"]),
    "rotate-heads-gptq": (W4, [["rotate", {"heads": True}], "gptq"]),
}
"""Options of `QuantSim`, and techniques."""
FAMILY, AUTO = "family", "auto"


class Logits(nn.Module):
    """Token ids (sequences, tokens) → logits (sequences, tokens, vocabulary)."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, input_ids):
        return self.net(input_ids=input_ids).logits


def opened(folder: Path, layers: int | None) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    config.use_cache = False
    if layers:
        config.num_hidden_layers = layers
    return Logits(AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32).eval())


def sequences(folder: Path, text: Path | None, length: int) -> list[np.ndarray]:
    """[calibration, search, test]: int64 (n, length) each."""
    import pydoc_data.topics

    words = (
        text.read_text(encoding="utf-8") if text else "\n".join(v for _, v in sorted(pydoc_data.topics.topics.items()))
    )
    rows = cut(folder, words, length)
    return [rows[i::3] for i in range(3)]


def cut(folder: Path, words: str, length: int) -> np.ndarray:
    """Sequences of a text: int64 (n, length)."""
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(folder)(words, return_tensors="np").input_ids[0].astype(np.int64)
    return ids[: len(ids) // length * length].reshape(-1, length)


def spread(rows: np.ndarray, count: int) -> dict[str, np.ndarray]:
    if len(rows) < count:
        raise SystemExit(f"the text has {len(rows)} sequences of each kind, {count} are asked for")
    return {"input_ids": rows[np.linspace(0, len(rows) - 1, count).astype(int)]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", nargs="*", default=[*ROWS, FAMILY, AUTO], choices=[*ROWS, FAMILY, AUTO])
    parser.add_argument("--row", action="append", default=[], help="another: NAME={options of QuantSim, and steps}")
    parser.add_argument("--text", type=Path, help="default: Python's help topics")
    parser.add_argument("--length", type=int, default=256, help="tokens of a sequence")
    parser.add_argument("--calibrate", type=int, default=8, help="sequences")
    parser.add_argument("--search", type=int, default=8, help="sequences that `auto` evaluates on")
    parser.add_argument("--test", type=int, default=6, help="sequences")
    parser.add_argument("--also", type=Path, action="append", default=[], help="another text to measure on")
    parser.add_argument("--metric", default="perplexity", choices=["kl", "perplexity"], help="what `auto` evaluates")
    parser.add_argument("--allowed", type=float, default=1.08, help="ratio of perplexities that `auto` may have; of "
                        "kl, its logarithm")  # fmt: skip
    parser.add_argument("--confidence", type=float, help="that `auto` keeps it with; 0.5 judges by the mean alone")
    parser.add_argument("--recipe", help="techniques that `auto` tries; default: all that take part")
    parser.add_argument("--schemes", nargs="*", help="calibration schemes that `auto` tries; default: all five")
    parser.add_argument("--run", type=Path, help="where `auto` keeps finished stages")
    parser.add_argument("--layers", type=int, help="the first so many alone, to try the script")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = {name: ROWS[name] for name in options.rows if name in ROWS}
    for given in options.row:
        name, _, text = given.partition("=")
        found = json.loads(text)
        rows[name] = ({k: v for k, v in found.items() if k != "steps"}, found.get("steps", []))
    kinds = sequences(options.folder, options.text, options.length)
    counts = (options.calibrate, options.search, options.test)
    calibration, search, test = (spread(r, n) for r, n in zip(kinds, counts, strict=True))
    further = {
        path.name: cut(options.folder, path.read_text(encoding="utf-8"), options.length) for path in options.also
    }
    net = opened(options.folder, options.layers)
    sample = {"input_ids": torch.from_numpy(calibration["input_ids"][:1])}

    def tell(name: str, sim: QuantSim, before: QuantSim, seconds: float) -> None:
        for text, data in {name: test, **{f"  on {k}": {"input_ids": rows} for k, rows in further.items()}}.items():
            found = sim.measure(sim.open(data, batch_size=1), "kl", "perplexity", reference=before)
            kl, ppl = found["kl"], found["perplexity"]
            ratio = ppl.simulated / (ppl.float_model or math.nan)
            half = student(0.975, max(1, len(data["input_ids"]) - 1))
            print(
                f"{text:18} KL {kl.simulated:.4f} ± {half * (kl.error or math.nan):.4f}   "
                f"ratio {ratio:.4f} ± {half * ratio * (ppl.error or math.nan):.4f}   {seconds:5.0f} s   "
                f"(float {ppl.float_model:.2f}, {ppl.count} tokens)",
                flush=True,
            )

    for name, (how, steps) in rows.items():
        sim = QuantSim(net, sample, **how)
        before, begin = sim.fork(), time.perf_counter()
        data = sim.open(calibration, batch_size=1)
        for step in steps:
            technique, settings = step if isinstance(step, list) else (step, {})
            sim.apply(technique, data, **settings)
        sim.calibrate(data)
        tell(name, sim, before, time.perf_counter() - begin)
    if FAMILY in options.rows:
        sim, begin = QuantSim(net, sample, target=TARGET), time.perf_counter()
        before, data = sim.fork(), sim.open(calibration, batch_size=1)
        found = family_types(sim.calibrate(data), data)
        sim = QuantSim(net, sample, target=TARGET, overrides=found.overrides).calibrate(data)
        tell(FAMILY, sim, before, time.perf_counter() - begin)
        types = [s.proposed for s in found.sites if s.proposed != s.present]
        told = ", ".join(f"{types.count(t)} {t}" for t in dict.fromkeys(types))
        print(f"  of {len(sim.plan.activations)} activations: {told}; {found.before_db} -> {found.after_db} dB")
    if AUTO in options.rows:
        before, begin = QuantSim(net, sample, target=TARGET), time.perf_counter()
        result = auto_quantize(
            before, calibration, ByMetric(search, options.metric, batch_size=1), batch_size=1,
            allowed_drop=math.log(options.allowed), confidence=options.confidence, techniques=options.recipe,
            schemes=options.schemes, run=options.run,
        )  # fmt: skip
        tell(AUTO, result.sim, before, time.perf_counter() - begin)
        print(result)
        for t in result.trials:
            drop = "" if t.score is None else f"{result.float_score - t.score:.4f} ± {t.margin or 0:.4f}"
            print(f"  {t.name:24} {t.status.value:10} {drop:>18}  {t.reason}")


if __name__ == "__main__":
    main()
