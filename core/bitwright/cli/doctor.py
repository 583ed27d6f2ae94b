"""``bitwright doctor``: is this installation able to work, and if not, what would help?"""

from __future__ import annotations

import os
import platform
import sys
from typing import TYPE_CHECKING

import typer

from bitwright.cli import console

if TYPE_CHECKING:
    from bitwright.plugins.registry import Registry


def doctor() -> None:
    """Check the installation: versions, backends, plugins. Exits with 1 if something needs attention."""
    from bitwright.catalogue import described
    from bitwright.errors import BitwrightError, MissingExtraError
    from bitwright.plugins.registry import default_registry
    from bitwright.runs import versions

    registry = default_registry()
    problems: list[str] = []
    modules = [m for info in registry.backends().values() for m in info.modules]
    # The layout of what runs store isn't a version that anybody has installed.
    rows = [(name, version) for name, version in versions(modules).items() if name != "results"]
    rows.append(("system", f"{platform.system()} {platform.release()} {platform.machine()}, {os.cpu_count()} CPUs"))
    rows.append(("executable", sys.executable))
    console.table(("", ""), rows)
    working = 0
    for name in registry.backends():
        try:
            told = _told(registry, name)
        except MissingExtraError as error:
            console.say(f"{error}")
        except Exception as error:  # whatever is broken: the others are told of all the same
            problems.append(f"backend {name}: {error if isinstance(error, BitwrightError) else described(error)}")
        else:
            working += 1
            for line in told:
                console.say(line)
    for name in registry.techniques():
        try:
            registry.technique(name)
            registry.settings(name)
        except (BitwrightError, ImportError) as error:
            problems.append(f"technique {name}: {error}")
    console.say(f"{len(registry.techniques())} techniques")
    problems += [
        f"plugin {plugin.name} ({plugin.distribution}) {plugin.state}: {plugin.reason}\n{plugin.traceback}"
        for plugin in registry.plugins()
        if plugin.state in ("failed", "partial")
    ]
    if not working:
        problems.append('no backend is ready; the light one comes with: pip install "bitwright[onnx]"')
    for problem in problems:
        console.say(problem.rstrip())
    console.say("all well" if not problems else f"{len(problems)} problems")
    if problems:
        raise typer.Exit(1)


def _told(registry: Registry, name: str) -> list[str]:
    """What a backend can do, and what it has to say of this host.

    Raises:
        MissingExtraError: its framework isn't installed.
        PluginError: it can't be made, or breaks when it is asked.
    """
    from bitwright.backend import capabilities
    from bitwright.bundle import HostNotes

    backend = registry.backend(name)
    with registry.blaming(registry.backend_info(name)):
        lines = [f"backend {name}: ready ({', '.join(sorted(capabilities(backend))) or 'nothing optional'})"]
        notes: object = backend.host_notes() if isinstance(backend, HostNotes) else ()
        if not isinstance(notes, tuple | list):
            raise TypeError(f"host_notes gives {notes!r}, where a tuple of lines belongs")
        return lines + [f"  {note}" for note in notes]
