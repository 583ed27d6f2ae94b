"""Transformers are told by their structure alone, and the types that their residual streams need by their tokens."""

from __future__ import annotations

import numpy as np
import pytest

from bitwright import QuantSim
from bitwright.graph import OpKind, ParamRole, Place, TransformerKind, transformer
from bitwright.grids import QuantSpec, encoding_from_range
from bitwright.testing import models
from bitwright.testing.builder import Builder
from bitwright_analysis.family_types import _Tokens, family_types, patterns, told

WIDTH, TOKENS, ROWS = 12, 6, models.IDS


def attention(b, name, x):
    q, k, v = (b.linear(f"{name}_{n}", x, WIDTH) for n in "qkv")
    scores = b.softmax(f"{name}_softmax", b.matmul(f"{name}_scores", q, b.transpose(f"{name}_kt", k, 0, 2, 1)))
    return b.linear(f"{name}_out", b.matmul(f"{name}_mix", scores, v), WIDTH)


def mlp(b, name, x, gated):
    y = b.activation(f"{name}_act", b.linear(f"{name}_up", x, 20), "Sigmoid")
    if gated:
        y = b.binary(f"{name}_product", "Mul", y, b.linear(f"{name}_gate", x, 20))
    return b.linear(f"{name}_down", y, WIDTH)


def network(kind, *, massive=1.0, head=ROWS):
    """Two blocks. `massive` is by how much one token's embedding is larger than the others'."""
    b = Builder(3)
    if kind == "vision":
        x = b.conv("patches", b.input("x", 3, 8, 12), WIDTH, 4, stride=4)
        x = b.transpose("tokens", b.reshape("flat", x, WIDTH, TOKENS), 0, 2, 1)
        x = b.binary("placed", "Add", x, b.rng.normal(0, 1, (TOKENS, WIDTH)))
    else:
        table = b.rng.normal(0, 1, (ROWS, WIDTH))
        table[3] *= massive
        params = {ParamRole.WEIGHT: b.param("table", table)}
        x = b.input("ids", TOKENS, dtype="int64", channel_axis=None)
        x = b.op("embed", OpKind.EMBEDDING, "Gather", (x,), (None, TOKENS, WIDTH), params=params)
    for i in range(2):
        for part, branch in (("attention", attention), ("mlp", lambda *a: mlp(*a, gated=kind == "decoder"))):
            name = f"blocks_{i}_{part}"
            if kind == "post-norm":
                x = b.layer_norm(f"{name}_norm", b.binary(f"{name}_sum", "Add", x, branch(b, name, x)))
            else:
                y = branch(b, name, b.layer_norm(f"{name}_norm", x))
                x = b.binary(f"{name}_sum", "Add", x, y)
    if kind != "post-norm":
        x = b.linear("head", b.layer_norm("last", x), head)
    return b.build(x)


@pytest.mark.parametrize(
    ("built", "kind"),
    [
        (network("decoder"), TransformerKind.DECODER),
        (network("encoder", head=5), TransformerKind.ENCODER),
        (network("post-norm"), TransformerKind.POST_NORM),
        (network("vision"), TransformerKind.VISION),
    ],
)
def test_kinds_and_places(built, kind):
    found = transformer(built.graph)
    assert (found.kind, found.attentions) == (kind, 2)
    tensor = {op.id: op.output for op in built.graph}
    sums = {tensor[f"blocks_{i}_{part}_sum"] for i in (0, 1) for part in ("attention", "mlp")}
    at = {place: {t for t, p in found.places.items() if p is place} for place in Place}
    assert at[Place.SUM] - {tensor.get("placed")} == sums
    assert at[Place.HIDDEN] == {
        tensor[f"blocks_{i}_mlp_" + ("product" if kind is TransformerKind.DECODER else "act")] for i in (0, 1)
    }
    written = {tensor[f"blocks_{i}_{part}"] for i in (0, 1) for part in ("attention_out", "mlp_down")}
    assert at[Place.PROJECTION] >= written
    assert at[Place.EMBEDDING] == ({tensor["embed"]} if "embed" in tensor else set())
    assert at[Place.LOGITS] == ({tensor["head"]} if "head" in tensor else set())
    assert len(at[Place.NORM]) == sum(op.kind is OpKind.LAYER_NORM for op in built.graph)
    assert not any("scores" in t or "softmax" in t or "mix" in t for t in found.places)


def test_other_networks_are_none():
    for build in (models.residual, models.mlp, models.conv_bn_relu):
        assert transformer(build().graph) is None
    # A norm and an attention, but no sum that a norm reads.
    b = Builder(0)
    assert (
        transformer(b.build(attention(b, "a", b.layer_norm("n", b.input("x", TOKENS, WIDTH, channel_axis=2)))).graph)
        is None
    )


