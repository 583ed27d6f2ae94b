"""What a newcomer types first: print(sim), sim(x), sim["site"], short names of types and schemes, subgraphs."""

import copy
import pickle
import sys
import types
import warnings

import builders as b
import numpy as np
import pytest

from bitwright.data import ImageOptions, ImplausibleDataWarning, doubt_of_accuracy
from bitwright.errors import CapabilityError, EncodingError, InputError, MissingExtraError
from bitwright.grids import parse_type
from bitwright.placement import Float, Fused
from bitwright.report import read_report
from bitwright.simulation import QuantSim
from bitwright.technique import Report
from bitwright.verify import validate
from bitwright_onnx.simulate.simulation import by_name

DATA = {"x": np.random.default_rng(0).normal(size=(24, 3, 8, 8)).astype(np.float32)}


def simulation(**options):
    return QuantSim(b.small_cnn(), target="onnxruntime-cpu", **options)


def floats(sim):
    return {s for s, site in sim.plan.items() if isinstance(site.decision, Float)}


def test_print_says_what_is_quantized_how_far_it_is_and_what_comes_next():
    sim = simulation()
    before = str(sim)
    assert "QuantSim of" in before and "onnxruntime-cpu" in before
    assert "10 of 10 encodings are missing, 'x' first" in before
    assert before.splitlines()[-1].startswith("next: apply('fold_batch_norm')")
    assert "(2 batch norms), then calibrate(data)" in before.splitlines()[-1]
    after = str(sim.calibrate(DATA))
    encoding = sim.encodings["r2"]
    row = next(line for line in after.splitlines() if line.startswith("relu2"))
    assert f"{float(encoding.minimum):.4g} … {float(encoding.maximum):.4g}" in row and "uint8" in row
    assert "with gap" in next(line for line in after.splitlines() if line.startswith("flatten"))
    assert after.splitlines()[-1].startswith("next: 2 batch norms unfolded: apply('fold_batch_norm')")
    assert "export" in after.splitlines()[-1]
    assert "applied: fold_batch_norm" in str(sim.apply("fold_batch_norm"))
    assert str(sim).splitlines()[-1].startswith("next: calibrate(data)")
    sim.calibrate(DATA)
    assert str(sim).splitlines()[-1].startswith("next: compare predict(data)")
    assert "calibrated, 10 encodings\n" in str(sim)
    sim["r2"].freeze()
    assert "1 of them frozen or kept" in str(sim)
    page = sim._repr_html_()
    assert "<table>" in page and "relu2" in page and "next: " in page
    assert "\n" not in repr(sim)


def test_what_is_fused_into_another_op_is_not_said_to_be_in_float():
    sim, model = simulation(), b.small_cnn()
    lines = str(sim).splitlines()
    fused = [s for s, site in sim.plan.items() if isinstance(site.decision, Fused)]
    assert {"c1", "bn1.gamma"} <= set(fused)
    assert f", {len(fused)} fused into others, {len(floats(sim)) - len(fused)} stay in float" in lines[1]
    first, norm = (next(line for line in lines if line.startswith(op)) for op in ("conv1 ", "bn1 "))
    assert first.endswith("fused    into r1") and norm.count("into") == 2 and "float" not in first + norm
    assert next(r for r in sim.plan.table() if r.site == "c1").bits == "fused"
    found = validate(model, target="onnxruntime-cpu")
    assert found.fused == len(fused) and not {f.where for f in found.in_float} & set(fused)
    assert f"activations uint8; {len(fused)} more are fused into others" in str(found).splitlines()[1]
    # Where nothing rounds the result, its parts are in float like it.
    plan = simulation(activations="float").plan
    assert plan["c1"].decision == Float("inside the supergroup Conv+Clip")
    with pytest.raises(EncodingError, match=r"'c1' is fused .*; 'r1' has the grid\) and takes no encoding"):
        sim.plan.by_root({"c1": object()}, lambda site, encoding: None)


