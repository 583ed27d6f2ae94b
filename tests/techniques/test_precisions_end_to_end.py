"""Blockwise weights, float formats, overrides and loaded encodings through `QuantSim`, on each framework."""

from __future__ import annotations

import itertools

import numpy as np
import onnx
import pytest
from backends import FRAMEWORKS
from shares import spread

from bitwright.backend import Tap
from bitwright.errors import EncodingError, InputError
from bitwright.formats import read
from bitwright.graph import SetParams
from bitwright.grids import Blockwise, Encoding
from bitwright.testing import models
from bitwright.testing.builder import Builder

PORTS = tuple(FRAMEWORKS.values())
BLOCKS = ["int4:block16", "int4:lpbq16"]
FLOATS = ["float16", "bfloat16", "fp8"]
everywhere = pytest.mark.parametrize("port", FRAMEWORKS.values(), ids=FRAMEWORKS)


def network(seed=0):
    """Convolution, depthwise, linear; 32 channels so that blocks of 16 fit."""
    b = Builder(seed)
    x = b.relu("act1", b.conv("conv1", b.input("x", 3, 6, 6), 32, pad=1))
    x = b.relu("act2", b.conv("depthwise", x, 32, pad=1, groups=32))
    x = b.relu("act3", b.conv("conv2", x, 32, 1))
    x = b.flatten("flatten", b.global_pool("pool", x))
    return b.build(b.linear("fc", x, 5))


MODEL = network()


@pytest.fixture
def data(port):
    return port.batch({"x": np.concatenate([models.batch(MODEL, 12, s)["x"] for s in range(2)])})


def weights(sim):
    """Weight sites by op."""
    return {op.id: op.weight for op in sim.graph.linear_ops}


def error(sim, data):
    """Relative squared error of the outputs."""
    expected, found = (sim.predict(data, simulated=s)[0] for s in (False, True))
    return float(np.square(found - expected).sum() / np.square(expected).sum())


@spread("kind", BLOCKS, PORTS, elsewhere=["int4:lpbq16"])
def test_blockwise_weights_end_to_end(port, data, kind, tmp_path):
    sim = port.sim(MODEL, weights=kind).calibrate(data)
    found = {op: sim.encodings[w] for op, w in weights(sim).items()}
    assert found["conv2"].scale.shape == found["conv2"].scale.shape == (32, 2)
    assert found["fc"].scale.shape == (5, 2)
    # 3 and 1 input channels have no blocks of 16: one scale a channel, and a note.
    assert found["conv1"].scale.shape == found["depthwise"].scale.shape == (32,)
    assert any("conv1" in note for note in sim.plan.notes)
    plain = port.sim(MODEL, weights="int4").calibrate(data)
    site = weights(sim)["conv2"]
    values = sim.params[site]
    finer, coarser = (np.square(s.encodings[site].fake_quantize(values) - values).sum() for s in (sim, plain))
    assert finer < coarser
    layout = found["conv2"].granularity
    assert isinstance(layout, Blockwise)
    if "lpbq" in kind:
        multiples = found["conv2"].block_scale
        assert 1 <= multiples.min() <= multiples.max() <= 16
    # The simulated network computes with exactly these weights.
    rounded = {w: sim.encodings[w].fake_quantize(sim.params[w]) for w in weights(sim).values()}
    other = port.sim(MODEL, weights="float16", activations="float16").calibrate(data)
    assert all(np.isfinite(v).all() for v in rounded.values())
    assert error(sim, data) > error(other, data)
    for version in ("1.0.0", "2.0.0"):
        bundle = sim.export(tmp_path / version, name="net", encodings_version=version)
        again = port.sim(MODEL, weights=kind)
        again.load_encodings(bundle.files["encodings"])
        for op, encoding in found.items():
            loaded = again.encodings[weights(again)[op]]
            assert np.allclose(loaded.scale, encoding.scale, rtol=1e-6), op
            assert loaded.frozen
            if encoding.block_scale is not None:
                assert np.array_equal(loaded.block_scale, encoding.block_scale)


