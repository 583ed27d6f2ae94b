"""What quantization costs beside a float pass in Keras: MobileNetV2 of keras.applications, 224², batch 8, one run.

    pip install "bitwright[keras]"
    python benchmarks/cost_keras.py [--repeats 5] [--size 224] [--threads 2] [--clock wall] [--jit]

Prints a line for each figure: seconds, and the ratio to the float pass (or step) of the same run. Weights are random:
time doesn't depend on them. Float is the user's model, batch norms and all; the simulation that runs has them folded,
the one that is trained has them as they are. Passes run as `tf.function`s, steps by `train_on_batch`; --jit compiles
the steps with XLA, float and quantized, as `compile` does by default.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time


def parsed():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: on a machine with other work")
    parser.add_argument("--jit", action="store_true", help="compile training steps with XLA")
    return parser.parse_args()


def interleaved(tasks, repeats, clock):
    """Median seconds of each task; they take turns, so that all see the same machine."""
    for task in tasks.values():
        task()
    times = {name: [] for name in tasks}
    for _ in range(repeats):
        for name, task in tasks.items():
            begin = clock()
            task()
            times[name].append(clock() - begin)
    return {name: statistics.median(t) for name, t in times.items()}


def main():
    options = parsed()
    os.environ["OMP_NUM_THREADS"] = os.environ["TF_NUM_INTRAOP_THREADS"] = str(options.threads)
    os.environ["TF_NUM_INTEROP_THREADS"] = "1"
    os.environ["BITWRIGHT_THREADS"] = str(options.threads)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import keras
    import numpy as np

    from bitwright.quantsim import QuantSim

    clock = time.perf_counter if options.clock == "wall" else time.process_time
    shape = (options.size, options.size, 3)

    def network():
        keras.utils.set_random_seed(0)
        return keras.applications.MobileNetV2(shape, weights=None, classifier_activation=None)

    model = network()
    rng = np.random.default_rng(0)
    x = rng.normal(size=(options.batch, *shape)).astype(np.float32)
    y = rng.integers(0, 1000, options.batch)
    common = {"weights": "int8", "activations": "uint8"}
    sims = {
        scheme: QuantSim(model, scheme=scheme, **common).apply("fold_batch_norm").calibrate([x])
        for scheme in ("minmax", "sqnr")
    }
    found = interleaved(
        {
            "float pass": inference(model, x),
            "simulated pass": inference(sims["minmax"].model, x),
            **{f"calibration, {scheme}, a batch": calibration(sim, x) for scheme, sim in sims.items()},
        },
        options.repeats,
        clock,
    )

    def step_of(model):
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.SGD(1e-4, momentum=0.9), loss=loss, jit_compile=options.jit)
        return lambda: model.train_on_batch(x, y)

    qat = QuantSim(model, scheme="minmax", **common).calibrate([x])
    found |= interleaved(
        {
            "float step": step_of(network()),
            "QAT step, regular": step_of(qat.trainable()),
            "QAT step, range learning": step_of(qat.trainable(range_learning=True)),
        },
        max(options.repeats // 2, 2),
        clock,
    )
    print(f"Keras {keras.__version__} on {keras.backend.backend()}, {options.size}², batch {options.batch}, "
          f"{options.threads} threads, {options.clock} time")  # fmt: skip
    for name, seconds in found.items():
        base = found["float step" if "step" in name else "float pass"]
        print(f"{name:32} {seconds:8.3f} s {seconds / base:6.2f} ×")


def inference(model, x):
    """A compiled pass, results on the host."""
    import keras

    if keras.backend.backend() != "tensorflow":
        return lambda: model.predict_on_batch(x)
    import tensorflow as tf

    function = tf.function(lambda images: model(images, training=False))
    images = tf.constant(x)
    return lambda: function(images).numpy()


def calibration(sim, x):
    """The streaming pass of a calibration: the float network with every site's statistic, over one batch."""
    from bitwright.collect import collect
    from bitwright.progress import Silent
    from bitwright.ranges import activation_requests

    data = sim.open([x])
    session = None

    def open_session(source, taps):
        nonlocal session
        session = session or sim.backend.session(sim.native, taps)
        return session

    def run():
        requests = activation_requests(sim.graph, sim.plan, sim.plan.activations)
        collect(requests, open_session, data, progress=Silent())

    return run


if __name__ == "__main__":
    main()
