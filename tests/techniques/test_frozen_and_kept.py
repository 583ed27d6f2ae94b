"""Encodings that calibration leaves alone: who froze them is told, and kept ones may be searched again."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import pytest
from backends import FRAMEWORKS

from bitwright.backend import Capability
from bitwright.simulation import QuantSim
from bitwright.technique import Context, Outcome, Report, Settings
from bitwright.testing import models

PORTS = [FRAMEWORKS["onnx"]] if "onnx" in FRAMEWORKS else []
pytestmark = pytest.mark.skipif(not PORTS, reason="needs the ONNX backend")


class Halves:
    """Halves the scale of every weight; `how` says what becomes of the encoding."""

    name: ClassVar[str] = "halves"
    Settings: ClassVar[type[Settings]] = Settings
    requires: ClassVar[frozenset[Capability]] = frozenset()

    def __init__(self, **how: bool) -> None:
        self.how = how

    def statistics(self, graph: Any, plan: Any, settings: Any) -> tuple[()]:
        return ()

    def apply(self, ctx: Context[Any]) -> Outcome:
        found = {op.weight: ctx.encodings[op.weight] for op in ctx.graph.linear_ops}
        return Outcome(
            encodings={w: e.with_(scale=e.scale / 2, **self.how) for w, e in found.items()}, report=Report("halved")
        )


@pytest.fixture
def sim() -> QuantSim:
    return PORTS[0].sim(models.conv_bn_relu(), target="generic-int8", weights="int4")


def data(seed: int = 0) -> Any:
    return PORTS[0].batch(models.batch(models.conv_bn_relu(), 16, seed))


def scales(sim: QuantSim) -> dict[str, np.ndarray]:
    return {op.weight: np.array(sim.encodings[op.weight].scale) for op in sim.graph.linear_ops}


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


def test_reports_say_who_froze_what_they_had_to_leave(sim):
    sim.apply(Halves(frozen=True))
    for technique in ("seq_mse", "weight_clipping", "cle", "fold_batch_norm", "smooth_quant"):
        summary = sim.fork().apply(technique, data()).reports[-1][1].summary
        assert "4 weights are frozen (halves)" in summary, summary
    report = sim.fork().apply("seq_mse", data()).reports[-1][1]
    assert report.summary.startswith("no weight scale to search")
    assert {row[1] for row in report.rows} == {"encoding is frozen (halves)"}


def test_nothing_frozen_nothing_told(sim):
    for technique in ("seq_mse", "cle", "fold_batch_norm"):
        assert "frozen" not in sim.fork().apply(technique, data()).reports[-1][1].summary


def test_whoever_freezes_is_named(sim, tmp_path):
    weight = sim.graph.linear_ops[0].weight
    sim.calibrate(data())
    by_hand = sim.fork().set({weight: sim.encodings[weight]}, freeze=True)
    assert by_hand.encodings[weight].held_by == "set by hand"
    assert "1 weight is frozen (set by hand)" in by_hand.apply("cle").reports[-1][1].summary
    bundle = sim.export(tmp_path)
    assert sim.fork().load_encodings(bundle.files["encodings"]).encodings[weight].held_by == "loaded"
    rounded = sim.fork().apply("adaround", data())
    assert rounded.encodings[weight].held_by == "adaround"


def test_kept_scales_live_through_calibration(sim):
    before = scales(sim.fork().calibrate(data()))
    sim.apply(Halves(kept=True)).calibrate(data())
    assert same(scales(sim), {w: s / 2 for w, s in before.items()})
    sim.calibrate(data(1))
    assert same(scales(sim), {w: s / 2 for w, s in before.items()})


def test_kept_scales_may_be_searched_again(sim):
    alone = scales(sim.fork().apply("seq_mse", data()))
    sim.apply(Halves(kept=True)).apply("seq_mse", data())
    assert same(scales(sim), alone), "the search doesn't depend on what was kept"
    held = {(e.held_by, e.kept, e.frozen) for w, e in sim.encodings.items() if w in alone}
    assert held == {("seq_mse", False, True)}
    assert "frozen" not in sim.reports[-1][1].summary


def test_kept_scales_go_with_the_values_that_they_were_found_for(sim):
    """Folding changes the convolutions' weights, not the classifier's: its scale alone is kept."""
    sim.apply("fold_batch_norm", data())
    fresh = scales(sim.fork().calibrate(data()))
    other = PORTS[0].sim(models.conv_bn_relu(), target="generic-int8", weights="int4")
    other.apply(Halves(kept=True)).apply("fold_batch_norm", data()).calibrate(data())
    found = scales(other)
    for op in other.graph.linear_ops:
        if op.id == "fc":
            assert np.array_equal(found[op.weight], fresh[op.weight] / 2)
        else:
            assert np.array_equal(found[op.weight], fresh[op.weight])


def test_state_and_holder_are_saved(sim, tmp_path):
    sim.apply(Halves(kept=True)).calibrate(data())
    sim.save(tmp_path)
    again = QuantSim.load(tmp_path)
    assert same(scales(again), scales(sim))
    held = {(e.held_by, e.kept, e.frozen) for w, e in again.encodings.items() if w in scales(sim)}
    assert held == {("halves", True, False)}
    again.calibrate(data(1))
    assert same(scales(again), scales(sim))


def test_what_was_stored_before_is_still_read_and_found():
    """Fingerprints of run directories and saved states know nothing of who holds an encoding."""
    from bitwright.grids import QuantSpec, encoding_arrays, encoding_from_range, encoding_of_arrays

    encoding = encoding_from_range(QuantSpec(8), -1.0, 1.0, source="minmax").with_(frozen=True)
    stored = encoding_arrays(encoding)
    assert str(stored["encoding"]) == (
        '{"bits": 8, "signed": true, "symmetric": true, "strict": false, "float_format": null, "frozen": true, '
        '"source": "minmax", "granularity": {}}'
    )
    held = encoding.with_(held_by="adaround")
    assert str(encoding_arrays(held)["encoding"]) == str(stored["encoding"])
    assert not encoding_of_arrays(stored).kept
    assert encoding_of_arrays(encoding_arrays(encoding.with_(frozen=False, kept=True))).kept
