"""Modules that keep tensors on themselves and renew them when shapes change: detection heads, positions, masks."""

import copy
import functools
import warnings

import pytest

torch = pytest.importorskip("torch")

import onnxruntime as ort  # noqa: E402
from torch import nn  # noqa: E402

from bitwright import QuantSim  # noqa: E402
from bitwright.errors import ModelError  # noqa: E402
from bitwright.verify import sqnr  # noqa: E402
from bitwright_torch import CaptureNotice  # noqa: E402
from bitwright_torch.backend import TorchBackend  # noqa: E402


class Head(nn.Module):
    """As in YOLO: anchors for the last seen shape, an attribute of the class at first."""

    shape, anchors = None, torch.empty(0)

    def __init__(self):
        super().__init__()
        self.c = nn.Conv2d(8, 4, 1)

    def forward(self, x):
        y = self.c(x)
        if self.shape != x.shape:
            self.anchors = torch.arange(y.shape[2] * y.shape[3], dtype=y.dtype)[None, None] / 100
            self.shape = x.shape
        return y.view(x.shape[0], 4, -1) + self.anchors


class ByKey(nn.Module):
    """A dictionary and a list of what was made before."""

    def __init__(self):
        super().__init__()
        self.c, self.kept, self.seen = nn.Conv2d(8, 4, 1), {}, []

    def forward(self, x):
        key = (x.shape[2], x.shape[3])
        if key not in self.kept:
            self.kept[key] = torch.linspace(-1, 1, key[0] * key[1]).view(1, 1, *key)
            self.seen.append(self.kept[key])
        return self.c(x) * self.kept[key]


class WholeMask(nn.Module):
    """Kept with its batch: what was made for eight isn't right for four."""

    def __init__(self):
        super().__init__()
        self.c, self.mask = nn.Conv2d(8, 4, 1), None

    def forward(self, x):
        if self.mask is None or self.mask.shape[0] != x.shape[0]:
            self.mask = torch.ones(x.shape[0], 1, *x.shape[2:], dtype=x.dtype) * 0.5
        return self.c(x) * self.mask


class TwoResults(Head):
    """As ultralytics' heads: a result that takes its batch from what was kept, and one that doesn't."""

    def forward(self, x):
        y = self.c(x)
        if self.shape != y.shape:
            self.anchors = torch.arange(y.shape[2] * y.shape[3], dtype=y.dtype)[None, None] / 100
            self.shape = y.shape
        boxes = y.view(y.shape[0], 2, 2, -1).transpose(1, 2).softmax(1).reshape(y.shape[0], 4, -1)
        return boxes + self.anchors, y


class KeptLength(nn.Module):
    """Keeps a batch size as a plain number; every second batch would fit it."""

    def __init__(self):
        super().__init__()
        self.c, self.size = nn.Conv2d(8, 4, 1), None

    def forward(self, x):
        if self.size is None or self.size != x.shape[0]:
            self.size = x.shape[0]
        y = self.c(x)
        return y.reshape(self.size, -1), y


class ByChance(nn.Module):
    """A result that always is as long as the sample's batch."""

    def __init__(self):
        super().__init__()
        self.c = nn.Conv2d(8, 4, 1)

    def forward(self, x):
        y = self.c(x)
        return y, y.mean((0, 2, 3))


def net(kind):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), kind()).eval()


@pytest.mark.parametrize("warm", [None, 4, 8])
@pytest.mark.parametrize("kind", [Head, ByKey, WholeMask])
def test_captured_right_and_left_as_it_was(kind, warm, tmp_path):
    x = torch.randn(8, 3, 12, 12, generator=torch.Generator().manual_seed(1))
    module = net(kind)
    if warm:
        module(x[:warm])
    before = copy.deepcopy(module[2].__dict__)
    with warnings.catch_warnings():
        warnings.simplefilter("error", CaptureNotice)
        sim = QuantSim(module, x[:4])
    now = module[2].__dict__
    assert set(now) == set(before) and type(module[2]).__dict__.get("shape") is None
    for name, value in before.items():
        assert torch.equal(now[name], value) if isinstance(value, torch.Tensor) else str(now[name]) == str(value)
    sim.calibrate(x)
    for size in (1, 3, 8):
        with torch.no_grad():
            assert torch.equal(sim.native(x[:size]), net(kind)(x[:size]))
    bundle = sim.export(tmp_path, name="m")
    for form in ("model", "qdq"):
        session = ort.InferenceSession(bundle.files[form])
        assert not isinstance(session.get_inputs()[0].shape[0], int)
        for size in (1, 3, 8):
            (found,) = session.run(None, {session.get_inputs()[0].name: x[:size].numpy()})
            assert sqnr(net(kind)(x[:size]).detach().numpy(), found) > (25 if form == "qdq" else 100)


