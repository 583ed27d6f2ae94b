"""QuantSim end to end on ONNX: techniques, export, verify, encodings files, saved state, failures."""

from __future__ import annotations

import json

import builders as b
import numpy as np
import onnx.parser
import onnxruntime as ort
import pytest
from exactness_nets import CONV, conv, image, normal

from bitwright.bundle import check_bundle, plan_of, read_encodings
from bitwright.errors import EncodingError, InputError, PluginError
from bitwright.grids import QuantSpec, encoding_from_range
from bitwright.runs import RunDirectory
from bitwright.simulation import QuantSim
from bitwright.verify import sqnr, verify

RNG = np.random.default_rng(0)
DATA = {"x": RNG.normal(size=(24, 3, 8, 8)).astype(np.float32)}
RECIPES = {
    "none": [],
    "fold": ["fold_batch_norm"],
    "equalize": ["fold_batch_norm", "cle"],
    "correct": ["fold_batch_norm", "bias_correction"],
    "search": ["fold_batch_norm", "seq_mse"],
    "round": ["fold_batch_norm", "adaround"],
    "all": ["fold_batch_norm", "cle", "seq_mse", "adaround", "bias_correction"],
}


def simulate(recipe=(), data=DATA, **options):
    sim = QuantSim(b.small_cnn(), target="onnxruntime-cpu", **options)
    for step in recipe:
        sim.apply(step, data)
    return sim.calibrate(data)


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_every_recipe_exports_a_bundle_that_verifies(name, weights, tmp_path):
    sim = simulate(RECIPES[name], weights=weights)
    bundle = sim.export(tmp_path, name="net")
    assert set(bundle.files) == {"model", "qdq", "encodings"}
    assert check_bundle(sim.graph, sim.plan, bundle.files["encodings"]) == []
    seen = verify(tmp_path, DATA, np.zeros(24, np.int64), float_model=None)
    assert seen.problems == []
    assert seen.agreement["integer_simulated"] >= 0.95
    assert seen.sqnr_db["integer_simulated"] > 25
    assert seen.exact["argmax_agreement"] == 1.0
    assert set(seen.accuracy) == {"float", "simulated", "integer"}
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_int8_network_is_exact_to_the_bit(tmp_path):
    """The exact integer simulation equals ONNX Runtime's integer kernels at the output and at every tensor."""
    sim = simulate(["fold_batch_norm"])
    sim.export(tmp_path)
    seen = verify(tmp_path, DATA, inspected=24)
    assert seen.exact["output_differs"] == 0
    assert all(t.exact_differs in (0, None) for t in seen.tensors)


@pytest.mark.parametrize("version", ["0.6.1", "1.0.0", "2.0.0", "2.1.0"])
@pytest.mark.parametrize("weights", ["int8", "int4", "int4:block4", "int4:lpbq4"])
def test_encodings_of_every_schema_give_the_same_simulation(version, weights, tmp_path):
    if version == "0.6.1" and "lpbq" in weights:
        pytest.skip("0.6.1 writes LPBQ as plain blocks; see test_formats")
    sim = simulate(["fold_batch_norm"], weights=weights)
    expected = sim.predict(DATA)[0]
    bundle = sim.export(tmp_path, encodings_version=version)
    again = QuantSim(bundle.files["model"], target="onnxruntime-cpu", weights=weights)
    again.load_encodings(bundle.files["encodings"])
    assert np.array_equal(again.predict(DATA)[0], expected)
    # Without a target, the file alone says what is quantized.
    table = read_encodings(bundle.files["encodings"], sim.graph)
    assert set(plan_of(sim.graph, table)) >= set(table) - {s for s in table if table[s].bits == 32}


def test_float_export_computes_what_the_original_does(tmp_path):
    sim = simulate(["fold_batch_norm"])
    bundle = sim.export(tmp_path)
    original = ort.InferenceSession(b.small_cnn().SerializeToString()).run(None, DATA)[0]
    exported = ort.InferenceSession(str(bundle.files["model"])).run(None, DATA)[0]
    np.testing.assert_allclose(exported, original, rtol=1e-4, atol=1e-5)


