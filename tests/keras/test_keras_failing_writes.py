"""Writes that fail while a model is saved: one typed error, whichever of HDF5's calls it was, and no file."""

from __future__ import annotations

import signal

import pytest

keras = pytest.importorskip("keras")
resource = pytest.importorskip("resource")

from bitwright.errors import WriteError  # noqa: E402
from bitwright_keras.capture.files import save_native  # noqa: E402
from bitwright_keras.capture.h5_writing import write_hdf5  # noqa: E402


@pytest.fixture(scope="module")
def model():
    keras.utils.set_random_seed(0)
    x = keras.Input((6, 6, 3), name="x")
    return keras.Model(x, keras.layers.Dense(5, name="head")(keras.layers.Conv2D(4, 3, name="conv")(x)))


@pytest.fixture
def longest():
    """Sets how long files may become; writes beyond fail with EFBIG."""
    before, ignored = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, ignored)


@pytest.mark.parametrize("suffix", [".h5", ".keras"])
def test_each_size_at_which_a_file_may_end(tmp_path, model, longest, suffix, capfd):
    names = {"conv": {"op": "conv/1", "outputs": ["y"], "params": {}}}
    whole = save_native(model, tmp_path / f"whole{suffix}", names).stat().st_size
    for size in range(0, whole, max(whole // 40, 1)):
        longest(size)
        with pytest.raises(WriteError, match="File too large"):
            save_native(model, tmp_path / f"net{suffix}", names)
        longest(resource.RLIM_INFINITY)
        assert [path.name for path in tmp_path.iterdir()] == [f"whole{suffix}"]
    assert not capfd.readouterr().err


def test_other_errors_stay_what_they_are(tmp_path):
    def fill(file):
        file.create_group("one")
        file.create_group("one")

    with pytest.raises(ValueError, match="name already exists"):
        write_hdf5(tmp_path / "net.h5", fill)
