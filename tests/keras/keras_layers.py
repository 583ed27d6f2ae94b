"""Every layer class of `keras.layers` in a small functional model, with data that suit it."""

# ruff: noqa: PLW0108

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import keras
import numpy as np
from keras import layers as L

Shapes = tuple[tuple[int, ...], ...]
Call = Callable[..., Any]

VECTOR, STEPS, IMAGE, VOLUME = ((6,),), ((8, 4),), ((8, 8, 4),), ((4, 6, 6, 3),)
PAIR, LISTS = ((8, 4), (8, 4)), ((8, 8, 3), (8, 8, 3))


def _same(layer: str, *ranks: int, **options: Any) -> dict[str, tuple[Shapes, Call]]:
    """One entry for each rank: Conv1D, Conv2D, Conv3D."""
    shapes = {1: STEPS, 2: IMAGE, 3: VOLUME}
    return {
        f"{layer}{r}D": (shapes[r], lambda x, r=r: getattr(L, f"{layer}{r}D")(**options)(x)) for r in ranks
    }  # fmt: skip


def _dense_after(call: Call) -> Call:
    """A layer between two dense ones, so that its input is not a model input and its output no model output."""
    return lambda x: L.Dense(3)(call(L.Dense(6)(x)))


def _ids(call: Call) -> Call:
    """For layers that take whole numbers; their inputs are drawn as such."""
    call.__dict__["ids"] = True
    return call


def _cells(cell: Call) -> Call:
    return lambda x: L.RNN(cell())(x)