@spread(
    "technique,kind",
    list(itertools.product(["gptq", "adaround", "seq_mse", "weight_clipping"], BLOCKS)),
    PORTS,
    elsewhere=[("gptq", "int4:block16"), ("adaround", "int4:lpbq16")],
)
def test_techniques_on_blockwise_weights(port, data, kind, technique):
    settings = {} if technique == "weight_clipping" else {"bias_correction": True}
    before = error(port.sim(MODEL, weights=kind).calibrate(data), data)
    sim = port.sim(MODEL, weights=kind).apply(technique, data, candidates=8, **settings)
    table = {op: sim.encodings[w] for op, w in weights(sim).items()}
    assert all(e.frozen and e.source == technique for e in table.values())
    assert table["conv2"].scale.shape == (32, 2)
    if technique in ("gptq", "adaround"):  # weights lie on the grid
        for op, w in weights(sim).items():
            assert np.array_equal(table[op].fake_quantize(sim.params[w]), sim.params[w]), op
    if "lpbq" in kind:
        e = table["conv2"]
        unit = (e.scale / e.block_scale)[:, :1]
        assert np.allclose(e.scale, e.block_scale * unit, rtol=1e-6)
    assert error_against_float(sim, port, data) < before


def error_against_float(sim, port, data):
    """As `error`, against the model as it was before a technique."""
    sim.calibrate(data)
    expected = port.sim(MODEL).predict(data, simulated=False)[0]
    found = sim.predict(data)[0]
    return float(np.square(found - expected).sum() / np.square(expected).sum())


@spread("kind", FLOATS, PORTS, elsewhere=["fp8"])
def test_float_formats_mixed_in(port, data, kind):
    """One layer in a float format among integer ones: its sites have it, its values are cast, the others stay."""
    name = {"fp8": "float8e4m3fn"}.get(kind, kind)
    sim = port.sim(MODEL, overrides={"conv2": {"weights": kind, "activations": kind}}).calibrate(data)
    op = sim.graph.op("conv2") if "conv2" in sim.graph else next(o for o in sim.graph.linear_ops if o.id == "conv2")
    weight = sim.encodings[op.weight]
    assert weight.float_format == name
    assert all(sim.encodings[w].float_format is None for o, w in weights(sim).items() if o != "conv2")
    assert sim.plan.spec(op.output) is None or sim.plan.spec(op.output).float_format == name
    assert np.isfinite(error(sim, data))
    assert error(sim, data) < 0.05
    # A technique leaves float weights alone, and says so.
    sim.apply("gptq", data, candidates=4)
    reasons = {row[0]: row[1] for row in sim.reports[-1][1].rows}
    assert name in reasons["conv2"]
    assert np.isfinite(error(sim.calibrate(data), data))


@spread("kind", FLOATS, PORTS, elsewhere=["fp8"])
def test_everything_in_a_float_format_is_the_cast_network(port, data, kind):
    sim = port.sim(MODEL, weights=kind, activations=kind).calibrate(data)
    for op, w in weights(sim).items():
        rounded = sim.encodings[w].fake_quantize(sim.params[w])
        assert np.abs(rounded - sim.params[w]).max() <= np.abs(sim.params[w]).max() * 2.0**-3, op
    bound = {"float16": 1e-5, "bfloat16": 1e-3, "fp8": 0.02}[kind]
    assert 0 < error(sim, data) < bound


@spread("kind", ["int8", "fp8", "int4:block16", "mxfp4", "mxfp8", "nvfp4"], PORTS, elsewhere=["int4:block16", "nvfp4"])
def test_weights_only(port, data, kind, tmp_path):
    """Weights on their grids and nothing else: the float network with rounded weights, in the exported file too."""
    sim = port.sim(MODEL, weights=kind, activations="float").calibrate(data)
    assert set(sim.encodings) == set(weights(sim).values())
    assert {r.reason for r in sim.plan.table() if r.site in sim.graph.inputs} == {
        "activations stay in float, as was asked"
    }
    twin = port.sim(MODEL)
    rounded = {w: sim.encodings[w].fake_quantize(sim.params[w]) for w in weights(sim).values()}
    expected = twin.backend.edit(twin.native, [SetParams(rounded)])
    taps = [Tap(t) for t in sim.graph.outputs]
    batch = {k: v[:4] for k, v in data.items()}
    wanted, found = (s.run(batch)[taps[0]] for s in (sim.backend.session(expected, taps), sim.simulation.session(taps)))
    assert np.allclose(found, wanted, atol=1e-5 * np.abs(wanted).max())
    bundle = sim.export(tmp_path, name="net", encodings_version="2.0.0")
    entries = read(bundle.files["encodings"])
    assert set(entries.parameters) == set(weights(sim).values())
    assert not entries.activations
    held = {n.op_type: 0 for n in onnx.load(bundle.files["qdq"]).graph.node}
    for node in onnx.load(bundle.files["qdq"]).graph.node:
        held[node.op_type] += 1
    assert (held["DequantizeLinear"], "QuantizeLinear" in held) == (len(weights(sim)), False)
    again = port.sim(MODEL, weights=kind, activations="float").load_encodings(bundle.files["encodings"])
    assert again.simulation.session(taps).run(batch)[taps[0]].tobytes() == found.tobytes()


