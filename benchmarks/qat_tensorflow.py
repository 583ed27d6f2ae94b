"""A TensorFlow 1 session on Fashion-MNIST: trained, quantized to 4 bits, fine-tuned in its session, exported.

    apt-get install dataset-fashion-mnist
    python benchmarks/qat_tensorflow.py [--data /usr/share/datasets/fashion-mnist] [--epochs 4] [--out FOLDER]

A small CNN is trained in a session and saved as .meta and checkpoint; bitwright opens these. Prints test accuracy and
loss of float, nearest rounding, AdaRound, regular QAT and range learning (both from the same calibrated start, same
steps), with the training loss at the start and the end of QAT. What is exported (.meta and checkpoint, .pb, encodings,
QDQ ONNX) is then loaded by plain TensorFlow and measured again.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import fashion_mnist
import numpy as np
import qat
import tensorflow as tf

from bitwright.simulation import QuantSim
from bitwright_tensorflow.backend import TensorFlowBackend

v1 = tf.compat.v1


def read(folder, part):
    """Normalized images (N, 28, 28, 1) and labels."""
    images, labels = fashion_mnist.read_normalized(folder, part)
    return images[..., None], labels


def build():
    """28 × 28 gray images → 10 classes: convolutions with stride, one of them depthwise; 30 thousand parameters."""
    images = v1.placeholder(tf.float32, (None, 28, 28, 1), name="images")
    labels = v1.placeholder(tf.int64, (None,), name="labels")
    start = v1.keras.initializers.he_normal(seed=0)

    def conv(x, name, kernel, out, stride, depthwise=False):
        with v1.variable_scope(name):
            shape = (kernel, kernel, x.shape[-1], 1 if depthwise else out)
            w = v1.get_variable("kernel", shape, initializer=start)
            function = tf.nn.depthwise_conv2d if depthwise else tf.nn.conv2d
            y = function(x, w, [1, stride, stride, 1], "SAME")
            return tf.nn.relu(tf.nn.bias_add(y, v1.get_variable("bias", y.shape[-1], initializer=v1.zeros_initializer)))

    x = conv(images, "conv1", 3, 24, 2)
    x = conv(x, "conv2", 3, 48, 2)
    x = conv(x, "conv3", 3, 48, 1, depthwise=True)
    x = conv(x, "conv4", 1, 96, 1)
    x = conv(x, "conv5", 3, 96, 2, depthwise=True)
    x = conv(x, "conv6", 1, 96, 1)
    x = tf.reduce_mean(x, [1, 2], name="pool")
    kernel = v1.get_variable("head/kernel", (96, 10), initializer=start)
    logits = tf.add(tf.matmul(x, kernel), v1.get_variable("head/bias", (10,), initializer=v1.zeros_initializer),
                    name="logits")  # fmt: skip
    tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(labels=labels, logits=logits), name="loss")


def loop(session, step, data, epochs, rate, rates, seed):
    """Steps of 128 images with a one-cycle learning rate; returns each step's loss."""
    x, y = data
    rng = np.random.default_rng(seed)
    steps = [part for _ in range(epochs) for part in np.array_split(rng.permutation(len(x)), -(-len(x) // 128))]
    losses = []
    for i, chosen in enumerate(steps):
        done = i / len(steps)
        now = rate * (done / 0.3 if done < 0.3 else (1 + np.cos(np.pi * (done - 0.3) / 0.7)) / 2)
        images = x[chosen][:, :, ::-1] if rng.random() < 0.5 else x[chosen]
        feed = {"images:0": images, "labels:0": y[chosen], rates: now}
        losses.append(session.run(["loss:0", step], feed)[0])
    return losses


def measured(session, data):
    """Accuracy in percent, mean cross-entropy."""
    hits = losses = 0.0
    for x, y in zip(np.split(data[0], 20), np.split(data[1], 20), strict=True):
        logits, loss = session.run(["logits:0", "loss:0"], {"images:0": x, "labels:0": y})
        hits += (logits.argmax(1) == y).mean() / 20
        losses += loss / 20
    return 100 * hits, losses


def fine_tune(model, data, options):
    """QAT in the simulation's session: the user's own loss, an optimizer for weights and one for learned grids."""
    with model.graph.as_default():
        loss, rate = model.graph.get_tensor_by_name("loss:0"), v1.placeholder(tf.float32, ())
        grids = model.grid_variables
        weights = [v for v in model.trainable_variables if all(v is not g for g in grids)]
        step = v1.train.AdamOptimizer(rate, name="qat").minimize(loss, var_list=weights)
        if grids:
            other = v1.train.AdamOptimizer(rate * options.grid_factor, name="qat_grids")
            step = tf.group(step, other.minimize(loss, var_list=grids))
    model.initialize()
    return loop(model.session, step, data, options.epochs, options.rate, rate, options.seed)


def main():
    parser = qat.parser(__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="default: a temporary folder")
    options = parser.parse_args()
    out = options.out or Path(tempfile.mkdtemp())
    out.mkdir(parents=True, exist_ok=True)
    training = tuple(t[: options.limit] for t in read(options.data, "train"))
    test = read(options.data, "t10k")
    lines = qat.Lines()

    def say(what, session, more=""):
        lines(what, measured(session, test), more)

    tf.keras.utils.set_random_seed(0)
    with tf.Graph().as_default(), v1.Session() as session:
        build()
        rate = v1.placeholder(tf.float32, ())
        step = v1.train.AdamOptimizer(rate).minimize(session.graph.get_tensor_by_name("loss:0"))
        session.run(v1.global_variables_initializer())
        losses = loop(session, step, training, max(options.epochs * 3 // 2, 1), 5e-3, rate, 0)
        say("float, in its session", session, f"training loss {losses[0]:.3f} → {np.mean(losses[-50:]):.3f}")
        v1.train.Saver().save(session, str(out / "float"))

    def opened():
        model = TensorFlowBackend().load(out / "float.meta", inputs=["images"], outputs=["logits"])
        return QuantSim(model, weights="int4", activations="uint4", target="default_per_channel")

    calibration = training[0][:1024]
    say("PTQ, nearest", opened().calibrate(calibration).model.session)
    sim = opened().apply("adaround", calibration).calibrate(calibration)
    say("PTQ, AdaRound", sim.model.session)
    for name, learned in (("regular QAT", False), ("range learning", True)):
        sim = opened().calibrate(calibration)
        losses = fine_tune(sim.trainable(range_learning=learned), training, options)
        sim.take()
        say(name, sim.model.session, f"training loss {np.mean(losses[:50]):.3f} → {np.mean(losses[-50:]):.3f}")

    bundle = sim.export(out, name="quantized")
    for purpose, path in bundle.files.items():
        print(f"{purpose:16} {path.name:36} {path.stat().st_size / 1024:8.0f} KiB")
    with tf.Graph().as_default(), v1.Session() as session:
        v1.train.import_meta_graph(str(bundle.files["meta"])).restore(session, str(out / "quantized"))
        say("exported .meta, in float", session)
    graph_def = v1.GraphDef.FromString(bundle.files["model"].read_bytes())
    with tf.Graph().as_default(), v1.Session() as session:
        tf.import_graph_def(graph_def, name="")
        logits = np.concatenate([session.run("logits:0", {"images:0": x}) for x in np.split(test[0], 20)])
        print(f"{'exported .pb, in float':26} {100 * (logits.argmax(1) == test[1]).mean():6.2f} %")
    from bitwright_onnx.backend import OnnxBackend

    runtime = OnnxBackend().compile(bundle)
    hits = sum((next(iter(runtime.run({"images:0": x}).values())).argmax(1) == y).sum()
               for x, y in zip(np.split(test[0], 20), np.split(test[1], 20), strict=True))  # fmt: skip
    print(f"{'QDQ ONNX, ONNX Runtime':26} {100 * hits / len(test[1]):6.2f} %")


if __name__ == "__main__":
    main()