def calibrated(massive, overrides=None):
    """A decoder in PyTorch, calibrated on ids; one token's embedding is so many times as large as the others'.

    The table has 16 bits, so that what is lost is lost on the stream."""
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v, self.o = (torch.nn.Linear(WIDTH, WIDTH) for _ in range(4))
            self.gate, self.up, self.down = (torch.nn.Linear(*s) for s in ((WIDTH, 20), (WIDTH, 20), (20, WIDTH)))
            self.first, self.second = torch.nn.LayerNorm(WIDTH), torch.nn.LayerNorm(WIDTH)

        def forward(self, x):
            y = self.first(x)
            x = x + self.o((self.q(y) @ self.k(y).transpose(1, 2)).softmax(-1) @ self.v(y))
            y = self.second(x)
            return x + self.down(torch.sigmoid(self.gate(y)) * self.up(y))

    class Decoder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = torch.nn.Embedding(ROWS, WIDTH), torch.nn.Linear(WIDTH, ROWS)
            self.blocks, self.norm = torch.nn.Sequential(Block(), Block()), torch.nn.LayerNorm(WIDTH)
            with torch.no_grad():
                self.embed.weight[3] *= massive

        def forward(self, ids):
            return self.head(self.norm(self.blocks(self.embed(ids))))

    ids = torch.randint(0, ROWS, (32, TOKENS))
    sim = QuantSim(Decoder().eval(), ids[:2], scheme="minmax", target="default_per_channel",
                   overrides={"embed.weight": "int16", **(overrides or {})})  # fmt: skip
    return sim.calibrate([ids]), ids


def test_a_massive_token_needs_more_bits_on_the_stream():
    """One token is 200 times as large as the others: of 255 steps they have one or two. The override repairs it."""
    sim, ids = calibrated(200.0)
    found = family_types(sim, sim.open([ids]))
    assert found.kind == "decoder"
    needed = [s for s in found.sites if s.proposed != s.present]
    assert {s.place for s in needed} >= {"residual sum", "embedding"}
    assert {s.place for s in needed}.isdisjoint({"norm", "logits"})
    assert all(s.largest_to_typical > 20 and s.kurtosis > 20 and s.token_db < 25 for s in needed)
    assert found.after_db > found.before_db + 10
    # What was promised is what the override gives.
    again, _ = calibrated(200.0, overrides=found.overrides)
    real, seen = (again.predict([ids], simulated=s)[0] for s in (False, True))
    measured = -10 * np.log10(np.square(seen - real).sum() / np.square(real).sum())
    assert measured == pytest.approx(found.after_db, abs=0.1)
    assert f"{found.after_db:.1f} dB in place of {found.before_db:.1f} dB" in told(found)


def test_tokens_of_one_size_keep_their_types():
    sim, ids = calibrated(1.0)
    found = family_types(sim, sim.open([ids]))
    assert not found.overrides and found.after_db is None
    assert found.stream_db > found.asked_db == 25
    assert "every token has 25 dB and more" in told(found)


def test_repeated_names_become_patterns_where_they_mean_nothing_else():
    model = network("decoder")
    sums = [f"blocks_{i}_mlp_sum" for i in (0, 1)]
    tensor = {op.id: op.output for op in model.graph}
    types = dict.fromkeys((tensor[s] for s in sums), "uint16")
    (pattern,) = patterns(model.graph, types)
    assert pattern == tensor[sums[0]].replace("0", "[0-9]")
    one = {tensor[sums[0]]: "uint16"}
    assert patterns(model.graph, one) == one
    other = {tensor[sums[0]]: "uint16", tensor[sums[1]]: "int16"}
    assert patterns(model.graph, other) == other


