"""Captures many architectures and compares float outputs; writes docs/architectures.md.

    python benchmarks/capture_torch.py [--only NAME] [--write]

Each model is built without weights, small, in evaluation mode. "equal" compares the captured model's output with the
original's on the sample and, where the batch is free, on another batch size; it must be exactly 0.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch_architectures import architectures

from bitwright.errors import BitwrightError
from bitwright.graph import OpKind
from bitwright.placement import build_plan
from bitwright_torch.backend import TorchBackend
from bitwright_torch.capturing import CaptureNotice

PAGE = Path(__file__).parent.parent / "docs" / "architectures.md"


def call(model: Any, sample: Any) -> list[Any]:
    with torch.no_grad():
        result = model(**sample) if isinstance(sample, dict) else model(sample)
    return [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor)]


def difference(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
    if len(a) != len(b):
        return float("inf")
    return max((float((x.double() - y.double()).abs().nan_to_num(1e9).max()) for x, y in zip(a, b, strict=True)))


def grown(sample: Any) -> Any:
    return pytree.tree_map(lambda t: torch.cat([t, t[:1]]), sample)


def row(name: str, build: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    module, sample = build()
    module.eval()
    torch.backends.mha.set_fastpath_enabled(False)  # nn.TransformerEncoder's other path rounds differently
    backend = TorchBackend()
    notes: list[str] = []
    start = time.perf_counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = backend.adopt(module, sample)
        seconds = time.perf_counter() - start
        notes += [str(w.message) for w in caught if issubclass(w.category, CaptureNotice)]
    worst = difference(call(module, sample), call(model, sample))
    if all(shape[0] is None for shape, _ in backend.input_specs(model).values()):
        worst = max(worst, difference(call(module, grown(sample)), call(model, grown(sample))))
    if list(model.state_dict()) != list(module.state_dict()):
        notes.append("state_dict differs")
    graph = backend.graph(model)
    plan = build_plan(graph, "default_per_channel")
    opaque = Counter(op.type for op in graph if op.kind is OpKind.OPAQUE and any(
        graph.tensors[t].is_float for t in op.outputs))  # fmt: skip
    if opaque:
        notes.append("in float: " + ", ".join(f"{n}× {t}" for t, n in opaque.items()))
    sites = len([s for s in (*plan.activations, *plan.parameters) if plan.spec(s) is not None])
    return {"name": name, "equal": worst, "ops": len(graph), "sites": sites, "seconds": seconds, "notes": notes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="part of a name")
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.name}")
    arguments = parser.parse_args()
    rows = []
    for name, build in architectures():
        if arguments.only.lower() not in name.lower():
            continue
        try:
            rows.append(row(name, build))
        except (BitwrightError, Exception) as error:
            rows.append({"name": name, "equal": None, "notes": [f"{type(error).__name__}: {error}"]})
        print(line(rows[-1]), flush=True)
    if arguments.write:
        PAGE.write_text(page(rows))


def line(r: dict[str, Any]) -> str:
    notes = "; ".join(r["notes"])
    if r["equal"] is None:
        return f"| {r['name']} | not captured | | | | {notes} |"
    equal = "equal" if r["equal"] == 0 else f"{r['equal']:.2g}"
    return f"| {r['name']} | {equal} | {r['ops']} | {r['sites']} | {r['seconds']:.1f} | {notes} |"


def page(rows: list[dict[str, Any]]) -> str:
    captured = [r for r in rows if r["equal"] is not None]
    exact = [r for r in captured if r["equal"] == 0]
    return "\n".join([
        "# Architectures", "",
        f"{len(rows)} architectures through the PyTorch backend: {len(captured)} captured, {len(exact)} of them with "
        "an output that equals the original's bit for bit. Made by `python benchmarks/capture_torch.py --write` with "
        f"PyTorch {torch.__version__}; models are built small and without trained weights.", "",
        "*Ops* and *sites* count the canonical graph and what the target `default_per_channel` quantizes, *seconds* "
        "the capture.", "",
        "| architecture | float output | ops | sites | seconds | notes |",
        "|---|---|---|---|---|---|",
        *map(line, rows), "",
    ])  # fmt: skip


if __name__ == "__main__":
    main()