def test_plan_and_encodings_are_tables_and_frames(monkeypatch):
    sim = simulation().calibrate(DATA)
    lines = str(sim.plan).splitlines()
    assert len(lines) == len(sim.plan) + 1 and lines[0].split() == [
        "site", "op", "bits", "granularity", "decision", "reason",
    ]  # fmt: skip
    assert "<td" in sim.plan._repr_html_() and "<td" in sim.encodings._repr_html_()
    row = next(r for r in sim.encodings.as_table().rows if r[0] == "conv1.weight")
    held = sim.encodings["conv1.weight"]
    assert row[1:5] == ("int8", 8, float(held.minimum.min()), float(held.maximum.max()))
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(MissingExtraError, match="pip install pandas"):
        sim.plan.to_pandas()
    frame = types.SimpleNamespace(DataFrame=lambda rows, columns: (rows, columns))
    monkeypatch.setitem(sys.modules, "pandas", frame)
    rows, columns = sim.encodings.to_pandas()
    assert len(rows) == len(sim.encodings) and columns[0] == "site"


def test_reports_and_bundles_are_shown_in_words(tmp_path):
    sim = simulation()
    assert str(sim.reports) == "nothing was applied yet" and "nothing" in sim.reports._repr_html_()
    sim.apply("fold_batch_norm").apply("cle").calibrate(DATA)
    first, second = str(sim.reports).split("\n\n")
    assert first.splitlines()[0] == "fold_batch_norm: folded 2 of 2 batch norms"
    assert "backward 2" in first.splitlines()[1] and first.splitlines()[2].split()[:2] == ["batch", "norm"]
    assert first.splitlines()[3].split()[:3] == ["bn1", "conv1", "backward"]
    assert second.startswith("cross_layer_equalization: ") and "Report(" not in str(sim.reports)
    assert isinstance(sim.reports, tuple) and dict(sim.reports)["fold_batch_norm"].rows
    page = sim.reports._repr_html_()
    assert "<table>" in page and "bn1" in page and page.count("<strong>") == 2
    bundle = sim.export(tmp_path, name="net")
    lines = str(bundle).splitlines()
    assert lines[0] == f"export of {len(bundle.files)} files in {tmp_path}"
    assert lines[1] == "weights stored in another type, values unchanged: 1 (stored_anew)"
    row = next(line for line in lines if line.startswith("encodings"))
    size = bundle.files["encodings"].stat().st_size
    assert row.split() == ["encodings", "net.encodings", *f"{size / 1e3:.3g} kB".split()]
    assert lines[-1] == f"next: bitwright verify {tmp_path} --data test.npz"
    assert "net.encodings" in bundle._repr_html_() and "verify" in bundle._repr_html_()
    bundle.files["encodings"].unlink()
    assert next(line for line in str(bundle).splitlines() if line.startswith("encodings")).endswith("   gone")


def test_long_reports_are_cut_on_terminals_only():
    report = Report("done", {}, ("layer", "error"), tuple((f"layer{i}", np.float32(i)) for i in range(100)))
    lines = str(report).splitlines()
    assert lines[-1] == "… and 60 more in rows" and len(lines) == 43 and lines[2].split() == ["layer0", "0"]
    assert "layer99" in report._repr_html_()
    assert str(Report("a <b>", {"c": 0.123456})).splitlines() == ["a <b>", "c 0.1235"]
    assert "&lt;b&gt;" in Report("a <b>")._repr_html_()


def test_an_export_without_the_targets_own_file_says_how_to_get_one(tmp_path):
    sim = QuantSim(b.small_cnn(), target="tflite-int8").apply("fold_batch_norm").calibrate(DATA)
    with pytest.warns(
        UserWarning, match=r"net\.tflite isn't written: .* of Keras models alone: build the network in Keras"
    ):
        bundle = sim.export(tmp_path, name="net")
    assert "tflite" not in bundle.files
    assert "build the network in Keras" in read_report(tmp_path, "net").report.record.missing["tflite"]


