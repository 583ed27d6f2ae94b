"""Modules that give other results when they are called again: what they keep in Python is not in a capture."""

import random
import warnings

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from bitwright import QuantSim  # noqa: E402
from bitwright_torch import CaptureNotice  # noqa: E402

AGAIN = "other results when it is called again"


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.calls, self.seen, self.last, self.tables = 0, [], None, {}
        self.register_buffer("count", torch.zeros(()))


class Counting(Net):
    def forward(self, x):
        self.calls += 1
        return self.fc(x) * float(self.calls)


class Listing(Net):
    def forward(self, x):
        self.seen.append(1)
        return self.fc(x) + float(len(self.seen))


class Streaming(Net):
    def forward(self, x):
        y = self.fc(x)
        if self.last is not None:
            y = y + self.last
        self.last = y.detach()
        return y


class Drawing(Net):
    def forward(self, x):
        return self.fc(x) * random.random()


@pytest.mark.parametrize("kind", [Counting, Listing, Streaming, Drawing])
def test_state_in_python_is_told(kind):
    module, x = kind().eval(), torch.ones(3, 4)
    with pytest.warns(CaptureNotice) as told:
        QuantSim(module, x)
    assert AGAIN in " ".join(str(w.message) for w in told)
    assert (module.calls, module.seen, module.last) == (0, [], None)


class Caching(Net):
    def forward(self, x):
        if x.shape[1] not in self.tables:
            self.tables[x.shape[1]] = torch.arange(x.shape[1]) / 10
        self.calls += 1  # for a log
        return self.fc(x) + self.tables[x.shape[1]]


class InABuffer(Net):
    def forward(self, x):
        self.count += 1
        return self.fc(x) + self.count


class ANewBuffer(Net):
    def forward(self, x):
        self.count = self.count + 1
        return self.fc(x) + self.count


class Noisy(Net):
    def forward(self, x):
        return self.fc(x) + torch.rand_like(x)


class InPlace(Net):
    def forward(self, x):
        return self.fc(x.add_(1))


class Narrow(Net):
    def forward(self, x):
        y = self.fc(x)
        return y, y.to(torch.bfloat16), y.to(torch.float8_e4m3fn)


@pytest.mark.parametrize("kind", [Caching, InABuffer, ANewBuffer, Noisy, InPlace, Narrow])
def test_what_is_the_same_in_each_call_is_not(kind):
    module, x = kind().eval(), torch.ones(3, 4)
    drawn = torch.random.get_rng_state()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        QuantSim(module, x)
    assert AGAIN not in " ".join(str(w.message) for w in told)
    assert (module.calls, float(module.count), module.tables) == (0, 0.0, {})
    assert torch.equal(x, torch.ones(3, 4))
    assert torch.equal(torch.random.get_rng_state(), drawn)
