"""The command line. Exit status: 0 done, 1 a check failed, 2 bad usage or input (one line says what), 130 stopped by
Ctrl-C, 143 by SIGTERM."""

from __future__ import annotations

import errno
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

DONE, CHECK_FAILED, BAD_INPUT, STOPPED, TERMINATED = 0, 1, 2, 130, 143


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status; errors become one line on the error stream.

    Args:
        arguments: without the program's name; None takes the process's.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    with warnings.catch_warnings():
        # What a command has to say doesn't depend on how Python was started.
        warnings.simplefilter("default", UserWarning)
        warnings.showwarning = _once()
        with _terminated_as_stopped() as terminated:
            try:
                status = _run(words, debug=debug)
            except KeyboardInterrupt:  # while the command's own modules were imported
                status = _stopped()
        if terminated and status == STOPPED:
            _forget_interrupt()
            return TERMINATED
        return status


@contextmanager
def _terminated_as_stopped() -> Iterator[list[int]]:
    """Let SIGTERM (a scheduler's, `timeout`'s) end the work as Ctrl-C does: files that aren't whole are removed.

    Yields:
        A list that holds the signal once it came.
    """
    came: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        first = not came
        came.append(number)
        if first:  # a second one must not disturb the clearing away
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield came
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield came
    finally:
        signal.signal(signal.SIGTERM, before)


def _once() -> Callable[..., None]:
    """Show a warning as a line, and no text twice: a command may open a model for its data, and again for its work."""
    said: set[str] = set()

    def show(message: Warning | str, *_: object, **__: object) -> None:
        if (text := str(message)) not in said:
            said.add(text)
            complain(f"warning: {text}")

    return show


_LONGEST = 2_000
"""Characters of a line on the error stream; files may hold names of megabytes."""


def complain(line: str) -> None:
    """One line on the error stream."""
    text = " ".join(line.split())
    sys.stderr.write((text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…") + "\n")


def _run(words: list[str], *, debug: bool) -> int:
    import typer

    from bitwright.cli.app import add_commands_of_tools, app
    from bitwright.errors import BitwrightError, CheckFailed
    from bitwright.plugins import default_registry

    # Typer's own copy of click has no public name for its base of usage errors.
    usage_error: type[Exception] = typer.BadParameter.__mro__[1]
    try:
        add_commands_of_tools(next((word for word in words if not word.startswith("-")), None))
        status = app(args=words, prog_name="bitwright", standalone_mode=False)
        if status == STOPPED:  # Typer turns KeyboardInterrupt into this
            raise KeyboardInterrupt
        return status if isinstance(status, int) else DONE
    except usage_error as error:
        complain(f"bitwright: {error.format_message()}{_help_hint(error)}")  # type: ignore[attr-defined]
        return BAD_INPUT
    except typer.Exit as stop:
        return stop.exit_code
    except (KeyboardInterrupt, typer.Abort):
        return _stopped()
    except BrokenPipeError:
        sys.stderr.close()  # whoever read our output has gone; nothing more can be said
        return DONE
    except CheckFailed as error:
        complain(f"bitwright: {error}")
        return CHECK_FAILED
    except BitwrightError as error:
        if debug:
            traceback.print_exc()
        complain(f"bitwright: {error}")
        return BAD_INPUT
    except SystemExit as error:
        if not (plugins := default_registry().culprits(error)):
            raise  # of Typer, whose completion of words ends so
        if debug:
            traceback.print_exc()
        complain(f"bitwright: {plugins[0]} ends the process by itself (SystemExit: {error}); --debug shows where")
        return BAD_INPUT
    except Exception as error:
        if debug:
            raise
        if isinstance(error, OSError) and error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
            complain(f"bitwright: no file or folder can be called {str(error.filename)[:80]!r}…: {error.strerror}")
            return BAD_INPUT
        complain(f"bitwright: unexpected {type(error).__name__}: {error}. {_blame(error)}")
        return BAD_INPUT


def _stopped() -> int:
    runs = sys.modules.get("bitwright.runs")  # not imported here: it may be an import that was stopped
    if getattr(runs, "kept_work", tuple)():
        complain("bitwright: stopped; the same command goes on from the last finished layer")
    else:
        complain("bitwright: stopped; nothing is kept that the same command could go on from")
    return STOPPED


def _forget_interrupt() -> None:
    """Let the process end with the status that it is given.

    Where a KeyboardInterrupt has passed through code that a C extension ran, CPython remembers it as unhandled, and
    ends by SIGINT whatever status is asked for. Running anything so makes it forget.
    """
    import ctypes

    if run := getattr(getattr(ctypes, "pythonapi", None), "PyRun_SimpleString", None):
        run(b"")


def _blame(error: Exception) -> str:
    """Whose bug an unexpected error is: a third party's where it has come through the code of a plugin."""
    from bitwright.plugins import default_registry

    if plugins := default_registry().culprits(error):
        return f"It arose in {plugins[0]}, and is for its authors; --debug shows where"
    return "This is a bug, or a limit that should be said better; --debug shows where it arose"


def _help_hint(error: Exception) -> str:
    context = getattr(error, "ctx", None)
    return f" (see `{context.command_path} --help`)" if context is not None else ""
