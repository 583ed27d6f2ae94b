"""Every error that bitwright raises on purpose: each names the object, the reason and the way out."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class BitwrightError(Exception):
    """Base of all deliberate errors; the command line prints them as one line and exits with 2."""


class InputError(BitwrightError, ValueError):
    """Data, files or arguments that can't be used: wrong shape, NaN, empty, corrupt, unknown name."""


class WriteError(InputError):
    """What can't be written: a full disk, a failing one, no permission. It says nothing of the model."""


class ModelError(BitwrightError):
    """A model that can't be opened, captured or rewritten as asked."""


class TargetError(BitwrightError, ValueError):
    """A target configuration that breaks the schema; names the file and the key."""


class EncodingError(BitwrightError, ValueError):
    """An encoding, or an encodings file, that is invalid or doesn't fit the model."""


class PluginError(BitwrightError):
    """A backend or technique that is unknown, broken or registered twice."""


class MissingExtraError(PluginError, ImportError):
    """A framework that isn't installed; the message holds the `pip install` line."""


class CapabilityError(BitwrightError):
    """A technique asks for what the backend can't do; the message names an alternative."""


class WorkerError(BitwrightError):
    """Workers that are gone, or a task that brings them down; what was finished before is kept."""


class CheckFailed(BitwrightError):
    """A check ran to its end and its answer is no; the command line exits with 1."""


def unknown_name(name: str, known: Iterable[str], *, listed: bool = True) -> str:
    """The end of a message about a name that isn't known: the nearest one, or all of them."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, 1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return hint + (f" (known: {', '.join(names)})" if listed else "")


def first_line(error: BaseException, most: int = 300) -> str:
    """What another library's error says, in one line of at most `most` characters; its class where it says nothing."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:most]


@contextmanager
def needs_extra(what: str, extra: str) -> Iterator[None]:
    """Imports inside that fail say what to install: 'QDQ files need onnx: pip install "bitwright[onnx]"'.

    Args:
        what: needs them, with the verb.
        extra: of bitwright, that brings them.

    Raises:
        MissingExtraError: a module isn't installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise MissingExtraError(f'{what} {error.name}: pip install "bitwright[{extra}]"') from error
