"""Reads what a target's tools have dumped: folders of raw files a sample, or arrays."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitwright.errors import InputError
from bitwright.files import read_npy, read_npz
from bitwright.grids import Grid, dequantize
from bitwright_deploy.layer_outputs import INDEX, Dump, Stored

RAW = (".raw", ".bin")
_NUMBERED = re.compile(r"(?:Result|layer_outputs|sample|output|outputs|input)?[_-]?(\d+)", re.IGNORECASE)

Reader = Callable[[Stored], NDArray[np.float32]]
"""Values of one tensor of one sample, flat, in the file's order."""


@dataclass(frozen=True)
class TargetDump:
    """A target's tensors.

    Attributes:
        samples: sample → tensor name → how to read it.
    """

    samples: Mapping[int, Mapping[str, Reader]]

    @property
    def names(self) -> tuple[str, ...]:
        """Every tensor name that some sample has."""
        return tuple(dict.fromkeys(n for tensors in self.samples.values() for n in tensors))

    @classmethod
    def open(cls, path: str | Path) -> TargetDump:
        """Find the tensors in a folder or file.

        Known forms: what `layer_outputs` writes; a folder for each sample (``Result_0``, as snpe-net-run and
        qnn-net-run write them, ``layer_outputs_0``, ``sample_0``, ``0``) with .raw, .bin or .npy files at any depth;
        such files without folders, for one sample; .npz or .npy files of arrays whose first axis is samples.

        Raises:
            InputError: nothing of that is there.
        """
        path = Path(path)
        if not path.exists():
            raise InputError(f"there is no file or folder {str(path)!r}")
        if path.is_file():
            return cls(_from_arrays(path))
        if (path / INDEX).is_file():
            return cls(_from_dump(Dump.open(path)))
        root = path / "outputs" if (path / "outputs").is_dir() else path
        numbered = {
            int(m[1]): folder
            for folder in sorted(root.iterdir())
            if folder.is_dir() and (m := _NUMBERED.fullmatch(folder.name))
        }
        samples = {k: found for k, folder in sorted(numbered.items()) if (found := _from_folder(folder))}
        if not samples and (found := _from_folder(root)):
            samples = {0: found}
        if not samples:
            archives = [p for p in sorted(path.iterdir()) if p.suffix in (".npz", ".npy")]
            if len(archives) == 1:
                return cls(_from_arrays(archives[0]))
            raise InputError(
                f"{path} holds no tensors: give a folder with Result_0/*.raw and so on, one of .raw files, or a .npz"
            )
        return cls(samples)


def _from_dump(dump: Dump) -> dict[int, dict[str, Reader]]:
    def reader(tensor: str, sample: int) -> Reader:
        return lambda _: dump.read(tensor, sample).reshape(-1)

    return {k: {t: reader(t, k) for t in dump.index.tensors} for k in range(dump.index.samples)}


def _from_folder(folder: Path) -> dict[str, Reader]:
    found: dict[str, Reader] = {}
    for file in sorted(p for p in folder.rglob("*") if p.suffix in (*RAW, ".npy") and p.is_file()):
        # Tensor names with slashes become folders; the whole path below the sample is the name.
        found[file.relative_to(folder).with_suffix("").as_posix()] = _file_reader(file)
    return found


def _file_reader(file: Path) -> Reader:
    def read(stored: Stored) -> NDArray[np.float32]:
        if file.suffix == ".npy":
            return np.asarray(read_npy(file), np.float32).reshape(-1)
        return decode(file.read_bytes(), stored, str(file), native=file.stem.endswith("_native"))

    return read


def _from_arrays(path: Path) -> dict[int, dict[str, Reader]]:
    if path.suffix not in (".npz", ".npy"):
        raise InputError(f"{path}: a dump is a folder, a .npz or a .npy")
    arrays: Mapping[str, NDArray[Any]] = read_npz(path) if path.suffix == ".npz" else {path.stem: read_npy(path)}
    lengths = {len(a) for a in arrays.values() if a.ndim}
    if not arrays or len(lengths) != 1:
        raise InputError(
            f"{path}: arrays of a dump have samples as their first axis, as many in each; got {sorted(lengths)}"
        )

    def reader(values: NDArray[Any]) -> Reader:
        return lambda _: np.asarray(values, np.float32).reshape(-1)

    return {k: {name: reader(values[k]) for name, values in arrays.items()} for k in range(lengths.pop())}


def decode(data: bytes, stored: Stored, where: str, *, native: bool = False) -> NDArray[np.float32]:
    """The values of a raw file: float32, float16, or codes of the tensor's grid, told apart by the size.

    Args:
        data: the file's contents.
        stored: the tensor that it is to be.
        where: the file, for messages.
        native: its name says that it holds the target's own type, so two bytes a value are codes of a 16-bit grid.

    Raises:
        InputError: the size fits none of them, or codes belong to a tensor without a grid.
    """
    count = int(np.prod(stored.shape))
    width, rest = divmod(len(data), max(count, 1))
    if rest or width not in (1, 2, 4):
        raise InputError(
            f"{where} has {len(data)} bytes; {count} values of {stored.file!r} are expected, of 4, 2 or 1 bytes"
        )
    if width == 4:
        return np.frombuffer(data, np.float32)
    if width == 2 and not (native and stored.bits == 16):
        return np.frombuffer(data, np.float16).astype(np.float32)
    if stored.scale is None or stored.zero_point is None or stored.bits is None:
        raise InputError(f"{where} holds integer codes, but {stored.file!r} has no grid to read them by")
    codes = np.frombuffer(data, f"{'i' if stored.signed else 'u'}{width}").astype(np.int32)
    grid = Grid.of(stored.bits, signed=stored.signed)
    if codes.size and (codes.min() < grid.qmin or codes.max() > grid.qmax):
        raise InputError(f"{where} holds codes beyond {grid.qmin}..{grid.qmax}, the grid of {stored.file!r}")
    return dequantize(codes, np.float32(stored.scale), np.int32(stored.zero_point))  # type: ignore[arg-type]


def common(reference: Iterable[int], target: Iterable[int]) -> list[int]:
    """Samples that both have.

    Raises:
        InputError: none.
    """
    shared = sorted(set(reference) & set(target))
    if not shared:
        raise InputError("the two dumps have no sample in common; samples go by the number in their folders' names")
    return shared
