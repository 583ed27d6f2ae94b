"""Models that differ where graph and parameters show nothing are told apart; those opened alike are not."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from bitwright import QuantSim
from bitwright.runs import RunDirectory

X = np.random.default_rng(0).standard_normal((8, 6)).astype(np.float32)


class Net(nn.Module):
    """A layer, and something behind it."""

    def __init__(self, behind):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.behind = nn.Linear(6, 6), behind
        self.register_buffer("table", torch.arange(6))

    def forward(self, x):
        return self.behind(self, self.layer(x))


def opened(behind, **options):
    return QuantSim(Net(behind).eval(), sample=torch.zeros(2, 6), **options)


def fingerprint(sim):
    return sim.backend.fingerprint(sim.native)


PAIRS = {
    "axis": (lambda m, x: x.cumsum(1), lambda m, x: x.cumsum(0)),
    "literal": (lambda m, x: x * 0.5, lambda m, x: x * 2.0),
    "bounds": (lambda m, x: x[:, 1:4], lambda m, x: x[:, 2:5]),
    "constant": (lambda m, x: x[:, torch.tensor([1, 2])], lambda m, x: x[:, torch.tensor([1, 3])]),
    "integers": (lambda m, x: x[:, m.table], lambda m, x: x[:, m.table.flip(0)]),
}


@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
def test_models_are_told_apart(pair):
    one, other = (fingerprint(opened(behind)) for behind in pair)
    assert one != other
    assert fingerprint(opened(pair[0])) == one


def test_a_table_of_integers_is_told():
    one = opened(PAIRS["integers"][0])
    other = Net(PAIRS["integers"][0]).eval()
    other.table.copy_(other.table.flip(0))
    assert fingerprint(QuantSim(other, sample=torch.zeros(2, 6))) != fingerprint(one)


@pytest.mark.parametrize("pair", [PAIRS["axis"], PAIRS["literal"]])
def test_results_of_another_model_are_not_taken(pair, tmp_path):
    """The same parameters, data and settings in one run directory."""
    for behind in pair:
        with RunDirectory(tmp_path / "run") as run:
            kept = opened(behind, run=run).calibrate(X)
        anew = opened(behind).calibrate(X)
        assert {s: e.scale.tolist() for s, e in kept.encodings.items()} == {
            s: e.scale.tolist() for s, e in anew.encodings.items()
        }


def test_another_process_has_the_same():
    program = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_torch_content as t; "
        "print(t.fingerprint(t.opened(t.PAIRS['constant'][0])))"
    )
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert told.strip() == fingerprint(opened(PAIRS["constant"][0]))
