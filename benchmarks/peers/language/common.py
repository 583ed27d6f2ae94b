"""What each peer's program shares: the tokens, the network, the CPU time of its work, and the two figures.

A program runs in its peer's own environment, for one row of the table; this module needs numpy, torch and transformers.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
import numpy as np
import torch

Logits = Callable[[np.ndarray], Any]
"""Token ids (1, length) → logits (1, length, vocabulary)."""


@dataclass
class Bench:
    """One row of one peer: what it is given and what it has measured."""

    folder: Path
    work: Path
    row: str
    figures: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        torch.set_num_threads(1)
        self.calibration: np.ndarray = np.load(self.work / "calibration.npy")
        self.test: np.ndarray = np.load(self.work / "test.npy")
        self.reference: np.ndarray = np.load(self.work / "reference.npy", mmap_mode="r")

    def network(self) -> Any:
        """The `LlamaForCausalLM` in float32, without a KV cache; it is seen to be the reference's."""
        from transformers import AutoModelForCausalLM

        net = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32).eval()
        net.config.use_cache = False
        self.same(forward(net))
        return net

    def same(self, logits: Logits) -> None:
        """See that a float network is the reference's, on the first test sequence."""
        found = divergence(log_softmax(self.reference[0]), log_softmax(logits(self.test[:1])[0])).mean()
        assert found < 1e-6, f"this environment's float network is another: {found} nats a token"

    def tokens(self) -> list[torch.Tensor]:
        """The sequences that calibrate, (1, length) each."""
        return [torch.from_numpy(row[None]) for row in self.calibration]

    def seconds(self, action: Callable[[], Any]) -> Any:
        """What `action` gives; the CPU seconds that it took, all threads of the process, are kept, and the most
        memory that the process has held."""
        begin = time.process_time()
        given = action()
        self.figures["seconds"] = time.process_time() - begin
        self.figures["memory MiB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        return given

    def same_type(self, net: Any, size: int = 32) -> None:
        """See that the layers of the first and last block have at most 16 values in a group of inputs, a channel where
        `size` is 0, and that embedding and head are untouched."""
        wanted = self.network()
        assert torch.equal(net.get_input_embeddings().weight, wanted.get_input_embeddings().weight), "embedding"
        assert torch.equal(net.get_output_embeddings().weight, wanted.get_output_embeddings().weight), "head"
        last = f".{wanted.config.num_hidden_layers - 1}."
        self.grids({name: weight for name, weight in weights(net).items() if ".0." in name or last in name}, size)

    def grids(self, found: dict[str, Any], size: int = 32) -> None:
        """See that weights (outputs, inputs) have at most 16 values in a group of inputs."""
        for name, weight in found.items():
            values = np.asarray(weight.detach() if isinstance(weight, torch.Tensor) else weight, np.float32)
            groups = np.sort(values.reshape(-1, size or values.shape[1]), axis=1)
            # Codes times scales in float32: equal codes may differ in the last bits after scales were moved about.
            width = np.maximum(np.abs(groups).max(1, keepdims=True), 1e-30)
            kinds = 1 + (np.diff(groups, axis=1) > 1e-5 * width).sum(1)
            assert kinds.max() <= 16, f"{name}: {kinds.max()} values in a group"

    def end(self, logits: Logits, *packages: str) -> None:
        """Measure and print the figures: divergence from float over all tokens, the ratio of perplexities over all
        next tokens, as `bitwright.metrics` has them; and the versions of `packages`."""
        terms, losses = [], []
        for row, wanted in zip(self.test, self.reference, strict=True):
            logs, reference = log_softmax(np.asarray(logits(row[None]))[0]), log_softmax(wanted)
            terms.append(divergence(reference, logs))
            losses.append([entropy(x, row) for x in (logs, reference)])
        kl = np.concatenate(terms)
        found, in_float = np.concatenate(losses, axis=1)
        self.figures |= {
            "kl": float(kl.mean()),
            "kl deviation": float(np.std([t.mean() for t in terms], ddof=1) / len(terms) ** 0.5),
            "ratio": float(np.exp(found.mean() - in_float.mean())),
            "float": float(np.exp(in_float.mean())),
            "tokens": int(kl.size),
            "versions": {name: importlib.metadata.version(name) for name in packages},
        }
        print("FIGURES " + json.dumps(self.figures), flush=True)


def bench() -> Bench:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("row")
    return Bench(**vars(parser.parse_args()))


def weights(net: Any) -> dict[str, torch.Tensor]:
    """The weights (outputs, inputs) of the decoder's linear layers: what is quantized, here, by everyone."""
    found = {n: m.weight for n, m in net.named_modules() if isinstance(m, torch.nn.Linear) and "lm_head" not in n}
    assert len(found) == 7 * net.config.num_hidden_layers
    return found


def forward(net: Any) -> Logits:
    def logits(ids: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            found: np.ndarray = net(input_ids=torch.from_numpy(ids), use_cache=False).logits.float().numpy()
            return found

    return logits


def log_softmax(values: np.ndarray) -> np.ndarray:
    wide = values.astype(np.float64)
    wide -= wide.max(axis=-1, keepdims=True)
    wide -= np.log(np.exp(wide).sum(axis=-1, keepdims=True))
    return wide


def divergence(reference: np.ndarray, logs: np.ndarray) -> np.ndarray:
    """Σ p ln(p / q) of each token, in nats, of two networks' logarithms of probabilities."""
    terms: np.ndarray = (np.exp(reference) * (reference - logs)).sum(axis=-1)
    return terms


def entropy(logs: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """−ln of the probability of each next token."""
    losses: np.ndarray = -np.take_along_axis(logs[:-1], tokens[1:, None], axis=-1)[:, 0]
    return losses
