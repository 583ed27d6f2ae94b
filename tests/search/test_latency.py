"""Latency tables: what is looked up in which order, what is refused, and what ONNX Runtime measures."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest

from bitwright import QuantSim, measure_latency
from bitwright.errors import CapabilityError, InputError
from bitwright_search.latency import Entry, LatencyModel, LatencyTable, read_latency

MACS = {"dw": 1800, "mix": 1600, "fc": 40}


def entry(**values):
    return {"weights": 8, "activations": 8, **values}


@pytest.fixture(scope="module")
def graph(net):
    return QuantSim(net.model).graph


def test_look_up_goes_from_op_to_shape_to_type(graph):
    table = LatencyTable.read({
        "entries": [
            entry(type="Conv", seconds_per_mac=1e-6),
            entry(type="Conv", shape=[8, 8, 1, 1], seconds=3e-3),
            entry(op="dw", seconds=1e-3),
            entry(op="dw", weights=4, seconds=5e-4),
        ]
    })  # fmt: skip
    model = table.bind(graph, MACS)
    assert isinstance(model, LatencyModel)
    assert model.cost("dw", 8, 8) == 1e-3
    assert model.cost("dw", 4, 8) == 5e-4
    assert model.cost("mix", 8, 8) == 3e-3
    assert model.cost("res", 8, 8) == 0.0
    with pytest.raises(
        InputError, match=r"nothing for op 'fc' \(Gemm, weight \(5, 8\)\) with 8-bit weights and 16-bit"
    ):
        model.cost("fc", 8, 16)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"entries": []}, "entries"),
        ({"entries": [entry(op="a", type="Conv", seconds=1)]}, "either an op or a type"),
        ({"entries": [entry(op="a")]}, "either seconds or seconds_per_mac"),
        ({"entries": [entry(type="Conv", seconds=1)]}, "a type goes with a shape"),
        ({"entries": [entry(op="a", seconds=-1)]}, "seconds"),
        ({"entries": [entry(op="a", seconds=1, watts=3)]}, "watts"),
        ({"schema_version": 2, "entries": [entry(op="a", seconds=1)]}, "schema_version"),
    ],
)
def test_bad_tables(content, message):
    with pytest.raises(InputError, match=message):
        LatencyTable.read(content)


def test_files_and_what_else_is_taken(graph, tmp_path):
    table = LatencyTable((Entry(op="dw", weights=8, activations=8, seconds=0.5),))
    path = table.write(tmp_path / "t.json")
    assert LatencyTable.read(path) == table
    for given in (table, path, str(path), table.bind(graph, MACS)):
        assert read_latency(given, graph, MACS).cost("dw", 8, 8) == 0.5
    assert read_latency(None, graph, MACS) is None
    (tmp_path / "bad.json").write_text("{")
    for given, message in ((tmp_path / "no.json", "can't read"), (tmp_path / "bad.json", "isn't JSON"), (3, "give a")):
        with pytest.raises(InputError, match=message):
            read_latency(given, graph, MACS)


def test_measured_on_onnx_runtime(net, tmp_path):
    table = measure_latency(net.model, net.images, candidates=["int8/uint8", "int4/uint8"], samples=4, repeats=2,
                            out=tmp_path / "t.json")  # fmt: skip
    assert LatencyTable.read(tmp_path / "t.json") == table
    by_op = {(e.op, e.weights): e.seconds for e in table.entries if e.op}
    for op in ("stem", "dw", "mix", "res", "fc"):
        for bits in (8, 4):
            assert 0 < by_op[op, bits] < 1
    with pytest.raises(InputError, match="at least 1"):
        measure_latency(net.model, net.images, repeats=0)


def test_a_backend_without_a_timer_says_what_to_do(net):
    sim = QuantSim.of(replace(QuantSim(net.model).state, backend=SimpleNamespace(name="plain")))
    with pytest.raises(
        CapabilityError, match=r"op_timer .*the plain backend doesn't offer; measure an exported \.onnx"
    ):
        measure_latency(sim, net.images)
