"""Data in every accepted form, and every way in which it can be wrong, with its message."""

import json
import os
import pickle
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from bitwright.data import Dataset, FirstSamples, Watching, labels, open_data
from bitwright.data._dataset import ArrayDataset, ImageOptions
from bitwright.errors import InputError
from bitwright.files import HeldFile, StoredArray, open_npy

ONE = {"x": ((None, 3, 4), "float32")}
TWO = {"ids": ((None, 5), "int64"), "mask": ((None, 5), "float32")}
RNG = np.random.default_rng(0)
X = RNG.normal(size=(10, 3, 4)).astype(np.float32)


def whole(dataset, name="x"):
    return np.concatenate([b[name] for b in dataset])


class Loader:
    """As a framework's data loader: re-iterable, no length in samples, yields (inputs, labels)."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter([(b, np.zeros(len(b))) for b in self.batches])


def sources(tmp_path):
    np.save(tmp_path / "a.npy", X)
    np.savez(tmp_path / "named.npz", x=X)
    np.savez(tmp_path / "unnamed.npz", X)
    np.savez_compressed(tmp_path / "packed.npz", x=X)
    np.savez(tmp_path / "fortran.npz", x=np.asfortranarray(X))
    parts = [X[:4], X[4:8], X[8:]]
    return {
        "array": X,
        "float64": X.astype(np.float64),
        "mapping": {"x": X},
        "npy": str(tmp_path / "a.npy"),
        "named npz": tmp_path / "named.npz",
        "unnamed npz": tmp_path / "unnamed.npz",
        "compressed npz": tmp_path / "packed.npz",
        "fortran npz": tmp_path / "fortran.npz",
        "list": parts,
        "list of mappings": [{"x": p, "unused": p} for p in parts],
        "list of tuples": [(p,) for p in parts],
        "loader with labels": Loader(parts),
        "function": lambda: iter(parts),
        "generator function": lambda: (p for p in parts),
    }


def test_every_form_gives_the_same_batches(tmp_path):
    for name, source in sources(tmp_path).items():
        dataset = open_data(source, ONE, batch_size=4)
        assert isinstance(dataset, Dataset), name
        for _ in range(2):
            batches = list(dataset)
            assert [len(b["x"]) for b in batches] == [4, 4, 2], name
            assert np.array_equal(whole(dataset), X), name
            assert all(b["x"].dtype == np.float32 and b["x"].flags.c_contiguous for b in batches), name
        assert dataset.samples in (10, None)
        assert dataset.fingerprint() == open_data(source, ONE, batch_size=4).fingerprint(), name


def test_limit(tmp_path):
    for name, source in sources(tmp_path).items():
        assert np.array_equal(whole(open_data(source, ONE, batch_size=4, limit=5)), X[:5]), name
        assert np.array_equal(whole(open_data(source, ONE, batch_size=4, limit=99)), X), name


def test_files_are_read_piece_by_piece_where_they_can_be(tmp_path):
    for name, source in sources(tmp_path).items():
        if name.endswith(("npy", "npz")):
            array = open_data(source, ONE).arrays["x"]
            assert isinstance(array, StoredArray) == (name not in ("compressed npz", "fortran npz")), name


def test_where_no_call_reads_from_a_place_threads_read_in_turn(tmp_path, monkeypatch):
    """Windows has no `preadv`."""
    values = np.arange(8000, dtype=np.float32)
    (tmp_path / "x").write_bytes(values.tobytes())
    monkeypatch.delattr(os, "preadv")
    seek = os.lseek
    # Long enough for another thread to move the position meanwhile.
    monkeypatch.setattr(os, "lseek", lambda *place: (seek(*place), time.sleep(1e-4)))
    file = HeldFile(tmp_path / "x")

    def read(index):
        row = np.empty(80, np.float32)
        file.fill(index * row.nbytes, row.view(np.uint8).data)
        return row

    with ThreadPoolExecutor(4) as pool:
        rows = list(pool.map(read, [*range(100)] * 5))
    np.testing.assert_array_equal(np.concatenate(rows), np.tile(values, 5))
    os.truncate(tmp_path / "x", 100)
    with pytest.raises(InputError, match="was changed while it was in use"):
        read(0)


@pytest.mark.parametrize("suffix", ["npy", "npz"])
def test_a_file_that_shrinks_or_changes_while_it_is_in_use_is_an_error(tmp_path, suffix):
    """A memory map of it would end the process."""
    path, values = tmp_path / f"x.{suffix}", np.arange(4000 * 16, dtype=np.float32).reshape(-1, 16)
    save = (lambda: np.save(path, values)) if suffix == "npy" else (lambda: np.savez(path, x=values))
    save()
    data = open_data(path, {"x": ((None, 16), "float32")}, batch_size=8)
    assert sum(len(batch["x"]) for batch in data) == 4000
    batches = iter(data)
    next(batches)
    os.truncate(path, 512)
    with pytest.raises(InputError, match="was changed while it was in use"):
        next(batches)
    save()
    data = open_data(path, {"x": ((None, 16), "float32")}, batch_size=8)
    os.utime(path, ns=(0, 0))
    with pytest.raises(InputError, match="was changed"):
        list(data)


def test_pieces_are_those_of_the_array(tmp_path):
    values = np.arange(5 * 3 * 2, dtype=">i4").reshape(5, 3, 2)
    np.save(tmp_path / "c.npy", values)
    np.save(tmp_path / "f.npy", np.asfortranarray(values))
    held = open_npy(tmp_path / "c.npy")
    assert np.array_equal(held, values) and np.array_equal(open_npy(tmp_path / "f.npy"), values)
    assert np.array_equal(held[1:4], values[1:4]) and np.array_equal(held[1:4][-1][1], values[3][1])
    assert np.array_equal(held[4:9], values[4:9]) and np.array_equal(held[3:1], values[3:1])
    assert (held.ndim, held.size, len(held[2:])) == (3, 30, 3)
    with pytest.raises(IndexError):
        held[5]
    with pytest.raises(IndexError):
        held[::2]


def test_fingerprints_tell_contents_and_batches_apart():
    base = open_data(X, ONE, batch_size=4).fingerprint()
    changed = X.copy()
    changed[9, 2, 3] += 1
    assert base != open_data(changed, ONE, batch_size=4).fingerprint()
    assert base != open_data(X, ONE, batch_size=5).fingerprint()
    assert base != open_data(X, ONE, batch_size=4, limit=9).fingerprint()
    parts = [X[:5], X[5:]]
    assert open_data(parts, ONE).fingerprint() != open_data([X[:4], X[4:]], ONE).fingerprint()


def test_several_inputs_by_name_or_order():
    ids, mask = RNG.integers(0, 9, (6, 5)), np.ones((6, 5))
    for source in (
        {"mask": mask, "ids": ids},
        [(ids[:4], mask[:4]), (ids[4:], mask[4:])],
        [{"mask": mask, "ids": ids}],
        lambda: iter([[ids, mask, "label"]]),
    ):
        batches = list(open_data(source, TWO, batch_size=4))
        assert np.array_equal(np.concatenate([b["ids"] for b in batches]), ids)
        assert batches[0]["ids"].dtype == np.int64
        assert batches[0]["mask"].dtype == np.float32


def test_safe_conversions():
    spec = {"x": ((None, 2), "uint8")}
    assert whole(open_data(np.array([[1.0, 255.0]]), spec)).tolist() == [[1, 255]]
    assert whole(open_data(np.array([[True, False]]), {"x": ((None, 2), "float32")})).tolist() == [[1, 0]]
    for values, kind, message in [
        ([[0.5, 1]], "int64", "have fractions"),
        ([[1, 256]], "uint8", "outside uint8"),
        ([[-1, 2]], "uint8", "outside uint8"),
        ([[1e39, 0]], "float32", "too large for float32"),
        ([[1e5, 0]], "float16", "too large for float16"),
        ([[0, 2]], "bool", "other than 0 and 1"),
    ]:
        with pytest.raises(InputError, match=message):
            open_data(np.array(values), {"x": ((None, 2), kind)})


def test_torch_like_tensors_are_taken():
    class Tensor:
        def __init__(self, values):
            self.values, self.shape = values, values.shape

        def detach(self):
            return self

        def cpu(self):
            return self

        def __array__(self, dtype=None, copy=None):
            return self.values

    assert np.array_equal(whole(open_data(Tensor(X), ONE)), X)
    assert np.array_equal(whole(open_data([(Tensor(X), None)], ONE)), X)


def bad(values, at=(7, 1, 2)):
    x = X.copy()
    x[at] = values
    return x


WRONG = [
    (lambda: np.zeros((0, 3, 4)), "the data are empty"),
    (lambda: [], "the data are empty"),
    (lambda: {"y": X}, "no array for input 'x'; array 'y' is not an input of the model"),
    (lambda: {"x": X, "y": X}, "array 'y' is not an input of the model; the model's inputs are 'x'"),
    (lambda: X[..., :3], r"input 'x': shape \[8, 3, 3\], but the model takes \[\?, 3, 4\] \(axis 2\)"),
    (lambda: X[0], r"shape \[3, 4\], but the model takes \[\?, 3, 4\]; add a samples axis in front, x\[None\]"),
    (lambda: bad(np.nan), r"input 'x': NaN values in sample 7 \(1 such\)"),
    (lambda: bad(np.inf), "infinite values in sample 7"),
    (lambda: np.array([["a"]]), "holds <U1 values; give numbers"),
    (lambda: np.array([{}]), "holds object values"),
    (lambda: np.array(3.0), "is a scalar"),
    (lambda: 3, "can't read data from a int"),
    (lambda: iter([X]), "can be gone through only once, .*a function that returns a new iterator"),
    (lambda: (p for p in [X]), "a generator can be gone through only once"),
    (lambda: [X, X[:, :2]], r"batch 1, input 'x': shape \[10, 2, 4\]"),
    (lambda: [X, bad(np.nan)], "batch 1, input 'x': NaN values in sample 7"),
    (lambda: [{"y": X}], "batch 0: no array for input 'x'; it holds y"),
    (lambda: [()], "batch 0: 0 elements for 1 inputs"),
    (lambda: [[[1, 2], [3]]], "batch 0.*"),
    (lambda: "no/such/file.npz", "there is no file or folder 'no/such/file.npz'"),
]


@pytest.mark.parametrize(
    ("shape", "expected", "hint"),
    [
        ((8, 16, 16), (None, 1, 16, 16), "add its axis 1, of length 1: x[:, None]"),
        ((8, 3, 16), (None, 3, 16, 1), "add its axis 3, of length 1: x[:, :, :, None]"),
        ((1, 16, 16), (None, 1, 16, 16), "add a samples axis in front"),
        ((3, 16, 16), (None, 3, 16, 16), "add a samples axis in front"),
        ((8, 9, 9), (None, 3, 16, 16), "add a samples axis in front"),
    ],
)
def test_the_axis_that_is_missing_is_named(shape, expected, hint):
    with pytest.raises(InputError) as caught:
        list(open_data(np.ones(shape, np.float32), {"x": (expected, "float32")}, batch_size=8))
    assert hint in str(caught.value)


@pytest.mark.parametrize(("make", "message"), WRONG)
def test_wrong_data(make, message):
    with pytest.raises(InputError, match=message):
        open_data(make(), ONE)


def test_wrong_data_for_several_inputs():
    ids, mask = np.zeros((6, 5), int), np.ones((6, 5))
    for source, message in [
        (
            ids,
            "2 inputs; give a mapping with 'ids', 'mask', or a list of batches that are tuples",
        ),
        ({"ids": ids}, "no array for input 'mask'"),
        ({"ids": ids, "mask": mask[:4]}, "different numbers of samples: 'ids' 6, 'mask' 4"),
        ([(ids, mask[:4])], "batch 0: the inputs hold different numbers of samples"),
        ([(ids,)], "batch 0: 1 elements for 2 inputs"),
    ]:
        with pytest.raises(InputError, match=message):
            open_data(source, TWO)


def test_batches_that_come_late_are_checked_too():
    dataset = open_data(lambda: iter([X, bad(np.nan)]), ONE)
    with pytest.raises(InputError, match="batch 1, input 'x': NaN"):
        list(dataset)


def test_a_function_that_returns_one_iterator_is_caught():
    once = iter([X, X])
    with pytest.raises(InputError, match="same iterator twice"):
        list(open_data(lambda: once, ONE))


def test_wrong_files(tmp_path):
    np.savez(tmp_path / "object.npz", x=np.array([{}], dtype=object))
    np.save(tmp_path / "object.npy", np.array([{}], dtype=object))
    np.savez(tmp_path / "good.npz", x=X)
    content = (tmp_path / "good.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(content[: len(content) // 2])
    np.save(tmp_path / "good.npy", X)
    (tmp_path / "cut.npy").write_bytes((tmp_path / "good.npy").read_bytes()[:200])
    (tmp_path / "text.npy").write_text("hello")
    (tmp_path / "text.npz").write_text("hello")
    (tmp_path / "x.csv").write_text("1,2")
    with zipfile.ZipFile(tmp_path / "other.npz", "w") as archive:
        archive.writestr("x.npy", json.dumps([1]))
    np.savez(tmp_path / "names.npz", a=X, b=X)
    np.save(tmp_path / "empty.npy", X[:0])
    np.savez_compressed(tmp_path / "packed.npz", x=np.array([{}], dtype=object))
    for name, message in [
        ("object.npz", "holds Python objects, which are not loaded"),
        ("empty.npy", "the data are empty"),
        ("packed.npz", "holds Python objects, which are not loaded"),
        ("object.npy", "holds Python objects, which are not loaded"),
        ("cut.npz", "can't read"),
        ("cut.npy", "can't read"),
        ("text.npy", "expected a file written by numpy.save"),
        ("text.npz", "expected a file written by numpy.save"),
        ("other.npz", "can't read"),
        ("x.csv", "give a .npz, a .npy, a .txt, or a folder of images"),
        ("names.npz", "no array for input 'x'; array 'a' is not an input"),
    ]:
        with pytest.raises(InputError, match=message) as error:
            open_data(tmp_path / name, ONE)
        assert name in str(error.value)
    nan = tmp_path / "nan.npz"
    np.savez(nan, x=bad(np.nan))
    with pytest.raises(InputError, match=r"nan.npz, input 'x': NaN values in sample 7"):
        open_data(nan, ONE, batch_size=3)


def test_settings():
    for options, message in [({"batch_size": 0}, "batch_size=0"), ({"limit": 0}, "limit=0")]:
        with pytest.raises(InputError, match=message):
            open_data(X, ONE, **options)
    with pytest.raises(InputError, match="no inputs"):
        open_data(X, {})
    dataset = ArrayDataset({"x": X}, 4)
    assert open_data(dataset, ONE) is dataset


FIXED = {"x": ((4, 3, 4), "float32")}


def test_a_fixed_batch_dimension_is_kept():
    with pytest.warns(UserWarning, match="batches of exactly 4; the last 2 of 10 samples are left out"):
        dataset = open_data(X, FIXED)
    assert dataset.samples == 8
    assert [b["x"].shape for b in dataset] == [(4, 3, 4)] * 2
    with pytest.warns(UserWarning, match="2 samples of a batch of 10"):
        assert np.array_equal(whole(open_data([X], FIXED)), X[:8])
    assert np.array_equal(whole(open_data([X[:8]], FIXED, limit=7)), X[:4])
    with pytest.raises(InputError, match="3 samples, but the model takes batches of exactly 4"):
        open_data(X[:3], FIXED)
    assert len(list(open_data(X, {"x": ((1, 3, 4), "float32")}))) == 10
    with pytest.raises(InputError, match=r"input 'a'.*first axes aren't samples of this model, so give whole feeds"):
        open_data({"a": X, "b": X}, {"a": ((2, 3, 4), "float32"), "b": ((4, 3, 4), "float32")})


def test_labels(tmp_path):
    np.save(tmp_path / "l.npy", np.array([3, 1, 2], np.int32))
    np.savez(tmp_path / "l.npz", np.array([[3.0], [1], [2]]))
    (tmp_path / "l.txt").write_text("3\n1\n2\n")
    for name in ("l.npy", "l.npz", "l.txt"):
        found = labels(tmp_path / name)
        assert found.tolist() == [3, 1, 2]
        assert found.dtype == np.int64
    np.save(tmp_path / "one_hot.npy", np.eye(3))
    np.save(tmp_path / "negative.npy", np.array([-1]))
    np.save(tmp_path / "half.npy", np.array([0.5]))
    np.savez(tmp_path / "two.npz", a=np.ones(2), b=np.ones(2))
    (tmp_path / "words.txt").write_text("cat\ndog\n")
    for name, message in [
        ("none.npy", "there is no labels file"),
        ("one_hot.npy", r"shape \(samples,\), got \(3, 3\)"),
        ("negative.npy", "non-negative integers"),
        ("half.npy", "non-negative integers"),
        ("two.npz", "labels are one array, this file holds a, b"),
        ("words.txt", "text with one integer a line"),
    ]:
        with pytest.raises(InputError, match=message):
            labels(tmp_path / name)


# -- images


@pytest.fixture
def pictures(tmp_path):
    image = pytest.importorskip("PIL.Image")
    (tmp_path / "more").mkdir()
    colours = {"b.png": (255, 0, 51), "a.png": (0, 102, 255), "more/c.png": (51, 51, 51)}
    for name, colour in colours.items():
        image.new("RGB", (20, 10), colour).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("not an image")
    return tmp_path


NCHW, NHWC = {"x": ((None, 3, 4, 6), "float32")}, {"x": ((None, 4, 6, 3), "float32")}


def test_image_folders(pictures):
    dataset = open_data(pictures, NCHW, batch_size=2)
    assert dataset.samples == 3
    batches = list(dataset)
    assert [b["x"].shape for b in batches] == [(2, 3, 4, 6), (1, 3, 4, 6)]
    assert batches[0]["x"][0, :, 1, 1] == pytest.approx([0, 0.4, 1])
    assert np.array_equal(whole(open_data(pictures, NHWC)), np.moveaxis(whole(dataset), 1, -1))
    assert len(whole(open_data(pictures, NCHW, limit=2))) == 2
    assert dataset.fingerprint() == open_data(pictures, NCHW, batch_size=2).fingerprint()
    assert dataset.fingerprint() != open_data(pictures, NCHW, batch_size=2, images=ImageOptions("-1..1")).fingerprint()


def test_image_options(pictures):
    first = lambda options, specs=NCHW: whole(open_data(pictures, specs, images=options))[0, :, 0, 0]
    assert first(ImageOptions("-1..1")) == pytest.approx([-1, -0.2, 1], abs=1e-6)
    assert first(ImageOptions("0..255")) == pytest.approx([0, 102, 255])
    assert first(ImageOptions("imagenet"))[1] == pytest.approx((0.4 - 0.456) / 0.224, rel=1e-5)
    assert first(ImageOptions((127, 128))) == pytest.approx([-127 / 128, -25 / 128, 1])
    assert first(ImageOptions(bgr=True)) == pytest.approx([1, 0.4, 0])
    assert first(ImageOptions(), {"x": ((None, 3, 4, 6), "uint8")}).tolist() == [0, 102, 255]
    assert whole(open_data(pictures, {"x": ((None, 1, 4, 6), "float32")})).shape == (3, 1, 4, 6)
    free = {"x": ((None, 3, None, None), "float32")}
    assert whole(open_data(pictures, free, images=ImageOptions(size=(5, 7)))).shape == (3, 3, 5, 7)
    for specs, options, message in [
        (free, None, "leaves the image size free"),
        (ONE, None, "which is not images"),
        (NCHW, ImageOptions("0..2"), "unknown image scaling '0..2'"),
        (NCHW, ImageOptions((0, 0)), "deviation must be greater than 0"),
    ]:
        with pytest.raises(InputError, match=message):
            open_data(pictures, specs, images=options)


def test_image_options_of_lists_and_arrays_are_plain_and_go_into_reports(pictures):
    from bitwright.report import Calibration

    plain = ImageOptions(((1.0, 2.0, 3.0), (4.0, 5.0, 6.0)), size=(4, 6))
    for scaling in ([[1, 2, 3], [4, 5, 6]], (np.array([1.0, 2, 3]), np.array([4.0, 5, 6], np.float32))):
        given = ImageOptions(scaling, size=[np.int64(4), 6])
        assert given == plain
        assert open_data(pictures, NCHW, images=given).samples == 3
        told = Calibration(source="", samples=3, batch_size=1, scheme="", fingerprint="", images=given)
        assert Calibration.model_validate_json(told.model_dump_json()).images == plain


def test_pictures_that_fit_in_memory_are_read_once(pictures, monkeypatch):
    from bitwright.data import _images

    image = pytest.importorskip("PIL.Image")
    opened, really = [], image.open
    monkeypatch.setattr(image, "open", lambda file: opened.append(file) or really(file))

    def passes(dataset):
        opened.clear()
        return [whole(dataset) for _ in range(3)], len(opened)

    held = open_data(pictures, NCHW, batch_size=2)
    found, times = passes(held)
    assert times == 3  # pictures
    sent = pickle.loads(pickle.dumps(held))
    assert len(pickle.dumps(held)) == len(pickle.dumps(sent))  # of workers, each reads its own
    assert passes(sent)[1] == 3
    monkeypatch.setattr(_images, "HELD_BYTES", 3 * 3 * 4 * 6 - 1)
    again, times = passes(open_data(pictures, NCHW, batch_size=2))
    assert times == 9
    assert all(np.array_equal(found[0], x) for x in (*found, *again))


def test_cropping_keeps_the_aspect_and_stretching_does_not(tmp_path):
    image = pytest.importorskip("PIL.Image")
    stripes = np.zeros((10, 30, 3), np.uint8)
    stripes[:, 10:20] = 255
    image.fromarray(stripes).save(tmp_path / "s.png")
    spec = {"x": ((None, 3, 10, 10), "float32")}
    assert whole(open_data(tmp_path, spec)).mean() == pytest.approx(1, abs=0.05)
    assert whole(open_data(tmp_path, spec, images=ImageOptions(fit="stretch"))).mean() == pytest.approx(1 / 3, abs=0.05)


def test_wrong_image_folders(pictures, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(InputError, match="holds no images"):
        open_data(empty, NCHW)
    (pictures / "more" / "d.png").write_bytes(b"not a picture")
    with pytest.raises(InputError, match=r"can't read the image .*d\.png"):
        list(open_data(pictures, NCHW))


# -- whole feeds: first axes that aren't samples

STREAM = {"frames": ((5, 1, 3), "float32"), "state": ((2, 1, 4), "float32"), "gain": ((), "float32")}
TIME = {"frames": ((None, 1, 3), "float32"), "state": ((1, 1, 4), "float32")}


def feeds_of(specs, count=4, **free):
    made = []
    for k in range(count):
        rng = np.random.default_rng(k)
        sizes = {n: [free.get(n, 1) if d is None else d for d in shape] for n, (shape, _) in specs.items()}
        made.append({n: np.asarray(rng.normal(size=s), np.float32) for n, s in sizes.items()})
    return made


def same(dataset, feeds):
    got = list(dataset)
    assert len(got) == len(feeds)
    for a, b in zip(got, feeds, strict=True):
        assert a.keys() == b.keys()
        assert all(a[n].shape == b[n].shape and np.array_equal(a[n], b[n]) for n in b)


def test_whole_feeds_in_every_form(tmp_path):
    feeds = feeds_of(STREAM)
    np.savez(tmp_path / "stacked.npz", **{n: np.stack([f[n] for f in feeds]) for n in STREAM})
    np.savez(tmp_path / "one.npz", **feeds[0])
    np.savez(
        tmp_path / "constant.npz",
        **{n: feeds[0][n] if n == "gain" else np.stack([f[n] for f in feeds]) for n in STREAM},
    )
    folder = tmp_path / "feeds"
    folder.mkdir()
    for i, feed in enumerate(feeds):
        np.savez(folder / f"{i:02d}.npz", **feed)
    prints = set()
    for source in (feeds, [tuple(f.values()) for f in feeds], lambda: iter(feeds), tmp_path / "stacked.npz", folder,
                   {n: np.stack([f[n] for f in feeds]) for n in STREAM},
                   [{n: np.stack([f[n] for f in feeds[i : i + 2]]) for n in STREAM} for i in (0, 2)]):  # fmt: skip
        dataset = open_data(source, STREAM)
        same(dataset, feeds)
        assert dataset.samples in (4, None)
        prints.add(dataset.fingerprint())
        same(open_data(source, STREAM, limit=2), feeds[:2])
        same(FirstSamples(dataset, 3), feeds[:3])
    assert len(prints) == 1
    same(open_data(tmp_path / "one.npz", STREAM), feeds[:1])
    same(open_data(tmp_path / "constant.npz", STREAM), [{**f, "gain": feeds[0]["gain"]} for f in feeds])


def test_feeds_whose_free_axes_differ_run_whole():
    """Time is free, the state's first axis is fixed: lengths that differ aren't a batch, whatever the state fixes."""
    feeds = [feeds_of(TIME, 1, frames=t)[0] for t in (7, 3, 1)]
    same(open_data(feeds, TIME), feeds)
    assert open_data(feeds, TIME).samples == 3
    same(open_data({n: np.stack([feeds[0][n]] * 2) for n in TIME}, TIME), [feeds[0]] * 2)


def test_batches_stacked_along_a_new_axis():
    same(open_data(np.stack([X[:5], X[5:]]), ONE), [{"x": X[:5]}, {"x": X[5:]}])


def test_whole_feeds_that_do_not_fit(tmp_path):
    feeds = feeds_of(STREAM)
    joined = {
        n: np.stack([f[n] for f in feeds]) if n == "gain" else np.concatenate([f[n] for f in feeds]) for n in STREAM
    }
    uneven = {n: np.stack([f[n] for f in feeds[: 3 if n == "state" else 4]]) for n in STREAM}
    bad = {**feeds[0], "state": feeds[0]["state"] * np.nan}
    short = {**feeds[1], "frames": feeds[1]["frames"][:4]}
    np.savez(tmp_path / "a.npz", **feeds[0])
    np.savez(tmp_path / "b.npz", frames=feeds[0]["frames"], gain=feeds[0]["gain"])
    for source, message in [
        (
            joined,
            r"data.*input 'frames': shape \[20, 1, 3\].*\[5, 1, 3\] \(axis 0\).*whole feeds: a list of them, a folder",
        ),
        (uneven, r"data: the arrays stack different numbers of feeds.*first axis: 'frames' 4, 'state' 3, 'gain' 4"),
        ([bad], r"batch 0, input 'state': NaN values \(8 of 8\)"),
        ([feeds[0], short], r"batch 1, input 'frames': shape \[4, 1, 3\]"),
        (tmp_path, r"b.npz: no array for input 'state'; it holds frames, gain"),
    ]:
        with pytest.raises(InputError, match=message):
            open_data(source, STREAM)
    with pytest.raises(InputError, match="'ids' 6, 'mask' 4; where axis 0 isn't samples, give whole feeds"):
        open_data({"ids": np.zeros((6, 5), np.int64), "mask": np.zeros((4, 5))}, TWO)


def test_a_tensor_of_tensorflow_goes_by_the_name_of_its_node(tmp_path):
    specs = {"x:0": ((None, 3, 4), "float32"), "m": ((None,), "float32")}
    mask = np.arange(10, dtype=np.float32)
    (tmp_path / "parts").mkdir()
    np.savez(tmp_path / "parts" / "0.npz", x=X, m=mask)
    np.savez(tmp_path / "a.npz", **{"x": X, "m:0": mask})
    forms = (
        {"x": X, "m": mask},
        {"x:0": X, "m:0": mask},
        [{"x": X, "m": mask}],
        tmp_path / "a.npz",
        tmp_path / "parts",
    )
    for form in forms:
        data = open_data(form, specs)
        np.testing.assert_array_equal(whole(data, "x:0"), X)
        np.testing.assert_array_equal(whole(data, "m"), mask)
    both = {"x:0": ((None, 3, 4), "float32"), "x": ((None,), "float32")}
    np.testing.assert_array_equal(whole(open_data({"x": mask, "x:0": X}, both), "x:0"), X)
    with pytest.raises(InputError, match="no array for input 'x:0'"):  # "x" is another tensor
        open_data({"x": mask}, both)
    with pytest.raises(InputError, match="array 'x' is not an input"):  # which of the two is meant?
        open_data({"x": X, "x:0": X, "m": mask}, specs)


# -- nested inputs

IMAGES = {"images.0": ((3, 4, 4), "float32"), "images.1": ((3, 4, 4), "float32")}
PAIR = {"q.ids": ((None, 4), "int64"), "q.mask": ((None, 4), "int64"), "k": ((None, 4), "float32")}


@pytest.mark.parametrize(
    "batch",
    [
        lambda a, b: ([a, b], [{"boxes": 1}, {"boxes": 2}]),  # as a detector's DataLoader gives it
        lambda a, b: ([a, b],),
        lambda a, b: (a, b),
        lambda a, b: {"images": [a, b]},
        lambda a, b: {"images.0": a, "images.1": b},
    ],
)
def test_a_list_of_images_is_given_as_the_model_takes_it(batch):
    a, b = np.zeros((3, 4, 4), np.float32), np.ones((3, 4, 4), np.float32)
    (found,) = open_data([batch(a, b)], IMAGES)
    assert np.array_equal(found["images.0"], a) and np.array_equal(found["images.1"], b)


def test_nested_mappings_are_batches_and_whole_data():
    ids, mask, k = np.arange(8).reshape(2, 4), np.ones((2, 4), np.int64), np.zeros((2, 4), np.float32)
    for given in (
        [{"q": {"mask": mask, "ids": ids, "other": 1}, "k": k}],
        [({"mask": mask, "ids": ids}, k, "label")],
        {"q": {"mask": mask, "ids": ids}, "k": k},
    ):
        (found,) = open_data(given, PAIR)
        assert np.array_equal(found["q.ids"], ids) and np.array_equal(found["q.mask"], mask)
    with pytest.raises(InputError, match=r"no array for input 'q.mask'"):
        open_data([{"q": {"ids": ids}, "k": k}], PAIR)


def test_names_that_only_begin_alike_are_inputs_of_their_own():
    specs = {"input.1": ((None, 2), "float32"), "input.2": ((None, 3), "float32")}
    one, two = np.zeros((1, 2), np.float32), np.zeros((1, 3), np.float32)
    (found,) = open_data([(one, two)], specs)
    assert found["input.2"].shape == (1, 3)
    (found,) = open_data([([[0.0, 1.0]], two)], specs)
    assert np.array_equal(found["input.1"], [[0.0, 1.0]])


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("white.png", lambda i: i.new("L", (9000, 9000)), "unpack to 9,000 x 9,000 pixels"),
        ("line.png", lambda i: i.new("L", (60_000, 1)), "too narrow to be cropped"),
        ("claim.ppm", lambda i: b"P6\n100000 100000\n255\n" + bytes(100), "can't read the image"),
    ],
)
def test_small_pictures_that_stand_for_enormous_ones(tmp_path, name, make, message):
    image = pytest.importorskip("PIL.Image")
    made = make(image)
    if isinstance(made, bytes):
        (tmp_path / name).write_bytes(made)
    else:
        made.save(tmp_path / name)
    with pytest.raises(InputError, match=message):
        list(open_data(tmp_path, {"x": ((None, 3, 512, 512), "float32")}))


def test_each_batch_is_noted_once_though_a_pass_is_given_up():
    """As where stages can't be run: what was seen of some batches isn't what the data are."""
    data = [{"x": np.full(3, v, np.float32)} for v in (0.0, 1.0, 2.0)]
    watched = Watching(ArrayDataset({"x": np.stack([d["x"] for d in data])}, 1))
    for _ in zip(range(2), watched, strict=False):
        pass
    for _ in range(2):
        assert len(list(watched)) == 3
    assert (watched.seen["x"].low, watched.seen["x"].high, watched.seen["x"].count) == (0, 2, 9)
