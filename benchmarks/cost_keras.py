"""What quantization costs beside a float pass in Keras: MobileNetV2 of keras.applications, 224², batch 8, one run.

    pip install "bitwright[keras]"
    python benchmarks/cost_keras.py [--repeats 5] [--size 224] [--threads 2] [--clock wall] [--jit]

Prints a line for each figure: seconds, and the ratio to the float pass (or step) of the same run. Weights are random:
time doesn't depend on them. Float is the user's model, batch norms and all; the simulation that runs has them folded,
the one that is trained has them as they are. Passes run as `tf.function`s, steps by `train_on_batch`; --jit compiles
the steps with XLA, float and quantized, as `compile` does by default.
"""

from __future__ import annotations

import os

import cost


def main():
    parser = cost.parser(__doc__.splitlines()[0])
    parser.add_argument("--jit", action="store_true", help="compile training steps with XLA")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = os.environ["TF_NUM_INTRAOP_THREADS"] = str(options.threads)
    os.environ["TF_NUM_INTEROP_THREADS"] = "1"
    os.environ["BITWRIGHT_THREADS"] = str(options.threads)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import keras
    import numpy as np

    from bitwright.simulation import QuantSim

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
    found = cost.interleaved(
        {
            "float pass": inference(model, x),
            "simulated pass": inference(sims["minmax"].model, x),
            **{f"calibration, {scheme}, a batch": cost.calibration(sim, [x]) for scheme, sim in sims.items()},
        },
        options.repeats,
        options.clock,
    )

    def step_of(model):
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.SGD(1e-4, momentum=0.9), loss=loss, jit_compile=options.jit)
        return lambda: model.train_on_batch(x, y)

    qat = QuantSim(model, scheme="minmax", **common).calibrate([x])
    found |= cost.interleaved(
        {
            "float step": step_of(network()),
            "QAT step, regular": step_of(qat.trainable()),
            "QAT step, range learning": step_of(qat.trainable(range_learning=True)),
        },
        max(options.repeats // 2, 2),
        options.clock,
    )
    print(f"Keras {keras.__version__} on {keras.backend.backend()}, {options.size}², batch {options.batch}, "
          f"{options.threads} threads, {options.clock} time")  # fmt: skip
    cost.show(found, lambda name: "float step" if "step" in name else "float pass")


def inference(model, x):
    """A compiled pass, results on the host."""
    import keras

    if keras.backend.backend() != "tensorflow":
        return lambda: model.predict_on_batch(x)
    import tensorflow as tf

    function = tf.function(lambda images: model(images, training=False))
    images = tf.constant(x)
    return lambda: function(images).numpy()


if __name__ == "__main__":
    main()
