"""Small .keras and .h5 files that stand for something enormous are refused at once, and cost no memory."""

from __future__ import annotations

import io
import json
import re
import shutil
import sys
import time
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest

keras = pytest.importorskip("keras")
h5py = pytest.importorskip("h5py")

from bitwright.errors import InputError, ModelError  # noqa: E402
from bitwright_keras.backend import KerasBackend  # noqa: E402
from bitwright_keras.capture import hdf5, trial_reading  # noqa: E402
from bitwright_keras.capture.comparing import CaptureNotice  # noqa: E402
from bitwright_keras.capture.files import load_native  # noqa: E402
from bitwright_keras.capture.normalize import normalize  # noqa: E402

BACKEND = KerasBackend()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    x = keras.Input((6, 6, 3), name="x")
    y = keras.layers.Dense(5, name="head")(keras.layers.Conv2D(4, 3, name="conv")(x))
    for suffix in (".keras", ".h5"):
        keras.Model(x, y).save(folder / f"model{suffix}")
    return folder


def _config(source, path, change):
    """A copy of a file with another description of its network."""
    if path.suffix == ".h5":
        shutil.copy(source, path)
        with h5py.File(path, "r+") as file:
            config = json.loads(file.attrs["model_config"])
            change({layer["config"]["name"]: layer["config"] for layer in config["config"]["layers"]})
            file.attrs["model_config"] = json.dumps(config)
        return path

    def changed(name, data):
        if name != "config.json":
            return data
        config = json.loads(data)
        change({layer["config"]["name"]: layer["config"] for layer in config["config"]["layers"]})
        return json.dumps(config)

    return _packed(source, path, changed)


def _packed(source, path, change, extra=(), method=zipfile.ZIP_STORED):
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(path, "w", method) as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))
        for name, data in extra:
            new.writestr(name, data)
    return path


@pytest.mark.parametrize("suffix", [".keras", ".h5"])
@pytest.mark.parametrize("layer", ["head", "conv"])
def test_layers_have_no_more_weights_than_the_file(files, tmp_path, layer, suffix):
    def change(layers):
        layers[layer]["units" if layer == "head" else "filters"] = 10**8

    path = _config(files / f"model{suffix}", tmp_path / f"bomb{suffix}", change)
    started = time.process_time()
    with pytest.raises(InputError, match="MiB of weights, and the file holds 0"):
        BACKEND.load(path)
    assert time.process_time() - started < 2


@pytest.mark.parametrize("member", ["config.json", "metadata.json", "model.weights.h5", "bitwright.json", "assets/a"])
def test_archives_that_unpack_to_far_more(files, tmp_path, member):
    padded = lambda name, data: data + b" " * 2**26 if name == member else data
    extra = () if member in ("config.json", "metadata.json", "model.weights.h5") else [(member, b"{}" + b" " * 2**26)]
    path = _packed(files / "model.keras", tmp_path / "bomb.keras", padded, extra, zipfile.ZIP_DEFLATED)
    with pytest.raises(InputError, match="unpack"):
        BACKEND.load(path)


@pytest.mark.parametrize("suffix", [".keras", ".h5"])
def test_weights_that_unpack_to_far_more(files, tmp_path, suffix):
    """Pieces of a data set that nobody has written take no place."""

    def enlarge(file):
        found: list[str] = []
        file.visititems(lambda name, item: found.append(name) if isinstance(item, h5py.Dataset) else None)
        for name in found[:1]:
            del file[name]
            file.create_dataset(name, shape=(10**4, 10**4), dtype="f4", chunks=(100, 100), compression="gzip")

    path = tmp_path / f"bomb{suffix}"
    if suffix == ".h5":
        shutil.copy(files / "model.h5", path)
        with h5py.File(path, "r+") as file:
            enlarge(file)
    else:

        def change(name, data):
            if name != "model.weights.h5":
                return data
            buffer = io.BytesIO(data)
            with h5py.File(buffer, "r+") as file:
                enlarge(file)
            return buffer.getvalue()

        _packed(files / "model.keras", path, change)
    with pytest.raises(InputError, match="unpack to 381 MiB"):
        BACKEND.load(path)


def test_compressed_archives_open_as_others_do(files, tmp_path):
    path = _packed(files / "model.keras", tmp_path / "packed.keras", lambda _, data: data, (), zipfile.ZIP_DEFLATED)
    assert BACKEND.graph(BACKEND.load(path)).outputs == BACKEND.graph(BACKEND.load(files / "model.keras")).outputs