def test_html_escapes_names():
    from bitwright.tables import Table

    assert "<b>" not in Table(("a",), (("<b>x</b>",),)).html()


def test_calling_the_simulation_is_a_prediction_of_one_batch():
    sim = simulation()
    with pytest.raises(EncodingError, match="calibrate"):
        sim(DATA["x"])
    sim.calibrate(DATA)
    expected = sim.predict(DATA)[0]
    assert np.array_equal(sim(DATA["x"]), expected)
    assert np.array_equal(sim(x=DATA["x"][:5]), sim(DATA["x"])[:5])
    with pytest.raises(InputError, match="one batch"):
        sim()


def test_the_simulated_model_takes_the_array_of_its_one_input():
    sim = simulation().calibrate(DATA)
    named, alone = sim.model({"x": DATA["x"]}), sim.model(DATA["x"])
    assert named.keys() == alone.keys() and all(np.array_equal(named[k], alone[k]) for k in named)
    with pytest.raises(InputError, match="the inputs 'a', 'b': give a mapping with an array for each"):
        by_name(DATA["x"], ["a", "b"])


def test_a_width_is_the_targets_type_of_that_width():
    assert {str(simulation(weights=w).plan) for w in (4, "4")} == {str(simulation(weights="int4").plan)}
    assert str(simulation(activations=16).plan) == str(simulation(activations="uint16").plan)
    # A width alone says nothing of the sign, so that symmetric activations stay signed.
    empty = ("params", "op_type", "model_input", "model_output")
    symmetric = {
        "defaults": {"ops": {"is_output_quantized": "True", "is_symmetric": "True"}, "params": {}},
        "supergroups": [],
        **{key: {} for key in empty},
    }
    named, sized, default = (
        QuantSim(b.small_cnn(), target=symmetric, activations=a).plan.spec("r2") for a in ("uint8", 8, None)
    )
    assert sized == default and sized.signed and not named.signed
    assert simulation(overrides={"fc": {"weights": 4}}).plan.spec("fc.weight").bits == 4
    sim = simulation()
    sim.set_precision("conv1", weights=4)
    assert sim.plan.spec("conv1.weight").bits == 4
    with pytest.raises(InputError, match="2 to 16"):
        simulation(weights=64)


def test_other_names_of_types():
    assert parse_type("fp16") == parse_type("float16")
    assert parse_type("BF16") == parse_type("bfloat16")
    assert parse_type("fp8_e5m2") == parse_type("float8e5m2")


@pytest.mark.parametrize("role", ["scheme", "weight_scheme"])
def test_a_wrong_scheme_is_refused_at_once_with_the_nearest(role):
    with pytest.raises(InputError, match="unknown calibration scheme 'tf_enhancd'; did you mean 'tf_enhanced'"):
        simulation(**{role: "tf_enhancd"})
    with pytest.raises(InputError, match="percentile"):
        simulation(**{role: "percentile:200"})
    with pytest.raises(InputError, match="bogus"):
        simulation().fork(**{role: "bogus"})


def test_aimets_schemes():
    sim, own = simulation(scheme="tf_enhanced").calibrate(DATA), simulation(scheme="sqnr").calibrate(DATA)
    assert all(sim.encodings[s].equals(own.encodings[s]) for s in own.encodings)