@pytest.mark.parametrize("warm", [None, 4])
@pytest.mark.parametrize("kind", [TwoResults, KeptLength, ByChance])
def test_every_result_has_the_batch_that_it_is_given(kind, warm, tmp_path):
    x = torch.randn(8, 3, 12, 12, generator=torch.Generator().manual_seed(1))
    module = net(kind)
    if warm:
        module(x[:warm])
    with warnings.catch_warnings():
        warnings.simplefilter("error", CaptureNotice)
        sim = QuantSim(module, x[:4])
    sim.calibrate(x)
    bundle = sim.export(tmp_path, name="m")
    session = ort.InferenceSession(bundle.files["model"])
    for size in (1, 3, 8):
        with torch.no_grad():
            wanted = net(kind)(x[:size])
        found = sim.native(x[:size])
        exported = session.run(None, {session.get_inputs()[0].name: x[:size].numpy()})
        for a, b, c in zip(wanted, found, exported, strict=True):
            assert torch.equal(a, b)
            assert a.shape == c.shape and sqnr(a.numpy(), c) > 100


def test_a_batch_that_code_fixes_is_told():
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.l, self.state = nn.Linear(4, 4), nn.Parameter(torch.randn(3, 4))

        def forward(self, x):
            return self.l(x + self.state)

    with pytest.warns(CaptureNotice, match="fixed input shapes"):
        model = TorchBackend().adopt(Fixed().eval(), torch.randn(3, 4))
    assert TorchBackend().input_specs(model)["x"][0] == (3, 4)


TABLE, LAST = {}, None


@functools.lru_cache
def positions(width):
    return torch.linspace(-1, 1, width)


def remembering(function):
    held = {}

    @functools.wraps(function)
    def inner(width):
        if width not in held:
            held[width] = function(width)
        return held[width]

    return inner


@remembering
def remembered(width):
    return torch.linspace(-1, 1, width)


class Elsewhere(nn.Module):
    """Keeps positions outside of itself, in the ways that there are."""

    by_width = {}  # noqa: RUF012 - a cache, as people write them

    def __init__(self, way):
        super().__init__()
        self.c, self.way, self.nested, self.maker = nn.Conv2d(3, 4, 3, padding=1), way, {"of": {}}, Maker()

    def forward(self, x):
        y = self.c(x)
        return y + getattr(self, self.way)(y.shape[-1])

    def lru_cache(self, width):
        return positions(width)

    def closure(self, width):
        return remembered(width)

    def global_table(self, width):
        if width not in TABLE:
            TABLE[width] = torch.linspace(-1, 1, width)
        return TABLE[width]

    def global_variable(self, width):
        global LAST  # noqa: PLW0603
        if LAST is None or LAST.shape[0] != width:
            LAST = torch.linspace(-1, 1, width)
        return LAST

    def on_the_class(self, width):
        if width not in self.by_width:
            self.by_width[width] = torch.linspace(-1, 1, width)
        return self.by_width[width]

    def nested_tables(self, width):
        held = self.nested["of"].setdefault("cpu", {})
        if width not in held:
            held[width] = torch.linspace(-1, 1, width)
        return held[width]

    def helper_object(self, width):
        return self.maker.of(width)

    def default_argument(self, width, held={}):  # noqa: B006 - a cache, as people write them
        if width not in held:
            held[width] = torch.linspace(-1, 1, width)
        return held[width]


class Maker:
    kept = None

    def of(self, width):
        if self.kept is None or self.kept.shape[0] != width:
            self.kept = torch.linspace(-1, 1, width)
        return self.kept


WAYS = [
    "lru_cache", "closure", "global_table", "global_variable", "on_the_class", "nested_tables", "helper_object",
    "default_argument",
]  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_caches_outside_of_modules_hold_no_tensors_without_data(way):
    torch.manual_seed(0)
    module = Elsewhere(way).eval()
    x = torch.randn(4, 3, 6, 7)
    for _ in range(2):  # the second time with what the first one left
        with warnings.catch_warnings():
            warnings.simplefilter("error", CaptureNotice)
            sim = QuantSim(module, x[:2]).calibrate(x.numpy())
        with torch.no_grad():
            for size in (1, 4):
                wanted = module(x[:size])
                assert type(wanted) is torch.Tensor
                assert torch.equal(sim.native(x[:size]), wanted)


def test_tensors_without_data_of_another_trace_are_refused():
    module = Elsewhere("global_table").eval()
    x = torch.randn(4, 3, 6, 9)
    torch.export.export(module, (x,))
    try:
        with pytest.raises(ModelError, match=r"tensor without data in a cache.*empty that cache"):
            QuantSim(module, x)
    finally:
        TABLE.clear()
