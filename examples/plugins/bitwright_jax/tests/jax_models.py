"""Small models, as users write them: functions with a pytree of parameters, and flax.nnx modules."""

import jax
import jax.numpy as jnp
import numpy as np
from bitwright_jax import JaxFunction
from flax import nnx
from jax import lax

RNG = np.random.default_rng(0)
IMAGES = RNG.normal(size=(8, 6, 6, 3)).astype(np.float32)
TOKENS = RNG.integers(0, 12, (8, 4)).astype(np.int32)


def normal(*shape):
    return (RNG.normal(size=shape) / np.sqrt(np.prod(shape[:-1]))).astype(np.float32)


def norm(channels):
    low, high = (RNG.uniform(a, 2, channels).astype(np.float32) for a in (0.5, 0.6))
    return {"scale": low, "bias": normal(channels), "mean": normal(channels), "var": high}


def conv(p, x, groups=1, stride=1):
    y = lax.conv_general_dilated(x, p["kernel"], (stride, stride), "SAME", feature_group_count=groups,
                                 dimension_numbers=("NHWC", "HWIO", "NHWC"))  # fmt: skip
    return y + p["bias"] if "bias" in p else y


def batch_norm(p, x):
    return (x - p["mean"]) / jnp.sqrt(p["var"] + 1e-5) * p["scale"] + p["bias"]


CNN = {
    "first": norm(3), "conv1": {"kernel": normal(3, 3, 3, 8), "bias": normal(8)}, "norm": norm(8),
    "depthwise": {"kernel": normal(3, 3, 1, 8)}, "conv2": {"kernel": normal(1, 1, 8, 4), "bias": normal(4)},
    "slope": np.float32([0.1, 0.2, 0.3, 0.4]), "head": {"kernel": normal(8, 5), "bias": normal(5)},
}  # fmt: skip


def cnn(p, image, gain):
    """A batch norm ahead, convolutions, a residual, a concatenation; two inputs, two outputs."""
    x = jax.nn.relu(batch_norm(p["norm"], conv(p["conv1"], batch_norm(p["first"], image))))
    x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    x = conv(p["conv2"], jnp.clip(conv(p["depthwise"], x, groups=8), 0, 6))
    y = jnp.concatenate([x, x + jax.nn.relu(x) * gain[:, None, None]], -1)
    return jax.nn.softmax(y.mean((1, 2)) @ p["head"]["kernel"] + p["head"]["bias"]), jnp.tanh(x)


class Decoder(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(3, 6, (3, 3), rngs=rngs)
        self.up = nnx.ConvTranspose(6, 4, (4, 4), strides=(2, 2), use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.out = nnx.ConvTranspose(4, 3, (3, 3), strides=(2, 2), padding="VALID", rngs=rngs)

    def __call__(self, image):
        x = nnx.relu(self.norm(self.up(nnx.leaky_relu(self.conv(image), 0.2))))
        return self.out(nnx.avg_pool(x, (2, 2), (1, 1), padding="SAME"))


class Block(nnx.Module):
    """Embedding, masked attention, a feed-forward part, the embedding's table again as the output layer."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(12, 8, rngs=rngs)
        self.first, self.second = nnx.LayerNorm(8, rngs=rngs), nnx.RMSNorm(8, rngs=rngs)
        self.query, self.key, self.value = (nnx.LinearGeneral(8, (2, 4), rngs=rngs) for _ in range(3))
        self.out = nnx.LinearGeneral((2, 4), 8, axis=(-2, -1), rngs=rngs)
        self.up, self.down = nnx.Linear(8, 16, rngs=rngs), nnx.Linear(16, 8, rngs=rngs)

    def __call__(self, ids):
        x = self.embed(ids)
        h = self.first(x)
        scores = jnp.einsum("bqhd,bkhd->bhqk", self.query(h), self.key(h)) / 2.0
        scores = jnp.where(jnp.tril(jnp.ones((4, 4), bool)), scores, -1e30)
        x = x + self.out(jnp.einsum("bhqk,bkhd->bqhd", nnx.softmax(scores), self.value(h)))
        x = x + self.down(nnx.gelu(self.up(self.second(x))))
        return self.embed.attend(x)


GAIN = RNG.normal(size=(8, 4)).astype(np.float32)
MODELS = {
    "cnn": (lambda: JaxFunction(cnn, CNN), {"image": IMAGES, "gain": GAIN}),
    "decoder": (lambda: Decoder(nnx.Rngs(0)), {"image": IMAGES}),
    "block": (lambda: Block(nnx.Rngs(0)), {"ids": TOKENS}),
}