CASES: Mapping[str, tuple[Shapes, Call]] = {
    # core
    "Dense": (VECTOR, lambda x: L.Dense(5, activation="relu")(x)),
    "EinsumDense": (STEPS, lambda x: L.EinsumDense("abc,cd->abd", (None, 5), bias_axes="d")(x)),
    "Embedding": (((8,),), _ids(lambda x: L.Embedding(20, 5)(x))),
    "ReversibleEmbedding": (((8,),), _ids(lambda x: _reversible(x))),
    "Identity": (VECTOR, _dense_after(lambda x: L.Identity()(x))),
    "Activation": (VECTOR, _dense_after(lambda x: L.Activation("gelu")(x))),
    "Lambda": (VECTOR, _dense_after(lambda x: L.Lambda(lambda t: t * 2, output_shape=(6,))(x))),
    "Masking": (STEPS, lambda x: L.LSTM(4)(L.Masking()(x))),
    "Wrapper": (VECTOR, lambda x: Wrapped(L.Dense(4))(x)),
    # convolutions
    **_same("Conv", 1, 2, 3, filters=5, kernel_size=3, padding="same", strides=2, activation="relu"),
    "Conv1DTranspose": (STEPS, lambda x: L.Conv1DTranspose(5, 3, strides=2, padding="same")(x)),
    "Conv2DTranspose": (IMAGE, lambda x: L.Conv2DTranspose(5, 3, strides=2, padding="same")(x)),
    "Conv3DTranspose": (VOLUME, lambda x: L.Conv3DTranspose(4, 3, strides=2, padding="same")(x)),
    **_same("DepthwiseConv", 1, 2, kernel_size=3, padding="same", depth_multiplier=2),
    **_same("SeparableConv", 1, 2, filters=5, kernel_size=3, padding="same", activation="relu"),
    # activations
    "ELU": (VECTOR, _dense_after(lambda x: L.ELU()(x))),
    "LeakyReLU": (VECTOR, _dense_after(lambda x: L.LeakyReLU(0.1)(x))),
    "PReLU": (IMAGE, lambda x: L.Conv2D(3, 3)(L.PReLU(shared_axes=[1, 2])(L.Conv2D(5, 1)(x)))),
    "ReLU": (VECTOR, _dense_after(lambda x: L.ReLU(6.0)(x))),
    "Softmax": (VECTOR, _dense_after(lambda x: L.Softmax()(x))),
    # normalization
    "BatchNormalization": (IMAGE, lambda x: L.Conv2D(3, 3, padding="same")(
        L.BatchNormalization()(L.Conv2D(5, 1, activation="relu")(x)))),
    "LayerNormalization": (VECTOR, _dense_after(lambda x: L.LayerNormalization()(x))),
    "RMSNormalization": (VECTOR, _dense_after(lambda x: L.RMSNormalization()(x))),
    "GroupNormalization": (IMAGE, lambda x: L.Conv2D(3, 1)(L.GroupNormalization(2)(L.Conv2D(6, 1)(x)))),
    "UnitNormalization": (VECTOR, _dense_after(lambda x: L.UnitNormalization()(x))),
    "SpectralNormalization": (VECTOR, lambda x: L.SpectralNormalization(L.Dense(5))(x)),
    "Normalization": (VECTOR, lambda x: L.Dense(3)(L.Normalization(mean=[0.5] * 6, variance=[2.0] * 6)(x))),
    "Rescaling": (VECTOR, lambda x: L.Dense(3)(L.Rescaling(0.5, 0.1)(x))),
    # pooling
    **_same("AveragePooling", 1, 2, 3, pool_size=2),
    **_same("MaxPooling", 1, 2, 3, pool_size=2),
    **_same("GlobalAveragePooling", 1, 2, 3),
    **_same("GlobalMaxPooling", 1, 2, 3),
    **{f"Adaptive{kind}Pooling{r}D": (shapes, lambda x, k=kind, r=r, n=n: getattr(L, f"Adaptive{k}Pooling{r}D")(n)(x))
       for kind in ("Average", "Max") for r, shapes, n in ((1, STEPS, 3), (2, IMAGE, 3), (3, VOLUME, 2))},
    # attention
    "MultiHeadAttention": (PAIR, lambda a, b: L.MultiHeadAttention(2, 4)(a, b, use_causal_mask=True)),
    "GroupedQueryAttention": (PAIR, lambda a, b: L.GroupQueryAttention(4, 4, 2)(a, b)),
    "Attention": (PAIR, lambda a, b: L.Attention()([a, b])),
    "AdditiveAttention": (PAIR, lambda a, b: L.AdditiveAttention()([a, b])),
    # recurrent
    "LSTM": (STEPS, lambda x: L.Dense(3)(L.LSTM(5)(x))),
    "GRU": (STEPS, lambda x: L.Dense(3)(L.GRU(5)(x))),
    "SimpleRNN": (STEPS, lambda x: L.Dense(3)(L.SimpleRNN(5)(x))),
    "Bidirectional": (STEPS, lambda x: L.Dense(3)(L.Bidirectional(L.LSTM(4, return_sequences=True))(x))),
    "TimeDistributed": (((3, 6, 6, 2),), lambda x: L.TimeDistributed(L.Conv2D(3, 3))(x)),
    "ConvLSTM1D": (((3, 8, 2),), lambda x: L.ConvLSTM1D(3, 3)(x)),
    "ConvLSTM2D": (((3, 6, 6, 2),), lambda x: L.ConvLSTM2D(3, 3)(x)),
    "ConvLSTM3D": (((3, 4, 4, 4, 2),), lambda x: L.ConvLSTM3D(2, 3)(x)),
    "RNN": (STEPS, _cells(lambda: L.GRUCell(4))),
    "LSTMCell": (STEPS, _cells(lambda: L.LSTMCell(4))),
    "GRUCell": (STEPS, _cells(lambda: L.GRUCell(4))),
    "SimpleRNNCell": (STEPS, _cells(lambda: L.SimpleRNNCell(4))),
    "StackedRNNCells": (STEPS, _cells(lambda: L.StackedRNNCells([L.LSTMCell(4), L.GRUCell(3)]))),
    # merging
    **{name: (LISTS, lambda a, b, n=name: getattr(L, n)()([L.Conv2D(4, 1)(a), L.Conv2D(4, 1)(b)]))
       for name in ("Add", "Average", "Concatenate", "Maximum", "Minimum", "Multiply", "Subtract")},
    "Dot": (PAIR, lambda a, b: L.Dot(axes=2)([a, b])),
    # shapes
    "Flatten": (IMAGE, lambda x: L.Dense(3)(L.Flatten()(x))),
    "Permute": (STEPS, lambda x: L.Dense(3)(L.Permute((2, 1))(x))),
    "RepeatVector": (VECTOR, lambda x: L.Dense(3)(L.RepeatVector(4)(x))),
    "Reshape": (STEPS, lambda x: L.Dense(3)(L.Reshape((4, 8))(x))),
    **{f"Cropping{r}D": (s, lambda x, r=r: getattr(L, f"Cropping{r}D")(1)(x))
       for r, s in ((1, STEPS), (2, IMAGE), (3, VOLUME))},
    **{f"ZeroPadding{r}D": (s, lambda x, r=r: getattr(L, f"ZeroPadding{r}D")(1)(x))
       for r, s in ((1, STEPS), (2, IMAGE), (3, VOLUME))},
    **{f"UpSampling{r}D": (s, lambda x, r=r: getattr(L, f"UpSampling{r}D")(2)(x))
       for r, s in ((1, STEPS), (2, IMAGE), (3, VOLUME))},
    # regularization: nothing in inference
    **{name: (VECTOR, _dense_after(lambda x, n=name: getattr(L, n)(0.3)(x)))
       for name in ("Dropout", "AlphaDropout", "GaussianDropout", "GaussianNoise")},
    **{f"SpatialDropout{r}D": (s, lambda x, r=r: L.Dense(3)(getattr(L, f"SpatialDropout{r}D")(0.3)(x)))
       for r, s in ((1, STEPS), (2, IMAGE), (3, VOLUME))},
    "ActivityRegularization": (VECTOR, _dense_after(lambda x: L.ActivityRegularization(0.01)(x))),
    # preprocessing
    "CenterCrop": (IMAGE, lambda x: L.CenterCrop(5, 6)(x)),
    "Resizing": (IMAGE, lambda x: L.Conv2D(3, 1)(L.Resizing(5, 6)(x))),
    "CategoryEncoding": (((3,),), _ids(lambda x: L.Dense(3)(L.CategoryEncoding(20, output_mode="multi_hot")(x)))),
    "Discretization": (VECTOR, lambda x: L.Dense(3)(L.CategoryEncoding(4, output_mode="multi_hot")(
        L.Discretization([-1.0, 0.0, 1.0])(x)))),
    "Hashing": (((3,),), _ids(lambda x: L.Embedding(7, 4)(L.Hashing(7)(x)))),
    "HashedCrossing": (((1,), (1,)), _ids(lambda a, b: L.Embedding(9, 4)(L.HashedCrossing(9)((a, b))))),
    "IntegerLookup": (((3,),), _ids(lambda x: L.Embedding(9, 4)(L.IntegerLookup(vocabulary=[1, 3, 5, 7])(x)))),
    "MelSpectrogram": (((2048,),), lambda x: L.MelSpectrogram(256, 128, sampling_rate=8000, num_mel_bins=16)(x)),
    "STFTSpectrogram": (((512,),), lambda x: L.STFTSpectrogram(frame_length=64, frame_step=32)(L.Reshape((512, 1))(x))),
    "Pipeline": (IMAGE, lambda x: L.Conv2D(3, 1)(L.Pipeline([L.Rescaling(0.5), L.CenterCrop(6, 6)])(x))),
    "Equalization": (((8, 8, 3),), lambda x: L.Conv2D(3, 1)(L.Equalization(value_range=(-4, 4))(x))),
    "ContrastLimitedAdaptiveHistogramEqualization": (
        ((16, 16, 3),),
        lambda x: L.ContrastLimitedAdaptiveHistogramEqualization(value_range=(-4, 4), tile_grid_size=(2, 2))(x),
    ),
    "AutoContrast": (((8, 8, 3),), lambda x: L.Conv2D(3, 1)(L.AutoContrast(value_range=(-4, 4))(x))),
    **{
        name: (((8, 8, 3),), lambda x, n=name, o=options: L.Conv2D(3, 1)(getattr(L, n)(**o)(x)))
        for name, options in {
            "AugMix": {"value_range": (-4, 4)}, "CutMix": {}, "MixUp": {}, "RandAugment": {"value_range": (-4, 4)},
            "RandomBrightness": {"factor": 0.2, "value_range": (-4, 4)},
            "RandomColorDegeneration": {"factor": 0.2, "value_range": (-4, 4)},
            "RandomColorJitter": {"value_range": (-4, 4), "brightness_factor": 0.2},
            "RandomContrast": {"factor": 0.2, "value_range": (-4, 4)}, "RandomCrop": {"height": 6, "width": 6},
            "RandomElasticTransform": {"value_range": (-4, 4)}, "RandomErasing": {"value_range": (-4, 4)},
            "RandomFlip": {}, "RandomGaussianBlur": {"value_range": (-4, 4)}, "RandomGrayscale": {"factor": 0.2},
            "RandomHue": {"factor": 0.2, "value_range": (-4, 4)}, "RandomInvert": {"value_range": (-4, 4)},
            "RandomPerspective": {}, "RandomPosterization": {"factor": 4, "value_range": (-4, 4)},
            "RandomRotation": {"factor": 0.2}, "RandomSaturation": {"factor": 0.2, "value_range": (-4, 4)},
            "RandomSharpness": {"factor": 0.2, "value_range": (-4, 4)}, "RandomShear": {"x_factor": 0.2},
            "RandomTranslation": {"height_factor": 0.2, "width_factor": 0.2}, "RandomZoom": {"height_factor": 0.2},
            "Solarization": {"value_range": (-4, 4)},
        }.items()
    },
}  # fmt: skip
"""Layer → shapes of its inputs without the batch, and the calls."""

