"""The report: complete, valid, escaped, and readable without a network."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest

from bitwright.graph import Graph, Op, OpKind, Param, ParamRole, Tensor
from bitwright.grids import EncodingTable, PerChannel, Provenance, QuantSpec, encoding_from_range, encoding_of_weights
from bitwright.placement import Derived, Float, Plan, SharedWith, Site, SiteKind
from bitwright.report import Accuracy, Calibration, RunReport, build_report, charts, describe, write_report
from bitwright.report._page import render
from bitwright.technique import Report

EVIL = '<script>alert("x")</script>&\''


@pytest.fixture
def sim():
    """What a calibrated simulation shows to the report, around one convolution with hostile names."""
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(4, 3, 3, 3)).astype(np.float32)
    conv = Op(EVIL, OpKind.CONV, "Conv", ("x",), ("y",), {ParamRole.WEIGHT: "w", ParamRole.BIAS: "b"})
    pool = Op("pool", OpKind.MAX_POOL, "MaxPool", ("y",), ("z",))
    mystery = Op("mystery", OpKind.OPAQUE, "Mystery", ("z",), ("out",))
    tensors = {t: Tensor(t, (None, 3, 8, 8)) for t in ("x", "y", "z", "out")}
    params = {"w": Param("w", weight.shape), "b": Param("b", (4,))}
    graph = Graph([conv, pool, mystery], tensors, params, ["x"], ["out"])
    activation, per_channel = QuantSpec(8, False, False), QuantSpec(4, granularity=PerChannel(0))
    a, p = SiteKind.ACTIVATION, SiteKind.PARAMETER
    plan = Plan(
        {
            "x": Site("x", a, activation),
            "w": Site("w", p, per_channel, EVIL, ParamRole.WEIGHT),
            "b": Site("b", p, Derived(("x", "w")), EVIL, ParamRole.BIAS),
            "y": Site("y", a, activation, EVIL),
            "z": Site("z", a, SharedWith("y"), "pool"),
            "out": Site("out", a, Float("unknown operation"), "mystery"),
        },
        "default",
    )
    table = EncodingTable(
        {
            "x": encoding_from_range(activation, -1.0, 1.0, source="sqnr"),
            "y": encoding_from_range(activation, 0.0, 6.0, source="sqnr"),
            "w": encoding_of_weights(weight, per_channel).with_(frozen=True),
        },
        (Provenance("adaround", {"iterations": 100, "beta": [20, 2]}),),
    )
    full = table.merged({"z": table["y"]})
    report = Report(
        "1 layer",
        {"seconds": 1.5, "bad": float("nan")},
        ("layer", "loss before", "loss after"),
        ((EVIL, 0.5, np.float32(0.1)),),
    )
    return SimpleNamespace(
        graph=graph, plan=plan, encodings=table, table=full, params={"w": weight, "b": np.zeros(4, np.float32)},
        reports=[("adaround", report)], backend=SimpleNamespace(name="none"), 
        target=SimpleNamespace(name="default", to_json=lambda: "{}"), overrides={},
        weights="int4", activations=None, seed=0, source=None,
    )  # fmt: skip


@pytest.fixture
def report(sim) -> RunReport:
    return build_report(
        sim,
        name=f"net {EVIL}",
        source=f"{EVIL}.onnx",
        calibration=Calibration(source="c.npz", samples=64, batch_size=32, scheme="sqnr", fingerprint="abc"),
        accuracy=Accuracy(samples=100, float_model=0.9, simulated=0.88, agreement=0.97),
        seconds={"calibrate": 1.23456},
        files={"qdq": "net.qdq.onnx"},
    )


class Page(HTMLParser):
    """Collects tags, references and text, and checks that tags are closed in order."""

    VOID = frozenset({"meta", "input", "br"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.tags, self.references, self.text = [], [], [], ""
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.references += [v for k, v in attrs if k in ("src", "href", "action", "data", "srcset")]
        assert not any(k.startswith("on") for k, _ in attrs)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_sites_say_what_was_decided_and_why(report):
    rows = {s.site: s for s in report.sites}
    assert [rows[s].decision for s in ("x", "w", "b", "z", "out")] == [
        "quantized",
        "quantized",
        "derived",
        "shared",
        "float",
    ]
    assert rows["x"].detail == "uint8 asymmetric"
    assert rows["w"].detail == "int4 symmetric, per channel"
    assert rows["w"].scale_smallest < rows["w"].scale_largest
    assert rows["w"].source.endswith("frozen")
    assert rows["z"].detail == "with y"
    assert rows["z"].high == pytest.approx(6)
    assert rows["b"].detail == "bias, from x and w"
    assert rows["out"].detail == "unknown operation"
    assert report.count("quantized") == 3


def test_sizes_count_widths_and_scales(report):
    assert report.model.parameters == 4 * 27 + 4
    assert report.model.float_bytes == 4 * 112
    assert report.model.quantized_bytes == 4 * 27 // 2 + 4 * 4 + 4 * 4
    assert report.model.opaque_ops == 1 and len(report.model.unknown) == 1
    assert report.model.unknown[0] in render(report)


def test_layer_figures(report, sim):
    (layer,) = report.layers
    weight = sim.params["w"]
    largest = np.abs(weight).reshape(4, -1).max(axis=1)
    assert (layer.range_smallest, layer.range_largest) == (pytest.approx(largest.min()), pytest.approx(largest.max()))
    error = sim.encodings["w"].fake_quantize(weight).astype(np.float64) - weight
    assert layer.sqnr_db == pytest.approx(
        10 * np.log10(np.square(weight.astype(np.float64)).sum() / np.square(error).sum())
    )


def test_weights_on_their_grid_have_no_noise(sim):
    sim.params["w"] = sim.encodings["w"].fake_quantize(sim.params["w"])
    report = build_report(sim, name="n", source="s")
    assert report.layers[0].sqnr_db is None
    Page(render(report))


def test_files_round_trip_and_hold_no_nan(report, tmp_path):
    json_file, html_file = write_report(report, tmp_path)
    assert RunReport.model_validate_json(json_file.read_text()) == report
    content = json.loads(json_file.read_text(), parse_constant=pytest.fail)
    assert content["steps"][0]["figures"]["bad"] is None
    assert content["steps"][0]["settings"] == {"iterations": 100, "beta": "[20, 2]"}
    assert html_file.read_text().startswith("<!doctype html>")
    assert sorted(f.name for f in tmp_path.iterdir()) == ["report.html", "report.json"]


def test_page_is_self_contained_and_escaped(report):
    text = render(report)
    page = Page(text)
    assert page.references == []
    assert page.tags.count("script") == 1
    assert "alert" not in re.search(r"<script>(.*?)</script>", text, re.DOTALL).group(1)
    assert not re.search(r"https?:|url\(|@import", text)
    assert EVIL in page.text
    assert {"svg", "table", "dl"} <= set(page.tags)
    for shown in ("88.00%", "-2.00 points", "uint8 asymmetric", "unknown operation", "64 samples of c.npz"):
        assert shown in page.text


def test_layers_go_by_the_names_that_their_author_gave():
    def linear(op, weight):
        return Op(op, OpKind.LINEAR, "Gemm", ("x",), (f"{op}.out",), {ParamRole.WEIGHT: weight})

    weights = {"node_Conv_810": "features.0.0.weight", "node_linear_3": "head/kernel", "own": "weight", "n4": "val_15"}
    weights |= {"first": "tied.weight", "second": "tied.weight"}
    ops = [linear(op, weight) for op, weight in weights.items()]
    tensors = {t: Tensor(t, (None, 4)) for t in ("x", *(op.output for op in ops))}
    params = {w: Param(w, (4, 4)) for w in weights.values()}
    graph = Graph(ops, tensors, params, ["x"], [op.output for op in ops])
    own = {op: graph.layer_name(op) for op in weights}
    assert own == {op: op for op in weights} | {"node_Conv_810": "features.0.0", "node_linear_3": "head"}
    assert graph.layer_name("x") == "x"


def test_charts_say_what_they_show_and_of_which_layer(report):
    named = tuple(row.model_copy(update={"layer": "stem.0"}) for row in report.layers)
    page = render(report.model_copy(update={"layers": named}))
    for axis in ("loss before, loss after; logarithmic", "signal to rounding noise, dB", "layers, from input to output",
                 "ends of the grid, logarithmic away from 0"):  # fmt: skip
        assert f">{axis}</p>" in page, axis
    assert page.count("<title>stem.0: ") == 3, "error before and after, rounding noise, ranges"
    assert "<td>stem.0</td>" in page


def test_smallest_report_renders(sim):
    sim.reports, sim.plan, sim.table = [], Plan({}, "default"), EncodingTable()
    page = Page(render(build_report(sim, name="n", source="s")))
    assert "no technique" in page.text


@pytest.mark.parametrize(
    "axis",
    [
        charts.linear_axis(0, 37.2), charts.linear_axis(-3, 5), charts.linear_axis(0, 0),
        charts.linear_axis(1e-7, 2e-7),
        charts.log_axis([1e-6, 3.0]), charts.log_axis([0.0]), charts.log_axis([]), charts.log_axis([5.0]),
        charts.symlog_axis([-1, 1e4]), charts.symlog_axis([0.0]), charts.symlog_axis([]),
        charts.symlog_axis([-1e-3, 2, 5]),
    ],
)  # fmt: skip
def test_axes_place_ticks_in_order_within_the_plot(axis):
    places = [axis.place(value) for value, _ in axis.ticks]
    assert places == sorted(places)
    assert all(-1.5 <= place <= 101.5 for place in places)


def test_descriptions():
    from bitwright.grids import Blockwise

    assert (
        describe(QuantSpec(4, granularity=Blockwise(block_size=64, decompressed_bits=8)))
        == "int4 symmetric, blocks of 64 in int8"
    )
    assert describe(QuantSpec(16, False, True, True)) == "uint16 symmetric, strict"
    assert describe(QuantSpec(16, float_format="bfloat16")) == "bfloat16"
