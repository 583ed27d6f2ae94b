from __future__ import annotations

import numpy as np
import pytest
from analysis_models import conv_model, mlp

import bitwright
from bitwright import QuantSim
from bitwright.errors import InputError


def test_what_a_technique_did(images):
    before = QuantSim(conv_model())
    after = QuantSim(conv_model()).apply("fold_batch_norm")
    found = bitwright.visualize(before, after, images)
    changes = {c.name: c for c in found.changes}
    weight = changes["conv.weight"]
    assert weight.kind == "weight" and weight.op == "conv" and weight.sqnr_db is not None
    assert (weight.low_before, weight.high_before) == pytest.approx(
        (before.params["conv.weight"].min(), before.params["conv.weight"].max())
    )
    assert weight.high_after == pytest.approx(after.params["conv.weight"].max())
    assert changes["fc.weight"].sqnr_db is None, "nothing happened to it"
    assert changes["bn"].kind == "activation"
    assert changes["bn"].low_before == pytest.approx(changes["bn"].low_after, rel=1e-4)
    assert {"bn.gamma", "bn.beta", "bn.mean", "bn.var", "conv"} == set(found.gone)
    assert found.file is None


def test_unevenness_is_that_of_channels(images):
    sim = QuantSim(conv_model(spread=0.01))
    found = bitwright.visualize(sim, sim)
    weight = np.abs(sim.params["dw.weight"]).max(axis=(1, 2, 3))
    row = next(c for c in found.changes if c.name == "dw.weight")
    assert row.uneven_before == row.uneven_after == pytest.approx(weight.max() / np.median(weight))
    assert next(c for c in found.changes if c.name == "fc.bias").uneven_before is None


def test_figures_don_t_depend_on_batches(images):
    sim = QuantSim(conv_model())
    one, other = (bitwright.visualize(sim, sim, images, batch_size=n) for n in (3, 20))
    for a, b in zip(one.changes, other.changes, strict=True):
        assert (a.low_before, a.high_before) == pytest.approx((b.low_before, b.high_before), rel=1e-6)


def test_models_without_anything_in_common_are_refused(trained, tmp_path):
    with pytest.raises(InputError, match="nothing can be compared"):
        bitwright.visualize(conv_model(), trained.model)
    with pytest.raises(InputError, match=r"is an \.html file"):
        bitwright.visualize(trained.model, mlp(trained.layers), out=tmp_path / "page.txt")
    assert list(tmp_path.iterdir()) == []
