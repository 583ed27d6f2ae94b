"""Quantization-aware training with `model.fit` on Fashion-MNIST: a small depthwise CNN in 4 bits.

    apt-get install dataset-fashion-mnist
    python benchmarks/qat_keras.py [--data /usr/share/datasets/fashion-mnist] [--epochs 4]

The Keras twin of qat_torch.py: the same network, order of steps and learning rates, with callbacks in `fit`. Prints
test accuracy and loss of float, nearest rounding, AdaRound, regular QAT and range learning (both from the same
calibrated start, same steps, same learning rate of weights), with seconds. Runs on the Keras backend that
KERAS_BACKEND names.
"""

from __future__ import annotations

import math
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import fashion_mnist
import numpy as np
import qat


def read(folder, part):
    """Normalized images (N, 28, 28, 1) and labels."""
    images, labels = fashion_mnist.read_normalized(folder, part)
    return images[..., None], labels.astype(np.int32)


def depthwise_net(width=24):
    """28 × 28 gray images → 10 classes; 27 thousand parameters. Initialized as PyTorch does by default."""
    import keras
    from keras import layers

    def uniform(fan_in):
        return keras.initializers.RandomUniform(-(fan_in**-0.5), fan_in**-0.5)

    def activated(x):
        return layers.ReLU()(layers.BatchNormalization(momentum=0.9, epsilon=1e-5)(x))

    x = inputs = keras.Input((28, 28, 1), name="images")
    common = {"padding": "same", "use_bias": False}
    x = activated(layers.Conv2D(width, 3, 2, kernel_initializer=uniform(9), **common)(x))
    cin = width
    for cout, stride in ((2 * width, 1), (2 * width, 2), (4 * width, 1), (4 * width, 2)):
        x = activated(layers.DepthwiseConv2D(3, stride, depthwise_initializer=uniform(9), **common)(x))
        x = activated(layers.Conv2D(cout, 1, kernel_initializer=uniform(cin), **common)(x))
        cin = cout
    x = layers.GlobalAveragePooling2D()(x)
    head = layers.Dense(10, kernel_initializer=uniform(cin), bias_initializer=uniform(cin), name="logits")
    return keras.Model(inputs, head(x), name="depthwise_net")


def train(model, data, epochs, rate, options, seed=0):
    """`fit` with a one-cycle learning rate; half of the batches are flipped."""
    import keras

    class Batches(keras.utils.PyDataset):
        def __init__(self):
            super().__init__()
            self.generator = np.random.default_rng(seed)
            self.on_epoch_end()

        def __len__(self):
            return math.ceil(len(data[0]) / 128)

        def __getitem__(self, index):
            chosen = self.order[128 * index : 128 * (index + 1)]
            images = data[0][chosen]
            return images[:, :, ::-1] if self.flips[index] else images, data[1][chosen]

        def on_epoch_end(self):
            self.order = self.generator.permutation(len(data[0]))
            self.flips = self.generator.random(len(self)) < 0.5

    class OneCycle(keras.callbacks.Callback):
        """From rate / 25 up to rate in 30 % of the steps and down to next to nothing, by cosines (Smith 2018)."""

        done = 0

        def on_train_batch_begin(self, batch, logs=None):
            steps = epochs * len(batches) - 1
            peak = 0.3 * (steps + 1) - 1
            low, high, part = (
                (rate / 25, rate, self.done / peak) if self.done <= peak
                else (rate / 25e4, rate, (steps - self.done) / (steps - peak))
            )  # fmt: skip
            self.model.optimizer.learning_rate = low + (high - low) * (1 - math.cos(math.pi * part)) / 2
            self.done += 1

    batches = Batches()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(rate, epsilon=1e-8), loss=loss, jit_compile=options.jit)
    model.fit(batches, epochs=epochs, shuffle=False, callbacks=[OneCycle()], verbose=0)


def measured(model, data):
    """Accuracy in percent, mean cross-entropy."""
    logits = np.asarray(model.predict(data[0], batch_size=500, verbose=0), np.float64)
    hits = (logits.argmax(1) == data[1]).mean()
    logits -= logits.max(1, keepdims=True)
    losses = np.log(np.exp(logits).sum(1)) - logits[np.arange(len(logits)), data[1]]
    return 100 * hits, losses.mean()


def parsed():
    parser = qat.parser(__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--jit", action="store_true", help="compile training steps with XLA")
    return parser.parse_args()


def main():
    options = parsed()
    os.environ["OMP_NUM_THREADS"] = os.environ["TF_NUM_INTRAOP_THREADS"] = str(options.threads)
    os.environ["TF_NUM_INTEROP_THREADS"] = "1"
    import keras

    from bitwright.simulation import QuantSim
    from bitwright_keras import set_grid_rate

    keras.utils.set_random_seed(0)
    training = tuple(t[: options.limit] for t in read(options.data, "train"))
    test = read(options.data, "t10k")
    lines = qat.Lines()

    def say(what, model):
        lines(what, measured(model, test))

    model = depthwise_net()
    train(model, training, max(options.epochs * 3 // 2, 1), 5e-3, options)
    say("float", model)
    calibration = np.split(training[0][:1024], 8)

    def opened():
        return QuantSim(model, weights="int4", activations="uint4", target="default_per_channel")

    sim = opened().apply("fold_batch_norm").calibrate(calibration)
    say("PTQ, nearest", sim.model)
    sim = opened().apply("fold_batch_norm").apply("adaround", calibration).calibrate(calibration)
    say("PTQ, AdaRound", sim.model)
    for name, learned in (("regular QAT", False), ("range learning", True)):
        sim = opened().calibrate(calibration)
        model_in_training = sim.trainable(range_learning=learned)
        if learned:
            set_grid_rate(model_in_training, options.grid_factor)
        train(model_in_training, training, options.epochs, options.rate, options, options.seed)
        sim.take()
        say(name, sim.model)
        sim.apply("batch_norm_reestimation", np.array_split(training[0][:8192], 16)).calibrate(calibration)
        say(f"{name}, BN re-estimated", sim.model)


if __name__ == "__main__":
    main()