NO_MODEL = {
    "Layer": "the base class",
    "InputLayer": "in every model",
    "TFSMLayer": "needs a SavedModel; it runs one as it is",
    "JaxLayer": "needs JAX",
    "FlaxLayer": "needs Flax",
    "TorchModuleWrapper": "needs Keras on PyTorch",
    "MaxNumBoundingBoxes": "takes bounding boxes, no tensor",
    "StringLookup": "takes text",
    "TextVectorization": "takes text",
}
"""Classes without an entry, and why."""


class Wrapped(L.Wrapper):
    """`Wrapper` is a base class too; this one only calls its layer."""

    def call(self, x):
        return self.layer(x)


def _reversible(x: Any) -> Any:
    layer = L.ReversibleEmbedding(20, 5)
    return layer(layer(x), reverse=True)


NOT_OPENED = {
    "RandomShear": "Keras can't make it again from its configuration where a factor is left out",
}
"""Layers whose models aren't opened, and why. This list may only shrink."""

NOT_EXPORTED = {
    "Hashing": "ONNX has no hashes",
    "HashedCrossing": "ONNX has no hashes",
    "IntegerLookup": "ONNX has no lookup tables",
    "RandomCrop": "Keras says that it crops in inference, and doesn't, so that shapes contradict each other",
    "MelSpectrogram": "its Fourier transform isn't written",
    "ContrastLimitedAdaptiveHistogramEqualization": "its histograms can't be recorded",
}
"""Layers whose models get no QDQ ONNX file, and why. This list may only shrink."""

