"""Plugins as they were met, and calling what is theirs so that whatever it does is put down to them."""

from __future__ import annotations

import signal
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType, TracebackType
from typing import Any, Literal

from bitwright.errors import BitwrightError, PluginError

State = Literal["ok", "missing framework", "partial", "failed", "blocked"]


class PluginWarning(UserWarning):
    """A plugin, or an item of one, couldn't be used and was left out."""


@dataclass(frozen=True)
class Fault:
    """What is wrong with a plugin or with one of its items.

    Attributes:
        item: such as "technique 'acme'"; empty where it is the whole plugin.
        reason: why, and the way out.
        traceback: where there was an exception.
    """

    item: str
    reason: str
    traceback: str = ""

    def __str__(self) -> str:
        return f"{self.item}: {self.reason}" if self.item else self.reason


@dataclass(eq=False)
class Owner:
    """A plugin: where it comes from and how loading it went.

    Attributes:
        name: entry-point name, or module of a built-in plugin.
        distribution, version: what was installed.
        package: the top-level package of its module.
        builtin: it ships with bitwright, and is read before all others.
        blocked: why it isn't loaded; empty if it is.
        faults: of it and of its items.
    """

    name: str
    distribution: str
    version: str
    package: str = ""
    builtin: bool = False
    blocked: str = ""
    faults: list[Fault] = field(default_factory=list)

    @property
    def title(self) -> str:
        """Plugin, distribution and version, for messages."""
        where = f"{self.distribution} {self.version}".strip()
        return f"plugin {self.name!r}" + (f" ({where})" if where else "")

    def add_fault(self, fault: Fault) -> bool:
        """Remember a fault; whether it is a new one."""
        if any((f.item, f.reason) == (fault.item, fault.reason) for f in self.faults):
            return False
        self.faults.append(fault)
        return True


@dataclass(frozen=True)
class PluginStatus:
    """One line of `bitwright plugins`.

    Attributes:
        name: entry-point name, or module of a built-in plugin.
        distribution, version: what was installed.
        state: "ok", "missing framework", "partial" (some of its items can't be used), "failed" (nothing of it can) or
            "blocked" (by BITWRIGHT_PLUGINS).
        reason: why it isn't ok, and the way out.
        backends, techniques, tools: names of what it provides and can be used.
        traceback: of the first failure that was an exception.
        faults: one for each item that can't be used, or for the plugin as a whole.
        targets, runtimes, schemas, formats, toolchains: as backends.
    """

    name: str
    distribution: str
    version: str
    state: State
    reason: str
    backends: tuple[str, ...]
    techniques: tuple[str, ...]
    tools: tuple[str, ...] = ()
    traceback: str = ""
    faults: tuple[str, ...] = ()
    targets: tuple[str, ...] = ()
    runtimes: tuple[str, ...] = ()
    schemas: tuple[str, ...] = ()
    formats: tuple[str, ...] = ()
    toolchains: tuple[str, ...] = ()


@contextmanager
def blamed(owner: Owner, item: str = "", *, builtin_too: bool = False) -> Iterator[None]:
    """Run a plugin's code; what it raises, `SystemExit` included, becomes an error that names the plugin.

    Errors of bitwright's own pass, and so does Ctrl-C (or SIGTERM, which the command line turns into it). What ships
    with bitwright is no third party: its exceptions pass too.

    Args:
        owner: whose code it is.
        item: what is asked of it, such as "technique 'acme'"; empty for the whole plugin.
        builtin_too: what ships with bitwright is treated alike.

    Raises:
        PluginError: whatever else was raised; the fault is added to the owner's.
    """
    with _signals() as stopped:
        try:
            yield
        except BitwrightError:
            raise
        except BaseException as error:
            if (owner.builtin and not builtin_too) or (isinstance(error, KeyboardInterrupt) and stopped):
                raise
            reason = described(error)
            owner.add_fault(Fault(item, reason, traceback.format_exc()))
            raise PluginError(f"{item + ' of ' if item else ''}{owner.title} can't be used: {reason}") from error


def described(error: BaseException) -> str:
    """An exception in a line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Tell a KeyboardInterrupt that a signal brought about from one that a plugin raises by itself.

    Yields:
        A list that holds the signals that came.
    """
    came: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield came
        return
    before: dict[int, Any] = {}

    def note(number: int, frame: FrameType | None) -> None:
        came.append(number)
        before[number](number, frame)

    for number in (signal.SIGINT, signal.SIGTERM):
        if callable(handler := signal.getsignal(number)):
            before[number] = handler
            signal.signal(number, note)
    try:
        yield came
    finally:
        for kind, handler in before.items():
            if signal.getsignal(kind) is note:  # the plugin may have set one of its own
                signal.signal(kind, handler)


def culprits(trace: TracebackType | None, owners: list[Owner]) -> list[Owner]:
    """The third-party plugins whose code stands in a traceback, the innermost first."""
    packages = {o.package: o for o in owners if o.package and not o.builtin}
    found: list[Owner] = []
    while trace is not None:
        owner = packages.get(str(trace.tb_frame.f_globals.get("__name__", "")).partition(".")[0])
        if owner is not None:
            found = [owner, *(o for o in found if o is not owner)]
        trace = trace.tb_next
    return found
