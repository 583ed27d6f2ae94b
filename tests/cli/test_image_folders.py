"""`--image-…`: every command reads a folder of images as it reads the same images prepared as an array."""

from __future__ import annotations

import json

import numpy as np
import pytest

MEAN, DEVIATION = np.float32([124, 116, 104]), np.float32([58, 57, 56])
HOW = ("--image-scaling", "124,116,104/58,57,56", "--image-bgr", "--image-fit", "stretch")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Photos twice as high as the model takes them, the same prepared as an array, and labels."""
    image = pytest.importorskip("PIL.Image")
    folder = tmp_path_factory.mktemp("photos")
    (folder / "photos").mkdir()
    prepared = []
    for number, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (12, 24, 12, 3), np.uint8)):
        picture = image.fromarray(pixels)
        picture.save(folder / "photos" / f"{number:02}.png")
        small = np.asarray(picture.resize((12, 12), image.Resampling.BILINEAR))
        prepared.append(((small - MEAN) / DEVIATION)[..., ::-1].transpose(2, 0, 1))
    np.save(folder / "photos.npy", np.stack(prepared).astype(np.float32))
    np.save(folder / "labels.npy", np.arange(12) % 5)
    return folder


@pytest.fixture(scope="module")
def both(net, photos, tmp_path_factory):
    """What `quantize` writes from the folder, and from the array."""
    from bitwright.cli import main

    outs = {}
    for kind, data in (("folder", ("photos", *HOW)), ("array", ("photos.npy",))):
        outs[kind] = tmp_path_factory.mktemp(kind) / "out"
        words = ["quantize", net.model, "--data", photos / data[0], *data[1:], "--out", outs[kind], "--quiet"]
        assert main([str(word) for word in words]) == 0
    return outs


def test_quantize_reads_photos_as_they_are_said_to_be(both, photos, net, run, tmp_path):
    grids = {kind: (out / "net.encodings").read_text() for kind, out in both.items()}
    assert grids["folder"] == grids["array"]
    report = json.loads((both["folder"] / "report.json").read_text())
    assert report["calibration"]["images"]["scaling"] == [[124, 116, 104], [58, 57, 56]]
    assert "values 124,116,104/58,57,56, stretch, BGR" in (both["folder"] / "report.html").read_text()
    plain = run("quantize", net.model, "--data", photos / "photos", "--out", tmp_path / "plain", "--quiet")
    assert plain.status == 0, plain.err
    assert (tmp_path / "plain" / "net.encodings").read_text() != grids["array"]


def test_labels_and_metrics_are_about_photos_read_alike(net, photos, run, tmp_path):
    seen = []
    for data in (("photos", *HOW), ("photos.npy",)):
        out = tmp_path / data[0]
        done = run("quantize", net.model, "--data", photos / "photos.npy", "--evaluation-data", photos / data[0],
                   *data[1:], "--labels", photos / "labels.npy", "--metric", "agreement", "--out", out)  # fmt: skip
        assert done.status == 0, done.err
        report = json.loads((out / "report.json").read_text())
        assert report["calibration"]["images"] is None
        seen.append((report["accuracy"], report["metrics"]))
    assert seen[0] == seen[1]


def figures(done):
    assert done.status == 0, done.err
    return {k: v for k, v in json.loads(done.out).items() if k != "notes"}, json.loads(done.out)["notes"]


def test_verify_reads_photos_as_calibration_did(both, photos, run):
    wanted, _ = figures(run("verify", both["folder"], "--data", photos / "photos.npy", "--json"))
    found, notes = figures(run("verify", both["folder"], "--data", photos / "photos", "--json"))
    assert found == wanted
    assert "images are read as the calibration's were: values 124,116,104/58,57,56, stretch, BGR" in notes
    # An export that was calibrated on arrays doesn't know: there the options say.
    wanted, _ = figures(run("verify", both["array"], "--data", photos / "photos.npy", "--json"))
    assert figures(run("verify", both["array"], "--data", photos / "photos", "--json"))[0] != wanted
    assert figures(run("verify", both["array"], "--data", photos / "photos", *HOW, "--json"))[0] == wanted


def dumped(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*.raw")}


def test_dumps_and_comparisons_read_photos_alike(both, photos, net, run, tmp_path):
    for name, words in {
        "array": (both["array"], "--data", photos / "photos.npy"),
        "known": (both["folder"], "--data", photos / "photos"),
        "said": (both["array"], "--data", photos / "photos", *HOW),
        "float": (net.model, "--float", "--data", photos / "photos.npy"),
        "float said": (net.model, "--float", "--data", photos / "photos", *HOW),
    }.items():
        done = run("layer-outputs", *words, "--out", tmp_path / name)
        assert done.status == 0, done.err
    found = {name: dumped(tmp_path / name) for name in ("array", "known", "said", "float", "float said")}
    assert found["array"]
    assert found["known"] == found["said"] == found["array"]
    assert found["float said"] == found["float"]
    target = tmp_path / "array" / "outputs"
    for words in ((both["folder"],), (both["array"], *HOW)):
        done = run("compare", words[0], target, "--data", photos / "photos", *words[1:], "--min-sqnr", 100)
        assert done.status == 0, done.out + done.err
    assert run("compare", both["array"], target, "--data", photos / "photos", "--min-sqnr", 100).status == 1


def test_banks_and_searches_read_photos_alike(net, photos, run, tmp_path):
    grids = []
    for data in (("photos", *HOW), ("photos.npy",)):
        bank, auto, mixed = (tmp_path / f"{data[0]} {word}" for word in ("bank", "auto", "mixed"))
        given = ("--data", photos / data[0], *data[1:], "--quiet", "--out")
        labels = ("--labels", photos / "labels.npy", "--allowed-drop", 0.99)
        for words in (
            ("collect", net.model, *given, bank),
            ("auto", net.model, *labels, *given, auto),
            ("mixed-precision", net.model, *labels, *given, mixed),
        ):
            done = run(*words)
            assert done.status == 0, done.err
        out = tmp_path / f"{data[0]} of bank"
        assert run("quantize", net.model, "--bank", bank, "--out", out, "--quiet").status == 0
        scores = json.loads((mixed / "mixed_precision.json").read_text())["sensitivities"]
        # The producer's record has the data's fingerprint, in which the form of the data counts.
        found = [json.loads((folder / "net.encodings").read_text()) for folder in (out, auto, mixed)]
        grids.append(([(f["activation_encodings"], f["param_encodings"]) for f in found], scores))
        report = json.loads((auto / "report.json").read_text())
        assert (report["calibration"]["images"] is None) == (data[0] == "photos.npy")
    assert grids[0] == grids[1]


def test_analyses_read_photos_alike(both, net, photos, run, tmp_path):
    pytest.importorskip("bokeh")
    seen = []
    for data in (("photos", *HOW), ("photos.npy",)):
        done = run("analyze", net.model, "--data", photos / data[0], *data[1:], "--out", tmp_path / data[0], "--json")
        assert done.status == 0, done.err
        seen.append(json.loads(done.out)["overall"])
        page = tmp_path / f"{data[0]}.html"
        done = run("visualize", net.model, both["array"] / "net.onnx", "--out", page, "--data", photos / data[0],
                   *data[1:])  # fmt: skip
        assert done.status == 0, done.err
    assert seen[0] == seen[1]
    assert run("validate", net.model, "--data", photos / "photos", *HOW).status == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--image-scaling", "0..2"), "unknown image scaling '0..2'; known: 0..255, 0..1, -1..1, imagenet"),
        (("--image-scaling", "127,5/127"), "give one mean and one deviation, or three of each"),
        (("--image-scaling", "a/b"), "'a/b' isn't of the form MEAN/DEVIATION, such as 127.5/127.5"),
        (("--image-scaling", "1/2/3"), "isn't of the form MEAN/DEVIATION"),
        (("--image-scaling", "0.485,0.456,0.406/0.229,0.224,0.225"), "in units of 0 to 255; multiply"),
        (("--image-fit", "pad"), "--image-fit 'pad': give crop or stretch"),
        (("--image-size", "224"), "'224' isn't of the form HEIGHTxWIDTH"),
        (("--image-size", "24x24"), "the model takes [?, 3, 12, 12], and images of 24 x 24 are asked for"),
    ],
)
def test_what_cannot_be_read_is_refused(net, photos, run, tmp_path, words, message):
    done = run("quantize", net.model, "--data", photos / "photos", *words, "--out", tmp_path / "out")
    assert done.status == 2
    assert message in " ".join(done.err.split())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["quantize", "collect", "analyze"])
def test_options_of_images_are_refused_where_there_are_none(net, run, tmp_path, command):
    done = run(command, net.model, "--data", net.npz, "--image-scaling", "-1..1", "--out", tmp_path / "out")
    assert done.status == 2
    assert "say how a folder of images is read" in " ".join(done.err.split())