@spread("kind", ["nf4:block16"], PORTS, elsewhere=[])
def test_a_table_that_onnx_has_no_type_for(port, data, kind, tmp_path):
    """The network and its encodings are exported all the same, and equal to the bit when they are opened again."""
    sim = port.sim(MODEL, weights=kind, activations="float").calibrate(data)
    with pytest.warns(UserWarning, match="ONNX has no type for weights in nf4"):
        bundle = sim.export(tmp_path, name="net", encodings_version="2.1.0")
    assert "qdq" not in bundle.files
    again = port.sim(MODEL, weights=kind, activations="float").load_encodings(bundle.files["encodings"])
    assert all(again.encodings[w].equals(e) for w, e in sim.encodings.items())
    with pytest.raises(EncodingError, match="has no nf4"), pytest.warns(UserWarning, match="no type for weights"):
        sim.export(tmp_path / "old", encodings_version="1.0.0")


@spread("kind", ["mxfp4", "mxfp8", "nvfp4", "nf4:block16"], PORTS, elsewhere=[])
def test_gptq_on_blocks_of_floats(port, data, kind):
    """At the scales that they have, on values of the format; what knows whole numbers alone leaves them and says so."""
    before = port.sim(MODEL, weights=kind, activations="float").calibrate(data)
    sim = port.sim(MODEL, weights=kind, activations="float").apply("gptq", data, include=["fc"])
    encoding = sim.encodings["fc.weight"]
    assert encoding.equals(before.encodings["fc.weight"])
    assert (encoding.frozen, encoding.source) == (True, "gptq")
    assert np.array_equal(encoding.fake_quantize(sim.params["fc.weight"]), sim.params["fc.weight"])
    figures = dict(zip(sim.reports[-1][1].columns, sim.reports[-1][1].rows[0], strict=True))
    assert figures["error after"] < 0.9 * figures["error nearest"]
    sim.apply("adaround", data, include=["conv2"])
    assert any(encoding.float_format in str(row[1]) for row in sim.reports[-1][1].rows)


@everywhere
def test_weights_only_but_for_exceptions(port, data):
    """What an override names is quantized all the same."""
    (site,) = port.sim(MODEL).graph.op("fc").data_inputs
    sim = port.sim(MODEL, activations="float", overrides={site: "uint8", "conv1": {"activations": "float16"}})
    sim.calibrate(data)
    first = sim.graph.op("conv1").output
    on = {s for s in sim.encodings if s in sim.graph.tensors}
    assert {site, first} <= on
    assert on - set(sim.plan.tied(sim.plan.root(site))) - set(sim.plan.tied(first)) == set()
    assert (sim.encodings[site].bits, sim.encodings[first].float_format) == (8, "float16")


@everywhere
def test_float_and_integer_activations_side_by_side(port, data):
    """16-bit floats for one activation: its values are those of the cast."""
    graph = port.sim(MODEL).graph
    op = graph.op("conv1")
    (reader,) = graph.consumers(op.output)
    sim = port.sim(MODEL, overrides={reader.id: {"activations": "float16"}}).calibrate(data)
    act = reader.output
    assert sim.encodings[act].float_format == "float16"
    batch = {k: v[:4] for k, v in data.items()}
    found = np.asarray(sim.simulation.session([Tap(act)]).run(batch)[Tap(act)])
    assert np.array_equal(found.astype(np.float16).astype(np.float32), found)
    assert all(e.float_format is None for s, e in sim.encodings.items() if s not in (act, op.output))


@everywhere
def test_loaded_encodings_freeze_and_partial(port, data, tmp_path):
    first = port.sim(MODEL, weights="int4").calibrate({k: v * 3 for k, v in data.items()})
    path = first.export(tmp_path, name="net").files["encodings"]
    # Frozen: calibration on other data keeps them.
    sim = port.sim(MODEL, weights="int4").load_encodings(path).calibrate(data)
    assert all(
        sim.encodings[s].equals(first.encodings[s])
        or np.allclose(sim.encodings[s].scale, first.encodings[s].scale, rtol=1e-6)
        for s in first.encodings
    )
    # Not frozen: it replaces them.
    loose = port.sim(MODEL, weights="int4").load_encodings(path, freeze=False).calibrate(data)
    site = loose.graph.inputs[0]
    assert loose.encodings[site].scale < 0.5 * first.encodings[site].scale
    # Part of the sites: the rest is calibrated, or left in float with partial=False.
    import json

    kept = json.loads(path.read_text())
    one = weights(sim)["conv2"]
    for key in ("activation_encodings", "param_encodings"):
        kept[key] = [e for e in kept[key] if e["name"] == one]
    part = tmp_path / "part.encodings"
    part.write_text(json.dumps(kept))
    some = port.sim(MODEL, weights="int8").load_encodings(part, strict=False)
    assert isinstance(some.encodings[one], Encoding)
    assert some.encodings[one].bits == 4
    some.calibrate(data)
    assert some.encodings[weights(some)["fc"]].bits == 8
    alone = port.sim(MODEL, weights="int4").load_encodings(part, partial=False)
    alone.calibrate(data)
    assert set(alone.encodings) == {one}