def test_enormous_inputs_are_not_made_up(files, tmp_path):
    def change(layers):
        layers["x"]["batch_shape"] = [None, 10**5, 10**5, 3]

    path = _config(files / "model.keras", tmp_path / "bomb.keras", change)
    with pytest.warns(CaptureNotice, match="too large to be run on made-up numbers"):
        BACKEND.load(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        BACKEND.load(files / "model.keras")


def test_models_in_models_are_not_written_out_without_end():
    def nested(depth, calls):
        x = keras.Input((4,))
        model = keras.Model(x, keras.layers.ReLU()(x))
        for _ in range(depth):
            x = y = keras.Input((4,))
            for _ in range(calls):
                y = model(y)
            model = keras.Model(x, y)
        return model

    assert len(normalize(nested(3, 3)).nodes) == 27
    # A video's frames through one network: fifty times as many calls as are stated, and no bomb.
    frames = keras.Input((4,))
    y = cell = keras.Input((4,))
    for _ in range(100):
        y = keras.layers.ReLU()(y)
    once = keras.Model(cell, y)
    x = frames
    for _ in range(50):
        x = once(x)
    assert len(normalize(keras.Model(frames, x)).nodes) == 5_000
    with pytest.raises(ModelError, match="2,850 calls"):
        normalize(nested(4, 6))


def test_heaps_whose_objects_have_no_size_are_refused(tmp_path):
    """The HDF5 library would go from such an object to itself for ever."""
    path = tmp_path / "a.h5"
    keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)]).save(path)
    assert load_native(path).count_params() == 15
    content = bytearray(path.read_bytes())
    heap = at = content.index(b"GCOL\1\0\0\0")
    end = heap + int.from_bytes(content[heap + 8 : heap + 16], "little")
    at += 16
    while content[at : at + 2] != b"\0\0":  # to the space that is left
        at += 16 + -(-int.from_bytes(content[at + 8 : at + 16], "little") // 8) * 8
    assert at + 16 <= end
    content[at + 8 : at + 16] = bytes(8)
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"a\.h5 can't be opened: its texts are damaged"):
        load_native(path)


def _references(content):
    """Where the references to texts in global heaps begin: a text's length, then its heap's address and an index."""
    for heap in re.finditer(re.escape(b"GCOL\1\0\0\0"), content):
        for found in re.finditer(re.escape(heap.start().to_bytes(8, "little")), content):
            if 0 < int.from_bytes(content[found.start() - 4 : found.start()], "little") < 2**12:
                yield found.start() - 4


def _peak(process, begin=False):
    """MiB of a process: the most since `begin`."""
    if begin:
        Path(f"/proc/{process}/clear_refs").write_text("5")
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


@pytest.mark.skipif(sys.platform != "linux", reason="only there the other process has a limit of memory")
@pytest.mark.parametrize("length", [2**28, 2**31 - 1, 2**32 - 1])
@pytest.mark.parametrize("place", ["attribute", "values"])
def test_texts_of_an_enormous_length_take_no_memory(tmp_path, place, length):
    """The HDF5 library takes as much as a reference to a text says, before it looks how long the text is."""
    path = tmp_path / "a.h5"
    keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)]).save(path)
    if place == "values":
        with h5py.File(path, "r+") as file:
            file.create_dataset("bitwright", data="{}" + " " * 9)
    assert load_native(path).count_params() == 15
    content = bytearray(path.read_bytes())
    at = max(
        a for a in _references(content) if (int.from_bytes(content[a : a + 4], "little") == 11) == (place == "values")
    )
    content[at : at + 4] = length.to_bytes(4, "little")
    path.write_bytes(content)
    other = trial_reading._READER._child.pid
    held, began = [_peak(process, begin=True) for process in ("self", other)], time.process_time()
    with pytest.raises(InputError, match="reading it takes far more memory than it has bytes"):
        load_native(path)
    assert time.process_time() - began < 2
    assert trial_reading._READER._child.pid == other
    for process, before in zip(("self", other), held, strict=True):
        assert _peak(process) - before < 200


def test_what_the_other_process_cannot_open_is_not_opened(files, tmp_path):
    """It may be for want of memory, and Keras would have more of it."""
    content = bytearray((files / "model.h5").read_bytes())
    root = int.from_bytes(content[64:72], "little")
    content[root + 8 : root + 12] = (2**28).to_bytes(4, "little")  # the size of its header
    path = tmp_path / "model.h5"
    path.write_bytes(content)
    with pytest.raises(InputError, match="the HDF5 library can't open it"):
        load_native(path)


