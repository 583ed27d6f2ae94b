"""What quantization costs beside a float pass in TensorFlow: MobileNetV2 of keras.applications, batch 8, one run.

    pip install "bitwright[tensorflow]"
    python benchmarks/cost_tensorflow.py [--repeats 5] [--size 224] [--threads 2] [--clock wall]

Prints a line for each figure: seconds, and the ratio to the float pass (or step) of the same run. Weights are random:
time doesn't depend on them. Float is the user's own graph with its batch norms, run as a `tf.function` and in a
session; the simulation has them folded. Training steps keep batch norms in their inference form, float and simulated.
"""

from __future__ import annotations

import os

import cost


def main():
    chosen = cost.parser(__doc__.splitlines()[0]).parse_args()
    for name in ("TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS", "BITWRIGHT_THREADS"):
        os.environ[name] = str(chosen.threads if "INTER" not in name else 1)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import keras
    import numpy as np
    import tensorflow as tf

    from bitwright.simulation import QuantSim
    from bitwright_tensorflow.graph.graph_function import GraphFunction
    from bitwright_tensorflow.graph.model import open_session
    from bitwright_tensorflow.simulate.building import declare_variables

    keras.utils.set_random_seed(0)
    shape = (chosen.size, chosen.size, 3)
    network = keras.applications.MobileNetV2(shape, weights=None, classifier_activation=None)

    @tf.function(input_signature=[tf.TensorSpec((None, *shape), tf.float32, name="images")])
    def classify(images):
        return network(images, training=False)

    rng = np.random.default_rng(0)
    x = rng.normal(size=(chosen.batch, *shape)).astype(np.float32)
    y = rng.integers(0, 1000, chosen.batch)
    given = tf.constant(x)
    sims = {}
    for scheme in ("minmax", "sqnr"):
        sim = QuantSim(classify, x, weights="int8", activations="uint8", scheme=scheme)
        sims[scheme] = sim.apply("fold_batch_norm").calibrate(x)
    source = QuantSim(classify, x, weights="int8", activations="uint8", scheme="minmax").calibrate(x)
    session = open_session(source.native)
    fetch = list(source.native.outputs)
    simulated = sims["minmax"].model
    function = simulated.function
    feed = simulated.inputs[0]
    found = cost.interleaved(
        {
            "float pass, function": lambda: classify(given),
            "float pass, session": lambda: session.run(fetch, {source.native.inputs[0]: x}),
            "simulated pass, function": lambda: function(given),
            "simulated pass, session": lambda: simulated.session.run(list(simulated.outputs), {feed: x}),
            **{f"calibration, {scheme}, a batch": cost.calibration(sim, x) for scheme, sim in sims.items()},
        },
        chosen.repeats,
        chosen.clock,
    )

    def step_of(function):
        """A step of gradient descent as a compiled function."""
        variables = function.trainable_variables

        @tf.function
        def step(x, y):
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(y, function(x)))
            for variable, gradient in zip(variables, tape.gradient(loss, variables), strict=True):
                if gradient is not None:
                    variable.assign_sub(1e-4 * gradient)
            return loss

        labels = tf.constant(y)
        return lambda: step(given, labels).numpy()

    model = source.native
    plain = GraphFunction(
        declare_variables(model), model.values, model.inputs, model.signature.outputs, model.signature
    )  # fmt: skip
    found |= cost.interleaved(
        {
            "float step": step_of(plain),
            "QAT step, regular": step_of(source.trainable().function),
            "QAT step, range learning": step_of(source.trainable(range_learning=True).function),
        },
        max(chosen.repeats // 2, 2),
        chosen.clock,
    )
    print(f"TensorFlow {tf.__version__}, {chosen.size}², batch {chosen.batch}, {chosen.threads} threads, "
          f"{chosen.clock} time")  # fmt: skip
    cost.show(
        found,
        lambda name: (
            "float step" if "step" in name else "float pass, session" if "session" in name else "float pass, function"
        ),
    )


if __name__ == "__main__":
    main()