class TestSite:
    def test_type_range_and_freezing(self):
        sim = simulation().calibrate(DATA)
        before = sim.state
        weight = sim["conv1.weight"].freeze()
        assert weight.frozen and not before.encodings["conv1.weight"].frozen  # states are never written to
        weight.set(4)
        assert weight.decision.bits == 4 and weight.encoding is None
        sim.calibrate(DATA)
        assert weight.encoding.bits == 4
        site = sim["r2"].set(low=0.0, high=2.0)
        assert float(site.encoding.maximum) == 2.0
        sim.calibrate(DATA)
        assert float(site.encoding.maximum) == 2.0
        site.freeze(False)
        sim.calibrate(DATA)
        assert float(site.encoding.maximum) > 10
        sim["conv1.weight"].float()
        assert isinstance(weight.decision, Float) and "conv1.weight" not in sim.encodings
        assert np.isfinite(sim(DATA["x"])).all()

    def test_sites_that_share_a_grid_change_together(self):
        sim = simulation().calibrate(DATA)
        sim["flat"].set(low=0.0, high=1.0)
        assert float(sim["gap"].encoding.maximum) == 1.0

    def test_what_cannot_be_is_refused_and_nothing_changes(self):
        sim = simulation().calibrate(DATA)
        state = sim.state
        for act, message in (
            (lambda: sim["conv1.wight"], "did you mean 'conv1.weight'"),
            (lambda: sim["conv1"], "is an op; its sites are 'conv1.weight', 'conv1.bias', 'c1'"),
            (sim["c1"].freeze, "inside the supergroup"),
            (lambda: sim["conv1.weight"].set(low=-1, high=1), "for each channel"),
            (lambda: sim["r2"].set(low=3, high=1), "empty"),
            (lambda: sim["r2"].set(low=3), "both low= and high="),
            (lambda: sim["r2"].set("int99"), "2 to 16"),
            (lambda: sim[0], "named by a text"),
        ):
            with pytest.raises((InputError, EncodingError), match=message):
                act()
        assert sim.state is state
        assert "conv1.weight" in sim and "conv1" not in sim


class TestSubgraph:
    def test_all_ops_on_the_ways_between_stay_in_float(self):
        sim = simulation(overrides={"dw -> add": "float"})
        assert {"dw.weight", "c2", "b2"} <= floats(sim)
        assert {"conv1.weight", "fc.weight"}.isdisjoint(floats(sim))

    def test_it_outlives_the_folding_of_one_of_its_ends(self):
        sim = simulation(overrides={"conv1 -> bn1": "float"}).apply("fold_batch_norm")
        assert "conv1.weight" in floats(sim)
        assert "dw.weight" not in floats(sim)

    def test_types_and_set_precision(self):
        sim = simulation(overrides={"conv1 -> dw": {"weights": "int4"}})
        assert [sim.plan.spec(f"{op}.weight").bits for op in ("conv1", "dw", "fc")] == [4, 4, 8]
        sim.set_precision("dw -> fc", weights="int6")
        assert [sim.plan.spec(f"{op}.weight").bits for op in ("conv1", "dw", "fc")] == [4, 6, 6]

    def test_a_name_of_its_own_wins(self):
        sim = simulation(overrides={"conv1 -> dw": {"weights": "int4"}, "dw": {"weights": "int7"}})
        assert sim.plan.spec("dw.weight").bits == 7

    @pytest.mark.parametrize(("text", "message"), [("fc -> conv1", "no way leads"), ("conv -> fc", "no op 'conv'")])
    def test_a_wrong_one_is_refused(self, text, message):
        with pytest.raises(InputError, match=message):
            simulation(overrides={text: "float"})