def vision(class_token, activations="uint8", patches=64, overrides=None):
    """A small vision transformer in PyTorch: the class token is so large, patches about 1; it alone is read."""
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    side = int(patches**0.5)

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v, self.o = (torch.nn.Linear(WIDTH, WIDTH) for _ in range(4))
            self.up, self.down = torch.nn.Linear(WIDTH, 20), torch.nn.Linear(20, WIDTH)
            self.first, self.second = torch.nn.LayerNorm(WIDTH), torch.nn.LayerNorm(WIDTH)
            for layer in (self.o, self.down):
                torch.nn.init.normal_(layer.weight, 0, 0.02 * class_token)
                torch.nn.init.zeros_(layer.bias)

        def forward(self, x):
            y = self.first(x)
            x = x + self.o((self.q(y) @ self.k(y).transpose(1, 2)).softmax(-1) @ self.v(y))
            return x + self.down(torch.sigmoid(self.up(self.second(x))))

    class Vision(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.patches = torch.nn.Conv2d(3, WIDTH, 4, 4)
            torch.nn.init.normal_(self.patches.weight, 0, 48**-0.5)
            self.token = torch.nn.Parameter(class_token * torch.randn(1, 1, WIDTH))
            self.blocks, self.norm = torch.nn.Sequential(Block(), Block()), torch.nn.LayerNorm(WIDTH)
            self.head = torch.nn.Linear(WIDTH, 5)

        def forward(self, x):
            x = self.patches(x).flatten(2).transpose(1, 2)
            x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1)
            return self.head(self.norm(self.blocks(x))[:, 0])

    x = torch.randn(64, 3, 4 * side, 4 * side)
    weights = "int8" if activations == "uint8" else "int16"
    sim = QuantSim(Vision().eval(), x[:2], target="default_per_channel", weights=weights, activations=activations,
                   overrides=overrides)  # fmt: skip
    return sim.calibrate([x]), x


def test_a_class_token_far_smaller_than_the_patches_counts():
    """It has 40 dB less 29 of them on the patches' grid, and is one token of 65: a mean over tokens looks well."""
    sim, x = vision(1 / 28)
    found = family_types(sim, sim.open([x]))
    assert found.kind == "vision transformer"
    needed = {s.site: s for s in found.sites if s.proposed != s.present}
    assert {s.place for s in needed.values()} >= {"residual sum", "embedding"}
    assert {s.proposed for s in needed.values()} == {"uint16"}
    assert found.stream_db < found.asked_db == 25
    assert found.after_db > found.before_db + 10


def test_a_class_token_as_large_as_the_patches_keeps_its_type():
    sim, x = vision(1.0)
    found = family_types(sim, sim.open([x]))
    assert not found.overrides


def test_where_16_bits_on_one_grid_do_not_do_a_float_does():
    sim, x = vision(1 / 28, "uint16")
    found = family_types(sim, sim.open([x]))
    needed = [s for s in found.sites if s.proposed != s.present]
    assert {s.place for s in needed} >= {"residual sum", "embedding"}
    assert {(s.present, s.proposed) for s in needed} == {("uint16", "float16")}
    assert found.stream_db < found.asked_db == 62
    assert found.after_db > found.before_db + 6
    assert "62 dB are asked for" in told(found)


def test_where_so_many_floats_of_16_bits_are_too_much_some_are_left_as_they_are():
    """Each gives 74 dB; of all together more is asked for than that."""
    sim, x = vision(1 / 28, "uint16")
    found = family_types(sim, sim.open([x]), enough_db=68.5)
    types = {s.proposed for s in found.sites if s.place == "residual sum"}
    assert types >= {"float16", "float"}
    bound = family_types(sim, sim.open([x]), enough_db=75.0)
    assert "float16" not in {s.proposed for s in bound.sites}
    exact = [s.site for s in bound.sites if s.proposed == "float"]
    again, _ = vision(1 / 28, "uint16", overrides=bound.overrides)
    assert exact and all(again.plan.spec(s) is None for s in exact)


def test_a_token_too_massive_for_16_bits_gets_a_float():
    """100,000 times the others: 16 bits leave them nothing, as 8 do."""
    sim, ids = calibrated(1e5)
    found = family_types(sim, sim.open([ids]))
    assert "float16" in {s.proposed for s in found.sites if s.place == "residual sum"}


def test_places_of_images_of_several_sizes_are_not_told_apart():
    grid = encoding_from_range(QuantSpec(8, signed=False, symmetric=False), -1.0, 1.0)
    rng = np.random.default_rng(0)
    small, large = (rng.uniform(-1, 1, (4, n, 6)).astype(np.float32) for n in (5, 7))
    small[:, 0] /= 50
    apart, joined, mixed = _Tokens(grid, placed=True), _Tokens(grid, placed=False), _Tokens(grid, placed=True)
    for tokens, batches in ((apart, [small]), (joined, [small, large]), (mixed, [small, large])):
        for batch in batches:
            tokens.add(batch, 2)
    assert mixed.noise == pytest.approx(joined.noise) and apart.noise > 4 * mixed.noise
    first = small[:, 0].astype(np.float64)
    lost = np.square(grid.fake_quantize(small[:, 0]) - first).mean(axis=1) / np.square(first).mean(axis=1)
    assert apart.noise == pytest.approx(lost.mean())