NOT_VERIFIED = {
    "Lambda": "a .keras file with a Lambda layer opens with safe_mode=False only",
    "RandomCrop": "Keras says that it crops in inference, and doesn't",
}
"""Layers whose exports `verify` can't open or run, and why. This list may only shrink."""


def classes() -> list[str]:
    """Names of the layer classes; of several names for one class, the class's own."""
    found = (v for v in vars(L).values() if inspect.isclass(v) and issubclass(v, L.Layer))
    return sorted({v.__name__ for v in found})


def model_of(name: str) -> tuple[keras.Model, dict[str, np.ndarray]]:
    """The model and 4 samples by input name."""
    keras.utils.set_random_seed(1)
    rng = np.random.default_rng(1)
    shapes, call = CASES[name]
    ids = "ids" in call.__dict__
    inputs = [keras.Input(s, dtype="int32" if ids else "float32", name=f"x{i}") for i, s in enumerate(shapes)]
    model = keras.Model(inputs, call(*inputs), name=name.lower())
    for variable in model.variables:
        if str(variable.dtype).startswith("float"):
            drawn = rng.normal(size=tuple(variable.shape)) * 0.3
            variable.assign(np.abs(drawn) + 0.3 if "variance" in variable.path else drawn + (variable.name == "gamma"))
    data = {}
    for x in model.inputs:  # where Keras computes before the graph begins (Equalization), it renames them
        shape = (4, *x.shape[1:])
        drawn = rng.integers(1, 8, shape) if ids else rng.normal(size=shape)
        data[x.name] = drawn.astype(np.int32 if ids else np.float32)
    return model, data
