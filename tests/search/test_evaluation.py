"""Evaluations: which are the same, and functions in files."""

from __future__ import annotations

import copy
from functools import partial

import numpy as np
import pytest
from search_net import top1

from bitwright import QuantSim
from bitwright.errors import InputError
from bitwright.runs import identity
from bitwright_search.evaluation import FileFunction, Labelled


def test_evaluations_are_told_apart_by_content(net, tmp_path):
    sim = QuantSim(net.model)
    a, b = (Labelled(net.images, labels).opened(sim) for labels in (net.labels, np.zeros_like(net.labels)))
    assert identity(a) == identity(Labelled(net.images.copy(), net.labels.copy()).opened(sim)) != identity(b)
    f, g, h = (partial(top1, images=net.images, labels=labels) for labels in (net.labels, net.labels + 1, net.labels))
    assert identity(f) == identity(h) != identity(g)
    file = tmp_path / "score.py"
    file.write_text("def score(model):\n    return 1\n")
    one = identity(FileFunction.parse(f"{file}:score"))
    file.write_text("def score(model):\n    return 2\n")
    assert identity(FileFunction(str(file), "score")) != one


class Scorer:
    def __init__(self, weight, table=()):
        self.weight, self.table, self.me = weight, table, self

    def __call__(self, model):
        return self.weight

    def score(self, model):
        return self.weight


def closed(value):
    def evaluate(model):
        return value if model else evaluate(model)

    return evaluate


def defaulted(value):
    def evaluate(model, a=value, *, b=value):
        return a + b

    return evaluate


def large(value):
    """Its repr leaves the middle out."""
    found = np.zeros(5000)
    found[2500] = value
    return found


@pytest.mark.parametrize(
    "make",
    [
        Scorer,
        lambda v: Scorer(1, {"a": [large(v)]}),
        lambda v: Scorer(v).score,
        closed,
        lambda v: closed(Scorer(v)),
        defaulted,
        lambda v: partial(top1, images=[large(v)]),
        lambda v: partial(top1, images={"x": large(v)}),
        lambda v: partial(top1, images=(closed(v),)),
    ],
)
def test_what_an_evaluation_holds_counts(make):
    assert identity(make(1)) == identity(make(1)) != identity(make(2))


def test_tensors_count_by_content():
    torch = pytest.importorskip("torch")
    first = torch.zeros(5000, requires_grad=True)
    for dtype in (torch.float32, torch.bfloat16):
        a = first.detach().to(dtype)
        b, other = copy.deepcopy(a), copy.deepcopy(a)
        other[2500] = 1
        one, two, three = (identity(partial(top1, images=[x])) for x in (a, b, other))
        assert one == two != three
    assert identity(closed(first)) == identity(closed(first.clone()))


def test_a_file_is_a_module_like_any_other(tmp_path):
    (tmp_path / "beside_the_file.py").write_text("VALUE = 3\n")
    file = tmp_path / "scoring_file.py"
    file.write_text(
        "from __future__ import annotations\n"
        "from dataclasses import dataclass, KW_ONLY\n"
        "from beside_the_file import VALUE\n"
        "@dataclass\nclass S:\n    _: KW_ONLY\n    x: int = VALUE\n"
        "def score(model):\n    return S().x\n"
    )
    assert FileFunction.parse(f"{file}:score")(None) == 3
    (tmp_path / "bad.py").write_text("1 / 0\n")
    with pytest.raises(InputError, match="ZeroDivisionError"):
        FileFunction.parse(f"{tmp_path / 'bad.py'}:score")
