"""bitwright beside its peers on a language model: 4-bit weights alone, same text, same layers, one thread.

    python benchmarks/peers/language FOLDER [--only bitwright,nncf] [--environments FOLDER] [--text FILE]
                                     [--calibrate 8] [--test 12] [--length 256] [--markdown docs/benchmarks.md]
    python benchmarks/peers/language FOLDER --layers 1 --calibrate 2 --test 2 --length 32     # does all of it run?

FOLDER is a folder of transformers (config.json, model.safetensors and a tokenizer). One environment for each peer
(made by pip on first use; a peer that doesn't install is a row with the reason), one process for each row. Text as in
`benchmarks/language_model.py`: of three sequences in turn the first calibrates, the third tests. All linear layers of
the decoder have 4 bits; embedding and head stay in float. Figures of earlier runs stay in
ENVIRONMENTS/language/figures.json, so that one peer can be run again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from environments import REPOSITORY, environment, replaced_section, run, table  # noqa: E402

TORCH = ("torch==2.13.0", "transformers")
PEERS: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "bitwright": (
        "**bitwright**", (f"{REPOSITORY}[torch]", *TORCH),
        ("nearest block32 sym", "gptq block32 sym", "gptq block32 asym", "rotate+gptq channel sym"),
    ),
    "llmcompressor": (
        "llmcompressor", ("llmcompressor", "torch==2.13.0"),
        ("nearest block32 sym", "gptq block32 sym", "gptq block32 asym", "awq block32 asym", "gptq channel sym"),
    ),
    "autoround": (
        "AutoRound", ("auto-round", *TORCH),
        ("0x8 block32 sym", "50x2 block32 sym", "200x8 block32 sym"),
    ),
    "nncf": (
        "NNCF, OpenVINO", ("nncf", "openvino", *TORCH),
        ("nearest block32 sym", "scale_estimation block32 sym", "gptq block32 sym",
         "awq+scale_estimation block32 asym", "awq+scale_estimation+gptq block32 asym"),
    ),
    "torchao": (
        "torchao", ("torchao", *TORCH),
        ("nearest block32 sym", "hqq block32 sym", "nearest block32 asym", "gptq block32 asym"),
    ),
    "aimet_onnx": (
        "AIMET, ONNX", ("aimet-onnx", "onnx", "onnxruntime", "onnxscript", *TORCH),
        ("nearest block32 sym", "seq_mse block32 sym"),
    ),
}  # fmt: skip
"""Title, what pip installs, and rows (what is done, the grid, the type), by `peer_NAME.py`."""
GRIDS = {"block32": "groups of 32", "channel": "channels"}
SECTION = "## Language models"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", default=",".join(PEERS))
    parser.add_argument("--rows", help="those rows alone that begin with this")
    parser.add_argument("--environments", type=Path, default=REPOSITORY / ".venv-peers")
    parser.add_argument("--text", type=Path, help="default: Python's help topics")
    parser.add_argument("--length", type=int, default=256, help="tokens of a sequence")
    parser.add_argument("--calibrate", type=int, default=8, help="sequences")
    parser.add_argument("--test", type=int, default=12, help="sequences")
    parser.add_argument("--layers", type=int, help="of the decoder: the first alone, to see that everything runs")
    parser.add_argument("--timeout", type=int, default=7200, help="seconds for one row")
    parser.add_argument("--markdown", type=Path, help="put the section into this page")
    options = parser.parse_args()
    work = options.environments.resolve() / "language"
    work.mkdir(parents=True, exist_ok=True)
    folder = work / f"first-{options.layers}" if options.layers else options.folder.resolve()
    prepare(work, folder, options)
    store = work / "figures.json"
    found: dict[str, dict[str, Any]] = json.loads(store.read_text()) if store.exists() else {}
    for name in options.only.split(","):
        _, packages, rows = PEERS[name]
        for row in (r for r in rows if not options.rows or r.startswith(options.rows)):
            print(f"== {name}: {row}", flush=True)
            arguments = (folder, work, row)
            place = options.environments / f"language_{name}"
            found[f"{name}: {row}"] = run(packages, place, HERE / f"peer_{name}.py", arguments, options.timeout)
            store.write_text(json.dumps(found, indent=1))
    text = section(found, options)
    print(text)
    if options.markdown and not options.layers:
        page = options.markdown.read_text(encoding="utf-8")
        options.markdown.write_text(replaced_section(page, SECTION, text), encoding="utf-8")


def prepare(work: Path, folder: Path, options: argparse.Namespace) -> None:
    """Tokens and the float network's logits, and the network's first layers where those are wanted; by what bitwright's
    own environment has."""
    _, packages, _ = PEERS["bitwright"]
    python = environment(packages, options.environments / "language_bitwright")
    cut = [f"--{name}={getattr(options, name)}" for name in ("length", "calibrate", "test")]
    text = [f"--text={options.text.resolve()}"] if options.text else []
    if options.layers:
        arguments = [options.folder.resolve(), folder, str(options.layers)]
        subprocess.run([python, HERE / "first_layers.py", *arguments], check=True)
    subprocess.run([python, HERE / "prepare.py", folder, work, *cut, *text], check=True)


def section(found: dict[str, dict[str, Any]], options: argparse.Namespace) -> str:
    done = {key: figures for key, figures in found.items() if "failed" not in figures}
    rows = []
    for key, f in done.items():
        name, _, row = key.partition(": ")
        what, grid, symmetry = row.split(" ")
        rows.append(
            [
                PEERS[name][0], f"`{what}`", f"{GRIDS[grid]}, {symmetry}", f"{f['kl']:.4f} ± {f['kl deviation']:.4f}",
                f"{f['ratio']:.3f}", f"{f['seconds']:.0f}", f"{f['memory MiB']:.0f}" if "memory MiB" in f else "–",
            ]
        )  # fmt: skip
    installed = {PEERS[key.partition(": ")[0]][0]: f["versions"] for key, f in done.items()}
    versions = [f"{t.strip('*')} ({', '.join(f'{p} {v}' for p, v in vs.items())})" for t, vs in installed.items()]
    failed = [f"- {PEERS[k.partition(': ')[0]][0]}, `{k.partition(': ')[2]}`: {f['failed']}" for k, f in found.items()
              if "failed" in f]  # fmt: skip
    first = next(iter(done.values()), {"tokens": 0, "float": float("nan")})
    parts = [
        f"{SECTION}\n",
        f"What `benchmarks/peers/language` printed for `{options.folder.name}`: the linear layers of the decoder in 4 "
        f"bits, activations, embedding and head in float, {options.calibrate} sequences of {options.length} tokens to "
        f"calibrate, {options.test} others ({first['tokens']} tokens) to measure, float perplexity "
        f"{first['float']:.2f}; one thread. KL is the mean over tokens of the divergence from float in nats, with the "
        "deviation of that mean as the sequences show it; *ratio* that of perplexities; CPU seconds from the opened "
        "float model to the quantized one; memory the most that the process held.\n",
        table(["", "what is done", "grid", "KL", "ratio", "CPU s", "MiB"], rows) + "\n",
        *(["Ended with an error:\n", "\n".join(failed) + "\n"] if failed else []),
        f"Versions: {'; '.join(versions)}.\n",
    ]  # fmt: skip
    if (notes := HERE / "notes.md").exists():
        parts.append(notes.read_text(encoding="utf-8"))
    return "\n".join(parts)


if __name__ == "__main__":
    main()