@everywhere
def test_overrides_by_pattern_and_type(port, data):
    conv_type = port.sim(MODEL).graph.op("conv1").type
    sim = port.sim(MODEL, overrides={conv_type: {"weights": "int4"}, "depth*": "float"}).calibrate(data)
    table = {op: sim.encodings.get(w) for op, w in weights(sim).items()}
    assert table["conv1"].bits == table["conv2"].bits == 4
    assert table["depthwise"] is None
    assert table["fc"].bits == 8
    with pytest.raises(InputError, match="'conv\\*' and '\\*1'"):
        port.sim(MODEL, overrides={"conv*": {"weights": "int4"}, "*1": {"weights": "int8"}})
    # A pattern for what a fold removes has nothing left to apply to, and isn't an error.
    norms = models.conv_bn_relu(relu6=True)
    folded = port.sim(norms, overrides={"bn*": "float"}).apply("fold_batch_norm")
    assert folded.overrides == {}


@everywhere
def test_exports_that_cannot_saturate(port, data, tmp_path):
    """Scales are raised for onnxruntime-cpu, uint8 is stored for others; both hold in the file that was written."""
    pytest.importorskip("onnxruntime")
    from bitwright_onnx.export.plain_session import risks_of

    safe, other = (port.sim(MODEL, target=t).calibrate(data) for t in ("onnxruntime-cpu", "generic-int8"))
    kept = safe.export(tmp_path / "safe")
    first = weights(safe)["conv1"]
    dense = {first, *(weights(safe)[op] for op in ("conv2", "fc"))}
    assert (kept.stored_anew, risks_of(kept.files["qdq"]).pairs) == ((first,), ())
    raised = {w for w in weights(safe).values() if (safe.encodings[w].scale > other.encodings[w].scale).any()}
    assert raised == dense - {first}
    loose, tight = (other.export(tmp_path / str(p), plain_session=p) for p in (False, True))
    assert {r.weight for r in risks_of(loose.files["qdq"]).pairs} == set(tight.stored_anew) == dense
    assert risks_of(tight.files["qdq"]).pairs == ()


@pytest.mark.parametrize("port", [*FRAMEWORKS.values()][:2], ids=[*FRAMEWORKS][:2])  # the kit simulates them on each
def test_ranges_at_run_time(port, data, tmp_path):
    """No data, one grid for what each layer reads, and the same in the exported file and in one that is loaded."""
    fed = {op.id: op.data_inputs[0] for op in port.sim(MODEL).graph.linear_ops}
    types = {"activations": "int8:per_token", "overrides": {fed["conv2"]: "uint8:dynamic"}}
    sim = port.sim(MODEL, **types).calibrate()
    found = {op: str(sim.encodings[site].run_time) for op, site in fed.items()}
    assert found == {
        "conv1": "int8:dynamic", "depthwise": "int8:dynamic", "conv2": "uint8:dynamic", "fc": "int8:per_token",
    }  # fmt: skip
    assert set(sim.encodings) == {*fed.values(), *weights(sim).values()}
    assert 0 < error(sim, data) < 1e-3
    sim.calibrate(data)  # data change nothing, but what the export is proven on
    bundle = sim.export(tmp_path, name="net")
    file = read(bundle.files["encodings"])
    assert dict(file.run_time) == {bundle.names.get(site, site): found[op] for op, site in fed.items()}
    assert not file.activations
    taps = [Tap(t) for t in sim.graph.outputs]
    batch = {k: v[:4] for k, v in data.items()}
    wanted = sim.simulation.session(taps).run(batch)[taps[0]]
    again = port.sim(MODEL, **types).load_encodings(bundle.files["encodings"])
    assert np.asarray(again.simulation.session(taps).run(batch)[taps[0]]).tobytes() == np.asarray(wanted).tobytes()
    ops = [node.op_type for node in onnx.load(bundle.files["qdq"]).graph.node]
    assert "QuantizeLinear" not in ops
    assert ops.count("DynamicQuantizeLinear") == 1
    with pytest.raises(InputError, match=r"calibrate: .* activations take their range of data"):
        port.sim(MODEL).calibrate()