class TestImplausibleData:
    """Warned of: valid data that can hardly be what the network was trained on."""

    def test_constant_data(self):
        with pytest.warns(ImplausibleDataWarning, match="the data are constant"):
            simulation().calibrate({"x": np.zeros((4, 3, 8, 8), np.float32)})

    def test_data_that_count_as_zero(self):
        with pytest.warns(ImplausibleDataWarning, match=r"no value of the data is larger than 1e-38"):
            simulation().calibrate({"x": (1e-40 * DATA["x"]).astype(np.float32)})

    def test_pixels_that_the_model_does_not_scale(self):
        pixels = np.random.default_rng(0).integers(0, 256, (4, 3, 8, 8))
        with pytest.warns(ImplausibleDataWarning, match="whole numbers from 0 to 255"):
            sim = simulation().calibrate({"x": pixels.astype(np.uint8)})
        with pytest.warns(ImplausibleDataWarning, match="calibrated on 0 to 25"):
            sim.predict({"x": (pixels / 2550).astype(np.float32)[:1]})
        with pytest.warns(ImplausibleDataWarning, match="spans 0 to 255, but the network was calibrated on -"):
            simulation().calibrate(DATA).predict({"x": pixels.astype(np.float32)})

    def test_images_from_minus_one_for_ranges_from_zero(self):
        sim = simulation().calibrate({"x": np.abs(DATA["x"])})
        top = float(np.abs(DATA["x"]).max())
        values = np.full((1, 3, 8, 8), 0.5 * top, np.float32)
        with warnings.catch_warnings():
            warnings.simplefilter("error", ImplausibleDataWarning)
            values[0, 0, 0, 0] = -0.2 * top
            sim.predict({"x": values})
        values[0, 0, 0, 0] = -top
        with pytest.warns(ImplausibleDataWarning, match="but the network was calibrated on 0 to"):
            sim.predict({"x": values})

    def test_plausible_data_are_not_remarked_on(self):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            sim = simulation().calibrate(DATA)
            sim.predict({"x": 3 * DATA["x"]})
            sim.predict({"x": np.zeros((1, 3, 8, 8), np.float32)})  # black is an image too
            sim.predict({"x": 100 * DATA["x"]}, simulated=False)
            simulation().calibrate({"x": np.round(DATA["x"])})  # whole numbers, but no pixels

    @pytest.mark.parametrize(
        ("top1", "classes", "samples", "doubted"),
        [(0.11, 10, 500, True), (0.2, 10, 500, False), (0.0, 1000, 64, True), (0.0, 10, 63, False),
         (0.9, 1, 500, False), (0.01, 1000, 500, False), (0.5, 2, 100, True), (0.65, 2, 100, False)],
    )  # fmt: skip
    def test_accuracy_of_guessing(self, top1, classes, samples, doubted):
        assert bool(doubt_of_accuracy(top1, classes, samples)) is doubted


def test_a_simulation_is_copied_as_python_copies_and_the_copy_goes_its_own_way():
    sim = simulation().calibrate(DATA)
    for twin in (copy.copy(sim), copy.deepcopy(sim), copy.deepcopy({"best": sim})["best"]):
        assert type(twin) is QuantSim and dict(twin.encodings) == dict(sim.encodings)
        twin["r2"].float()
        assert "r2" in floats(twin) and "r2" not in floats(sim)
        assert np.isfinite(sim(DATA["x"])).all()


def test_a_site_kept_in_float_says_so_once_with_the_reason():
    sim = simulation().calibrate(DATA)
    assert repr(sim["r2"].float()) == "<r2: float, kept in float by an override>"


def test_pickling_names_the_way_out(tmp_path):
    sim = simulation().calibrate(DATA)
    with pytest.raises(CapabilityError, match=r"save\(folder\) keeps it, and QuantSim\.load\(folder\) opens it"):
        pickle.dumps(sim)
    for twin in (copy.copy(sim), copy.deepcopy(sim), QuantSim.load(sim.save(tmp_path / "kept"))):
        assert np.array_equal(twin.predict(DATA)[0], sim.predict(DATA)[0])


def test_images_of_a_folder_are_scaled_as_asked_for(tmp_path):
    Image = pytest.importorskip("PIL.Image")
    pixels = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), np.uint8)
    for number, picture in enumerate(pixels):
        Image.fromarray(picture).save(tmp_path / f"{number}.png")
    sim = simulation()
    (plain,) = sim.open(tmp_path)
    (scaled,) = sim.open(tmp_path, images=ImageOptions(scaling="-1..1"))
    assert np.array_equal(plain["x"], (pixels.transpose(0, 3, 1, 2) / 255).astype(np.float32))
    assert np.allclose(scaled["x"], 2 * plain["x"] - 1, atol=1e-6)
    assert float(sim.calibrate(sim.open(tmp_path, images=ImageOptions(scaling="-1..1")))["x"].encoding.minimum) < -0.9
