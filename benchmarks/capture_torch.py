"""Many architectures through the PyTorch backend: capture, W8A8 simulation, ONNX; writes docs/architectures.md.

    pip install torch transformers onnx onnxruntime onnxscript
    python benchmarks/capture_torch.py [--only NAME]                   # prints lines
    python benchmarks/capture_torch.py --rows rows.json                # keeps them, and skips those that are whole
    python benchmarks/capture_torch.py --rows rows.json tv.json --write      # the page from all kept lines

torchvision and timm may need another torch than transformers: run the script in each environment, with its own rows.

Each model is built without weights, small, in evaluation mode. *Float output* compares the captured model with the
original on the sample and, where the batch is free, on another batch size: it must differ by exactly 0. *W8A8* is the
signal to noise of the simulated output, calibrated on the sample. *ONNX* is the largest difference between the
exported float model in ONNX Runtime and the original, relative to the output's largest value; *QDQ* the signal to
noise of the exported quantized model in ONNX Runtime. A model in parts is exported part by part, and compared there.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from torch.utils import _pytree as pytree
from torch_architectures import architectures

from bitwright.backend import Bundle, Tap
from bitwright.graph import Graph, OpKind
from bitwright.simulation import QuantSim
from bitwright_torch import CaptureNotice
from bitwright_torch.backend import TorchBackend
from bitwright_torch.capture.parts import PartitionedModel

PAGE = Path(__file__).parent.parent / "docs" / "architectures.md"
BACKEND = TorchBackend()
CLOSE = 1e-3
"""Relative difference up to which ONNX Runtime's float output counts as the original's."""


def call(model: Any, sample: Any) -> list[torch.Tensor]:
    with torch.no_grad():
        result = model(**sample) if isinstance(sample, dict) else model(sample)
    return [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor)]


def difference(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
    if [x.shape for x in a] != [x.shape for x in b]:
        return float("inf")
    return max((float((x.double() - y.double()).abs().nan_to_num(1e9).max()) for x, y in zip(a, b, strict=True)
                if x.numel()), default=0.0)  # fmt: skip


def settle(module: torch.nn.Module, sample: Any) -> None:
    """Running statistics as a short training leaves them, and no parameter that is zero or one throughout."""
    for parameter in module.parameters():
        if parameter.ndim < 2:
            with torch.no_grad():
                parameter.add_(0.05 * torch.randn_like(parameter))
    norms = [m for m in module.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.momentum = 0.9
        norm.train()
    if norms:
        call(module, sample)
    module.eval()


def grown(sample: Any) -> Any:
    return pytree.tree_map(lambda t: torch.cat([t, t[:1]]), sample)


def decibels(expected: np.ndarray, found: np.ndarray) -> float:
    noise = float(np.square(expected.astype(np.float64) - found).sum())
    return (
        math.inf
        if noise == 0
        else 10 * math.log10(max(float(np.square(expected, dtype=np.float64).sum()), 1e-30) / noise)
    )


def run_onnx(path: Path, feeds: Mapping[str, np.ndarray], *, optimize: bool = True) -> list[np.ndarray]:
    options = ort.SessionOptions()
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return session.run(None, {i.name: feeds[i.name] for i in session.get_inputs()})


def main_output(arrays: list[np.ndarray]) -> int:
    """The first float one."""
    return next(i for i, a in enumerate(arrays) if a.dtype.kind == "f" and a.size)


def exported(sim: QuantSim, bundle: Bundle, batch: Mapping[str, np.ndarray]) -> tuple[float, float]:
    """(relative difference of the float model, dB of the quantized one) in ONNX Runtime; the worst of parts."""
    model, found = sim.native, []
    parts: Mapping[str, Graph] = {"": sim.graph}
    if isinstance(model, PartitionedModel):
        parts = {f"/{n}": BACKEND.graph(p) for n, p in model.parts.items()}
    taps = [Tap(t) for g in parts.values() for t in (*g.inputs, *g.outputs)]
    values = {t.tensor: v for t, v in BACKEND.session(model, taps).run(batch).items()}
    for key, graph in parts.items():
        plain = run_onnx(bundle.files[f"model{key}"], values)
        expected = [values[t] for t in graph.outputs]
        apart = max(float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-9))
                    for a, b in zip(plain, expected, strict=True) if b.dtype.kind == "f" and b.size)  # fmt: skip
        run_onnx(bundle.files[f"qdq{key}"], values)  # it takes the model with its integer kernels, too
        quantized = run_onnx(bundle.files[f"qdq{key}"], values, optimize=False)
        first = main_output(expected)
        found.append((apart, decibels(expected[first], quantized[first])))
    return max(a for a, _ in found), min(q for _, q in found)


def row(name: str, build: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    module, sample = build()
    module.eval()
    settle(module, sample)
    torch.backends.mha.set_fastpath_enabled(False)  # nn.TransformerEncoder's other path rounds differently
    found: dict[str, Any] = {"name": name, "torch": torch.__version__, "notes": []}
    notes = found["notes"]
    start = time.perf_counter()
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model = BACKEND.adopt(module, sample)
            found["seconds"] = time.perf_counter() - start
    except Exception as error:
        notes.append(told(error))
        return found
    in_parts = isinstance(model, PartitionedModel)
    notes += [shortened(w.message) for w in caught if issubclass(w.category, CaptureNotice)]
    expected = call(module, sample)
    found["equal"] = difference(expected, call(model, sample))
    if all(shape[0] is None for shape, _ in BACKEND.input_specs(model).values()):
        found["equal"] = max(found["equal"], difference(call(module, grown(sample)), call(model, grown(sample))))
    if list(model.state_dict()) != list(module.state_dict()):
        notes.append("state_dict differs")
    try:
        sim = QuantSim(model, target="default_per_channel", scheme="minmax")
        opaque = Counter(op.type for op in sim.graph if op.kind is OpKind.OPAQUE and op.type != "python" and any(
            sim.graph.tensors[t].is_float for t in op.outputs))  # fmt: skip
        if opaque:
            notes.append("in float: " + ", ".join(f"{n}× {t}" for t, n in opaque.items()))
        found["ops"] = len(sim.graph)
        found["sites"] = len([s for s in (*sim.plan.activations, *sim.plan.parameters) if sim.plan.spec(s) is not None])
        sim.calibrate([sample])
        simulated = call(sim.model, sample)
        found["finite"] = all(bool(t.isfinite().all()) for t in simulated if t.is_floating_point())
        if not in_parts:  # what Python makes of a detector's scores has no fixed shape
            first = main_output([t.numpy() for t in expected])
            found["w8a8"] = decibels(expected[first].numpy(), simulated[first].numpy())
    except Exception as error:
        notes.append(f"simulation: {told(error)}")
        return found
    try:
        with tempfile.TemporaryDirectory() as folder:
            bundle = sim.export(folder)
            batch = next(iter(sim.open([sample])))
            found["onnx"], found["qdq"] = exported(sim, bundle, batch)
    except Exception as error:
        notes.append(f"export: {told(error)}")
    return found


def told(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:300]}"


def shortened(message: object) -> str:
    """A notice without the exporter's own words."""
    text = str(message).split(" The whole can't be captured:")[0]
    return text if len(text) < 160 else f"{text[:157]}…"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="part of a name")
    parser.add_argument("--rows", type=Path, nargs="+", help="where rows are kept (JSON): the first; others are read")
    parser.add_argument("--again", action="store_true", help="run rows that are kept, too")
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.name} from the kept rows, running nothing")
    arguments = parser.parse_args()
    rows: dict[str, Any] = {}
    kept, *others = arguments.rows or [None]
    if kept and kept.exists():
        rows = {r["name"]: r for r in json.loads(kept.read_text())}
    if arguments.write:
        for path in others:
            rows |= {r["name"]: r for r in json.loads(path.read_text())}
        others_section = "\n## " + PAGE.read_text(encoding="utf-8").split("\n## ", 1)[1]  # of architectures_w8a8.py
        PAGE.write_text(page(list(rows.values())) + others_section, encoding="utf-8")
        return
    for name, build in architectures():
        if arguments.only.lower() not in name.lower() or ("qdq" in rows.get(name, ()) and not arguments.again):
            continue
        rows[name] = row(name, build)
        print(line(rows[name]), flush=True)
        if kept:
            kept.write_text(json.dumps(list(rows.values()), indent=1))
        gc.collect()