def test_saved_state_goes_on_bit_equal(tmp_path):
    sim = simulate(["fold_batch_norm", "seq_mse"], weights="int4")
    sim.save(tmp_path / "run")
    again = QuantSim.load(tmp_path / "run")
    assert np.array_equal(again.predict(DATA)[0], sim.predict(DATA)[0])
    assert again.encodings.provenance == sim.encodings.provenance
    assert set(again.folded) == set(sim.folded)
    again.apply("bias_correction", DATA).calibrate(DATA)


def test_damaged_state_is_refused(tmp_path):
    simulate().save(tmp_path)
    (tmp_path / "quantsim.json").write_text("{")
    with pytest.raises(InputError, match="damaged"):
        QuantSim.load(tmp_path)
    with pytest.raises(InputError, match="no saved simulation"):
        QuantSim.load(tmp_path / "elsewhere")


def test_frozen_encodings_survive_calibration():
    sim = simulate()
    pinned = encoding_from_range(QuantSpec(8, signed=False, symmetric=False), -1.0, 1.0)
    sim.set({"x": pinned}, freeze=True).calibrate({"x": DATA["x"] * 100})
    assert sim.encodings["x"].equals(pinned)
    with pytest.raises(EncodingError, match="no site"):
        sim.set({"nowhere": pinned})


def test_resumed_calibration_reads_no_data(tmp_path):
    def run():
        with RunDirectory(tmp_path) as directory:
            return simulate(["fold_batch_norm", "adaround"], weights="int4", run=directory)

    first, again = run(), run()
    for site, encoding in first.encodings.items():
        assert encoding.equals(again.encodings[site])
    steps = [line for line in (tmp_path / "journal.jsonl").read_text().splitlines() if '"step"' in line]
    assert any(json.loads(line).get("resumed") for line in steps)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("ScatterElements<axis = 1>(h, zeros, small)", "ScatterElements<axis = 1>(h, zeros, large)"),
        ("CumSum(h, first)", "CumSum<reverse = 1>(h, first)"),
        ("CumSum(h, first)", "CumSum(h, second)"),
    ],
    ids=["a literal", "an attribute", "an axis"],
)
def test_a_network_whose_ops_compute_something_else_is_not_resumed(one, other, tmp_path):
    data = {"x": np.random.default_rng(0).standard_normal((4, 6)).astype(np.float32)}

    def run(line, directory=None):
        made = onnx.parser.parse_model(f"""<ir_version: 8, opset_import: ["" : 17]>
            net (float[4,6] x) => (float[4,6] y)
            <int64[4,1] zeros = {{0, 0, 0, 0}}, float[4,1] small = {{1, 1, 1, 1}}, float[4,1] large = {{9, 9, 9, 9}},
             int64 first = {{0}}, int64 second = {{1}}> {{ h = Tanh(x)
             s = {line}
             y = Neg(s) }}""")
        return QuantSim(made, run=directory).calibrate(data).encodings

    with RunDirectory(tmp_path) as directory:
        run(one, directory)
    with RunDirectory(tmp_path) as directory:
        found, wanted = run(other, directory), run(other)
    assert wanted["y"].minimum != run(one)["y"].minimum or wanted["y"].maximum != run(one)["y"].maximum
    assert {s: (e.minimum, e.maximum) for s, e in found.items()} == {
        s: (e.minimum, e.maximum) for s, e in wanted.items()
    }


