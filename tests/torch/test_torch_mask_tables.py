"""Tables of PyTorch models in which rows are looked up: those of masks stay in float, however they are held; others
keep their grids."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from bitwright.placement import Float  # noqa: E402
from bitwright.simulation import QuantSim  # noqa: E402
from bitwright.verify import sqnr, verify  # noqa: E402

S, D, N = 12, 16, 24
X = torch.randn(N, S, D, generator=torch.Generator().manual_seed(0))
ROWS = torch.arange(S).expand(N, S).contiguous()
FUTURE = torch.ones(S, S).triu(1) > 0
VALUES = {
    "-1e4": (-1e4, torch.float32),
    "float32's lowest": (float(np.finfo(np.float32).min), torch.float32),
    "float16's lowest": (float(np.finfo(np.float16).min), torch.float16),
    "bfloat16's lowest": (float(torch.finfo(torch.bfloat16).min), torch.bfloat16),
    "float64's lowest": (float(np.finfo(np.float64).min), torch.float64),
    "-inf": (-torch.inf, torch.float32),
}


class Attention(nn.Module):
    def __init__(self, offset, table):
        super().__init__()
        torch.manual_seed(1)
        self.offset = offset
        self.k = nn.Linear(D, D)
        self.table = table

    def forward(self, q, rows):
        k = self.k(q)
        scores = q @ k.transpose(1, 2) * D**-0.5
        return torch.softmax(scores + self.offset(self.table, rows).to(scores.dtype), -1) @ k


def triangle(value=-1e4, dtype=torch.float32):
    return torch.zeros(S, S, dtype=dtype).masked_fill(FUTURE, value)


def held(values):
    return nn.Embedding(*values.shape, _weight=values)


def buckets(table, rows):
    """One value for each pair of positions, as T5 looks up its biases."""
    return table((rows[:, None] > rows[:, :, None]).long()).squeeze(-1)


FORMS = {
    "embedding": (lambda t, rows: t(rows), lambda: held(triangle())),
    "frozen embedding": (lambda t, rows: t(rows), lambda: nn.Embedding.from_pretrained(triangle())),
    "by the difference": (buckets, lambda: held(torch.tensor([[0.0], [-1e4]]))),
    "embedding of a parameter": (lambda t, rows: nn.functional.embedding(rows, t), lambda: nn.Parameter(triangle())),
    "indexed": (lambda t, rows: t[rows], lambda: nn.Parameter(triangle())),
    "indexed twice": (lambda t, rows: t[rows[:, :, None], rows[:, None]], lambda: nn.Parameter(triangle())),
    "behind heads": (lambda t, rows: t[:, rows[0]], lambda: nn.Parameter(triangle()[None])),
    "columns": (lambda t, rows: t.index_select(1, rows[0]), lambda: nn.Parameter(triangle())),
    "along an axis": (
        lambda t, rows: torch.take_along_dim(t, rows[0][:, None].expand(S, S), 0), lambda: nn.Parameter(triangle())
    ),
    "with a slope": (
        lambda t, rows: t(rows), lambda: held(triangle() - 0.1 * (torch.arange(S) - torch.arange(S)[:, None]).abs())
    ),
    "flags": (lambda t, rows: (1 - t(rows)) * -1e4, lambda: held((~FUTURE).float())),
}  # fmt: skip


def simulated(offset, table, **options):
    sim = QuantSim(Attention(offset, table).eval(), (X[:2], ROWS[:2]), **options)
    data = dict(zip(sim.graph.inputs, (X.numpy(), ROWS.numpy()), strict=False))
    return sim.calibrate(data), data


def quality(sim, data):
    return sqnr(sim.predict(data, simulated=False)[0], sim.predict(data)[0])


@pytest.mark.parametrize("form", FORMS)
def test_looked_up_masks_keep_the_scores(form):
    offset, table = FORMS[form]
    sim, data = simulated(offset, table())
    assert quality(sim, data) > 30
    assert form == "flags" or not any("table" in site for site in sim.plan.quantized)
    assert "k.weight" in sim.plan.quantized


@pytest.mark.parametrize("value", VALUES)
def test_embeddings_of_masks_export(value, tmp_path):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*overflow.*")
        sim, data = simulated(FORMS["embedding"][0], held(triangle(*VALUES[value])))
        assert quality(sim, data) > 30
        sim.export(tmp_path, name="net")
        assert verify(tmp_path).problems == []


class Fused(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.k, self.table = nn.Linear(D, D), held(triangle())

    def forward(self, q, rows):
        k = self.k(q)
        return nn.functional.scaled_dot_product_attention(q, k, k, self.table(rows))


def test_masks_given_to_fused_attention_stay_in_float():
    sim = QuantSim(Fused().eval(), (X[:2], ROWS[:2]))
    data = dict(zip(sim.graph.inputs, (X.numpy(), ROWS.numpy()), strict=False))
    assert quality(sim.calibrate(data), data) > 30
    assert isinstance(sim.plan["table.weight"].decision, Float)


@pytest.mark.parametrize("scale", [1, 8])
def test_biases_by_position_keep_their_grid(scale):
    """T5's and Swin's: small values, one for each difference of positions, added to scores."""
    values = torch.randn(2 * S, 1, generator=torch.Generator().manual_seed(2)) * scale
    values[3] = 25 * scale
    table = held(values)
    sim, _ = simulated(lambda t, rows: t(rows[:, None] - rows[:, :, None] + S).squeeze(-1), table)
    assert not any(t.mask for t in sim.graph.tensors.values())
    assert "table.weight" in sim.plan.quantized


class Words(nn.Module):
    """Words and positions, summed; what reads the sum is given."""

    def __init__(self, read, outlier):
        super().__init__()
        torch.manual_seed(3)
        self.words, self.positions = nn.Embedding(50, D), nn.Embedding(S, D)
        self.norm, self.out = nn.LayerNorm(D), nn.Linear(D, 4)
        self.read = read
        with torch.no_grad():
            self.words.weight[7, 3] = outlier

    def forward(self, ids):
        x = self.words(ids) * 32 + self.positions(ids % S)
        return self.read(self, x)


READERS = {
    "norm": lambda m, x: torch.softmax(m.out(m.norm(x)), -1),
    "product": lambda m, x: torch.softmax(m.out(x), -1),
    "nothing": lambda m, x: x,
    "maximum": lambda m, x: m.out(x.amax(1)),
}


@pytest.mark.parametrize("outlier", [3.0, 1500.0])
@pytest.mark.parametrize("read", READERS)
def test_tables_of_words_keep_their_grid(read, outlier):
    ids = torch.arange(N * S).reshape(N, S) % 50
    sim = QuantSim(Words(READERS[read], outlier).eval(), ids[:2])
    assert {"words.weight", "positions.weight"} <= set(sim.plan.quantized)
    assert not any(t.mask for t in sim.graph.tensors.values())


def test_a_table_of_masks_that_is_trained_stays_in_float(tmp_path):
    sim, data = simulated(FORMS["embedding"][0], held(triangle()))
    model = sim.trainable(range_learning=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(X, ROWS).square().mean().backward()
        optimizer.step()
    sim.take()
    assert isinstance(sim.plan["table.weight"].decision, Float)
    assert quality(sim, data) > 30
    sim.export(tmp_path, name="net")
    assert verify(tmp_path).problems == []