def line(r: dict[str, Any]) -> str:
    notes = "; ".join(r["notes"]).replace("|", "\\|")
    if "equal" not in r:
        return f"| {r['name']} | not captured | | | | | | | {notes} |"
    equal = "equal" if r["equal"] == 0 else f"{r['equal']:.2g}"
    cells = [r["name"], equal]
    cells.append(
        "no"
        if "finite" not in r
        else "[not finite](pytorch.md#divisions)"
        if not r["finite"]
        else "finite"
        if "w8a8" not in r
        else f"{r['w8a8']:.0f} dB"
    )
    cells.append("no" if "onnx" not in r else f"{r['onnx']:.0e}")
    cells.append("no" if "qdq" not in r else f"{r['qdq']:.0f} dB")
    return (
        "| " + " | ".join([*cells, str(r.get("ops", "")), str(r.get("sites", "")), f"{r['seconds']:.1f}", notes]) + " |"
    )


def page(rows: list[dict[str, Any]]) -> str:
    captured = [r for r in rows if "equal" in r]
    exact = [r for r in captured if r["equal"] == 0]
    finite = [r for r in captured if r.get("finite")]
    close = [r for r in captured if r.get("onnx", 1) <= CLOSE]
    quantized = [r for r in captured if "qdq" in r and math.isfinite(r["qdq"])]
    versions = " and ".join(sorted({r["torch"] for r in rows}))
    return "\n".join([
        "# Architectures", "",
        f"{len(rows)} architectures through the PyTorch backend: {len(captured)} captured, {len(exact)} of them with "
        f"an output that equals the original's bit for bit; {len(finite)} W8A8 simulations with finite outputs; "
        f"{len(close)} exported float models that ONNX Runtime runs to the same output (within {CLOSE:g} of its "
        f"largest value), and {len(quantized)} exported quantized ones that it runs.", "",
        f"Made by `python benchmarks/capture_torch.py` with PyTorch {versions}. Models are built without trained "
        "weights, those of transformers and the plain ones small; ranges are min-max on one batch. So the decibels "
        "(signal to noise of the quantized output) show that a simulation works and that the exported model agrees "
        "with it, not what a trained network would lose.", "",
        "- *W8A8*: the simulation. *ONNX*: largest relative difference of the exported float model in ONNX Runtime. "
        "*QDQ*: the exported quantized model in ONNX Runtime, which runs it with its integer kernels too; the figure "
        "is without them, since they saturate on processors without VNNI.",
        "- *Ops* and *sites* count the canonical graph and what the target `default_per_channel` quantizes, "
        "*seconds* the capture, on a busy machine.",
        "- A model *in parts* is exported part by part; its worst part counts.", "",
        "| architecture | float output | W8A8 | ONNX | QDQ | ops | sites | seconds | notes |",
        "|---|---|---|---|---|---|---|---|---|",
        *map(line, rows), "",
    ])  # fmt: skip


if __name__ == "__main__":
    main()