@pytest.mark.parametrize(
    ("act", "error", "words"),
    [
        (lambda s: s.calibrate({"x": DATA["x"][:0]}), InputError, "empty"),
        (lambda s: s.calibrate({"x": DATA["x"] * np.nan}), InputError, "NaN"),
        (lambda s: s.calibrate({"y": DATA["x"], "z": DATA["x"]}), InputError, "x"),
        (lambda s: s.calibrate({"x": DATA["x"][:, :2]}), InputError, "x"),
        (lambda s: s.calibrate(iter([DATA])), InputError, "only once"),
        (lambda s: s.apply("nonsense"), PluginError, "nonsense"),
        (lambda s: s.apply("adaround"), Exception, "data"),
        (lambda s: s.apply("adaround", DATA, iterations=-1), InputError, "iterations"),
        (lambda s: s.apply("adaround", DATA, unknown=1), InputError, "unknown"),
        (lambda s: s.apply("adaround", {"x": DATA["x"] * np.inf}), InputError, "finite"),
        (lambda s: s.apply("adaround", DATA, include=("no such layer",)), InputError, "no such layer"),
        (lambda s: s.export("/nonexistent/\0", name="a"), Exception, ""),
        (lambda s: s.export("out", name="../escape"), InputError, "escape"),
    ],
)
def test_failures_name_the_reason_and_change_nothing(act, error, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sim = simulate(["fold_batch_norm"])
    before = sim.predict(DATA)[0], dict(sim.encodings), len(sim.reports)
    with pytest.raises(error, match=f"(?i){words}"):
        act(sim)
    assert np.array_equal(sim.predict(DATA)[0], before[0])
    assert dict(sim.encodings) == before[1]
    assert len(sim.reports) == before[2]
    assert not list(tmp_path.iterdir())


def test_export_before_calibration_says_what_to_do(tmp_path):
    with pytest.raises(EncodingError, match="calibrate"):
        QuantSim(b.small_cnn()).export(tmp_path)
    assert not list(tmp_path.iterdir())


def test_failed_export_leaves_the_old_bundle(tmp_path, monkeypatch):
    sim = simulate()
    sim.export(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    monkeypatch.setattr("bitwright.formats.write", lambda *a, **k: (_ for _ in ()).throw(OSError("disk full")))
    sim.apply("fold_batch_norm").calibrate(DATA)
    with pytest.raises(OSError, match="disk full"):
        sim.export(tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_the_users_model_is_never_changed():
    model = b.small_cnn()
    before = model.SerializeToString()
    sim = QuantSim(model, weights="int4")
    sim.apply("fold_batch_norm").apply("cle", DATA).apply("adaround", DATA).calibrate(DATA)
    assert model.SerializeToString() == before


def test_results_do_not_depend_on_how_data_are_handed_over(tmp_path):
    np.savez(tmp_path / "data.npz", **DATA)
    sims = [simulate(data=d) for d in (DATA, DATA["x"], tmp_path / "data.npz", [DATA])]
    for sim in sims[1:]:
        for site, encoding in sims[0].encodings.items():
            assert encoding.equals(sim.encodings[site])


def test_overrides_outlive_the_fold_of_what_they_named():
    sim = QuantSim(b.small_cnn(), overrides={"bn1": "float"})
    sim.apply("fold_batch_norm").calibrate(DATA)
    with pytest.raises(InputError, match="bn9"):
        QuantSim(b.small_cnn(), overrides={"bn9": "float"})


def test_sqnr_does_not_depend_on_batches():
    x = RNG.normal(size=(32, 5))
    noisy = x + RNG.normal(size=x.shape) * 0.01
    noise, power = np.square(noisy - x).sum(), np.square(x).sum()
    assert sqnr(x, noisy) == pytest.approx(10 * np.log10(power / noise))
    assert sqnr(x, x) == float("inf")


@pytest.mark.parametrize("weights", ["int8", "int4", "int4:block8"])
@pytest.mark.parametrize("head", ["Gemm", "MatMul"])
def test_a_tied_head_is_quantized_with_its_embedding(weights, head, tmp_path):
    """The file computes what the simulation does, and the embedding's rows have the head's scales."""
    m = b.ModelBuilder(opset=21)
    m.input("ids", ["n"], b.INT64)
    table = m.weight("table", 40, 16)
    m.node("Gather", [table, "ids"], "e")
    m.node("MatMul", ["e", m.weight("w", 16, 16)], "h")
    if head == "Gemm":
        m.node("Gemm", ["h", table], "y", transB=1)
    else:
        m.node("MatMul", ["h", m.node("Transpose", [table], "turned", perm=[1, 0])], "y")
    m.output("y")
    data = {"ids": np.random.default_rng(0).integers(0, 40, 64)}
    sim = QuantSim(m.build(), weights=weights).calibrate(data)
    found = sim.predict(data)[0]
    assert sqnr(sim.predict(data, simulated=False)[0], found) > (30 if weights == "int8" else 10)
    if head == "Gemm":
        assert sim.table["table"].scale.shape == (40,) and sim.table["table"].bits == 8
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    path = sim.export(tmp_path).files["qdq"]
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(session.run(None, data)[0], found, atol=1e-5)


def test_an_input_that_is_an_output_is_handed_out_as_it_came():
    net = image(conv("y"), **CONV)[0]
    net.graph.output.append(net.graph.input[0])
    x = normal(4, 4, 8, 8)
    sim = QuantSim(net).calibrate({"x": x})
    outputs = dict(zip(sim.graph.outputs, sim.predict({"x": x}), strict=True))
    assert np.array_equal(outputs["x"], x)
    assert not np.array_equal(outputs["y"], sim.predict({"x": x}, simulated=False)[0])


def test_the_simulated_model_hands_it_out_as_predict_and_the_exported_file_do(tmp_path):
    net = image(conv("y"), **CONV)[0]
    net.graph.output.append(net.graph.input[0])
    x = normal(4, 4, 8, 8)
    sim = QuantSim(net).calibrate({"x": x})
    found, seen = dict(zip(sim.graph.outputs, sim.predict({"x": x}), strict=True)), sim.model.run({"x": x})
    session = ort.InferenceSession(str(sim.export(tmp_path).files["qdq"]), providers=["CPUExecutionProvider"])
    written = dict(zip(sim.graph.outputs, session.run(list(sim.graph.outputs), {"x": x}), strict=True))
    for name, value in found.items():
        np.testing.assert_allclose(seen[name], value, atol=1e-5)
        np.testing.assert_allclose(written[name], value, atol=1e-5)


def test_encodings_of_a_part_say_how_to_leave_the_rest_in_float(tmp_path):
    """As a file does that another framework's plan was written by."""
    model, x = b.small_cnn(), b.image(4, 3, 8, 8)
    sim = QuantSim(model).calibrate({"x": x})
    sim.export(tmp_path, name="net")
    file = tmp_path / "net.encodings"
    found = json.loads(file.read_text())
    found["activation_encodings"] = found["activation_encodings"][:2]
    file.write_text(json.dumps(found))
    opened = QuantSim(model).load_encodings(file)
    with pytest.raises(
        EncodingError, match=r"no encoding yet, '\w+' \(\w+\) first.*load_encodings\(file, partial=False\)"
    ):
        opened.predict({"x": x})
    opened.load_encodings(file, partial=False).predict({"x": x})
    with pytest.raises(EncodingError) as error:
        QuantSim(model).predict({"x": x})
    assert "partial" not in str(error.value)


@pytest.mark.parametrize("version", ["0.6.1", "1.0.0", "2.1.0"])
def test_files_that_name_the_same_values_elsewhere_load_whole(version, tmp_path):
    """Another framework has its site behind the reshape, and the factor in its op."""
    net = b.ModelBuilder()
    scaled = net.node("Mul", [net.input("x", ["n", 3, 8]), net.const("half", np.float32(0.125))], "scaled")
    flat = net.node("Reshape", [scaled, net.const("shape", [0, 24])], "flat")
    net.output(net.node("MatMul", [flat, net.weight("w", 24, 4)], "y"), ["n", 4])
    model = net.build()
    data = {"x": np.random.default_rng(1).normal(size=(16, 3, 8)).astype(np.float32)}
    sim = QuantSim(model).calibrate(data)
    assert sim.plan.root("flat") == "scaled" and {"half", "scaled"} <= set(sim.encodings)
    sim.export(tmp_path, name="net", encodings_version=version)
    file = tmp_path / "net.encodings"
    found = json.loads(file.read_text())
    gone = {"half", "scaled"}
    if version == "2.1.0":
        found["encodings"] = [e for e in found["encodings"] if e["name"] not in gone]
    for part in ("activation_encodings", "param_encodings") if version != "2.1.0" else ():
        held = found[part]
        found[part] = ([e for e in held if e["name"] not in gone] if isinstance(held, list)
                       else {k: v for k, v in held.items() if k not in gone})  # fmt: skip
    file.write_text(json.dumps(found))
    opened = QuantSim(model).load_encodings(file)
    assert opened.encodings["scaled"].equals(sim.encodings["scaled"])
    assert opened.encodings["half"].equals(sim.encodings["half"]) and not opened.encodings["half"].frozen
    np.testing.assert_array_equal(opened.predict(data)[0], sim.predict(data)[0])