@pytest.mark.skipif(sys.platform != "linux", reason="memory full of garbage is glibc's")
def test_links_over_which_the_library_frees_what_it_never_set_are_refused(tmp_path):
    """Whether that ends a process depends on what its memory held before."""
    path, copied = tmp_path / "a.h5", tmp_path / "b.h5"
    keras.Sequential([keras.Input((4,)), *(keras.layers.Dense(3, name=f"d{i}") for i in range(12))]).save(path)
    with h5py.File(path) as file, h5py.File(copied, "w", libver="latest") as made:
        made.attrs.update(file.attrs)
        weights = made.create_group("model_weights")
        weights.attrs.update(file["model_weights"].attrs)
        for name in file["model_weights"]:
            file.copy(f"model_weights/{name}", weights)
    assert load_native(copied).count_params() == 15 + 11 * 12
    content = bytearray(copied.read_bytes())
    content[content.index(b"BTLF") + 20] ^= 255  # a leaf of the tree that the group's links are in
    copied.write_bytes(content)
    for _ in range(3):
        with pytest.raises(InputError, match="the HDF5 library crashes over it"):
            load_native(copied)


@pytest.mark.parametrize("suffix", [".keras", ".h5"])
def test_weights_that_take_as_much_as_is_let_through_are_read(tmp_path, suffix):
    """As one piece, packed to a twentieth: the most that values may unpack to, and all memory that this takes."""
    x = keras.Input((2000,))
    keras.Model(x, keras.layers.Dense(4_000, use_bias=False, name="d", kernel_initializer="zeros")(x)).save(
        tmp_path / f"a{suffix}"
    )

    def packed(file):
        parent = next(g for g in _groups(file) for n in ("kernel", "0") if n in g and isinstance(g[n], h5py.Dataset))
        name = next(n for n in ("kernel", "0") if n in parent)
        values = parent[name][()]
        values.ravel()[: values.size // 16] = np.random.default_rng(0).normal(size=values.size // 16)
        del parent[name]
        parent.create_dataset(name, data=values, chunks=values.shape, compression="gzip", shuffle=True, fletcher32=True)

    if suffix == ".h5":
        with h5py.File(tmp_path / "a.h5", "r+") as file, h5py.File(tmp_path / "b.h5", "w") as made:
            packed(file)
            for name in file:
                file.copy(name, made)
            made.attrs.update(file.attrs)
    else:

        def change(name, data):
            if name != "model.weights.h5":
                return data
            buffer, small = io.BytesIO(data), io.BytesIO()
            with h5py.File(buffer, "r+") as file, h5py.File(small, "w") as made:
                packed(file)
                for inner in file:
                    file.copy(inner, made)
                made.attrs.update(file.attrs)
            return small.getvalue()

        _packed(tmp_path / "a.keras", tmp_path / "b.keras", change)
    path = tmp_path / f"b{suffix}"
    assert 32e6 / 20 < path.stat().st_size < 32e6 / 15
    assert load_native(path).count_params() == 8_000_000


def _external(file):
    head = next(name for name in ("head", "model_weights/head") if name in file)
    file[head]["elsewhere"] = h5py.ExternalLink("other.h5", "/weights")


def _outside(file):
    file.create_dataset("outside", shape=(4,), dtype="float32", external=[("/etc/hostname", 0, 16)])


@pytest.mark.parametrize("change", [_external, _outside])
def test_values_that_lie_in_other_files_are_refused(files, tmp_path, change):
    path = shutil.copy(files / "model.h5", tmp_path / "model.h5")
    with h5py.File(path, "r+") as file:
        change(file)
    with pytest.raises(InputError, match=r"lies? in (an)?other file"):
        load_native(path)


@pytest.mark.parametrize(
    ("own", "kept"),
    [
        (None, []),
        ("", []),
        ("glibc.malloc.arena_max=1", ["glibc.malloc.arena_max=1"]),
        ("a=1:damaged:b=2", ["a=1", "b=2"]),
    ],
)
def test_the_other_process_keeps_the_user_s_settings_of_glibc(own, kept):
    environment = trial_reading._environment({"HOME": "h", **({} if own is None else {"GLIBC_TUNABLES": own})})
    assert environment["GLIBC_TUNABLES"].split(":") == [*kept, *trial_reading._GARBAGE.split(":")]
    assert environment["HOME"] == "h"


@pytest.mark.parametrize("end", ["crash", "never", "chatter"])
def test_a_file_over_which_the_library_crashes_or_never_ends_costs_another_process(files, monkeypatch, tmp_path, end):
    program = tmp_path / "reading.py"
    ends = {"crash": "os.abort()", "never": "time.sleep(600)", "chatter": "print('not an answer', flush=True)"}
    program.write_text(f"import os, sys, time\nsys.stdin.readline()\n{ends[end]}\n")
    monkeypatch.setattr(trial_reading, "_READER", trial_reading._Reader())
    monkeypatch.setattr(trial_reading, "_SECONDS", 0.5)
    with monkeypatch.context() as patch:
        patch.setattr(trial_reading.hdf5, "__file__", str(program))
        for suffix in (".keras", ".h5"):
            with pytest.raises(InputError, match="crashes over it or doesn't end"):
                load_native(files / f"model{suffix}")
    monkeypatch.setattr(trial_reading, "_SECONDS", 20.0)
    assert load_native(files / "model.h5").count_params()  # by another process


@pytest.mark.parametrize("suffix", [".keras", ".h5"])
def test_settings_that_no_op_can_have_are_refused_before_tensorflow_ends_the_process_over_them(files, tmp_path, suffix):
    def change(layers):
        layers["conv"]["strides"] = [1, 2**31]

    path = _config(files / f"model{suffix}", tmp_path / f"model{suffix}", change)
    with pytest.raises(InputError, match="'strides' of 'conv' is 2147483648"):
        load_native(path)

    def seed(layers):
        layers["conv"]["kernel_initializer"]["config"]["seed"] = 2**40

    assert load_native(_config(files / f"model{suffix}", tmp_path / f"seeded{suffix}", seed)).count_params()


def test_a_piece_that_is_larger_than_its_data_set_counts_as_what_it_unpacks_to(files, tmp_path):
    path = shutil.copy(files / "model.h5", tmp_path / "model.h5")
    with h5py.File(path, "r+") as file:
        parent = next(g for g in _groups(file) if "bias" in g)
        values = parent["bias"][()]
        del parent["bias"]
        made = parent.create_dataset("bias", values.shape, "f4", maxshape=(None,), chunks=(2**24,), compression="gzip")
        made[...] = values
    with pytest.raises(InputError, match="unpack to 64 MiB"):
        load_native(path)


def _groups(file):
    found = [file]
    file.visititems(lambda _, item: found.append(item) if isinstance(item, h5py.Group) else None)
    return found


@pytest.mark.parametrize("damaged", ["values", "group"])
def test_what_cannot_be_read_and_keras_does_not_read_hides_nothing(tmp_path, damaged):
    """The weights beside it are counted, and what comes behind it is tried too."""
    path = tmp_path / "model.h5"
    x = keras.Input((6,))
    keras.Model(x, keras.layers.Dense(800_000)(x)).save(path)  # more than a file without weights may ask for
    with h5py.File(path, "r+") as file:
        made = file.create_dataset("a", (100,), "f4", chunks=(100,), compression="gzip")
        made[...] = 1
        place = made.id.get_chunk_info(0).byte_offset
        if damaged == "group":
            place = h5py.h5o.get_info(file.create_group("b").id).addr
    content = bytearray(path.read_bytes())
    content[place : place + 8] = b"\xff" * 8
    path.write_bytes(content)
    assert load_native(path).count_params() == 5_600_000
    with h5py.File(path, "r+") as file:
        file["z"] = h5py.ExternalLink("other.h5", "/weights")
    with pytest.raises(InputError, match="'z' lies in another file"):
        load_native(path)


@pytest.mark.parametrize("asked", ["place", "values"])
def test_an_object_that_is_opened_and_says_nothing_of_itself_is_refused(tmp_path, monkeypatch, asked):
    """Where the walk ends there may be links to other files, and weights of any size."""
    path = tmp_path / "model.h5"
    x = keras.Input((6,))
    keras.Model(x, keras.layers.Dense(4, name="d")(x)).save(path)
    if asked == "place":
        true = h5py.h5o.get_info

        def get_info(id):
            if h5py.h5i.get_name(id).endswith(b"kernel"):
                raise RuntimeError("Unable to get object info")
            return true(id)

        monkeypatch.setattr(h5py.h5o, "get_info", get_info)
    else:

        def broken(self):
            raise RuntimeError("Unable to get external count")

        monkeypatch.setattr(h5py.Dataset, "external", property(broken))
    with pytest.raises(hdf5.Refused, match="is damaged: Unable to get"):
        hdf5.weight_bytes(path, 1 << 20)
