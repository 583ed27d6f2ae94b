"""Data by the user's own forward pass: a function that runs the model, and what it fed to the model meanwhile.

The function is called once, on the float model. Its feeds are recorded and gone through as data are, as often as is
needed: a function that shuffles, draws or reads from a stream would give other values in a second pass. They are held
in memory up to `HELD_BYTES`; the rest lies in temporary files, for as long as the recording does.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from bitwright.backend import Backend, Batch, array_of, observed
from bitwright.errors import InputError
from bitwright.files import Array, Scratch, cannot_write, read_npz

HELD_BYTES = 256 * 2**20
"""Bytes of recorded feeds that stay in memory."""

ForwardPass = Callable[[Any], object]
"""Runs the model that it is given on data of its own; what it returns isn't looked at."""


def is_forward_pass(source: object) -> TypeGuard[ForwardPass]:
    """Whether something is a function of one argument, the model: functions without arguments return data."""
    return callable(source) and not hasattr(source, "__iter__") and needed_arguments(source) == 1


def needed_arguments(function: Callable[..., object]) -> int:
    """How many arguments a function can't be called without."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # written in C, say
        return 0
    return sum(p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters)


def recorded(backend: Backend[Any], model: object, run: ForwardPass) -> Recording:
    """What a function feeds to a model that it is called with once.

    Raises:
        InputError: it never ran the model, or fed what isn't numeric.
    """
    recording = Recording()
    try:
        run(observed(backend, model, recording.add))
    except BaseException:  # whoever keeps the error keeps the recording too
        recording.close()
        raise
    if not len(recording):
        raise InputError(
            f"the forward pass {getattr(run, '__name__', run)!r} never ran the model that it was called with, so there "
            "is nothing to calibrate on; it must run its argument, not another model"
        )
    return recording


class Recording:
    """What a model was fed, call by call; re-iterable."""

    def __init__(self) -> None:
        self._feeds: list[Batch | Path] = []
        self._held = 0
        self._folder: Scratch | None = None

    def add(self, feed: Batch) -> None:
        """Keep copies of the inputs of one call, as arrays by input name.

        Raises:
            InputError: they aren't numeric.
            WriteError: the disk is full.
        """
        where = f"call {len(self._feeds)} of the model"
        arrays = {name: np.array(array_of(value, f"{where}, input {name!r}")) for name, value in feed.items()}
        self._held += (size := sum(a.nbytes for a in arrays.values()))
        if self._held <= HELD_BYTES or any(a.dtype.kind not in "biuf" for a in arrays.values()):
            self._feeds.append(arrays)
            return
        self._held -= size
        if self._folder is None:
            self._folder = Scratch()
        path = self._folder.path / f"{len(self._feeds)}.npz"
        # Numbered, as a name such as "file" or "x/y" isn't what np.savez takes; the names come first.
        numbered: dict[str, Any] = {str(i): a for i, a in enumerate(arrays.values())}
        try:
            np.savez(path, names=np.array(list(arrays)), **numbered)
        except OSError as error:
            raise cannot_write(path, error) from error
        self._feeds.append(path)

    def close(self) -> None:
        """Let it go, and the temporary files with it."""
        self._feeds = []
        folder, self._folder = self._folder, None
        if folder is not None:
            folder.close()

    def __len__(self) -> int:
        return len(self._feeds)

    def __iter__(self) -> Iterator[Batch]:
        for feed in self._feeds:
            yield _read(feed) if isinstance(feed, Path) else feed


def _read(path: Path) -> dict[str, Array]:
    held = read_npz(path)
    return {str(name): held[str(i)] for i, name in enumerate(held["names"])}
